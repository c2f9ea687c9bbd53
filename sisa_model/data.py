"""Text or shards in, blocks of tokens out: corpora, tokenizers, the held-out split, the order of training."""

import contextlib
import gzip
import hashlib
import importlib
import io
import lzma
import math
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from .shards import INDEX, TOKENIZER, Shards, Tokens, file_sha256, read_index
from .shuffle import shuffled

END_OF_TEXT = "<|endoftext|>"
HELD_OUT_PERCENT = 5
MIN_UNITS = 20  # fewer files (or documents) than this cannot be split with 5 % held out
SAMPLE_TOKENS = 2**22  # of shards, the first tokens that n-gram models are counted on and needles are hidden in
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}


def standard_library() -> list[Path]:
    """The sources of Python's standard library (code and documentation strings, no tests): the default corpus."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return sorted(p for p in root.rglob("*.py") if not SKIPPED_FOLDERS & set(p.relative_to(root).parts))


def find_files(paths: list[Path]) -> list[Path]:
    """The files of ``paths`` and, but for hidden ones, of the folders among them; FileNotFoundError or ValueError for none."""
    files: list[Path] = []
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"data path {path} does not exist")
        if path.is_dir():
            found = (p for p in path.rglob("*") if not any(part.startswith(".") for part in p.relative_to(path).parts))
            files += sorted(p for p in found if p.is_file())
        else:
            files.append(path)
    if not files:
        raise ValueError(f"data must hold at least one file, got {', '.join(map(str, paths))}")
    return files


def needs(module: str, what: str) -> Any:
    """An optional module; ValueError saying how to install it, and that ``what`` needs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f'{what} needs the package {module.split(".")[0]}: pip install "sisa[train]" ({error})') from error


@contextlib.contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
    """A UTF-8 file, plain or compressed (.gz, .xz, .zst); ValueError naming the file if it is not text."""
    try:
        if path.suffix == ".zst":  # Arrow's reader: it notices a file that was cut short
            with io.TextIOWrapper(needs("pyarrow", str(path)).input_stream(path, compression="zstd"), encoding="utf-8") as file:
                yield file
        else:
            opener: Any = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
            with opener(path, "rt", encoding="utf-8") as file:
                yield file
    except (UnicodeDecodeError, EOFError, lzma.LZMAError, zlib.error, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the system's, with the file's name; else the decompressor's
            raise
        raise ValueError(f"{path} is not a UTF-8 text file: {error}") from error


def read_text(path: Path) -> str:
    """The text of a file; raises as :func:`open_text` does."""
    with open_text(path) as file:
        return file.read()


def documents(lines: TextIO) -> Iterator[str]:
    """The documents of a text, separated by lines that end with ``<|endoftext|>``; empty ones are dropped."""
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


class Encoder:
    """Text to token ids and back: a ``tokenizers`` JSON file, or bytes with token 256 as the end of text.

    What reads ``<|endoftext|>`` inside a document is encoded as the text it is, so that the token stands at the ends of documents
    alone. Raises FileNotFoundError or ValueError for a file that is no tokenizer or has no special token ``<|endoftext|>``.
    """

    def __init__(self, path: Path | None):
        self.tokenizer: Tokenizer | None = None
        self.size, self.end_of_text = 257, 256
        if path is None:
            return
        if not path.is_file():
            raise FileNotFoundError(f"tokenizer {path} does not exist")
        try:
            self.tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exception
            raise ValueError(f"tokenizer {path} is not a tokenizers JSON file: {error}") from error
        end = self.tokenizer.token_to_id(END_OF_TEXT)
        if end is None:
            raise ValueError(f"tokenizer {path} must have a token {END_OF_TEXT}")
        # What a published file sets for inference would cut documents and fill them up.
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.tokenizer.encode_special_tokens = True
        if end in self.tokenizer.encode(END_OF_TEXT, add_special_tokens=False).ids:
            raise ValueError(f"tokenizer {path} must mark its token {END_OF_TEXT} as special")
        self.size, self.end_of_text = max(self.tokenizer.get_vocab().values()) + 1, end

    def encode(self, texts: list[str]) -> np.ndarray:
        """Token ids of the texts in a row, an end-of-text token after each, as int32."""
        if self.tokenizer is None:
            encoded = [np.frombuffer(text.encode(), np.uint8) for text in texts]
        else:
            encoded = [np.asarray(e.ids) for e in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        end = np.array([self.end_of_text])
        return np.concatenate([x.astype(np.int32) for ids in encoded for x in (ids, end)]) if encoded else np.empty(0, np.int32)

    def decode(self, ids: list[int]) -> str:
        """Text of token ids; bytes that are no UTF-8 become the replacement character, ids past the vocabulary nothing."""
        if self.tokenizer is not None:
            return self.tokenizer.decode(ids, skip_special_tokens=False)
        parts = (END_OF_TEXT.encode() if i == self.end_of_text else bytes([i]) for i in ids if i < self.size)
        return b"".join(parts).decode(errors="replace")


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


def load_corpus(data: list[Path], val_data: list[Path], encoder: Encoder) -> Corpus:
    """Read, split and encode a corpus; no ``data`` means the Python standard library.

    Held out are ``val_data``, or else 5 % of the distinct files (of few files, documents), the first by the hash of their text;
    no document of theirs stays in training. Fewer than 20 documents are cut at 95 %. Raises ValueError for an empty corpus.
    """
    files = find_files(data) if data else standard_library()
    texts = [text for text in map(read_text, files) if text.strip()]
    if not texts:
        where = ", ".join(map(str, data)) or "the standard library"
        raise ValueError(f"data holds no text in {len(files)} files: {where}")
    if val_data:
        held_out = [d for path in find_files(val_data) for d in documents(io.StringIO(read_text(path)))]
        return _without(held_out, texts, encoder, "held-out files as given")
    units, name = texts, "files"
    if len(units) < MIN_UNITS:
        units, name = [d for text in texts for d in documents(io.StringIO(text))], "documents"
    if len(units) < MIN_UNITS:
        tokens = encoder.encode(units)
        cut = len(tokens) * (100 - HELD_OUT_PERCENT) // 100
        return Corpus(tokens[:cut], tokens[cut:], f"the last {HELD_OUT_PERCENT} % of {len(units)} {name} held out")
    distinct = sorted({unit.strip() for unit in units}, key=lambda unit: hashlib.sha256(unit.encode()).digest())
    chosen = set(distinct[: math.ceil(len(distinct) * HELD_OUT_PERCENT / 100)])
    held_out = [d for unit in distinct if unit in chosen for d in documents(io.StringIO(unit))]
    rest = [unit for unit in units if unit.strip() not in chosen]
    return _without(held_out, rest, encoder, f"{len(chosen)} of {len(distinct)} distinct {name} held out, the first by hash")


def _without(held_out: list[str], texts: list[str], encoder: Encoder, split: str) -> Corpus:
    """The corpus that trains on the documents of ``texts``, less those held out."""
    known = set(held_out)
    train = [d for text in texts for d in documents(io.StringIO(text)) if d not in known]
    return Corpus(encoder.encode(train), encoder.encode(held_out), split)


class Blocks:
    """Blocks of ``seq_len`` tokens and their successors, shuffled anew each epoch; the order is a function of the seed alone.

    A block spans documents joined by their end-of-text tokens. There is no state of a loader to save: sample n of a run is
    arithmetic on (seed, n), whoever asks and whatever was read before, so a run resumes on the exact sample from its step alone.
    Raises ValueError if ``tokens`` is shorter than one block.
    """

    def __init__(self, tokens: np.ndarray | Tokens, seq_len: int, seed: int, name: str):
        self.count = (len(tokens) - 1) // seq_len
        if self.count < 1:
            raise ValueError(f"the {name} corpus must hold at least one block of {seq_len + 1} tokens, got {len(tokens)}")
        self.tokens, self.seq_len, self.seed = tokens, seq_len, seed

    def ids(self, first: int, count: int) -> list[int]:
        """Which blocks are the samples ``first`` to ``first + count`` of the run."""
        found: list[int] = []
        while len(found) < count:
            epoch, place = divmod(first + len(found), self.count)
            places = np.arange(place, min(place + count - len(found), self.count))
            found += shuffled(places, self.count, [self.seed, epoch]).tolist()
        return found

    def take(self, ids: list[int]) -> tuple[Tensor, Tensor]:
        """Inputs and targets of blocks, each [len(ids), seq_len] int64.

        Raises FileNotFoundError or ValueError, naming the shard, for one that vanished or was cut since it was opened.
        """
        starts = (i * self.seq_len for i in ids)
        windows = torch.from_numpy(np.stack([self.tokens[start : start + self.seq_len + 1] for start in starts]).astype(np.int64))
        return windows[:, :-1], windows[:, 1:]


def pack(inputs: Tensor, targets: Tensor, end_of_text: int) -> tuple[Tensor, Tensor, Tensor]:
    """Blocks [n, L] as one sequence of documents: inputs and targets, each [1, n * L] int64, and cu_seqlens int32.

    The end-of-text token of a document opens the next one, as it opens a text that is generated: the first token of a document
    is predicted from it alone, the last predicts the next. Blocks are cut apart too.
    """
    opens = inputs == end_of_text
    opens[:, 0] = True
    bounds = [opens.flatten().nonzero()[:, 0], torch.tensor([opens.numel()], device=inputs.device)]
    return inputs.reshape(1, -1), targets.reshape(1, -1), torch.cat(bounds).int()


def ngram_losses(train: np.ndarray, targets: np.ndarray, contexts: np.ndarray, vocab: int) -> tuple[float, float]:
    """Held-out loss in nats a token of a unigram and a bigram model counted on ``train`` (int32 [N]).

    The unigram is add-one smoothed; the bigram backs off to it with the weight of ten observations a context.
    """
    unigram = (np.bincount(train, minlength=vocab) + 1.0) / (len(train) + vocab)
    pairs, pair_counts = np.unique(train[:-1].astype(np.int64) * vocab + train[1:], return_counts=True)
    wanted = contexts.astype(np.int64) * vocab + targets
    place = np.searchsorted(pairs, wanted).clip(max=len(pairs) - 1)
    seen = np.where(pairs[place] == wanted, pair_counts[place], 0)
    context_counts = np.bincount(train[:-1], minlength=vocab)[contexts]
    bigram = (seen + 10 * unigram[targets]) / (context_counts + 10)
    return float(-np.log(unigram[targets]).mean()), float(-np.log(bigram).mean())


@dataclass
class Data:
    """What a run reads, from text or from shards."""

    encoder: Encoder
    train: Blocks
    val: Blocks
    train_text: np.ndarray
    """Training tokens to count n-grams on and to hide needles in, int32: of text all, of shards the first 4 million."""
    val_text: np.ndarray
    """The same of the held-out tokens."""
    fingerprint: str
    """A hash of the tokens and of how they are split; of shards, of their checksums."""
    split: str
    """How much there is and how it was split, in words."""


def prepared(data: tuple[Path, ...]) -> Path | None:
    """The folder of `sisa prepare` that ``data`` is, if it is one; ValueError for one among other data."""
    folders = [path for path in data if (path / INDEX).is_file()]
    if folders and len(data) > 1:
        raise ValueError(f"data must be one folder of sisa prepare alone, or text; got {', '.join(map(str, data))}")
    return folders[0] if folders else None


def find_tokenizer(data: tuple[Path, ...], tokenizer: Path | None) -> Path | None:
    """The tokenizer's file: ``tokenizer``, else the one that a prepared folder brings, else None for bytes.

    Raises ValueError for another one than a folder was prepared with, FileNotFoundError for one that is missing.
    """
    folder = prepared(data)
    if folder is None:
        return tokenizer
    known = read_index(folder)["options"]["tokenizer"]
    path = folder / TOKENIZER if tokenizer is None and known["sha256"] is not None else tokenizer
    if path is not None and not path.is_file():
        raise FileNotFoundError(f"tokenizer {path} does not exist")
    if known["sha256"] != (None if path is None else file_sha256(path)):
        raise ValueError(f"tokenizer must be the one that {folder} was prepared with ({known['name']}), got another in {path}")
    return path


def open_data(
    data: tuple[Path, ...], val_data: tuple[Path, ...], tokenizer: Path | None, seq_len: int, seed: int,
    *, verify: bool = True, rank: int = 0, size: int = 1,
) -> Data:  # fmt: skip
    """Open text files, the default corpus (no ``data``) or one folder of `sisa prepare`.

    ``verify`` reads a folder through once and compares the checksums of its shards, process ``rank`` of ``size`` its share of
    them. Raises FileNotFoundError or ValueError naming the file, the shard or the argument at fault.
    """
    encoder, folder = Encoder(find_tokenizer(data, tokenizer)), prepared(data)
    if folder is None:
        corpus = load_corpus([*data], [*val_data], encoder)
        train, val = Blocks(corpus.train, seq_len, seed, "training"), Blocks(corpus.val, seq_len, 0, "held-out")
        split = f"{len(corpus.train):,} training and {len(corpus.val):,} held-out tokens ({corpus.split})"
        return Data(encoder, train, val, corpus.train, corpus.val, corpus.fingerprint(), split)
    if val_data:
        raise ValueError(f"val_data must be left out: {folder} brings the documents that sisa prepare held out")
    shards = Shards(folder)
    if verify:
        shards.verify(rank, size)
    train, val = Blocks(shards.train, seq_len, seed, "training"), Blocks(shards.val, seq_len, 0, "held-out")
    sample, val_sample = (tokens[:SAMPLE_TOKENS].astype(np.int32) for tokens in (shards.train, shards.val))
    split = (
        f"{len(shards.train):,} training and {len(shards.val):,} held-out tokens of {shards.tokenizer} ({shards.split}; n-gram "
        f"models and retrieval tasks use the first {len(sample):,} and {len(val_sample):,})"
    )
    return Data(encoder, train, val, sample, val_sample, shards.fingerprint(), split)
