"""Figures of an evaluation: bootstrap intervals, the table that is printed, the files that are
written.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sisa_model.runs.log import read_rows
from sisa_model.utils.files import write_json, write_text

RESAMPLES = 2000


@dataclass(frozen=True)
class Figure:
    """One measured number of a task with its 95 % interval."""

    metric: str
    value: float
    low: float
    high: float
    count: int
    """Examples."""
    chance: float | None = None
    """What guessing gives; None: not defined."""
    right: str = ""
    """1 or 0 for each example in order, of a metric that is a share of right answers: for paired
    comparisons of models.
    """
    details: dict[str, Any] = field(default_factory=dict)


def interval(scores: Any, aggregate: Callable | None = None) -> tuple[float, float]:
    """The 95 % percentile-bootstrap interval of the mean (or ``aggregate``) of ``scores`` [N, ...],
    with a fixed seed.

    2,000 resamples of the N examples with replacement.
    """
    scores, rng = np.asarray(scores, float), np.random.default_rng(0)
    draws = (scores[rng.integers(len(scores), size=len(scores))] for _ in range(RESAMPLES))
    values = [draw.mean() if aggregate is None else aggregate(draw) for draw in draws]
    low, high = np.percentile(values, (2.5, 97.5))
    return float(low), float(high)


def measured(
    metric: str,
    scores: list[Any],
    chance: float | None,
    aggregate: Callable | None = None,
    details: dict[str, Any] | None = None,
) -> Figure:
    """The figure of ``scores``, one an example: their mean, or ``aggregate`` of them."""
    value = float(np.mean(scores) if aggregate is None else aggregate(scores))
    # The harness's own mean adds in Python, 2,000 times over: ours is the same.
    plain = np.ndim(scores) == 1 and np.isclose(value, np.mean(scores), rtol=1e-12)
    right = "".join(str(int(score)) for score in scores) if set(np.ravel(scores)) <= {0, 1} else ""
    return Figure(
        metric,
        value,
        *interval(scores, None if plain else aggregate),
        len(scores),
        chance,
        right,
        details or {},
    )


def table(figures: dict[str, list[Figure]]) -> str:
    """The figures as lines: task, metric, value, interval, chance, examples."""
    lines = [
        f"{'task':32} {'metric':12} {'value':>9}   {'95 % interval':>18} {'chance':>8} {'examples':>9}"
    ]
    for task, found in figures.items():
        for x in found:
            scale, unit = (100, " %") if x.right else (1, "")
            low_high = f"{scale * x.low:.1f} to {scale * x.high:.1f}{unit}"
            guess = "" if x.chance is None else f"{100 * x.chance:.1f} %"
            lines.append(
                f"{task:32} {x.metric:12} {f'{scale * x.value:.1f}{unit}':>9}   {low_high:>18} {guess:>8} {x.count:>9,}"
            )
    return "\n".join(lines)


def add_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Append ``rows`` to a jsonl file in place of earlier ones of the same step and task; the file
    is replaced as a whole.
    """
    again = {(row["step"], row["task"]) for row in rows}
    kept = [row for row in read_rows(path) if (row["step"], row["task"]) not in again]
    write_text(path, "".join(json.dumps(row) + "\n" for row in kept + rows))


def read_evaluations(folder: Path) -> list[dict[str, Any]]:
    """The rows of RUN/eval.jsonl, shares in [0, 1]; ValueError for one that is no evaluation."""
    path, found = folder / "eval.jsonl", []
    for row in read_rows(path):
        try:
            shares = {
                name: float(row[name])
                for name in ("accuracy", "low", "high")
                if name == "accuracy" or row.get(name) is not None
            }
            if not 0 <= shares["accuracy"] <= 1:
                raise ValueError(f"accuracy must be in [0, 1], got {row['accuracy']}")
            found.append({**row, "step": int(row["step"]), "task": str(row["task"]), **shares})
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} must hold rows of step, task and accuracy, got {row}: {error!r}"
            ) from error
    return found


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Write one task's figures with all that they depend on, as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, record)
