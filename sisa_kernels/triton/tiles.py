"""Tiles of the Triton kernels: a table by architecture and widths, and what tuning has found."""

import functools
import json
import os
import tempfile
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch


@dataclass(frozen=True)
class Tile:
    """A kernel's tile: m queries by n keys on ``warps`` warps, loads ``stages`` iterations ahead.

    On the diagonal it takes ``diagonal`` rows of the other side at a time: less of them is masked,
    and the element-by-element decay holds fewer registers."""

    m: int
    n: int
    warps: int
    stages: int
    diagonal: int = 32

    def __post_init__(self) -> None:
        sizes = (self.m, self.n, self.diagonal)
        odd = any(size < 16 or size & (size - 1) for size in sizes)
        # A diagonal step past the tile would take rows that the next phase takes too.
        if odd or self.diagonal > min(self.m, self.n):
            raise ValueError(
                "a tile's m, n and diagonal must be powers of two from 16, diagonal at most m and "
                f"n, got {sizes}"
            )


@dataclass(frozen=True)
class Tiles:
    """Of the forward kernel, and of the backward's query (dq, dc) and key (dk, dv, db) kernels."""

    forward: Tile
    query: Tile
    key: Tile


# By (largest of Dh and Dv, Ds), both padded: the first row that both fit in. Ds 0 is plain
# attention. Tiles were taken from 128 x 128 down until a kernel compiled without spilling a
# register, for one document and one query head a key head, within the chip's shared memory:
# tools/resources.py checks both, and the same for packed documents with shared key heads. What made
# them smaller stands above the row. None has been timed yet.
Rows = tuple[tuple[int, int, Tiles], ...]

# Tensor cores fed from shared memory by whole warpgroups: 8 warps a tile, 128 rows for the side
# that stays. The key kernel holds three accumulators, so what it streams is 32 rows at a time where
# there is an importance product.
HOPPER: Rows = (
    (64, 0, Tiles(Tile(128, 128, 8, 2), Tile(128, 64, 8, 3), Tile(64, 128, 8, 2))),
    # Key: its third accumulator, db.
    (64, 64, Tiles(Tile(128, 128, 8, 2), Tile(128, 64, 8, 3), Tile(32, 128, 8, 3))),
    # dc, db as wide as two heads.
    (64, 128, Tiles(Tile(128, 64, 8, 3), Tile(64, 64, 8, 2), Tile(32, 64, 8, 2))),
    # Key: dk and dv of 128.
    (128, 0, Tiles(Tile(128, 128, 8, 2), Tile(128, 64, 8, 3), Tile(32, 128, 8, 3))),
    # Accumulators of 128 and the decay's weights.
    (128, 64, Tiles(Tile(128, 64, 8, 3), Tile(128, 32, 8, 3), Tile(32, 64, 8, 3))),
    # Three accumulators of 128.
    (128, 128, Tiles(Tile(128, 64, 8, 2), Tile(64, 32, 8, 3), Tile(16, 64, 8, 2, 16))),
)

# The operands of a product pass through registers: less fits, and past 64 channels much less.
AMPERE: Rows = (
    (64, 0, Tiles(Tile(128, 128, 8, 2), Tile(128, 64, 8, 3), Tile(64, 128, 8, 2))),
    # Forward: Dh 16 spills with 3 stages.
    (64, 32, Tiles(Tile(128, 64, 8, 2), Tile(128, 32, 8, 3), Tile(32, 128, 8, 3))),
    (64, 64, Tiles(Tile(128, 64, 8, 3), Tile(128, 32, 8, 3), Tile(32, 128, 8, 3))),
    # dc, db as wide as two heads. Key: 64 keys spill within its loops.
    (64, 128, Tiles(Tile(128, 64, 8, 3), Tile(64, 32, 8, 3), Tile(64, 32, 4, 2))),
    # Operands of 128 in registers.
    (128, 0, Tiles(Tile(128, 32, 8, 3), Tile(128, 32, 8, 3), Tile(64, 64, 8, 2))),
    # The same, and the decay's weights. Forward: 64 keys spill within its loops from d_s 32 on;
    # 3 stages spill at 16.
    (128, 16, Tiles(Tile(128, 64, 8, 2), Tile(64, 16, 4, 2, 16), Tile(16, 64, 4, 2, 16))),
    (128, 32, Tiles(Tile(128, 32, 8, 3), Tile(64, 16, 4, 2, 16), Tile(16, 64, 4, 2, 16))),
    (128, 64, Tiles(Tile(128, 32, 8, 3), Tile(32, 32, 4, 3), Tile(32, 32, 4, 3))),
    # Three accumulators of 128.
    (128, 128, Tiles(Tile(128, 32, 8, 3), Tile(32, 32, 4, 2), Tile(32, 32, 4, 3))),
)

# Ampere's registers with 99 KiB of shared memory instead of 163: fewer loads in flight where those
# do not fit.
ADA: Rows = (
    (64, 0, Tiles(Tile(128, 128, 8, 2), Tile(128, 64, 8, 3), Tile(64, 128, 8, 2))),
    # Forward: narrow heads spill at 64 keys.
    (32, 32, Tiles(Tile(128, 32, 8, 3), Tile(128, 32, 8, 3), Tile(32, 128, 8, 3))),
    (64, 64, Tiles(Tile(128, 64, 8, 3), Tile(128, 32, 8, 3), Tile(32, 128, 8, 3))),
    # Forward: c, undecayed and lowered, of 128 rows is 64 KiB. Key: 64 keys spill within its loops;
    # 8 warps, since only one block fits an SM.
    (64, 128, Tiles(Tile(64, 64, 4, 2), Tile(64, 32, 8, 3), Tile(64, 32, 8, 3))),
    # Operands of 128 in registers.
    (128, 0, Tiles(Tile(128, 32, 8, 3), Tile(128, 32, 8, 3), Tile(64, 64, 8, 2))),
    # The same, and the decay's weights.
    (128, 16, Tiles(Tile(128, 32, 8, 3), Tile(64, 16, 4, 2, 16), Tile(16, 64, 4, 2, 16))),
    (128, 32, Tiles(Tile(128, 32, 8, 3), Tile(64, 16, 4, 2, 16), Tile(16, 32, 8, 2, 16))),
    (128, 64, Tiles(Tile(128, 32, 8, 2), Tile(32, 32, 4, 3), Tile(32, 32, 4, 3))),
    # Three accumulators of 128.
    (128, 128, Tiles(Tile(64, 32, 4, 2), Tile(64, 32, 8, 2), Tile(16, 32, 4, 3, 16))),
)

# Consumer Blackwell (sm_120) has neither wgmma nor tensor memory: it is as Ada, but for what spills
# within a loop there.
CONSUMER: Rows = (
    *ADA[:2],
    # Query: 3 stages spill by Triton 3.8.
    (64, 64, replace(ADA[2][2], query=Tile(128, 32, 8, 2))),
    *ADA[3:5],
    # Forward: 3 stages spill, and past d_s 16 diagonal steps of 32 keys (of 16, c and b of 16
    # channels would be loaded in single numbers).
    (128, 16, replace(ADA[5][2], forward=Tile(128, 32, 8, 2))),
    (128, 32, replace(ADA[6][2], forward=Tile(128, 32, 8, 3, 16))),
    (128, 64, replace(ADA[7][2], forward=Tile(128, 32, 8, 2, 16))),
    ADA[8],
)

# Accumulators live in tensor memory. One stage: deeper pipelines silently corrupted a kernel like
# these (Triton 3.5 to 3.7, mamba pull request 997).
BLACKWELL: Rows = (
    (64, 0, Tiles(Tile(128, 128, 8, 1), Tile(128, 64, 8, 1), Tile(64, 128, 8, 1))),
    # Key: as on Hopper.
    (64, 64, Tiles(Tile(128, 128, 8, 1), Tile(128, 64, 8, 1), Tile(32, 128, 8, 1))),
    # Forward: 128 keys spill at Dh 16.
    (64, 128, Tiles(Tile(128, 64, 8, 1), Tile(128, 32, 8, 1), Tile(32, 64, 8, 1))),
    (128, 0, Tiles(Tile(128, 128, 8, 1), Tile(128, 64, 8, 1), Tile(64, 128, 8, 1))),
    # The decay's weights, in registers.
    (128, 32, Tiles(Tile(128, 64, 8, 1), Tile(128, 64, 8, 1), Tile(32, 128, 8, 1))),
    # Key: diagonal steps of 32 rows spill in a band.
    (128, 64, Tiles(Tile(128, 64, 8, 1), Tile(128, 64, 8, 1), Tile(32, 128, 8, 1, 16))),
    # Three accumulators of 128. Key: diagonal steps of 32 rows spill, for packed documents.
    (128, 128, Tiles(Tile(128, 64, 8, 1), Tile(64, 64, 8, 1), Tile(32, 64, 8, 1, 16))),
)

# Any other part, and fp32, whose products run on the ordinary cores: within 99 KiB of shared
# memory, whatever spills.
SAFE: Rows = (
    (64, 64, Tiles(Tile(32, 32, 4, 1), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1))),
    (128, 128, Tiles(Tile(16, 16, 4, 1, 16), Tile(16, 16, 4, 1, 16), Tile(16, 16, 4, 1, 16))),
)

TABLE = {
    (8, 0): AMPERE,
    (8, 6): ADA,
    (8, 9): ADA,
    (9, 0): HOPPER,
    (10, 0): BLACKWELL,
    (10, 3): BLACKWELL,
    (12, 0): CONSUMER,
}
_tuned: dict[str, Tiles] | None = None


def table_tiles(capability: tuple[int, int], dtype: torch.dtype, width: int, d_state: int) -> Tiles:
    """The table's row for a capability and padded widths; one of ``SAFE`` where it has none."""
    rows = SAFE if dtype == torch.float32 else TABLE.get(capability, SAFE)
    return next(tiles for w, s, tiles in rows if width <= w and d_state <= s)


def choose_tiles(device: torch.device, dtype: torch.dtype, width: int, d_state: int) -> Tiles:
    """The tiles for a device, dtype and padded widths (the larger of Dh and Dv; Ds, or 0).

    What :func:`sisa_kernels.triton.tune.autotune` has found for them, else the table's row; a part
    that is not in the table is said once."""
    tuned = tuned_tiles().get(tile_key(device, dtype, width, d_state))
    return tuned or _table_row(device, dtype, width, d_state)


@functools.cache
def _table_row(device: torch.device, dtype: torch.dtype, width: int, d_state: int) -> Tiles:
    if device.type != "cuda":
        return table_tiles((0, 0), dtype, width, d_state)
    capability = torch.cuda.get_device_capability(device)
    if capability not in TABLE:
        name = f"{torch.cuda.get_device_name(device)} (sm_{capability[0]}{capability[1]})"
        warnings.warn(f"sisa_kernels has no tiles for {name}: safe, slow ones run", stacklevel=2)
    return table_tiles(capability, dtype, width, d_state)


# ---- What autotuning has found --------------------------------------------------------------


def tile_key(device: torch.device, dtype: torch.dtype, width: int, d_state: int) -> str:
    """What a tuned choice holds for: device, versions that compile for it, dtype and widths."""
    import triton  # here: without it there is nothing to compile, but the table to read

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    versions = f"torch {torch.__version__}, triton {triton.__version__}"
    return f"{name}, {versions}, {str(dtype)[6:]}, width {width}, state {d_state}"


def cache_path() -> Path:
    """Where tuned tiles are kept: ``sisa/tiles.json`` in ``XDG_CACHE_HOME``, or in ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sisa" / "tiles.json"


def tuned_tiles() -> dict[str, Tiles]:
    """The tuned tiles by key, read from the cache once; an unreadable one is said and left."""
    global _tuned
    if _tuned is None:
        _tuned = _read_cache()
    return _tuned


def _read_cache() -> dict[str, Tiles]:
    try:
        read = json.loads(cache_path().read_text())
        return {
            key: Tiles(**{name: Tile(**tile) for name, tile in tiles.items()})
            for key, tiles in read.items()
        }
    except FileNotFoundError:
        pass
    except (OSError, ValueError, TypeError, AttributeError) as error:
        warnings.warn(
            f"sisa_kernels cannot read its tuned tiles, {cache_path()}: {error}", stacklevel=3
        )
    return {}


def save_tuned(key: str, tiles: Tiles) -> None:
    """Keep ``tiles`` for ``key``, here and in the cache, whose file is replaced whole."""
    tuned_tiles()[key] = tiles
    path = cache_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = _read_cache() | {key: tiles}  # as it is now: another process may have tuned, too
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        json.dump({key: asdict(tiles) for key, tiles in kept.items()}, file, indent=1)
    os.replace(file.name, path)
