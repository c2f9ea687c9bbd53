"""Synthetic tasks that a tiny model learns or fails at: retrieval and state tracking.

All use two pools of 16 tokens below the last of the vocabulary: for bytes, values that ASCII text
never has. An answer can only come from the sequence itself; guessing among the values it leaves
open is the level called chance."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from sisa_model.data.blocks import IGNORE

POOL = 16
RECALL_KEYS = 4
RECALL_LENGTH = 64  # tokens of a recall sequence that is mixed into text
# Of a flip-flop's instructions; the rest are writes and reads in equal parts (FFL(0.8) of Liu et
# al.).
IGNORED = 0.8
TOGETHER = 64  # sequences drawn at once: one by one takes ten times as long
LENGTHS = (1, 2, 4)  # of the exams of a task trained alone, in lengths of training
TASK_EXAM = 128  # sequences of each length that a task trained alone is evaluated on
TASK_EXAM_SEED = 2**63  # of those; training's seeds are below it
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
    """``count`` sets of distinct keys and of distinct values, each [count, keys].

    Their tokens end just below ``top``, the last of the vocabulary."""
    key, value = (
        rng.permuted(np.tile(np.arange(POOL), (count, 1)), axis=1)[:, :keys] for _ in range(2)
    )
    return top - 2 * POOL + key, top - POOL + value


def _sample(
    inputs: np.ndarray,
    answers: np.ndarray,
    asked: np.ndarray,
    place: np.ndarray,
    chance: np.ndarray | float,
) -> Sample:
    """Score ``answers`` where ``asked`` is true, all [B, L] or broadcast to it."""
    mask = torch.from_numpy(asked)

    def of_answers(x: np.ndarray | float) -> Tensor:
        return torch.from_numpy(np.broadcast_to(x, asked.shape).astype(np.float64))[mask]

    return Sample(
        inputs=torch.from_numpy(inputs.astype(np.int64)),
        targets=torch.from_numpy(answers.astype(np.int64)).masked_fill(~mask, IGNORE),
        place=of_answers(place),
        chance=of_answers(chance),
    )


def needle(
    text: np.ndarray, top: int, seq_len: int, count: int, rng: np.random.Generator
) -> Sample:
    """A random key with its random value, hidden in real text; the key is asked at the end.

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
    asked = np.zeros(tokens.shape, bool)
    asked[:, length] = True
    return _sample(tokens[:, :-1], tokens[:, 1:], asked[:, :-1], depth, 1 / POOL)


def recall(top: int, seq_len: int, count: int, rng: np.random.Generator) -> Sample:
    """A stream of pairs over four keys, each always with its value (associative recall).

    Every recurrence of a key is asked."""
    pairs = seq_len // 2
    key, value = _pairs(rng, count, RECALL_KEYS, top)
    pick = rng.integers(RECALL_KEYS, size=(count, pairs))
    tokens = np.stack([np.take_along_axis(x, pick, 1) for x in (key, value)], 2).reshape(count, -1)
    # [count, pairs, keys]: where each key last stood, up to a pair and before it; -1 for nowhere.
    here = np.where(pick[:, :, None] == np.arange(RECALL_KEYS), np.arange(pairs)[:, None], -1)
    seen = np.maximum.accumulate(here, 1)
    before = np.concatenate((np.full_like(seen[:, :1], -1), seen[:, :-1]), 1)
    latest = np.take_along_axis(before, pick[:, :, None], 2)[:, :, 0]
    values_in_sight = np.cumsum(latest < 0, 1)
    return _of_pairs(tokens, latest >= 0, latest, 1 / values_in_sight)


def _of_pairs(
    tokens: np.ndarray, asked: np.ndarray, latest: np.ndarray, chance: np.ndarray | float
) -> Sample:
    """A sample of pairs, ``tokens`` [B, 2 pairs].

    Where ``asked`` [B, pairs], a pair's second token is asked, as the pair ``latest`` set it."""

    def at_first_tokens(x: np.ndarray | float, dtype: type = float) -> np.ndarray:
        at_tokens: np.ndarray = np.zeros(tokens.shape, dtype)
        at_tokens[:, ::2] = x
        return at_tokens[:, :-1]

    questions = at_first_tokens(asked, bool)
    place = at_first_tokens(latest / asked.shape[1])
    return _sample(tokens[:, :-1], tokens[:, 1:], questions, place, at_first_tokens(chance))


def addition(
    top: int, seq_len: int, count: int, rng: np.random.Generator, modulus: int = 5
) -> Sample:
    """Random digits below ``modulus``; at each, their sum so far modulo ``modulus`` is asked.

    With modulus 2: parity."""
    digits = rng.integers(modulus, size=(count, seq_len))
    inputs = top - 2 * POOL + digits
    answers = top - POOL + digits.cumsum(1) % modulus
    everywhere = np.ones(digits.shape, bool)
    return _sample(inputs, answers, everywhere, np.arange(seq_len) / seq_len, 1 / modulus)


def flipflop(top: int, seq_len: int, count: int, rng: np.random.Generator) -> Sample:
    """The flip-flop language (arXiv 2306.00946): write, ignore and read, each with a bit.

    What a read has is the last bit written. The first instruction is a write and the last a
    read; of the others 0.8 are ignored, 0.1 write and 0.1 read. Reads are asked."""
    pairs = seq_len // 2
    write, read, ignore = range(3)
    rest = (1 - IGNORED) / 2
    instruction = rng.choice([write, read, ignore], size=(count, pairs), p=[rest, rest, IGNORED])
    instruction[:, 0] = write
    instruction[:, -1] = read
    latest = np.maximum.accumulate(np.where(instruction == write, np.arange(pairs), 0), 1)
    bit = rng.integers(2, size=(count, pairs))
    bit = np.where(instruction == read, np.take_along_axis(bit, latest, 1), bit)
    tokens = np.stack((top - 2 * POOL + instruction, top - POOL + bit), 2).reshape(count, -1)
    return _of_pairs(tokens, instruction == read, latest, 1 / 2)


def _short_recall(
    text: np.ndarray, top: int, seq_len: int, count: int, rng: np.random.Generator
) -> Sample:
    return recall(top, min(RECALL_LENGTH, seq_len), count, rng)


# Mixed into text, of which a needle's haystack is made: (text, top, seq_len, count, rng), top the
# vocabulary's last token.
RetrievalTask = Literal["needle", "recall"]
TASKS: dict[RetrievalTask, Callable[[np.ndarray, int, int, int, np.random.Generator], Sample]] = {
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
    """The task that is trained alone under ``name``: one of ALONE, or addition-K modulo K.

    Raises ValueError for any other name."""
    stem, _, modulus = name.partition("-")
    if stem == "addition" and modulus.isdecimal() and 2 <= int(modulus) <= POOL:
        return functools.partial(addition, modulus=int(modulus))
    if name not in ALONE:
        raise ValueError(
            f"task must be text, {', '.join(ALONE)}, or addition-K with a modulus K from 2 to "
            f"{POOL}; got {name!r}"
        )
    return ALONE[name]


class TaskBlocks:
    """A task in the place of a text's :class:`sisa_model.data.blocks.Blocks`.

    Sample n is a function of the seed and n alone."""

    def __init__(self, task: Task, top: int, seq_len: int, seed: int):
        self.task = task
        self.top = top
        self.seq_len = seq_len
        self.seed = seed

    def ids(self, first: int, count: int) -> list[int]:
        """Which sequences are the samples ``first`` to ``first + count`` of the run."""
        return list(range(first, first + count))

    def take(self, ids: list[int]) -> tuple[Tensor, Tensor]:
        """Inputs and targets of sequences, each [len(ids), seq_len] int64 (of pairs one less)."""
        drawn = {number: self._draw(number) for number in {n // TOGETHER for n in ids}}
        rows = [(drawn[n // TOGETHER], n % TOGETHER) for n in ids]
        inputs = torch.stack([sample.inputs[n] for sample, n in rows])
        targets = torch.stack([sample.targets[n] for sample, n in rows])
        return inputs, targets

    def _draw(self, number: int) -> Sample:
        rng = np.random.default_rng([self.seed, number])
        return self.task(self.top, self.seq_len, TOGETHER, rng)


def exam_name(task: str, factor: int) -> str:
    """What an exam of a task trained alone is called in val.jsonl.

    Its sequences are ``factor`` times as long as in training."""
    return task if factor == 1 else f"{task}_x{factor}"


def exams(task: Task, top: int, seq_len: int, count: int, seed: int) -> dict[int, Sample]:
    """``count`` sequences at each of LENGTHS, in lengths of training.

    Of the longer ones only what lies past their half is asked. A model that does not look ahead
    answers a position alike in sequences of any length, so each exam holds lengths of its own."""
    found = {}
    for factor in LENGTHS:
        sample = task(top, factor * seq_len, count, np.random.default_rng([seed, factor]))
        found[factor] = sample.beyond(factor * seq_len // 2 if factor > 1 else 0)
    return found


@torch.no_grad()
def accuracy(
    answer: Callable[[Tensor, Tensor], Tensor], sample: Sample, micro_batch_size: int
) -> tuple[float, list[float | None]]:
    """Share of answers that are right, of all and by the quarter of their ``place``.

    ``answer(inputs [B, L], asked [B, L])`` gives the token that it expects behind each place that
    is asked, [asked.sum()]. None: no answer is in that quarter."""
    hits = []
    for inputs, targets in zip(
        *(x.split(micro_batch_size) for x in (sample.inputs, sample.targets))
    ):
        asked = targets != IGNORE
        hits.append(answer(inputs, asked).cpu() == targets[asked])
    right = torch.cat(hits).double()
    quarter = (sample.place * DEPTHS).long()
    by_depth = [right[quarter == depth] for depth in range(DEPTHS)]
    return right.mean().item(), [x.mean().item() if len(x) else None for x in by_depth]
