"""Augmented operands from the kernels' own: the decay in them, about the middle of a head's range.

``[q ; sqrt(Dh) lam 2^(level_i - m) c]`` and ``[k ; 2^(m - level_j) b]``, with the fractions of g in
c and b already. m is an integer, so that of all factors lam alone rounds. Past the exponents of
fp32 a factor is 0 or infinite: such heads are for the exact kernels."""

import math
from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from sisa_kernels.triton.prologue import Importance, launch
from sisa_kernels.triton.wide_kernels import narrow_kernel, widen_kernel

ROWS = 64  # tokens of a program


def _sizes(shape: Sequence[int], key_heads: int, widths: tuple[int, int]) -> tuple[int, dict]:
    """Programs for rows [B, L, H, ...], and what both kernels are told of them."""
    B, L, H, _ = shape
    DX, DY = widths
    blocks = {"BX": triton.next_power_of_2(DX), "BY": triton.next_power_of_2(DY), "ROWS": ROWS}
    sizes = {"L": L, "H": H, "scale": math.sqrt(DX), "REPEAT": H // key_heads, "DX": DX, "DY": DY}
    return -(-L // ROWS) * B * H, sizes | blocks


def _widened(x: Tensor, y: Tensor, level: Tensor, lam: Tensor | None) -> Tensor:
    widths = x.shape[3], y.shape[3]
    programs, sizes = _sizes(x.shape, level.shape[1], widths)
    out = x.new_empty(*x.shape[:3], sum(widths))
    launch(widen_kernel, programs, x, y, level, lam, out, *x.stride()[:3], **sizes)
    return out


def _narrowed(
    d_out: Tensor, width: int, y: Tensor, level: Tensor, lam: Tensor | None
) -> tuple[Tensor, Tensor]:
    widths = width, d_out.shape[3] - width
    programs, sizes = _sizes(d_out.shape, level.shape[1], widths)
    dx = d_out.new_empty(*d_out.shape[:3], width)
    dy = d_out.new_empty(*d_out.shape[:3], widths[1], dtype=torch.float32)
    launch(narrow_kernel, programs, d_out, y, level, lam, dx, dy, **sizes)
    return dx, dy


def augmented(q: Tensor, k: Tensor, x: Importance) -> tuple[Tensor, Tensor]:
    """Queries [B, L, H, Dh + Ds] and keys [B, L, G, Dh + Ds] whose product is the score."""
    return _widened(q, x.c, x.level, x.lam), _widened(k, x.b, x.level, None)


def split_gradients(
    dq_aug: Tensor, dk_aug: Tensor, x: Importance, Dh: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dc, db) of :func:`augmented`'s contiguous gradients, the last two in fp32.

    dc has with c the products that the gradient of c as lam rounded it has with that."""
    dq, dc = _narrowed(dq_aug, Dh, x.c, x.level, x.lam)
    dk, db = _narrowed(dk_aug, Dh, x.b, x.level, None)
    return dq, dk, dc, db
