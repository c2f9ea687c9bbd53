"""Retrieval tasks that a tiny model can learn: random needles in real text, and associative recall.

Both use two pools of 64 rare tokens at the end of the vocabulary, keys and values, so that an answer can only come from the
sequence itself. Guessing a value is right once in 64.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

POOL = 64
NEEDLES = 4
RECALL_PAIRS = 16
DEPTHS = 4  # accuracy is reported by quarter of the text, from its end to its beginning
IGNORE = -100  # targets of positions that are not scored
CHANCE = 1 / POOL


@dataclass
class Sample:
    """Sequences of a task: inputs and targets [B, L] int64, and the depth of each answer, [B, answers] in [0, 1), 0 at the start."""

    inputs: Tensor
    targets: Tensor
    depth: Tensor


def _pairs(rng: np.random.Generator, count: int, pairs: int, end_of_text: int) -> tuple[np.ndarray, np.ndarray]:
    """``count`` sets of distinct keys and of values, [count, pairs], from the tokens just below ``end_of_text``."""
    keys = rng.permuted(np.tile(np.arange(POOL), (count, 1)), axis=1)[:, :pairs]
    values = rng.integers(POOL, size=(count, pairs))
    return end_of_text - 2 * POOL + keys, end_of_text - POOL + values


def _with_queries(context: np.ndarray, keys: np.ndarray, values: np.ndarray, position: np.ndarray, rng: np.random.Generator) -> Sample:
    """Append every key with its value in a random order after ``context``; the values are what is scored."""
    count, pairs = keys.shape
    order = rng.permuted(np.tile(np.arange(pairs), (count, 1)), axis=1)
    keys, values, position = (np.take_along_axis(x, order, 1) for x in (keys, values, position))
    tail = np.stack((keys, values), 2).reshape(count, -1)
    tokens = torch.from_numpy(np.concatenate((context, tail), 1).astype(np.int64))
    targets = torch.full_like(tokens, IGNORE)
    targets[:, context.shape[1] :: 2] = torch.from_numpy(values.astype(np.int64))
    return Sample(tokens, targets, torch.from_numpy(position / context.shape[1]))


def needle(text: np.ndarray, end_of_text: int, seq_len: int, count: int, rng: np.random.Generator) -> Sample:
    """Four key-value pairs at random places of a stretch of real text, all asked for at its end (RULER's multi-key needle)."""
    length = seq_len - 2 * NEEDLES
    starts = rng.integers(len(text) - length, size=count)
    context = text[starts[:, None] + np.arange(length)]
    keys, values = _pairs(rng, count, NEEDLES, end_of_text)
    # One needle in each quarter, so that every depth is asked equally often.
    quarter = length // NEEDLES
    position = rng.integers(quarter - 1, size=(count, NEEDLES)) + quarter * np.arange(NEEDLES)
    np.put_along_axis(context, position, keys, 1)
    np.put_along_axis(context, position + 1, values, 1)
    return _with_queries(context, keys, values, position, rng)


def recall(text: np.ndarray, end_of_text: int, seq_len: int, count: int, rng: np.random.Generator) -> Sample:
    """Sixteen key-value pairs and nothing else, then all keys in a new order (multi-query associative recall)."""
    pairs = min(RECALL_PAIRS, seq_len // 4)
    keys, values = _pairs(rng, count, pairs, end_of_text)
    position = np.broadcast_to(2 * np.arange(pairs), (count, pairs))
    return _with_queries(np.stack((keys, values), 2).reshape(count, -1), keys, values, position, rng)


TASKS = {"needle": needle, "recall": recall}


@torch.no_grad()
def accuracy(model: nn.Module, sample: Sample) -> tuple[float, list[float]]:
    """Share of answers whose argmax is right: over all of them, and by quarter of the depth from first to last."""
    asked = sample.targets != IGNORE
    right = (model(sample.inputs)[asked].argmax(-1) == sample.targets[asked]).view(sample.depth.shape)
    quarter = (sample.depth * DEPTHS).long()
    return right.double().mean().item(), [right[quarter == d].double().mean().item() for d in range(DEPTHS)]
