"""TrainConfig, what a training run may be told, and ResolvedConfig, all that it then goes by."""

import dataclasses
import functools
import math
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypedDict

import torch
import tyro

from sisa_kernels.inputs import Backend, Mode
from sisa_model.data.corpus import find_tokenizer, prepared
from sisa_model.data.shards import TOKENIZER
from sisa_model.data.sources import AS_NAMED, Format, Reading
from sisa_model.data.synthetic import LENGTHS, TASKS, RetrievalTask, find_task
from sisa_model.models.checkpoint import CONFIG, read_config
from sisa_model.models.config import ModelConfig
from sisa_model.models.context import context_refusal
from sisa_model.models.presets import AUTHORS_TRAINING, find_preset, preset_config
from sisa_model.models.tensor_parallel import tensor_refusal
from sisa_model.runs.log import LogTarget, check_logs
from sisa_model.runs.weights import find_weights
from sisa_model.utils.flags import field_docs

Recipe = Literal["ours", "paper"]
Schedule = Literal["cosine", "wsd", "constant"]
Precision = Literal["auto", "fp32", "bf16"]
TrainPrecision = Literal["auto", "fp32", "bf16", "bf16-pure"]
Documents = Literal["joined", "packed"]
Sharing = Literal["auto", "ddp", "fsdp"]


@functools.cache
def _model_flags() -> dict[str, Any]:
    """ModelConfig's fields as flags; others are --preset, --mode, --backend and --precision."""
    docs = field_docs(ModelConfig)
    hints = typing.get_type_hints(ModelConfig)
    elsewhere = ("family", "mode", "backend", "weights")
    return {
        name: Annotated[hints[name], tyro.conf.arg(help=doc)]
        for name, doc in docs.items()
        if name not in elsewhere
    }


if TYPE_CHECKING:
    ModelOverrides = dict[str, Any]
else:
    ModelOverrides = TypedDict("ModelOverrides", _model_flags(), total=False)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train a model on text or on a task, into a run folder that resumes, bit for bit on a CPU.

    What is left out takes the preset's value: the paper's, or for tiny presets a few minutes'
    worth. `sisa train --preset NAME --help` shows those of a preset."""

    preset: str = "sisa-tiny-ds16"
    """Model to train; `sisa info` lists them."""
    model: ModelOverrides = field(default_factory=dict)
    """Fields of the preset's model to change."""
    data: tuple[Path, ...] = ()
    """Files or folders of text, jsonl or parquet (plain, .gz, .xz or .zst), or a folder of
    `sisa prepare`. Lines of `<|endoftext|>` separate documents of text. Default: Python's standard
    library."""
    val_data: tuple[Path, ...] = ()
    """Held-out text. Default: 5 % of the data, by file (or by document, where files are few)."""
    text_field: str = "text"
    """Field of a jsonl or parquet row that holds the text."""
    format: Format = "auto"
    """What the files are read as; auto: as their names say (.jsonl, .parquet, .txt, .py ...)."""
    skip_bad: bool = False
    """Pass over lines and files that are no text, and count them, instead of stopping there."""
    tokenizer: Path | None = None
    """A `tokenizers` JSON file. Default: that of a prepared folder, or bytes."""
    out: Path | None = None
    """Run folder, which must not exist yet. Default: runs/PRESET, or PRESET-2, -3 ... if taken."""
    recipe: Recipe = "ours"
    """ours, or paper: what the authors' code does otherwise, as docs/reproduce.md lists it: their
    warm-up and optimizer, Mamba's first weights and decay, and where a flag does not say otherwise
    precision bf16-pure, mode clamped, their micro-batches."""
    init_from: Path | None = None
    """Weights to begin with: a run, a folder that sisa_model.save wrote, or transformers'
    save_pretrained. The model is theirs then, and so is the tokenizer unless one is given."""
    steps: int | None = None
    """Optimizer steps of the whole run; with --resume, more than before extend it."""
    seed: int = 0
    """Seed of the initial weights, the order of the data and the retrieval tasks."""
    seq_len: int | None = None
    """Tokens a sequence."""
    batch_size: int | None = None
    """Sequences an optimizer step."""
    micro_batch_size: int | None = None
    """Sequences a forward pass of a process; gradients are accumulated over the batch.
    Changes memory, not the result beyond rounding."""
    lr: float | None = None
    """Peak learning rate. It may be changed with --resume."""
    schedule: Schedule = "cosine"
    """How the learning rate goes on after its warm-up: along a cosine to 0; constant; or wsd,
    constant and in the last steps straight to 0: such a run is extended as if always longer."""
    decay_steps: int | None = None
    """Steps in which wsd falls to 0. Default: a tenth of the run."""
    lambda_lr_scale: float = 0.1
    """Learning rate of lambda_raw relative to the rest."""
    warmup_steps: int | None = None
    """Steps of linear warm-up; a tenth of a run too short for the preset's."""
    weight_decay: float = 0.1
    """AdamW weight decay (never on lambda_raw)."""
    beta1: float = 0.9
    """AdamW beta1."""
    beta2: float = 0.95
    """AdamW beta2."""
    clip: float = 1.0
    """Gradient norm above which gradients are scaled down to it."""
    skip_bad_batches: int = 0
    """Batches that a launch may pass over, as their loss or gradient is not finite."""
    precision: TrainPrecision = "auto"
    """fp32; bf16 autocast over fp32 weights; bf16-pure: weights and AdamW's moments in bf16, too.
    auto: bf16 on a GPU, fp32 on a CPU, bf16-pure with the recipe paper."""
    mode: Mode | None = None
    """SISA's numerics: exact (the default), or clamped as its authors ran it (recipe paper's)."""
    backend: Backend = "auto"
    """SISA's attention path; see `python -m sisa_kernels`."""
    documents: Documents = "joined"
    """What a block sees: all before it (joined, the paper's), or its own document only (packed)."""
    task: str = "text"
    """What to train on: text, or one task alone: parity, addition, flipflop or recall.
    It is evaluated at 1, 2 and 4 times the length; addition is modulo 5, addition-7 modulo 7."""
    mix: tuple[RetrievalTask, ...] = ()
    """Retrieval tasks mixed into training on text, and evaluated."""
    log: tuple[LogTarget, ...] = ()
    """Where curves go beside the jsonl files: tensorboard (RUN/tensorboard), wandb."""
    val_every: int | None = None
    """Steps between evaluations on held-out data."""
    val_blocks: int = 64
    """Held-out blocks of text of an evaluation."""
    save_every: int | None = None
    """Steps between checkpoints."""
    keep: int = 2
    """Checkpoints that stay, the newest."""
    keep_best: bool = False
    """The checkpoint of the lowest held-out loss stays, too."""
    sample_tokens: int = 200
    """Tokens of the sample of text written at the end; 0 for none."""
    device: str = "auto"
    """cpu, cuda, cuda:1 ...; auto: a GPU if there is one."""
    parallel: Sharing = "auto"
    """How torchrun shares work: ddp (auto), a whole model each, or fsdp, a share of each layer."""
    context_parallel: int = 1
    """Processes that each sequence is cut over, for sequences longer than one can hold."""
    tensor_parallel: int = 1
    """Processes that each layer is cut over, by heads and widths."""
    activation_checkpointing: bool = False
    """Run each layer again in the backward: less memory, a third more arithmetic."""
    compile: bool = False
    """Compile the layers with torch.compile: a slow first step, faster ones after it."""
    stop_at: int | None = None
    """Save and stop after this step, as Ctrl-C would, to continue later with --resume."""
    resume: bool = False
    """Continue the run in --out, bit for bit on a CPU, with the settings it was begun with.
    Of data that moved give the new paths. A flag set otherwise is an error; one set to its
    default counts as left out."""

    @property
    def reading(self) -> Reading:
        """How its data is read."""
        return Reading(self.text_field, self.format, self.skip_bad)

    @property
    def title(self) -> str:
        """The model in words: its preset, and what departs from it."""
        return ", ".join([self.preset, *(f"{name} {value}" for name, value in self.model.items())])


@dataclass(frozen=True, kw_only=True)
class ResolvedConfig(TrainConfig):
    """A run's settings with the preset's values and the tokenizer's file filled in, all checked.

    :func:`resolve` makes it; run.json and run.toml hold it. Its paths to data are absolute."""

    steps: int = field()
    seq_len: int = field()
    batch_size: int = field()
    micro_batch_size: int = field()
    lr: float = field()
    warmup_steps: int = field()
    val_every: int = field()
    save_every: int = field()
    mode: Mode = field()

    @property
    def last_step(self) -> int:
        """The step that this launch ends at."""
        return min(self.steps, self.stop_at or self.steps)

    def model_config(self, tokens: int) -> ModelConfig:
        """The model's configuration, with room for ``tokens`` tokens and the longest sequence.

        That is the longest that is trained on or evaluated."""
        known = preset_config(self.preset, **self.model)
        longest = self.seq_len * (1 if self.task == "text" else max(LENGTHS))
        room = {
            "vocab_size": max(known.vocab_size, tokens),
            "max_seq_len": max(known.max_seq_len, longest),
        }
        weights = "bf16" if self.precision == "bf16-pure" else "fp32"
        run = {"mode": self.mode, "backend": self.backend, "weights": weights}
        return preset_config(self.preset, **{**self.model, **room, **run})


# All else would make it another run. LAUNCH is as each launch says; the others are as the run began
# where a launch says nothing.
LAUNCH = {"device", "parallel", "context_parallel", "tensor_parallel", "stop_at", "resume", "out"}
PERFORMANCE = {"keep", "keep_best", "activation_checkpointing", "compile", "log"}
PERFORMANCE |= {"micro_batch_size", "skip_bad_batches"}
RESUME_MAY_CHANGE = LAUNCH | PERFORMANCE
# What a run that goes on may be told anew, and then keeps.
GOING_ON = {"steps", "lr"}
# May lead elsewhere: a run that goes on compares the tokens.
PATHS = {"data", "val_data", "tokenizer"}


def runs_in_bf16(precision: TrainPrecision, device: torch.device) -> bool:
    """Whether a model computes under bf16 autocast: where it is asked for, and "auto" on a GPU."""
    return precision in ("bf16", "bf16-pure") or (precision == "auto" and device.type == "cuda")


def with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """``config`` with absolute paths to the data, so that a run resumes from any working folder."""
    return dataclasses.replace(
        config,
        data=tuple(path.absolute() for path in config.data),
        val_data=tuple(path.absolute() for path in config.val_data),
        tokenizer=None if config.tokenizer is None else config.tokenizer.absolute(),
        init_from=None if config.init_from is None else config.init_from.absolute(),
    )


def resolve(config: TrainConfig) -> ResolvedConfig:
    """Fill in what ``config`` leaves open and check every field.

    Raises ValueError naming the first bad field, FileNotFoundError for a tokenizer's file."""
    if unknown := sorted(config.model.keys() - _model_flags().keys()):
        raise ValueError(
            f"model must hold fields among {', '.join(_model_flags())}, got {unknown[0]!r}"
        )
    _require(config, "recipe", config.recipe in typing.get_args(Recipe), "ours or paper")
    if config.init_from is not None and not config.resume:
        config = _with_initial_model(config, config.init_from)
    config = _with_precision(config)
    training = preset_defaults(config)
    preset_values = {name: x for name, x in training.items() if getattr(config, name) is None}
    mode = preset_values.get("mode", config.mode)
    preset_config(config.preset, **config.model, mode=mode, backend=config.backend)
    absolute = with_absolute_paths(config)
    tokenizer = find_tokenizer(absolute.data, absolute.tokenizer)
    settings = {item.name: getattr(absolute, item.name) for item in dataclasses.fields(TrainConfig)}
    resolved = ResolvedConfig(**{**settings, **preset_values, "tokenizer": tokenizer})
    _check_numbers(resolved)
    _check_choices(resolved)
    if config.task != "text":
        _check_task(resolved)
    _check_split(resolved)
    return resolved


def preset_defaults(config: TrainConfig) -> dict[str, Any]:
    """What the preset trains with by the recipe, and its mode.

    A run that is too short for its warm-up warms up for a tenth."""
    preset = find_preset(config.preset)
    training = {**dataclasses.asdict(preset.training), "mode": "exact"}
    if config.recipe == "paper":
        training |= AUTHORS_TRAINING[preset.scale]
        model = preset_config(config.preset, **config.model)
        if model.family == "sisa" and model.lam != "zero":
            training["mode"] = "clamped"
    if config.steps is not None:
        training["warmup_steps"] = min(training["warmup_steps"], config.steps // 10)
    if config.schedule == "wsd":
        training["decay_steps"] = max(1, (config.steps or training["steps"]) // 10)
    return training


def _with_initial_model(config: TrainConfig, folder: Path) -> TrainConfig:
    """``config`` with the model, and where none is given the tokenizer, of the weights it has."""
    weights = find_weights(folder)
    found = read_config(weights / CONFIG)
    preset = find_preset(config.preset).model
    if found.family != preset.family:
        raise ValueError(
            f"preset must be of the family {found.family}, as the weights in {weights} are, got "
            f"{config.preset}"
        )
    own = {name: getattr(found, name) for name in _model_flags()}
    model = {name: value for name, value in own.items() if value != getattr(preset, name)}
    tokenizer = config.tokenizer
    if tokenizer is None and (weights / TOKENIZER).is_file() and prepared(config.data) is None:
        tokenizer = weights / TOKENIZER
    return dataclasses.replace(config, model={**model, **config.model}, tokenizer=tokenizer)


def _with_precision(config: TrainConfig) -> TrainConfig:
    """``config`` with the precision of its recipe where it is left at "auto"."""
    if config.recipe == "paper" and config.precision == "auto":
        return dataclasses.replace(config, precision="bf16-pure")
    return config


def _require(config: TrainConfig, field: str, ok: bool, allowed: str) -> None:
    if not ok:
        raise ValueError(f"{field} must be {allowed}, got {getattr(config, field)!r}")


def _check_numbers(config: ResolvedConfig) -> None:
    counts = ("steps", "seq_len", "batch_size", "micro_batch_size", "val_every", "val_blocks")
    for name in (*counts, "save_every", "keep", "context_parallel", "tensor_parallel"):
        _require(config, name, getattr(config, name) >= 1, "at least 1")
    least_0 = ("warmup_steps", "weight_decay", "lambda_lr_scale", "sample_tokens", "seed")
    for name in (*least_0, "skip_bad_batches"):
        _require(config, name, getattr(config, name) >= 0, "at least 0")
    for name in ("lr", "clip"):
        _require(config, name, 0 < getattr(config, name) < math.inf, "above 0 and finite")
    for name in ("beta1", "beta2"):
        _require(config, name, 0 <= getattr(config, name) < 1, "in [0, 1)")
    _require(config, "stop_at", config.stop_at is None or config.stop_at >= 1, "at least 1")
    _require(config, "seed", config.seed < 2**63, "below 2 ** 63")
    if config.mix:
        _require(config, "seq_len", config.seq_len >= 64, "at least 64 with retrieval tasks")


def _check_choices(config: ResolvedConfig) -> None:
    choices = {
        "precision": TrainPrecision,
        "documents": Documents,
        "parallel": Sharing,
        "schedule": Schedule,
    }
    for name, choice in choices.items():
        allowed = typing.get_args(choice)
        _require(config, name, getattr(config, name) in allowed, f"one of {', '.join(allowed)}")
    _require(config, "mix", set(config.mix) <= TASKS.keys(), f"among {', '.join(TASKS)}")
    _require(config, "mix", len(set(config.mix)) == len(config.mix), "all different")
    if config.schedule == "wsd":
        decay = config.decay_steps
        inside = decay is not None and 1 <= decay <= config.steps
        _require(config, "decay_steps", inside, f"from 1 to the {config.steps} steps of the run")
    else:
        left_out = f"left out with the schedule {config.schedule}"
        _require(config, "decay_steps", config.decay_steps is None, left_out)
    if config.reading != AS_NAMED and not config.data:
        raise ValueError("data must be given with text_field, format or skip_bad, got none")
    possible = config.precision != "bf16-pure" or config.parallel != "fsdp"
    _require(config, "parallel", possible, "ddp or auto with precision bf16-pure")
    check_logs(config.log)


def _check_split(config: ResolvedConfig) -> None:
    """Of a model that several processes have parts of."""
    model = preset_config(config.preset, **config.model, mode=config.mode)
    if config.tensor_parallel > 1:
        why = tensor_refusal(model, config.tensor_parallel)
        _require(config, "tensor_parallel", why is None, f"1, or what divides the model: {why}")
        allowed = "left out with tensor_parallel, whose layers torch.compile does not take"
        _require(config, "compile", not config.compile, allowed)
    if config.context_parallel > 1:
        why = context_refusal(model)
        _require(config, "context_parallel", why is None, f"1 for this model: {why}")
        least = 2 * config.context_parallel
        _require(config, "seq_len", config.seq_len >= least, f"at least {least}, to be cut so")


def _check_task(config: ResolvedConfig) -> None:
    """Of a task that is trained alone, without text."""
    find_task(config.task)
    _require(config, "seq_len", config.seq_len >= 16, f"at least 16 for the task {config.task}")
    for name in ("data", "val_data", "tokenizer", "mix"):
        allowed = f"left out with the task {config.task}, which is trained without text"
        _require(config, name, not getattr(config, name), allowed)
    allowed = f"left at 'joined' with the task {config.task}, which has none"
    _require(config, "documents", config.documents == "joined", allowed)
