"""A folder of `sisa prepare`, read-only: tokens in memory-mapped shards, checked by their records.

index.json      options, tokenizer, dtype and counts; every shard's record, once all are there
tokenizer.json  the tokenizer, as it was given (none for bytes)
shard-00000/
  train.bin     token ids, little-endian, documents in order, an end-of-text token after each and
  val.bin       nowhere else; the second those held out
  shard.json    tokens, documents and sha256 of both, and where in the sources the shard ends
"""

import bisect
import contextlib
import hashlib
import itertools
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

INDEX = "index.json"
TOKENIZER = "tokenizer.json"
RECORD = "shard.json"
VERSION = 1
SPLITS = ("train", "val")


def read_record(path: Path) -> dict[str, Any]:
    """An index or a shard's record.

    Raises ValueError naming the file for one that is damaged or of another version."""
    with _parsing(path):
        record = json.loads(path.read_text(encoding="utf-8"))
        version = record["version"]
    if version != VERSION:
        raise ValueError(
            f"{path} must be of version {VERSION} of the format, got version {version!r}"
        )
    return record


def read_index(folder: Path) -> dict[str, Any]:
    """The index of a folder of `sisa prepare`, finished or not.

    Raises as :func:`read_record` does, and FileNotFoundError without one."""
    if not (folder / INDEX).is_file():
        raise FileNotFoundError(f"{folder} is not a folder of sisa prepare: it has no {INDEX}")
    index = read_record(folder / INDEX)
    with _parsing(folder / INDEX):
        tokenizer = index["options"]["tokenizer"]
        _ = index["complete"], index["dtype"], tokenizer["sha256"], tokenizer["name"]
    return index


@contextlib.contextmanager
def _parsing(path: Path) -> Iterator[None]:
    """ValueError naming ``path`` where what is read of it has another form."""
    try:
        yield
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged or not of sisa prepare: {error!r}") from error


class Tokens:
    """The tokens of one split, shard after shard, as one sequence that is read by slices.

    Every read checks that the shards it touches are still there and whole: reading past the end of
    a mapped file that was cut would kill the process without a word."""

    def __init__(self, files: list[tuple[Path, int]], dtype: np.dtype):
        self.files = [(path, count) for path, count in files if count > 0]
        self.dtype = dtype
        self.ends = list(itertools.accumulate(count for _, count in self.files))
        for path, count in files:
            self._check(path, count)
        self._maps = [np.asarray(np.memmap(path, dtype, "r")) for path, _ in self.files]

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, where: slice) -> np.ndarray:
        start, stop, _ = where.indices(len(self))
        parts = []
        while start < stop:
            number = bisect.bisect_right(self.ends, start)
            path, count = self.files[number]
            self._check(path, count)
            offset = self.ends[number] - count
            parts.append(self._maps[number][start - offset : min(stop - offset, count)])
            start = self.ends[number]
        return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, self.dtype), *parts])

    def _check(self, path: Path, count: int) -> None:
        try:
            size = os.stat(path).st_size
        except FileNotFoundError as error:
            raise FileNotFoundError(f"shard {path} is gone") from error
        expected = count * self.dtype.itemsize
        if size != expected:
            raise ValueError(
                f"shard {path} must be {expected:,} bytes, as its record says, got {size:,}"
            )


class Shards:
    """A finished folder of `sisa prepare`.

    The sizes of its shards are checked, their contents by :meth:`verify`. Raises
    FileNotFoundError or ValueError, naming the file or shard, for what is missing, damaged or
    unfinished."""

    def __init__(self, folder: Path):
        index = read_index(folder)
        if not index["complete"]:
            raise ValueError(
                f"{folder} is not finished; the sisa prepare that began it, run again, "
                "goes on where it stopped"
            )
        files: dict[str, list[tuple[Path, int]]] = {split: [] for split in SPLITS}
        self._sha256: dict[Path, str] = {}
        with _parsing(folder / INDEX):
            options = index["options"]
            self.tokenizer: str = options["tokenizer"]["name"]
            share = f"{options['held_out']:.3g} of the documents"
            dtype = np.dtype(index["dtype"])
            for shard in index["shards"]:
                for split in SPLITS:
                    path = folder / shard["name"] / f"{split}.bin"
                    files[split].append((path, shard[split]["tokens"]))
                    self._sha256[path] = shard[split]["sha256"]
        self.split = f"{share} held out, by the hash of their text"
        self.train, self.val = (Tokens(files[split], dtype) for split in SPLITS)

    def fingerprint(self) -> str:
        """A hash of the checksums.

        Two folders with the same have the same tokens in the same order, split alike."""
        return hashlib.sha256("".join(self._sha256.values()).encode()).hexdigest()

    def verify(self, rank: int = 0, size: int = 1) -> None:
        """Read everything once, or of ``size`` processes each its share.

        Raises ValueError naming the first shard with another sha256."""
        # The training files, which are the large ones, first.
        mine = sorted(self._sha256, key=lambda path: path.name)[rank::size]
        with ThreadPoolExecutor() as pool:  # hashing releases the interpreter's lock
            for path, found in zip(mine, pool.map(file_sha256, mine)):
                if found != self._sha256[path]:
                    raise ValueError(
                        f"shard {path} is damaged: its sha256 is {found}, "
                        f"and {INDEX} says {self._sha256[path]}"
                    )


def file_sha256(path: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for piece in iter(lambda: file.read(2**20), b""):
            digest.update(piece)
    return digest.hexdigest()


def finished_shards(folder: Path, dtype: np.dtype) -> Iterator[dict[str, Any]]:
    """The records of the shards that are there, in order; raises as :class:`Shards` does."""
    for number in itertools.count():
        shard = folder / f"shard-{number:05d}"
        if not shard.is_dir():
            return
        record = read_record(shard / RECORD)
        with _parsing(shard / RECORD):
            files = [(shard / f"{split}.bin", record[split]["tokens"]) for split in SPLITS]
        Tokens(files, dtype)
        yield {"name": shard.name, **record}
