"""TODO sisa_model.runs.folder"""

import dataclasses
import itertools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sisa_model.data.corpus import find_tokenizer
from sisa_model.runs.config import LAUNCH, PATHS, RESUME_MAY_CHANGE, TrainConfig, _absolute, resolve


def read_run(folder: Path) -> dict[str, Any]:
    """The record of the run in ``folder``, its "train" as a TrainConfig; FileNotFoundError or
    ValueError if there is none.
    """
    path = folder / "run.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is not a run folder of sisa train: it has no run.json")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        fields = {
            f.name: _from_json(f, record["train"][f.name]) for f in dataclasses.fields(TrainConfig)
        }
        _ = record["corpus"]["sha256"]
        return {**record, "train": TrainConfig(**fields)}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is not the record of a run of this version of sisa train: {error!r}"
        ) from error


def require_same_run(config: TrainConfig, free: set[str] = RESUME_MAY_CHANGE) -> dict[str, Any]:
    """The settings of the run in ``config.out``; ValueError for a field of ``config``, none of
    ``free``, that is set otherwise.
    """
    assert config.out is not None
    saved, default, config = vars(read_run(config.out)["train"]), TrainConfig(), _absolute(config)
    for name, value in saved.items():
        given = getattr(config, name)
        if name not in free and given != getattr(default, name) and given != value:
            raise ValueError(
                f"{name} must stay {value!r}, as the run in {config.out} has it, got {given!r}"
            )
    return saved


def resumed(config: TrainConfig) -> TrainConfig:
    """The configuration in the run folder, with what this call may change; ValueError for a flag
    that contradicts it.
    """
    if config.out is None:
        raise ValueError("resume needs out, the run folder to continue")
    free = RESUME_MAY_CHANGE | PATHS
    saved = require_same_run(config, free)
    given = {name: getattr(config, name) for name in free}
    given = {
        name: value
        for name, value in given.items()
        if name in LAUNCH or value != getattr(TrainConfig(), name)
    }
    data = _absolute(config).data
    if data and data != saved["data"] and find_tokenizer(data, None):
        saved["tokenizer"] = None  # a prepared folder's own moved with it
    return resolve(TrainConfig(**{**saved, **given}))


def _from_json(field: dataclasses.Field, value: Any) -> Any:
    if field.name in ("data", "val_data"):
        return tuple(Path(x) for x in value)
    if field.name in ("tasks", "log"):
        return tuple(value)
    return Path(value) if field.name in ("tokenizer", "out") and value is not None else value


def checkpoints(run: Path) -> list[Path]:
    """The finished checkpoints of a run, oldest first (unfinished ones have names that begin with a
    dot).
    """
    return sorted((run / "checkpoints").glob("step-*"))


def weights_by_step(folder: Path, steps: int) -> dict[int, Path]:
    """The folders of a run's weights by their step, oldest first: its checkpoints, and ``final``
    after the last of ``steps``.

    FileNotFoundError if it has neither.
    """
    found = {int(path.name.removeprefix("step-")): path for path in checkpoints(folder)}
    if (folder / "final").is_dir():
        found[steps] = folder / "final"
    if not found:
        raise FileNotFoundError(f"{folder} holds no final weights and no checkpoint")
    return found


def newest_weights(folder: Path) -> Path:
    """The folder of a run's final weights, or of its newest checkpoint; FileNotFoundError if it has
    neither.
    """
    return [*weights_by_step(folder, sys.maxsize).values()][-1]


def is_taken(folder: Path) -> bool:
    """Whether something is at ``folder`` already, other than an empty folder that another can be
    renamed to.
    """
    replaceable = (
        folder.is_dir()
        and not folder.is_symlink()
        and not os.path.ismount(folder)
        and not any(folder.iterdir())
    )
    return os.path.lexists(folder) and not replaceable


def free_folder(wanted: Path, taken: Callable[[Path], bool] = Path.exists) -> Path:
    """The first of ``wanted``, ``wanted``-2, -3 ... that is not taken."""
    numbered = (wanted.with_name(f"{wanted.name}-{number}") for number in itertools.count(2))
    return next(folder for folder in itertools.chain([wanted], numbered) if not taken(folder))
