"""sisa study: a list of runs, the paper's say, which one command begins, continues and shows."""

import dataclasses
import itertools
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

import tyro

from sisa_kernels.inputs import Mode
from sisa_model.models.presets import D_STATES, Preset, Scale, find_preset
from sisa_model.runs.config import TrainConfig, resolve
from sisa_model.runs.folder import RECORD, read_run
from sisa_model.runs.log import read_rows
from sisa_model.training.parallel import world
from sisa_model.training.trainer import continue_run
from sisa_model.utils.progress import RunStopped

log = logging.getLogger(__name__)


class StudyRun(NamedTuple):
    """One run of a study: what it trains, and how it departs from the preset's settings."""

    name: str
    preset: Preset
    settings: dict[str, Any]


def _runs(*presets: str) -> tuple[StudyRun, ...]:
    return tuple(StudyRun(preset, find_preset(preset), {}) for preset in presets)


def _sisa(scale: str, d_states: tuple[int, ...] = D_STATES) -> list[str]:
    return [f"sisa-{scale}-ds{d_state}" for d_state in d_states]


def _paper(scale: str) -> tuple[StudyRun, ...]:
    """The main table's models, the controls, the hybrids: the paper's 152M, tiny in miniature."""
    sisa = f"sisa-{scale}-ds32"
    # What a lambda_raw kept in bf16 came to: it never moves.
    frozen = StudyRun(f"{sisa}-frozen", find_preset(sisa), {"lambda_lr_scale": 0.0})
    # lambda = 0 is the reduced Transformer: the same weights, so that it isn't run twice.
    controls = ("nodecay", "norotation", "bilinear", "lambdashared")
    return (
        *_runs(f"transformer-{scale}", *_sisa(scale), f"mamba2-{scale}", f"mamba3-{scale}"),
        frozen,
        *_runs(f"transformer-{scale}-reduced", *(f"{sisa}-{control}" for control in controls)),
        *_runs(f"hybrid-transformer-{scale}", f"hybrid-sisa-{scale}"),
    )


PAPER: dict[Scale, tuple[StudyRun, ...]] = {
    "tiny": _paper("tiny"),
    "50m": _runs("transformer-50m", *_sisa("50m"), "mamba2-50m", "mamba3-50m"),
    "152m": _paper("152m"),
    "369m": _runs("transformer-369m", *_sisa("369m", (32, 64, 128)), "mamba2-369m", "mamba3-369m"),
}


def _clamp() -> tuple[StudyRun, ...]:
    """What the clamp and parameters in bf16 cost: every pair of both, 1.3M parameters, 3 seeds."""
    model = {"d_model": 128, "n_heads": 4, "n_layers": 4, "d_ff_transformer": 512, "init_std": 0.02}
    cells = itertools.product(range(3), get_args(Mode), ("bf16", "bf16-pure"))
    return tuple(
        StudyRun(
            f"{mode}-{precision}-seed{seed}",
            find_preset("sisa-tiny-ds16"),
            {"model": model, "mode": mode, "precision": precision, "seed": seed},
        )
        for seed, mode, precision in cells
    )


CLAMP = _clamp()


@dataclass(frozen=True, kw_only=True)
class StudyConfig(TrainConfig):
    """Train every run of the paper's tables at one scale, or of another study, one after the other.

    Each has a folder of its own. The same command after a kill continues: finished runs are
    kept, the one under way is resumed, the next is begun. Flags of `sisa train` hold for every
    run; what is left out is the paper's."""

    study: tyro.conf.Positional[Literal["paper", "clamp"]] = "paper"
    """paper: the runs of its tables; clamp: small models in mode exact and clamped, with weights in
    fp32 (bf16 autocast) and in bf16, of three seeds (docs/reproduce.md)."""
    scale: Scale = "tiny"
    """Size of the paper's models; tiny runs its study in miniature on a CPU."""
    out: Path = Path("runs/study")
    """Folder of the run folders."""
    only: tuple[str, ...] = ()
    """Names of the runs to do (or list), so that machines can share a study. Default: all."""
    list: bool = False
    """Show each run with its state, and train nothing."""
    preset: Annotated[str, tyro.conf.Suppress] = TrainConfig.preset
    stop_at: Annotated[int | None, tyro.conf.Suppress] = None
    resume: Annotated[bool, tyro.conf.Suppress] = False


def run_study(config: StudyConfig) -> str | None:
    """Bring every run of the study to its end, in order, and return the state of all.

    With ``config.list`` return it alone. In processes other than the main one, None. Raises as
    :func:`sisa_model.training.trainer.train` does, for any run's settings before the first
    begins, ValueError for an unknown name in ``only``, and RunStopped where a signal ends a run,
    and with it the study."""
    runs = _chosen(config)
    if config.list:
        return listing(runs, config.out)
    if config.scale != "tiny" and not config.data:
        raise ValueError(
            f"data must be given at scale {config.scale}: "
            "Python's standard library is no text for these models"
        )
    with world() as processes:  # one for all runs: torchrun's processes can meet only once
        finished = train_all([train_config(config, run) for run in runs])
    if not finished:
        if processes.main:
            log.info(listing(runs, config.out))
        raise RunStopped("stopped; the same command continues the study")
    return listing(runs, config.out) if processes.main else None


def train_all(configs: list[TrainConfig]) -> bool:
    """Begin, resume or pass over each run in order; False if one was stopped.

    Raises, before the first, for any one's settings."""
    for config in configs:
        resolve(config)
    return all(map(continue_run, configs))


def train_config(config: StudyConfig, run: StudyRun) -> TrainConfig:
    """The settings of one run of the study."""
    settings = {
        field.name: getattr(config, field.name) for field in dataclasses.fields(TrainConfig)
    }
    if run.preset.model.family != "sisa":  # whose mode and backend every other model rejects
        del settings["mode"], settings["backend"]
    settings |= {"preset": run.preset.name, "out": config.out / run.name, **run.settings}
    return TrainConfig(**settings)


def _chosen(config: StudyConfig) -> tuple[StudyRun, ...]:
    if config.study == "clamp" and config.scale != "tiny":
        raise ValueError(f"scale must be tiny with the study clamp, got {config.scale!r}")
    runs = PAPER[config.scale] if config.study == "paper" else CLAMP
    names = [run.name for run in runs]
    for name in config.only:
        if name not in names:
            raise ValueError(f"only must be among {', '.join(names)}, got {name!r}")
    return tuple(run for run in runs if not config.only or run.name in config.only)


def listing(runs: tuple[StudyRun, ...], folder: Path) -> str:
    """A line a run: its name, its state and its last held-out loss, nats a token.

    The state is not begun, step n of N, or finished."""
    lines = [f"{'run':32} {'state':24} held-out loss"]
    for run in runs:
        state, loss = _state(folder / run.name)
        lines.append(f"{run.name:32} {state:24} {loss}".rstrip())
    return "\n".join(lines)


def _state(folder: Path) -> tuple[str, str]:
    """How far a run is, and its last held-out loss."""
    if not (folder / RECORD).is_file():
        return "not begun", ""
    train = read_rows(folder / "train.jsonl")
    val = read_rows(folder / "val.jsonl")
    loss = f"{val[-1]['loss']:.3f}" if val else ""
    if (folder / "final").is_dir():
        return "finished", loss
    done = train[-1]["step"] if train else 0
    return f"step {done:,} of {read_run(folder).train.steps:,}", loss
