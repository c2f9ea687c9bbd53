"""A run's folder: its record, its weights, whether a run there may go on."""

import dataclasses
import errno
import functools
import itertools
import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sisa_model.data.corpus import prepared
from sisa_model.data.shards import TOKENIZER, file_sha256
from sisa_model.runs.config import (
    GOING_ON,
    LAUNCH,
    PATHS,
    RESUME_MAY_CHANGE,
    ResolvedConfig,
    TrainConfig,
    resolve,
    with_absolute_paths,
)
from sisa_model.runs.toml import write_settings
from sisa_model.runs.weights import FINAL, checkpoints, step_of
from sisa_model.utils.files import make_folder_atomically, remove_folder, write_json

log = logging.getLogger(__name__)

RECORD = "run.json"
SETTINGS = "run.toml"
HELD_OUT = "held-out.npy"
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
    tokenizer_sha256: str | None = None
    """Of RUN/tokenizer.json; None for bytes, and for a run that keeps no copy."""

    @property
    def token_kind(self) -> str:
        """What its tokens are, in words: losses a token compare where these are the same."""
        if self.train.task != "text":
            return f"task {self.train.task}"
        if self.train.tokenizer is None:
            return "bytes"
        known = self.tokenizer_sha256
        return f"tokenizer {known[:8] if known else self.train.tokenizer}"


def write_run(folder: Path, record: RunRecord) -> None:
    """Write run.json, and run.toml: the flags of `sisa train` that repeat the run."""
    settings = dataclasses.asdict(record.train)
    parts = {
        "train": settings,
        "model": record.model,
        "corpus": {"split": record.split, "sha256": record.sha256},
        "versions": record.versions,
        "tokenizer": {"sha256": record.tokenizer_sha256},
    }
    write_json(folder / RECORD, parts)
    flags = {name: value for name, value in settings.items() if name not in OWN}
    write_settings(folder / SETTINGS, flags)


def read_run(folder: Path) -> RunRecord:
    """The record of the run in ``folder``, whose own tokenizer is ``train.tokenizer``.

    Raises FileNotFoundError or ValueError if there is none, or the tokenizer is another now."""
    path = folder / RECORD
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is not a run folder of sisa train: it has no {RECORD}")
    try:
        parts = json.loads(path.read_text(encoding="utf-8"))
        corpus = parts["corpus"]
        record = RunRecord(
            train=_settings(parts["train"]),
            sha256=corpus["sha256"],
            split=corpus.get("split", ""),
            model=parts.get("model", {}),
            versions=parts.get("versions", {}),
            tokenizer_sha256=parts.get("tokenizer", {}).get("sha256"),
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is not the record of a run of this version of sisa train: {error!r}"
        ) from error

    return _with_own_tokenizer(folder, record)


def _with_own_tokenizer(folder: Path, record: RunRecord) -> RunRecord:
    if record.tokenizer_sha256 is None:
        return record
    own = (folder / TOKENIZER).absolute()
    if not own.is_file():
        raise FileNotFoundError(f"the run in {folder} has lost its tokenizer: there is no {own}")
    if file_sha256(own) != record.tokenizer_sha256:
        raise ValueError(f"{own} is not the tokenizer that the run in {folder} was trained with")
    return dataclasses.replace(record, train=dataclasses.replace(record.train, tokenizer=own))


def _settings(saved: dict[str, Any]) -> ResolvedConfig:
    """A run's settings from its record.

    A field that came later has its default, by which the run was made; "mix" may have its first
    name, "tasks"."""
    fields = dataclasses.fields(ResolvedConfig)
    defaults = {item.name: item.default for item in fields if item.default is not MISSING}
    known = {**defaults, "model": {}, "mix": saved.get("tasks"), **saved}
    values = {item.name: known[item.name] for item in fields}
    for name in ("data", "val_data"):
        values[name] = tuple(map(Path, values[name]))
    for name in ("mix", "log"):
        values[name] = tuple(values[name])
    for name in ("tokenizer", "out", "init_from"):
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


def begin_run(record: RunRecord, held_out: np.ndarray, named: bool) -> Path:
    """Make a new run's folder, with its ``record`` and its tokenizer; the folder.

    ``held_out`` [N, L + 1] int32: what it evaluates on, which stays with it. Unless ``named``, the
    folder may become another one, where somebody else took ``record.train.out`` meanwhile."""
    tokenizer = record.train.tokenizer
    if tokenizer is not None:
        record = dataclasses.replace(record, tokenizer_sha256=file_sha256(tokenizer))
    while True:
        folder = record.train.out
        assert folder is not None
        fill = functools.partial(_fill, record=record, held_out=held_out)
        try:
            make_folder_atomically(folder, fill)
            return folder
        except OSError as error:
            if named or error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
            free = dataclasses.replace(record.train, out=None)
            train = dataclasses.replace(free, out=own_folder(free))
            record = dataclasses.replace(record, train=train)


def _fill(folder: Path, record: RunRecord, held_out: np.ndarray) -> None:
    write_run(folder, record)
    if record.train.tokenizer is not None:
        shutil.copyfile(record.train.tokenizer, folder / TOKENIZER)
    if len(held_out):
        np.save(folder / HELD_OUT, held_out)


def go_on(folder: Path, record: RunRecord) -> ResolvedConfig:
    """Bring the record of the run in ``folder`` up to date, before it goes on; its settings so far.

    What a run to more steps has no use for goes: a schedule's decay that ended too early, of which
    the final weights stay as final-N. Raises ValueError for a run that cannot go on: its tokens are
    others now, it has done more steps than it should, or it is finished and its checkpoints are
    gone."""
    begun = read_run(folder)
    if begun.sha256 != record.sha256:
        raise ValueError(
            f"data must be what the run in {folder} began with, but its tokens have changed since"
        )
    held = checkpoints(folder)
    if (folder / FINAL).is_dir() and not held:
        raise ValueError(f"the run in {folder} is finished, and has no checkpoint to resume from")
    done = step_of(held[-1]) if held else 0
    if record.train.steps < done:
        raise ValueError(f"steps must be at least {done}, which the run in {folder} has done")
    if record.train.steps > begun.train.steps:
        _make_room(folder, begun.train)
    # Generate, inspect and the next resume look there.
    changed = {name: getattr(record.train, name) for name in PATHS | GOING_ON}
    train = dataclasses.replace(begun.train, **changed)
    write_run(folder, dataclasses.replace(begun, train=train))
    return begun.train


def _make_room(folder: Path, before: ResolvedConfig) -> None:
    """Take the run in ``folder`` back to where a longer one does the same."""
    held = checkpoints(folder)
    if before.decay_steps is not None:
        too_late = [x for x in held if step_of(x) > before.steps - before.decay_steps]
        if len(too_late) < len(held):
            for checkpoint in reversed(too_late):
                remove_folder(checkpoint)
        else:
            log.warning(f"{folder} has no checkpoint from before its learning rate fell to 0")
    if (folder / FINAL).is_dir():
        (folder / FINAL).rename(folder / f"{FINAL}-{before.steps}")


def require_same_run(config: TrainConfig, free: set[str] = RESUME_MAY_CHANGE) -> ResolvedConfig:
    """The settings of the run in ``config.out``; ValueError where ``config`` sets one otherwise.

    Fields in ``free`` may differ; one left at its default says nothing. A tokenizer is the same by
    what is in it."""
    assert config.out is not None
    saved = read_run(config.out).train
    default = TrainConfig()
    given = with_absolute_paths(config)
    for name, value in vars(saved).items():
        wanted = getattr(given, name)
        if name == "tokenizer" and wanted is not None and value is not None:
            if file_sha256(wanted) != file_sha256(value):
                raise ValueError(
                    f"tokenizer must be the one of the run in {config.out}, got another in {wanted}"
                )
            continue
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
    free = RESUME_MAY_CHANGE | PATHS | GOING_ON
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
