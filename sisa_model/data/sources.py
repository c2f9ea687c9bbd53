"""Documents of local files and of the Hub's datasets, in one order, from any place in it."""

import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sisa_model.data.text import documents, find_files, needs, open_text

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w.-]+)?")
COMPRESSED = {".gz", ".xz", ".zst"}
KINDS = {".parquet": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl"}
Position = tuple[int, int]  # the number of a source, and how many of its documents come before


@dataclass(frozen=True)
class Source:
    """A file or a dataset of the Hub.

    By ``version``, a file's size in bytes or a dataset's commit, a changed one is known."""

    name: str
    kind: str
    version: str


def find_sources(names: tuple[str, ...]) -> list[Source]:
    """The files of paths and folders, and the Hub's datasets, in ``names``.

    Datasets are OWNER/NAME or OWNER/NAME@REVISION. Raises FileNotFoundError for a name that is
    neither, and ValueError for a folder with files of several kinds."""
    if not names:
        raise ValueError(
            "sources must be at least one file, folder or dataset of the Hub, got none"
        )
    sources: list[Source] = []
    for name in names:
        if Path(name).exists():
            sources += _local_sources(name)
        elif HUB_NAME.fullmatch(name):
            sources.append(_hub_source(name))
        else:
            raise FileNotFoundError(
                f"source {name} is neither a file or folder here nor a dataset's name on the Hub "
                "(OWNER/NAME)"
            )
    return sources


def _local_sources(name: str) -> list[Source]:
    files = find_files([Path(name)])
    kinds = {_kind(path): path for path in files}
    if len(kinds) > 1:
        found = ", ".join(f"{kind} ({path.name})" for kind, path in sorted(kinds.items()))
        raise ValueError(
            f"source {name} must hold files of one kind, got {found}; name the files themselves"
        )
    return [Source(str(path.absolute()), _kind(path), str(path.stat().st_size)) for path in files]


def _kind(path: Path) -> str:
    inner = path.with_suffix("") if path.suffix in COMPRESSED else path
    return KINDS.get(inner.suffix, "text")


def _hub_source(name: str) -> Source:
    repository, _, revision = name.partition("@")
    try:
        hub = needs("huggingface_hub", name).HfApi()
        commit = hub.dataset_info(repository, revision=revision or None).sha
    except Exception as error:  # the Hub's errors, and of many kinds the network's
        raise FileNotFoundError(
            f"source {name} is no file or folder here, and the Hub does not give it: {error}"
        ) from error
    return Source(repository, "hub", commit)


def read(
    sources: list[Source], start: Position, field: str, subset: str | None, split: str
) -> Iterator[tuple[Position, str]]:
    """The documents from ``start`` on, each with the position after it; blank ones are passed over.

    ``field`` holds the text of a parquet, jsonl or Hub row; ``subset`` and ``split`` choose among a
    Hub dataset's. Raises ValueError, naming the source, for one that is damaged, is not of its kind
    or has no such field (with those it has)."""
    for number, source in enumerate(sources[start[0] :], start[0]):
        skipped = start[1] if number == start[0] else 0
        if source.kind == "hub":
            texts = _hub(source, field, subset, split, skipped)
        else:
            reader = {"parquet": _parquet, "jsonl": _jsonl, "text": _text}[source.kind]
            texts = itertools.islice(reader(Path(source.name), field), skipped, None)
        for count, text in enumerate(texts, skipped + 1):
            if text.strip():
                yield (number, count), text


def _hub(source: Source, field: str, subset: str | None, split: str, skipped: int) -> Iterator[str]:
    datasets = needs("datasets", source.name)
    try:
        rows = datasets.load_dataset(
            source.name, subset, split=split, revision=source.version, streaming=True
        )
        for row in rows.skip(skipped):
            yield _value(row, field, source.name)
    except (ValueError, OSError):
        raise
    except Exception as error:  # of many kinds the network's
        raise OSError(
            f"the Hub stopped giving {source.name}, and the same command goes on from there: "
            f"{error!r}"
        ) from error


def _parquet(path: Path, field: str) -> Iterator[str]:
    parquet = needs("pyarrow.parquet", str(path))
    try:
        with parquet.ParquetFile(path) as file:
            _value(dict.fromkeys(file.schema_arrow.names, ""), field, str(path))
            for batch in file.iter_batches(batch_size=1024, columns=[field]):
                for row in batch.to_pylist():
                    yield _value(row, field, str(path))
    except (needs("pyarrow", str(path)).ArrowInvalid, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the system's; else Arrow's
            raise
        raise ValueError(f"{path} is not a parquet file, or is damaged: {error}") from error


def _jsonl(path: Path, field: str) -> Iterator[str]:
    with open_text(path) as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{path} must hold a JSON object a line, but line {number} is not: {error}"
                ) from error
            # JSON can write half a surrogate pair, which no tokenizer takes.
            yield _value(row, field, f"{path}, line {number}").encode(errors="replace").decode()


def _text(path: Path, field: str) -> Iterator[str]:
    with open_text(path) as lines:
        yield from documents(lines)


def _value(row: Any, field: str, where: str) -> str:
    if not isinstance(row, dict):
        raise ValueError(
            f"text_field must be a field of {where}, which has no object but "
            f"{type(row).__name__}; got {field!r}"
        )
    if field not in row:
        fields = ", ".join(map(str, row))
        raise ValueError(
            f"text_field must be a field of {where}, which has {fields}; got {field!r}"
        )
    value = row[field]
    if not isinstance(value, str | None):
        raise ValueError(
            f"text_field must hold text, but {field!r} of {where} holds {type(value).__name__}"
        )
    return value or ""
