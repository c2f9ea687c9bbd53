"""What the compiled library is of: a digest of csrc/.

setup.py, which cannot import the package, runs this file."""

import hashlib
from pathlib import Path

SUFFIXES = {".h", ".cpp", ".cu", ".cuh"}


def digest(csrc: Path) -> str:
    """Of the names and contents of all sources in the folder; 16 hexadecimal digits."""
    found = hashlib.sha256()
    for path in sorted(x for x in csrc.rglob("*") if x.suffix in SUFFIXES):
        found.update(path.relative_to(csrc).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()[:16]
