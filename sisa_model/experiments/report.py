"""sisa report: runs and their evaluations in the paper's tables, the published value beside ours in
every cell.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tyro

from sisa_model.evaluation.needles import LENGTH
from sisa_model.evaluation.statistics import read_evaluations
from sisa_model.experiments import published as paper
from sisa_model.experiments.plot_runs import name_runs
from sisa_model.models.config import ModelConfig
from sisa_model.models.flops import training_flops
from sisa_model.models.presets import D_STATES, preset_config
from sisa_model.reporting.figures import plot_tables
from sisa_model.reporting.tables import markdown, spread
from sisa_model.runs.config import TrainConfig
from sisa_model.runs.folder import read_run
from sisa_model.runs.log import read_rows
from sisa_model.utils.files import write_text

MISSING, UNPUBLISHED = "missing", "-"
TITLES = {
    "lambada": "LAMBADA",
    "niah": "NIAH",
    "hellaswag": "HellaSwag",
    "arc_easy": "ARC-Easy",
    "winogrande": "WinoGrande",
}
SCALES = ("50m", "152m", "369m")
BASELINE = "transformer-152m"
SEQ_LEN = 2048  # of the paper's training
NOTE = f"""Cells are ours / published ({paper.SOURCE}). "{MISSING}": not measured by these runs; "{UNPUBLISHED}": not published.
Accuracies in percent, with their 95 % interval in brackets; several runs of one model: mean (minimum to maximum).
Figures of another step than a finished paper run's ({paper.STEPS:,}) name it."""


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Set runs and their evaluations beside the paper's figures: OUT/report.md, and its tables
    drawn in OUT/report.png.

    Runs are known by preset: 152m, 50m and 369m models fill the paper's tables (a ds32 trained with
    lambda-lr-scale 0 is the paper's frozen lambda), what the paper has no figure of stands in a
    table of its own. Several runs of a preset are its seeds."""

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
    """Its row in the paper's tables: the preset, with "-frozen" for a lambda that could not move."""
    train: TrainConfig
    step: int
    loss: float | None
    """Held-out loss at the last evaluation, nats a token."""
    rate: float | None
    """Median training throughput, tokens/s."""
    commit: str
    tasks: dict[str, dict[int, Accuracy]]
    """Task -> step -> accuracy: RUN/eval.jsonl's, of equal steps the last, and the retrieval tasks
    of RUN/val.jsonl.
    """
    niah: dict[int, dict[int, Accuracy]]
    """Length of the authors' needle test -> step -> accuracy."""


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
    """Write the report and return its Markdown file.

    Raises ValueError for no run, one named twice or a row of RUN/eval.jsonl that is no evaluation,
    and as :func:`sisa_model.runs.folder.read_run` does for a folder that is no run."""
    results = [collect(folder, name) for name, folder in name_runs(config.runs)]
    found = tables(results)
    config.out.mkdir(parents=True, exist_ok=True)
    text = "\n".join(
        [
            "# Report",
            "",
            NOTE,
            "",
            *(
                line
                for t in found
                for line in (
                    f"## {t.title}",
                    "",
                    markdown(("", *t.columns), [(label, *cells) for label, cells in t.rows]),
                )
            ),
        ]
    )
    write_text(config.out / "report.md", text)
    drawn = [
        (t.title, t.columns, [[label, *map(str, cells)] for label, cells in t.rows]) for t in found
    ]
    plot_tables(config.out / "report.png", NOTE, drawn, MISSING)
    print(f"{text}\nreport: {config.out / 'report.md'}, {config.out / 'report.png'}")
    harness = {
        run.name: [
            task for task in TITLES if f"{task} (harness)" in run.tasks and task not in run.tasks
        ]
        for run in results
    }
    if names := [name for name, tasks in harness.items() if tasks]:
        measure = "sisa eval RUN --protocol paper --data-dir FOLDER"
        print(
            f"only protocol harness: {', '.join(names)}; the paper's tables take protocol paper: {measure}"
        )
    return config.out / "report.md"


def collect(folder: Path, name: str) -> Results:
    """Read a run folder, called ``name``; raises as :func:`report` does."""
    record = read_run(folder)
    train = record["train"]
    training, val = (read_rows(folder / f"{rows}.jsonl") for rows in ("train", "val"))
    tasks: dict[str, dict[int, Accuracy]] = {}
    niah: dict[int, dict[int, Accuracy]] = {}
    for row in val:
        for field in (field for field in row if field.endswith("_accuracy")):
            tasks.setdefault(field.removesuffix("_accuracy"), {})[row["step"]] = Accuracy(
                100 * row[field], row["step"]
            )
    for row in read_evaluations(folder):
        low, high = (None if row.get(edge) is None else 100 * row[edge] for edge in ("low", "high"))
        figure, lengths = Accuracy(100 * row["accuracy"], row["step"], low, high), _lengths(row)
        for length, at in lengths.items():
            niah.setdefault(length, {})[figure.step] = at or figure
        if row["task"] != "niah" or LENGTH in lengths:
            tasks.setdefault(row["task"], {})[figure.step] = figure
    frozen = train.preset.startswith("sisa") and train.lambda_lr_scale == 0
    return Results(
        name,
        train.preset + "-frozen" * frozen,
        train,
        training[-1]["step"] if training else 0,
        val[-1]["loss"] if val else None,
        float(np.median([row["tokens_per_s"] for row in training])) if training else None,
        record.get("versions", {}).get("commit", "unknown"),
        tasks,
        niah,
    )


def _lengths(row: dict[str, Any]) -> dict[int, Accuracy | None]:
    """The lengths of the authors' needle test that a row holds, with their accuracy; None: the
    row's own.
    """
    if row["task"] not in ("niah", "niah_long"):
        return {}
    by_length = row.get("by_length", {row.get("length", LENGTH): None})
    if len(by_length) == 1:
        return {int(length): None for length in by_length}
    return {int(length): Accuracy(100 * value, row["step"]) for length, value in by_length.items()}


def tables(results: list[Results]) -> list[Table]:
    """The report's tables: the runs, the paper's tables, and what the paper has no figure of."""
    models: dict[str, list[Results]] = {}
    for run in results:
        models.setdefault(run.model, []).append(run)

    def last(model: str, task: str) -> Cell:
        """A model's final figure in a task beside the published one."""
        figures = [_last(run.tasks[task]) for run in models.get(model, ()) if run.tasks.get(task)]
        return Cell(
            _accuracy(figures, {paper.STEPS}), _published(paper.RESULTS.get(model, {}).get(task))
        )

    def along(
        curve: paper.Curve, found: list[dict[int, dict[int, Accuracy]]], ends: set[int]
    ) -> list[Cell]:
        """The cells of a curve beside ``found``: of each run, by point, the figures by step; no
        ``ends``: the points are steps.
        """
        figures = {
            point: [_last(run[point]) for run in found if point in run] for point in curve.points
        }
        return [
            Cell(_accuracy(figures[point], ends or {point}), _published(value))
            for point, value in curve.points.items()
        ]

    def runs_of(curve: paper.Curve) -> list[Results]:
        return [run for preset in curve.presets for run in models.get(preset, ())]

    def label(curve: paper.Curve) -> str:
        return curve.name if len(curve.presets) == 1 else f"{curve.name}, every d_s together"

    main = [name for name in paper.RESULTS if "-152m" in name]
    found = [_listing(results)]
    found.append(
        Table(
            "Main table, 152M",
            tuple(TITLES.values()),
            [(name, [last(name, task) for task in TITLES]) for name in main],
        )
    )
    for task, curves in paper.BY_STEP.items():
        rows = []
        for curve in curves:
            by_step = [
                {step: {step: f} for step, f in run.tasks.get(task, {}).items()}
                for run in runs_of(curve)
            ]
            rows.append((label(curve), along(curve, by_step, set())))
        found.append(
            Table(
                f"{TITLES[task]} by step, 152M",
                tuple(f"{step:,}" for step in curves[0].points),
                rows,
            )
        )
    rows = [
        (label(curve), along(curve, [run.niah for run in runs_of(curve)], {paper.STEPS}))
        for curve in paper.NIAH_BY_LENGTH
    ]
    found.append(
        Table(
            "NIAH by length, 152M",
            tuple(f"{length:,}" for length in paper.NIAH_BY_LENGTH[0].points),
            rows,
        )
    )
    scaled = [(task, scale) for task in ("lambada", "niah") for scale in SCALES]
    families = [name for name in main if not name.endswith("-frozen")]
    found.append(
        Table(
            "Scaling",
            tuple(f"{TITLES[task]} {scale.upper()}" for task, scale in scaled),
            [
                (
                    name.replace("-152m", ""),
                    [last(name.replace("152m", scale), task) for task, scale in scaled],
                )
                for name in families
            ],
        )
    )
    ablation = [*((task, "152m") for task in TITLES), ("lambada", "50m"), ("lambada", "369m")]
    found.append(
        Table(
            "Width of the importance channel, d_s",
            tuple(f"{TITLES[task]} {scale.upper()}" for task, scale in ablation),
            [
                (f"d_s {n}", [last(f"sisa-{scale}-ds{n}", task) for task, scale in ablation])
                for n in D_STATES
            ],
        )
    )
    found.append(_throughput(models))
    return [*found, *_unpublished(models)]


def _listing(results: list[Results]) -> Table:
    rows = []
    for run in results:
        train, loss = run.train, MISSING if run.loss is None else f"{run.loss:.3f}"
        assert train.steps is not None
        assert train.batch_size is not None
        assert train.seq_len is not None
        step = f"{run.step:,}" if run.step == train.steps else f"{run.step:,} of {train.steps:,}"
        tokens, rate = (
            f"{run.step * train.batch_size * train.seq_len:,}",
            _number([run.rate] if run.rate else []),
        )
        rows.append(
            (
                run.name,
                [
                    Cell(x)
                    for x in (run.model, str(train.seed), step, tokens, loss, rate, run.commit)
                ],
            )
        )
    return Table(
        "Runs",
        ("model", "seed", "step", "tokens", "held-out loss, nats a token", "tokens/s", "commit"),
        rows,
    )


def _throughput(models: dict[str, list[Results]]) -> Table:
    """Training throughput at 152M; relative to the Transformer, as the machines differ, and so are
    the FLOPs a token.
    """
    rates = {
        name: [run.rate for run in runs if run.rate]
        for name, runs in models.items()
        if _scale(name) == "152m"
    }
    base, rows = rates.get(BASELINE), []
    for name in dict.fromkeys((*paper.TOKENS_PER_S, *rates)):
        ours, published = rates.get(name, []), paper.TOKENS_PER_S.get(name)
        relative = f"{np.mean(ours) / np.mean(base):.2f}" if ours and base else MISSING
        known = None if published is None else published / paper.TOKENS_PER_S[BASELINE]
        flops = _training_flops(name) / _training_flops(BASELINE)
        cells = [
            Cell(_number(ours), UNPUBLISHED if published is None else f"{published:,}"),
            Cell(relative, _published(known, 2)),
            Cell(
                f"{flops:.2f}",
                _published(paper.FLOPS_RATIO if name == "sisa-152m-ds32" else None, 2),
            ),
        ]
        rows.append((name, cells))
    columns = (
        "tokens/s, median",
        "relative to the Transformer",
        "FLOPs a token by formula, relative",
    )
    return Table(
        "Training throughput, 152M (relative figures hold for runs on one machine)", columns, rows
    )


def _training_flops(model: str) -> float:
    config: ModelConfig = preset_config(model.removesuffix("-frozen"))
    return training_flops(config, SEQ_LEN)


def _unpublished(models: dict[str, list[Results]]) -> list[Table]:
    """Final accuracies in whatever the paper has no figure of, by model and task; no table if there
    are none.
    """
    by_length = {
        (preset, length)
        for curve in paper.NIAH_BY_LENGTH
        for preset in curve.presets
        for length in curve.points
    }
    found: dict[str, dict[str, list[Accuracy]]] = {}
    for run in (run for runs in models.values() for run in runs):
        ours = {
            TITLES.get(task, task): at
            for task, at in run.tasks.items()
            if task not in paper.RESULTS.get(run.model, {})
        }
        beyond = {
            length: at
            for length, at in run.niah.items()
            if length != LENGTH and (run.model, length) not in by_length
        }
        for title, at in {
            **ours,
            **{f"NIAH at {length:,}": at for length, at in sorted(beyond.items())},
        }.items():
            found.setdefault(run.model, {}).setdefault(title, []).append(_last(at))
    if not found:
        return []
    columns = tuple(dict.fromkeys(title for figures in found.values() for title in figures))
    rows = []
    for model, figures in found.items():
        ends = {run.train.steps or 0 for run in models[model]}
        rows.append((model, [Cell(_accuracy(figures.get(title, []), ends)) for title in columns]))
    return [Table("What the paper has no figure of", columns, rows)]


def _scale(model: str) -> str | None:
    return next((scale for scale in SCALES if scale in model.split("-")), None)


def _last(figures: dict[int, Accuracy]) -> Accuracy:
    return figures[max(figures)]


def _accuracy(figures: list[Accuracy], expected: set[int]) -> str:
    """Mean and range of several figures, or one with its interval; with the steps where they aren't
    the ``expected`` ones.
    """
    if not figures:
        return MISSING
    values, steps = [figure.value for figure in figures], {figure.step for figure in figures}
    text = spread(values, "{:.1f}")
    if len(values) == 1 and figures[0].low is not None and figures[0].high is not None:
        text += f" [{figures[0].low:.1f}, {figures[0].high:.1f}]"
    return (
        text
        if steps <= expected
        else f"{text} at step {' to '.join(f'{step:,}' for step in sorted({min(steps), max(steps)}))}"
    )


def _number(values: list[float]) -> str:
    return spread(values, "{:,.0f}") if values else MISSING


def _published(value: float | None, digits: int = 1) -> str:
    return UNPUBLISHED if value is None else f"{value:.{digits}f}"
