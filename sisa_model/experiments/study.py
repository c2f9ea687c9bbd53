"""sisa study: every run of the paper's tables as one list, which is begun, continued and shown by
one command.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import tyro

from sisa_model.models.presets import D_STATES
from sisa_model.runs.config import TrainConfig, resolve
from sisa_model.runs.folder import read_run
from sisa_model.runs.log import read_rows
from sisa_model.training.parallel import world
from sisa_model.training.trainer import continue_run


class Run(NamedTuple):
    """One run of a study: what it trains, and how it departs from the preset's settings."""

    name: str
    preset: str
    settings: dict[str, Any]


def _runs(*presets: str) -> tuple[Run, ...]:
    return tuple(Run(preset, preset, {}) for preset in presets)


def _paper(scale: str) -> tuple[Run, ...]:
    """The main table's models, then the controls and the hybrids: what the paper ran at 152M, and
    tiny in miniature.
    """
    frozen = {"lambda_lr_scale": 0.0}  # what a lambda_raw kept in bf16 came to: it never moves
    controls = (
        f"sisa-{scale}-ds32-{control}"
        for control in ("nodecay", "norotation", "bilinear", "lambdashared")
    )
    return (
        *_runs(f"transformer-{scale}", *(f"sisa-{scale}-ds{d_state}" for d_state in D_STATES)),
        *_runs(f"mamba2-{scale}", f"mamba3-{scale}"),
        Run(f"sisa-{scale}-ds32-frozen", f"sisa-{scale}-ds32", frozen),
        # lambda = 0 is the reduced Transformer: the same weights, so that it isn't run twice.
        *_runs(f"transformer-{scale}-reduced", *controls),
        *_runs(f"hybrid-transformer-{scale}", f"hybrid-sisa-{scale}"),
    )


PAPER: dict[str, tuple[Run, ...]] = {
    "tiny": _paper("tiny"),
    "50m": _runs(
        "transformer-50m",
        *(f"sisa-50m-ds{d_state}" for d_state in D_STATES),
        "mamba2-50m",
        "mamba3-50m",
    ),
    "152m": _paper("152m"),
    "369m": _runs(
        "transformer-369m",
        "sisa-369m-ds32",
        "sisa-369m-ds64",
        "sisa-369m-ds128",
        "mamba2-369m",
        "mamba3-369m",
    ),
}


@dataclass(frozen=True, kw_only=True)
class StudyConfig(TrainConfig):
    """Train every run of the paper's tables at one scale, one after the other, each in a folder of
    its own.

    The same command after a kill continues: finished runs are kept, the one under way is resumed,
    the next is begun. Flags of `sisa train` hold for every run; what is left out is the paper's.
    """

    study: tyro.conf.Positional[Literal["paper"]] = "paper"
    """Which study."""
    scale: Literal["tiny", "50m", "152m", "369m"] = "tiny"
    """Size of its models; tiny runs the study in miniature on a CPU."""
    out: Path = Path("runs/study")
    """Folder of the run folders."""
    only: tuple[str, ...] = ()
    """Names of the runs to do (or list); with one command a machine, several machines share a
    study. Default: all.
    """
    list: bool = False
    """Show each run with its state, and train nothing."""
    preset: Annotated[str, tyro.conf.Suppress] = TrainConfig.preset
    stop_at: Annotated[int | None, tyro.conf.Suppress] = None
    resume: Annotated[bool, tyro.conf.Suppress] = False


def run_study(config: StudyConfig) -> None:
    """Bring every run of the study to its end, in order, and print the state of all; with
    ``config.list`` print it alone.

    Raises as :func:`sisa_model.training.trainer.train` does, for any run's settings before the
    first begins, and ValueError for an unknown name in ``only``. A run stopped by Ctrl-C or SIGTERM
    ends the study."""
    runs = _chosen(config)
    if config.list:
        print(listing(runs, config.out))
        return
    if config.scale != "tiny" and not config.data:
        raise ValueError(
            f"data must be given at scale {config.scale}: Python's standard library is no text for these models"
        )
    with world() as processes:  # one for all runs: torchrun's processes can meet only once
        finished = train_all([_train_config(config, run) for run in runs])
    if processes.main:
        if not finished:
            print("stopped; the same command continues the study")
        print(listing(runs, config.out))


def train_all(configs: list[TrainConfig]) -> bool:
    """Begin, resume or pass over each run in order; False if one was stopped. Raises, before the
    first, for any one's settings.
    """
    for config in configs:
        resolve(config)
    return all(map(continue_run, configs))


def _train_config(config: StudyConfig, run: Run) -> TrainConfig:
    shared = {field.name: getattr(config, field.name) for field in dataclasses.fields(TrainConfig)}
    if "sisa" not in run.preset:  # mode and backend are SISA's; every other model rejects them
        del shared["mode"], shared["backend"]
    return TrainConfig(
        **{**shared, "preset": run.preset, "out": config.out / run.name, **run.settings}
    )


def _chosen(config: StudyConfig) -> tuple[Run, ...]:
    runs = PAPER[config.scale]
    names = [run.name for run in runs]
    for name in config.only:
        if name not in names:
            raise ValueError(f"only must be among {', '.join(names)}, got {name!r}")
    return tuple(run for run in runs if not config.only or run.name in config.only)


def listing(runs: tuple[Run, ...], folder: Path) -> str:
    """A line a run: its name, its state (not begun, step n of N, finished) and its last held-out
    loss, nats a token.
    """
    lines = [f"{'run':32} {'state':24} held-out loss"]
    for run in runs:
        state, loss = "not begun", ""
        if (folder / run.name / "run.json").is_file():
            train, val = (
                read_rows(folder / run.name / f"{rows}.jsonl") for rows in ("train", "val")
            )
            done, steps = (
                train[-1]["step"] if train else 0,
                read_run(folder / run.name)["train"].steps,
            )
            state = (
                "finished"
                if (folder / run.name / "final").is_dir()
                else f"step {done:,} of {steps:,}"
            )
            loss = f"{val[-1]['loss']:.3f}" if val else ""
        lines.append(f"{run.name:32} {state:24} {loss}".rstrip())
    return "\n".join(lines)
