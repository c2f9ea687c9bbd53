"""Text files: which there are, plain or compressed, and the documents in them."""

import contextlib
import gzip
import importlib
import io
import lzma
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

END_OF_TEXT = "<|endoftext|>"
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}


def standard_library() -> list[Path]:
    """The sources of Python's standard library, without its tests: the default corpus."""
    root = Path(sysconfig.get_paths()["stdlib"])
    sources = root.rglob("*.py")
    return sorted(p for p in sources if not SKIPPED_FOLDERS & set(p.relative_to(root).parts))


def find_files(paths: list[Path]) -> list[Path]:
    """The files of ``paths`` and, but for hidden ones, of the folders among them.

    Raises FileNotFoundError or ValueError for none."""
    files: list[Path] = []
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"data path {path} does not exist")
        if not path.is_dir():
            files.append(path)
            continue
        found = (p for p in path.rglob("*") if p.is_file())
        files += sorted(p for p in found if not _is_hidden(p.relative_to(path)))
    if not files:
        raise ValueError(f"data must hold at least one file, got {', '.join(map(str, paths))}")
    return files


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


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
def open_text(path: Path) -> Iterator[TextIO]:
    """A UTF-8 file, plain or compressed (.gz, .xz, .zst).

    Raises ValueError naming the file if it is not text."""
    try:
        if path.suffix == ".zst":  # Arrow's reader: it notices a file that was cut short
            stream = needs("pyarrow", str(path)).input_stream(path, compression="zstd")
            with io.TextIOWrapper(stream, encoding="utf-8") as file:
                yield file
        else:
            opener: Any = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
            with opener(path, "rt", encoding="utf-8") as file:
                yield file
    except (UnicodeDecodeError, EOFError, lzma.LZMAError, zlib.error, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the system's, which names the file; the others are a decompressor's
        raise ValueError(f"{path} is not a UTF-8 text file: {error}") from error


def read_text(path: Path) -> str:
    """The text of a file; raises as :func:`open_text` does."""
    with open_text(path) as file:
        return file.read()


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
