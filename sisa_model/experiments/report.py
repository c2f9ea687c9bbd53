"""sisa report: runs and their evaluations in the paper's tables, ours beside what it published."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tyro

from sisa_model.evaluation.needles import NIAH_LENGTH
from sisa_model.evaluation.records import read_evaluations
from sisa_model.experiments import published as paper
from sisa_model.experiments.plot_runs import name_runs
from sisa_model.experiments.study import PAPER
from sisa_model.models.config import ModelConfig
from sisa_model.models.flops import training_flops
from sisa_model.models.presets import PRESETS, Preset, Scale, find_preset, preset_config
from sisa_model.reporting.figures import plot_tables
from sisa_model.reporting.tables import markdown, spread
from sisa_model.runs.config import ResolvedConfig
from sisa_model.runs.folder import read_run
from sisa_model.runs.log import read_rows
from sisa_model.utils.files import write_text

log = logging.getLogger(__name__)

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
NOTE = (
    f'Cells are ours / published ({paper.SOURCE}). "{MISSING}": not measured by these runs; '
    f'"{UNPUBLISHED}": not published.\n'
    "Accuracies in percent, with their 95 % interval in brackets; several runs of one model: mean "
    "(minimum to maximum).\n"
    f"Figures of another step than a finished paper run's ({paper.STEPS:,}) name it."
)


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Set runs and their evaluations into the paper's tables, beside its figures.

    Writes OUT/report.md, and its tables drawn in OUT/report.png. Runs are known by preset: models
    of 50m, 152m and 369m fill the paper's tables (a ds32 trained with lambda-lr-scale 0 is its
    frozen lambda), what the paper has no figure of stands in a table of its own. Several runs of a
    preset are its seeds."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders of `sisa train`, finished or not, evaluated (`sisa eval`) or not."""
    out: Path = Path("runs/report")
    """Folder of the report, whose files are replaced if they exist."""


class Accuracy(NamedTuple):
    """An accuracy in percent, the step it was measured at, and its interval where it has one."""

    value: float
    step: int
    low: float | None = None
    high: float | None = None


class Results(NamedTuple):
    """What a run folder came to."""

    name: str
    model: str
    """Its row in the tables: the preset, what a shape of one's own changes, "-frozen" lambda."""
    scale: Scale
    config: ModelConfig
    train: ResolvedConfig
    step: int
    loss: float | None
    """Held-out loss at the last evaluation, nats a token."""
    rate: float | None
    """Median training throughput, tokens/s."""
    commit: str
    tasks: dict[str, dict[int, Accuracy]]
    """Task -> step -> accuracy, of RUN/eval.jsonl and of the retrieval tasks in RUN/val.jsonl."""
    niah: dict[int, dict[int, Accuracy]]
    """Length of the authors' needle test -> step -> accuracy."""


Models = dict[str, list[Results]]  # runs by their row


class Cell(NamedTuple):
    """Ours, and what was published: None where the table has nothing to compare."""

    ours: str
    published: str | None = None

    def __str__(self) -> str:
        return self.ours if self.published is None else f"{self.ours} / {self.published}"


class Table(NamedTuple):
    """A table of the report; a row is its label and its cells."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, list[Cell]]]


def report(config: ReportConfig) -> Path:
    """Write the report, log it, and return its Markdown file.

    Raises ValueError for no run, one named twice or a row of RUN/eval.jsonl that is no evaluation,
    and as :func:`sisa_model.runs.folder.read_run` does for a folder that is no run."""
    results = [collect(folder, name) for name, folder in name_runs(config.runs)]
    found = tables(results)
    parts = ["# Report", "", NOTE, ""]
    drawn = []
    for title, columns, rows in found:
        parts += [f"## {title}", "", markdown(("", *columns), [(x, *cells) for x, cells in rows])]
        drawn.append((title, columns, [[label, *map(str, cells)] for label, cells in rows]))
    text = "\n".join(parts)
    page = config.out / "report.md"
    picture = config.out / "report.png"
    config.out.mkdir(parents=True, exist_ok=True)
    write_text(page, text)
    plot_tables(picture, NOTE, drawn, MISSING)
    log.info(f"{text}\nreport: {page}, {picture}")
    if names := [run.name for run in results if _only_harness(run)]:
        log.info(
            f"only protocol harness: {', '.join(names)}; the paper's tables take protocol paper: "
            "sisa eval RUN --protocol paper --data-dir FOLDER"
        )
    return page


def _only_harness(run: Results) -> bool:
    """Whether a task of the paper's tables was measured, and by the harness alone."""
    return any(f"{task} (harness)" in run.tasks and task not in run.tasks for task in TITLES)


def collect(folder: Path, name: str) -> Results:
    """Read a run folder, called ``name``; raises as :func:`report` does."""
    record = read_run(folder)
    training = read_rows(folder / "train.jsonl")
    val = read_rows(folder / "val.jsonl")
    tasks: dict[str, dict[int, Accuracy]] = {}
    niah: dict[int, dict[int, Accuracy]] = {}
    for row in val:
        step = row["step"]
        for field in (field for field in row if field.endswith("_accuracy")):
            accuracy = Accuracy(100 * row[field], step)
            tasks.setdefault(field.removesuffix("_accuracy"), {})[step] = accuracy
    for row in read_evaluations(folder):
        low, high = (None if row.get(edge) is None else 100 * row[edge] for edge in ("low", "high"))
        accuracy = Accuracy(100 * row["accuracy"], row["step"], low, high)
        lengths = _lengths(row)
        for length, at in lengths.items():
            niah.setdefault(length, {})[accuracy.step] = at or accuracy
        if row["task"] != "niah" or NIAH_LENGTH in lengths:
            tasks.setdefault(row["task"], {})[accuracy.step] = accuracy
    rates = [row["tokens_per_s"] for row in training]
    return Results(
        name=name,
        model=_row_of(record.train),
        scale=find_preset(record.train.preset).scale,
        config=preset_config(record.train.preset, **record.train.model),
        train=record.train,
        step=training[-1]["step"] if training else 0,
        loss=val[-1]["loss"] if val else None,
        rate=float(np.median(rates)) if rates else None,
        commit=record.versions.get("commit", "unknown"),
        tasks=tasks,
        niah=niah,
    )


def _row_of(train: ResolvedConfig) -> str:
    """The row of the paper's tables that a run belongs to, or a row of its own."""
    frozen = find_preset(train.preset).family == "sisa" and train.lambda_lr_scale == 0
    name = f"{train.preset}-frozen" if frozen else train.preset
    changes = [f"{field} {value}" for field, value in train.model.items()]
    return f"{name} with {', '.join(changes)}" if changes else name


def _lengths(row: dict[str, Any]) -> dict[int, Accuracy | None]:
    """The lengths of the authors' needle test that a row holds, with their accuracy.

    None: the row's own."""
    if row["task"] not in ("niah", "niah_long"):
        return {}
    by_length = row.get("by_length", {row.get("length", NIAH_LENGTH): None})
    if len(by_length) == 1:
        return {int(length): None for length in by_length}
    return {int(length): Accuracy(100 * value, row["step"]) for length, value in by_length.items()}


def tables(results: list[Results]) -> list[Table]:
    """The report's tables: the runs, the paper's tables, and what the paper has no figure of."""
    models: Models = {}
    for run in results:
        models.setdefault(run.model, []).append(run)
    return [
        _listing(results),
        _main_table(models),
        *(_by_step(models, task, curves) for task, curves in paper.BY_STEP.items()),
        _by_length(models),
        _scaling(models),
        _widths(models),
        _throughput(models),
        *_unpublished(models),
    ]


def _listing(results: list[Results]) -> Table:
    columns = (
        "model",
        "seed",
        "step",
        "tokens",
        "held-out loss, nats a token",
        "tokens/s",
        "commit",
    )
    rows = []
    for run in results:
        train = run.train
        step = f"{run.step:,}" if run.step == train.steps else f"{run.step:,} of {train.steps:,}"
        tokens = f"{run.step * train.batch_size * train.seq_len:,}"
        loss = MISSING if run.loss is None else f"{run.loss:.3f}"
        rate = _number([run.rate] if run.rate else [])
        cells = (run.model, str(train.seed), step, tokens, loss, rate, run.commit)
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
    """Final accuracy in the authors' needle test at the lengths that were published."""
    curves = paper.NIAH_BY_LENGTH
    rows = []
    for curve in curves:
        runs = _runs_of(models, curve)
        cells = []
        for length, value in curve.points.items():
            found = [_last(run.niah[length]) for run in runs if length in run.niah]
            cells.append(Cell(_accuracy(found, {paper.STEPS}), _published(value)))
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
            Cell(f"{flops:.2f}", _published(known_flops, 2)),
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
    """By title, a run's accuracies by step in tasks and at lengths that were not published."""
    tasks = paper.RESULTS.get(run.model, {})
    lengths = {NIAH_LENGTH}
    for curve in paper.NIAH_BY_LENGTH:
        if run.model in curve.presets:
            lengths |= curve.points.keys()
    found = {TITLES.get(task, task): x for task, x in run.tasks.items() if task not in tasks}
    for length, by_step in sorted(run.niah.items()):
        if length not in lengths:
            found[f"NIAH at {length:,}"] = by_step
    return found


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
