"""The attention kernels' time on paper, from the instructions that were compiled.

A kernel's loops issue instructions and take exponentials beside their matrix products, and each of
the three has a rate of its own: a multiprocessor's four schedulers issue an instruction of a warp a
cycle, its special units make 16 exponentials, its tensor cores multiply. A kernel takes at least
the longest of the three, and its bytes over the bandwidth. Unlike the floor of roofline.py, which
counts causal products alone, it counts whole tiles, the diagonal's steps and what was compiled. It
is still no forecast: waits, the pipeline's start and what stands outside the loops are left out,
and nothing of it was measured.

bench/instructions.csv has the counts, as ``python tools/resources.py --loops`` prints them. Stock
kernels are taken at their products in tiles of 128 x 128."""

import csv
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch

from bench.roofline import (
    BF16,
    FP32,
    Device,
    Shape,
    Stage,
    causal_scores,
    horizon_tokens,
    prologue_bytes,
    two_product_kernels,
)
from sisa_kernels.paths.choice import flags, window_of

TABLE = Path(__file__).parent / "instructions.csv"
FLOPS_A_CYCLE = {80: 2048, 90: 4096, 100: 8192}  # of a multiprocessor, dense bf16
SCHEDULERS = 4  # of a multiprocessor
EXPONENTIALS_A_CYCLE = 16
WARP = 32  # threads
STOCK_TILE = (128, 128)
FORMS = ("exact", "far_and_band", "wide", "wide, v padded")


class Loop(NamedTuple):
    """A step of a kernel's loop, of one warp."""

    instructions: int
    exponentials: int


@dataclass(frozen=True)
class Kernel:
    """A kernel as compiled: m queries by n keys on ``warps`` warps, and its loops by name."""

    m: int
    n: int
    diagonal: int  # rows of the other side in a step on the diagonal
    warps: int
    loops: dict[str, Loop]


class Steps(NamedTuple):
    """Steps of all of a head's programs."""

    near: int
    diagonal: int
    far: int


@cache
def compiled_kernels(
    arch: int, head_dim: int, d_state: int, variant: str = "plain"
) -> dict[str, Kernel]:
    """The forward, query and key kernels at these widths; ValueError: the table has none.

    ``variant``: "plain", of one document, or "band"."""
    wanted = str(arch), str(head_dim), str(d_state), variant
    with open(TABLE, newline="", encoding="utf-8") as file:
        rows = [
            row
            for row in csv.DictReader(file)
            if (row["arch"], row["Dh"], row["Ds"], row["variant"]) == wanted
        ]
    if not rows:
        raise ValueError(f"{TABLE.name} has no sm_{arch} kernels of widths {head_dim}+{d_state}")
    found: dict[str, Kernel] = {}
    for row in rows:
        m, n, diagonal, warps = (int(row[name]) for name in ("m", "n", "diagonal", "warps"))
        kernel = found.setdefault(row["kernel"], Kernel(m, n, diagonal, warps, {}))
        kernel.loops[row["loop"]] = Loop(int(row["instructions"]), int(row["exp2"]))
    return found


def reach_of(length: int, horizon: float) -> int:
    """The largest whole distance below the horizon."""
    return max(0, math.ceil(min(horizon, length)) - 1)


def steps_over_keys(
    length: int, kernel: Kernel, horizon: float, window: int | None = None
) -> Steps:
    """Of the programs that walk the keys of a tile of queries; ``window``: of a band so wide."""
    near = diagonal = far = 0
    reach = reach_of(length, horizon)
    for start in range(0, length, kernel.m):
        whole = start // kernel.n
        begin = 0 if window is None else max(0, start - (window - 1)) // kernel.n
        past = min(max(begin, (start - reach) // kernel.n), whole)
        end = min(start + kernel.m, length)
        near += whole - past
        far += past - begin
        diagonal += -(-(end - whole * kernel.n) // kernel.diagonal)
    return Steps(near, diagonal, far)


def steps_over_queries(
    length: int, kernel: Kernel, horizon: float, window: int | None = None
) -> Steps:
    """Of the programs that walk the queries of a tile of keys; ``window``: of a band so wide."""
    near = diagonal = far = 0
    reach = reach_of(length, horizon)
    for start in range(0, length, kernel.n):
        first = start // kernel.m * kernel.m
        below = min(-(-(start + kernel.n) // kernel.m) * kernel.m, length)
        end = length if window is None else min(start + kernel.n - 1 + window, length)
        last = -(-(start + kernel.n + reach) // kernel.m) * kernel.m
        past = max(below, min(last, end))
        diagonal += -(-(below - first) // kernel.diagonal)
        near += -(-(past - below) // kernel.m)
        far += max(0, -(-(end - past) // kernel.m))
    return Steps(near, diagonal, far)


def macs_of(name: str, shape: Shape) -> tuple[int, int]:
    """Multiplications a score of a kernel: of q, k and v, and of its importance product."""
    Dh, Ds, Dv = shape.head_dim, shape.d_state, shape.value_dim
    return {
        "forward": (Dh + Dv, Ds),
        "query": (2 * Dh + Dv, 2 * Ds),
        "key": (2 * Dh + 2 * Dv, 2 * Ds),
    }[name]


def bytes_of(name: str, shape: Shape, window: int | None = None) -> int:
    """What a kernel moves, by roofline.py; of a band also what it continues, once more."""
    forward, (_, key, query) = two_product_kernels(shape, (1, 1), math.inf, 0)
    moved = {"forward": forward, "query": query, "key": key}[name].bytes
    if window is None:
        return moved
    Dh, Dv = shape.head_dim, shape.value_dim
    row = {"forward": BF16 * Dv + FP32, "query": BF16 * Dh, "key": BF16 * (Dh + Dv)}[name]
    return moved + row * shape.batch * shape.heads * (shape.length - window)


def kernel_seconds(
    name: str,
    kernel: Kernel,
    shape: Shape,
    device: Device,
    horizon: float,
    window: int | None = None,
) -> float:
    """The longest of issue, exponentials, products and bytes; ``window``: of a band so wide."""
    count = steps_over_queries if name == "key" else steps_over_keys
    steps = count(shape.length, kernel, horizon, window)
    walked, stays = (kernel.m, kernel.n) if name == "key" else (kernel.n, kernel.m)
    widths = (walked, kernel.diagonal, walked)
    content, importance = macs_of(name, shape)
    macs = (content + importance, content + importance, content)
    multiplied = sum(s * width * stays * each for s, width, each in zip(steps, widths, macs))
    loops = [kernel.loops[loop] for loop in Steps._fields]
    issued = kernel.warps * sum(s * loop.instructions for s, loop in zip(steps, loops))
    exponentials = kernel.warps * WARP * sum(s * loop.exponentials for s, loop in zip(steps, loops))
    cycles = max(
        2 * multiplied / FLOPS_A_CYCLE[device.arch],
        issued / SCHEDULERS,
        exponentials / EXPONENTIALS_A_CYCLE,
    )
    heads = shape.batch * shape.heads
    seconds = heads * cycles / (device.multiprocessors * clock(device))
    return max(seconds, bytes_of(name, shape, window) / (1e12 * device.terabytes))


def clock(device: Device) -> float:
    """Cycles a second at which the data sheet's peak is reached."""
    return 1e12 * device.tflops / (device.multiprocessors * FLOPS_A_CYCLE[device.arch])


def memory_seconds(bytes_a_row: float, shape: Shape, device: Device) -> float:
    """Of what moves so many bytes a token and head."""
    rows = shape.batch * shape.length * shape.heads
    return rows * bytes_a_row / (1e12 * device.terabytes)


def stock_seconds(shape: Shape, device: Device) -> float:
    """A stock kernel's forward and backward at q's width ``head_dim`` and v's ``value_dim``."""
    scores = shape.batch * shape.heads * causal_scores(shape.length, STOCK_TILE)
    macs = 4 * shape.head_dim + 3 * shape.value_dim
    return Stage("", 2 * macs * scores, 0).seconds(device)


def exact_seconds(
    shape: Shape,
    device: Device,
    horizon: float,
    kernels: dict[str, Kernel],
    window: int | None = None,
) -> float:
    """The three kernels one after the other."""
    return sum(
        kernel_seconds(name, kernel, shape, device, horizon, window)
        for name, kernel in kernels.items()
    )


def serves(form: str, length: int, half_life: float, horizon: float) -> bool:
    """Whether a form takes heads of such a memory in bf16."""
    needed = torch.tensor([[[horizon, length / half_life]]])
    form = form.partition(",")[0]
    return not flags(needed, form, window_of(length), length, torch.bfloat16).any()


def attention_seconds(form: str, shape: Shape, device: Device, horizon: float) -> float:
    """The attention kernels of a form, forward and backward, without what runs before and after."""
    widths = shape.head_dim, shape.d_state
    window = window_of(shape.length)
    if form == "exact" or (form == "far_and_band" and shape.length <= window):
        return exact_seconds(shape, device, horizon, compiled_kernels(device.arch, *widths))
    if form == "far_and_band":
        kernels = compiled_kernels(device.arch, *widths, "band")
        far = stock_seconds(replace(shape, length=shape.length - window), device)
        return far + exact_seconds(shape, device, horizon, kernels, window)
    if form == "wide":
        return stock_seconds(replace(shape, head_dim=sum(widths)), device)
    if form == "wide, v padded":
        padded = replace(shape, head_dim=sum(widths), value_dim=sum(widths))
        return stock_seconds(padded, device)
    raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")


def prologue_seconds(form: str, shape: Shape, device: Device) -> float:
    """What runs before and after the kernels, at its bytes; the forward's again in a backward."""
    path = {"plain": "plain", "wide": "augmented", "wide, v padded": "padded"}.get(form, "exact")
    before, after = prologue_bytes(path, shape)
    again = before if path == "exact" else 0
    return memory_seconds(before + again + after, shape, device)


def over_plain(form: str, shape: Shape, device: Device, horizon: float) -> tuple[float, float]:
    """A form's time over plain attention's: of the kernels alone, and with what is around them."""
    kernels = attention_seconds(form, shape, device, horizon)
    plain = stock_seconds(shape, device)
    whole = kernels + prologue_seconds(form, shape, device)
    return kernels / plain, whole / (plain + prologue_seconds("plain", shape, device))


def lines(
    lengths: Sequence[int],
    d_states: Sequence[int],
    batch: Shape,
    device: Device,
    half_lives: Sequence[float],
    tolerance: float,
) -> Iterator[str]:
    """The table: each form over plain attention, forward and backward; -: not such heads."""
    yield "over plain attention: the kernels alone, and with prologue and epilogue"
    yield f"{'L':>6} {'Ds':>4} {'half-life':>9} | " + " | ".join(f"{form:^14}" for form in FORMS)
    tokens = batch.batch * batch.length
    for length, d_state, half_life in product(lengths, d_states, half_lives):
        shape = replace(batch, batch=tokens // length, length=length, d_state=d_state)
        horizon = horizon_tokens(d_state, half_life, tolerance)
        cells = []
        for form in FORMS:
            alone, whole = over_plain(form, shape, device, horizon)
            served = serves(form, length, half_life, horizon)
            cells.append(f"{alone:6.2f}  {whole:6.2f}" if served else f"{'-':>6}  {'-':>6}")
        yield f"{length:6} {d_state:4} {half_life:9g} | " + " | ".join(cells)
