"""The training run: configuration, loop, logs, checkpoints, resume (paper, section 4)."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import platform
import shutil
import signal
import subprocess
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import sisa_kernels as sk

from .checkpoint import load_state, make_folder_atomically, read_config, save, write_json, write_text
from .config import ModelConfig
from .data import Blocks, Encoder, find_tokenizer, ngram_losses, open_data
from .flops import utilisation
from .generate import generate
from .model import LanguageModel, count_parameters
from .plot import plot_health, plot_losses
from .presets import preset_config
from .runlog import RunLog, check_logs, peak_memory_mib, read_rows
from .sisa import health
from .tasks import IGNORE, LENGTHS, TASKS, Sample, TaskBlocks, accuracy, exams, find_task

# What the paper's presets train with (paper, section 4), and tiny's own: a few minutes on a laptop.
_PAPER = {
    "steps": 9536, "batch_size": 256, "micro_batch_size": 8, "seq_len": 2048, "lr": 6e-4, "warmup_steps": 500,
    "val_every": 1000, "save_every": 500,
}  # fmt: skip
_TINY = {
    "steps": 1000, "batch_size": 16, "micro_batch_size": 32, "seq_len": 256, "lr": 3e-3, "warmup_steps": 40,
    "val_every": 50, "save_every": 200,
}  # fmt: skip
DEFAULTS: dict[str, dict[str, Any]] = {
    "tiny": _TINY,
    "50m": _PAPER,
    "152m": _PAPER,
    "369m": {**_PAPER, "lr": 3e-4},
}
TASK_BATCH = 16  # sequences a step of each retrieval task in the mix
TASK_EVAL = 256  # sequences a retrieval accuracy is measured on: 256 needles, about 7,000 recalls
TASK_EXAM = 128  # sequences of each length that a task trained alone is evaluated on
T = TypeVar("T")
KEEP = 2  # checkpoints that stay
HEALTH_BLOCKS = 4  # held-out blocks that lambda, half-life and the range of g are measured on
PRECISIONS = ("auto", "fp32", "bf16")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train a model. What is left at None takes the preset's value: the paper's, or for tiny presets a few minutes' worth."""

    preset: str = "sisa-tiny-ds16"
    """Model to train; `sisa info` lists them."""
    data: tuple[Path, ...] = ()
    """Text files or folders (plain, .gz, .xz or .zst; lines of <|endoftext|> separate documents), or a folder of `sisa prepare`.
    Default: Python's standard library."""
    val_data: tuple[Path, ...] = ()
    """Held-out text. Default: 5 % of the data, by file (or by document, where files are few)."""
    tokenizer: Path | None = None
    """A `tokenizers` JSON file. Default: that of a prepared folder, or bytes."""
    out: Path | None = None
    """Run folder, which must not exist yet. Default: runs/PRESET, or PRESET-2, -3 ... if that is taken."""
    steps: int | None = None
    """Optimizer steps of the whole run, over which the learning rate falls to 0."""
    seed: int = 0
    """Seed of the initial weights, the order of the data and the retrieval tasks."""
    seq_len: int | None = None
    """Tokens a sequence."""
    batch_size: int | None = None
    """Sequences an optimizer step."""
    micro_batch_size: int | None = None
    """Sequences a forward pass; gradients are accumulated over the batch. Changes memory, not the result beyond rounding."""
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
    task: str = "text"
    """What to train on: text, or one task alone, evaluated at 1, 2 and 4 times the length: parity, addition (modulo 5; addition-7
    for another modulus), flipflop or recall."""
    tasks: tuple[str, ...] = ()
    """Retrieval tasks mixed into training on text and evaluated: needle, recall."""
    log: tuple[str, ...] = ()
    """Where curves go beside the run folder's jsonl files: tensorboard (RUN/tensorboard), wandb (Weights & Biases)."""
    val_every: int | None = None
    """Steps between evaluations on held-out data."""
    val_blocks: int = 64
    """Held-out blocks of text of an evaluation."""
    save_every: int | None = None
    """Steps between checkpoints; the two newest are kept."""
    sample_tokens: int = 200
    """Tokens of the sample of text written at the end; 0 for none."""
    device: str = "auto"
    """cpu, cuda, cuda:1 ...; auto: a GPU if there is one."""
    stop_at: int | None = None
    """Save and stop after this step, as Ctrl-C would, to continue later with --resume."""
    resume: bool = False
    """Continue the run in --out, bit for bit on a CPU, with the settings it was begun with; a flag set otherwise is an error."""


RESUME_MAY_CHANGE = {"device", "stop_at", "resume", "out", "log"}  # all else would make it another run


def _absolute(config: TrainConfig) -> TrainConfig:
    """With absolute paths to the data, so that a run resumes from any working folder."""
    data, val_data = (tuple(path.absolute() for path in paths) for paths in (config.data, config.val_data))
    tokenizer = None if config.tokenizer is None else config.tokenizer.absolute()
    return dataclasses.replace(config, data=data, val_data=val_data, tokenizer=tokenizer)


def resolve(config: TrainConfig) -> TrainConfig:
    """Fill in the preset's values and check every field; ValueError names the first bad one."""
    preset_config(config.preset)
    config = _absolute(config)
    config = dataclasses.replace(config, tokenizer=find_tokenizer(config.data, config.tokenizer))
    defaults = dict(next(DEFAULTS[part] for part in config.preset.split("-") if part in DEFAULTS))
    if config.steps is not None:
        defaults["warmup_steps"] = min(defaults["warmup_steps"], config.steps // 10)
    config = dataclasses.replace(config, **{name: value for name, value in defaults.items() if getattr(config, name) is None})

    def require(field: str, ok: bool, allowed: str) -> None:
        if not ok:
            raise ValueError(f"{field} must be {allowed}, got {getattr(config, field)!r}")

    for field in ("steps", "seq_len", "batch_size", "micro_batch_size", "val_every", "val_blocks", "save_every"):
        require(field, getattr(config, field) >= 1, "at least 1")
    for field in ("warmup_steps", "weight_decay", "lambda_lr_scale", "sample_tokens", "seed"):
        require(field, getattr(config, field) >= 0, "at least 0")
    for field in ("lr", "clip"):
        require(field, 0 < getattr(config, field) < math.inf, "above 0 and finite")
    for field in ("beta1", "beta2"):
        require(field, 0 <= getattr(config, field) < 1, "in [0, 1)")
    require("precision", config.precision in PRECISIONS, f"one of {', '.join(PRECISIONS)}")
    require("stop_at", config.stop_at is None or config.stop_at >= 1, "at least 1")
    for task in config.tasks:
        require("tasks", task in TASKS, f"among {', '.join(TASKS)}")
    require("tasks", len(set(config.tasks)) == len(config.tasks), "all different")
    check_logs(config.log)
    require("seed", config.seed < 2**63, "below 2 ** 63")
    if config.tasks:
        require("seq_len", config.seq_len is not None and config.seq_len >= 64, "at least 64 with retrieval tasks")
    if config.task != "text":
        find_task(config.task)
        require("seq_len", _resolved(config.seq_len) >= 16, f"at least 16 for the task {config.task}")
        for field in ("data", "val_data", "tokenizer", "tasks"):
            require(field, not getattr(config, field), f"left out with the task {config.task}, which is trained without text")
    return config


def _resolved(value: T | None) -> T:
    assert value is not None, "resolve() fills in the preset's values"
    return value


def find_device(name: str) -> torch.device:
    """The device of a --device flag; ValueError if this machine has no such device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device must be one this machine has, got {name!r}: {str(error).splitlines()[0]}") from error
    return device


def learning_rate(step: int, config: TrainConfig) -> float:
    """Learning rate of step 0, 1 ...: linear warm-up to the peak, then a cosine that would reach 0 at step ``steps``."""
    peak, steps, warmup_steps = _resolved(config.lr), _resolved(config.steps), _resolved(config.warmup_steps)
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, steps - warmup_steps)
    return peak * 0.5 * (1 + math.cos(math.pi * done))


def make_optimizer(model: LanguageModel, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW with lambda_raw in a group of its own: a tenth of the learning rate and no decay (paper, section 4).

    Nor is there decay on what a module names in ``no_weight_decay``: Mamba's steps, decay rates and D.
    """
    lambdas = [p for name, p in model.named_parameters() if name.endswith("lambda_raw")]
    undecayed = [getattr(m, name) for m in model.modules() for name in getattr(m, "no_weight_decay", ())]
    apart = {id(p) for p in (*lambdas, *undecayed)}
    rest = [p for p in model.parameters() if id(p) not in apart]
    groups = [
        {"params": rest, "weight_decay": config.weight_decay, "lr_scale": 1.0},
        {"params": undecayed, "weight_decay": 0.0, "lr_scale": 1.0},
        {"params": lambdas, "weight_decay": 0.0, "lr_scale": config.lambda_lr_scale},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=0.0, betas=(config.beta1, config.beta2))


def versions() -> dict[str, str]:
    """What a run depends on, for its record."""
    here = Path(__file__).resolve().parent
    commit = "unknown"
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        git = functools.partial(subprocess.run, cwd=here, capture_output=True, text=True, check=True)
        top = git(["git", "rev-parse", "--show-toplevel"]).stdout.strip()
        if Path(top) == here.parent:  # not somebody else's repository around site-packages
            commit = git(["git", "describe", "--always", "--dirty", "--abbrev=12"]).stdout.strip()
    return {
        "sisa": sk.__version__,
        "commit": commit,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": str(torch.get_num_threads()),
    }


def read_run(folder: Path) -> dict[str, Any]:
    """The record of the run in ``folder``, its "train" as a TrainConfig; FileNotFoundError or ValueError if there is none."""
    path = folder / "run.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is not a run folder of sisa train: it has no run.json")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        fields = {f.name: _from_json(f, record["train"][f.name]) for f in dataclasses.fields(TrainConfig)}
        return {**record, "train": TrainConfig(**fields), "corpus": {"sha256": record["corpus"]["sha256"]}}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not the record of a run of this version of sisa train: {error!r}") from error


def read_encoder(folder: Path) -> Encoder:
    """The tokenizer of the run in ``folder``; raises as :func:`read_run` does, and FileNotFoundError if the file is gone."""
    return Encoder(read_run(folder)["train"].tokenizer)


@dataclass
class TrainResult:
    """How a run ended."""

    folder: Path
    steps: int
    """Steps done."""
    finished: bool
    """False if it was stopped before its last step; --resume continues it."""
    val_loss: float
    """Held-out loss in nats a token at the last evaluation."""
    unigram: float
    bigram: float
    """Held-out loss of n-gram models counted on the training tokens, on the same held-out tokens (nan for a task)."""


def exam_name(task: str, factor: int) -> str:
    """What an exam of a task trained alone is called in val.jsonl, its sequences ``factor`` times as long as in training."""
    return task if factor == 1 else f"{task}_x{factor}"


def train(config: TrainConfig) -> TrainResult:
    """Run (or resume) a training run and return how it ended.

    Raises ValueError or FileNotFoundError for bad settings before anything is written, FileExistsError for a run folder that
    exists, FloatingPointError for a loss or gradient that is not finite (before the optimizer step), OSError for a full disk.
    """
    return _Run(_resumed(config) if config.resume else resolve(config)).run()


def continue_run(config: TrainConfig) -> bool:
    """Begin the run in ``config.out``, resume it, or leave it if it is finished, whichever it needs; True once it is finished.

    Raises as :func:`train` does, and ValueError for a field of ``config`` that is set, and set otherwise in a run that was begun.
    """
    assert config.out is not None
    begun = (config.out / "run.json").is_file()
    if begun and (config.out / "final").is_dir():
        require_same_run(config)
        return True
    return train(dataclasses.replace(config, resume=begun)).finished


def require_same_run(config: TrainConfig) -> dict[str, Any]:
    """The settings of the run in ``config.out``; ValueError for a field of ``config`` that is set, and set otherwise."""
    assert config.out is not None
    saved, default, config = vars(read_run(config.out)["train"]), TrainConfig(), _absolute(config)
    for name, value in saved.items():
        given = getattr(config, name)
        if name not in RESUME_MAY_CHANGE and given != getattr(default, name) and given != value:
            raise ValueError(f"{name} must stay {value!r}, as the run in {config.out} has it, got {given!r}")
    return saved


def _resumed(config: TrainConfig) -> TrainConfig:
    """The configuration in the run folder, with this call's device and stop; ValueError for a flag that contradicts it."""
    if config.out is None:
        raise ValueError("resume needs out, the run folder to continue")
    saved = require_same_run(config)
    return resolve(TrainConfig(**{**saved, **{name: getattr(config, name) for name in RESUME_MAY_CHANGE}}))


def _from_json(field: dataclasses.Field, value: Any) -> Any:
    if field.name in ("data", "val_data"):
        return tuple(Path(x) for x in value)
    if field.name in ("tasks", "log"):
        return tuple(value)
    return Path(value) if field.name in ("tokenizer", "out") and value is not None else value


class _Run:
    """A training run: what is set up before the first step, and the loop."""

    def __init__(self, config: TrainConfig):
        self.config = config
        self.steps, self.seq_len = _resolved(config.steps), _resolved(config.seq_len)
        self.batch_size, self.micro_batch_size = _resolved(config.batch_size), _resolved(config.micro_batch_size)
        self.val_every, self.save_every = _resolved(config.val_every), _resolved(config.save_every)
        self.device = find_device(config.device)
        if config.out is not None and config.out.exists() and not config.resume:
            raise FileExistsError(f"out {config.out} exists; choose another folder, or continue its run with --resume")
        bf16 = config.precision == "bf16" or (config.precision == "auto" and self.device.type == "cuda")
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=bf16)

        self.exams: dict[str, Sample] = {}
        if config.task == "text":
            self._read_text()
        else:
            self._set_task()

        torch.manual_seed(config.seed)
        self.model = LanguageModel(self._model_config()).to(self.device)
        # A path that cannot run is known before any file is made.
        with torch.no_grad(), self.autocast:
            self.model.eval()(torch.zeros(1, 2, dtype=torch.int64, device=self.device))
        # One sample a task for all evaluations and all models, from held-out text and seeds that training never uses.
        self.exams |= {task: self._exam(task, number) for number, task in enumerate(config.tasks)}
        self.optimizer = make_optimizer(self.model, config)
        self.step = 0
        self.folder = config.out or _free_folder(Path("runs") / config.preset)
        self.config = dataclasses.replace(config, out=self.folder)
        self.stop = False
        self.warned_clamped = False
        self.val_loss = math.nan

    def _read_text(self) -> None:
        config = self.config
        data = open_data(config.data, config.val_data, config.tokenizer, self.seq_len, config.seed)
        self.encoder, self.about, self.fingerprint = data.encoder, data.split, data.fingerprint
        self.train_tokens, self.val_tokens = data.train_text, data.val_text
        self.train_blocks: Blocks | TaskBlocks = data.train
        # Spread over the whole held-out text rather than its first files.
        ids = np.linspace(0, data.val.count - 1, min(config.val_blocks, data.val.count)).astype(int).tolist()
        self.val_inputs, self.val_targets = data.val.take(ids)

    def _set_task(self) -> None:
        """A task in the place of text: its exams' seed is one that training never uses, as training's are below 2 ** 63."""
        self.encoder = Encoder(None)
        config, task, top = self.config, find_task(self.config.task), self._model_config().vocab_size - 1
        self.train_blocks = TaskBlocks(task, top, self.seq_len, config.seed)
        samples = exams(task, top, self.seq_len, TASK_EXAM, 2**63)
        self.exams = {exam_name(config.task, factor): sample for factor, sample in samples.items()}
        self.val_inputs, self.val_targets = samples[1].inputs, samples[1].targets
        self.about = f"task {config.task} at length {self.seq_len}, evaluated to {LENGTHS[-1] * self.seq_len}"
        self.fingerprint = hashlib.sha256(self.val_targets.numpy().tobytes()).hexdigest()

    def _model_config(self) -> ModelConfig:
        config = self.config
        known = preset_config(config.preset)
        overrides: dict[str, Any] = {
            "vocab_size": max(known.vocab_size, self.encoder.size),
            "max_seq_len": max(known.max_seq_len, self.seq_len * (1 if config.task == "text" else LENGTHS[-1])),
            "mode": config.mode,
            "backend": config.backend,
        }
        return preset_config(config.preset, **overrides)

    def run(self) -> TrainResult:
        config, unigram, bigram = self.config, math.nan, math.nan
        if config.task == "text":
            contexts, targets = self.val_inputs.numpy().ravel(), self.val_targets.numpy().ravel()
            unigram, bigram = ngram_losses(self.train_tokens, targets, contexts, self.model.config.vocab_size)
        if config.resume:
            self._restore()
        else:
            self.folder.mkdir(parents=True)
            model = dataclasses.asdict(self.model.config)
            corpus = {"split": self.about, "sha256": self.fingerprint}
            record = {"train": dataclasses.asdict(config), "model": model, "corpus": corpus, "versions": versions()}
            write_json(self.folder / "run.json", record)
        self.log = RunLog(self.folder, self.step, config.log)
        print(f"{config.preset}: {count_parameters(self.model):,} parameters on {self.device}, run folder {self.folder}")
        print(self.about)
        last = min(self.steps, config.stop_at or self.steps)
        with self._interruptible(), tqdm(total=self.steps, initial=self.step, unit="step", dynamic_ncols=True) as bar:
            if self.step == 0:
                self._evaluate()
            while self.step < last and not self.stop:
                self._train_step(bar)
                if self.step % self.val_every == 0 or self.step == self.steps:
                    self._evaluate()
                if self.step % self.save_every == 0:
                    self._save_checkpoint()
            signal_again(signal.SIG_IGN)  # nothing interrupts the last save
            self._save_checkpoint()
            finished = self.step == self.steps
            if finished and not (self.folder / "final").exists():
                make_folder_atomically(self.folder / "final", lambda folder: save(self.model, folder))
        self.log.close()
        self._draw(unigram, bigram)
        if finished:
            self._write_sample()
            compared = f"; a unigram model {unigram:.3f}, a bigram model {bigram:.3f}" if config.task == "text" else ""
            print(f"held-out loss {self.val_loss:.3f} nats a token{compared}")
        else:
            print(f"stopped after step {self.step} of {self.steps}; continue with: sisa train --out {self.folder} --resume")
        return TrainResult(self.folder, self.step, finished, self.val_loss, unigram, bigram)

    def _batch(self, step: int) -> tuple[list[int], list[tuple[Tensor, Tensor]]]:
        """The blocks of a step, and its groups of (inputs, targets), text and each retrieval task, each with a mean of its own."""
        ids = self.train_blocks.ids(step * self.batch_size, self.batch_size)
        groups = [self.train_blocks.take(ids)]
        for number, task in enumerate(self.config.tasks):
            sample = self._sample(task, self.train_tokens, TASK_BATCH, [self.config.seed, number, step])
            groups.append((sample.inputs, sample.targets))
        return ids, groups

    def _exam(self, task: str, number: int) -> Sample:
        return self._sample(task, self.val_tokens, TASK_EVAL, [10**9, number])

    def _sample(self, task: str, text: np.ndarray, count: int, seed: list[int]) -> Sample:
        return TASKS[task](text, self.model.config.vocab_size - 1, self.seq_len, count, np.random.default_rng(seed))

    def _train_step(self, bar: tqdm) -> None:
        start = time.perf_counter()
        ids, groups = self._batch(self.step)
        self.model.train()
        losses = []
        for inputs, targets in groups:
            valid, total = int((targets != IGNORE).sum()), 0.0
            for x, y in zip(inputs.split(self.micro_batch_size), targets.split(self.micro_batch_size)):
                try:
                    loss = self._loss_sum(x, y) / valid
                except ValueError as error:  # the operators' checks meet a weight that is not finite before the loss does
                    raise FloatingPointError(f"{error}, at step {self.step + 1}, on blocks {ids} of the training data") from error
                loss.backward()
                total += loss.item()
            losses.append(total)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip).item()
        if not (math.isfinite(sum(losses)) and math.isfinite(norm)):
            self.optimizer.zero_grad(set_to_none=True)
            raise FloatingPointError(
                f"the loss must be finite, got {sum(losses)} (gradient norm {norm}) at step {self.step + 1}, on blocks {ids} of "
                f"the training data (losses of text and tasks: {losses}). The optimizer step was not taken"
            )
        lr = learning_rate(self.step, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        tokens, seconds = sum(x.numel() for x, _ in groups), time.perf_counter() - start
        rate, mfu = tokens / seconds, utilisation(self.model.config, [x.shape for x, _ in groups], seconds, self.device)
        row = {
            "step": self.step, "loss": losses[0], "lr": lr, "grad_norm": norm, "tokens": tokens, "tokens_per_s": round(rate, 1),
            "mfu": mfu, "peak_memory_mib": peak_memory_mib(self.device),
        }  # fmt: skip
        self.log.add("train", {**row, **{f"{task}_loss": loss for task, loss in zip(self.config.tasks, losses[1:])}})
        bar.set_postfix(loss=f"{losses[0]:.3f}", val=f"{self.val_loss:.3f}", tokens_s=f"{rate:,.0f}", refresh=False)
        bar.update()

    def _loss_sum(self, inputs: Tensor, targets: Tensor) -> Tensor:
        inputs, targets = inputs.to(self.device), targets.to(self.device)
        with self.autocast:
            logits = self.model(inputs)
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")

    @torch.no_grad()
    def _evaluate(self) -> None:
        self.model.eval()
        pairs = zip(self.val_inputs.split(self.micro_batch_size), self.val_targets.split(self.micro_batch_size))
        self.val_loss = sum(self._loss_sum(x, y).item() for x, y in pairs) / int((self.val_targets != IGNORE).sum())
        if not math.isfinite(self.val_loss):
            raise FloatingPointError(f"the held-out loss must be finite, got {self.val_loss} after step {self.step}")
        row: dict[str, Any] = {"step": self.step, "loss": self.val_loss}
        for task, exam in self.exams.items():
            with self.autocast:
                found = accuracy(self.model, exam, self.micro_batch_size)
            row[f"{task}_accuracy"], row[f"{task}_accuracy_by_depth"] = found
            row[f"{task}_chance"] = exam.chance.mean().item()
        with self.autocast:
            row["layers"] = [dataclasses.asdict(h) for h in health(self.model, self.val_inputs[:HEALTH_BLOCKS].to(self.device))]
        self.log.add("val", row)
        clamped = [h["layer"] for h in row["layers"] if h["clamped"] > 0]
        if clamped and not self.warned_clamped:
            self.warned_clamped = True
            warnings.warn(
                f"mode 'clamped' clamps positions in layers {clamped} at step {self.step}: their attention is no longer Eq. 2. "
                "mode 'exact' has no such limit",
                stacklevel=2,
            )

    def _save_checkpoint(self) -> None:
        folder = self.folder / "checkpoints"
        final = folder / f"step-{self.step:08d}"
        if final.exists():
            return

        def fill(aside: Path) -> None:
            save(self.model, aside)
            with open(aside / "optimizer.pt", "wb") as file:  # given a path, torch.save hides a full disk in a RuntimeError
                torch.save(self.optimizer.state_dict(), file)
            write_json(aside / "state.json", {"step": self.step, "val_loss": self.val_loss, "warned_clamped": self.warned_clamped})

        make_folder_atomically(final, fill)
        for old in _checkpoints(self.folder)[:-KEEP]:
            shutil.rmtree(old)

    def _draw(self, unigram: float, bigram: float) -> None:
        train, val = (read_rows(self.folder / f"{name}.jsonl") for name in ("train", "val"))
        plot_losses(self.folder / "loss.png", self.config.preset, train, val, unigram, bigram)
        if val[0]["layers"]:
            plot_health(self.folder / "health.png", self.config.preset, val)

    def _write_sample(self) -> None:
        if not self.config.sample_tokens or self.config.task != "text":
            return
        start = torch.tensor([[self.encoder.end_of_text]], device=self.device)
        generator = torch.Generator(self.device).manual_seed(self.config.seed)
        use_cache = self.model.cache_refusal() is None
        ids = generate(self.model, start, self.config.sample_tokens, 0.8, use_cache, generator=generator)
        text = self.encoder.decode(ids[0, 1:].tolist())
        write_text(self.folder / "sample.txt", text + "\n")
        print(f"a sample at temperature 0.8 ({self.folder / 'sample.txt'}):\n{text}\n")

    def _restore(self) -> None:
        if read_run(self.folder)["corpus"]["sha256"] != self.fingerprint:
            raise ValueError(f"data must be what the run in {self.folder} began with, but its tokens have changed since")
        found = _checkpoints(self.folder)
        if not found:  # ended before its first checkpoint: step 0 is where it resumes
            return
        newest = found[-1]
        if read_config(newest / "config.json") != self.model.config:
            raise ValueError(f"{newest} holds another model than {self.folder / 'run.json'} describes")
        load_state(self.model, newest)
        try:
            optimizer = torch.load(newest / "optimizer.pt", map_location=self.device, weights_only=True)
            self.optimizer.load_state_dict(optimizer)
            state = json.loads((newest / "state.json").read_text(encoding="utf-8"))
            self.step, self.val_loss, self.warned_clamped = state["step"], state["val_loss"], state["warned_clamped"]
        except Exception as error:  # torch.load raises many kinds for a damaged file
            raise ValueError(f"checkpoint {newest} is truncated or foreign: {error}") from error

    @contextlib.contextmanager
    def _interruptible(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM end the loop after the step under way; a second Ctrl-C interrupts at once."""

        def handle(number: int, frame: Any) -> None:
            self.stop = True
            print("\nstopping after this step; Ctrl-C again to stop at once, without saving", flush=True)
            signal_again(signal.default_int_handler)

        before = {}
        with contextlib.suppress(ValueError):  # only the main thread may set handlers
            before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first (unfinished ones have names that begin with a dot)."""
    return sorted((folder / "checkpoints").glob("step-*"))


def signal_again(handler: Any) -> None:
    """Set what Ctrl-C does from here on, where signals can be handled at all (the main thread)."""
    with contextlib.suppress(ValueError):
        signal.signal(signal.SIGINT, handler)


def newest_weights(folder: Path) -> Path:
    """The folder of a run's final weights, or of its newest checkpoint; FileNotFoundError if it has neither."""
    found = [*_checkpoints(folder), folder / "final"]
    if not found[-1].is_dir():
        found.pop()
    if not found:
        raise FileNotFoundError(f"{folder} holds no final weights and no checkpoint")
    return found[-1]


def _free_folder(wanted: Path) -> Path:
    taken = 1
    folder = wanted
    while folder.exists():
        taken += 1
        folder = wanted.with_name(f"{wanted.name}-{taken}")
    return folder
