"""Autotuning of the Triton kernels' tiles: opt-in, kept on disk, no wrong tile ever timed."""

import functools
import logging
from collections.abc import Callable
from dataclasses import fields, replace

import torch
from torch import Tensor
from triton.testing import do_bench

from sisa_kernels.inputs import SisaInputs
from sisa_kernels.testing import oracle, problem, relative_errors, value_and_grads
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

log = logging.getLogger(__name__)

CHECK_LENGTH = 257  # several tiles of any shape, and a last one that is not full
Problem = tuple[SisaInputs, Tensor]
Timer = Callable[[Callable[[], object]], float]


def candidates(kernel: str) -> list[Tile]:
    """Every tile that the table gives this kernel on some architecture."""
    return list(
        dict.fromkeys(getattr(tiles, kernel) for rows in TABLE.values() for _, _, tiles in rows)
    )


def autotune(
    batch: int,
    length: int,
    n_heads: int,
    head_width: int,
    d_state: int,
    *,
    n_kv_heads: int | None = None,
    value_width: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cuda",
    timer: Timer = do_bench,
) -> Tiles:
    """Find the fastest tiles for a problem, use them from now on, and keep them on disk.

    They hold for its device, dtype and padded widths. One kernel after the other, each of the
    table's tiles is first run forward and backward on a small problem against the fp64 oracle. One
    that fails to run, or errs more than twice as much as the tiles in use, is logged and never
    timed.

    Args:
        batch, length, n_heads, n_kv_heads: the problem that is timed, forward + backward
            (n_kv_heads: as n_heads).
        head_width, d_state, value_width: Dh, Ds, Dv (value_width: as head_width).
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
    n_kv_heads = n_kv_heads or n_heads
    value_width = value_width or head_width
    of_widths = functools.partial(
        problem, Dh=head_width, Ds=d_state, Dv=value_width, dtype=dtype, device=device
    )
    small = of_widths(L=CHECK_LENGTH, H=2 * n_heads // n_kv_heads, G=2)
    large = of_widths(B=batch, L=length, H=n_heads, G=n_kv_heads)
    width = max(padded_width(head_width), padded_width(value_width))
    padded = width, padded_width(d_state)
    key = tile_key(device, dtype, *padded)
    search = _Search(key, small, large, timer)
    best = search.fastest(choose_tiles(device, dtype, *padded))
    save_tuned(key, best)
    return best


class _Search:
    """Tiles for the key that are right on a small problem, timed on a large one."""

    def __init__(self, key: str, small: Problem, large: Problem, timer: Timer):
        self.key = key
        self.small = small
        self.large = large
        self.timer = timer
        self.right = oracle(*small)
        self.allowed = {name: 2 * error for name, error in self._errors().items()}

    def fastest(self, best: Tiles) -> Tiles:
        """The tiles in use, ``best``, with each kernel's exchanged for the fastest, one by one."""
        if not all(bound < 0.1 for bound in self.allowed.values()):
            raise RuntimeError(
                f"the tiles in use give wrong results, relative errors {self.allowed}: {best}"
            )
        before = tuned_tiles().get(self.key)
        try:
            return self._walk(best)
        finally:
            tuned_tiles().pop(self.key)
            if before is not None:
                tuned_tiles()[self.key] = before

    def _walk(self, best: Tiles) -> Tiles:
        least = self._milliseconds(best)
        for kernel in (field.name for field in fields(Tiles)):
            for tile in candidates(kernel):
                tiles = replace(best, **{kernel: tile})
                took = self._milliseconds(tiles) if tiles != best else None
                if took is not None and (least is None or took < least):
                    best = tiles
                    least = took
        if least is None:
            raise RuntimeError(f"no tiles could be timed, those in use included: {best}")
        return best

    def _milliseconds(self, tiles: Tiles) -> float | None:
        """Of forward + backward, or None, with the reason logged, where they cannot be used."""
        tuned_tiles()[self.key] = tiles
        try:
            errors = self._errors()
            if not all(error <= self.allowed[name] for name, error in errors.items()):
                log.info("not timed, relative errors %s: %s", errors, tiles)
                return None
            return self.timer(lambda: value_and_grads(exact_attention, *self.large))
        except Exception as error:  # of the compiler or the launch: too many resources, say
            log.info("not timed, %s: %s", type(error).__name__, tiles)
            return None

    def _errors(self) -> dict[str, float]:
        return relative_errors(value_and_grads(exact_attention, *self.small), self.right)
