"""sisa prepare: documents in, shards of tokens out, the same bytes for any workers and any kill."""

import contextlib
import errno
import functools
import hashlib
import itertools
import logging
import multiprocessing
import os
import shutil
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from sisa_model.data.shards import (
    INDEX,
    RECORD,
    SPLITS,
    TOKENIZER,
    VERSION,
    Shards,
    file_sha256,
    finished_shards,
    read_index,
    read_record,
)
from sisa_model.data.sources import START, Faults, Format, Position, Source, find_sources, read
from sisa_model.data.text import needs
from sisa_model.data.tokenizer import Encoder
from sisa_model.utils.files import make_folder_atomically, write_atomically, write_json
from sisa_model.utils.lock import only_writer
from sisa_model.utils.progress import Progress

log = logging.getLogger(__name__)

BYTES = "bytes"
# Of a run that was killed; what else is hidden stays.
LEFTOVERS = (".shard-?????.*", f".{INDEX}.*.tmp", f".{TOKENIZER}.*.tmp")
BATCH_CHARACTERS = 2**20  # what a worker encodes at once: about half a second's work


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Tokenize text into shards for `sisa train --data OUT`.

    Stopped or killed, the same command goes on where it was. Sources are files or folders of
    parquet, jsonl or text (lines of <|endoftext|> separate documents), plain, .gz, .xz or .zst,
    or datasets of the Hugging Face Hub, which are streamed."""

    sources: tyro.conf.Positional[tuple[str, ...]] = ("DKYoon/SlimPajama-6B",)
    """Files, folders, or the Hub's datasets: OWNER/NAME, or OWNER/NAME@REVISION."""
    out: Path
    """Folder to make."""
    tokenizer: str = "EleutherAI/gpt-neox-20b"
    """A `tokenizers` JSON file, a repository of the Hub that has a tokenizer.json, or "bytes"."""
    text_field: str = "text"
    """Field of a parquet, jsonl or Hub row that holds the text."""
    format: Format = "auto"
    """What the files are read as; auto: as their names say (.jsonl, .parquet, .txt, .py ...)."""
    skip_bad: bool = False
    """Pass over lines and files that are no text, and count them, instead of stopping there."""
    subset: str | None = None
    """Which configuration of the Hub's datasets. Default: their default."""
    split: str = "train"
    """Which split of the Hub's datasets."""
    held_out: float = 0.005
    """Share of the documents held out, by the hash of their text: copies stay together."""
    shard_tokens: int = 2**27
    """Training tokens a shard, at least; what is lost by a kill."""
    workers: int | None = None
    """Processes that encode. Default: one a core. Changes no byte."""


@dataclass
class _Batch:
    """Texts of documents, and the place in the sources after them."""

    texts: list[str]
    end: Position


@dataclass
class _Encoded:
    """A batch's tokens and its number of documents, by split."""

    tokens: dict[str, np.ndarray]
    documents: dict[str, int]
    end: Position


def prepare(config: PrepareConfig) -> Shards:
    """Write (or finish) the shards of ``config.sources`` in ``config.out``, and open them.

    Raises ValueError, FileNotFoundError or FileExistsError, naming the argument or file, for bad
    settings, sources or tokenizer and for a folder that was begun otherwise; OSError for a full
    disk or a killed worker. Shards that are finished stay."""
    workers = _cores() if config.workers is None else config.workers
    _check(config, workers)
    sources = find_sources(config.sources, config.format)
    _check_hub(config, sources)
    tokenizer = _find_tokenizer(config.tokenizer)  # after the sources: it may need the network
    encoder = Encoder(tokenizer)
    dtype = np.dtype("<u2" if encoder.size <= 2**16 else "<u4")
    options = _options(config, sources, tokenizer)
    if _is_finished(config.out, options):
        return _finished(config.out, "is finished already")
    index = {"version": VERSION, "complete": False, "options": options, "dtype": dtype.str}
    config.out.mkdir(parents=True, exist_ok=True)
    with only_writer(config.out):
        _begin(config.out, index, tokenizer)
        shards = _finish(config, sources, (tokenizer, config.held_out, dtype), workers)
        write_json(config.out / INDEX, {**index, "complete": True, "shards": shards})
    return _finished(config.out, "is finished")


def _finish(
    config: PrepareConfig,
    sources: list[Source],
    setup: tuple[Path | None, float, np.dtype],
    workers: int,
) -> list[dict[str, Any]]:
    """Write the shards that are not there yet; the records of all."""
    tokenizer, _, dtype = setup
    end_of_text = Encoder(tokenizer).end_of_text
    shards = list(finished_shards(config.out, dtype))
    start = Position(*shards[-1]["end"]) if shards else START
    faults = Faults(config.skip_bad)
    documents = read(sources, start, config.text_field, config.subset, config.split, faults)
    encoded = _encoded(_batches(documents), workers, setup)
    before = sum(shard[split]["tokens"] for shard in shards for split in SPLITS)
    with contextlib.closing(encoded), Progress("tokens", None, before) as progress:
        for first in encoded:
            batches = itertools.chain([first], encoded)
            shards.append(_add_shard(config, len(shards), batches, end_of_text, progress))
    faults.report()
    _check_totals(config, shards)
    return shards


def _options(
    config: PrepareConfig, sources: list[Source], tokenizer: Path | None
) -> dict[str, Any]:
    """What decides the bytes of the shards, as the index keeps it."""
    sha256 = None if tokenizer is None else file_sha256(tokenizer)
    return {
        "sources": [asdict(source) for source in sources],
        "tokenizer": {"name": config.tokenizer, "sha256": sha256},
        "text_field": config.text_field,
        "subset": config.subset,
        "split": config.split,
        "held_out": config.held_out,
        "shard_tokens": config.shard_tokens,
    }


def _begin(out: Path, index: dict[str, Any], tokenizer: Path | None) -> None:
    """Make the folder's beginning, or what a kill left of it whole again."""
    for leftover in itertools.chain(*map(out.glob, LEFTOVERS)):
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()
    write_json(out / INDEX, index)
    if tokenizer is not None:
        write_atomically(out / TOKENIZER, functools.partial(shutil.copyfile, tokenizer))


def _add_shard(
    config: PrepareConfig,
    number: int,
    batches: Iterator[_Encoded],
    end_of_text: int,
    progress: Progress,
) -> dict[str, Any]:
    """Write the next shard, and return its record."""
    folder = config.out / f"shard-{number:05d}"
    write = functools.partial(
        _write_shard,
        batches=batches,
        end_of_text=end_of_text,
        shard_tokens=config.shard_tokens,
        progress=progress,
    )
    try:
        make_folder_atomically(folder, write)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        stay = (
            f"{error.strerror}; the {number} finished shards stay, "
            "and the same command goes on after them"
        )
        raise OSError(error.errno, stay, str(folder)) from error
    return {"name": folder.name, **read_record(folder / RECORD)}


def _finished(out: Path, how: str) -> Shards:
    shards = Shards(out)
    log.info(f"{out} {how}: {len(shards.train):,} training and {len(shards.val):,} held-out tokens")
    return shards


def _cores() -> int:
    """The cores this process may use, where the system tells; else those there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check(config: PrepareConfig, workers: int) -> None:
    if not 0 < config.held_out < 1:
        raise ValueError(f"held_out must be in (0, 1), got {config.held_out}")
    if config.shard_tokens < 1:
        raise ValueError(f"shard_tokens must be at least 1, got {config.shard_tokens}")
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")


def _check_hub(config: PrepareConfig, sources: list[Source]) -> None:
    """ValueError for an option of the Hub's datasets where there is none."""
    if any(source.kind == "hub" for source in sources):
        return
    for name in ("subset", "split"):
        value = getattr(config, name)
        if value != getattr(PrepareConfig, name):
            raise ValueError(
                f"{name} must be left out, as no source is a dataset of the Hub, got {value!r}"
            )


def _find_tokenizer(name: str) -> Path | None:
    """The file of a tokenizer, from the Hub if it is no file here; None for bytes."""
    if name == BYTES:
        return None
    if Path(name).is_file() or name.endswith(".json"):
        return Path(name)
    hub = needs("huggingface_hub", f"tokenizer {name}")
    try:
        return Path(hub.hf_hub_download(name, "tokenizer.json"))
    except Exception as error:  # the Hub's errors, and of many kinds the network's
        raise FileNotFoundError(
            f"tokenizer {name} is no file here, and the Hub does not give it: {error}"
        ) from error


def _is_finished(out: Path, options: dict[str, Any]) -> bool:
    """Whether ``out`` is finished.

    Raises ValueError for one begun with other options, FileExistsError for one that holds other
    things."""
    if not out.exists() or (out.is_dir() and not any(out.glob("[!.]*"))):
        return False
    if not (out / INDEX).is_file():
        raise FileExistsError(f"out {out} exists and is not of sisa prepare; choose another folder")
    index = read_index(out)
    # Where no shard is there yet, nothing would be mixed, nor lost.
    if index["complete"] or any(out.glob("shard-*")):
        begun = index["options"]
        if not index["complete"]:
            begun = {**begun, "sources": _unread_as(begun["sources"], options["sources"], out)}
        for name, value in options.items():
            before = begun.get(name)
            if before != value:
                before, value = _difference(before, value)
                raise ValueError(
                    f"{name} must stay {before!r}, as {out} was begun with it, got {value!r}; "
                    "choose another folder"
                )
    return index["complete"]


def _unread_as(before: list[dict], after: list[dict], out: Path) -> list[dict]:
    """Sources as they were, with the versions ``after`` of those that no finished shard is of.

    So a line may be corrected that stopped ``sisa prepare``; of the source that it stopped in,
    :func:`~sisa_model.data.sources.read` compares the documents before it."""
    *_, last = sorted(out.glob("shard-*"))
    end = Position(*read_record(last / RECORD)["end"])
    first = end.source if end.digest else end.source + 1
    changed = [
        {**old, "version": new["version"]} for old, new in zip(before[first:], after[first:])
    ]
    return [*before[:first], *changed, *before[first + len(changed) :]]


def _difference(before: Any, value: Any) -> tuple[Any, Any]:
    """Of two lists, the first items that differ."""
    if not isinstance(before, list):
        return before, value
    return next(pair for pair in itertools.zip_longest(before, value) if pair[0] != pair[1])


def _batches(documents: Iterator[tuple[Position, str]]) -> Iterator[_Batch]:
    """The documents in order, a million characters and more at a time."""
    texts: list[str] = []
    characters = 0
    end = START
    for end, text in documents:
        texts.append(text)
        characters += len(text)
        if characters >= BATCH_CHARACTERS:
            yield _Batch(texts, end)
            texts = []
            characters = 0
    if texts:
        yield _Batch(texts, end)


class _Worker:
    """Encodes batches; which side a document falls on is a function of its text alone."""

    def __init__(self, tokenizer: Path | None, held_out: float, dtype: np.dtype):
        self.encoder = Encoder(tokenizer)
        self.bound = held_out * 2**64
        self.dtype = dtype

    def __call__(self, batch: _Batch) -> _Encoded:
        texts: dict[str, list[str]] = {split: [] for split in SPLITS}
        for text in batch.texts:
            number = int.from_bytes(hashlib.sha256(text.strip().encode()).digest()[:8], "big")
            texts["val" if number < self.bound else "train"].append(text)
        tokens = {split: self.encoder.encode(texts[split]).astype(self.dtype) for split in SPLITS}
        documents = {split: len(texts[split]) for split in SPLITS}
        return _Encoded(tokens, documents, batch.end)


_worker: _Worker


def _start_worker(*setup: Any) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker = _Worker(*setup)


def _end_with_parent() -> None:
    """End this worker with its parent.

    It waits on a queue that it holds open itself, and would outlive a parent that is killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(batch: _Batch) -> _Encoded:
    return _worker(batch)


def _encoded(
    batches: Iterator[_Batch], workers: int, setup: tuple
) -> Generator[_Encoded, None, None]:
    """The batches encoded, in their order; one worker is this process."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a worker is one thread
    if workers == 1:
        yield from map(_Worker(*setup), batches)
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # torch is imported once, and its memory shared
    with ProcessPoolExecutor(workers, context, _start_worker, setup) as pool:
        pending: deque = deque()
        try:
            for batch in batches:
                pending.append(pool.submit(_work, batch))
                if len(pending) > 2 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool as error:
            raise OSError(
                "a worker was killed (memory?); the same command goes on after the finished shards"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _write_shard(
    folder: Path,
    batches: Iterator[_Encoded],
    end_of_text: int,
    shard_tokens: int,
    progress: Progress,
) -> None:
    """Fill a shard's folder from as many batches as it takes."""
    counts = {split: {"tokens": 0, "documents": 0} for split in SPLITS}
    hashes = {split: hashlib.sha256() for split in SPLITS}
    end = START
    with contextlib.ExitStack() as stack:
        paths = {split: folder / f"{split}.bin" for split in SPLITS}
        files = {split: stack.enter_context(open(path, "wb")) for split, path in paths.items()}
        for batch in batches:
            for split, tokens in batch.tokens.items():
                if int((tokens == end_of_text).sum()) != batch.documents[split]:
                    raise ValueError(
                        "tokenizer must make its end of text nowhere but at the end of a document"
                    )
                files[split].write(tokens.data)
                hashes[split].update(tokens.data)
                counts[split]["tokens"] += len(tokens)
                counts[split]["documents"] += batch.documents[split]
                progress.advance(len(tokens))
            end = batch.end
            if counts["train"]["tokens"] >= shard_tokens:
                break
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
    record = {split: {**counts[split], "sha256": hashes[split].hexdigest()} for split in SPLITS}
    write_json(folder / RECORD, {"version": VERSION, **record, "end": list(end)})


def _check_totals(config: PrepareConfig, shards: list[dict[str, Any]]) -> None:
    """ValueError where there is nothing to train on, or nothing to evaluate on."""
    train, val = (sum(shard[split]["documents"] for shard in shards) for split in SPLITS)
    if not train + val:
        sources = ", ".join(config.sources)
        raise ValueError(f"sources must hold text, but there is none in {sources}")
    if not train or not val:
        raise ValueError(
            f"held_out {config.held_out} puts {train} documents on the training side and {val} on "
            f"the other, and neither may be empty; remove {config.out} and choose another share"
        )
