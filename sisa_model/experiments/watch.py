"""sisa watch: one page of HTML about runs, redrawn while they go on."""

import datetime
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import tyro

from sisa_model.experiments.plot_runs import (
    RunRows,
    draw_panel,
    incomparable,
    name_runs,
    panels,
    read_rows_of,
    run_style,
)
from sisa_model.reporting.figures import health_figure
from sisa_model.reporting.page import HtmlTable, render, svg, swatch
from sisa_model.runs.folder import RECORD, SETTINGS, read_run
from sisa_model.utils.files import write_text
from sisa_model.utils.progress import duration

log = logging.getLogger(__name__)

RECENT = 20  # steps that speed and training loss are taken of


@dataclass(frozen=True, kw_only=True)
class WatchConfig:
    """Write a page about runs, and redraw it while they go on; Ctrl-C ends it.

    Losses, learning rate, throughput, tasks, SISA's lambda, half-lives and range of g, samples:
    one file of HTML that needs no network and opens from where it is."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders of `sisa train`, finished or not."""
    out: Path = Path("runs.html")
    """Page to write; one that exists is replaced."""
    every: float = 10.0
    """Seconds between two drawings; an open page looks anew as often."""
    once: bool = False
    """Draw once, and end."""


class RunState(NamedTuple):
    """How far a run is."""

    state: str
    step: int
    steps: int
    loss: float | None
    """Of training, the mean of the recent steps."""
    val_loss: float | None
    tokens_per_s: float | None
    """The median of the recent steps."""
    seconds_left: float | None


def watch(config: WatchConfig) -> Path:
    """Write ``config.out`` until every run is finished, and return it.

    Raises ValueError for ``every`` that is not above 0 and as
    :func:`sisa_model.experiments.plot_runs.name_runs` and
    :func:`sisa_model.runs.folder.read_run` do."""
    if not config.every > 0:
        raise ValueError(f"every must be above 0 seconds, got {config.every}")
    named = name_runs(config.runs)
    kinds = {name: read_run(folder).token_kind for name, folder in named}
    if warning := incomparable(kinds):
        log.warning(warning)
    config.out.parent.mkdir(parents=True, exist_ok=True)
    while True:
        finished = all((folder / "final").is_dir() for _, folder in named)
        done = finished or config.once
        write_text(config.out, runs_page(named, refresh=None if done else config.every))
        if done:
            log.info(f"page: {config.out}")
            return config.out
        time.sleep(config.every)


def runs_page(
    named: list[tuple[str, Path]],
    refresh: float | None = None,
    tables: Sequence[HtmlTable] = (),
    note: str = "",
) -> str:
    """The page about run folders by name, HTML; further ``tables`` stand under that of the runs.

    ``refresh``: seconds after which a browser looks anew."""
    runs = [read_rows_of(folder, name) for name, folder in named]
    states = [run_state(folder, run) for (_, folder), run in zip(named, runs)]
    warning = incomparable({run.name: run.tokens for run in runs})
    now = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
    return render(
        "runs.html",
        title=", ".join(name for name, _ in named) if len(named) < 4 else f"{len(named)} runs",
        note="\n".join(filter(None, (f"As of {now}.", warning, note))),
        tables=[_table(runs, states), *tables],
        panels=_panels(runs),
        runs=[_about(run, folder) for run, (_, folder) in zip(runs, named)],
        refresh=refresh,
    )


def run_state(folder: Path, run: RunRows) -> RunState:
    """How far the run in ``folder`` is, by its rows."""
    step = run.train[-1]["step"] if run.train else 0
    finished = (folder / "final").is_dir()
    recent = run.train[-RECENT:]
    losses = [row["loss"] for row in recent if row.get("loss") is not None]  # None: passed over
    speed = left = None
    if recent:
        speed = float(np.median([row["tokens_per_s"] for row in recent]))
        left = (
            None
            if finished
            else (run.steps - step) * recent[-1].get("tokens", 0) / max(speed, 1e-9)
        )
    return RunState(
        state="finished" if finished else "not finished",
        step=step,
        steps=run.steps,
        loss=float(np.mean(losses)) if losses else None,
        val_loss=run.val[-1].get("loss") if run.val else None,
        tokens_per_s=speed,
        seconds_left=left,
    )


def _table(runs: list[RunRows], states: list[RunState]) -> HtmlTable:
    columns = ("run", "preset", "state", "step", "training loss", "held-out loss", "tokens/s")
    rows: list[tuple[str, ...]] = []
    for number, (run, state) in enumerate(zip(runs, states)):
        cells = (
            swatch(**run_style(number)) + f" {run.name}",
            run.preset,
            state.state,
            f"{state.step:,} of {state.steps:,}",
            _number(state.loss, ".3f"),
            _number(state.val_loss, ".3f"),
            _number(state.tokens_per_s, ",.0f"),
            "" if state.seconds_left is None else duration(state.seconds_left),
        )
        rows.append(cells)
    return HtmlTable("", (*columns, "time left"), rows)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _panels(runs: list[RunRows]) -> list[Any]:
    """Each panel of `sisa plot` as SVG."""
    drawn = []
    for title, lines in panels(runs).items():
        figure, axis = plt.subplots(figsize=(4.6, 3.2), layout="constrained")
        draw_panel(axis, title, lines)
        drawn.append(svg(figure))
    return drawn


def _about(run: RunRows, folder: Path) -> dict[str, Any]:
    sample = folder / "sample.txt"
    settings = folder / SETTINGS
    if not settings.is_file():  # of a run of an early version
        settings = folder / RECORD
    has_health = bool(run.val and run.val[0].get("layers"))
    return {
        "name": run.name,
        "health": svg(health_figure("", run.val)) if has_health else None,
        "sample": sample.read_text(encoding="utf-8") if sample.is_file() else None,
        "settings": settings.read_text(encoding="utf-8"),
    }
