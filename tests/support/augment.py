"""Calls of the augmentation's ops: made up, random, run, and compared with fp64."""

import itertools
import math
import os
from collections.abc import Callable
from typing import NamedTuple

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sisa_kernels import testing
from sisa_kernels.paths.augment import augment_backward_eager, augment_eager

FP32 = torch.float32
BF16 = torch.bfloat16
FP16 = torch.float16
DTYPES = (FP32, BF16, FP16)
RESULTS = ("q_aug", "k_aug", "dq", "dk", "db", "dc", "dlog_decay", "dtheta", "dlam")
NIGHTLY = os.environ.get("SISA_NIGHTLY") == "1"


class Implementation(NamedTuple):
    forward: Callable
    backward: Callable


COMPILED = Implementation(torch.ops.sisa.augment.default, torch.ops.sisa.augment_backward.default)
EAGER = Implementation(augment_eager, augment_backward_eager)


class Call(NamedTuple):
    """Arguments of both ops."""

    inputs: list  # q, k, b, c, log_decay, theta, lam
    rotary: list  # cos, sin; or None, None
    starts: list
    clamp: float
    width: int
    grads: list  # dq_aug, dk_aug
    flux: list  # decay, phase; or None

    def double(self) -> "Call":
        wide = {}
        for name in ("inputs", "rotary", "grads", "flux"):
            wide[name] = [None if x is None else x.double() for x in getattr(self, name)]
        return self._replace(**wide)

    def of_both(self) -> tuple:
        return *self.inputs, *self.rotary, self.starts, self.clamp


def rotary_tables(length: int, head_width: int) -> list[torch.Tensor]:
    angle = torch.arange(length)[:, None] * 10000 ** (-torch.arange(0, head_width, 2) / head_width)
    return [angle.cos(), angle.sin()]


def packed_views(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Views of [B, L, heads, channels] that lie side by side, as of one projection."""
    flat = [x.flatten(2) for x in tensors]
    pieces = torch.cat(flat, 2).split([x.shape[2] for x in flat], 2)
    return [piece.unflatten(2, x.shape[2:]) for piece, x in zip(pieces, tensors)]


def augment_call(
    length=257,
    batch=2,
    heads=(4, 4),
    widths=(64, 16),
    dtype=FP32,
    out=None,
    decay=-5.0,
    step=0.3,
    starts=(0,),
    clamp=math.inf,
    pad=0,
    rotary=True,
    flux=False,
    packed=True,
    still=0,
) -> Call:
    """A call on a problem of (query heads, key heads) and (Dh, Ds), with ``step`` its theta.

    ``still`` tokens at either end of each segment have no decay: its extremes are ties."""
    (H, G), (Dh, Ds) = heads, widths
    shape = {"B": batch, "L": length, "H": H, "G": G, "Dh": Dh, "Ds": Ds}
    problem, _ = testing.problem(**shape, decay=decay, theta=step, lam=None, dtype=dtype)
    q, k, b, c, log_decay, theta, lam = (x.detach() for x in problem.scores().tensors())
    for start, end in itertools.pairwise((*starts, length)):
        log_decay[:, start : start + still] = 0
        log_decay[:, max(start, end - still) : end] = 0
    if packed:
        q, k, b, c = packed_views([q, k, b, c])
        log_decay, theta = packed_views([log_decay[..., None], theta])
        log_decay = log_decay[..., 0]
    generator = torch.Generator().manual_seed(1)

    def normal(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, generator=generator)

    width = Dh + Ds + pad
    grads = [normal(batch, length, n, width).to(out or dtype) for n in heads]
    fluxes: list = [None, None]
    if flux:
        per_segment = (batch, len(starts), G)
        fluxes = [normal(*per_segment).double(), normal(*per_segment, Ds // 2).double()]
    tables = rotary_tables(length, Dh) if rotary else [None, None]
    inputs = [q, k, b, c, log_decay, theta, lam]
    return Call(inputs, tables, list(starts), clamp, width, grads, fluxes)


def run(implementation: Implementation, p: Call, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    results = implementation.forward(*p.of_both(), p.width, dtype)
    grads = implementation.backward(*p.grads, *p.of_both(), *p.flux)
    return dict(zip(RESULTS, (*results, *grads)))


def errors(
    results: dict[str, torch.Tensor], oracle: dict[str, torch.Tensor]
) -> dict[str, tuple[float, float]]:
    """Each result's relative error, over all and of the worst token's row by the typical row."""
    found = {}
    for name, exact in oracle.items():
        rows = exact.flatten(2) if exact.ndim > 1 else exact[:, None]
        error = results[name].double().reshape(rows.shape) - rows
        typical = max(rows.norm(dim=-1).square().mean().sqrt().item(), 1e-30)
        whole = error.norm().item() / max(rows.norm().item(), 1e-30)
        found[name] = (whole, error.norm(dim=-1).max().item() / typical)
    return found


def check(
    p: Call, dtype: torch.dtype, multiple: float = 2.0, implementation: Implementation = COMPILED
) -> None:
    """The compiled op errs by a small multiple of PyTorch's error in the same dtype."""
    oracle = run(EAGER, p.double(), torch.float64)
    compiled = run(implementation, p, dtype)
    eager = run(EAGER, p, dtype)
    for name in oracle:
        assert compiled[name].shape == eager[name].shape, name
        assert compiled[name].dtype == eager[name].dtype, name
        assert compiled[name].is_contiguous(), name
    floor = 4 * torch.finfo(FP32).eps
    allowed = errors(eager, oracle)
    for name, pair in errors(compiled, oracle).items():
        for what, error, bound in zip(("whole", "worst row"), pair, allowed[name]):
            said = f"{name}, {what}: {error:.2e}, PyTorch in the same dtype {bound:.2e}"
            assert error <= multiple * bound + floor, said


CASES = {
    "one token": dict(length=1),
    "63 tokens, rotation off": dict(length=63, rotary=False),
    "1000 tokens, weak decay": dict(length=1000, decay=-7.0),
    "strong decay, clamped": dict(decay=1.0, clamp=11.0),
    "ties, clamped": dict(decay=1.0, clamp=11.0, still=40, heads=(4, 2)),
    "ties of segments, clamped": dict(decay=1.0, clamp=3.0, still=33, starts=(0, 1, 64, 130)),
    "no decay, clamped": dict(length=63, clamp=11.0, still=63),
    "decay past every exponent, segments": dict(length=63, decay=40.0, starts=range(63)),
    "shared key heads": dict(heads=(6, 2)),
    "one key head": dict(heads=(3, 1), flux=True),
    "segments and fluxes": dict(starts=(0, 1, 40, 41, 200), decay=-1.0, flux=True),
    "padded width": dict(pad=13),
    "odd widths": dict(widths=(60, 6), heads=(3, 3), pad=1),
    "odd head width, rotation off": dict(widths=(5, 2), rotary=False),
    "wide state": dict(widths=(64, 128), length=100),
    "contiguous": dict(packed=False),
    "large steps": dict(step=50.0),
}


def strided_and_plain() -> tuple[Call, Call]:
    """One call with its tensors transposed, expanded and sliced, and contiguous."""
    p = augment_call(length=63)
    q, k, b, c, log_decay, theta = (
        x.transpose(1, -1).contiguous().transpose(1, -1) for x in p.inputs[:6]
    )
    lam = torch.stack((p.inputs[6], p.inputs[6]), 1)[:, 0]
    strided = p._replace(
        inputs=[q, k, b, c[:, :, :1].expand_as(c), log_decay, theta, lam],
        rotary=[table.T.contiguous().T for table in p.rotary],
        grads=[x.transpose(0, 3).contiguous().transpose(0, 3) for x in p.grads],
    )
    plain = {}
    for name in ("inputs", "rotary", "grads"):
        plain[name] = [x.contiguous() for x in getattr(strided, name)]
    return strided, strided._replace(**plain)


# ---- Random calls ------------------------------------------------------------------------------


def laid_out(draw: st.DrawFn, x: torch.Tensor) -> torch.Tensor:
    """The same values as a view of random strides and offset into a larger storage of NaN."""
    order = list(draw(st.permutations(range(x.ndim))) if draw(st.booleans()) else range(x.ndim))
    sizes = [x.shape[axis] for axis in order]
    before, after, step = ([draw(st.integers(lo, 2)) for _ in sizes] for lo in (0, 0, 1))
    step = step if draw(st.booleans()) else [1] * len(sizes)
    whole = [b + n * s + a for b, n, s, a in zip(before, sizes, step, after)]
    storage = torch.full(whole, math.nan, dtype=x.dtype)
    view = storage[tuple(slice(b, b + n * s, s) for b, n, s in zip(before, sizes, step))]
    view = view.permute([order.index(axis) for axis in range(x.ndim)])
    return view.copy_(x)


@st.composite
def calls(draw: st.DrawFn) -> tuple[Call, torch.dtype]:
    """A call of both ops, and the dtype of the results."""
    B, L, G = draw(st.integers(1, 2)), draw(st.integers(1, 80)), draw(st.integers(1, 3))
    H, Dh, Ds = G * draw(st.integers(1, 3)), draw(st.integers(1, 40)), 2 * draw(st.integers(1, 20))
    dtype, out = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    starts = sorted({0, *draw(st.lists(st.integers(0, L - 1), max_size=4))})
    clamp = draw(st.sampled_from((0.5, 3.0, 8.0)))
    decay, step = 10.0 ** draw(st.integers(-3, 4)), 10.0 ** draw(st.integers(-2, 2))
    log_decay = -decay * normal(B, L, G).abs()
    if draw(st.booleans()):  # ties
        log_decay *= normal(B, L, G) > 0
    theta = step * normal(B, L, G, Ds // 2)
    lam = 0.05 + normal(H).abs()
    shapes = ((H, Dh), (G, Dh), (G, Ds), (H, Ds))
    wide = [normal(B, L, heads, width).to(dtype) for heads, width in shapes]
    tables = [normal(L, Dh // 2) for _ in range(2)] if Dh % 2 == 0 and draw(st.booleans()) else []
    width = Dh + Ds + draw(st.integers(0, 9))
    grads = [normal(B, L, heads, width).to(out) for heads in (H, G)]
    flux = [normal(B, len(starts), G).double(), normal(B, len(starts), G, Ds // 2).double()]
    call = Call(
        inputs=[laid_out(draw, x) for x in (*wide, log_decay, theta, lam)],
        rotary=[laid_out(draw, x) for x in tables] or [None, None],
        starts=starts,
        clamp=clamp,
        width=width,
        grads=[laid_out(draw, x) for x in grads],
        flux=[laid_out(draw, x) if draw(st.booleans()) else None for x in flux],
    )
    return call, out


def check_elements(implementation: Implementation, call: Call, out: torch.dtype) -> None:
    """No element is off by more than a few times PyTorch's worst in the same dtype."""
    compiled = run(implementation, call, out)
    eager = run(EAGER, call, out)
    exact = run(EAGER, call.double(), torch.float64)
    for name, oracle in exact.items():
        assert compiled[name].dtype == eager[name].dtype, name
        error, allowed = ((x[name].double() - oracle).abs().max() for x in (compiled, eager))
        said = f"{name}: {error:.2e}, PyTorch {allowed:.2e}"
        assert error <= 3 * allowed + 2e-6 * (1 + oracle.abs().max()), said


def any_call(test: Callable) -> Callable:
    """``test(call=(call, dtype of the results))`` of 100 random calls, or a night's."""
    random = settings(
        max_examples=2000 if NIGHTLY else 100,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    return random(given(call=calls())(test))
