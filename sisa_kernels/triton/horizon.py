"""The horizon: the tile past which no importance product moves a logit by more than a tolerance."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sisa_kernels.triton.prologue import Importance
from sisa_kernels.triton.tiles import Tile


def _tile_maxima(x: Tensor, size: int) -> Tensor:
    """[B, heads, L] >= 0 -> the largest of each tile of ``size`` tokens, [B, heads, tiles]."""
    return F.pad(x, (0, -x.shape[2] % size)).unflatten(2, (-1, size)).amax(-1)


def bounds(x: Importance, tile: Tile, tolerance: float) -> tuple[Tensor, Tensor]:
    """need [B, H, query tiles] and reach [B, H, key tiles], which say what is past the horizon.

    The tiles I and J < I are past it where reach_J <= need_I. By Cauchy-Schwarz
    ``|lam exp(g_i - g_j) c_i.b_j| <= lam exp(g_I - g_J) max|c_I| max|b_J|`` for every i in I and j
    in J, with g_I at I's first token and g_J at J's last. With lam and both norms taken as at least
    1, where that is <= tolerance no logit moves by more, and neither does its derivative in lam, or
    in c_i or b_j over lam: operands that are small, or 0 as at the start of training, keep their
    gradients. In base-2 logarithms:
    ``log2 |b_J| - g_J <= log2 tolerance - log2 lam - log2 |c_I| - g_I``."""
    H = x.lam.shape[0]
    g = x.g
    _, G, L = g.shape
    last = (torch.arange(tile.n, L + tile.n, tile.n, device=g.device) - 1).clamp(max=L - 1)
    largest_b = _tile_maxima(x.norm_b, tile.n).clamp(min=1).double()
    reach = largest_b.log2() - g[:, :, last]
    largest_c = _tile_maxima(x.norm_c, tile.m).clamp(min=1).double()
    largest = largest_c * x.lam.double().clamp(min=1)[:, None]
    first = g[:, :, :: tile.m].repeat_interleave(H // G, 1)
    need = math.log2(tolerance) - largest.log2() - first
    return need, reach.repeat_interleave(H // G, 1)


def horizon_starts(x: Importance, tile: Tile, tolerance: float | None) -> Tensor:
    """For each query tile the first key that needs the importance product, [B, H, tiles] int32.

    A multiple of ``tile.n``. All key tiles before it are past the horizon: leaving their product
    out changes no logit by more than ``tolerance`` (:func:`bounds`). None: there is no horizon."""
    B, H, L = x.norm_c.shape
    if tolerance is None:
        return torch.zeros(B, H, -(-L // tile.m), dtype=torch.int32, device=x.lam.device)
    need, reach = bounds(x, tile, tolerance)
    tiles = torch.searchsorted(reach.cummax(2).values, need, right=True)
    return (tiles * tile.n).int()


def horizon_ends(x: Importance, tile: Tile, tolerance: float | None) -> Tensor:
    """For each key tile the query from which on none needs the product, [B, H, tiles] int32.

    A multiple of ``tile.m``. Otherwise as :func:`horizon_starts`. Kernels of other tiles may leave
    out other pairs: each stays within the tolerance."""
    B, H, L = x.norm_c.shape
    if tolerance is None:
        end = -(-L // tile.m) * tile.m
        shape = (B, H, -(-L // tile.n))
        return torch.full(shape, end, dtype=torch.int32, device=x.lam.device)
    need, reach = bounds(x, tile, tolerance)
    least_behind = need.flip(2).cummin(2).values.flip(2)
    return (torch.searchsorted(least_behind, reach) * tile.m).int()


def reach_tokens(x: Importance, tolerance: float) -> Tensor:
    """Past how many tokens no product of a head moves a logit by more, [B, H] int32.

    The least w such that all pairs with i - j >= w may go without theirs, by the bound of
    :func:`bounds` on each pair."""
    H = x.lam.shape[0]
    G, L = x.g.shape[1:]
    largest = x.norm_c.clamp(min=1).double() * x.lam.double().clamp(min=1)[:, None]
    need = math.log2(tolerance) - largest.log2() - x.g.repeat_interleave(H // G, 1)
    reach = (x.norm_b.clamp(min=1).double().log2() - x.g).cummax(2).values
    first = torch.searchsorted(reach.repeat_interleave(H // G, 1), need, right=True)
    tokens = torch.arange(1, L + 1, device=need.device)
    return (tokens - first).amax(2).clamp(min=0).int()
