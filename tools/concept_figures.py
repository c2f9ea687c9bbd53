"""Draws the figures of docs/concepts.md from the formulas alone: term, decay, clamp, horizon.

python tools/concept_figures.py [--out docs]
"""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from sisa_kernels.rotation import CLAMP
from sisa_model.reporting.figures import COLORS, save_figure

ROOT = Path(__file__).resolve().parent.parent
FP32 = 2.0**-24  # the rounding of a logit of 1
TILE = 64


def weights(scores: np.ndarray) -> np.ndarray:
    """Causal softmax of scores [L, L]."""
    causal = np.where(np.tri(len(scores), dtype=bool), scores, -np.inf)
    e = np.exp(causal - causal.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def draw_term(path: Path) -> None:
    """What is added to the score, and what the softmax makes of it where q.k says nothing."""
    i, j = np.mgrid[:64, :64]
    distance = np.where(i >= j, i - j, np.nan)
    important = np.where(np.isin(np.arange(64), (10, 37)), 6.0, 0.5)  # b_j: two tokens stand out
    terms = {
        "half-life 40, no rotation": 0.5 ** (distance / 40) * important,
        "half-life 8, no rotation": 0.5 ** (distance / 8) * important,
        "half-life 40, 0.4 radians a token": 0.5 ** (distance / 40) * np.cos(0.4 * distance) * 3,
    }
    figure, axes = plt.subplots(2, 3, figsize=(9, 5.6), sharex=True, sharey=True)
    for column, (title, term) in enumerate(terms.items()):
        scale: dict[str, Any] = {"cmap": "RdBu_r", "vmin": -4, "vmax": 4}
        axes[0, column].imshow(term, **scale)
        axes[1, column].imshow(weights(np.nan_to_num(term)) ** 0.5, cmap="Blues", vmin=0, vmax=0.7)
        axes[0, column].set_title(title)
        axes[1, column].set_xlabel("earlier token j")
    axes[0, 0].set_ylabel("importance term\ntoken i")
    axes[1, 0].set_ylabel("attention from it alone\ntoken i")
    for axis in axes.flat:
        axis.grid(False)
    save_figure(figure, path)


def draw_decay(path: Path) -> None:
    """exp(g_i - g_j) by distance, and where it is below the rounding of a logit."""
    distance = np.geomspace(1, 20_000, 400)
    figure, axis = plt.subplots(figsize=(6.8, 3.6))
    for color, half_life in zip(COLORS, (2, 20, 100, 400)):
        axis.plot(distance, 0.5 ** (distance / half_life), color=color, label=f"{half_life} tokens")
        horizon = half_life * math.log2(16 / FP32)
        axis.plot(horizon, 0.5 ** (horizon / half_life), "o", color=color, ms=5)
        axis.annotate(f"{horizon:,.0f}", (0.9 * horizon, 3e-9), color=color, ha="right")
    axis.set(xscale="log", yscale="log", ylim=(2e-10, 2), xlabel="tokens back, i - j")
    axis.set_ylabel("exp(g_i - g_j)")
    axis.legend(title="half-life", frameon=False, loc="lower left")
    save_figure(figure, path)


def draw_clamp(path: Path) -> None:
    """The exponent with and without the clamp, and the decay that the last token then sees."""
    length, half_life = 8192, 100
    g = -math.log(2) / half_life * np.arange(length)
    centred = g - (g.max() + g.min()) / 2
    clamped = centred.clip(-CLAMP, CLAMP)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
    left.plot(centred, color=COLORS[0], label="exact")
    left.plot(clamped, color=COLORS[1], label="clamped at 11")
    left.set(xlabel="token", ylabel="g - m", title=f"half-life {half_life}, {length:,} tokens")
    for exponent, color in ((centred, COLORS[0]), (clamped, COLORS[1])):
        right.plot(np.arange(length)[::-1], exponent[-1] - exponent, color=color)
    right.set(xlabel="tokens back from the last", ylabel="g_i - g_j", xlim=(0, 4000), ylim=(-30, 1))
    right.set_title("the last token sees 2,500 tokens without any decay")
    left.legend(frameon=False)
    save_figure(figure, path)


def draw_horizon(path: Path) -> None:
    """Which pairs of tiles need the importance product, for three half-lives."""
    tiles = 4096 // TILE
    rows, columns = np.mgrid[:tiles, :tiles]
    gap = np.maximum(0, (rows - columns - 1) * TILE + 1)  # of the nearest tokens of a pair
    figure, axes = plt.subplots(1, 3, figsize=(9, 3.3))
    for axis, half_life in zip(axes, (100, 20, 5)):
        bound = 16 * 0.5 ** (gap / half_life)  # |c| |b| of 16
        kind = np.where(rows < columns, 0, np.where(bound > FP32, 2, 1))
        axis.imshow(
            kind, cmap=plt.matplotlib.colors.ListedColormap(["white", "#cfe0f0", COLORS[0]])
        )
        share = (kind == 2).sum() / (kind > 0).sum()
        axis.set(title=f"half-life {half_life}: {share:.0%} near", xlabel="tile of keys")
        axis.grid(False)
    axes[0].set_ylabel("tile of queries")
    save_figure(figure, path)


FIGURES: dict[str, Callable[[Path], None]] = {
    "term": draw_term,
    "decay": draw_decay,
    "clamped-exponent": draw_clamp,
    "horizon": draw_horizon,
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder of the pictures")
    given = parser.parse_args(arguments)
    for name, draw in FIGURES.items():
        draw(given.out / f"concept-{name}.png")


if __name__ == "__main__":
    main()
