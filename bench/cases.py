"""What the benches time, by section: groups of cases that take turns, each with the check that
gates it (paths.py).
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import sisa_kernels as sk
from bench import authors
from bench.authors import eager_chain
from bench.paths import (
    ATTENTION,
    AUTHORS,
    EXACT,
    EXACT_ON_CPU,
    FLASH_TABLE,
    HALF_LIFE,
    STOCK,
    Path,
    errors,
    failure,
    first_wrong,
    problem,
    results,
)
from bench.roofline import Device, Shape, horizon_tokens, importance_share, stages
from sisa_kernels import _extension
from sisa_kernels.rotation import rotate
from sisa_kernels.triton import op as ta
from sisa_kernels.triton.tiles import choose_tiles, tile_key, tuned_tiles
from sisa_kernels.triton.tune import CHECK_LENGTH, autotune
from sisa_model.models.context import Context, rotary_at, rotary_tables
from sisa_model.models.presets import preset_config

CUDA = torch.device("cuda")
LAYER_LIMIT = 1e-5  # relative error of a whole layer in fp32


@dataclass(frozen=True)
class Setting:
    """Where and at what sizes; the defaults are an attention layer of the 152M model."""

    device: torch.device = CUDA
    dtype: torch.dtype = torch.bfloat16
    lengths: tuple[int, ...] = ()  # of the sequences; empty: each section's own
    state_widths: tuple[int, ...] = (16, 32, 64, 128)
    tokens: int = 32768  # of a batch
    heads: int = 12
    head_width: int = 64
    models: tuple[str, ...] = ("transformer-152m", "sisa-152m-ds16")  # the first is the baseline
    datasheet: Device | None = None  # what bounds are taken from; None: no bounds

    def shapes(self, *lengths: int) -> list[Shape]:
        """A shape for each state width and length (``lengths`` where the setting has none of its
        own).
        """
        width = self.head_width
        pairs = [(ds, length) for ds in self.state_widths for length in self.lengths or lengths]
        return [
            Shape(max(1, self.tokens // length), length, self.heads, width, ds, width)
            for ds, length in pairs
        ]


@dataclass(frozen=True)
class Case:
    """One thing to time. Cases that are timed together take turns."""

    op: str
    path: str
    mode: str
    shape: str
    passes: str
    make: Callable[[], Callable[[], object]]  # allocates the inputs and returns what is timed
    check: Callable[[], str | None]  # why it must not be timed
    proofs: str = ""
    bound: float | None = None  # ms
    work: float = 0.0  # of ``unit`` a second, if it took a second
    unit: str = ""
    formula: str = ""  # of the work
    baseline: bool = (
        False  # the fastest such case of a group and pass is what the others are measured against
    )


def label_of(shape: Shape) -> str:
    return f"{shape.batch}x{shape.length}x{shape.heads} {shape.head_width}+{shape.state_width}/{shape.value_width}"


def widths_of(shape: Shape) -> tuple[int, int, int]:
    return shape.head_width, shape.state_width, shape.value_width


def attention_case(
    op: str, path: Path, shape: Shape, label: str, passes: str, s: Setting, **options
) -> Case:
    """A path at a shape, with RoPE in every section but ``stock``; FLOPs are those of the causal
    scores.
    """
    with_rope, backward = op != "stock", passes == "fwd+bwd"
    B, L, H, Dh, Ds, Dv = astuple(shape)
    horizon = horizon_tokens(Ds, HALF_LIFE) if path is EXACT else math.inf
    bound = None
    if s.datasheet is not None:
        kernels = stages(path.cost, shape, backward=backward, horizon=horizon)
        bound = 1e3 * sum(
            k.seconds(s.datasheet)
            for k in kernels
            if with_rope or not k.name.startswith("prologue")
        )
    width = Dh if path.mode == "plain" else Dh + Ds * importance_share(L, horizon)

    def make() -> Callable[[], object]:
        x, rotary, dy = problem(shape, s.dtype, s.device)
        rotary = rotary if with_rope else None
        return lambda: (
            results(path.call, x, rotary, dy, path.uses) if backward else path.call(x, rotary)
        )

    mode = path.mode
    if with_rope and mode == "plain":
        mode += ", RoPE compiled" if s.device.type == "cuda" else ", RoPE eager"
    return Case(
        op,
        path.name,
        mode,
        label,
        passes,
        make,
        check=lambda: failure(path, widths_of(shape), s.dtype, s.device, with_rope),
        proofs=path.proofs.format(ds=Ds),
        bound=bound,
        work=1e-12 * B * H * L * (L + 1) * (4 * width + 3 * Dv if backward else width + Dv),
        unit="TFLOP/s",
        formula=f"BHL(L+1)({'4W+3Dv' if backward else 'W+Dv'}); W={'Dh' if path.mode == 'plain' else 'Dh+Ds*share within horizon'}",
        **options,
    )


def stock_groups(s: Setting) -> list[list[Case]]:
    """Each stock backend at the widths of augmented operands, v as it is or padded to them;
    baseline: the plain widths.
    """
    groups, Dh = [], s.head_width
    widths = [
        (Dh, Dh),
        *(pair for ds in s.state_widths for pair in ((Dh + ds, Dh), (Dh + ds, Dh + ds))),
    ]
    if (192, 64) in widths:
        widths.append((192, 128))  # the one pair past 128 that cuDNN trains
    for shape in dict.fromkeys(replace(shape, state_width=2) for shape in s.shapes(2048, 16384)):
        cases = []
        for qk, v in widths:
            label = f"{shape.batch}x{shape.length}x{shape.heads} {qk}/{v}"
            wide = replace(shape, head_width=qk, value_width=v)
            cases += [
                attention_case("stock", path, wide, label, "fwd+bwd", s, baseline=qk == Dh)
                for path in STOCK
            ]
        groups.append(cases)
    return groups


def attention_groups(s: Setting, paths: Sequence[Path] = ATTENTION) -> list[list[Case]]:
    """Every attention path, forward and forward + backward; baseline: plain attention with RoPE by
    the fastest stock backend.
    """
    groups = []
    for shape in s.shapes(2048, 16384, 4096, 8192, 1024, 32768):  # the two of the targets first
        label = label_of(shape)
        pairs = [(path, passes) for passes in ("fwd", "fwd+bwd") for path in paths]
        groups.append(
            [
                attention_case("attention", p, shape, label, passes, s, baseline=p in STOCK)
                for p, passes in pairs
            ]
        )
    return groups


def timed_prologue(
    function: Callable, shape: Shape, s: Setting, again: bool
) -> Callable[[], object]:
    (q, k, _, b, c, log_decay, theta, lam), rotary, _ = problem(shape, s.dtype, s.device)
    return torch.no_grad()(lambda: function(q, k, b, c, log_decay, theta, lam, *rotary, again))


def timed_copy(moved: int, device: torch.device) -> Callable[[], object]:
    """A copy that reads half of the bytes ``moved`` and writes the other half."""
    source, target = (torch.ones(moved // 2, dtype=torch.int8, device=device) for _ in range(2))
    return lambda: target.copy_(source)


def prologue_failure(shape: Shape, setting: Setting, again: bool) -> str | None:
    """Why the compiled prologue must not be timed: q, k, b, c rotated and g, against fp64."""
    small = replace(shape, batch=1, length=CHECK_LENGTH, heads=2)
    (q, k, _, b, c, log_decay, theta, lam), rotary, _ = problem(
        small, setting.dtype, setting.device
    )
    prologue = ta.fused(setting.device, ta.prologue)
    with torch.no_grad():
        q_rot, k_rot, x = prologue(q, k, b, c, log_decay, theta, lam, *rotary, again)
        phase, tables = theta.double().cumsum(1), [table.double()[:, None] for table in rotary]
        turns = [tables, tables, *[(phase.cos(), phase.sin())] * 2]
        oracle = [rotate(t.double(), *turn) for t, turn in zip((q, k, b, c), turns)]
        oracle.append(log_decay.double().cumsum(1).transpose(1, 2) * ta.LOG2E)
        found = [q_rot, k_rot, x.b, x.c, x.g_hi.double() + x.g_lo]
        off = errors(found, oracle, [])
    return first_wrong(
        ("q", "k", "b", "c", "g"), off, [2 * torch.finfo(setting.dtype).eps + 1e-6] * 4 + [1e-6]
    )


def prologue_groups(s: Setting) -> list[list[Case]]:
    """The Triton path's prologue, compiled and op by op, as the forward and the backward run it;
    baseline: a copy of its bytes.
    """
    groups, prologue = [], ta.prologue
    for shape in s.shapes(2048, 16384):
        cases = []
        for passes, stage_name in (("fwd", "prologue"), ("bwd", "prologue again")):
            stage, again = (
                next(x for x in stages("exact", shape) if x.name == stage_name),
                passes == "bwd",
            )
            makes = {
                "compiled": partial(timed_prologue, ta.fused(s.device, prologue), shape, s, again),
                "eager": partial(timed_prologue, prologue, shape, s, again),
                "copy": partial(timed_copy, stage.bytes, s.device),
            }
            check = partial(prologue_failure, shape, s, again)
            bound = None if s.datasheet is None else 1e3 * stage.seconds(s.datasheet)
            for name, make in makes.items():
                checked, copied = check if name == "compiled" else no_check, name == "copy"
                case = Case(
                    "prologue",
                    name,
                    "exact",
                    label_of(shape),
                    passes,
                    make,
                    checked,
                    bound=bound,
                    baseline=copied,
                )
                cases.append(
                    replace(
                        case,
                        work=1e-9 * stage.bytes,
                        unit="GB/s",
                        formula="bytes of roofline.py's stage",
                    )
                )
        groups.append(cases)
    return groups


def fused(q, k, b, c, log_decay, theta, lam, cos, sin) -> tuple[Tensor, Tensor]:
    return sk.augment_qk(q, k, b, c, log_decay, theta, lam, rotary=(cos, sin))


AUGMENTATIONS = {
    "extension": fused,
    "chain": eager_chain,
    "compiled": torch.compile(eager_chain, dynamic=False),
}


def timed_augmentation(
    function: Callable, shape: Shape, s: Setting, backward: bool
) -> Callable[[], object]:
    (q, k, _, b, c, log_decay, theta, lam), rotary, _ = problem(shape, s.dtype, s.device)
    inputs = (q, k, b, c, log_decay, theta, lam)
    if not backward:
        return torch.no_grad()(lambda: function(*inputs, *rotary))
    grads = [torch.randn_like(x) for x in fused(*inputs, *rotary)]
    return lambda: torch.autograd.grad(function(*inputs, *rotary), inputs, grads)


def extension_failure(shape: Shape, s: Setting) -> str | None:
    """Why the extension's augmentation must not be timed."""
    if s.device.type == "cuda" and _extension.RECORD.get("cuda_archs", "none") in ("", "none"):
        return "the extension has no CUDA part: plain PyTorch would run"
    return failure(FLASH_TABLE, widths_of(shape), s.dtype, s.device, True)


def augmentation_groups(s: Setting, baseline: str = "copy") -> list[list[Case]]:
    """The extension's augmentation, the authors' chain of ops, that chain compiled, and a copy of
    the bytes that they must move.
    """
    groups = []
    for shape in s.shapes(2048):
        cases, as_published_check = (
            [],
            partial(failure, AUTHORS, widths_of(shape), s.dtype, s.device, True),
        )
        n, width, size = (
            shape.batch * shape.length * shape.heads,
            shape.head_width + shape.state_width,
            s.dtype.itemsize,
        )
        read = n * (
            2 * width * size + 4 + 2 * shape.state_width
        )  # q, k, b, c, and in fp32 the decay and Ds / 2 phases
        written = n * 2 * width * size
        for passes, moved in (("fwd", read + written), ("fwd+bwd", 3 * read + 2 * written)):
            makes = {
                name: partial(timed_augmentation, f, shape, s, passes != "fwd")
                for name, f in AUGMENTATIONS.items()
            }
            for name, make in {**makes, "copy": partial(timed_copy, moved, s.device)}.items():
                check = {
                    "extension": partial(extension_failure, shape, s),
                    "chain": as_published_check,
                }.get(name, no_check)
                proofs = (
                    "test_augment_cuda" if name == "extension" and s.device.type == "cuda" else ""
                )
                case = Case(
                    "augment",
                    name,
                    "clamped",
                    label_of(shape),
                    passes,
                    make,
                    check,
                    proofs,
                    baseline=name == baseline,
                )
                cases.append(
                    replace(
                        case,
                        work=1e-9 * moved,
                        unit="GB/s",
                        formula="inputs and results, each once",
                    )
                )
        groups.append(cases)
    return groups


def no_check() -> str | None:
    """The check of what is made of stock ops alone."""
    return None


def preset_gate(preset: str, s: Setting) -> dict[str, Any]:
    """The check and the tests that gate a model: those of its attention; of a rival's, its layer
    against the same in fp64.
    """
    config = preset_config(authors.ours(preset))
    if config.family == "transformer":
        return {"check": no_check}
    if config.family != "sisa":
        return {"check": partial(layer_failure, preset, s)}
    ours = EXACT if s.device.type == "cuda" else EXACT_ON_CPU
    path = ours if preset == authors.ours(preset) else AUTHORS
    check = partial(
        failure, path, (config.head_dim, config.d_state, config.head_dim), s.dtype, s.device, True
    )
    return {"check": check, "proofs": path.proofs.format(ds=config.d_state)}


def one_layer(preset: str, device: torch.device) -> Any:
    """A model of the preset's first layer alone, of the same weights every time."""
    torch.manual_seed(0)
    return authors.build(preset, n_layers=1, vocab_size=8).to(device)


def layer_limit(s: Setting) -> float:
    """The relative error that a whole layer may have."""
    return LAYER_LIMIT if s.dtype == torch.float32 else torch.finfo(s.dtype).eps


@functools.cache
def layer_failure(preset: str, s: Setting) -> str | None:
    """Why a model's first layer must not be timed: y and dL/dx, autocast as timed, against the
    layer's own formulas in fp64.
    """
    model, width = one_layer(preset, s.device), preset_config(preset).d_model
    x, dy = torch.randn(2, 1, CHECK_LENGTH, width, device=s.device).unbind()
    found = []
    for dtype in (torch.float32, torch.float64):
        layer, rotary = (
            model.to(dtype).layers[0],
            rotary_tables(CHECK_LENGTH, model.config.head_dim, s.device),
        )
        leaf = x.to(dtype).requires_grad_()
        with torch.autocast(
            s.device.type, s.dtype, enabled=dtype == torch.float32 and s.dtype != torch.float32
        ):
            y = layer(leaf, Context(rotary))
        found.append([y.detach(), *torch.autograd.grad(y, leaf, dy.to(dtype))])
    return first_wrong(("y", "dx"), errors(*found, []), [layer_limit(s)] * 2)


def layer_step(preset: str, batch: int, length: int, s: Setting) -> Callable[[], object]:
    """Forward and backward of a preset's first layer."""
    model = one_layer(preset, s.device)
    layer, width, parameters = (
        model.layers[0],
        model.config.d_model,
        list(model.layers[0].parameters()),
    )
    x, dy = torch.randn(2, batch, length, width, device=s.device).unbind()
    context, x = Context(rotary_tables(length, model.config.head_dim, s.device)), x.requires_grad_()

    def call() -> object:
        with torch.autocast(s.device.type, s.dtype, enabled=s.dtype != torch.float32):
            y = layer(x, context)
        return torch.autograd.grad(y, [x, *parameters], dy)

    return call


def layer_groups(s: Setting) -> list[list[Case]]:
    """One layer of each model, forward + backward, fp32 weights, autocast to a half dtype;
    baseline: the first model's.
    """
    groups = []
    for length in s.lengths or (2048,):
        batch = max(1, s.tokens // length)
        options = {"work": batch * length, "unit": "tok/s", "formula": "BL"}
        groups.append(
            [
                Case(
                    "layer",
                    preset,
                    "eager",
                    f"{batch}x{length}",
                    "fwd+bwd",
                    partial(layer_step, preset, batch, length, s),
                    baseline=preset == s.models[0],
                    **preset_gate(preset, s),
                    **options,
                )
                for preset in s.models
            ]
        )
    return groups


def decode_step(preset: str, length: int, s: Setting) -> Callable[[], object]:
    """The first layer's next token behind ``length`` tokens; every 32nd takes a cache of tokens
    back to them.
    """
    model = one_layer(preset, s.device).to(s.dtype)
    layer, width, head = model.layers[0], model.config.d_model, model.config.head_dim
    cache, states = (
        layer.mixer.make_cache(1),
        torch.randn(1, length + 1, width, device=s.device).to(s.dtype),
    )
    turns = [
        Context(rotary_at(torch.arange(*span, device=s.device), head))
        for span in ((0, length), (length, length + 1))
    ]
    with torch.no_grad():
        layer(states[:, :length], turns[0], cache)

    @torch.no_grad()
    def call() -> Tensor:
        if isinstance(cache, sk.TokenCache) and cache.lengths[0] >= length + 32:
            cache.lengths = [length]
        return layer(states[:, length:], turns[1], cache)

    return call


@functools.cache
def decode_failure(preset: str, s: Setting) -> str | None:
    """Why a model's decoding must not be timed: the next token's states against the layer in fp64
    without a cache.
    """
    found = decode_step(preset, CHECK_LENGTH, s)()
    model = one_layer(preset, s.device).to(s.dtype)
    states = (
        torch.randn(1, CHECK_LENGTH + 1, model.config.d_model, device=s.device).to(s.dtype).double()
    )
    rotary = rotary_tables(CHECK_LENGTH + 1, model.config.head_dim, s.device)
    with torch.no_grad():
        right = model.double().layers[0](states, Context(rotary))[:, -1:]
    return first_wrong(("the next token",), errors([found], [right], []), [layer_limit(s)])


def decode_groups(s: Setting) -> list[list[Case]]:
    """One token of one layer of each model behind a cache, weights in the setting's dtype;
    baseline: the first model's.
    """
    groups = []
    for length in s.lengths or (512, 4096, 8192):
        groups.append(
            [
                Case(
                    "decode",
                    preset,
                    "cache",
                    f"1x{length}",
                    "token",
                    partial(decode_step, preset, length, s),
                    partial(decode_failure, preset, s),
                    baseline=preset == s.models[0],
                    work=1.0,
                    unit="tok/s",
                    formula="B",
                )
                for preset in s.models
            ]
        )
    return groups


def training_step(
    preset: str, compiled: bool, batch: int, length: int, device: torch.device
) -> Callable[[], object]:
    torch.manual_seed(0)
    model = authors.build(preset, max_seq_len=length).to(device)
    ids = torch.randint(model.config.vocab_size, (batch, length + 1), device=device)
    network, parameters = torch.compile(model) if compiled else model, list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=0.0)

    def call() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = network(ids[:, :-1])
        F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return call


def model_groups(s: Setting) -> list[list[Case]]:
    """A training step: bf16 autocast over fp32 weights on a GPU, as the trainer runs it and under
    torch.compile; fp32 on a CPU.
    """
    groups = []
    for length in s.lengths or (2048,):
        batch = max(1, min(s.tokens, 16384) // length)  # at 2048 the trainer's micro-batch, 8
        for mode in ("eager", "compiled") if s.device.type == "cuda" else ("eager",):
            cases = []
            for preset in s.models:
                make = partial(training_step, preset, mode == "compiled", batch, length, s.device)
                label, gate = f"{batch}x{length} {mode}", preset_gate(preset, s)
                case = Case(
                    "model",
                    preset,
                    mode,
                    label,
                    "step",
                    make,
                    **gate,
                    baseline=preset == s.models[0],
                )
                cases.append(replace(case, work=batch * length, unit="tok/s", formula="BL"))
            groups.append(cases)
    return groups


def with_tiles(case: Case, shape: Shape, s: Setting, search: bool) -> Callable[[], object]:
    """``case`` with the tiles of the table, or with those that are searched first."""
    widths = (
        max(ta.padded_width(shape.head_width), ta.padded_width(shape.value_width)),
        ta.padded_width(shape.state_width),
    )
    if search:
        tiles = autotune(*astuple(shape)[:5], dtype=s.dtype, device=s.device)
        print(f"{case.shape}: {tiles}", flush=True)
    else:
        tiles = choose_tiles(s.device, s.dtype, *widths)
    key, call = tile_key(s.device, s.dtype, *widths), case.make()

    def run() -> object:
        tuned_tiles()[key] = tiles
        return call()

    return run


def tune_groups(s: Setting) -> list[list[Case]]:
    """Exact attention with the tiles in use and with those that autotuning finds (printed, and kept
    where tiles.py keeps them).
    """
    groups = []
    for shape in s.shapes(2048):
        case = attention_case("attention", EXACT, shape, label_of(shape), "fwd+bwd", s)
        variants = {"in use": False, "tuned": True}
        makes = {
            name: partial(with_tiles, case, shape, s, search) for name, search in variants.items()
        }
        groups.append(
            [
                replace(case, op="tune", path=name, make=m, baseline=name == "in use")
                for name, m in makes.items()
            ]
        )
    return groups


GROUPS = {
    "stock": stock_groups,
    "attention": attention_groups,
    "prologue": prologue_groups,
    "augment": augmentation_groups,
    "layer": layer_groups,
    "decode": decode_groups,
    "model": model_groups,
    "tune": tune_groups,
}
