"""TODO sisa_kernels.triton.horizon"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sisa_kernels.triton.prologue import Importance
from sisa_kernels.triton.tiles import Tile

# ---- The horizon ---------------------------------------------------------------------------------


def _tile_maxima(x: Tensor, size: int) -> Tensor:
    """[B, heads, L] >= 0 -> the largest of each tile of ``size`` tokens, [B, heads, tiles]."""
    return F.pad(x, (0, -x.shape[2] % size)).unflatten(2, (-1, size)).amax(-1)


def _bounds(x: Importance, tile: Tile, tolerance: float) -> tuple[Tensor, Tensor]:
    """(need [B, H, query tiles], reach [B, H, key tiles]): the tiles I and J < I are past the
    horizon where reach_J <= need_I.

    By Cauchy-Schwarz ``|lam exp(g_i - g_j) c_i.b_j| <= lam exp(g_I - g_J) max|c_I| max|b_J|`` for
    every i in I and j in J, with g_I at I's first token and g_J at J's last. With lam and both
    norms taken as at least 1, where that is <= tolerance no logit moves by more, and neither does
    its derivative in lam, or in c_i or b_j over lam: operands that are small, or 0 as at the start
    of training, keep their gradients. In base-2 logarithms: ``log2 |b_J| - g_J <= log2 tolerance -
    log2 lam - log2 |c_I| - g_I``."""
    H, (_, G, L) = x.lam.shape[0], x.g_hi.shape
    g = x.g_hi.double() + x.g_lo
    last = (torch.arange(tile.n, L + tile.n, tile.n, device=g.device) - 1).clamp(max=L - 1)
    reach = _tile_maxima(x.size_b, tile.n).clamp(min=1).double().log2() - g[:, :, last]
    largest = (
        _tile_maxima(x.size_c, tile.m).clamp(min=1).double() * x.lam.double().clamp(min=1)[:, None]
    )
    need = math.log2(tolerance) - largest.log2() - g[:, :, :: tile.m].repeat_interleave(H // G, 1)
    return need, reach.repeat_interleave(H // G, 1)


def horizon_starts(x: Importance, tile: Tile, tolerance: float | None) -> Tensor:
    """For each query tile the first key that needs the importance product, [B, H, tiles] int32, a
    multiple of ``tile.n``.

    All key tiles before it are past the horizon: leaving their product out changes no logit by more
    than ``tolerance`` (:func:`_bounds`). None: there is no horizon."""
    (B, H, L) = x.size_c.shape
    if tolerance is None:
        return torch.zeros(B, H, -(-L // tile.m), dtype=torch.int32, device=x.lam.device)
    need, reach = _bounds(x, tile, tolerance)
    return (torch.searchsorted(reach.cummax(2).values, need, right=True) * tile.n).int()


def horizon_ends(x: Importance, tile: Tile, tolerance: float | None) -> Tensor:
    """For each key tile the query from which on none needs the importance product, [B, H, tiles]
    int32, a multiple of ``tile.m``; otherwise as :func:`horizon_starts`. Kernels of other tiles may
    leave out other pairs: each stays within the tolerance."""
    (B, H, L) = x.size_c.shape
    if tolerance is None:
        return torch.full(
            (B, H, -(-L // tile.n)),
            -(-L // tile.m) * tile.m,
            dtype=torch.int32,
            device=x.lam.device,
        )
    need, reach = _bounds(x, tile, tolerance)
    return (torch.searchsorted(need.flip(2).cummin(2).values.flip(2), reach) * tile.m).int()
