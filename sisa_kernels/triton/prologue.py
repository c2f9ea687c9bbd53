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
STEEPEST = 200.0  # nepers a token: fp32's exp of -200 is 0


class Importance(NamedTuple):
    """The kernels' importance operands, and what belongs to them.

    The decay between two tokens is 2^(level_i - level_j) times the fractions of g that are in c and
    b. Levels are integers, so that each kernel may take out a power of two of its own, a tile's,
    without rounding: all kernels see the same operands."""

    b: Tensor
    """[B, L, G, Ds], ``R(Phi) b 2^-fraction``, rounded once."""
    c: Tensor
    """[B, L, H, Ds], ``R(Phi) c 2^fraction``, rounded once."""
    near_b: Tensor
    """b times 2^(its key tile's last level - its own), in (0, 1]."""
    near_c: Tensor | None
    """c times 2^(its own level - its query tile's first); for the backward only."""
    level: Tensor
    """[B, G, L] int32: g in base 2 to the nearest integer."""
    g: Tensor
    """[B, G, L] fp64: the cumulative log2-decay, level + fraction."""
    lam: Tensor
    """[H] fp32."""
    norm_b: Tensor
    """[B, G, L] fp32, of each row of b as given."""
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


def prologue(
    x: ScoreInputs, keys: int, queries: int | None = None
) -> tuple[Tensor, Tensor, Importance]:
    """q and k with RoPE, where given, and the importance operands.

    Args:
        keys: of a tile in the kernel that walks key tiles.
        queries: of a tile in the one that walks query tiles; None: there is no backward.
    """
    q, k = rotate_qk(x.q, x.k, x.rotary)
    H = q.shape[2]
    # A step of 2^-200 is 0 in fp32 beside any other, and levels stay within int32.
    g = cumulative_decay(x.log_decay.clamp(min=-STEEPEST)) * LOG2E
    level = g.round()
    fraction = (g - level).float()[..., None]
    cos_k, sin_k = cumulative_phase(x.theta, torch.float32)
    cos_q, sin_q = (to_query_heads(table, H) for table in (cos_k, sin_k))
    b = (rotate(x.b.float(), cos_k, sin_k) * (-fraction).exp2()).to(x.b.dtype)
    c = (rotate(x.c.float(), cos_q, sin_q) * to_query_heads(fraction, H).exp2()).to(x.c.dtype)
    near_b = _lowered(b, level[:, _last_of_tiles(level, keys)] - level)
    near_c = None
    cos = sin = None
    if queries is not None:
        token = torch.arange(level.shape[1], device=level.device)
        near_c = _lowered(c, level - level[:, token // queries * queries])
        cos, sin = cos_k, sin_k
    by_head = level.transpose(1, 2).int().contiguous(), g.transpose(1, 2).contiguous()
    lam = x.lam.clamp(min=SMALLEST_LAM).contiguous()
    norms = _row_norms(x.b), _row_norms(x.c)
    return q, k, Importance(b, c, near_b, near_c, *by_head, lam, *norms, cos, sin)


def _last_of_tiles(x: Tensor, size: int) -> Tensor:
    """For each token (axis 1 of x) the last one of its tile of ``size`` tokens, [L]."""
    token = torch.arange(x.shape[1], device=x.device)
    return (token // size * size + size - 1).clamp(max=x.shape[1] - 1)


def _lowered(x: Tensor, exponent: Tensor) -> Tensor:
    """x [B, L, heads, Ds] times 2^exponent, [B, L, G] and at most 0, in x's dtype."""
    factor = to_query_heads(exponent.float().exp2(), x.shape[2])
    return (x.float() * factor[..., None]).to(x.dtype)


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
    fraction = (x.g - x.level).float().transpose(1, 2)[..., None]
    dc = (dc + d_diagonal * b_all) * to_query_heads(fraction, H).exp2()
    db = (db + to_key_heads(d_diagonal * c, G)) * (-fraction).exp2()
    dc = rotate(dc, to_query_heads(x.cos, H), -to_query_heads(x.sin, H))
    db = rotate(db, x.cos, -x.sin)
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
