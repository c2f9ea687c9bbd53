"""Pictures of plain rows: a run's losses, SISA's health by layer, models against each other."""

import itertools
import math
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from sisa_model.utils.files import write_atomically

Rows = list[dict[str, Any]]
# Okabe and Ito's palette: distinguishable to colour-blind readers.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# Eight to seven colours: a pair repeats after 56 models.
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
SHARES = (-0.03, 1.03)  # the axis of what is from 0 to 1
HEALTH = {
    "lam": "lambda",
    "half_life": "half-life, tokens",
    "g_range": "range of g",
    "clamped": "share of positions clamped",
}
LOGARITHMIC = ("grad_norm", "half_life")
CHANCE: dict[str, Any] = {"color": "0.3", "ls": ":", "lw": 1.5}
plt.rcParams.update(
    {
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.25,
    }
)


def save_figure(figure: Any, path: Path, tight: bool = True) -> None:
    """Write ``figure`` to ``path``, a .png, atomically, and close it.

    ``tight`` lays its axes out anew."""
    if tight:
        figure.tight_layout()

    def write(aside: Path) -> None:
        figure.savefig(aside, dpi=130, format="png", bbox_inches="tight")

    write_atomically(path, write)
    plt.close(figure)


def plot_losses(
    path: Path, title: str, train: Rows, val: Rows, unigram: float, bigram: float
) -> None:
    """Training and held-out loss against step, with the n-gram models' as level lines.

    Those are of text; nan for a task."""
    figure, axis = plt.subplots(figsize=(6.4, 4))
    faint: dict[str, Any] = {"color": COLORS[0], "alpha": 0.35, "lw": 0.8, "label": "training"}
    dotted: dict[str, Any] = {"color": COLORS[1], "marker": "o", "ms": 3, "label": "held out"}
    for rows, style in ((train, faint), (val, dotted)):
        axis.plot([row["step"] for row in rows], [row["loss"] for row in rows], **style)
    if math.isfinite(unigram):
        for name, level, dashes in (("unigram", unigram, ":"), ("bigram", bigram, "--")):
            axis.axhline(level, color="0.4", ls=dashes, lw=1, label=f"{name} model, {level:.2f}")
    axis.set(xlabel="step", ylabel="loss, nats a token", title=title)
    axis.legend(frameon=False)
    save_figure(figure, path)


def plot_health(path: Path, title: str, val: Rows) -> None:
    """Draw :func:`health_figure` to ``path``."""
    save_figure(health_figure(title, val), path)


def health_figure(title: str, val: Rows) -> Any:
    """lambda, half-life, range of g, clamped share: what says something of the run, by step.

    One line a layer, the mean over its heads."""
    fields = health_fields(val)
    figure, row = plt.subplots(1, len(fields), figsize=(3.25 * len(fields), 3.2), squeeze=False)
    steps = [row["step"] for row in val]
    numbers = [layer["layer"] for layer in val[0]["layers"]]
    shades = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(numbers)))
    for axis, field in zip(row.flat, fields):
        for place, number in enumerate(numbers):
            means = [np.mean(row["layers"][place][field]) for row in val]
            axis.plot(steps, means, color=shades[place], label=f"layer {number}")
        axis.set(xlabel="step", title=HEALTH[field])
        if field in LOGARITHMIC:
            axis.set_yscale("log")
    row.flat[0].legend(frameon=False, fontsize=7)
    figure.suptitle(title)
    figure.tight_layout()
    return figure


def health_fields(val: Rows) -> list[str]:
    """Those of HEALTH that say something: no half-life without a decay, no share of no clamp."""
    layers = [layer for row in val for layer in row["layers"]]
    decays = any(np.max(layer["g_range"]) > 0 for layer in layers)
    clamps = any(layer.get("clamped") for layer in layers)
    shown = {"half_life": decays, "g_range": decays, "clamped": clamps}
    return [field for field in HEALTH if shown.get(field, True)]


def plot_compare(path: Path, runs: dict[str, list[Rows]], title: str) -> None:
    """Held-out loss, needle and recall accuracy against step, and the needle's by depth.

    ``runs`` maps a name to the val.jsonl rows of each seed. Lines are means over seeds, bands their
    minimum to maximum."""
    figure, axes = plt.subplots(2, 2, figsize=(10, 7))
    panels = {
        "loss": (axes[0, 0], "held-out loss, nats a token"),
        "needle_accuracy": (axes[0, 1], "needle accuracy (random key and value in text)"),
        "recall_accuracy": (axes[1, 0], "associative recall accuracy (4 keys)"),
    }
    first = next(iter(runs.values()))[0][0]
    for field, (axis, label) in panels.items():
        for number, (name, seeds) in enumerate(runs.items()):
            _curve(axis, number, name, seeds, field)
        axis.set(xlabel="step", title=label)
        if field != "loss":
            axis.axhline(first[field.replace("accuracy", "chance")], label="chance", **CHANCE)
            axis.set_ylim(*SHARES)
    _bars_by_depth(axes[1, 1], runs)
    axes[1, 1].axhline(first["needle_chance"], **CHANCE)
    _legend(figure, axes[0, 1], title)
    save_figure(figure, path)


def _bars_by_depth(axis: Any, runs: dict[str, list[Rows]]) -> None:
    """The final needle accuracy by the part of the text that the needle is in."""
    field = "needle_accuracy_by_depth"
    parts = len(next(iter(runs.values()))[0][-1][field])
    error_style = {"lw": 1, "ecolor": "0.5"}
    for number, seeds in enumerate(runs.values()):
        final = np.array([rows[-1][field] for rows in seeds])
        place = np.arange(parts) + 0.8 * ((number + 0.5) / len(runs) - 0.5)
        color, _ = _style(number)
        bars = {"color": color, "yerr": _range(final), "error_kw": error_style}
        axis.bar(place, final.mean(0), 0.8 / len(runs), **bars)
    edges = [math.floor(100 * part / parts) for part in range(parts + 1)]
    axis.set_xticks(range(parts), [f"{low}-{high} %" for low, high in itertools.pairwise(edges)])
    axis.set(xlabel="place of the needle in the text", title="final needle accuracy by depth")
    axis.set_ylim(*SHARES)


def plot_task(path: Path, runs: dict[str, list[Rows]], exams: dict[str, str], title: str) -> None:
    """A task trained alone: loss and accuracy against step, final accuracy by length.

    The level of chance is drawn in. ``runs`` is as :func:`plot_compare`'s; ``exams`` maps a name
    in the rows, that of the training's length first, to its lengths in words. Lines and points
    are means over seeds, bands and bars their minimum to maximum."""
    figure, (losses, accuracies, by_length) = plt.subplots(1, 3, figsize=(13, 4))
    exam = next(iter(exams))
    first = next(iter(runs.values()))[0][0]
    for number, (name, seeds) in enumerate(runs.items()):
        _curve(losses, number, name, seeds, "loss")
        _curve(accuracies, number, name, seeds, f"{exam}_accuracy")
    losses.set(xlabel="step", title="held-out loss, nats an answer")
    losses.set_ylim(0, 1.05 * losses.get_ylim()[1])
    accuracies.axhline(first[f"{exam}_chance"], label="chance", **CHANCE)
    accuracies.set(xlabel="step", title="accuracy at the length of training", ylim=SHARES)
    _points_by_length(by_length, runs, exams)
    _legend(figure, accuracies, title)
    save_figure(figure, path)


def _points_by_length(axis: Any, runs: dict[str, list[Rows]], exams: dict[str, str]) -> None:
    """The final accuracy in each of ``exams``, and its chance."""
    places = np.arange(len(exams))
    for number, seeds in enumerate(runs.values()):
        final = np.array([[rows[-1][f"{exam}_accuracy"] for exam in exams] for rows in seeds])
        aside = places + 0.6 * ((number + 0.5) / len(runs) - 0.5)
        color, marker = _style(number)
        axis.errorbar(aside, final.mean(0), _range(final), color=color, marker=marker, ls="")
    first = next(iter(runs.values()))[0][0]
    chances = [first[f"{exam}_chance"] for exam in exams]
    axis.hlines(chances, places - 0.45, places + 0.45, **CHANCE)
    axis.set(xlabel="position of the answer, tokens", title="final accuracy by length", ylim=SHARES)
    axis.set_xticks(range(len(exams)), list(exams.values()))
    axis.grid(axis="x", visible=False)


def plot_heads(path: Path, title: str, layers: Rows, panels: dict[str, str]) -> None:
    """Heat maps, layers by heads, of each field of ``layers`` that ``panels`` titles.

    Half-lives have a log scale, changes one about 0, and both entropies the same.
    """
    heads = len(layers[0]["lam"])
    count = len(layers)
    columns = 3
    lines = math.ceil(len(panels) / columns)
    size = (columns * max(3.4, 0.36 * heads + 1.4), lines * max(2.0, 0.3 * count + 0.9))
    figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False)
    for axis, (field, label) in zip(axes.flat, panels.items()):
        values = np.array([layer[field] for layer in layers])
        colors = "RdBu_r" if field.endswith("_change") else "viridis"
        image = axis.imshow(values, norm=_scale(layers, field), cmap=colors, aspect="auto")
        figure.colorbar(image, ax=axis, fraction=0.05, pad=0.02, format="%g")
        for (layer, head), value in np.ndenumerate(values):
            text = f"{value:.0f}" if 100 <= value < 1e5 else f"{value:.2g}"
            dark = np.dot(image.to_rgba(value)[:3], (0.3, 0.6, 0.1)) < 0.5
            color = "white" if dark else "black"
            axis.text(head, layer, text, ha="center", va="center", fontsize=6, color=color)
        axis.set_xticks(range(heads), range(heads), fontsize=7)
        axis.set_yticks(range(count), [layer["layer"] for layer in layers], fontsize=7)
        axis.grid(visible=False)
        axis.set(xlabel="head", ylabel="layer", title=label)
    figure.suptitle(title, y=1.0, va="bottom")
    save_figure(figure, path)


def _scale(layers: Rows, field: str) -> Any:
    """What the colours of a field's heat map stand for."""
    entropies = ("entropy", "entropy_without")
    shared = [
        layer[name] for layer in layers for name in (entropies if field in entropies else (field,))
    ]
    low, high = np.min(shared), np.max(shared)
    if field == "half_life":
        return matplotlib.colors.LogNorm(low, max(high, 10 * low))
    if field.endswith("_change"):
        edge = max(abs(low), abs(high), 1e-9)
        return matplotlib.colors.Normalize(-edge, edge)
    # At least a twentieth wide, so that rounding does not take all colours.
    return matplotlib.colors.Normalize(low, max(high, 1.05 * low))


def plot_tables(
    path: Path, note: str, tables: list[tuple[str, tuple[str, ...], list[list[str]]]], missing: str
) -> None:
    """Tables one below the other under a note.

    Each is a title, its columns' titles and its rows, of which the first cell is a label. Cells
    that begin with ``missing`` are grey."""
    row, letter, gap = 0.21, 0.073, 0.5  # inches: of a line, of a letter, between tables
    grids = [[["", *columns], *rows] for _, columns, rows in tables]
    widths = [
        [letter * (2 + max(len(line[n]) for line in grid)) for n in range(len(grid[0]))]
        for grid in grids
    ]
    head = row * (1 + note.count("\n"))
    height = head + sum(row * len(grid) + gap for grid in grids)
    width = max(map(sum, widths))
    figure = plt.figure(figsize=(width, height))
    figure.text(0, 1, note, va="top", linespacing=1.4)
    top = height - head
    for (title, _, _), grid, columns in zip(tables, grids, widths):
        top -= row * len(grid) + gap
        axis = figure.add_axes((0, top / height, sum(columns) / width, row * len(grid) / height))
        axis.set_axis_off()
        axis.set_title(title, loc="left", fontsize=10, weight="bold")
        _draw_table(axis, grid, columns, missing)
    save_figure(figure, path, tight=False)


def _draw_table(axis: Any, grid: list[list[str]], widths: list[float], missing: str) -> None:
    drawn = axis.table(
        grid,
        colWidths=[width / sum(widths) for width in widths],
        cellLoc="left",
        bbox=matplotlib.transforms.Bbox.unit(),
    )
    drawn.auto_set_font_size(False)
    drawn.set_fontsize(8)
    for (line, column), cell in drawn.get_celld().items():
        cell.set(edgecolor="0.85", lw=0.5, facecolor="0.95" if 0 in (line, column) else "white")
        if cell.get_text().get_text().startswith(missing):
            cell.get_text().set_color("0.6")


def plot_grid(
    path: Path,
    title: str,
    shares: np.ndarray,
    depths: list[float],
    lengths: list[int],
    trained: int,
) -> None:
    """Heat map of ``shares`` [depths, lengths]: needles found, by place in the text and length.

    Shares are in [0, 1]. A line stands after the last length seen in training, ``trained``."""
    figure, axis = plt.subplots(figsize=(1.6 + 0.7 * len(lengths), 1.2 + 0.32 * len(depths)))
    image = axis.imshow(100 * shares, vmin=0, vmax=100, cmap="viridis", aspect="auto")
    for (row, column), share in np.ndenumerate(shares):
        color = "w" if share < 0.6 else "k"
        text = f"{100 * share:.0f}"
        axis.text(column, row, text, ha="center", va="center", fontsize=7, color=color)
    axis.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    axis.set_yticks(range(len(depths)), [f"{100 * depth:.0f} %" for depth in depths])
    axis.set(xlabel="tokens", ylabel="place of the needle in the text", title=title)
    axis.grid(False)
    seen = sum(length <= trained for length in lengths)
    if 0 < seen < len(lengths):
        axis.axvline(seen - 0.5, color="w", ls="--", lw=1.5)
    figure.colorbar(image, label="needles found, %")
    save_figure(figure, path)


def _style(number: int) -> tuple[str, str]:
    """The colour and the marker of the ``number``-th model."""
    return COLORS[number % len(COLORS)], MARKERS[number % len(MARKERS)]


def _range(values: np.ndarray) -> np.ndarray:
    """How far minimum and maximum over seeds, the first axis, are from the mean."""
    return np.abs(np.stack((values.min(0), values.max(0))) - values.mean(0))


def _curve(axis: Any, number: int, name: str, seeds: list[Rows], field: str) -> None:
    """Plot the ``number``-th model's mean of ``field`` over seeds, in a band of their range."""
    start = int(field == "loss")  # the untrained loss would flatten the rest
    values = np.array([[row[field] for row in rows] for rows in seeds])[:, start:]
    steps = [row["step"] for row in seeds[0]]
    few = max(1, len(steps) // 6)  # markers: colour alone does not tell many models apart
    color, marker = _style(number)
    band: dict[str, Any] = {"color": color, "alpha": 0.15, "lw": 0}
    line: dict[str, Any] = {"color": color, "marker": marker, "ms": 4}
    line["markevery"] = (number % few, few)
    axis.fill_between(steps[start:], values.min(0), values.max(0), **band)
    axis.plot(steps[start:], values.mean(0), label=name, **line)


def _legend(figure: Any, axis: Any, title: str) -> None:
    """One legend for all panels, of the lines in ``axis``, above them."""
    handles, names = axis.get_legend_handles_labels()
    figure.suptitle(title, y=1.0)
    figure.legend(
        handles,
        names,
        frameon=False,
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        ncols=min(4, len(names)),
    )
