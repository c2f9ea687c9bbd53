"""A run's folder: its record, its weights, whether a run there may go on."""

import dataclasses
import itertools
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sisa_model.data.corpus import prepared
from sisa_model.runs.config import (
    LAUNCH,
    PATHS,
    RESUME_MAY_CHANGE,
    ResolvedConfig,
    TrainConfig,
    resolve,
    with_absolute_paths,
)
from sisa_model.runs.toml import write_settings
from sisa_model.utils.files import make_folder_atomically, write_json

RECORD = "run.json"
SETTINGS = "run.toml"
OWN = {"out", "resume", "stop_at"}  # a run's own, which are no part of what repeats it


@dataclass(frozen=True)
class RunRecord:
    """What RUN/run.json says of a run."""

    train: ResolvedConfig
    sha256: str
    """Of the tokens it is trained and evaluated on, and of how they are split."""
    split: str = ""
    """The same in words."""
    model: dict[str, Any] = field(default_factory=dict)
    """The model's configuration by field."""
    versions: dict[str, str] = field(default_factory=dict)
    """Of what the run depends on: commit, torch, platform ..."""


def write_run(folder: Path, record: RunRecord) -> None:
    """Write run.json, and run.toml: the flags of `sisa train` that repeat the run."""
    settings = dataclasses.asdict(record.train)
    parts = {
        "train": settings,
        "model": record.model,
        "corpus": {"split": record.split, "sha256": record.sha256},
        "versions": record.versions,
    }
    write_json(folder / RECORD, parts)
    flags = {name: value for name, value in settings.items() if name not in OWN}
    write_settings(folder / SETTINGS, flags)


def read_run(folder: Path) -> RunRecord:
    """The record of the run in ``folder``; FileNotFoundError or ValueError if there is none."""
    path = folder / RECORD
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is not a run folder of sisa train: it has no {RECORD}")
    try:
        parts = json.loads(path.read_text(encoding="utf-8"))
        corpus = parts["corpus"]
        return RunRecord(
            train=_settings(parts["train"]),
            sha256=corpus["sha256"],
            split=corpus.get("split", ""),
            model=parts.get("model", {}),
            versions=parts.get("versions", {}),
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is not the record of a run of this version of sisa train: {error!r}"
        ) from error


def _settings(saved: dict[str, Any]) -> ResolvedConfig:
    """A run's settings from its record, where "mix" may have its first name, "tasks"."""
    known = {"model": {}, "mix": saved.get("tasks"), **saved}
    values = {item.name: known[item.name] for item in dataclasses.fields(ResolvedConfig)}
    for name in ("data", "val_data"):
        values[name] = tuple(map(Path, values[name]))
    for name in ("mix", "log"):
        values[name] = tuple(values[name])
    for name in ("tokenizer", "out"):
        values[name] = None if values[name] is None else Path(values[name])
    return ResolvedConfig(**values)


def own_folder(config: ResolvedConfig) -> Path:
    """A run's folder; FileExistsError if it should be new or empty and is not."""
    if config.out is None:
        return free_folder(Path("runs") / config.preset)
    if is_taken(config.out) and not config.resume:
        raise FileExistsError(
            f"out {config.out} exists; choose another folder, or continue its run with --resume"
        )
    return config.out


def keep_record(folder: Path, record: RunRecord) -> None:
    """Make a new run's folder with its ``record``, or bring the paths of an old one up to date.

    Raises ValueError for a run that cannot go on: its tokens are others now, or it is finished and
    its checkpoints are gone."""
    if not record.train.resume:
        make_folder_atomically(folder, lambda aside: write_run(aside, record))
        return
    begun = read_run(folder)
    if begun.sha256 != record.sha256:
        raise ValueError(
            f"data must be what the run in {folder} began with, but its tokens have changed since"
        )
    if (folder / "final").is_dir() and not checkpoints(folder):
        raise ValueError(f"the run in {folder} is finished, and has no checkpoint to resume from")
    # Generate, inspect and the next resume look there.
    moved = {name: getattr(record.train, name) for name in PATHS}
    train = dataclasses.replace(begun.train, **moved)
    write_run(folder, dataclasses.replace(begun, train=train))


def require_same_run(config: TrainConfig, free: set[str] = RESUME_MAY_CHANGE) -> ResolvedConfig:
    """The settings of the run in ``config.out``; ValueError where ``config`` sets one otherwise.

    Fields in ``free`` may differ; one left at its default says nothing."""
    assert config.out is not None
    saved = read_run(config.out).train
    default = TrainConfig()
    given = with_absolute_paths(config)
    for name, value in vars(saved).items():
        wanted = getattr(given, name)
        if name not in free and wanted != getattr(default, name) and wanted != value:
            raise ValueError(
                f"{name} must stay {value!r}, as the run in {config.out} has it, got {wanted!r}"
            )
    return saved


def resumed(config: TrainConfig) -> ResolvedConfig:
    """The settings of the run in ``config.out``, with what this launch may change of them.

    Raises ValueError without ``out`` and for a flag that contradicts the run."""
    if config.out is None:
        raise ValueError("resume needs out, the run folder to continue")
    free = RESUME_MAY_CHANGE | PATHS
    saved = vars(require_same_run(config, free))
    default = TrainConfig()
    changes = {
        name: getattr(config, name)
        for name in free
        if name in LAUNCH or getattr(config, name) != getattr(default, name)
    }
    data = with_absolute_paths(config).data
    if data and data != saved["data"] and prepared(data):
        saved = {**saved, "tokenizer": None}  # a prepared folder's own moved with it
    return resolve(TrainConfig(**{**saved, **changes}))


def checkpoints(run: Path) -> list[Path]:
    """A run's finished checkpoints, oldest first; names of unfinished ones begin with a dot."""
    return sorted((run / "checkpoints").glob("step-*"))


def weights_by_step(folder: Path, steps: int) -> dict[int, Path]:
    """The folders of a run's weights by step, oldest first; ``final`` is that of ``steps``.

    FileNotFoundError if it has neither."""
    found = {int(path.name.removeprefix("step-")): path for path in checkpoints(folder)}
    if (folder / "final").is_dir():
        found[steps] = folder / "final"
    if not found:
        raise FileNotFoundError(f"{folder} holds no final weights and no checkpoint")
    return found


def newest_weights(folder: Path) -> Path:
    """A run's final weights, or its newest checkpoint; FileNotFoundError without either."""
    return [*weights_by_step(folder, sys.maxsize).values()][-1]


def is_taken(folder: Path) -> bool:
    """Whether anything but an empty folder, which another can be renamed to, is there."""
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
