"""sisa report: runs and their evaluations in the paper's tables, ours beside what it published."""

import logging
from dataclasses import dataclass
from pathlib import Path

import tyro

from sisa_model.experiments import published as paper
from sisa_model.experiments.plot_runs import incomparable, name_runs
from sisa_model.experiments.results import Results, collect
from sisa_model.experiments.tables import MISSING, TITLES, UNPUBLISHED, tables
from sisa_model.experiments.watch import runs_page
from sisa_model.reporting.figures import plot_tables
from sisa_model.reporting.page import HtmlTable
from sisa_model.reporting.tables import markdown
from sisa_model.utils.files import write_text

log = logging.getLogger(__name__)

NOTE = (
    f"Cells are ours / published ({paper.SOURCE}), ours by the authors' protocol where one is "
    f'published; "{UNPUBLISHED}": not published.\n'
    "Accuracies in percent, with their 95 % interval in brackets; several runs of one model: mean "
    "(minimum to maximum).\n"
    f"Figures of another step than a finished paper run's ({paper.STEPS:,}) name it.\n"
)
LEFT_OUT = "What these runs did not measure is left out (--show-missing shows it)."
SHOWN = f'"{MISSING}": not measured by these runs.'


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Set runs and their evaluations into the paper's tables, beside its figures.

    Writes OUT/report.md, and its tables drawn in OUT/report.png. Runs are known by preset: models
    of 50m, 152m and 369m fill the paper's tables (a ds32 trained with lambda-lr-scale 0 is its
    frozen lambda), what the paper has no figure of stands in tables of its own: so does what was
    measured by another protocol than the paper's. Several runs of a preset are its seeds."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders of `sisa train`, finished or not, evaluated (`sisa eval`) or not."""
    out: Path = Path("runs/report")
    """Folder of the report, whose files are replaced if they exist."""
    show_missing: bool = False
    """Also what was published and these runs have not measured."""
    html: bool = False
    """Also write OUT/report.html: the tables on the page that `sisa watch` makes of the runs."""


def report(config: ReportConfig) -> Path:
    """Write the report, log it, and return its Markdown file.

    Raises ValueError for no run, one named twice or a row of RUN/eval.jsonl that is no evaluation,
    and as :func:`sisa_model.runs.folder.read_run` does for a folder that is no run."""
    named = name_runs(config.runs)
    results = [collect(folder, name) for name, folder in named]
    if warning := incomparable({run.name: run.tokens for run in results}):
        log.warning(warning)
    found = tables(results, config.show_missing)
    note = NOTE + (SHOWN if config.show_missing else LEFT_OUT)
    parts = ["# Report", "", note, ""]
    drawn = []
    for title, columns, rows in found:
        parts += [f"## {title}", "", markdown(("", *columns), [(x, *cells) for x, cells in rows])]
        drawn.append((title, columns, [[label, *map(str, cells)] for label, cells in rows]))
    text = "\n".join(parts)
    page = config.out / "report.md"
    picture = config.out / "report.png"
    config.out.mkdir(parents=True, exist_ok=True)
    write_text(page, text)
    plot_tables(picture, note, drawn, MISSING)
    if config.html:
        tabled = [
            HtmlTable(title, ("", *columns), [tuple(row) for row in rows])
            for title, columns, rows in drawn
        ]
        write_text(config.out / "report.html", runs_page(named, tables=tabled, note=note))
        log.info(f"page: {config.out / 'report.html'}")
    log.info(f"{text}\nreport: {page}, {picture}")
    if names := [run.name for run in results if by_other_protocols(run)]:
        log.info(
            f"not by the paper's protocol: {', '.join(names)}; the paper's tables take it alone: "
            "sisa eval RUN --protocol paper --data-dir FOLDER"
        )
    return page


def by_other_protocols(run: Results) -> bool:
    """Whether a benchmark of the paper's tables was measured, and by other protocols alone."""
    benchmarks = [task for task in TITLES if task != "niah" and task not in run.tasks]
    return any(
        name.startswith((f"{task} (harness", f"{task}_openai", f"{task}, "))
        for name in run.tasks
        for task in benchmarks
    )
