"""Autotuning of the Triton kernels' tiles: opt-in, kept on disk, and never timing a tile whose
results have not been checked.
"""

from collections.abc import Callable
from dataclasses import fields, replace

import torch
from triton.testing import do_bench

from sisa_kernels.selfcheck import oracle, problem, relative_errors, results
from sisa_kernels.triton.op import exact_attention, padded_width
from sisa_kernels.triton.tiles import (
    TABLE,
    Tile,
    Tiles,
    choose_tiles,
    save_tuned,
    tile_key,
    tuned_tiles,
)

CHECK_LENGTH = 257  # several tiles of any shape, and a last one that is not full


def candidates(kernel: str) -> list[Tile]:
    """Every tile that the table gives this kernel on some architecture."""
    return list(
        dict.fromkeys(getattr(tiles, kernel) for rows in TABLE.values() for _, _, tiles in rows)
    )


def autotune(
    batch: int,
    length: int,
    heads: int,
    head_width: int,
    state_width: int,
    *,
    key_heads: int | None = None,
    value_width: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cuda",
    timer: Callable[[Callable[[], object]], float] = do_bench,
) -> Tiles:
    """Find the fastest tiles for a problem, use them from now on for its device, dtype and widths,
    and keep them on disk.

    One kernel after the other, each of the table's tiles is first run forward and backward on a
    small problem against the fp64 oracle. One that fails to run, or errs more than twice as much as
    the tiles in use, is printed and never timed.

    Args:
        batch, length, heads, key_heads: the problem that is timed, forward + backward (key_heads:
            as heads).
        head_width, state_width, value_width: Dh, Ds, Dv (value_width: as head_width).
        dtype, device: of the operands.
        timer: milliseconds of a call.

    Returns:
        The fastest :class:`~sisa_kernels.triton.tiles.Tiles`, now in use.

    Raises:
        RuntimeError: the tiles in use are themselves wrong (more than 5 % off the oracle), or no
            tiles could be timed; those in use before stay.
        ValueError: operands that the kernels do not take.
    """
    device = torch.device(device)
    key_heads, value_width = key_heads or heads, value_width or head_width
    widths = {"Dh": head_width, "Ds": state_width, "Dv": value_width}
    small, small_dy = problem(device, dtype, L=CHECK_LENGTH, H=2 * heads // key_heads, **widths)
    right = oracle(small, small_dy)
    inputs, dy = problem(device, dtype, B=batch, L=length, H=heads, G=key_heads, **widths)
    padded = max(padded_width(head_width), padded_width(value_width)), padded_width(state_width)
    key = tile_key(device, dtype, *padded)
    best = choose_tiles(device, dtype, *padded)
    allowed = [
        2 * error for error in relative_errors(results(exact_attention, small, small_dy), right)
    ]
    if not all(bound < 0.1 for bound in allowed):
        raise RuntimeError(
            f"the tiles in use give wrong results, relative errors {allowed}: {best}"
        )

    def milliseconds(tiles: Tiles) -> float | None:
        """Of forward + backward with ``tiles``, or None, with the reason printed, where they cannot
        be used.
        """
        tuned_tiles()[key] = tiles
        try:
            found = relative_errors(results(exact_attention, small, small_dy), right)
            if not all(error <= bound for error, bound in zip(found, allowed)):
                print(f"not timed, relative errors {found}: {tiles}")
                return None
            return timer(lambda: results(exact_attention, inputs, dy))
        except (
            Exception
        ) as error:  # of the compiler or the launch: too many resources, an unsupported shape
            print(f"not timed, {type(error).__name__}: {tiles}")
            return None

    before = tuned_tiles().get(key)
    try:
        least = milliseconds(best)
        for kernel in (field.name for field in fields(Tiles)):
            for tile in candidates(kernel):
                tiles = replace(best, **{kernel: tile})
                took = milliseconds(tiles) if tiles != best else None
                if took is not None and (least is None or took < least):
                    best, least = tiles, took
        if least is None:
            raise RuntimeError(f"no tiles could be timed, those in use included: {best}")
    except BaseException:
        tuned_tiles().pop(key)
        if before is not None:
            tuned_tiles()[key] = before
        raise
    save_tuned(key, best)
    return best
