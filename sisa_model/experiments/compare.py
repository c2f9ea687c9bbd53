"""sisa compare: presets on the same data, seeds and token budget, as one figure and one table."""

import dataclasses
import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sisa_model.data.synthetic import LENGTHS, TASKS, exam_name
from sisa_model.experiments.study import train_all
from sisa_model.models.presets import preset_config
from sisa_model.reporting.figures import Rows, plot_compare, plot_task
from sisa_model.reporting.tables import markdown, spread
from sisa_model.runs.config import Recipe, TrainConfig
from sisa_model.runs.folder import free_folder, is_taken
from sisa_model.runs.log import read_rows
from sisa_model.training.parallel import world
from sisa_model.utils.files import write_json, write_text
from sisa_model.utils.progress import RunStopped

log = logging.getLogger(__name__)

# A few minutes a pair of tiny models, of text and of a task.
DEFAULTS = {
    "text": {"steps": 2500, "seq_len": 128, "batch_size": 8},
    "task": {"steps": 1000, "seq_len": 64, "batch_size": 64},
}


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Compare models trained alike, every preset with every seed.

    On text with needles and recall in it, or on one task alone. OUT gets one run folder a preset
    and seed, compare.png, table.md and results.json. The same command after a kill continues:
    finished runs are kept, the one under way is resumed, the next is begun."""

    presets: tuple[str, ...] = ("sisa-tiny-ds16", "transformer-tiny")
    """Models to compare; `sisa info` lists them."""
    task: str = "text"
    """text, or one task alone: parity, addition (modulo 5; addition-7: 7), flipflop, recall."""
    seeds: tuple[int, ...] = (0,)
    """A run of every preset for each: its initial weights, its order of the data, its tasks."""
    data: tuple[Path, ...] = ()
    """Text files or folders, or a folder of `sisa prepare`. Default: Python's standard library."""
    tokenizer: Path | None = None
    """A `tokenizers` JSON file. Default: that of a prepared folder, or bytes."""
    out: Path | None = None
    """Folder to make. Default: runs/compare[-TASK], or with -2, -3 ... if another has that."""
    steps: int | None = None
    """Optimizer steps of each run. Default: 2500 on text, 1000 on a task."""
    seq_len: int | None = None
    """Tokens a sequence. Default: 128 of text, 64 of a task (evaluated at 2 and 4 times it too)."""
    batch_size: int | None = None
    """Sequences a step. Default: 8 of text, to which each of its tasks adds 16; 64 of a task."""
    lr: float | None = None
    """Peak learning rate. Default: the presets'."""
    recipe: Recipe = "ours"
    """ours, or paper: what the authors' code does otherwise (docs/reproduce.md)."""
    val_every: int = 50
    """Steps between evaluations."""
    device: str = "auto"
    """cpu, cuda, cuda:1 ...; auto: a GPU if there is one."""
    resume: bool = False
    """Go on in a folder of other runs, which are kept; its figure is replaced."""


def resolve(config: CompareConfig) -> CompareConfig:
    """Fill in the defaults of text or of a task.

    Raises ValueError for presets or seeds that cannot be compared."""
    if len(set(config.presets)) < 2 or len(set(config.presets)) < len(config.presets):
        raise ValueError(
            f"presets must name at least two different models, got {', '.join(config.presets)}"
        )
    if not config.seeds or len(set(config.seeds)) < len(config.seeds):
        raise ValueError(f"seeds must be at least one and all different, got {config.seeds}")
    for preset in config.presets:
        preset_config(preset)
    defaults: dict[str, Any] = DEFAULTS["text" if config.task == "text" else "task"]
    missing = {name: value for name, value in defaults.items() if getattr(config, name) is None}
    return dataclasses.replace(config, **missing)


def compare(config: CompareConfig) -> Path:
    """Train every preset with every seed; write compare.png, table.md and results.json.

    A comparison that was stopped goes on where it was: finished runs are kept, the one under way is
    resumed, the next begun. Returns the folder. Raises as :func:`sisa_model.training.trainer.train`
    does, ValueError for fewer than two presets or no seed, RunStopped where a signal ends it."""
    config = resolve(config)
    with world() as processes:  # one for all runs: torchrun's processes can meet only once
        out = processes.from_main(lambda: _folder(config))
        finished = train_all(_train_configs(config, out))
        if finished:
            processes.from_main(lambda: _write(config, out))
    if not finished:
        raise RunStopped("stopped; the same command continues the comparison")
    return out


def _folder(config: CompareConfig) -> Path:
    """``out``, or the first of runs/compare, -2, -3 ... that is free or this comparison's.

    Raises FileExistsError for another's."""
    if config.out is None:
        wanted = Path("runs/compare" if config.task == "text" else f"runs/compare-{config.task}")
        return free_folder(wanted, lambda folder: _is_anothers(config, folder))
    if not config.resume and _is_anothers(config, config.out):
        raise FileExistsError(
            f"out {config.out} exists and holds no run of this comparison; "
            "choose another folder, or give --resume"
        )
    return config.out


def _is_anothers(config: CompareConfig, folder: Path) -> bool:
    """Whether ``folder`` holds something, and not this comparison, finished or begun."""
    if not is_taken(folder):
        return False
    results = folder / "results.json"
    if results.is_file():
        saved = json.loads(results.read_text(encoding="utf-8"))["config"]
        wanted = {"task": config.task, "presets": [*config.presets], "seeds": [*config.seeds]}
        wanted["recipe"] = config.recipe
        return any(saved.get(name, "ours") != value for name, value in wanted.items())
    begun = {path.parent for path in folder.glob("*/run.json")}
    own = {train.out for train in _train_configs(config, folder)}
    return not begun or not begun <= own


def _run_folder(out: Path, preset: str, seed: int) -> Path:
    return out / f"{preset}-seed{seed}"


def _train_configs(config: CompareConfig, out: Path) -> list[TrainConfig]:
    shared = TrainConfig(
        task=config.task,
        mix=tuple(TASKS) if config.task == "text" else (),
        data=config.data,
        tokenizer=config.tokenizer,
        steps=config.steps,
        seq_len=config.seq_len,
        batch_size=config.batch_size,
        lr=config.lr,
        recipe=config.recipe,
        val_every=config.val_every,
        device=config.device,
        sample_tokens=0,
    )
    # Seeds outermost: a comparison that is cut short still holds whole pairs.
    return [
        dataclasses.replace(shared, preset=preset, seed=seed, out=_run_folder(out, preset, seed))
        for seed in config.seeds
        for preset in config.presets
    ]


def _write(config: CompareConfig, out: Path) -> None:
    """Draw and tabulate the finished runs."""

    def rows(file: str) -> dict[str, list[Rows]]:
        return {
            preset: [read_rows(_run_folder(out, preset, seed) / file) for seed in config.seeds]
            for preset in config.presets
        }

    val = rows("val.jsonl")
    training = rows("train.jsonl")
    several = f"{len(config.seeds)} seeds: mean, minimum to maximum"
    title = f"{config.steps} steps, {several if len(config.seeds) > 1 else '1 seed'}"
    figure = out / "compare.png"
    if config.task == "text":
        table = summary(val, training)
        plot_compare(figure, val, title)
    else:
        exams = {
            exam_name(config.task, factor): _lengths(factor, config.seq_len) for factor in LENGTHS
        }
        table = task_summary(val, training, exams)
        plot_task(figure, val, exams, f"{config.task}: {title}")
    write_text(out / "table.md", table)
    write_json(out / "results.json", {"config": dataclasses.asdict(config), "val": val})
    log.info(f"\n{table}\nfigure: {figure}")


def summary(runs: dict[str, list[Rows]], training: dict[str, list[Rows]]) -> str:
    """A Markdown table of final values, as mean and range over seeds, and of throughput."""
    titles = (
        "model",
        "held-out loss",
        "needle accuracy",
        "recall accuracy",
        "first step with needle >= 90 %",
        "tokens/s",
    )
    table = []
    for name, seeds in runs.items():
        loss = spread([rows[-1]["loss"] for rows in seeds], "{:.3f}")
        reached = _reached(seeds, "needle", 0.9)
        table.append((name, loss, *_accuracies(seeds, TASKS), reached, _rate(training[name])))
    table.append(("chance", "", *_chances(runs, TASKS), "", ""))
    return markdown(titles, table)


def task_summary(
    runs: dict[str, list[Rows]], training: dict[str, list[Rows]], exams: dict[str, str]
) -> str:
    """As :func:`summary`, of a task trained alone: accuracy by the position of the answer.

    ``exams`` gives those of each exam in words."""
    accuracies = [f"accuracy at {lengths}" for lengths in exams.values()]
    first = next(iter(exams))
    table = []
    for name, seeds in runs.items():
        reached = _reached(seeds, first, 0.95)
        table.append((name, *_accuracies(seeds, exams), reached, _rate(training[name])))
    table.append(("chance", *_chances(runs, exams), "", ""))
    return markdown(("model", *accuracies, "first step with >= 95 %", "tokens/s"), table)


def _accuracies(seeds: list[Rows], exams: Iterable[str]) -> list[str]:
    return [
        spread([100 * rows[-1][f"{exam}_accuracy"] for rows in seeds], "{:.1f} %") for exam in exams
    ]


def _chances(runs: dict[str, list[Rows]], exams: Iterable[str]) -> list[str]:
    row = next(iter(runs.values()))[0][0]
    return [f"{100 * row[f'{exam}_chance']:.1f} %" for exam in exams]


def _lengths(factor: int, seq_len: int | None) -> str:
    """The positions that an exam asks, in words."""
    assert seq_len is not None, "resolve() fills it in"
    first = 1 if factor == 1 else factor * seq_len // 2 + 1
    return f"{first} to {factor * seq_len}"


def _reached(seeds: list[Rows], exam: str, level: float) -> str:
    """The first step of each seed whose accuracy is at least ``level``."""
    return ", ".join(
        next((str(row["step"]) for row in rows if row[f"{exam}_accuracy"] >= level), "never")
        for rows in seeds
    )


def _rate(seeds: list[Rows]) -> str:
    """The median training throughput, tokens/s."""
    return f"{np.median([row['tokens_per_s'] for rows in seeds for row in rows]):,.0f}"
