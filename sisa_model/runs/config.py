"""A training run's settings, its folder and its record: what every command that reads or makes runs
shares.
"""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from sisa_model.data.corpus import find_tokenizer
from sisa_model.data.synthetic import TASKS, find_task
from sisa_model.models.presets import preset_config
from sisa_model.runs.log import check_logs

# What the paper's presets train with (paper, section 4), and tiny's own: a few minutes on a laptop.
_PAPER = {
    "steps": 9536,
    "batch_size": 256,
    "micro_batch_size": 8,
    "seq_len": 2048,
    "lr": 6e-4,
    "warmup_steps": 500,
    "val_every": 1000,
    "save_every": 500,
}
_TINY = {
    "steps": 1000,
    "batch_size": 16,
    "micro_batch_size": 32,
    "seq_len": 256,
    "lr": 3e-3,
    "warmup_steps": 40,
    "val_every": 50,
    "save_every": 200,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "tiny": _TINY,
    "50m": _PAPER,
    "152m": _PAPER,
    "369m": {**_PAPER, "lr": 3e-4},
}
PARALLELS = ("auto", "ddp", "fsdp")
PRECISIONS = ("auto", "fp32", "bf16")
DOCUMENTS = ("joined", "packed")
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train a model. What is left at None takes the preset's value: the paper's, or for tiny
    presets a few minutes' worth.
    """

    preset: str = "sisa-tiny-ds16"
    """Model to train; `sisa info` lists them."""
    data: tuple[Path, ...] = ()
    """Text files or folders (plain, .gz, .xz or .zst; lines of `<|endoftext|>` separate documents),
    or a folder of `sisa prepare`. Default: Python's standard library."""
    val_data: tuple[Path, ...] = ()
    """Held-out text. Default: 5 % of the data, by file (or by document, where files are few)."""
    tokenizer: Path | None = None
    """A `tokenizers` JSON file. Default: that of a prepared folder, or bytes."""
    out: Path | None = None
    """Run folder, which must not exist yet. Default: runs/PRESET, or PRESET-2, -3 ... if that is
    taken.
    """
    steps: int | None = None
    """Optimizer steps of the whole run, over which the learning rate falls to 0."""
    seed: int = 0
    """Seed of the initial weights, the order of the data and the retrieval tasks."""
    seq_len: int | None = None
    """Tokens a sequence."""
    batch_size: int | None = None
    """Sequences an optimizer step."""
    micro_batch_size: int | None = None
    """Sequences a forward pass of a process; gradients are accumulated over the batch. Changes
    memory, not the result beyond rounding."""
    lr: float | None = None
    """Peak learning rate."""
    lambda_lr_scale: float = 0.1
    """Learning rate of lambda_raw relative to the rest."""
    warmup_steps: int | None = None
    """Steps of linear warm-up before the cosine; a tenth of a run too short for the preset's."""
    weight_decay: float = 0.1
    """AdamW weight decay (never on lambda_raw)."""
    beta1: float = 0.9
    """AdamW beta1."""
    beta2: float = 0.95
    """AdamW beta2."""
    clip: float = 1.0
    """Gradient norm above which gradients are scaled down to it."""
    precision: str = "auto"
    """fp32, or bf16 autocast over fp32 weights; auto: bf16 on a GPU, fp32 on a CPU."""
    mode: str = "exact"
    """SISA's numerics: exact, or clamped as its authors ran it."""
    backend: str = "auto"
    """SISA's attention path; see `python -m sisa_kernels`."""
    documents: str = "joined"
    """What a block sees across the ends of documents: everything (joined, the paper's), or each
    document only itself (packed).
    """
    task: str = "text"
    """What to train on: text, or one task alone, evaluated at 1, 2 and 4 times the length: parity,
    addition (modulo 5; addition-7 for another modulus), flipflop or recall."""
    tasks: tuple[str, ...] = ()
    """Retrieval tasks mixed into training on text and evaluated: needle, recall."""
    log: tuple[str, ...] = ()
    """Where curves go beside the run folder's jsonl files: tensorboard (RUN/tensorboard), wandb
    (Weights & Biases).
    """
    val_every: int | None = None
    """Steps between evaluations on held-out data."""
    val_blocks: int = 64
    """Held-out blocks of text of an evaluation."""
    save_every: int | None = None
    """Steps between checkpoints."""
    keep: int = 2
    """Checkpoints that stay, the newest."""
    sample_tokens: int = 200
    """Tokens of the sample of text written at the end; 0 for none."""
    device: str = "auto"
    """cpu, cuda, cuda:1 ...; auto: a GPU if there is one."""
    parallel: str = "auto"
    """How the processes of torchrun share the work: ddp (a whole model each) or fsdp (a share of
    every layer each); auto: ddp.
    """
    activation_checkpointing: bool = False
    """Keep only the layers' inputs for the backward and run each layer again there: less memory, a
    third more arithmetic.
    """
    compile: bool = False
    """Compile the layers with torch.compile: a slow first step, faster ones after it."""
    stop_at: int | None = None
    """Save and stop after this step, as Ctrl-C would, to continue later with --resume."""
    resume: bool = False
    """Continue the run in --out, bit for bit on a CPU, with the settings it was begun with; of data
    that moved give the new paths. A flag set otherwise is an error; one set to its default counts
    as left out."""


# All else would make it another run. LAUNCH is as each launch says; the others are as the run began
# where a launch says nothing.
LAUNCH = {"device", "parallel", "stop_at", "resume", "out"}
RESUME_MAY_CHANGE = LAUNCH | {
    "keep",
    "activation_checkpointing",
    "compile",
    "log",
    "micro_batch_size",
}
PATHS = {
    "data",
    "val_data",
    "tokenizer",
}  # may lead elsewhere: a run that goes on compares the tokens


def _absolute(config: TrainConfig) -> TrainConfig:
    """With absolute paths to the data, so that a run resumes from any working folder."""
    data, val_data = (
        tuple(path.absolute() for path in paths) for paths in (config.data, config.val_data)
    )
    tokenizer = None if config.tokenizer is None else config.tokenizer.absolute()
    return dataclasses.replace(config, data=data, val_data=val_data, tokenizer=tokenizer)


def resolve(config: TrainConfig) -> TrainConfig:
    """Fill in the preset's values and check every field; ValueError names the first bad one."""
    preset_config(config.preset, mode=config.mode, backend=config.backend)
    config = _absolute(config)
    config = dataclasses.replace(config, tokenizer=find_tokenizer(config.data, config.tokenizer))
    defaults = dict(next(DEFAULTS[part] for part in config.preset.split("-") if part in DEFAULTS))
    if config.steps is not None:
        defaults["warmup_steps"] = min(defaults["warmup_steps"], config.steps // 10)
    config = dataclasses.replace(
        config, **{name: value for name, value in defaults.items() if getattr(config, name) is None}
    )

    def require(field: str, ok: bool, allowed: str) -> None:
        if not ok:
            raise ValueError(f"{field} must be {allowed}, got {getattr(config, field)!r}")

    for field in (
        "steps",
        "seq_len",
        "batch_size",
        "micro_batch_size",
        "val_every",
        "val_blocks",
        "save_every",
        "keep",
    ):
        require(field, getattr(config, field) >= 1, "at least 1")
    for field in ("warmup_steps", "weight_decay", "lambda_lr_scale", "sample_tokens", "seed"):
        require(field, getattr(config, field) >= 0, "at least 0")
    for field in ("lr", "clip"):
        require(field, 0 < getattr(config, field) < math.inf, "above 0 and finite")
    for field in ("beta1", "beta2"):
        require(field, 0 <= getattr(config, field) < 1, "in [0, 1)")
    require("precision", config.precision in PRECISIONS, f"one of {', '.join(PRECISIONS)}")
    require("documents", config.documents in DOCUMENTS, f"one of {', '.join(DOCUMENTS)}")
    require("parallel", config.parallel in PARALLELS, f"one of {', '.join(PARALLELS)}")
    require("stop_at", config.stop_at is None or config.stop_at >= 1, "at least 1")
    for task in config.tasks:
        require("tasks", task in TASKS, f"among {', '.join(TASKS)}")
    require("tasks", len(set(config.tasks)) == len(config.tasks), "all different")
    check_logs(config.log)
    require("seed", config.seed < 2**63, "below 2 ** 63")
    if config.tasks:
        require(
            "seq_len",
            config.seq_len is not None and config.seq_len >= 64,
            "at least 64 with retrieval tasks",
        )
    if config.task != "text":
        find_task(config.task)
        require(
            "seq_len", resolved(config.seq_len) >= 16, f"at least 16 for the task {config.task}"
        )
        for field in ("data", "val_data", "tokenizer", "tasks"):
            require(
                field,
                not getattr(config, field),
                f"left out with the task {config.task}, which is trained without text",
            )
        require(
            "documents",
            config.documents == "joined",
            f"left at 'joined' with the task {config.task}, which has none",
        )
    return config


def resolved(value: T | None) -> T:
    assert value is not None, "resolve() fills in the preset's values"
    return value
