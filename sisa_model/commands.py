"""The commands of ``sisa``: what each is for, and where its settings and its work are.

A command's modules, and torch with them, are imported when it is called."""

import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from sisa_model.utils.progress import RunStopped

Loaded = tuple[type, Callable[[Any], object]]
Defaults = Mapping[tuple[str, ...], object]


class Command(NamedTuple):
    """A command; what it returns is printed if it is text."""

    about: str
    """One sentence, of a line in `sisa --help`."""
    load: Callable[[], Loaded]
    """Imports its settings, a dataclass, and the function that takes them."""
    examples: tuple[str, ...]
    defaults: Callable[[Any], Defaults] | None = None
    """By a flag's path, what is taken where neither it nor its settings say anything."""


def _prepare() -> Loaded:
    from sisa_model.data.prepare import PrepareConfig, prepare

    return PrepareConfig, prepare


def _train() -> Loaded:
    from sisa_model.runs.config import TrainConfig
    from sisa_model.training.trainer import train

    def run(config: TrainConfig) -> None:
        if not train(config).finished:
            raise RunStopped

    return TrainConfig, run


def _of_the_preset(config: Any) -> Defaults:
    """What `sisa train` takes with its preset, of the run and of the model."""
    from sisa_model.models.presets import preset_config
    from sisa_model.runs.config import preset_defaults

    run = preset_defaults(config)
    model = vars(preset_config(config.preset, **config.model))
    return {(name,): value for name, value in run.items()} | {
        ("model", name): value for name, value in model.items()
    }


def _compare() -> Loaded:
    from sisa_model.experiments.compare import CompareConfig, compare

    return CompareConfig, compare


def _study() -> Loaded:
    from sisa_model.experiments.study import StudyConfig, run_study

    return StudyConfig, run_study


def _eval() -> Loaded:
    from sisa_model.evaluation.config import EvalConfig
    from sisa_model.evaluation.evaluate import evaluate

    return EvalConfig, evaluate


def _plot() -> Loaded:
    from sisa_model.experiments.plot_runs import PlotConfig, plot_runs

    return PlotConfig, plot_runs


def _watch() -> Loaded:
    from sisa_model.experiments.watch import WatchConfig, watch

    return WatchConfig, watch


def _inspect() -> Loaded:
    from sisa_model.evaluation.inspection import InspectConfig, inspect_run

    return InspectConfig, inspect_run


def _report() -> Loaded:
    from sisa_model.experiments.report import ReportConfig, report

    return ReportConfig, report


def _generate() -> Loaded:
    from sisa_model.evaluation.sample import GenerateConfig, continue_prompt

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    return GenerateConfig, lambda config: continue_prompt(config, write)


def _convert() -> Loaded:
    from sisa_model.convert import ConvertConfig, convert

    return ConvertConfig, convert


def _info() -> Loaded:
    from sisa_model.info import InfoConfig, info

    return InfoConfig, info


COMMANDS = {
    "prepare": Command(
        "Tokenize text into shards for `sisa train`.",
        _prepare,
        (
            "sisa prepare ~/books --tokenizer bytes --out data/books",
            "sisa prepare DKYoon/SlimPajama-6B --out data/slimpajama",
        ),
    ),
    "train": Command(
        "Train a model on text or a task.",
        _train,
        (
            "sisa train",
            "sisa train --data ~/books --steps 2000 --out runs/books",
            "sisa train --out runs/books --resume --steps 4000",
            "torchrun --nproc-per-node 8 -m sisa_model train "
            "--data data/slimpajama --preset sisa-152m-ds32",
        ),
        _of_the_preset,
    ),
    "compare": Command(
        "Train several models alike and compare them.",
        _compare,
        (
            "sisa compare",
            "sisa compare --presets sisa-tiny-ds16 transformer-tiny mamba2-tiny --seeds 0 1 2",
            "sisa compare --task parity",
        ),
    ),
    "study": Command(
        "Train every run of the paper's tables.",
        _study,
        ("sisa study --list", "sisa study --scale 152m --data data/slimpajama"),
    ),
    "eval": Command(
        "Measure a trained model on benchmarks and needles.",
        _eval,
        (
            "sisa eval runs/books --tasks niah needle_grid",
            "sisa eval runs/sisa-152m-ds32 --protocol paper",
        ),
    ),
    "plot": Command(
        "Draw the curves of runs into one picture.",
        _plot,
        ("sisa plot runs/books runs/books-2 --out runs/curves.png",),
    ),
    "watch": Command(
        "Write a page about runs that redraws while they go on.",
        _watch,
        ("sisa watch runs/books", "sisa watch runs/* --once"),
    ),
    "inspect": Command(
        "Show what the importance term does in each head.",
        _inspect,
        ("sisa inspect runs/books --html",),
    ),
    "report": Command(
        "Set runs into the paper's tables, beside its figures.",
        _report,
        ("sisa report runs/study/*",),
    ),
    "generate": Command(
        "Continue a prompt with a trained model.",
        _generate,
        (
            'sisa generate runs/books --prompt "Once upon a time"',
            "sisa generate runs/books --interactive --temperature 0.7",
        ),
    ),
    "convert": Command(
        "Turn a checkpoint of the paper's authors into a model folder.",
        _convert,
        ("sisa convert sisa_152m.pt --preset sisa-152m-ds32 --out runs/authors",),
    ),
    "info": Command(
        "List the models, or say what one costs.",
        _info,
        ("sisa info", "sisa info sisa-152m-ds32"),
    ),
}
