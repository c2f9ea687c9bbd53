"""Retrieval tasks that a tiny model can learn: random needles in real text, and associative recall.

Both use two pools of 16 rare tokens at the end of the vocabulary, keys and values, so that an answer can only come from the
sequence itself. Guessing a value is right once in 16.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

POOL = 16
NEEDLES = 4
RECALL_KEYS = 4
RECALL_LENGTH = 64
DEPTHS = 4  # accuracy is reported by quarter of the sequence, first to last
IGNORE = -100  # targets of positions that are not scored
CHANCE = 1 / POOL


@dataclass
class Sample:
    """Sequences of a task: inputs and targets [B, L] int64, and where in its sequence each answer stood, [answers] in [0, 1).

    Answers are the targets that are not IGNORE, in row-major order; the place is that of the pair asked for, 0 at the start.
    """

    inputs: Tensor
    targets: Tensor
    place: Tensor


def _pairs(rng: np.random.Generator, count: int, keys: int, end_of_text: int) -> tuple[np.ndarray, np.ndarray]:
    """``count`` sets of distinct keys and of values, [count, keys], from the tokens just below ``end_of_text``."""
    key = rng.permuted(np.tile(np.arange(POOL), (count, 1)), axis=1)[:, :keys]
    return end_of_text - 2 * POOL + key, end_of_text - POOL + rng.integers(POOL, size=(count, keys))


def _sample(tokens: np.ndarray, ask: np.ndarray, place: np.ndarray) -> Sample:
    """Score the successor of each token where ``ask`` [B, L] is true; ``place`` [B, L] is where its pair stood."""
    inputs = torch.from_numpy(tokens.astype(np.int64))
    targets = torch.full_like(inputs, IGNORE)
    targets[:, :-1] = inputs[:, 1:]
    asked = torch.from_numpy(ask)
    return Sample(inputs, targets.masked_fill(~asked, IGNORE), torch.from_numpy(place)[asked])


def needle(text: np.ndarray, end_of_text: int, seq_len: int, count: int, rng: np.random.Generator) -> Sample:
    """Four key-value pairs in a stretch of real text, one in each quarter, all asked for at its end (RULER's multi-key needle)."""
    length = seq_len - 2 * NEEDLES
    starts = rng.integers(len(text) - length, size=count)
    context = text[starts[:, None] + np.arange(length)]
    key, value = _pairs(rng, count, NEEDLES, end_of_text)
    quarter = length // NEEDLES
    position = rng.integers(quarter - 1, size=(count, NEEDLES)) + quarter * np.arange(NEEDLES)
    np.put_along_axis(context, position, key, 1)
    np.put_along_axis(context, position + 1, value, 1)
    order = rng.permuted(np.tile(np.arange(NEEDLES), (count, 1)), axis=1)
    key, value, position = (np.take_along_axis(x, order, 1) for x in (key, value, position))
    tokens = np.concatenate((context, np.stack((key, value), 2).reshape(count, -1)), 1)
    ask, place = np.zeros(tokens.shape, bool), np.zeros(tokens.shape)
    ask[:, length::2], place[:, length::2] = True, position / length
    return _sample(tokens, ask, place)


def recall(text: np.ndarray, end_of_text: int, seq_len: int, count: int, rng: np.random.Generator) -> Sample:
    """A stream of pairs over four keys, each key always with its value: every recurrence is asked (associative recall).

    ``text`` is unused, and the length is 64 tokens (or ``seq_len``, if that is shorter).
    """
    pairs = min(RECALL_LENGTH, seq_len) // 2
    key, value = _pairs(rng, count, RECALL_KEYS, end_of_text)
    pick = rng.integers(RECALL_KEYS, size=(count, pairs))
    tokens = np.stack([np.take_along_axis(x, pick, 1) for x in (key, value)], 2).reshape(count, -1)
    same = np.tril(pick[:, :, None] == pick[:, None, :], -1)
    latest = np.where(same, np.arange(pairs), -1).max(-1)
    ask, place = np.zeros(tokens.shape, bool), np.zeros(tokens.shape)
    ask[:, ::2], place[:, ::2] = latest >= 0, latest / pairs
    return _sample(tokens, ask, place)


TASKS = {"needle": needle, "recall": recall}


@torch.no_grad()
def accuracy(model: nn.Module, sample: Sample) -> tuple[float, list[float]]:
    """Share of answers whose argmax is right: over all of them, and by the quarter of the sequence their pair stood in."""
    asked = sample.targets != IGNORE
    right = (model(sample.inputs)[asked].argmax(-1) == sample.targets[asked]).double()
    quarter = (sample.place * DEPTHS).long()
    return right.mean().item(), [right[quarter == d].mean().item() for d in range(DEPTHS)]
