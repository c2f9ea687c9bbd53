"""Documents of local files and of the Hub's datasets, in one order, from any place in it."""

import contextlib
import hashlib
import itertools
import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from sisa_model.data.text import (
    documents,
    find_files,
    needs,
    open_binary,
    open_text,
    read_text,
)

log = logging.getLogger(__name__)

Format = Literal["auto", "text", "jsonl", "parquet"]
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w.-]+)?")
COMPRESSED = {".gz", ".xz", ".zst"}
TEXT = """
    txt text raw tokens md markdown rst tex adoc org html htm xml
    c h cc cpp cxx hpp cu cuh cs css d go hs java jl js jsx kt lisp lua m ml nim php pl py pyi r rb
    rs scala sh sql swift toml ts tsx v vim yaml yml zig
"""
KINDS: dict[str, Format] = {
    "": "text",
    **{f".{suffix}": "text" for suffix in TEXT.split()},
    **dict.fromkeys((".jsonl", ".jsonlines", ".ndjson", ".json"), "jsonl"),
    ".parquet": "parquet",
}


class Position(NamedTuple):
    """A place between two documents."""

    source: int
    """The number of a source."""
    documents: int
    """How many of its documents come before."""
    digest: str = ""
    """Of those documents, sha256; "" where nobody knows, or before the first."""


START = Position(0, 0)


@dataclass(frozen=True)
class Source:
    """A file or a dataset of the Hub.

    By ``version``, a file's size in bytes or a dataset's commit, a changed one is known."""

    name: str
    kind: str
    version: str


class Faults:
    """What is no document: raised as it is, or with ``skip`` passed over and counted."""

    def __init__(self, skip: bool = False):
        self.skip = skip
        self.count = 0

    def __call__(self, error: Exception) -> None:
        """``error`` names the line or file."""
        if not self.skip:
            raise error
        self.count += 1
        if self.count <= 3:
            log.warning(f"passed over: {error}")

    def report(self) -> None:
        """A line in the log if there were any."""
        if self.count:
            log.warning(f"passed over in all: {self.count:,} lines or files")

    @contextlib.contextmanager
    def caught(self) -> Iterator[None]:
        """What is raised inside of a file that is no text or may not be read."""
        try:
            yield
        except (ValueError, PermissionError) as error:
            self(error)


@dataclass(frozen=True)
class Reading:
    """How files are read."""

    field: str = "text"
    """Of a parquet or jsonl row, the one that holds its text."""
    format: Format = "auto"
    """What every file is read as; auto: as its name says."""
    skip_bad: bool = False
    """Pass over lines and files that are no text, and count them."""


AS_NAMED = Reading()


def find_sources(names: tuple[str, ...], format: Format = "auto") -> list[Source]:
    """The files of paths and folders, and the Hub's datasets, in ``names``.

    Datasets are OWNER/NAME or OWNER/NAME@REVISION. A file's kind is told by its name, whatever the
    case, unless ``format`` says it. Raises FileNotFoundError for a name that is neither, and
    ValueError for files of a kind that is not known or of several kinds in a folder."""
    if not names:
        raise ValueError(
            "sources must be at least one file, folder or dataset of the Hub, got none"
        )
    sources: list[Source] = []
    for name in names:
        if Path(name).exists():
            sources += _local_sources(name, format)
        elif HUB_NAME.fullmatch(name):
            sources.append(_hub_source(name))
        else:
            raise FileNotFoundError(
                f"source {name} is neither a file or folder here nor a dataset's name on the Hub "
                "(OWNER/NAME)"
            )
    return sources


def _local_sources(name: str, format: Format) -> list[Source]:
    files = find_files([Path(name)])
    kinds = {path: file_kind(path, format) for path in files}
    first = {kind: path for path, kind in reversed(kinds.items())}
    if len(first) > 1:
        found = ", ".join(f"{kind} ({path.name})" for kind, path in sorted(first.items()))
        raise ValueError(
            f"source {name} must hold files of one kind, got {found}; name the files themselves"
        )
    if Path(name).is_dir():
        log.info(f"taken from {name}: {endings(files)}")
    return [Source(str(path.absolute()), kinds[path], str(path.stat().st_size)) for path in files]


def endings(files: list[Path]) -> str:
    """How many files there are of each ending, in words."""
    found = Counter("".join(_suffixes(path)) or "without an ending" for path in files)
    return ", ".join(f"{count:,} {ending}" for ending, count in found.most_common())


def _suffixes(path: Path) -> tuple[str, str]:
    """The ending that tells a file's kind, in lower case, and that of its compression, or ""."""
    outer = path.suffix.lower()
    return (path.with_suffix("").suffix.lower(), outer) if outer in COMPRESSED else (outer, "")


def file_kind(path: Path, format: Format = "auto") -> Format:
    """What a file is read as: ``format``, or by its name text, jsonl or parquet.

    Raises ValueError for a name that tells none of them."""
    if format != "auto":
        return format
    ending = _suffixes(path)[0]
    if ending not in KINDS:
        kinds = ", ".join(get_args(Format)[1:])
        raise ValueError(
            f"{path} must be text, .jsonl or .parquet (or these as .gz, .xz or .zst), got "
            f"{ending}: convert it, or say with format what it is read as ({kinds})"
        )
    return KINDS[ending]


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
    sources: list[Source],
    start: Position,
    field: str,
    subset: str | None = None,
    split: str = "train",
    faults: Faults | None = None,
) -> Iterator[tuple[Position, str]]:
    """The documents from ``start`` on, each with the position after it; blank ones are passed over.

    ``field`` holds the text of a parquet, jsonl or Hub row; ``subset`` and ``split`` choose among a
    Hub dataset's. ``faults`` hears of what is none. Raises ValueError, naming the source, for one
    that is damaged, is not of its kind, has no such field (with those it has) or does not begin
    with the documents before ``start``."""
    faults = faults or Faults()
    for number, source in enumerate(sources[start.source :], start.source):
        before = start if number == start.source else Position(number, 0)
        if source.kind == "hub":
            texts = _hub(source, field, subset, split, before.documents)
        else:
            texts = read_file(Path(source.name), source.kind, field, faults)
        yield from _positions(source, texts, before)


def _positions(
    source: Source, texts: Iterator[str], before: Position
) -> Iterator[tuple[Position, str]]:
    """The documents after ``before`` with their positions; its own are read and compared first."""
    if source.kind == "hub":  # whose version is a commit; it skipped rows without reading them
        for count, text in enumerate(texts, before.documents + 1):
            if text.strip():
                yield Position(before.source, count), text
        return
    digest = hashlib.sha256()
    for text in itertools.islice(texts, before.documents):
        digest.update(text.encode())
    if before.digest not in ("", digest.hexdigest()):
        raise ValueError(
            f"source {source.name} must begin with the {before.documents:,} documents that are "
            "in finished shards, but was changed among them; choose another folder"
        )
    for count, text in enumerate(texts, before.documents + 1):
        digest.update(text.encode())
        if text.strip():
            yield Position(before.source, count, digest.hexdigest()), text


def read_file(path: Path, kind: str, field: str, faults: Faults) -> Iterator[str]:
    """The documents of a file of ``kind``; raises as :func:`read` does."""
    readers: dict[str, Callable[[Path, str, Faults], Iterator[str]]] = {
        "parquet": _parquet,
        "jsonl": _jsonl,
        "text": _text,
    }
    with faults.caught():
        yield from readers[kind](path, field, faults)


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


def _parquet(path: Path, field: str, faults: Faults) -> Iterator[str]:
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


def _jsonl(path: Path, field: str, faults: Faults) -> Iterator[str]:
    with open_binary(path) as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                text = _value(_row(line, number, path), field, f"{path}, line {number}")
            except ValueError as error:
                faults(error)
                continue
            # JSON can write half a surrogate pair, which no tokenizer takes.
            yield text.encode(errors="replace").decode()


def _row(line: bytes, number: int, path: Path) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise ValueError(
            f"{path} must hold a JSON object a line, but line {number} is not: {error}"
        ) from error


def _text(path: Path, field: str, faults: Faults) -> Iterator[str]:
    with open_text(path) as lines:
        for document in documents(lines):
            if "\0" in document:
                raise ValueError(f"{path} is not a text file: it holds NUL characters")
            yield document


def read_units(files: list[Path], reading: Reading) -> tuple[list[str], str]:
    """What of ``files`` may be held out, and its name: "files" of text, "documents" of other kinds.

    Raises as :func:`read` does."""
    faults = Faults(reading.skip_bad)
    kinds = {path: file_kind(path, reading.format) for path in files}
    units: list[str] = []
    name = "files" if set(kinds.values()) == {"text"} else "documents"
    if name == "files":
        for path in files:
            with faults.caught():
                units.append(read_text(path))
    else:
        for path, kind in kinds.items():
            units += read_file(path, kind, reading.field, faults)
    faults.report()
    return [unit for unit in units if unit.strip()], name


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
