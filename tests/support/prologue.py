"""What the Triton path's kernels before and after attention must give, in fp64."""

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from sisa_kernels.inputs import SisaInputs
from sisa_kernels.rotation import rotate
from sisa_kernels.scans import pair_products, to_key_heads, to_query_heads
from sisa_kernels.triton.tiles import Tile

if TYPE_CHECKING:
    from sisa_kernels.triton.prologue import Importance

STEEPEST = 200.0  # nepers a token


def running_sums(log_decay: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
    """g in base 2 [B, L, G], and the phase [B, L, G, Ds / 2] in radians."""
    g = log_decay.double().clamp(min=-STEEPEST).cumsum(1) / math.log(2)
    return g, theta.double().cumsum(1)


def folded(x: SisaInputs) -> tuple[Tensor, Tensor]:
    """b and c turned by the phase and times the fraction of g, whose level is left out."""
    g, phase = running_sums(x.log_decay, x.theta)
    fraction = (g - g.round())[..., None]
    H = x.c.shape[2]
    b = rotate(x.b.double(), phase.cos(), phase.sin()) * (-fraction).exp2()
    phase = to_query_heads(phase, H)
    c = rotate(x.c.double(), phase.cos(), phase.sin()) * to_query_heads(fraction, H).exp2()
    return b, c


def importance_gradients(
    dc: Tensor, db: Tensor, d_diagonal: Tensor, x: "Importance", inputs: SisaInputs, last: Tensor
) -> tuple[Tensor, ...]:
    """Of b, c, log_decay, theta and lam, of the operands as they were rounded."""
    g, phase = running_sums(inputs.log_decay, inputs.theta)
    b, c, dc, db, lam = (t.double() for t in (x.b, x.c, dc, db, x.lam))
    H = c.shape[2]
    G = b.shape[2]
    row, phase_q = pair_products(dc, c)
    col, phase_k = pair_products(db, b)
    dlog_decay = _reverse_sums(to_key_heads(row, G) - col, last)
    dtheta = _reverse_sums(to_key_heads(phase_q, G) + phase_k, last)
    b_all = to_query_heads(b, H)
    d_diagonal = d_diagonal.double().transpose(1, 2)[..., None]
    dlam = (row / lam + (d_diagonal * c * b_all).sum(3)).sum((0, 1))
    d_diagonal = d_diagonal * lam[:, None]
    fraction = (g - x.level.transpose(1, 2))[..., None]
    dc = (dc + d_diagonal * b_all) * to_query_heads(fraction, H).exp2()
    db = (db + to_key_heads(d_diagonal * c, G)) * (-fraction).exp2()
    dc = rotate(dc, to_query_heads(phase.cos(), H), -to_query_heads(phase.sin(), H))
    return rotate(db, phase.cos(), -phase.sin()), dc, dlog_decay, dtheta, dlam


def _reverse_sums(x: Tensor, last: Tensor) -> Tensor:
    """Sum over t <= u < last[t] of axis 1."""
    total = F.pad(x.transpose(1, -1), (0, 1)).flip(-1).cumsum(-1).flip(-1)
    return (total[..., :-1] - total[..., last.long()]).transpose(1, -1)


def _tile_maxima(x: Tensor, size: int) -> Tensor:
    """[B, heads, L] >= 0 -> the largest of each tile of ``size`` tokens, [B, heads, tiles]."""
    return F.pad(x, (0, -x.shape[2] % size)).unflatten(2, (-1, size)).amax(-1)


def horizon_bounds(x: SisaInputs, tile: Tile, tolerance: float) -> tuple[Tensor, Tensor]:
    """need [B, H, query tiles] and reach [B, H, key tiles]: past the horizon is reach <= need."""
    g = running_sums(x.log_decay, x.theta)[0].transpose(1, 2)
    H = x.lam.shape[0]
    _, G, L = g.shape
    norm_b, norm_c = (t.double().norm(dim=3).transpose(1, 2) for t in (x.b, x.c))
    last = (torch.arange(tile.n, L + tile.n, tile.n, device=g.device) - 1).clamp(max=L - 1)
    reach = _tile_maxima(norm_b, tile.n).clamp(min=1).log2() - g[:, :, last]
    largest = _tile_maxima(norm_c, tile.m).clamp(min=1) * x.lam.double().clamp(min=1)[:, None]
    first = g[:, :, :: tile.m].repeat_interleave(H // G, 1)
    need = math.log2(tolerance) - largest.log2() - first
    return need, reach.repeat_interleave(H // G, 1)


def first_and_last(past: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
    """Starts and ends of tiles, of which ``past`` [B, H, query tiles, key tiles] do without.

    Both at their own tile's first token at the latest or soonest."""
    queries, keys = past.shape[2:]
    own_key = torch.arange(queries, device=past.device) * tile.m // tile.n
    own_query = torch.arange(keys, device=past.device) * tile.n // tile.m
    starts = past.int().cumprod(3).sum(3).minimum(own_key) * tile.n
    ends = (queries - past.flip(2).int().cumprod(2).sum(2)).maximum(own_query) * tile.m
    return starts.int(), ends.int()
