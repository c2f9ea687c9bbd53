"""Where a run's weights are: its checkpoints by step, and what is final."""

import sys
from pathlib import Path

from sisa_model.models.checkpoint import CONFIG

FINAL = "final"


def checkpoints(run: Path) -> list[Path]:
    """A run's finished checkpoints, oldest first; names of unfinished ones begin with a dot."""
    return sorted((run / "checkpoints").glob("step-*"))


def step_of(checkpoint: Path) -> int:
    """The steps that were done when it was saved."""
    return int(checkpoint.name.rpartition("-")[2])


def weights_by_step(folder: Path, steps: int) -> dict[int, Path]:
    """The folders of a run's weights by step, oldest first; ``final`` is that of ``steps``.

    ``final-N`` is what was final before the run was extended from N steps. FileNotFoundError if
    there is none of them."""
    found = {step_of(path): path for path in (*checkpoints(folder), *folder.glob(f"{FINAL}-*"))}
    if (folder / FINAL).is_dir():
        found[steps] = folder / FINAL
    if not found:
        raise FileNotFoundError(f"{folder} holds no final weights and no checkpoint")
    return dict(sorted(found.items()))


def newest_weights(folder: Path) -> Path:
    """A run's final weights, or its newest checkpoint; FileNotFoundError without either."""
    return [*weights_by_step(folder, sys.maxsize).values()][-1]


def find_weights(folder: Path) -> Path:
    """The folder of weights that ``folder`` is, or of a run the newest.

    Raises FileNotFoundError if it is neither."""
    if (folder / CONFIG).is_file():
        return folder
    return newest_weights(folder)
