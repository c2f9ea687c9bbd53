"""A folder of `sisa prepare`: tokens in memory-mapped shards, read-only, with what the index says
of them checked.

index.json            options, tokenizer, dtype and counts; every shard's record, once all are there
tokenizer.json        the tokenizer, as it was given (none for bytes) shard-00000/
train.bin, val.bin: token ids, little-endian, documents in order, an end-of-text token after each
and
                      nowhere else; shard.json: tokens, documents and sha256 of each file, and where
                      in the sources it ends
"""

import bisect
import hashlib
import itertools
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

INDEX, TOKENIZER, RECORD = "index.json", "tokenizer.json", "shard.json"
VERSION = 1
SPLITS = ("train", "val")


def read_record(path: Path) -> dict[str, Any]:
    """An index or a shard's record; ValueError naming the file for one that is damaged or of
    another version.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        version = record["version"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged or not of sisa prepare: {error!r}") from error
    if version != VERSION:
        raise ValueError(
            f"{path} must be of version {VERSION} of the format, got version {version!r}"
        )
    return record


def read_index(folder: Path) -> dict[str, Any]:
    """The index of a folder of `sisa prepare`, finished or not; raises as :func:`read_record`,
    FileNotFoundError without one.
    """
    if not (folder / INDEX).is_file():
        raise FileNotFoundError(f"{folder} is not a folder of sisa prepare: it has no {INDEX}")
    index = read_record(folder / INDEX)
    try:
        _ = (
            index["complete"],
            index["dtype"],
            index["options"]["tokenizer"]["sha256"],
            index["options"]["tokenizer"]["name"],
        )
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{folder / INDEX} is damaged or not of sisa prepare: {error!r}"
        ) from error
    return index


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
        if size != count * self.dtype.itemsize:
            raise ValueError(
                f"shard {path} must be {count * self.dtype.itemsize:,} bytes, as its record says, got {size:,}"
            )


class Shards:
    """A finished folder of `sisa prepare`; the sizes of its shards are checked, their contents by
    :meth:`verify`.

    Raises FileNotFoundError or ValueError, naming the file or shard, for what is missing, damaged
    or unfinished."""

    def __init__(self, folder: Path):
        index = read_index(folder)
        if not index["complete"]:
            raise ValueError(
                f"{folder} is not finished; the sisa prepare that began it, run again, goes on where it stopped"
            )
        try:
            self.tokenizer: str = index["options"]["tokenizer"]["name"]
            self.split = f"{index['options']['held_out']:.3g} of the documents held out, by the hash of their text"
            dtype, shards = (
                np.dtype(index["dtype"]),
                [(folder / shard["name"], shard) for shard in index["shards"]],
            )
            files = {
                split: [(path / f"{split}.bin", shard[split]["tokens"]) for path, shard in shards]
                for split in SPLITS
            }
            self._sha256 = {
                path / f"{split}.bin": shard[split]["sha256"]
                for path, shard in shards
                for split in SPLITS
            }
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{folder / INDEX} is damaged or not of sisa prepare: {error!r}"
            ) from error
        self.train, self.val = (Tokens(files[split], dtype) for split in SPLITS)

    def fingerprint(self) -> str:
        """A hash of the checksums: two folders with the same have the same tokens in the same
        order, split alike.
        """
        return hashlib.sha256("".join(self._sha256.values()).encode()).hexdigest()

    def verify(self, rank: int = 0, size: int = 1) -> None:
        """Read everything once, or of ``size`` processes each its share; ValueError names the first
        shard with another sha256.
        """
        mine = sorted(self._sha256, key=lambda path: path.name)[
            rank::size
        ]  # the training files, which are the large ones, first
        with ThreadPoolExecutor() as pool:  # hashing releases the interpreter's lock
            for path, found in zip(mine, pool.map(file_sha256, mine)):
                if found != self._sha256[path]:
                    raise ValueError(
                        f"shard {path} is damaged: its sha256 is {found}, and {INDEX} says {self._sha256[path]}"
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
        try:
            files = [(shard / f"{split}.bin", record[split]["tokens"]) for split in SPLITS]
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{shard / RECORD} is damaged or not of sisa prepare: {error!r}"
            ) from error
        Tokens(files, dtype)
        yield {"name": shard.name, **record}
