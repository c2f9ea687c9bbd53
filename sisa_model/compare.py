"""sisa compare: presets on the same data, seeds and token budget, as one figure and one table."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .files import write_json, write_text
from .parallel import world
from .plot import Rows, plot_compare, plot_task
from .presets import preset_config
from .run import TrainConfig
from .run import resolve as resolve_run
from .runlog import read_rows
from .tasks import LENGTHS, TASKS
from .train import continue_run, exam_name

# A few minutes a pair of tiny models, of text and of a task.
DEFAULTS = {"text": {"steps": 2500, "seq_len": 128, "batch_size": 8}, "task": {"steps": 1000, "seq_len": 64, "batch_size": 64}}


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Compare models trained alike, every preset with every seed: on text with needles and recall in it, or on one task alone."""

    presets: tuple[str, ...] = ("sisa-tiny-ds16", "transformer-tiny")
    """Models to compare; `sisa info` lists them."""
    task: str = "text"
    """What to train on: text, or one task alone: parity, addition (modulo 5; addition-7 for another modulus), flipflop, recall."""
    seeds: tuple[int, ...] = (0,)
    """A run of every preset for each: its initial weights, its order of the data, its tasks."""
    data: tuple[Path, ...] = ()
    """Text files or folders, or a folder of `sisa prepare`. Default: Python's standard library."""
    tokenizer: Path | None = None
    """A `tokenizers` JSON file. Default: that of a prepared folder, or bytes."""
    out: Path | None = None
    """Folder to make: one run folder a preset and seed, compare.png, table.md, results.json. Default: runs/compare or
    runs/compare-TASK."""
    steps: int | None = None
    """Optimizer steps of each run. Default: 2500 on text, 1000 on a task."""
    seq_len: int | None = None
    """Tokens a sequence. Default: 128 of text, 64 of a task, which is evaluated at 2 and 4 times that too."""
    batch_size: int | None = None
    """Sequences a step. Default: 8 of text, to which each of its tasks adds its own; 64 of a task."""
    lr: float | None = None
    """Peak learning rate. Default: the presets'."""
    val_every: int = 50
    """Steps between evaluations."""
    device: str = "auto"
    """cpu, cuda, cuda:1 ...; auto: a GPU if there is one."""
    resume: bool = False
    """Continue a comparison that was stopped: finished runs are kept, the one under way is resumed."""


def resolve(config: CompareConfig) -> CompareConfig:
    """Fill in the defaults of text or of a task; ValueError for presets or seeds that cannot be compared."""
    if len(set(config.presets)) < 2 or len(set(config.presets)) < len(config.presets):
        raise ValueError(f"presets must name at least two different models, got {', '.join(config.presets)}")
    if not config.seeds or len(set(config.seeds)) < len(config.seeds):
        raise ValueError(f"seeds must be at least one and all different, got {config.seeds}")
    for preset in config.presets:
        preset_config(preset)
    text = config.task == "text"
    defaults: dict[str, Any] = {
        **DEFAULTS["text" if text else "task"],
        "out": Path("runs/compare" if text else f"runs/compare-{config.task}"),
    }
    return dataclasses.replace(config, **{name: value for name, value in defaults.items() if getattr(config, name) is None})


def compare(config: CompareConfig) -> Path:
    """Train every preset with every seed, and write compare.png, table.md and results.json into ``config.out``.

    Returns the folder. Raises as :func:`sisa_model.train.train` does, and ValueError for fewer than two presets or no seed.
    """
    config = resolve(config)
    out = config.out
    assert out is not None, "resolve() fills it in"
    with world() as processes:  # one for all runs: torchrun's processes can meet only once
        if processes.from_main(out.exists) and not config.resume:
            raise FileExistsError(f"out {out} exists; choose another folder, or continue its comparison with --resume")
        if _train_all(config, out):
            processes.from_main(lambda: _write(config, out))
        elif processes.main:
            print(f"stopped; continue the comparison with: sisa compare --out {out} --resume (and the same flags)")
    return out


def _train_all(config: CompareConfig, out: Path) -> bool:
    """Begin, resume or pass over each run; False if one was stopped."""
    shared = ("task", "data", "tokenizer", "steps", "seq_len", "batch_size", "lr", "val_every", "device")
    settings: dict[str, Any] = {name: getattr(config, name) for name in shared}
    settings["tasks"] = tuple(TASKS) if config.task == "text" else ()
    # Seeds outermost: a comparison that is cut short still holds whole pairs.
    runs = [
        TrainConfig(sample_tokens=0, preset=preset, seed=seed, out=out / f"{preset}-seed{seed}", **settings)
        for seed in config.seeds
        for preset in config.presets
    ]
    for run in runs:
        resolve_run(run)  # what is wrong with the last is said before the first begins
    return all(map(continue_run, runs))


def _write(config: CompareConfig, out: Path) -> None:
    """Draw and tabulate the finished runs."""
    folders = {preset: [out / f"{preset}-seed{seed}" for seed in config.seeds] for preset in config.presets}
    runs = {preset: [read_rows(folder / "val.jsonl") for folder in seeds] for preset, seeds in folders.items()}
    training = {preset: [read_rows(folder / "train.jsonl") for folder in seeds] for preset, seeds in folders.items()}
    seeds_of = f"{len(config.seeds)} seeds: mean, minimum to maximum" if len(config.seeds) > 1 else "1 seed"
    title = f"{config.steps} steps, {seeds_of}"
    if config.task == "text":
        table = summary(runs, training)
        plot_compare(out / "compare.png", runs, title)
    else:
        exams = {exam_name(config.task, factor): _lengths(factor, config.seq_len) for factor in LENGTHS}
        table = task_summary(runs, training, exams)
        plot_task(out / "compare.png", runs, exams, f"{config.task}: {title}")
    write_text(out / "table.md", table)
    write_json(out / "results.json", {"config": dataclasses.asdict(config), "val": runs})
    print(f"\n{table}\nfigure: {out / 'compare.png'}")


def summary(runs: dict[str, list[Rows]], training: dict[str, list[Rows]]) -> str:
    """A Markdown table: final values as mean and (minimum to maximum) over seeds, and the median training throughput."""
    lines = [
        "| model | held-out loss | needle accuracy | recall accuracy | first step with needle >= 90 % | tokens/s |",
        "|---|---|---|---|---|---|",
    ]
    for name, seeds in runs.items():
        cells = [_spread([rows[-1]["loss"] for rows in seeds], "{:.3f}")]
        cells += [_spread([100 * rows[-1][f"{task}_accuracy"] for rows in seeds], "{:.1f} %") for task in TASKS]
        lines.append(f"| {name} | {' | '.join(cells)} | {_reached(seeds, 'needle', 0.9)} | {_rate(training[name]):,.0f} |")
    chances = " | ".join(f"{100 * next(iter(runs.values()))[0][0][f'{task}_chance']:.1f} %" for task in TASKS)
    return "\n".join([*lines, f"| chance | | {chances} | | |"]) + "\n"


def task_summary(runs: dict[str, list[Rows]], training: dict[str, list[Rows]], exams: dict[str, str]) -> str:
    """As :func:`summary`, of a task trained alone: its accuracy by the position of the answer, ``exams`` name -> in words."""
    first = next(iter(exams))
    titles = [f"accuracy at {lengths}" for lengths in exams.values()]
    lines = [f"| model | {' | '.join(titles)} | first step with >= 95 % | tokens/s |", "|---" * (len(exams) + 3) + "|"]
    for name, seeds in runs.items():
        cells = " | ".join(_spread([100 * rows[-1][f"{exam}_accuracy"] for rows in seeds], "{:.1f} %") for exam in exams)
        lines.append(f"| {name} | {cells} | {_reached(seeds, first, 0.95)} | {_rate(training[name]):,.0f} |")
    chances = " | ".join(f"{100 * next(iter(runs.values()))[0][0][f'{exam}_chance']:.1f} %" for exam in exams)
    return "\n".join([*lines, f"| chance | {chances} | | |"]) + "\n"


def _lengths(factor: int, seq_len: int | None) -> str:
    """The positions that an exam asks, in words."""
    assert seq_len is not None, "resolve() fills it in"
    return f"1 to {seq_len}" if factor == 1 else f"{factor * seq_len // 2 + 1} to {factor * seq_len}"


def _reached(seeds: list[Rows], exam: str, level: float) -> str:
    """The first step of each seed whose accuracy is at least ``level``."""
    return ", ".join(next((str(row["step"]) for row in rows if row[f"{exam}_accuracy"] >= level), "never") for rows in seeds)


def _rate(seeds: list[Rows]) -> float:
    """The median training throughput, tokens/s."""
    return float(np.median([row["tokens_per_s"] for rows in seeds for row in rows]))


def _spread(values: list[float], form: str) -> str:
    if len(values) == 1:
        return form.format(values[0])
    return f"{form.format(np.mean(values))} ({form.format(min(values))} to {form.format(max(values))})"
