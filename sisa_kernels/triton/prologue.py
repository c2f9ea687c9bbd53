"""TODO sisa_kernels.triton.prologue"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sisa_kernels.rotation import rotate
from sisa_kernels.scans import (
    cumulative_decay,
    cumulative_phase,
    pair_products,
    to_key_heads,
    to_query_heads,
)

LOG2E = 1 / math.log(2)


# ---- Prologue and epilogue -----------------------------------------------------------------------


class Importance(NamedTuple):
    """The kernels' importance operands: b and c at their phase in their own dtype, and what belongs
    to them.
    """

    b: Tensor  # [B, L, G, Ds]
    c: Tensor  # [B, L, H, Ds]
    # [B, G, L] fp32: the cumulative log2-decay is g_hi + g_lo, whose differences keep fp32's
    # precision
    g_hi: Tensor
    g_lo: Tensor
    lam: Tensor  # [H] fp32
    size_b: Tensor  # [B, G, L] fp32: the norm of each row of b
    size_c: Tensor  # [B, H, L]
    cos: Tensor | None  # [B, L, G, Ds / 2] fp32, of the phase; for the backward only
    sin: Tensor | None


def prologue(
    q, k, b, c, log_decay, theta, lam, cos, sin, backward: bool
) -> tuple[Tensor, Tensor, Importance | None]:
    """q and k with RoPE, where given, and the importance operands, where given."""
    if cos is not None:
        q, k = (rotate(x.float(), cos[:, None], sin[:, None]).to(x.dtype) for x in (q, k))
    if b is None:
        return q, k, None
    g = (cumulative_decay(log_decay) * LOG2E).transpose(1, 2).contiguous()
    g_hi = g.float()
    cos_k, sin_k = cumulative_phase(theta)
    cos_q, sin_q = (to_query_heads(x, q.shape[2]) for x in (cos_k, sin_k))
    b = rotate(b.float(), cos_k, sin_k).to(b.dtype)
    c = rotate(c.float(), cos_q, sin_q).to(c.dtype)
    size_b, size_c = (x.float().square().sum(3).sqrt().transpose(1, 2).contiguous() for x in (b, c))
    tables = (cos_k, sin_k) if backward else (None, None)
    return (
        q,
        k,
        Importance(b, c, g_hi, (g - g_hi).float(), lam.contiguous(), size_b, size_c, *tables),
    )


def row_products(dy, y):
    """<dy, y> of each row in fp32, [B, H, L]."""
    return (dy.float() * y.float()).sum(3).transpose(1, 2).contiguous()


def unrotate(dq, dk, cos, sin):
    """dL/dq and dL/dk before RoPE, in the operands' dtype."""
    return tuple(rotate(x.float(), cos[:, None], -sin[:, None]).to(x.dtype) for x in (dq, dk))


def importance_gradients(dc, db, own, b, c, lam, cos_k, sin_k, last):
    """Gradients for b, c, log_decay, theta and lam from those of the rotated operands without the
    pairs i = j (``own``: dL/ds_ii).

    ``last`` [L] int32: the end of each token's document, where the reverse running sums of dL/dg
    and dL/dPhi begin anew; None: one document."""
    H, G = c.shape[2], b.shape[2]
    b_float, c_float = b.float(), c.float()
    row, phase_q = pair_products(dc, c_float)
    col, phase_k = pair_products(db, b_float)
    dlog_decay = _reverse_sums(to_key_heads(row, G) - col, last)
    dtheta = _reverse_sums(to_key_heads(phase_q, G) + phase_k, last)
    b_all, own = to_query_heads(b_float, H), own.transpose(1, 2)[..., None]
    dlam = (row / lam + (own * c_float * b_all).sum(3)).sum((0, 1))
    own = own * lam[:, None]
    dc = rotate(dc + own * b_all, to_query_heads(cos_k, H), -to_query_heads(sin_k, H))
    db = rotate(db + to_key_heads(own * c_float, G), cos_k, -sin_k)
    return db.to(b.dtype), dc.to(c.dtype), dlog_decay, dtheta, dlam.float()


def _reverse_sums(x: Tensor, last: Tensor | None) -> Tensor:
    """Sum over t <= u < last[t] of axis 1, in fp32."""
    total = F.pad(x.transpose(1, -1), (0, 1)).flip(-1).cumsum(-1).flip(-1)
    total = total[..., :-1] if last is None else total[..., :-1] - total[..., last.long()]
    return total.transpose(1, -1).float().contiguous()


def fused(device: torch.device, function: Callable) -> Callable:
    """``function`` as it is on the CPU; on a GPU compiled by Inductor, which makes a few passes of
    the chain.
    """
    return _compiled(function) if device.type == "cuda" else function


@functools.cache
def _compiled(function: Callable) -> Callable:
    return torch.compile(function)
