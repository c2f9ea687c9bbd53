"""Files and folders that are whole or absent: written aside, then renamed."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an error of the system's that names no file (a full disk's does not) name ``path``."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` make a file beside ``path``, then rename it to ``path``.

    On any failure nothing is left behind."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with naming(path):
            write(aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, paths in it as text, atomically."""
    write_text(path, json.dumps(value, indent=2, default=str) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8, atomically."""
    write_atomically(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def remove_folder(folder: Path) -> None:
    """Remove ``folder``, which is never there in part: it loses its name first."""
    gone = folder.with_name(f".{folder.name}")
    folder.rename(gone)
    shutil.rmtree(gone)


def make_folder_atomically(folder: Path, fill: Callable[[Path], object]) -> None:
    """Let ``fill`` write into a folder beside ``folder``, then rename it.

    On any failure nothing is left behind."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        with naming(folder):
            fill(aside)
        aside.chmod(0o755)  # mkdtemp's folder is private, a checkpoint is not
        os.replace(aside, folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
