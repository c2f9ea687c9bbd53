"""sisa plot: run folders against each other, and against the paper's curves."""

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import tyro

from sisa_model.evaluation.records import read_evaluations
from sisa_model.experiments import published as paper
from sisa_model.models.presets import find_preset
from sisa_model.reporting.figures import (
    COLORS,
    HEALTH,
    LOGARITHMIC,
    SHARES,
    Rows,
    health_fields,
    save_figure,
)
from sisa_model.runs.folder import read_run
from sisa_model.runs.log import read_rows

log = logging.getLogger(__name__)

TRAIN_PANELS = {
    "loss": "training loss, nats a token",
    "lr": "learning rate",
    "grad_norm": "gradient norm",
    "tokens_per_s": "tokens/s",
    "mfu": "model FLOP utilisation",
    "peak_memory_mib": "peak memory, MiB",
}
POINTS = 300  # of a training curve: each the mean of as many steps as it takes


@dataclass(frozen=True, kw_only=True)
class PlotConfig:
    """Draw runs of `sisa train` against each other.

    Losses, learning rate, gradient norm, throughput, tasks and SISA's health. Accuracies of
    RUN/eval.jsonl (rows of "step", "task", "protocol", "accuracy") are drawn too: those of a 152M
    model on niah and lambada, by the paper's protocol, beside its curves by step, dashed."""

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
    steps: int = 0
    """Of the whole run."""
    tokens: str = ""
    """What its tokens are, as :func:`token_kind` has it."""


class Line(NamedTuple):
    """One curve of a panel; ``low`` and ``high`` are the edges of its band, where it has one.

    ``run`` < 0: the paper's."""

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
    runs = [read_rows_of(folder, name) for name, folder in name_runs(config.runs)]
    for run, folder in zip(runs, config.runs):
        if not (run.train or run.val):
            raise ValueError(f"runs: {folder} holds no step yet")
    if warning := incomparable({run.name: run.tokens for run in runs}):
        log.warning(warning)
    config.out.parent.mkdir(parents=True, exist_ok=True)
    _draw(config.out, runs)
    log.info(f"figure: {config.out}")
    return config.out


def name_runs(runs: tuple[Path, ...]) -> list[tuple[str, Path]]:
    """What to call each run folder, and its whole path.

    That is its name, or where two have the same, the path as given. Raises ValueError for no run
    and for one named twice."""
    folders = [folder.resolve() for folder in runs]
    if not folders or len(set(folders)) < len(folders):
        raise ValueError(
            f"runs must name at least one run folder, each once, got {' '.join(map(str, runs))}"
        )
    unique = len({folder.name for folder in folders}) == len(folders)
    return [(folder.name if unique else str(given), folder) for folder, given in zip(folders, runs)]


def read_rows_of(folder: Path, name: str) -> RunRows:
    """What the run in ``folder`` has logged; raises as :func:`read_run` does."""
    record = read_run(folder)
    train, val = (read_rows(folder / f"{rows}.jsonl") for rows in ("train", "val"))
    return RunRows(
        name=name,
        preset=record.train.preset,
        train=train,
        val=val,
        evals=read_evaluations(folder),
        steps=record.train.steps,
        tokens=record.token_kind,
    )


def incomparable(kinds: dict[str, str]) -> str:
    """That losses a token do not compare, of runs whose tokens, by name, are not alike; or ""."""
    if len(set(kinds.values())) < 2:
        return ""
    told = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
    return f"losses a token do not compare, as the runs' tokens differ: {told}"


def panels(runs: list[RunRows]) -> dict[str, list[Line]]:
    """The curves of each panel by its title, in order.

    A panel that no run has anything for is left out."""
    every = list(enumerate(runs))
    fields = [field for run in runs for row in run.val[:1] for field in row]
    accuracies = dict.fromkeys(field for field in fields if field.endswith("_accuracy"))
    evaluated = dict.fromkeys(row["task"] for run in runs for row in run.evals)

    unlike = ", of tokens that differ" if len({run.tokens for run in runs}) > 1 else ""
    found: dict[str, list[Line]] = {}
    # A held-out curve begins after step 0: the untrained loss would flatten the rest.
    found[f"held-out loss, nats a token{unlike}"] = [
        _line(n, run.name, [row for row in run.val if row["step"] > 0], "loss") for n, run in every
    ]
    for field, title in TRAIN_PANELS.items():
        title += unlike if field == "loss" else ""
        found[title] = [_thinned(_line(n, run.name, run.train, field)) for n, run in every]
    for field in accuracies:
        title = f"{field.removesuffix('_accuracy')} accuracy"
        found[title] = [_line(n, run.name, run.val, field) for n, run in every]
    for task in evaluated:
        found[f"{task} accuracy, evaluated"] = _evaluated(runs, task)
    for field, title in HEALTH.items():
        title = f"{title} (mean, least and greatest of the layers)"
        found[title] = [_health(n, run, field) for n, run in every]
    drawn = {title: [line for line in lines if len(line.steps)] for title, lines in found.items()}
    return {title: lines for title, lines in drawn.items() if lines}


def _evaluated(runs: list[RunRows], task: str) -> list[Line]:
    """The runs' accuracies in ``task`` by step, then the paper's, which are of 152M models."""
    lines = []
    for number, run in enumerate(runs):
        rows = [row for row in run.evals if row["task"] == task]
        lines.append(_line(number, run.name, sorted(rows, key=lambda x: x["step"]), "accuracy"))
    if any(find_preset(run.preset).scale == "152m" for run in runs):
        for curve in paper.BY_STEP.get(task, ()):
            points = np.array(list(curve.points.items()))
            lines.append(Line(-1, f"paper: {curve.name}", points[:, 0], points[:, 1] / 100))
    return lines


def _line(number: int, name: str, rows: Rows, field: str) -> Line:
    rows = [row for row in rows if row.get(field) is not None]
    steps = np.array([row["step"] for row in rows])
    return Line(number, name, steps, np.array([row[field] for row in rows], float))


def _thinned(line: Line) -> Line:
    count = math.ceil(len(line.steps) / POINTS)
    if count <= 1:
        return line
    starts = np.arange(0, len(line.steps), count)
    sizes = np.diff([*starts, len(line.steps)])
    steps, values = (np.add.reduceat(x, starts) / sizes for x in (line.steps, line.values))
    return line._replace(steps=steps, values=values)


def _health(number: int, run: RunRows, field: str) -> Line:
    rows = [row for row in run.val if row.get("layers")]
    if not rows or field not in health_fields(rows):
        return Line(number, run.name, (), ())
    steps = [row["step"] for row in rows]
    layers = np.array([[np.mean(layer[field]) for layer in row["layers"]] for row in rows])
    return Line(number, run.name, steps, layers.mean(1), layers.min(1), layers.max(1))


def _draw(path: Path, runs: list[RunRows]) -> None:
    found = panels(runs)
    places = len(found) + 1  # one more than the panels, for the legend
    columns = min(3, places)
    height = math.ceil(places / columns)
    size = (4.6 * columns, 3.2 * height)
    figure, axes = plt.subplots(height, columns, figsize=size, squeeze=False)
    for axis in axes.flat[len(found) :]:
        axis.set_axis_off()
    for axis, (title, lines) in zip(axes.flat, found.items()):
        draw_panel(axis, title, lines)
    draw_legend(axes.flat[len(found)], runs, found)
    save_figure(figure, path)


def draw_legend(axis: Any, runs: list[RunRows], panels: dict[str, list[Line]]) -> None:
    """Which run has which line; a run may be missing from any one panel."""
    drawn = {line.run for lines in panels.values() for line in lines}
    handles = [
        axis.plot([], [], label=run.name, **run_style(number))[0]
        for number, run in enumerate(runs)
        if number in drawn
    ]
    axis.set_axis_off()
    axis.legend(handles=handles, loc="center", frameon=False)


def run_style(run: int) -> dict[str, Any]:
    """Colour, dashes and width of the line of a run, by its number."""
    return {
        "color": COLORS[run % len(COLORS)],
        "ls": ("-", ":", "-.")[run // len(COLORS) % 3],
        "lw": 1.2,
    }


def draw_panel(axis: Any, title: str, lines: list[Line]) -> None:
    """The runs' curves, and the paper's dashed, with a legend of their own."""
    axis.set(xlabel="step", title=title)
    if "accuracy" in title:
        axis.set_ylim(*SHARES)
    logarithmic = tuple({**TRAIN_PANELS, **HEALTH}[field] for field in LOGARITHMIC)
    if title.startswith(logarithmic):
        axis.set_yscale("log")
    papers = [line.label for line in lines if line.run < 0]
    dashed = {"color": "0.45", "ls": "--", "lw": 1, "ms": 3, "mfc": "none"}
    for line in lines:
        if line.run < 0:
            shape = "os^v"[papers.index(line.label) % 4]
            axis.plot(line.steps, line.values, marker=shape, label=line.label, **dashed)
            continue
        style = run_style(line.run)
        marker = "o" if len(line.steps) < 30 else None
        axis.plot(line.steps, line.values, marker=marker, ms=2.5, label=line.label, **style)
        if line.low is not None:
            band = {"color": style["color"], "alpha": 0.12, "lw": 0}
            axis.fill_between(line.steps, line.low, line.high, **band)
    if papers:
        axis.legend(frameon=False, fontsize=6)
