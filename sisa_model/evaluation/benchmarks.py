"""The benchmarks' data: which set each is, what its file holds, and the reading of it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

Protocol = Literal["harness", "paper"]
Row = dict[str, Any]
Fields = dict[str, type]


class Benchmark(NamedTuple):
    """Where a benchmark's examples come from, one JSON object a line, and what guessing gives."""

    file: str
    source: str
    """The public data set and split that the file holds."""
    examples: int
    """How many it has."""
    fields: Fields
    """What protocol paper asks of a line; of a benchmark without it, what the harness does."""
    options: Callable[[Row], list[str]]
    """The answers that an example leaves open."""
    protocols: tuple[Protocol, ...] = ("harness", "paper")
    former_file: str | None = None
    """What the file is called in older folders."""
    harness_fields: tuple[Fields, ...] = ()
    """What the harness asks of a line, any one of them; none: ``fields``."""

    def fields_of(self, protocol: Protocol) -> tuple[Fields, ...]:
        """The sets of fields of which a line must have one."""
        return (self.harness_fields if protocol == "harness" else ()) or (self.fields,)


_ANSWERS: Fields = {"endings": list, "label": int}
BENCHMARKS = {
    "lambada": Benchmark(
        "lambada_cimec_test.jsonl",
        "cimec/lambada, split test (lower-cased, tokenised text)",
        5153,
        {"text": str},
        lambda row: [row["text"]],
        protocols=("paper",),
        former_file="lambada_test.jsonl",
    ),
    "lambada_openai": Benchmark(
        "lambada_openai_test.jsonl",
        "EleutherAI/lambada_openai, split test (natural text)",
        5153,
        {"text": str},
        lambda row: [row["text"]],
        former_file="lambada_test.jsonl",
    ),
    "hellaswag": Benchmark(
        "hellaswag_validation.jsonl",
        "Rowan/hellaswag, split validation (fields as they are)",
        10_042,
        {"ctx": str, **_ANSWERS},
        lambda row: row["endings"],
        harness_fields=(
            {"activity_label": str, "ctx_a": str, "ctx_b": str, **_ANSWERS},
            {"query": str, **_ANSWERS},
        ),
    ),
    "arc_easy": Benchmark(
        "arc_easy_test.jsonl",
        "allenai/ai2_arc, configuration ARC-Easy, split test",
        2376,
        {"question": str, "choices": list, "label": int},
        lambda row: row["choices"],
    ),
    "winogrande": Benchmark(
        "winogrande_xl_validation.jsonl",
        "allenai/winogrande, configuration winogrande_xl, split validation",
        1267,
        {"sentence": str, "option1": str, "option2": str, "label": int},
        lambda row: [row["option1"], row["option2"]],
    ),
    "piqa": Benchmark(
        "piqa_validation.jsonl",
        "baber/piqa, split validation",
        1838,
        {"goal": str, "sol1": str, "sol2": str},
        lambda row: [row["sol1"], row["sol2"]],
        protocols=("harness",),
    ),
}
PIQA_LABELS = "piqa_validation_labels.txt"
SCRIPT = 'docs/evaluate.md, "Local files", has the script that makes it'


def benchmarks_of(protocol: Protocol) -> list[str]:
    """The benchmarks that ``protocol`` scores from local files."""
    return [name for name, benchmark in BENCHMARKS.items() if protocol in benchmark.protocols]


def find_file(task: str, folder: Path) -> Path | None:
    """The file of ``task`` in ``folder``, by its name or its former one; None: not there."""
    benchmark = BENCHMARKS[task]
    names = [benchmark.file, benchmark.former_file or benchmark.file]
    return next((folder / name for name in names if (folder / name).is_file()), None)


def missing_file(task: str, folder: Path) -> str:
    """That ``folder`` lacks the file of ``task``, and what to fetch for it."""
    path = folder / BENCHMARKS[task].file
    return f"task {task} needs {path}, which is not there: {_to_fetch(task)}"


def _to_fetch(task: str) -> str:
    """What makes the file of ``task``: data set, split, examples, fields."""
    benchmark = BENCHMARKS[task]
    fields = ", ".join(f'"{field}"' for field in benchmark.fields)
    return (
        f"fetch {benchmark.source}, {benchmark.examples:,} examples, into {benchmark.file}, "
        f"a JSON object {{{fields}}} a line; {SCRIPT}"
    )


def read_benchmark(
    task: str, folder: Path, limit: int | None = None, protocol: Protocol = "paper"
) -> list[Row]:
    """The first ``limit`` examples of ``task`` (all of them at None) from its file in ``folder``.

    They have the fields that ``protocol`` asks for. Raises FileNotFoundError, saying what to fetch,
    and ValueError naming the file and line of an example that is none, or for the other LAMBADA."""
    path = find_file(task, folder)
    if path is None:
        raise FileNotFoundError(missing_file(task, folder))
    # Not splitlines, which also cuts at separators that JSON leaves unescaped.
    text = path.read_text(encoding="utf-8").rstrip("\n")
    lines = text.split("\n")[:limit] if text else []
    rows = [_read_row(task, protocol, line, f"{path} line {n}") for n, line in enumerate(lines, 1)]
    if not rows:
        raise ValueError(f"{path} holds no example")
    if task == "piqa":
        rows = _with_piqa_labels(rows, folder / PIQA_LABELS, limit)
    for number, row in enumerate(rows, 1):
        _check(f"{path} line {number}", task, row)
    if task in ("lambada", "lambada_openai"):
        _check_lambada(task, path, rows)
    return rows


def _read_row(task: str, protocol: Protocol, line: str, where: str) -> Row:
    """The object of one line, with the fields that the task's examples have."""
    try:
        row = json.loads(line)
        known = BENCHMARKS[task].fields_of(protocol)
        fields = next((fields for fields in known if fields.keys() <= row.keys()), known[0])
        missing = fields.keys() - row.keys()
    except (json.JSONDecodeError, AttributeError) as error:
        raise ValueError(f"{where} is no example of {task}: {error!r}") from error
    if missing:
        raise ValueError(
            f"{where} is no example of {task} in protocol {protocol}: it has "
            f"{', '.join(row)} and no {', '.join(sorted(missing))}; {_to_fetch(task)}"
        )
    wrong = [name for name, kind in fields.items() if not isinstance(row[name], kind)]
    if wrong:
        raise ValueError(f"{where}: {wrong[0]} must be {fields[wrong[0]].__name__}")
    return row


def _with_piqa_labels(rows: list[Row], path: Path, limit: int | None) -> list[Row]:
    if not path.is_file():
        raise FileNotFoundError(
            f"task piqa needs {path}: the index of the right solution, 0 or 1, a line"
        )
    lines = path.read_text(encoding="utf-8").split()
    if set(lines) - {"0", "1"}:
        raise ValueError(f"{path} must hold lines of 0 or 1, got {sorted(set(lines))}")
    labels = [int(line) for line in lines][:limit]
    if len(labels) != len(rows):
        raise ValueError(
            f"{path} must have a label for each of {len(rows)} examples, got {len(labels)}"
        )
    return [{**row, "label": label} for row, label in zip(rows, labels)]


def _check(where: str, task: str, row: Row) -> None:
    options = BENCHMARKS[task].options(row)
    if not all(isinstance(option, str) and option.strip() for option in options):
        raise ValueError(f"{where}: the answers must be texts, none of them empty, got {options}")
    if "label" not in row:  # LAMBADA's answer is its last word
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


def _check_lambada(task: str, path: Path, rows: list[Row]) -> None:
    """Refuse one LAMBADA under the other's name: the paper's is lower-cased, OpenAI's is not."""
    natural = sum(row["text"] != row["text"].lower() for row in rows)
    found = "lambada_openai" if 2 * natural > len(rows) else "lambada"
    if found != task:
        raise ValueError(
            f"{path} must hold {task}, and is {found}: {natural:,} of {len(rows):,} examples have "
            f"capitals; {_to_fetch(task)}"
        )


def chance(task: str, rows: list[Row]) -> float:
    """Accuracy of guessing among the answers; LAMBADA's word is one of a whole vocabulary: 0."""
    if task in ("lambada", "lambada_openai"):
        return 0.0
    return float(np.mean([1 / len(BENCHMARKS[task].options(row)) for row in rows]))
