"""The compiled augmentation on random shapes, strides, offsets, dtypes and decays, against fp64.

100 cases; 2,000 with SISA_NIGHTLY=1.
"""

import math
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sisa_kernels import _extension
from sisa_kernels.paths.augment import augment_backward_eager, augment_eager

pytestmark = pytest.mark.skipif(
    not _extension.LOADED, reason=f"the extension is {_extension.STATE}"
)
CASES = 2000 if os.environ.get("SISA_NIGHTLY") == "1" else 100
DTYPES = st.sampled_from((torch.float32, torch.bfloat16, torch.float16))


def laid_out(draw: st.DrawFn, x: torch.Tensor) -> torch.Tensor:
    """The same values as a view with random strides and offset into a larger storage, whose rest is
    NaN.
    """
    order = draw(st.permutations(range(x.ndim))) if draw(st.booleans()) else range(x.ndim)
    sizes = [x.shape[axis] for axis in order]
    before, after, step = ([draw(st.integers(lo, 2)) for _ in sizes] for lo in (0, 0, 1))
    step = step if draw(st.booleans()) else [1] * len(sizes)
    storage = torch.full(
        [b + n * s + a for b, n, s, a in zip(before, sizes, step, after)], math.nan, dtype=x.dtype
    )
    view = storage[tuple(slice(b, b + n * s, s) for b, n, s in zip(before, sizes, step))]
    view = view.permute([list(order).index(axis) for axis in range(x.ndim)])
    return view.copy_(x)


@st.composite
def calls(draw: st.DrawFn) -> dict:
    """Arguments of both ops, and the dtype of the results."""
    B, L, G = draw(st.integers(1, 2)), draw(st.integers(1, 80)), draw(st.integers(1, 3))
    H, Dh, Ds = G * draw(st.integers(1, 3)), draw(st.integers(1, 40)), 2 * draw(st.integers(1, 20))
    dtype, out = draw(DTYPES), draw(DTYPES)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    starts = sorted({0, *draw(st.lists(st.integers(0, L - 1), max_size=4))})
    clamp = draw(st.sampled_from((0.5, 3.0, 8.0)))
    decay, step = 10.0 ** draw(st.integers(-3, 4)), 10.0 ** draw(st.integers(-2, 2))
    log_decay, theta, lam = (
        -decay * normal(B, L, G).abs(),
        step * normal(B, L, G, Ds // 2),
        0.05 + normal(H).abs(),
    )
    wide = [
        normal(B, L, heads, width).to(dtype)
        for heads, width in ((H, Dh), (G, Dh), (G, Ds), (H, Ds))
    ]
    tables = [normal(L, Dh // 2) for _ in range(2)] if Dh % 2 == 0 and draw(st.booleans()) else []
    width = Dh + Ds + draw(st.integers(0, 9))
    grads = [normal(B, L, heads, width).to(out) for heads in (H, G)]
    flux = [normal(B, len(starts), G).double(), normal(B, len(starts), G, Ds // 2).double()]
    return dict(
        inputs=[laid_out(draw, x) for x in (*wide, log_decay, theta, lam)],
        rotary=[laid_out(draw, x) for x in tables] or [None, None],
        starts=starts,
        clamp=clamp,
        width=width,
        out=out,
        grads=[laid_out(draw, x) for x in grads],
        flux=[laid_out(draw, x) if draw(st.booleans()) else None for x in flux],
    )


def run(forward, backward, call: dict, dtype: torch.dtype) -> list[torch.Tensor]:
    common = (*call["inputs"], *call["rotary"], call["starts"], call["clamp"])
    return [
        *forward(*common, call["width"], dtype),
        *backward(*call["grads"], *common, *call["flux"]),
    ]


def check(forward, backward, call: dict) -> None:
    double = dict(call)
    for name in ("inputs", "rotary", "grads", "flux"):
        double[name] = [None if x is None else x.double() for x in call[name]]
    compiled = run(forward, backward, call, call["out"])
    eager = run(augment_eager, augment_backward_eager, call, call["out"])
    exact = run(augment_eager, augment_backward_eager, double, torch.float64)
    names = ("q_aug", "k_aug", "dq", "dk", "db", "dc", "dlog_decay", "dtheta", "dlam")
    for name, x, same_dtype, oracle in zip(names, compiled, eager, exact):
        assert x.dtype == same_dtype.dtype, name
        error, allowed = ((y.double() - oracle).abs().max() for y in (x, same_dtype))
        assert error <= 3 * allowed + 2e-6 * (1 + oracle.abs().max()), (
            f"{name}: {error:.2e}, PyTorch {allowed:.2e}"
        )


any_call = settings(
    max_examples=CASES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


@any_call
@given(calls())
def test_any_call_matches_fp64(call):
    check(torch.ops.sisa.augment, torch.ops.sisa.augment_backward, call)
