"""The five benchmarks: their files, and the scoring rules of the paper's authors (section 5)."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sisa_model.data.tokenizer import Encoder
from sisa_model.evaluation.scoring import Request, Score
from sisa_model.evaluation.statistics import Measurement, measure

Row = dict[str, Any]


class Benchmark(NamedTuple):
    """Where a benchmark's examples come from, one JSON object a line, and what guessing gives."""

    file: str
    fields: dict[str, type]
    source: str
    """The public data set and split that the file holds."""
    examples: int
    """How many it has."""
    options: Callable[[Row], list[str]]
    """The answers that an example leaves open."""
    paper: bool = True
    """The paper reports it."""


BENCHMARKS = {
    "lambada": Benchmark(
        "lambada_test.jsonl",
        {"text": str},
        "EleutherAI/lambada_openai, test",
        5153,
        lambda row: [row["text"]],
    ),
    "hellaswag": Benchmark(
        "hellaswag_validation.jsonl",
        {"query": str, "endings": list, "label": int},
        "Rowan/hellaswag, validation, query = activity_label: ctx without its [brackets]",
        10_042,
        lambda row: row["endings"],
    ),
    "arc_easy": Benchmark(
        "arc_easy_test.jsonl",
        {"question": str, "choices": list, "label": int},
        "allenai/ai2_arc ARC-Easy, test",
        2376,
        lambda row: row["choices"],
    ),
    "winogrande": Benchmark(
        "winogrande_xl_validation.jsonl",
        {"sentence": str, "option1": str, "option2": str, "label": int},
        "allenai/winogrande winogrande_xl, validation",
        1267,
        lambda row: [row["option1"], row["option2"]],
    ),
    "piqa": Benchmark(
        "piqa_validation.jsonl",
        {"goal": str, "sol1": str, "sol2": str},
        "baber/piqa, validation",
        1838,
        lambda row: [row["sol1"], row["sol2"]],
        paper=False,
    ),
}
PIQA_LABELS = "piqa_validation_labels.txt"


def read_benchmark(task: str, folder: Path, limit: int | None = None) -> list[Row]:
    """The first ``limit`` examples of ``task`` (all of them at None) from its file in ``folder``.

    Raises FileNotFoundError, saying what belongs there, and ValueError naming the file and line of
    an example that is none."""
    benchmark = BENCHMARKS[task]
    path = folder / benchmark.file
    if not path.is_file():
        fields = ", ".join(f'"{field}"' for field in benchmark.fields)
        raise FileNotFoundError(
            f"task {task} needs {path}: a JSON object {{{fields}}} a line ({benchmark.source})"
        )
    # Not splitlines, which also cuts at separators that JSON leaves unescaped.
    text = path.read_text(encoding="utf-8").rstrip("\n")
    lines = text.split("\n")[:limit] if text else []
    rows = [_read_row(task, line, f"{path} line {n}") for n, line in enumerate(lines, 1)]
    if not rows:
        raise ValueError(f"{path} holds no example")
    if task == "piqa":
        labels_path = folder / PIQA_LABELS
        labels = _piqa_labels(labels_path)[:limit]
        if len(labels) != len(rows):
            raise ValueError(
                f"{labels_path} must have a label for each of {len(rows)} examples, "
                f"got {len(labels)}"
            )
        rows = [{**row, "label": label} for row, label in zip(rows, labels)]
    for number, row in enumerate(rows, 1):
        _check(f"{path} line {number}", task, row)
    return rows


def _read_row(task: str, line: str, where: str) -> Row:
    """The object of one line, with the fields that the task's examples have."""
    fields = BENCHMARKS[task].fields
    try:
        row = json.loads(line)
        wrong = [name for name, kind in fields.items() if not isinstance(row[name], kind)]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{where} is no example of {task}: {error!r}") from error
    if wrong:
        raise ValueError(f"{where}: {wrong[0]} must be {fields[wrong[0]].__name__}")
    return row


def _piqa_labels(path: Path) -> list[int]:
    if not path.is_file():
        raise FileNotFoundError(
            f"task piqa needs {path}: the index of the right solution, 0 or 1, a line"
        )
    lines = path.read_text(encoding="utf-8").split()
    if set(lines) - {"0", "1"}:
        raise ValueError(f"{path} must hold lines of 0 or 1, got {sorted(set(lines))}")
    return [int(line) for line in lines]


def _check(where: str, task: str, row: Row) -> None:
    options = BENCHMARKS[task].options(row)
    if not all(isinstance(option, str) and option.strip() for option in options):
        raise ValueError(f"{where}: the answers must be texts, none of them empty, got {options}")
    if task == "lambada":
        if not all(part.strip() for part in row["text"].rpartition(" ")[::2]):
            raise ValueError(
                f"{where}: text must have a last word after others, got {row['text']!r}"
            )
    elif not 0 <= row["label"] < len(options):
        raise ValueError(
            f"{where}: label must be the index of one of {len(options)} answers, got {row['label']}"
        )
    if task == "winogrande" and "_" not in row["sentence"]:
        raise ValueError(f"{where}: sentence must have a blank _ to fill, got {row['sentence']!r}")


def chance(task: str, rows: list[Row]) -> float:
    """Accuracy of guessing among the answers; LAMBADA's word is one of a whole vocabulary: 0."""
    if task == "lambada":
        return 0.0
    return float(np.mean([1 / len(BENCHMARKS[task].options(row)) for row in rows]))


def paper_options(task: str, row: Row) -> list[tuple[str, str]]:
    """(context, continuation) of each answer, as the authors score it.

    Scored are the tokens of the continuation, given all before them. LAMBADA: the last word.
    HellaSwag and ARC-Easy: each ending. WinoGrande: the whole sentence with each name in the
    blank, from its second token on (context ""). The paper gives no prompt for ARC-Easy; here it
    is the harness's."""
    if task == "lambada":
        context, _, word = row["text"].rpartition(" ")
        return [(context, f" {word}")]
    options = BENCHMARKS[task].options(row)
    if task == "winogrande":
        return [("", row["sentence"].replace("_", option)) for option in options]
    context = row["query"] if task == "hellaswag" else f"Question: {row['question']}\nAnswer:"
    return [(context, f" {option}") for option in options]


def encode_pair(encoder: Encoder, context: str, continuation: str) -> Request:
    """The tokens of both texts together, scored after as many as the context alone takes.

    The first token of all, which nothing predicts, is never scored."""
    ids = encoder.encode_text(context + continuation)
    return Request(ids, max(1, len(encoder.encode_text(context))))


class PaperBenchmark:
    """A benchmark's examples as the authors ask and score them: one request an answer."""

    def __init__(self, task: str, rows: list[Row], encoder: Encoder):
        self.task = task
        self.rows = rows
        self.options = [
            [encode_pair(encoder, *option) for option in paper_options(task, row)] for row in rows
        ]
        self.requests = [request for options in self.options for request in options]

    def measure(self, scores: list[Score]) -> Measurement:
        """The accuracy, of the scores of :attr:`requests`."""
        left = iter(scores)
        right = [
            paper_right(self.task, row, [next(left) for _ in options])
            for row, options in zip(self.rows, self.options)
        ]
        return measure("accuracy", right, chance(self.task, self.rows))


def paper_right(task: str, row: Row, scores: list[Score]) -> bool:
    """Whether the scores of :func:`paper_options` answer ``row``.

    LAMBADA greedily, else by the greatest mean a token."""
    if task == "lambada":
        return scores[0].greedy
    return int(np.argmax([score.mean for score in scores])) == row["label"]
