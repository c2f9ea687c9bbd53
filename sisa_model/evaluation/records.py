"""The files of an evaluation: a JSON record a task, and the rows of RUN/eval.jsonl."""

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sisa_model.evaluation.config import EvalConfig, protocol_of
from sisa_model.evaluation.needles import NEEDLE_TESTS, Needles
from sisa_model.evaluation.paper import PaperBenchmark
from sisa_model.evaluation.scoring import ScoringPrecision
from sisa_model.evaluation.statistics import Measurement
from sisa_model.evaluation.subject import Subject
from sisa_model.runs.log import read_rows
from sisa_model.utils.files import write_json, write_text
from sisa_model.utils.machine import versions

# What rows without a protocol were measured by, before the authors' own was known token for token.
FORMER_TITLES = {
    "lambada": "lambada_openai",
    "niah": "needle",
    "niah_long": "needle_long",
    "hellaswag": "hellaswag, earlier rule",
    "arc_easy": "arc_easy, earlier rule",
    "winogrande": "winogrande, earlier rule",
}


class Records:
    """Names and writes what is measured of ``subject`` as ``config`` asks."""

    def __init__(self, config: EvalConfig, subject: Subject):
        self.config = config
        self.subject = subject
        self.folder = config.run / "eval"

    @property
    def left_out(self) -> str | None:
        """Why the figures are not in eval.jsonl; None: they are.

        It has those of a known step on all examples."""
        if self.subject.step is None:
            return "of unknown step"
        return None if self.config.limit is None else "a quick look"

    def title(self, task: str) -> str:
        """The task's name in eval.jsonl.

        It is bare where protocol and model are the paper's, whose curves nothing else should
        meet."""
        harness = protocol_of(task, self.config.protocol) == "harness"
        marks = ["harness"] * harness + ["lambda 0"] * self.config.lam_zero
        return f"{task} ({', '.join(marks)})" if marks else task

    def path(self, task: str, suffix: str = ".json") -> Path:
        """The file of a task's record, or with another ``suffix`` its picture."""
        step = self.subject.step
        limit = self.config.limit
        marks = [
            None if step is None else f"step-{step:08d}",
            task,
            None if task in NEEDLE_TESTS else self.config.protocol,
            "lambda0" if self.config.lam_zero else None,
            None if limit is None else f"limit{limit}",
        ]
        return self.folder / ("-".join(mark for mark in marks if mark) + suffix)

    def write(self, task: str, measurements: list[Measurement], dtype: ScoringPrecision) -> None:
        """Write a task's record with all that its figures depend on, and its row in eval.jsonl.

        ``dtype`` is what it was computed in."""
        protocol = protocol_of(task, self.config.protocol)
        record = {
            "task": self.title(task),
            "step": self.subject.step,
            "protocol": protocol,
            "dtype": dtype,
            "weights": self.subject.weights,
            "figures": [dataclasses.asdict(x) for x in measurements],
            "settings": dataclasses.asdict(self.config),
            "versions": versions(),
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.path(task), record)
        shares = [x for x in measurements if x.right]
        if self.left_out or not shares:
            return
        # HellaSwag's acc_norm is what is commonly reported; of the other tasks, acc.
        normed = [x for x in shares if x.metric == "acc_norm" and task == "hellaswag"]
        best = (normed or shares)[0]
        row = {
            "step": self.subject.step,
            "task": self.title(task),
            "protocol": protocol,
            "dtype": dtype,
            "accuracy": best.value,
            "low": best.low,
            "high": best.high,
            "chance": best.chance,
            "count": best.count,
            "metric": best.metric,
        }
        add_rows(self.config.run / "eval.jsonl", [{**row, **best.details}])


def add_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Put ``rows`` into a jsonl file in place of earlier ones of the same step and task.

    The file is replaced as a whole."""
    again = {(row["step"], present_title(row)) for row in rows}
    kept = [row for row in read_rows(path) if (row["step"], present_title(row)) not in again]
    write_text(path, "".join(json.dumps(row) + "\n" for row in kept + rows))


def present_title(row: dict[str, Any]) -> str:
    """The task of a row of eval.jsonl, a bare name of the paper's tasks for its protocol alone.

    A row without a protocol was measured by an earlier rule."""
    title = str(row["task"])
    task, mark, rest = title.partition(" (")
    protocol = row.get("protocol")
    if protocol is not None:
        other = protocol != "paper" and title in FORMER_TITLES
        return f"{title} ({protocol})" if other else title
    if rest.startswith("harness"):
        return f"{FORMER_TITLES[task]}{mark}{rest}" if task == "lambada" else title
    return f"{FORMER_TITLES.get(task, task)}{mark}{rest}"


def read_evaluations(run: Path) -> list[dict[str, Any]]:
    """The rows of RUN/eval.jsonl, shares in [0, 1]; ValueError for one that is no evaluation.

    Each by :func:`present_title`: a bare name of the paper's tables is the paper's protocol."""
    path = run / "eval.jsonl"
    found = []
    for row in read_rows(path):
        try:
            found.append(_checked(row))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} must hold rows of step, task and accuracy, got {row}: {error!r}"
            ) from error
    return found


def _checked(row: dict[str, Any]) -> dict[str, Any]:
    edges = [name for name in ("low", "high") if row.get(name) is not None]
    shares = {name: float(row[name]) for name in ("accuracy", *edges)}
    if not 0 <= shares["accuracy"] <= 1:
        raise ValueError(f"accuracy must be in [0, 1], got {row['accuracy']}")
    return {**row, "step": int(row["step"]), "task": present_title(row), **shares}


def write_requests(path: Path, asked: Iterable[PaperBenchmark | Needles]) -> int:
    """Write each request of ``asked`` as a line of JSON into ``path``; how many there are.

    A line has the task, the id (the example's number in its file, or the trial's, from 0), the
    tokens of the whole request, the index of the first scored one, and the answer's number (0 where
    there is one). The file is replaced as a whole, its folder made if need be."""
    lines = [
        json.dumps(
            {
                "task": questions.task,
                "id": number,
                "tokens": request.ids,
                "scored_from": request.start,
                "choice": choice,
            }
        )
        for questions in asked
        for number, choice, request in questions.named_requests()
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(f"{line}\n" for line in lines))
    return len(lines)
