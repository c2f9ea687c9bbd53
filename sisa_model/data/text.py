"""Text files: which there are, plain or compressed, and the documents in them."""

import contextlib
import gzip
import importlib
import io
import logging
import lzma
import os
import re
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, TextIO

log = logging.getLogger(__name__)

END_OF_TEXT = "<|endoftext|>"
# What stands beside data to describe it, in any spelling: README.md, LICENSE, dataset_card.md ...
DESCRIPTION = re.compile(
    r"(readme|licen[cs]e|copying|notice|authors|citation|change(s|log)|contributing|"
    r"data(set)?[_-]?card)(\b|_).*",
    re.IGNORECASE,
)
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}


def standard_library() -> list[Path]:
    """The sources of Python's standard library, without its tests: the default corpus."""
    root = Path(sysconfig.get_paths()["stdlib"])
    sources = root.rglob("*.py")
    return sorted(p for p in sources if not SKIPPED_FOLDERS & set(p.relative_to(root).parts))


def find_files(paths: list[Path]) -> list[Path]:
    """The files of ``paths`` and of the folders among them, in their order.

    Links are followed, a folder is read once however many lead to it. Of a folder, hidden files are
    left out, and with a line in the log those that describe it (README, LICENSE ...), which can be
    named themselves. Raises FileNotFoundError or ValueError for none."""
    files: list[Path] = []
    described: list[Path] = []
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"data path {path} does not exist")
        if not path.is_dir():
            files.append(path)
            continue
        found = _walk(path)
        described += [file for file in found if DESCRIPTION.fullmatch(file.name)]
        files += [file for file in found if not DESCRIPTION.fullmatch(file.name)]
    left_out = ", ".join(map(str, described))
    if not files:
        where = ", ".join(map(str, paths))
        beside = f" but {left_out}, which describe it" if described else ""
        raise ValueError(f"data must hold at least one file, got {where} with none{beside}")
    if described:
        log.info(f"left out, as they describe the data (name them to take them): {left_out}")
    return files


def _walk(root: Path) -> list[Path]:
    """The files under a folder that are not hidden, sorted, none by two ways through links."""
    files: list[Path] = []
    seen: set[Path] = set()
    for folder, inner, names in os.walk(root, followlinks=True):
        if Path(folder).resolve() in seen:
            inner.clear()
            continue
        seen.add(Path(folder).resolve())
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        paths = (Path(folder, name) for name in names if not name.startswith("."))
        files += [path for path in paths if path.is_file()]
    return sorted(files)


def needs(module: str, what: str) -> Any:
    """An optional module; ValueError saying how to install it, and that ``what`` needs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        raise ValueError(
            f'{what} needs the package {package}: pip install "sisa-attention[train]" ({error})'
        ) from error


@contextlib.contextmanager
def open_binary(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a file, plain or compressed (.gz, .xz, .zst, in any case).

    Raises ValueError naming the file if its compression is damaged."""
    suffix = path.suffix.lower()
    try:
        if suffix == ".zst":  # Arrow's reader: it notices a file that was cut short
            with needs("pyarrow", str(path)).input_stream(path, compression="zstd") as file:
                yield io.BufferedReader(file)
        else:
            opener: Any = {".gz": gzip.open, ".xz": lzma.open}.get(suffix, open)
            with opener(path, "rb") as file:
                yield file
    except (EOFError, lzma.LZMAError, zlib.error, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the system's, which names the file; the others are a decompressor's
        raise ValueError(f"{path} is damaged or not compressed as it is named: {error}") from error


@contextlib.contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
    """A UTF-8 file, as :func:`open_binary` has it, without its byte order mark.

    Raises ValueError naming the file if it is not text."""
    try:
        with open_binary(path) as stream, io.TextIOWrapper(stream, encoding="utf-8-sig") as file:
            yield file
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a UTF-8 text file: {error}") from error


def read_text(path: Path) -> str:
    """The text of a file; raises as :func:`open_text` does, and ValueError for NUL characters."""
    with open_text(path) as file:
        text = file.read()
    if "\0" in text:
        raise ValueError(f"{path} is not a text file: it holds NUL characters")
    return text


def documents(lines: TextIO) -> Iterator[str]:
    """The documents of a text, separated by lines that end with ``<|endoftext|>``.

    Empty ones are dropped."""
    held: list[str] = []
    for line in lines:
        held.append(line)
        if line.endswith(f"{END_OF_TEXT}\n"):
            yield from _document(held)
            held = []
    yield from _document(held)


def _document(lines: list[str]) -> Iterator[str]:
    document = "".join(lines).removesuffix("\n").removesuffix(END_OF_TEXT).strip("\n")
    if document:
        yield document
