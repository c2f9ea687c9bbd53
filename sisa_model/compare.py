"""sisa compare: presets on the same data, seeds and token budget, as one figure and one table."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .checkpoint import write_json, write_text
from .needle import TASKS
from .plot import Rows, plot_compare
from .presets import preset_config
from .train import TrainConfig, read_rows, require_same_run, train


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Compare models trained alike: every preset with every seed, with needle and recall tasks mixed into the text."""

    presets: tuple[str, ...] = ("sisa-tiny-ds16", "transformer-tiny")
    """Models to compare; `sisa info` lists them."""
    seeds: tuple[int, ...] = (0,)
    """A run of every preset for each: its initial weights, its order of the data, its tasks."""
    data: tuple[Path, ...] = ()
    """Text files or folders, or a folder of `sisa prepare`. Default: Python's standard library."""
    tokenizer: Path | None = None
    """A `tokenizers` JSON file. Default: that of a prepared folder, or bytes."""
    out: Path = Path("runs/compare")
    """Folder to make: one run folder a preset and seed, compare.png, table.md, results.json."""
    steps: int = 2500
    """Optimizer steps of each run."""
    seq_len: int = 128
    """Tokens a sequence."""
    batch_size: int | None = 8
    """Text sequences a step; each task adds its own."""
    lr: float | None = None
    """Peak learning rate. Default: the presets'."""
    val_every: int = 50
    """Steps between evaluations."""
    device: str = "auto"
    """cpu, cuda, cuda:1 ...; auto: a GPU if there is one."""
    resume: bool = False
    """Continue a comparison that was stopped: finished runs are kept, the one under way is resumed."""


def compare(config: CompareConfig) -> Path:
    """Train every preset with every seed, and write compare.png, table.md and results.json into ``config.out``.

    Returns the folder. Raises as :func:`sisa_model.train.train` does, and ValueError for fewer than two presets or no seed.
    """
    if len(set(config.presets)) < 2 or len(set(config.presets)) < len(config.presets):
        raise ValueError(f"presets must name at least two different models, got {', '.join(config.presets)}")
    if not config.seeds or len(set(config.seeds)) < len(config.seeds):
        raise ValueError(f"seeds must be at least one and all different, got {config.seeds}")
    for preset in config.presets:
        preset_config(preset)
    if config.out.exists() and not config.resume:
        raise FileExistsError(f"out {config.out} exists; choose another folder, or continue its comparison with --resume")
    shared = ("data", "tokenizer", "steps", "seq_len", "batch_size", "lr", "val_every", "device")
    settings: dict[str, Any] = {name: getattr(config, name) for name in shared}
    # Seeds outermost: a comparison that is cut short still holds whole pairs.
    for seed in config.seeds:
        for preset in config.presets:
            folder = config.out / f"{preset}-seed{seed}"
            begun = (folder / "run.json").is_file()
            identity: dict[str, Any] = {"preset": preset, "seed": seed, "out": folder, "resume": begun}
            run = TrainConfig(tasks=tuple(TASKS), sample_tokens=0, **identity, **settings)
            if begun and (folder / "final").is_dir():
                require_same_run(run)
            elif not train(run).finished:
                print(f"stopped; continue the comparison with: sisa compare --out {config.out} --resume (and the same flags)")
                return config.out
    folders = {preset: [config.out / f"{preset}-seed{seed}" for seed in config.seeds] for preset in config.presets}
    runs = {preset: [read_rows(folder / "val.jsonl") for folder in seeds] for preset, seeds in folders.items()}
    table = summary(runs, {preset: [read_rows(folder / "train.jsonl") for folder in seeds] for preset, seeds in folders.items()})
    title = f"{config.steps} steps, {len(config.seeds)} seeds: mean, minimum to maximum"
    plot_compare(config.out / "compare.png", runs, title)
    write_text(config.out / "table.md", table)
    write_json(config.out / "results.json", {"config": dataclasses.asdict(config), "val": runs})
    print(f"\n{table}\nfigure: {config.out / 'compare.png'}")
    return config.out


def summary(runs: dict[str, list[Rows]], training: dict[str, list[Rows]]) -> str:
    """A Markdown table: final values as mean and (minimum to maximum) over seeds, and the median training throughput."""
    lines = [
        "| model | held-out loss | needle accuracy | recall accuracy | first step with needle >= 90 % | tokens/s |",
        "|---|---|---|---|---|---|",
    ]
    for name, seeds in runs.items():
        cells = [_spread([rows[-1]["loss"] for rows in seeds], "{:.3f}")]
        cells += [_spread([100 * rows[-1][f"{task}_accuracy"] for rows in seeds], "{:.1f} %") for task in TASKS]
        reached = [next((str(r["step"]) for r in rows if r["needle_accuracy"] >= 0.9), "never") for rows in seeds]
        rate = np.median([row["tokens_per_s"] for rows in training[name] for row in rows])
        lines.append(f"| {name} | {' | '.join(cells)} | {', '.join(reached)} | {rate:,.0f} |")
    return "\n".join(lines) + "\n"


def _spread(values: list[float], form: str) -> str:
    return f"{form.format(np.mean(values))} ({form.format(min(values))} to {form.format(max(values))})"
