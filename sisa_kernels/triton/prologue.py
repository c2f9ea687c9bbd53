"""What is done in PyTorch before and after the Triton kernels, compiled by Inductor on a GPU."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sisa_kernels.inputs import Rotary, ScoreInputs
from sisa_kernels.rotation import SMALLEST_LAM, rotate
from sisa_kernels.scans import (
    cumulative_decay,
    cumulative_phase,
    pair_products,
    to_key_heads,
    to_query_heads,
)

LOG2E = 1 / math.log(2)


class Importance(NamedTuple):
    """The kernels' importance operands: b and c at their phase, and what belongs to them."""

    b: Tensor
    """[B, L, G, Ds]."""
    c: Tensor
    """[B, L, H, Ds]."""
    g_hi: Tensor
    """[B, G, L] fp32: the cumulative log2-decay is g_hi + g_lo, whose differences keep fp32's
    precision.
    """
    g_lo: Tensor
    lam: Tensor
    """[H] fp32."""
    norm_b: Tensor
    """[B, G, L] fp32, of each row of b."""
    norm_c: Tensor
    """[B, H, L] fp32."""
    cos: Tensor | None
    """[B, L, G, Ds / 2] fp32, of the phase; for the backward only."""
    sin: Tensor | None


def rotate_qk(q: Tensor, k: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor]:
    """q and k with RoPE, where given, in their dtype."""
    if rotary is None:
        return q, k
    cos, sin = (table[:, None] for table in rotary)
    q, k = (rotate(x.float(), cos, sin).to(x.dtype) for x in (q, k))
    return q, k


def prologue(x: ScoreInputs, backward: bool) -> tuple[Tensor, Tensor, Importance]:
    """q and k with RoPE, where given, and the importance operands."""
    q, k = rotate_qk(x.q, x.k, x.rotary)
    g = (cumulative_decay(x.log_decay) * LOG2E).transpose(1, 2).contiguous()
    g_hi = g.float()
    g_lo = (g - g_hi).float()
    cos_k, sin_k = cumulative_phase(x.theta)
    cos_q, sin_q = (to_query_heads(table, q.shape[2]) for table in (cos_k, sin_k))
    b = rotate(x.b.float(), cos_k, sin_k).to(x.b.dtype)
    c = rotate(x.c.float(), cos_q, sin_q).to(x.c.dtype)
    lam = x.lam.clamp(min=SMALLEST_LAM).contiguous()
    cos, sin = (cos_k, sin_k) if backward else (None, None)
    return q, k, Importance(b, c, g_hi, g_lo, lam, _row_norms(b), _row_norms(c), cos, sin)


def _row_norms(x: Tensor) -> Tensor:
    """[B, L, heads, width] -> [B, heads, L] fp32."""
    return x.float().square().sum(3).sqrt().transpose(1, 2).contiguous()


def row_products(dy: Tensor, y: Tensor) -> Tensor:
    """<dy, y> of each row in fp32, [B, H, L]."""
    return (dy.float() * y.float()).sum(3).transpose(1, 2).contiguous()


def unrotate(dq: Tensor, dk: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """dL/dq and dL/dk before RoPE, in the operands' dtype."""
    dq, dk = (rotate(x.float(), cos[:, None], -sin[:, None]).to(x.dtype) for x in (dq, dk))
    return dq, dk


def importance_gradients(
    dc: Tensor, db: Tensor, d_diagonal: Tensor, x: Importance, last: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients for b, c, log_decay, theta and lam.

    Args:
        dc, db: those of the rotated operands, fp32, without the pairs i = j.
        d_diagonal: dL/ds_ii [B, H, L].
        last: the end of each token's document [L] int32, where the reverse running sums of dL/dg
            and dL/dPhi begin anew; None: one document.
    """
    assert x.cos is not None
    assert x.sin is not None
    H = x.c.shape[2]
    G = x.b.shape[2]
    b = x.b.float()
    c = x.c.float()
    row, phase_q = pair_products(dc, c)
    col, phase_k = pair_products(db, b)
    dlog_decay = _reverse_sums(to_key_heads(row, G) - col, last)
    dtheta = _reverse_sums(to_key_heads(phase_q, G) + phase_k, last)
    b_all = to_query_heads(b, H)
    d_diagonal = d_diagonal.transpose(1, 2)[..., None]
    dlam = (row / x.lam + (d_diagonal * c * b_all).sum(3)).sum((0, 1))
    d_diagonal = d_diagonal * x.lam[:, None]
    dc = rotate(dc + d_diagonal * b_all, to_query_heads(x.cos, H), -to_query_heads(x.sin, H))
    db = rotate(db + to_key_heads(d_diagonal * c, G), x.cos, -x.sin)
    return db.to(x.b.dtype), dc.to(x.c.dtype), dlog_decay, dtheta, dlam.float()


def _reverse_sums(x: Tensor, last: Tensor | None) -> Tensor:
    """Sum over t <= u < last[t] of axis 1, in fp32."""
    total = F.pad(x.transpose(1, -1), (0, 1)).flip(-1).cumsum(-1).flip(-1)
    total = total[..., :-1] if last is None else total[..., :-1] - total[..., last.long()]
    return total.transpose(1, -1).float().contiguous()


def fused(device: torch.device, function: Callable) -> Callable:
    """``function``; on a GPU compiled by Inductor, which makes few passes of the chain."""
    return _compiled(function) if device.type == "cuda" else function


@functools.cache
def _compiled(function: Callable) -> Callable:
    return torch.compile(function)
