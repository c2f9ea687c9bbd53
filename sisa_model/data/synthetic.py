"""Tasks that a tiny model can learn or fail at: retrieval (needle, recall) and state tracking
(parity, addition, flip-flop).

All use two pools of 16 tokens below the last of the vocabulary: for bytes, values that ASCII text
never has. An answer can only come from the sequence itself; guessing among the values it leaves
open is the level called chance."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from sisa_model.data.blocks import IGNORE

POOL = 16
RECALL_KEYS = 4
RECALL_LENGTH = 64  # tokens of a recall sequence that is mixed into text
# of a flip-flop's instructions; the rest are writes and reads in equal parts (Liu et al.'s
# FFL(0.8))
IGNORE_SHARE = 0.8
TOGETHER = 64  # sequences drawn at once: one by one takes ten times as long
LENGTHS = (1, 2, 4)  # of the exams of a task trained alone, in lengths of training
TASK_EXAM = 128  # sequences of each length that a task trained alone is evaluated on
DEPTHS = 4  # accuracy is reported by quarter of the sequence, first to last


@dataclass
class Sample:
    """Sequences of a task: inputs and targets [B, L] int64.

    Answers are the targets that are not IGNORE, in row-major order. Of each, ``place`` [answers]
    says where what it depends on stood last, in [0, 1), 0 at the start, and ``chance`` [answers]
    what a guess is worth."""

    inputs: Tensor
    targets: Tensor
    place: Tensor
    chance: Tensor

    def beyond(self, position: int) -> "Sample":
        """The same sequences with only the answers from ``position`` on."""
        kept = (self.targets != IGNORE).nonzero()[:, 1] >= position
        targets = self.targets.clone()
        targets[:, :position] = IGNORE
        return Sample(self.inputs, targets, self.place[kept], self.chance[kept])


def _pairs(
    rng: np.random.Generator, count: int, keys: int, top: int
) -> tuple[np.ndarray, np.ndarray]:
    """``count`` sets of distinct keys and of distinct values, [count, keys], from the tokens below
    ``top``, the last one.
    """
    key, value = (
        rng.permuted(np.tile(np.arange(POOL), (count, 1)), axis=1)[:, :keys] for _ in range(2)
    )
    return top - 2 * POOL + key, top - POOL + value


def _sample(
    inputs: np.ndarray,
    answers: np.ndarray,
    ask: np.ndarray,
    place: np.ndarray,
    chance: np.ndarray | float,
) -> Sample:
    """Score ``answers`` where ``ask`` is true, all [B, L] or broadcast to it."""
    asked = torch.from_numpy(ask)
    targets = torch.from_numpy(answers.astype(np.int64)).masked_fill(~asked, IGNORE)
    places, chances = (
        torch.from_numpy(np.broadcast_to(x, ask.shape).astype(np.float64))[asked]
        for x in (place, chance)
    )
    return Sample(torch.from_numpy(inputs.astype(np.int64)), targets, places, chances)


def needle(
    text: np.ndarray, top: int, seq_len: int, count: int, rng: np.random.Generator
) -> Sample:
    """A random key with its random value, hidden at a random depth of real text; the key is asked
    at the end.

    One needle a text, so its kind gives it away; keeping several apart by their keys is what
    :func:`recall` asks. Measured: with four needles and one asked, a tiny model stays at one in
    four for 1,000 steps, and its few answers drown the text's gradient."""
    length = seq_len - 1
    starts = rng.integers(len(text) - seq_len, size=count)
    tokens = text[starts[:, None] + np.arange(seq_len + 1)]
    key, value = _pairs(rng, count, 1, top)
    # Stratified: every batch covers every depth.
    depth = (rng.permutation(count)[:, None] + rng.random((count, 1))) / count
    position = (depth * (length - 1)).astype(np.int64)
    np.put_along_axis(tokens, position, key, 1)
    np.put_along_axis(tokens, position + 1, value, 1)
    tokens[:, length:] = np.concatenate((key, value), 1)
    ask = np.zeros(tokens.shape, bool)
    ask[:, length] = True
    return _sample(tokens[:, :-1], tokens[:, 1:], ask[:, :-1], depth, 1 / POOL)


def recall(top: int, seq_len: int, count: int, rng: np.random.Generator) -> Sample:
    """A stream of pairs over four keys, each key always with its value: every recurrence is asked
    (associative recall).
    """
    pairs = seq_len // 2
    key, value = _pairs(rng, count, RECALL_KEYS, top)
    pick = rng.integers(RECALL_KEYS, size=(count, pairs))
    tokens = np.stack([np.take_along_axis(x, pick, 1) for x in (key, value)], 2).reshape(count, -1)
    seen = np.maximum.accumulate(
        np.where(pick[:, :, None] == np.arange(RECALL_KEYS), np.arange(pairs)[:, None], -1), 1
    )
    before = np.concatenate(
        (np.full_like(seen[:, :1], -1), seen[:, :-1]), 1
    )  # where each key last stood before each pair
    latest = np.take_along_axis(before, pick[:, :, None], 2)[:, :, 0]
    values_in_sight = np.cumsum(latest < 0, 1)
    return _instructions(tokens, latest >= 0, latest, 1 / values_in_sight)


def _instructions(
    tokens: np.ndarray, ask: np.ndarray, latest: np.ndarray, chance: np.ndarray | float
) -> Sample:
    """A sample of pairs, ``tokens`` [B, 2 pairs]: where ``ask`` [B, pairs] a pair's second token,
    set by the pair ``latest``.
    """
    asked, place, worth = (
        np.zeros(tokens.shape, bool),
        np.zeros(tokens.shape),
        np.zeros(tokens.shape),
    )
    asked[:, ::2], place[:, ::2], worth[:, ::2] = ask, latest / ask.shape[1], chance
    return _sample(tokens[:, :-1], tokens[:, 1:], asked[:, :-1], place[:, :-1], worth[:, :-1])


def addition(
    top: int, seq_len: int, count: int, rng: np.random.Generator, modulus: int = 5
) -> Sample:
    """Random digits below ``modulus``; at each, their sum so far modulo ``modulus`` is asked. With
    modulus 2: parity.
    """
    digits = rng.integers(modulus, size=(count, seq_len))
    ask = np.ones(digits.shape, bool)
    return _sample(
        top - 2 * POOL + digits,
        top - POOL + digits.cumsum(1) % modulus,
        ask,
        np.arange(seq_len) / seq_len,
        1 / modulus,
    )


def flipflop(top: int, seq_len: int, count: int, rng: np.random.Generator) -> Sample:
    """The flip-flop language (arXiv 2306.00946): write, ignore and read, each with a bit; what a
    read has is the last bit written.

    The first instruction is a write and the last a read; of the others 0.8 are ignored, 0.1 write
    and 0.1 read. Reads are asked."""
    pairs = seq_len // 2
    write, read, ignore = range(3)
    rest = (1 - IGNORE_SHARE) / 2
    instruction = rng.choice(
        [write, read, ignore], size=(count, pairs), p=[rest, rest, IGNORE_SHARE]
    )
    instruction[:, 0], instruction[:, -1] = write, read
    latest = np.maximum.accumulate(np.where(instruction == write, np.arange(pairs), 0), 1)
    bit = rng.integers(2, size=(count, pairs))
    bit = np.where(instruction == read, np.take_along_axis(bit, latest, 1), bit)
    tokens = np.stack((top - 2 * POOL + instruction, top - POOL + bit), 2).reshape(count, -1)
    return _instructions(tokens, instruction == read, latest, 1 / 2)


def _short_recall(
    text: np.ndarray, top: int, seq_len: int, count: int, rng: np.random.Generator
) -> Sample:
    return recall(top, min(RECALL_LENGTH, seq_len), count, rng)


# Mixed into text, of which a needle's haystack is made: (text, top, seq_len, count, rng), top the
# vocabulary's last token.
TASKS: dict[str, Callable[[np.ndarray, int, int, int, np.random.Generator], Sample]] = {
    "needle": needle,
    "recall": _short_recall,
}
# Trained alone: (top, seq_len, count, rng).
Task = Callable[[int, int, int, np.random.Generator], Sample]
ALONE: dict[str, Task] = {
    "parity": functools.partial(addition, modulus=2),
    "addition": addition,
    "flipflop": flipflop,
    "recall": recall,
}


def find_task(name: str) -> Task:
    """The task that is trained alone under ``name``: one of ALONE, or addition-K for another
    modulus; ValueError for any other.
    """
    stem, _, modulus = name.partition("-")
    if stem == "addition" and modulus.isdecimal() and 2 <= int(modulus) <= POOL:
        return functools.partial(addition, modulus=int(modulus))
    if name not in ALONE:
        raise ValueError(
            f"task must be text, {', '.join(ALONE)}, or addition-K with a modulus K from 2 to {POOL}; got {name!r}"
        )
    return ALONE[name]


class TaskBlocks:
    """A task in the place of a text's :class:`sisa_model.data.blocks.Blocks`: sample n is a
    function of the seed and n alone.
    """

    def __init__(self, task: Task, top: int, seq_len: int, seed: int):
        self.task, self.top, self.seq_len, self.seed = task, top, seq_len, seed

    def ids(self, first: int, count: int) -> list[int]:
        """Which sequences are the samples ``first`` to ``first + count`` of the run."""
        return list(range(first, first + count))

    def take(self, ids: list[int]) -> tuple[Tensor, Tensor]:
        """Inputs and targets of sequences, each [len(ids), seq_len] int64 (one less for tasks of
        pairs).
        """
        wanted = {n // TOGETHER for n in ids}
        drawn = {
            n: self.task(self.top, self.seq_len, TOGETHER, np.random.default_rng([self.seed, n]))
            for n in wanted
        }
        rows = [(drawn[n // TOGETHER], n % TOGETHER) for n in ids]
        return torch.stack([sample.inputs[n] for sample, n in rows]), torch.stack(
            [sample.targets[n] for sample, n in rows]
        )


def exam_name(task: str, factor: int) -> str:
    """What an exam of a task trained alone is called in val.jsonl, its sequences ``factor`` times
    as long as in training.
    """
    return task if factor == 1 else f"{task}_x{factor}"


def exams(task: Task, top: int, seq_len: int, count: int, seed: int) -> dict[int, Sample]:
    """``count`` sequences at the length of training and at 2 and 4 times it, where only what lies
    past half of it is asked.

    A model that does not look ahead answers a position alike in sequences of any length, so each
    exam holds lengths of its own."""
    samples = {
        factor: task(top, factor * seq_len, count, np.random.default_rng([seed, factor]))
        for factor in LENGTHS
    }
    return {
        factor: sample.beyond(factor * seq_len // 2 if factor > 1 else 0)
        for factor, sample in samples.items()
    }


@torch.no_grad()
def accuracy(
    model: nn.Module, sample: Sample, micro_batch_size: int
) -> tuple[float, list[float | None]]:
    """Share of answers whose argmax is right: over all of them, and by the quarter that their
    ``place`` is in (None: no answer).
    """
    device = next(model.parameters()).device
    pieces = zip(*(x.to(device).split(micro_batch_size) for x in (sample.inputs, sample.targets)))
    right = (
        torch.cat([(model(x)[y != IGNORE].argmax(-1) == y[y != IGNORE]) for x, y in pieces])
        .double()
        .cpu()
    )
    quarter = (sample.place * DEPTHS).long()
    by_depth = [right[quarter == d] for d in range(DEPTHS)]
    return right.mean().item(), [hits.mean().item() if len(hits) else None for hits in by_depth]
