"""The horizon: the tile past which no importance product moves a logit by more than a tolerance."""

import math
from typing import NamedTuple

import triton
from torch import Tensor

from sisa_kernels.triton.horizon_kernels import TILES, UNIT, horizon_kernel
from sisa_kernels.triton.prologue import Importance, launch
from sisa_kernels.triton.tiles import Tile

# log2, added to a bound for what fp32 rounds in it: sums of squares, logarithms, fractions.
SLACK = 2.0**-17
NEVER = -(2**60)  # the logarithm of no tolerance


class Horizon(NamedTuple):
    """What is past the horizon, for each kernel's tiles; what was not asked for is None."""

    starts: Tensor | None
    """[B, H, query tiles] int32: the first key that needs the product, a multiple of tile.n.

    At the latest that of the tile's own first token."""
    ends: Tensor | None
    """[B, H, key tiles] int32: the query from which on none does, a multiple of tile.m.

    At the soonest that of the tile's own first token."""
    reach: Tensor | None
    """[B, H] int32: pairs i - j >= it do without, whatever their tile."""


def horizons(
    x: Importance,
    tolerance: float | None,
    *,
    starts: Tile | None = None,
    ends: Tile | None = None,
    reach: bool = False,
) -> Horizon:
    """What of the importance product may be left out, by one kernel.

    Leaving it out changes no logit by more than ``tolerance`` (natural logarithm). Kernels of other
    tiles may leave out other pairs: each stays within it. None: there is no horizon.

    Args:
        starts: the tile of a kernel that walks key tiles: :attr:`Horizon.starts` for it.
        ends: the tile of one that walks query tiles: :attr:`Horizon.ends`.
        reach: whether to make :attr:`Horizon.reach`.
    """
    B, H, L = x.square_c.shape
    new = x.level.new_empty
    found = Horizon(
        None if starts is None else new(B, H, -(-L // starts.m)),
        None if ends is None else new(B, H, -(-L // ends.n)),
        new(B, H) if reach else None,
    )
    allowed = NEVER if tolerance is None else _fixed_log2(tolerance)
    programs = sum(triton.cdiv(x.shape[2], TILES.value) for x in found[:2] if x is not None)
    launch(
        horizon_kernel,
        B * H * (programs + reach),
        x.square_b,
        x.square_c,
        x.level,
        x.fraction,
        x.lam,
        *found,
        allowed,
        L,
        H,
        H // x.level.shape[1],
        *((0, 0) if starts is None else (starts.m, starts.n)),
        *((0, 0) if ends is None else (ends.m, ends.n)),
    )
    return found


def _fixed_log2(tolerance: float) -> int:
    return math.floor((math.log2(tolerance) - SLACK) * 2**UNIT.value)


def horizon_starts(x: Importance, tile: Tile, tolerance: float | None) -> Tensor:
    """:attr:`Horizon.starts` alone."""
    found = horizons(x, tolerance, starts=tile).starts
    assert found is not None
    return found


def horizon_ends(x: Importance, tile: Tile, tolerance: float | None) -> Tensor:
    """:attr:`Horizon.ends` alone."""
    found = horizons(x, tolerance, ends=tile).ends
    assert found is not None
    return found
