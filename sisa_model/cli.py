"""The command ``sisa``: its commands, settings files, and what it prints."""

import contextlib
import dataclasses
import inspect
import logging
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TextIO, Union

import torch
import tyro

import sisa_kernels as sk
from sisa_kernels.inputs import Mode
from sisa_model.data.prepare import PrepareConfig, prepare
from sisa_model.evaluation.config import EvalConfig
from sisa_model.evaluation.evaluate import evaluate
from sisa_model.evaluation.inspection import InspectConfig, inspect_run
from sisa_model.evaluation.sample import GenerateConfig, continue_prompt
from sisa_model.experiments.compare import CompareConfig, compare
from sisa_model.experiments.plot_runs import PlotConfig, plot_runs
from sisa_model.experiments.report import ReportConfig, report
from sisa_model.experiments.study import StudyConfig, run_study
from sisa_model.experiments.watch import WatchConfig, watch
from sisa_model.interop.authors import load_paper_checkpoint
from sisa_model.models.checkpoint import save
from sisa_model.models.language_model import LanguageModel, count_parameters
from sisa_model.models.presets import find_preset, preset_config, presets
from sisa_model.models.size import ModelSize, model_size
from sisa_model.runs.config import TrainConfig
from sisa_model.runs.folder import is_taken
from sisa_model.runs.toml import read_settings
from sisa_model.training.trainer import RunStopped, TrainResult, train
from sisa_model.utils.files import make_folder_atomically

STOPPED = 75  # of a run that is to be continued: "try again later", by sysexits.h
DESCRIPTION = """Exact SISA attention: train, compare and sample its models.
`sisa COMMAND --help` explains a command and its flags, which a file may hold too
(--config FILE.toml). `sisa --version` prints the version."""


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Turn a checkpoint of the paper's authors into config.json and model.safetensors."""

    checkpoint: tyro.conf.Positional[Path]
    """The authors' .pt file."""
    preset: str
    """Model it holds; `sisa info` lists them."""
    out: Path
    """Folder to make."""
    mode: Mode = "clamped"
    """SISA's numerics: clamped, what the authors trained with, or exact."""


@dataclass(frozen=True, kw_only=True)
class InfoConfig:
    """List the presets, or say what one costs: parameters, FLOPs a token, memory."""

    preset: tyro.conf.Positional[str | None] = None
    """Show every field of this one and its costs."""


def convert(config: ConvertConfig) -> str:
    """Write the authors' model as a folder that :func:`sisa_model.load` reads; says what it is.

    Raises FileExistsError for a folder that exists, and as
    :func:`sisa_model.load_paper_checkpoint` does."""
    if is_taken(config.out):
        raise FileExistsError(f"out {config.out} exists; choose another folder")
    model = load_paper_checkpoint(config.checkpoint, config.preset, config.mode)
    make_folder_atomically(config.out, lambda folder: save(model, folder))
    count = count_parameters(model)
    return f"{config.preset}, {count:,} parameters, mode {model.config.mode}: {config.out}"


def info(config: InfoConfig) -> str:
    """The presets, or one preset's fields and costs."""
    if config.preset is None:
        return _presets()
    preset = find_preset(config.preset)
    fields = [f"{name:18} {value}" for name, value in vars(preset.model).items()]
    seq_len = preset.training.seq_len
    costs = _costs(model_size(preset.model, seq_len))
    about = f"Trained with AdamW on sequences of {seq_len:,} tokens:"
    return "\n".join([*fields, "", about, *(f"{name:34} {value:>15}" for name, value in costs)])


def _costs(size: ModelSize) -> list[tuple[str, str]]:
    def mib(count: int) -> str:
        return f"{count / 2**20:,.1f} MiB"

    costs = [
        ("parameters", f"{size.parameters:,}"),
        ("FLOPs a token, forward", f"{size.forward_flops:,.0f}"),
        ("FLOPs a token, with backward", f"{size.training_flops:,.0f}"),
        ("weights", mib(size.weights)),
        ("gradients", mib(size.weights)),
        ("optimizer's moments", mib(2 * size.weights)),
        ("activations of a sequence, fp32", mib(size.activations)),
        ("activations of a sequence, bf16", mib(size.activations_bf16)),
    ]
    if size.cache_per_token is not None and size.cache_per_sequence is not None:
        costs.append(("cache in decoding, of a token", f"{size.cache_per_token:,} bytes"))
        costs.append(("cache in decoding, of a sequence", f"{size.cache_per_sequence:,} bytes"))
    return costs


def _presets() -> str:
    columns = {
        "d_model": "d_model",
        "heads": "n_heads",
        "layers": "n_layers",
        "d_state": "d_state",
        "mamba_state": "mamba_state",
        "d_ff": "d_ff",
    }
    widths = {title: max(5, len(title)) for title in columns}
    titles = " ".join(f"{title:>{width}}" for title, width in widths.items())
    lines = [f"sisa {sk.__version__}", f"{'preset':30} {'parameters':>12}  {titles}"]
    for name in presets():
        with torch.device("meta"):
            model = LanguageModel(preset_config(name))
        values = {title: getattr(model.config, field) for title, field in columns.items()}
        row = " ".join(f"{value:{widths[title]}}" for title, value in values.items())
        lines.append(f"{name:30} {count_parameters(model):12,}  {row}")
    return "\n".join(lines)


def _write(text: str) -> None:
    print(text, end="", flush=True)


class Command(NamedTuple):
    """What a command is told, and what it does; a text that it returns is printed."""

    config: type
    run: Callable[[Any], object]


COMMANDS = {
    "prepare": Command(PrepareConfig, prepare),
    "train": Command(TrainConfig, train),
    "compare": Command(CompareConfig, compare),
    "study": Command(StudyConfig, run_study),
    "eval": Command(EvalConfig, evaluate),
    "plot": Command(PlotConfig, plot_runs),
    "watch": Command(WatchConfig, watch),
    "inspect": Command(InspectConfig, inspect_run),
    "report": Command(ReportConfig, report),
    "generate": Command(GenerateConfig, lambda config: continue_prompt(config, _write)),
    "convert": Command(ConvertConfig, convert),
    "info": Command(InfoConfig, info),
}
# What flags were called before, and are still understood as; "" for a value without a flag.
FORMER_FLAGS = {
    "train": {"--tasks": "--mix"},
    "study": {"--tasks": "--mix"},
    "info": {"--preset": ""},
}


def parse(args: list[str]) -> tuple[Command, Any]:
    """The command that ``args`` name, and its settings: its --config file's, flags over them.

    Raises FileNotFoundError or ValueError for the file, SystemExit for the rest."""
    name = args[0] if args else ""
    args = [part for arg in args for part in _renamed(arg, FORMER_FLAGS.get(name, {}))]
    file = _config_file(args)
    choices = []
    for known, command in COMMANDS.items():
        options = _with_config_flag(command.config, whole=known == name)
        given: dict[str, Any] = {}
        if known == name and file is not None:
            settings = _defaults(command.config, file)
            given["default"] = options(settings=settings, config=file)
        choices.append(Annotated[options, tyro.conf.subcommand(known, **given)])
    command_line: Any = Union[tuple(choices)]  # noqa: UP007 - of as many as there are
    parsed = tyro.cli(
        command_line,
        prog="sisa",
        description=DESCRIPTION,
        args=args,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    return COMMANDS[name], parsed.settings


def _renamed(arg: str, former: dict[str, str]) -> list[str]:
    """``arg``, which may be FLAG=VALUE, with the name that its flag has now."""
    flag, _, value = arg.partition("=")
    if flag not in former:
        return [arg]
    return [part for part in (former[flag], value) if part]


def _with_config_flag(config: type, whole: bool) -> Any:
    """``config`` and --config as one record for tyro, with the ``whole`` docstring or a summary."""
    told = tyro.conf.arg(metavar="FILE.toml", help="File of flags; those given here win over it.")
    unprefixed = tyro.conf.arg(name="")
    options = dataclasses.make_dataclass(
        config.__name__,
        [
            ("settings", Annotated[config, unprefixed]),  # type: ignore[valid-type]
            ("config", Annotated[Path | None, told], None),
        ],
        kw_only=True,
    )
    description = inspect.cleandoc(config.__doc__ or "")
    options.__doc__ = description if whole else description.split("\n\n")[0]
    return options


def _config_file(args: list[str]) -> Path | None:
    """The value of the last --config."""
    found = None
    for arg, following in zip(args, [*args[1:], None]):
        name, equals, value = arg.partition("=")
        if name == "--config" and (equals or following is not None):
            found = Path(value if equals else str(following))
    return found


def _defaults(config: type, file: Path) -> Any:
    """``config`` as ``file`` has it; what neither it nor the dataclass says is tyro's to demand."""
    required = {
        item.name: tyro.MISSING
        for item in dataclasses.fields(config)
        if item.default is item.default_factory is dataclasses.MISSING
    }
    return config(**{**required, **read_settings(file, config)})


class _Messages(logging.StreamHandler):
    """Ends the command where nobody reads on, instead of telling of it at each message."""

    def handleError(self, record: logging.LogRecord) -> None:
        if isinstance(sys.exc_info()[1], BrokenPipeError):
            raise
        super().handleError(record)


@contextlib.contextmanager
def messages_on(out: TextIO, err: TextIO) -> Iterator[None]:
    """Let the packages' messages appear bare on ``out``, their warnings on ``err``."""
    told = _Messages(out)
    told.setFormatter(logging.Formatter("%(message)s"))
    told.addFilter(lambda record: record.levelno < logging.WARNING)
    warned = logging.StreamHandler(err)
    warned.setFormatter(logging.Formatter("sisa: %(message)s"))
    warned.setLevel(logging.WARNING)
    loggers = [logging.getLogger(name) for name in ("sisa_model", "sisa_kernels")]
    for logger in loggers:
        logger.setLevel(logging.INFO)
        logger.addHandler(told)
        logger.addHandler(warned)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(told)
            logger.removeHandler(warned)


def main(args: list[str] | None = None) -> int:
    """Run a command; 0, or 1 after one line on which argument, file or disk was at fault.

    75 for training that was stopped before its end, 141 where nobody reads the output on."""
    args = sys.argv[1:] if args is None else args
    if args == ["--version"]:
        print(f"sisa {sk.__version__}")
        return 0
    try:
        with messages_on(sys.stdout, sys.stderr):
            command, settings = parse(args)
            product = command.run(settings)
        if isinstance(product, str):
            print(product, flush=True)
        if isinstance(product, TrainResult) and not product.finished:
            return STOPPED
    except RunStopped as stop:
        print(stop)
        return STOPPED
    except BrokenPipeError:  # `sisa ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python's last flush
        return 141  # as a shell has it of a program that SIGPIPE ended
    except (ValueError, TypeError, OSError, FloatingPointError) as error:
        print(f"sisa: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0
