"""What a run reads: text, which is split and encoded here, or the shards of `sisa prepare`.

The way of a text: its files are found and read (text.py), split into what is trained on and what is
held out, encoded document by document (tokenizer.py), and cut into blocks (blocks.py), whose order
is a shuffle (shuffle.py). Of a large one `sisa prepare` (prepare.py) makes shards (shards.py)."""

import hashlib
import io
import logging
import math
from collections.abc import Iterable, Sized
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sisa_model.data.blocks import Blocks
from sisa_model.data.shards import INDEX, TOKENIZER, Shards, file_sha256, read_index
from sisa_model.data.sources import AS_NAMED, Reading, endings, read_units
from sisa_model.data.text import documents, find_files, standard_library
from sisa_model.data.tokenizer import Encoder

log = logging.getLogger(__name__)

HELD_OUT_PERCENT = 5
MIN_UNITS = 20  # fewer files (or documents) than this cannot be split with 5 % held out
# Of shards, the first tokens that n-gram models are counted on and needles are hidden in.
SAMPLE_TOKENS = 2**22


@dataclass
class Corpus:
    """Training and held-out tokens [N] int32, and how the split was made, in words."""

    train: np.ndarray
    val: np.ndarray
    split: str

    def fingerprint(self) -> str:
        """A hash of the tokens and of how they are split."""
        digest = hashlib.sha256(len(self.train).to_bytes(8, "big"))
        for tokens in (self.train, self.val):
            digest.update(tokens.tobytes())
        return digest.hexdigest()


def load_corpus(
    data: list[Path], val_data: list[Path], encoder: Encoder, reading: Reading = AS_NAMED
) -> Corpus:
    """Read, split and encode a corpus; no ``data`` means the Python standard library.

    Held out are ``val_data``, or else 5 % of the distinct files (of few files, and of rows of
    parquet or jsonl, documents), the first by the hash of their text; no document of theirs stays
    in training. Fewer than 20 documents are cut at 95 %. Raises ValueError for an empty corpus, and
    as :func:`sisa_model.data.sources.read` does."""
    files = find_files(data) if data else standard_library()
    if any(path.is_dir() for path in data):
        log.info(f"data: {endings(files)}")
    texts, unit = read_units(files, reading)
    if not texts:
        where = ", ".join(map(str, data)) or "the standard library"
        raise ValueError(f"data holds no text in {len(files)} files: {where}")
    if val_data:
        held_out = _documents(read_units(find_files(val_data), reading)[0])
        return _without(held_out, texts, encoder, "held-out files as given")
    if len(texts) >= MIN_UNITS:
        return _split_by_hash(texts, unit, encoder)
    units = _documents(texts)
    if len(units) >= MIN_UNITS:
        return _split_by_hash(units, "documents", encoder)
    tokens = encoder.encode(units)
    cut = len(tokens) * (100 - HELD_OUT_PERCENT) // 100
    split = f"the last {HELD_OUT_PERCENT} % of {len(units)} documents held out"
    return Corpus(tokens[:cut], tokens[cut:], split)


def _documents(texts: Iterable[str]) -> list[str]:
    return [document for text in texts for document in documents(io.StringIO(text))]


def _split_by_hash(units: list[str], name: str, encoder: Encoder) -> Corpus:
    """Hold out the distinct ``units`` whose hashes come first; a unit's copies are on its side."""
    distinct = {unit.strip() for unit in units}
    ordered = sorted(distinct, key=lambda unit: hashlib.sha256(unit.encode()).digest())
    chosen = ordered[: math.ceil(len(ordered) * HELD_OUT_PERCENT / 100)]
    known = set(chosen)
    rest = [unit for unit in units if unit.strip() not in known]
    split = f"{len(chosen)} of {len(ordered)} distinct {name} held out, the first by hash"
    return _without(_documents(chosen), rest, encoder, split)


def _without(held_out: list[str], texts: list[str], encoder: Encoder, split: str) -> Corpus:
    """The corpus that trains on the documents of ``texts``, less those held out."""
    known = set(held_out)
    train = [document for document in _documents(texts) if document not in known]
    return Corpus(encoder.encode(train), encoder.encode(held_out), split)


@dataclass(frozen=True)
class Data:
    """What a run reads, from text or from shards."""

    train: Blocks
    val: Blocks
    train_text: np.ndarray
    """Training tokens for n-grams and needles' text, int32: of text all, of shards 4 million."""
    val_text: np.ndarray
    """The same of the held-out tokens."""
    fingerprint: str
    """A hash of the tokens and of how they are split; of shards, of their checksums."""
    split: str
    """How much there is and how it was split, in words."""


def prepared(data: tuple[Path, ...]) -> Path | None:
    """The folder of `sisa prepare` that ``data`` is, if it is one.

    Raises ValueError for one among other data."""
    folders = [path for path in data if (path / INDEX).is_file()]
    if folders and len(data) > 1:
        given = ", ".join(map(str, data))
        raise ValueError(f"data must be one folder of sisa prepare alone, or text; got {given}")
    return folders[0] if folders else None


def find_tokenizer(data: tuple[Path, ...], tokenizer: Path | None) -> Path | None:
    """The tokenizer's file: ``tokenizer``, else a prepared folder's; None for bytes.

    Raises ValueError for another one than a folder was prepared with, FileNotFoundError for one
    that is missing."""
    folder = prepared(data)
    if folder is None:
        return tokenizer
    known = read_index(folder)["options"]["tokenizer"]
    path = folder / TOKENIZER if tokenizer is None and known["sha256"] is not None else tokenizer
    if path is not None and not path.is_file():
        raise FileNotFoundError(f"tokenizer {path} does not exist")
    if known["sha256"] != (None if path is None else file_sha256(path)):
        raise ValueError(
            f"tokenizer must be the one that {folder} was prepared with ({known['name']}), "
            f"got another in {path}"
        )
    return path


def open_data(
    data: tuple[Path, ...],
    val_data: tuple[Path, ...],
    encoder: Encoder,
    seq_len: int,
    seed: int,
    *,
    reading: Reading = AS_NAMED,
    verify: bool = True,
    rank: int = 0,
    size: int = 1,
) -> Data:
    """Open text files, the default corpus (no ``data``) or one folder of `sisa prepare`.

    ``encoder`` is of the file that :func:`find_tokenizer` found. ``verify`` reads a folder through
    once and compares the checksums of its shards, process ``rank`` of ``size`` its share of them.
    Raises FileNotFoundError or ValueError naming the file, the shard or the argument at fault."""
    folder = prepared(data)
    if folder is None:
        return _of_text(load_corpus([*data], [*val_data], encoder, reading), seq_len, seed)
    if val_data:
        raise ValueError(
            f"val_data must be left out: {folder} brings the documents that sisa prepare held out"
        )
    if reading != AS_NAMED:
        raise ValueError(
            f"text_field, format and skip_bad must be left out: sisa prepare has read what {folder}"
            " holds"
        )
    shards = Shards(folder)
    if verify:
        shards.verify(rank, size)
    return _of_shards(shards, seq_len, seed)


def _of_text(corpus: Corpus, seq_len: int, seed: int) -> Data:
    return Data(
        train=Blocks(corpus.train, seq_len, seed, "training"),
        val=Blocks(corpus.val, seq_len, 0, "held-out"),
        train_text=corpus.train,
        val_text=corpus.val,
        fingerprint=corpus.fingerprint(),
        split=f"{_amounts(corpus.train, corpus.val)} ({corpus.split})",
    )


def _of_shards(shards: Shards, seq_len: int, seed: int) -> Data:
    train_text, val_text = (
        tokens[:SAMPLE_TOKENS].astype(np.int32) for tokens in (shards.train, shards.val)
    )
    amounts = f"{_amounts(shards.train, shards.val)} of {shards.tokenizer}"
    used = (
        f"n-gram models and retrieval tasks use the first {len(train_text):,} and {len(val_text):,}"
    )
    return Data(
        train=Blocks(shards.train, seq_len, seed, "training"),
        val=Blocks(shards.val, seq_len, 0, "held-out"),
        train_text=train_text,
        val_text=val_text,
        fingerprint=shards.fingerprint(),
        split=f"{amounts} ({shards.split}; {used})",
    )


def _amounts(train: Sized, val: Sized) -> str:
    return f"{len(train):,} training and {len(val):,} held-out tokens"
