"""What run folders came to: their settings, losses, throughput and evaluations."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sisa_model.evaluation.needles import NIAH_LENGTH
from sisa_model.evaluation.records import read_evaluations
from sisa_model.models.config import ModelConfig
from sisa_model.models.presets import Scale, find_preset, preset_config
from sisa_model.runs.config import ResolvedConfig
from sisa_model.runs.folder import read_run
from sisa_model.runs.log import read_rows

NEEDLES_BY_PART = ("niah_long", "needle_long", "needle_grid")


class Accuracy(NamedTuple):
    """An accuracy in percent, the step it was measured at, and its interval where it has one."""

    value: float
    step: int
    low: float | None = None
    high: float | None = None


class Results(NamedTuple):
    """What a run folder came to."""

    name: str
    model: str
    """Its row in the tables: the preset, what a shape of one's own changes, "-frozen" lambda."""
    scale: Scale
    config: ModelConfig
    train: ResolvedConfig
    step: int
    loss: float | None
    """Held-out loss at the last evaluation, nats a token."""
    rate: float | None
    """Median training throughput, tokens/s."""
    commit: str
    tokens: str
    """What its tokens are: losses a token compare where these are the same."""
    tasks: dict[str, dict[int, Accuracy]]
    """Task -> step -> accuracy, of RUN/eval.jsonl and of the retrieval tasks in RUN/val.jsonl."""
    needles: dict[str, dict[str, Any]]
    """Needle test -> its last row, with the shares of each length and depth."""
    dtypes: str
    """What the paper's protocol was computed in; "" where it was not."""


def collect(folder: Path, name: str) -> Results:
    """Read a run folder, called ``name``.

    Raises ValueError for a row of RUN/eval.jsonl that is no evaluation, and as
    :func:`sisa_model.runs.folder.read_run` does for a folder that is no run."""
    record = read_run(folder)
    training = read_rows(folder / "train.jsonl")
    val = read_rows(folder / "val.jsonl")
    evaluations = read_evaluations(folder)
    tasks: dict[str, dict[int, Accuracy]] = {}
    for row in val:
        step = row["step"]
        for field in (field for field in row if field.endswith("_accuracy")):
            accuracy = Accuracy(100 * row[field], step)
            tasks.setdefault(field.removesuffix("_accuracy"), {})[step] = accuracy
    for row in evaluations:
        low, high = (None if row.get(edge) is None else 100 * row[edge] for edge in ("low", "high"))
        accuracy = Accuracy(100 * row["accuracy"], row["step"], low, high)
        tasks.setdefault(_title(row), {})[accuracy.step] = accuracy
    last = sorted(evaluations, key=lambda row: row["step"])
    by_paper = [row for row in evaluations if row.get("protocol") == "paper"]
    dtypes = {row["dtype"] for row in by_paper if "dtype" in row}
    rates = [row["tokens_per_s"] for row in training]
    return Results(
        name=name,
        model=_row_of(record.train),
        scale=find_preset(record.train.preset).scale,
        config=preset_config(record.train.preset, **record.train.model),
        train=record.train,
        step=training[-1]["step"] if training else 0,
        loss=val[-1]["loss"] if val else None,
        rate=float(np.median(rates)) if rates else None,
        commit=record.versions.get("commit", "unknown"),
        tokens=record.token_kind,
        tasks=tasks,
        needles={row["task"]: row for row in last if row["task"] in NEEDLES_BY_PART},
        dtypes=", ".join(sorted(dtypes)),
    )


def _row_of(train: ResolvedConfig) -> str:
    """The row of the paper's tables that a run belongs to, or a row of its own."""
    frozen = find_preset(train.preset).family == "sisa" and train.lambda_lr_scale == 0
    name = f"{train.preset}-frozen" if frozen else train.preset
    changes = [f"{field} {value}" for field, value in train.model.items()]
    return f"{name} with {', '.join(changes)}" if changes else name


def _title(row: dict[str, Any]) -> str:
    """A row's task, with the length of a needle test where it is another than the usual."""
    length = row.get("length", NIAH_LENGTH)
    return row["task"] if length == NIAH_LENGTH else f"{row['task']} at {length:,}"
