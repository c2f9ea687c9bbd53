"""Text in, blocks of tokens out: corpora, tokenizers, the held-out split, the order of training."""

import gzip
import hashlib
import lzma
import math
import sysconfig
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

END_OF_TEXT = "<|endoftext|>"
HELD_OUT_PERCENT = 5
MIN_UNITS = 20  # fewer files (or documents) than this cannot be split with 5 % held out
OPENERS: dict[str, Callable] = {".gz": gzip.open, ".xz": lzma.open}
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


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, plain or compressed (.gz, .xz); ValueError naming the file if it is not text."""
    try:
        with OPENERS.get(path.suffix, open)(path, "rt", encoding="utf-8") as file:
            return file.read()
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
        raise ValueError(f"{path} is not a UTF-8 text file: {error}") from error


def documents(text: str) -> Iterator[str]:
    """The documents of a text, separated by lines that hold only ``<|endoftext|>``; empty ones are dropped."""
    for document in text.split(f"{END_OF_TEXT}\n"):
        document = document.removesuffix(END_OF_TEXT).strip("\n")
        if document:
            yield document


class Encoder:
    """Text to token ids and back: a ``tokenizers`` JSON file, or bytes with token 256 as the end of text.

    Raises FileNotFoundError or ValueError for a file that is no tokenizer or has no ``<|endoftext|>`` token.
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
        """Text of token ids; bytes that are no UTF-8 become the replacement character."""
        if self.tokenizer is not None:
            return self.tokenizer.decode(ids, skip_special_tokens=False)
        parts = bytes(i for i in ids if i < 256).decode(errors="replace")
        return parts if self.end_of_text not in ids else parts + END_OF_TEXT


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
        held_out = [d for path in find_files(val_data) for d in documents(read_text(path))]
        return _without(held_out, texts, encoder, "held-out files as given")
    units, name = texts, "files"
    if len(units) < MIN_UNITS:
        units, name = [d for text in texts for d in documents(text)], "documents"
    if len(units) < MIN_UNITS:
        tokens = encoder.encode(units)
        cut = len(tokens) * (100 - HELD_OUT_PERCENT) // 100
        return Corpus(tokens[:cut], tokens[cut:], f"the last {HELD_OUT_PERCENT} % of {len(units)} {name} held out")
    distinct = sorted({unit.strip() for unit in units}, key=lambda unit: hashlib.sha256(unit.encode()).digest())
    chosen = set(distinct[: math.ceil(len(distinct) * HELD_OUT_PERCENT / 100)])
    held_out = [d for unit in distinct if unit in chosen for d in documents(unit)]
    rest = [unit for unit in units if unit.strip() not in chosen]
    return _without(held_out, rest, encoder, f"{len(chosen)} of {len(distinct)} distinct {name} held out, the first by hash")


def _without(held_out: list[str], texts: list[str], encoder: Encoder, split: str) -> Corpus:
    """The corpus that trains on the documents of ``texts``, less those held out."""
    known = set(held_out)
    train = [d for text in texts for d in documents(text) if d not in known]
    return Corpus(encoder.encode(train), encoder.encode(held_out), split)


class Blocks:
    """Blocks of ``seq_len`` tokens and their successors, shuffled anew each epoch; the order is a function of the seed alone.

    Raises ValueError if ``tokens`` is shorter than one block.
    """

    def __init__(self, tokens: np.ndarray, seq_len: int, seed: int, name: str):
        self.count = (len(tokens) - 1) // seq_len
        if self.count < 1:
            raise ValueError(f"the {name} corpus must hold at least one block of {seq_len + 1} tokens, got {len(tokens)}")
        self.tokens, self.seq_len, self.seed = tokens, seq_len, seed
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def ids(self, first: int, count: int) -> list[int]:
        """Which blocks are the samples ``first`` to ``first + count`` of the run."""
        found = []
        for sample in range(first, first + count):
            epoch, place = divmod(sample, self.count)
            if epoch != self._epoch:
                self._epoch, self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(self.count)
            found.append(int(self._order[place]))
        return found

    def take(self, ids: list[int]) -> tuple[Tensor, Tensor]:
        """Inputs and targets of blocks, each [len(ids), seq_len] int64."""
        starts = np.asarray(ids, np.int64) * self.seq_len
        windows = torch.from_numpy(self.tokens[starts[:, None] + np.arange(self.seq_len + 1)].astype(np.int64))
        return windows[:, :-1], windows[:, 1:]


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
