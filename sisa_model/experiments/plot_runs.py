"""sisa plot: any set of run folders against each other, and against the paper's curves where they
have what it measured.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import tyro

from sisa_model.evaluation.statistics import read_evaluations
from sisa_model.experiments import published as paper
from sisa_model.reporting.figures import COLORS, Rows, save_figure
from sisa_model.runs.folder import read_run
from sisa_model.runs.log import read_rows

TRAIN_PANELS = {
    "loss": "training loss, nats a token",
    "lr": "learning rate",
    "grad_norm": "gradient norm",
    "tokens_per_s": "tokens/s",
    "mfu": "model FLOP utilisation",
    "peak_memory_mib": "peak memory, MiB",
}
HEALTH_PANELS = {"lam": "lambda", "half_life": "half-life, tokens", "g_range": "range of g"}
LOG_SCALE = ("grad_norm", "half_life")
POINTS = 300  # of a training curve: each the mean of as many steps as it takes


@dataclass(frozen=True, kw_only=True)
class PlotConfig:
    """Draw runs of `sisa train` against each other: losses, learning rate, gradient norm,
    throughput, tasks, SISA's health.

    Accuracies of RUN/eval.jsonl (rows of "step", "task", "accuracy") are drawn too: those of a 152M
    model on niah and lambada beside the paper's curves by step, dashed."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders of `sisa train`, finished or not."""
    out: Path = Path("runs.png")
    """Picture to write, a .png; one that exists is replaced."""


class RunRows(NamedTuple):
    """What a run folder holds of its course."""

    name: str
    preset: str
    train: Rows
    val: Rows
    evals: Rows


class Line(NamedTuple):
    """One curve of a panel; ``low`` and ``high`` are the edges of its band, where it has one.
    ``run`` < 0: the paper's.
    """

    run: int
    label: str
    steps: Any
    values: Any
    low: Any = None
    high: Any = None


def plot_runs(config: PlotConfig) -> Path:
    """Draw the runs into ``config.out`` and return it.

    Raises ValueError for no run, one named twice, one without a row, a row of RUN/eval.jsonl that
    is no evaluation, or another suffix than .png, and as :func:`sisa_model.runs.folder.read_run`
    does for a folder that is no run."""
    if config.out.suffix != ".png":
        raise ValueError(f"out must be a .png file, got {config.out}")
    runs = [_read(folder, name) for name, folder in name_runs(config.runs)]
    config.out.parent.mkdir(parents=True, exist_ok=True)
    _draw(config.out, runs)
    print(f"figure: {config.out}")
    return config.out


def name_runs(runs: tuple[Path, ...]) -> list[tuple[str, Path]]:
    """What to call each run folder, and its whole path: its name, or where two have the same, the
    path as given.

    Raises ValueError for no run and for one named twice.
    """
    folders = [folder.resolve() for folder in runs]
    if not folders or len(set(folders)) < len(folders):
        raise ValueError(
            f"runs must name at least one run folder, each once, got {' '.join(map(str, runs))}"
        )
    unique = len({folder.name for folder in folders}) == len(folders)
    return [(folder.name if unique else str(given), folder) for folder, given in zip(folders, runs)]


def _read(folder: Path, name: str) -> RunRows:
    preset = read_run(folder)["train"].preset
    train, val = (read_rows(folder / f"{rows}.jsonl") for rows in ("train", "val"))
    if not (train or val):
        raise ValueError(f"runs: {folder} holds no step yet")
    return RunRows(name, preset, train, val, read_evaluations(folder))


def panels(runs: list[RunRows]) -> dict[str, list[Line]]:
    """The curves of each panel by its title, in order; a panel that no run has anything for is left
    out.
    """
    found: dict[str, list[Line]] = {}

    def add(title: str, line: Line) -> None:
        if len(line.steps):
            found.setdefault(title, []).append(line)

    # A held-out curve begins after step 0: the untrained loss would flatten the rest.
    for number, run in enumerate(runs):
        add(
            "held-out loss, nats a token",
            _line(number, run.name, [r for r in run.val if r["step"] > 0], "loss"),
        )
    for field, title in TRAIN_PANELS.items():
        for number, run in enumerate(runs):
            add(title, _thinned(_line(number, run.name, run.train, field)))
    tasks = [
        field for run in runs for row in run.val[:1] for field in row if field.endswith("_accuracy")
    ]
    for field in dict.fromkeys(tasks):
        for number, run in enumerate(runs):
            add(
                f"{field.removesuffix('_accuracy')} accuracy",
                _line(number, run.name, run.val, field),
            )
    for task in dict.fromkeys(row["task"] for run in runs for row in run.evals):
        for number, run in enumerate(runs):
            rows = sorted(
                (row for row in run.evals if row["task"] == task), key=lambda row: row["step"]
            )
            add(f"{task} accuracy, evaluated", _line(number, run.name, rows, "accuracy"))
        comparable = any("-152m" in run.preset for run in runs)
        for curve in paper.BY_STEP.get(task, ()) if comparable else ():
            points = np.array(list(curve.points.items()))
            add(
                f"{task} accuracy, evaluated",
                Line(-1, f"paper: {curve.name}", points[:, 0], points[:, 1] / 100),
            )
    for field, title in HEALTH_PANELS.items():
        for number, run in enumerate(runs):
            add(f"{title} (mean, least and greatest of the layers)", _health(number, run, field))
    return found


def _line(number: int, name: str, rows: Rows, field: str) -> Line:
    rows = [row for row in rows if row.get(field) is not None]
    return Line(
        number,
        name,
        np.array([row["step"] for row in rows]),
        np.array([row[field] for row in rows], float),
    )


def _thinned(line: Line) -> Line:
    count = math.ceil(len(line.steps) / POINTS)
    if count <= 1:
        return line
    starts = np.arange(0, len(line.steps), count)
    sizes = np.diff([*starts, len(line.steps)])
    steps, values = (np.add.reduceat(x, starts) / sizes for x in (line.steps, line.values))
    return line._replace(steps=steps, values=values)


def _health(number: int, run: RunRows, field: str) -> Line:
    rows = [row for row in run.val if row["layers"]]
    if not rows:
        return Line(number, run.name, (), ())
    layers = np.array([[np.mean(layer[field]) for layer in row["layers"]] for row in rows])
    return Line(
        number,
        run.name,
        [row["step"] for row in rows],
        layers.mean(1),
        layers.min(1),
        layers.max(1),
    )


def _draw(path: Path, runs: list[RunRows]) -> None:
    found = panels(runs)
    columns = min(3, len(found) + 1)
    height = math.ceil((len(found) + 1) / columns)  # one more than the panels, for the legend
    figure, axes = plt.subplots(
        height, columns, figsize=(4.6 * columns, 3.2 * height), squeeze=False
    )
    for axis in axes.flat[len(found) :]:
        axis.set_axis_off()
    for axis, (title, lines) in zip(axes.flat, found.items()):
        papers = [line.label for line in lines if line.run < 0]
        for line in lines:
            if line.run < 0:
                shape = "os^v"[papers.index(line.label) % 4]
                axis.plot(
                    line.steps,
                    line.values,
                    color="0.45",
                    ls="--",
                    lw=1,
                    marker=shape,
                    ms=3,
                    mfc="none",
                    label=line.label,
                )
                continue
            color = COLORS[line.run % len(COLORS)]
            style = ("-", ":", "-.")[line.run // len(COLORS) % 3]
            marker = "o" if len(line.steps) < 30 else None
            axis.plot(
                line.steps,
                line.values,
                color=color,
                ls=style,
                marker=marker,
                ms=2.5,
                lw=1.2,
                label=line.label,
            )
            if line.low is not None:
                axis.fill_between(line.steps, line.low, line.high, color=color, alpha=0.12, lw=0)
        axis.set(xlabel="step", title=title)
        if "accuracy" in title:
            axis.set_ylim(-0.03, 1.03)
        if any(title.startswith({**TRAIN_PANELS, **HEALTH_PANELS}[field]) for field in LOG_SCALE):
            axis.set_yscale("log")
        if papers:
            axis.legend(frameon=False, fontsize=6)
    # A run may be missing from any one panel.
    handles = {
        name: handle
        for axis in axes.flat
        for handle, name in zip(*axis.get_legend_handles_labels())
    }
    names = [run.name for run in runs if run.name in handles]
    axes.flat[len(found)].legend(
        [handles[name] for name in names], names, loc="center", frameon=False
    )
    save_figure(figure, path)
