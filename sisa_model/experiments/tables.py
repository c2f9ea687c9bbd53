"""The paper's tables, ours beside what it published, and tables of what it has no figure of."""

import itertools
from typing import Any, NamedTuple

import numpy as np

from sisa_model.evaluation.needles import NIAH_LENGTH
from sisa_model.evaluation.statistics import wilson
from sisa_model.experiments import published as paper
from sisa_model.experiments.results import NEEDLES_BY_PART, Accuracy, Results
from sisa_model.experiments.study import PAPER
from sisa_model.models.flops import training_flops
from sisa_model.models.presets import PRESETS, Preset, Scale, preset_config
from sisa_model.reporting.tables import spread

MISSING = "missing"
UNPUBLISHED = "-"
TITLES = {
    "lambada": "LAMBADA",
    "niah": "NIAH",
    "hellaswag": "HellaSwag",
    "arc_easy": "ARC-Easy",
    "winogrande": "WinoGrande",
}
SCALES: tuple[Scale, ...] = ("50m", "152m", "369m")
BASELINE = "transformer-152m"
SEQ_LEN = 2048  # of the paper's training

Models = dict[str, list[Results]]  # runs by their row


class Cell(NamedTuple):
    """Ours, and what was published: None where the table has nothing to compare."""

    ours: str
    published: str | None = None
    formula: bool = False
    """Ours is computed, not measured."""

    @property
    def measured(self) -> bool:
        return self.ours != MISSING and not self.formula

    def __str__(self) -> str:
        return self.ours if self.published is None else f"{self.ours} / {self.published}"


class Table(NamedTuple):
    """A table of the report; a row is its label and its cells."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, list[Cell]]]


def tables(results: list[Results], show_missing: bool = False) -> list[Table]:
    """The report's tables: the runs, the paper's tables, and what the paper has no figure of.

    Without ``show_missing`` only rows and columns, and tables, that have something measured."""
    models: Models = {}
    for run in results:
        models.setdefault(run.model, []).append(run)
    found = [
        _listing(results),
        _main_table(models),
        *(_by_step(models, task, curves) for task, curves in paper.BY_STEP.items()),
        _by_length(models),
        _scaling(models),
        _widths(models),
        _throughput(models),
        *_unpublished(models),
        *(table for task in NEEDLES_BY_PART for table in _by_part(models, task)),
    ]
    return found if show_missing else [x for table in found if (x := _measured(table)).rows]


def _measured(table: Table) -> Table:
    """``table`` without the rows and the columns that nothing was measured of, the rest empty."""
    rows = [(label, cells) for label, cells in table.rows if any(cell.measured for cell in cells)]
    kept = [
        any(cells[n].measured or cells[n].formula for _, cells in rows)
        for n in range(len(table.columns))
    ]
    columns = tuple(itertools.compress(table.columns, kept))
    shown = [
        (label, [Cell("") if x.ours == MISSING else x for x in itertools.compress(cells, kept)])
        for label, cells in rows
    ]
    return Table(table.title, columns, shown)


def _listing(results: list[Results]) -> Table:
    columns = (
        "model",
        "seed",
        "step",
        "tokens",
        "held-out loss, nats a token",
        "tokens/s",
        "the paper's protocol in",
        "commit",
    )
    rows = []
    for run in results:
        train = run.train
        step = f"{run.step:,}" if run.step == train.steps else f"{run.step:,} of {train.steps:,}"
        tokens = f"{run.step * train.batch_size * train.seq_len:,}"
        loss = MISSING if run.loss is None else f"{run.loss:.3f}"
        rate = _number([run.rate] if run.rate else [])
        cells = (
            run.model,
            str(train.seed),
            step,
            tokens,
            loss,
            rate,
            run.dtypes or MISSING,
            run.commit,
        )
        rows.append((run.name, [Cell(text) for text in cells]))
    return Table("Runs", columns, rows)


def _main_table(models: Models) -> Table:
    published = [run.name for run in PAPER["152m"] if run.name in paper.RESULTS]
    names = sorted(published, key=list(paper.RESULTS).index)
    rows = [(name, [_final(models, name, task) for task in TITLES]) for name in names]
    return Table("Main table, 152M", tuple(TITLES.values()), rows)


def _by_step(models: Models, task: str, curves: tuple[paper.Curve, ...]) -> Table:
    """Accuracy in ``task`` at the steps that were published."""
    rows = []
    for curve in curves:
        runs = _runs_of(models, curve)
        cells = []
        for step, value in curve.points.items():
            found = [run.tasks[task][step] for run in runs if step in run.tasks.get(task, {})]
            cells.append(Cell(_accuracy(found, {step}), _published(value)))
        rows.append((_label(curve), cells))
    return Table(f"{TITLES[task]} by step, 152M", _numbers(curves[0].points), rows)


def _by_length(models: Models) -> Table:
    """Final accuracy in the authors' needle test at the lengths that were published.

    Ours is of 512 tokens alone: the script behind the other lengths is not published."""
    curves = paper.NIAH_BY_LENGTH
    rows = []
    for curve in curves:
        found = [_last(run.tasks["niah"]) for run in _runs_of(models, curve) if "niah" in run.tasks]
        cells = []
        for length, value in curve.points.items():
            at_length = found if length == NIAH_LENGTH else []
            cells.append(Cell(_accuracy(at_length, {paper.STEPS}), _published(value)))
        rows.append((_label(curve), cells))
    return Table("NIAH by length, 152M", _numbers(curves[0].points), rows)


def _scaling(models: Models) -> Table:
    scaled: list[tuple[str, Scale]]
    scaled = [(task, scale) for task in ("lambada", "niah") for scale in SCALES]
    rows = []
    for preset in _main_presets():
        label = preset.name.replace(f"-{preset.scale}", "")
        rows.append((label, _scaled(models, preset, scaled)))
    return Table("Scaling", _scaled_titles(scaled), rows)


def _widths(models: Models) -> Table:
    scaled: list[tuple[str, Scale]] = [(task, "152m") for task in TITLES]
    scaled += [("lambada", "50m"), ("lambada", "369m")]
    rows = [
        (f"d_s {preset.model.d_state}", _scaled(models, preset, scaled))
        for preset in _main_presets()
        if preset.family == "sisa"
    ]
    return Table("Width of the importance channel, d_s", _scaled_titles(scaled), rows)


def _main_presets() -> list[Preset]:
    """The presets of the main table, each as it is: trained with settings of its own, no other."""
    studied = {run.name: run for run in PAPER["152m"] if not run.settings}
    return [studied[name].preset for name in paper.RESULTS if name in studied]


def _scaled(models: Models, preset: Preset, scaled: list[tuple[str, Scale]]) -> list[Cell]:
    """The final cells of the preset's like at each (task, scale)."""
    likes = {x.scale: x.name for x in PRESETS.values() if _kind(x) == _kind(preset)}
    return [_final(models, likes[scale], task) for task, scale in scaled]


def _kind(preset: Preset) -> tuple[str, str, int]:
    """What a preset shares with its likes of other scales."""
    return preset.family, preset.variant, preset.model.d_state


def _scaled_titles(scaled: list[tuple[str, Scale]]) -> tuple[str, ...]:
    return tuple(f"{TITLES[task]} {scale.upper()}" for task, scale in scaled)


def _throughput(models: Models) -> Table:
    """Training throughput at 152M, and FLOPs a token.

    Relative to the Transformer, as the machines differ."""
    measured = {name: runs for name, runs in models.items() if runs[0].scale == "152m"}
    rates = {name: [run.rate for run in runs if run.rate] for name, runs in measured.items()}
    base = rates.get(BASELINE)
    rows = []
    for name in dict.fromkeys((*paper.TOKENS_PER_S, *rates)):
        ours = rates.get(name, [])
        published = paper.TOKENS_PER_S.get(name)
        relative = f"{np.mean(ours) / np.mean(base):.2f}" if ours and base else MISSING
        known = None if published is None else published / paper.TOKENS_PER_S[BASELINE]
        config = measured[name][0].config if name in measured else preset_config(name)
        flops = training_flops(config, SEQ_LEN) / training_flops(preset_config(BASELINE), SEQ_LEN)
        known_flops = paper.FLOPS_RATIO if name == "sisa-152m-ds32" else None
        cells = [
            Cell(_number(ours), UNPUBLISHED if published is None else f"{published:,}"),
            Cell(relative, _published(known, 2)),
            Cell(f"{flops:.2f}", _published(known_flops, 2), formula=True),
        ]
        rows.append((name, cells))
    columns = (
        "tokens/s, median",
        "relative to the Transformer",
        "FLOPs a token by formula, relative",
    )
    title = "Training throughput, 152M (relative figures hold for runs on one machine)"
    return Table(title, columns, rows)


def _unpublished(models: Models) -> list[Table]:
    """A table of final accuracies in whatever the paper has no figure of, if there are any."""
    found: dict[str, dict[str, list[Accuracy]]] = {}
    for run in (run for runs in models.values() for run in runs):
        for title, by_step in _beyond_the_paper(run).items():
            found.setdefault(run.model, {}).setdefault(title, []).append(_last(by_step))
    if not found:
        return []
    columns = tuple(dict.fromkeys(title for accuracies in found.values() for title in accuracies))
    rows = []
    for model, accuracies in found.items():
        ends = {run.train.steps for run in models[model]}
        cells = [Cell(_accuracy(accuracies.get(title, []), ends)) for title in columns]
        rows.append((model, cells))
    return [Table("What the paper has no figure of", columns, rows)]


def _beyond_the_paper(run: Results) -> dict[str, dict[int, Accuracy]]:
    """By title, a run's accuracies by step in tasks that were not published of its model."""
    tasks = paper.RESULTS.get(run.model, {})
    return {TITLES.get(task, task): x for task, x in run.tasks.items() if task not in tasks}


def _by_part(models: Models, task: str) -> list[Table]:
    """A needle test by length, by depth and, of a grid, by both; a row a run."""
    runs = [run for runs in models.values() for run in runs if task in run.needles]
    found = [_part(runs, task, part) for part in ("length", "depth")]
    grids = [_grid(run) for run in runs if task == "needle_grid"]
    return [table for table in found if table.columns] + grids


def _part(runs: list[Results], task: str, part: str) -> Table:
    shares = {run.name: _shares(run.needles[task], part) for run in runs}
    keys = sorted({key for by_key in shares.values() for key in by_key})
    rows = []
    for run in runs:
        found = [[shares[run.name][key]] if key in shares[run.name] else [] for key in keys]
        rows.append((run.name, [Cell(_accuracy(x, {run.train.steps})) for x in found]))
    prompts = [run.needles[task].get("tokens_by_length", {}) for run in runs]
    unit = "tokens" if part == "length" else "share of the filler before the needle"
    return Table(
        f"{task} by {part} ({unit})", tuple(_part_title(part, key, prompts) for key in keys), rows
    )


def _part_title(part: str, key: float, prompts: list[dict[str, list[int]]]) -> str:
    """A length or depth; of the authors' nominal lengths with those that prompts have."""
    ranges = [x[f"{key:g}"] for x in prompts if f"{key:g}" in x] if part == "length" else []
    if not ranges:
        return f"{key:,g}"
    least, most = min(ranges)[0], max(x[1] for x in ranges)
    real = f"{least:,}" if least == most else f"{least:,} to {most:,}"
    return f"{key:,g} (really {real})"


def _shares(row: dict[str, Any], part: str) -> dict[float, Accuracy]:
    """A needle test's accuracy at each length or depth; its interval where counts are known."""
    counts = row.get(f"count_by_{part}", {})
    found = {}
    for key, share in row.get(f"by_{part}", {}).items():
        count = counts.get(key)
        low, high = wilson(round(share * count), count) if count else (None, None)
        edges = [None if edge is None else 100 * edge for edge in (low, high)]
        found[float(key)] = Accuracy(100 * share, row["step"], *edges)
    return found


def _grid(run: Results) -> Table:
    """The share of each depth and length, of one run."""
    row = run.needles["needle_grid"]
    shares = zip(row["depths"], row["by_depth_and_length"])
    rows = [(f"{depth:g}", [Cell(f"{100 * x:.0f}") for x in line]) for depth, line in shares]
    columns = tuple(f"{length:,}" for length in row["lengths"])
    return Table(f"needle_grid, {run.name}: depth by length in tokens", columns, rows)


def _final(models: Models, model: str, task: str) -> Cell:
    """A model's final accuracy in a task beside the published one."""
    found = [_last(run.tasks[task]) for run in models.get(model, ()) if run.tasks.get(task)]
    published = paper.RESULTS.get(model, {}).get(task)
    return Cell(_accuracy(found, {paper.STEPS}), _published(published))


def _runs_of(models: Models, curve: paper.Curve) -> list[Results]:
    return [run for preset in curve.presets for run in models.get(preset, ())]


def _label(curve: paper.Curve) -> str:
    return curve.name if len(curve.presets) == 1 else f"{curve.name}, every d_s together"


def _numbers(points: dict[int, float]) -> tuple[str, ...]:
    return tuple(f"{point:,}" for point in points)


def _last(by_step: dict[int, Accuracy]) -> Accuracy:
    return by_step[max(by_step)]


def _accuracy(found: list[Accuracy], expected: set[int]) -> str:
    """Mean and range of several accuracies, or one with its interval.

    With the steps where they aren't the ``expected`` ones."""
    if not found:
        return MISSING
    text = spread([accuracy.value for accuracy in found], "{:.1f}")
    first = found[0]
    if len(found) == 1 and first.low is not None and first.high is not None:
        text += f" [{first.low:.1f}, {first.high:.1f}]"
    steps = {accuracy.step for accuracy in found}
    if steps <= expected:
        return text
    ends = " to ".join(f"{step:,}" for step in sorted({min(steps), max(steps)}))
    return f"{text} at step {ends}"


def _number(values: list[float]) -> str:
    return spread(values, "{:,.0f}") if values else MISSING


def _published(value: float | None, digits: int = 1) -> str:
    return UNPUBLISHED if value is None else f"{value:.{digits}f}"
