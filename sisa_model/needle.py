"""Retrieval tasks that a tiny model can learn: random needles in real text, and associative recall.

Both use two pools of 16 tokens below the last of the vocabulary, keys and values: for bytes, values that ASCII text never has.
An answer can only come from the sequence itself; guessing among the values it leaves open is the level called chance.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

POOL = 16
RECALL_KEYS = 4
RECALL_LENGTH = 64
DEPTHS = 4  # accuracy is reported by quarter of the sequence, first to last
IGNORE = -100  # targets of positions that are not scored


@dataclass
class Sample:
    """Sequences of a task: inputs and targets [B, L] int64, where each answer's pair stood, and the level of chance.

    Answers are the targets that are not IGNORE, in row-major order; ``place`` [answers] is in [0, 1), 0 at the start.
    """

    inputs: Tensor
    targets: Tensor
    place: Tensor
    chance: float


def _pairs(rng: np.random.Generator, count: int, keys: int, top: int) -> tuple[np.ndarray, np.ndarray]:
    """``count`` sets of distinct keys and of distinct values, [count, keys], from the tokens below ``top``, the last one."""
    key, value = (rng.permuted(np.tile(np.arange(POOL), (count, 1)), axis=1)[:, :keys] for _ in range(2))
    return top - 2 * POOL + key, top - POOL + value


def _sample(tokens: np.ndarray, ask: np.ndarray, place: np.ndarray, chance: float) -> Sample:
    """Score the successor of each token where ``ask`` [B, L + 1] is true; ``place`` [B, L + 1] is where its pair stood."""
    stream, asked = torch.from_numpy(tokens.astype(np.int64)), torch.from_numpy(ask[:, :-1])
    targets = stream[:, 1:].masked_fill(~asked, IGNORE)
    return Sample(stream[:, :-1], targets, torch.from_numpy(place[:, :-1].copy())[asked], chance)


def needle(text: np.ndarray, top: int, seq_len: int, count: int, rng: np.random.Generator) -> Sample:
    """A random key with its random value, hidden at a random depth of real text; the key is asked at the end.

    One needle a text, so its kind gives it away; keeping several apart by their keys is what :func:`recall` asks. Measured: with
    four needles and one asked, a tiny model stays at one in four for 1,000 steps, and its few answers drown the text's gradient.
    """
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
    return _sample(tokens, ask, np.broadcast_to(depth, tokens.shape), 1 / POOL)


def recall(text: np.ndarray, top: int, seq_len: int, count: int, rng: np.random.Generator) -> Sample:
    """A stream of pairs over four keys, each key always with its value: every recurrence is asked (associative recall).

    ``text`` is unused, and the length is 64 tokens (or ``seq_len``, if that is shorter).
    """
    pairs = min(RECALL_LENGTH, seq_len) // 2
    key, value = _pairs(rng, count, RECALL_KEYS, top)
    pick = rng.integers(RECALL_KEYS, size=(count, pairs))
    tokens = np.stack([np.take_along_axis(x, pick, 1) for x in (key, value)], 2).reshape(count, -1)
    latest = np.where(np.tril(pick[:, :, None] == pick[:, None, :], -1), np.arange(pairs), -1).max(-1)
    ask, place = np.zeros(tokens.shape, bool), np.zeros(tokens.shape)
    ask[:, ::2], place[:, ::2] = latest >= 0, latest / pairs
    values_in_sight = np.cumsum(latest < 0, 1)
    return _sample(tokens, ask, place, float((1 / values_in_sight[latest >= 0]).mean()))


TASKS = {"needle": needle, "recall": recall}


@torch.no_grad()
def accuracy(model: nn.Module, sample: Sample, micro_batch_size: int) -> tuple[float, list[float]]:
    """Share of answers whose argmax is right: over all of them, and by the quarter of the sequence their pair stood in."""
    pieces = zip(sample.inputs.split(micro_batch_size), sample.targets.split(micro_batch_size))
    right = torch.cat([(model(x)[y != IGNORE].argmax(-1) == y[y != IGNORE]) for x, y in pieces]).double()
    quarter = (sample.place * DEPTHS).long()
    return right.mean().item(), [right[quarter == d].mean().item() for d in range(DEPTHS)]
