"""The command ``sisa``: prepare, train, compare, study, eval, plot, inspect, report, generate,
convert, info, bench-report.
"""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

import sisa_kernels as sk
from sisa_model.data.prepare import PrepareConfig, prepare
from sisa_model.evaluation.evaluate import EvalConfig, evaluate
from sisa_model.evaluation.inspection import InspectConfig, inspect_run
from sisa_model.evaluation.subject import find_subject
from sisa_model.experiments.compare import CompareConfig, compare
from sisa_model.experiments.plot_runs import PlotConfig, plot_runs
from sisa_model.experiments.report import ReportConfig, report
from sisa_model.experiments.study import StudyConfig, run_study
from sisa_model.interop.authors import load_paper_checkpoint
from sisa_model.models.checkpoint import load, save
from sisa_model.models.generate import check_sampling, generate
from sisa_model.models.language_model import LanguageModel, count_parameters
from sisa_model.models.presets import preset_config, presets
from sisa_model.runs.config import TrainConfig
from sisa_model.runs.folder import is_taken
from sisa_model.training.trainer import train
from sisa_model.utils.files import make_folder_atomically
from sisa_model.utils.machine import find_device


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Continue a prompt with a model that `sisa train` or `sisa convert` made."""

    run: tyro.conf.Positional[Path]
    """Run folder of `sisa train`, of an unfinished run its newest checkpoint, or with --tokenizer a
    folder of model weights.
    """
    tokenizer: str | None = None
    """For a folder of model weights: its tokenizer, a `tokenizers` JSON file or the word bytes."""
    prompt: str = ""
    """Text to continue. Default: the start of a document."""
    max_new_tokens: int = 200
    """Tokens to add."""
    temperature: float = 0.8
    """Sampling temperature; 0 takes the likeliest token every time."""
    top_k: int | None = None
    """Sample among the k likeliest tokens only."""
    top_p: float = 1.0
    """Sample among the likeliest tokens that together reach this probability only."""
    seed: int = 0
    """Seed of the sampling."""
    device: str = "auto"
    """cpu, cuda, cuda:1 ...; auto: a GPU if there is one."""


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Turn a checkpoint of the paper's authors into this package's format: config.json and
    model.safetensors.
    """

    checkpoint: tyro.conf.Positional[Path]
    """The authors' .pt file."""
    preset: str
    """Model it holds; `sisa info` lists them."""
    out: Path
    """Folder to make."""
    mode: str = "clamped"
    """SISA's numerics: clamped, what the authors trained with, or exact."""


@dataclass(frozen=True, kw_only=True)
class InfoConfig:
    """List the presets with their sizes."""

    preset: str | None = None
    """Show every field of this one."""


@dataclass(frozen=True, kw_only=True)
class BenchReportConfig:
    """Draw the figures of docs/ from the rows that `pytest bench` and bench/accuracy.py have
    measured; needs a checkout.
    """

    results: Path | None = None
    """Folder of the CSV files. Default: bench/results of the checkout."""
    out: Path | None = None
    """Folder of the figures. Default: docs of the checkout."""
    device: str | None = None
    """Part of the name of the device whose rows are drawn. Default: that of each file's last row."""
    only: tuple[Literal["speed", "growth", "accuracy"], ...] = ()
    """Figures to draw. Default: all; one without rows is an error."""


def run_generate(config: GenerateConfig) -> None:
    """Print a continuation of the prompt."""
    check_sampling(config.max_new_tokens, config.temperature, config.top_k, config.top_p)
    device = find_device(config.device)
    subject = find_subject(config.run, config.tokenizer)
    encoder, model = subject.encoder, load(subject.weights, device)
    prompt = encoder.encode([config.prompt])[:-1].tolist() if config.prompt else []
    ids = torch.tensor([[encoder.end_of_text, *prompt]], device=device)
    generator = torch.Generator(device).manual_seed(config.seed)
    if why := model.cache_refusal():
        print(f"sisa: every token runs all before it again: {why}", file=sys.stderr)
    out = generate(
        model,
        ids,
        config.max_new_tokens,
        config.temperature,
        why is None,
        top_k=config.top_k,
        top_p=config.top_p,
        generator=generator,
    )
    print(encoder.decode(out[0, 1:].tolist()))


def run_convert(config: ConvertConfig) -> None:
    """Write the authors' model as a folder that :func:`sisa_model.load` reads."""
    if is_taken(config.out):
        raise FileExistsError(f"out {config.out} exists; choose another folder")
    model = load_paper_checkpoint(config.checkpoint, config.preset, config.mode)
    make_folder_atomically(config.out, lambda folder: save(model, folder))
    print(
        f"{config.preset}, {count_parameters(model):,} parameters, mode {model.config.mode}: {config.out}"
    )


def run_info(config: InfoConfig) -> None:
    """Print the presets, or one preset's fields."""
    if config.preset is not None:
        for name, value in vars(preset_config(config.preset)).items():
            print(f"{name:18} {value}")
        return
    print(f"sisa {sk.__version__}")
    columns = (
        f"{'d_model':>7} {'heads':>5} {'layers':>6} {'d_state':>7} {'mamba_state':>11} {'d_ff':>5}"
    )
    print(f"{'preset':30} {'parameters':>12}  {columns}")
    for name in presets():
        with torch.device("meta"):
            model = LanguageModel(preset_config(name))
        c = model.config
        sizes = f"{c.d_model:7} {c.n_heads:5} {c.n_layers:6} {c.d_state:7} {c.mamba_state:11} {c.d_ff:5}"
        print(f"{name:30} {count_parameters(model):12,}  {sizes}")


def run_bench_report(config: BenchReportConfig) -> None:
    """Run bench/report.py of the checkout that this package stands in: the benches are no part of
    the package.
    """
    script = Path(__file__).resolve().parent.parent / "bench" / "report.py"
    if not script.is_file():
        raise FileNotFoundError(
            f"bench-report needs a checkout of the repository, installed with pip install -e; {script} is absent"
        )
    given = {
        name: value if isinstance(value, tuple) else (value,)
        for name, value in vars(config).items()
        if value
    }
    options = [str(part) for name, values in given.items() for part in (f"--{name}", *values)]
    if subprocess.run([sys.executable, str(script), *options]).returncode:
        raise ValueError("not every figure could be drawn")


COMMANDS: dict[str, tuple[type, Callable[[Any], object]]] = {
    "prepare": (PrepareConfig, prepare),
    "train": (TrainConfig, train),
    "compare": (CompareConfig, compare),
    "study": (StudyConfig, run_study),
    "eval": (EvalConfig, evaluate),
    "plot": (PlotConfig, plot_runs),
    "inspect": (InspectConfig, inspect_run),
    "report": (ReportConfig, report),
    "generate": (GenerateConfig, run_generate),
    "convert": (ConvertConfig, run_convert),
    "info": (InfoConfig, run_info),
    "bench-report": (BenchReportConfig, run_bench_report),
}


def main(args: list[str] | None = None) -> int:
    """Run the command line; returns 0, or 1 after one line saying which argument, file or disk was
    at fault.
    """
    if (sys.argv[1:] if args is None else args) == ["--version"]:
        print(f"sisa {sk.__version__}")
        return 0
    description = "Exact SISA attention: train, compare and sample its models. `sisa --version` prints the version."
    configs: dict[str, Any] = {name: config for name, (config, _) in COMMANDS.items()}
    plain = (tyro.conf.FlagCreatePairsOff,)
    config: Any = tyro.extras.subcommand_cli_from_dict(
        configs, prog="sisa", description=description, args=args, config=plain
    )
    try:
        dict(COMMANDS.values())[type(config)](config)
    except (ValueError, TypeError, OSError, FloatingPointError) as error:
        print(f"sisa: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0
