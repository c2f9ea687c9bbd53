"""A shuffled order computed place by place: nothing of it is held, so any sample of a run is known by arithmetic alone."""

import numpy as np

ROUNDS = 8  # measured in tests/test_data.py: places, neighbours and distances as in independent draws, from 3 elements up


def shuffled(places: np.ndarray, count: int, key: list[int]) -> np.ndarray:
    """Which element of a shuffle of ``range(count)`` stands at each of ``places`` (int64, below count); ``key`` picks it.

    A Feistel network permutes the 4^b >= count numbers around the range; a number that lands outside is sent on until it lands
    inside (cycle walking), which permutes the range itself (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).
    """
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    keys = np.random.default_rng(key).integers(2**64, size=ROUNDS, dtype=np.uint64)
    found = places.astype(np.uint64)
    outside = np.ones(found.shape, bool)
    while outside.any():
        found[outside] = _feistel(found[outside], np.uint64(half), keys)
        outside = found >= count
    return found.astype(np.int64)


def _feistel(x: np.ndarray, half: np.uint64, keys: np.ndarray) -> np.ndarray:
    mask = np.uint64((1 << int(half)) - 1)
    left, right = x >> half, x & mask
    for key in keys:
        # The finaliser of SplitMix64: every bit of (right, key) reaches every bit of the result.
        z = (right ^ key) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        left, right = right, left ^ ((z ^ (z >> np.uint64(31))) & mask)
    return (left << half) | right
