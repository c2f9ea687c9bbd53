"""The training run: its loop, its steps over many processes, its evaluations (paper, section 4)."""

import contextlib
import dataclasses
import hashlib
import math
import shutil
import signal
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from sisa_model.data.blocks import IGNORE, Blocks, pack
from sisa_model.data.corpus import open_data
from sisa_model.data.ngrams import ngram_losses
from sisa_model.data.synthetic import (
    LENGTHS,
    TASK_EXAM,
    TASKS,
    Sample,
    TaskBlocks,
    accuracy,
    exam_name,
    exams,
    find_task,
)
from sisa_model.data.tokenizer import Encoder
from sisa_model.models.checkpoint import load, save
from sisa_model.models.config import ModelConfig
from sisa_model.models.flops import utilisation
from sisa_model.models.generate import generate
from sisa_model.models.health import health
from sisa_model.models.language_model import LanguageModel, count_parameters
from sisa_model.models.presets import preset_config
from sisa_model.reporting.figures import plot_health, plot_losses
from sisa_model.runs.config import PATHS, TrainConfig, resolve, resolved
from sisa_model.runs.folder import (
    checkpoints,
    free_folder,
    is_taken,
    read_run,
    require_same_run,
    resumed,
)
from sisa_model.runs.log import RunLog, peak_memory_mib, read_rows
from sisa_model.training.checkpoints import Checkpointer
from sisa_model.training.loss import Objective
from sisa_model.training.optimizer import learning_rate, make_optimizer
from sisa_model.training.parallel import Parallel, World, world
from sisa_model.utils.files import make_folder_atomically, write_json, write_text
from sisa_model.utils.machine import find_device, versions

TASK_BATCH = 16  # sequences a step of each retrieval task in the mix
TASK_EVAL = 256  # sequences a retrieval accuracy is measured on: 256 needles, about 7,000 recalls
STOPS = (signal.SIGINT, signal.SIGTERM)  # what ends a run after the step under way
HEALTH_BLOCKS = 4  # held-out blocks that lambda, half-life and the range of g are measured on


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
    """Held-out loss of n-gram models counted on the training tokens, on the same held-out tokens
    (nan for a task).
    """


def train(config: TrainConfig) -> TrainResult:
    """Run (or resume) a training run and return how it ended.

    Raises ValueError or FileNotFoundError for bad settings before anything is written,
    FileExistsError for a run folder that exists, FloatingPointError for a loss or gradient that is
    not finite (before the optimizer step, leaving bad-batch-N.json), OSError for a full disk. Under
    torchrun every process calls this; RuntimeError if another one is gone."""
    config = resumed(config) if config.resume else resolve(config)
    with world() as processes:
        return _Run(config, processes).run()


def continue_run(config: TrainConfig) -> bool:
    """Begin the run in ``config.out``, resume it, or leave it if it is finished, whichever it
    needs; True once it is finished.

    Raises as :func:`train` does, and ValueError for a field of ``config`` that is set, and set
    otherwise in a run that was begun."""
    out = config.out
    assert out is not None
    with (
        world() as processes
    ):  # which it needs is for one process to say: a shared disk may show another something else
        begun, finished = processes.from_main(
            lambda: ((out / "run.json").is_file(), (out / "final").is_dir())
        )
        if begun and finished:
            require_same_run(config)
            return True
        return train(dataclasses.replace(config, resume=begun)).finished


class _Run:
    """A training run: what is set up before the first step, and the loop. Every process has one;
    the main one writes.
    """

    def __init__(self, config: TrainConfig, processes: World):
        self.config, self.world = config, processes
        self.steps, self.seq_len = resolved(config.steps), resolved(config.seq_len)
        self.batch_size, self.micro_batch_size = (
            resolved(config.batch_size),
            resolved(config.micro_batch_size),
        )
        self.val_every, self.save_every = resolved(config.val_every), resolved(config.save_every)
        if processes.size > 1 and ":" in config.device:
            raise ValueError(
                f"device must be left without a number in {processes.size} processes, which take a GPU each, got {config.device!r}"
            )
        self.device = find_device(config.device, processes.local_rank)
        if processes.size == 1 and config.parallel != "auto":
            raise ValueError(
                f"parallel must be left at 'auto' in one process, got {config.parallel!r}; launch several with torchrun"
            )
        self.folder = processes.from_main(self._own_folder)
        self.config = dataclasses.replace(config, out=self.folder)
        bf16 = config.precision == "bf16" or (
            config.precision == "auto" and self.device.type == "cuda"
        )
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
        # One sample a task for all evaluations and all models, from held-out text and seeds that
        # training never uses.
        self.exams |= {task: self._exam(task, number) for number, task in enumerate(config.tasks)}
        self.model.checkpoint_layers = config.activation_checkpointing
        if config.compile:
            for layer in self.model.layers:
                layer.compile()
        self.kind = "single" if processes.size == 1 else config.parallel.replace("auto", "ddp")
        self.objective = Objective(self.model, self.autocast)
        self.parallel = Parallel(self.objective, processes, self.kind, bf16)
        self.optimizer = make_optimizer(self.model, config)
        self.step = 0
        self.stop = False
        self.warned_clamped = False
        self.val_loss = math.nan

    def _own_folder(self) -> Path:
        """The run's folder; FileExistsError if it should be new or empty and is not."""
        config = self.config
        if config.out is not None and is_taken(config.out) and not config.resume:
            raise FileExistsError(
                f"out {config.out} exists; choose another folder, or continue its run with --resume"
            )
        return config.out or free_folder(Path("runs") / config.preset)

    def _read_text(self) -> None:
        config, rank, size = self.config, self.world.rank, self.world.size
        data = open_data(
            config.data,
            config.val_data,
            config.tokenizer,
            self.seq_len,
            config.seed,
            rank=rank,
            size=size,
        )
        self.encoder, self.about, self.fingerprint = data.encoder, data.split, data.fingerprint
        self.train_tokens, self.val_tokens = data.train_text, data.val_text
        self.train_blocks: Blocks | TaskBlocks = data.train
        # Spread over the whole held-out text rather than its first files.
        ids = (
            np.linspace(0, data.val.count - 1, min(config.val_blocks, data.val.count))
            .astype(int)
            .tolist()
        )
        self.val_inputs, self.val_targets = data.val.take(ids)

    def _set_task(self) -> None:
        """A task in the place of text: its exams' seed is one that training never uses, as
        training's are below 2 ** 63.
        """
        self.encoder = Encoder(None)
        config, task, top = (
            self.config,
            find_task(self.config.task),
            self._model_config().vocab_size - 1,
        )
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
            "max_seq_len": max(
                known.max_seq_len, self.seq_len * (1 if config.task == "text" else LENGTHS[-1])
            ),
            "mode": config.mode,
            "backend": config.backend,
        }
        return preset_config(config.preset, **overrides)

    def run(self) -> TrainResult:
        unigram, bigram, compared = math.nan, math.nan, ""
        if self.config.task == "text":
            contexts, targets = self.val_inputs.numpy().ravel(), self.val_targets.numpy().ravel()
            unigram, bigram = ngram_losses(
                self.train_tokens, targets, contexts, self.model.config.vocab_size
            )
            compared = f"; a unigram model {unigram:.3f}, a bigram model {bigram:.3f}"
        with Checkpointer(self.folder, self.config.keep, self.world) as self.checkpoints:
            self.world.from_main(self._check_record if self.config.resume else self._make_folder)
            if self.config.resume:
                self._restore()
            if self.world.main:
                self.log = RunLog(self.folder, self.step, self.config.log)
            self._loop()
        finished = self.step == self.steps
        if self.world.main:
            self.log.close()
            self._draw(unigram, bigram)
            if finished:
                self._write_sample()
                print(f"held-out loss {self.val_loss:.3f} nats a token{compared}")
            else:
                print(
                    f"stopped after step {self.step} of {self.steps}; continue with: sisa train --out {self.folder} --resume"
                )
        return TrainResult(self.folder, self.step, finished, self.val_loss, unigram, bigram)

    def _make_folder(self) -> None:
        model = dataclasses.asdict(self.model.config)
        corpus = {"split": self.about, "sha256": self.fingerprint}
        record = {
            "train": dataclasses.asdict(self.config),
            "model": model,
            "corpus": corpus,
            "versions": versions(),
        }
        make_folder_atomically(self.folder, lambda aside: write_json(aside / "run.json", record))

    def _check_record(self) -> None:
        record = read_run(self.folder)
        if record["corpus"]["sha256"] != self.fingerprint:
            raise ValueError(
                f"data must be what the run in {self.folder} began with, but its tokens have changed since"
            )
        if (self.folder / "final").is_dir() and not checkpoints(self.folder):
            raise ValueError(
                f"the run in {self.folder} is finished, and has no checkpoint to resume from"
            )
        moved = {
            name: getattr(self.config, name) for name in PATHS
        }  # generate, inspect and the next resume look there
        record["train"] = dataclasses.asdict(record["train"]) | moved
        write_json(self.folder / "run.json", record)

    def _loop(self) -> None:
        config, main = self.config, self.world.main
        if main:
            shared = (
                "" if self.kind == "single" else f" and {self.world.size - 1} more ({self.kind})"
            )
            print(
                f"{config.preset}: {count_parameters(self.model):,} parameters on {self.device}{shared}, run folder {self.folder}"
            )
            print(self.about)
        last = min(self.steps, config.stop_at or self.steps)
        bar = tqdm(
            total=self.steps, initial=self.step, unit="step", dynamic_ncols=True, disable=not main
        )
        with self._interruptible(), bar:
            if self.step == 0:
                self._evaluate()
            while self.step < last and self._train_step(bar):
                if self.step % self.val_every == 0 or self.step == self.steps:
                    self._evaluate()
                if self.step % self.save_every == 0:
                    self._save_checkpoint()
                self.checkpoints.poll()
            _on_signals(signal.SIG_IGN, *STOPS)  # nothing interrupts the last save
            self._save_checkpoint()
            self.checkpoints.wait()
            if self.step == self.steps:
                self._write_final()

    def _batch(self, step: int) -> tuple[list[int], int, list[tuple[Tensor, Tensor]]]:
        """The blocks of a step, its tokens, and this process's share of its groups of (inputs,
        targets).

        Text and each retrieval task are a group, with a mean of its own. Shares are of equal size:
        rows that count for nothing fill them up, as FSDP's processes must run their layers equally
        often."""
        ids = self.train_blocks.ids(step * self.batch_size, self.batch_size)
        mine, short = self.world.share(len(ids))
        # A process without a share takes one all the same, for its shape.
        inputs, targets = (
            x[: len(mine)] for x in self.train_blocks.take([ids[i] for i in mine] or ids[:1])
        )
        tokens, groups = len(ids) * inputs.shape[1], [self._fill(inputs, targets, short)]
        for number, task in enumerate(self.config.tasks):
            sample = self._sample(
                task, self.train_tokens, TASK_BATCH, [self.config.seed, number, step]
            )
            tokens += sample.inputs.numel()
            mine, short = self.world.share(TASK_BATCH)
            rows = slice(mine.start, mine.stop)
            groups.append(self._fill(sample.inputs[rows], sample.targets[rows], short))
        return ids, tokens, groups

    def _fill(self, inputs: Tensor, targets: Tensor, short: int) -> tuple[Tensor, Tensor]:
        return fill_rows(inputs, targets, short, self.encoder.end_of_text)

    def _exam(self, task: str, number: int) -> Sample:
        return self._sample(task, self.val_tokens, TASK_EVAL, [10**9, number])

    def _sample(self, task: str, text: np.ndarray, count: int, seed: list[int]) -> Sample:
        return TASKS[task](
            text, self.model.config.vocab_size - 1, self.seq_len, count, np.random.default_rng(seed)
        )

    def _train_step(self, bar: tqdm) -> bool:
        """Take one step; False, and none taken, if any process was told to stop."""
        start = time.perf_counter()
        ids, tokens, groups = self._batch(self.step)
        # Over all processes and micro-batches: each token of a group weighs the same, wherever it
        # is.
        stop, *valid = self.world.sum(
            [self.stop, *((targets != IGNORE).sum() for _, targets in groups)]
        )
        if stop:
            return False
        self.model.train()
        pieces = [
            (n, piece)
            for n, group in enumerate(groups)
            for piece in self._micro_batches(*group, text=n == 0)
        ]
        sums = torch.zeros(len(groups), dtype=torch.float64, device=self.device)
        for count, (n, piece) in enumerate(pieces, 1):
            try:
                sums[n] += self.parallel.backward(*piece, 1 / valid[n], last=count == len(pieces))
            # the operators' checks meet a weight that is not finite before the loss does
            except ValueError as error:
                self._dump_batch(ids, {"error": str(error)})
                raise FloatingPointError(
                    f"{error}, at step {self.step + 1}, on blocks {ids} of the training data"
                ) from error
        losses = [total / count for total, count in zip(self.world.sum(sums.tolist()), valid)]
        norm = self.parallel.clip(self.config.clip)
        if not (math.isfinite(sum(losses)) and math.isfinite(norm)):
            self.optimizer.zero_grad(set_to_none=True)
            self._dump_batch(ids, {"losses": losses, "grad_norm": norm})
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
        seconds = time.perf_counter() - start
        rate, mfu = tokens / seconds, None
        if (
            self.config.documents == "joined"
        ):  # of packed ones not all pairs that it counts are computed
            mfu = utilisation(self.model.config, [x.shape for x, _ in groups], seconds, self.device)
        row = {
            "step": self.step,
            "loss": losses[0],
            "lr": lr,
            "grad_norm": norm,
            "tokens": tokens,
            "tokens_per_s": round(rate, 1),
            "mfu": mfu,
            "peak_memory_mib": peak_memory_mib(self.device),
        }
        self._add_row(
            "train",
            {**row, **{f"{task}_loss": loss for task, loss in zip(self.config.tasks, losses[1:])}},
        )
        bar.set_postfix(
            loss=f"{losses[0]:.3f}",
            val=f"{self.val_loss:.3f}",
            tokens_s=f"{rate:,.0f}",
            refresh=False,
        )
        bar.update()
        return True

    def _micro_batches(
        self, inputs: Tensor, targets: Tensor, text: bool
    ) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """Inputs, targets and, of ``text`` whose documents are packed, their bounds."""
        for x, y in zip(inputs.split(self.micro_batch_size), targets.split(self.micro_batch_size)):
            cu_seqlens = None
            if text and self.config.documents == "packed":
                x, y, cu_seqlens = pack(x, y, self.encoder.end_of_text)
            yield (
                x.to(self.device),
                y.to(self.device),
                None if cu_seqlens is None else cu_seqlens.to(self.device),
            )

    def _add_row(self, name: str, row: dict[str, Any]) -> None:
        if self.world.main:
            self.log.add(name, row)

    def _dump_batch(self, ids: list[int], found: dict[str, Any]) -> None:
        """Leave a record of the batch that no step was taken on."""
        if self.world.main:
            step = self.step + 1
            write_json(
                self.folder / f"bad-batch-{step:08d}.json",
                {"step": step, "blocks": ids, "seq_len": self.seq_len, **found},
            )

    @torch.no_grad()
    def _evaluate(self) -> None:
        """Measure the model; the processes share the text and each take the whole of the rest, as
        FSDP must run in step.
        """
        self.model.eval()
        mine, short = self.world.share(len(self.val_inputs))
        rows = slice(mine.start, mine.stop)
        pieces = self._micro_batches(
            *self._fill(self.val_inputs[rows], self.val_targets[rows], short), text=True
        )
        total = self.world.sum([sum(self.objective(*piece).item() for piece in pieces)])[0]
        self.val_loss = total / int((self.val_targets != IGNORE).sum())
        if not math.isfinite(self.val_loss):
            raise FloatingPointError(
                f"the held-out loss must be finite, got {self.val_loss} after step {self.step}"
            )
        row: dict[str, Any] = {"step": self.step, "loss": self.val_loss}
        for task, exam in self.exams.items():
            with self.autocast:
                found = accuracy(self.model, exam, self.micro_batch_size)
            row[f"{task}_accuracy"], row[f"{task}_accuracy_by_depth"] = found
            row[f"{task}_chance"] = exam.chance.mean().item()
        with (
            self.autocast,
            torch.compiler.set_stance("force_eager"),
        ):  # compiled layers would not run the hooks it sets
            row["layers"] = [
                dataclasses.asdict(h)
                for h in health(self.model, self.val_inputs[:HEALTH_BLOCKS].to(self.device))
            ]
        self._add_row("val", row)
        clamped = [h["layer"] for h in row["layers"] if h["clamped"] > 0]
        if clamped and not self.warned_clamped and self.world.main:
            self.warned_clamped = True
            warnings.warn(
                f"mode 'clamped' clamps positions in layers {clamped} at step {self.step}: their attention is no longer Eq. 2. "
                "mode 'exact' has no such limit",
                stacklevel=2,
            )

    def _tensors(self) -> dict[str, Tensor]:
        """All that steps change, by name: the parameters and AdamW's state of each."""
        found: dict[str, Tensor] = {}
        for name, p in self.parallel.parameters.items():
            state = self.optimizer.state[p]
            if not state:  # as the first step would make it
                moments = {
                    key: torch.zeros_like(p, memory_format=torch.preserve_format)
                    for key in ("exp_avg", "exp_avg_sq")
                }
                state.update(step=torch.zeros((), device=p.device), **moments)
            found[f"model.{name}"] = p.detach()
            found.update({f"optimizer.{name}.{key}": value for key, value in state.items()})
        return found

    def _save_checkpoint(self) -> None:
        state = {
            "step": self.step,
            "val_loss": self.val_loss,
            "warned_clamped": self.warned_clamped,
        }
        self.checkpoints.save(
            self.step, self._tensors(), dataclasses.asdict(self.model.config), state
        )

    def _restore(self) -> None:
        state = self.checkpoints.restore(self._tensors())
        if (
            state is not None
        ):  # else it ended before its first checkpoint: step 0 is where it resumes
            self.step, self.val_loss, self.warned_clamped = (
                state["step"],
                state["val_loss"],
                state["warned_clamped"],
            )

    def _write_final(self) -> None:
        weights, final = self.parallel.whole(), self.folder / "final"

        def fill(folder: Path) -> None:
            with torch.device("meta"):
                model = LanguageModel(self.model.config)
            for name, p in model.to_empty(device="cpu").named_parameters():
                p.detach().copy_(weights[name])
            save(model, folder)

        def write() -> None:
            for unfinished in self.folder.glob(".final.*"):  # of a kill
                shutil.rmtree(unfinished)
            if not final.exists():
                make_folder_atomically(final, fill)

        self.world.from_main(write)

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
        model = load(self.folder / "final", self.device)
        ids = generate(
            model,
            start,
            self.config.sample_tokens,
            0.8,
            model.cache_refusal() is None,
            generator=generator,
        )
        text = self.encoder.decode(ids[0, 1:].tolist())
        write_text(self.folder / "sample.txt", text + "\n")
        print(f"a sample at temperature 0.8 ({self.folder / 'sample.txt'}):\n{text}\n")

    @contextlib.contextmanager
    def _interruptible(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM end the loop after the step under way; a second Ctrl-C interrupts at
        once.
        """

        def handle(number: int, frame: Any) -> None:
            self.stop = True
            if self.world.main:
                print(
                    "\nstopping after this step; Ctrl-C again to stop at once, without saving",
                    flush=True,
                )
            _on_signals(signal.default_int_handler, signal.SIGINT)

        before = _on_signals(handle, *STOPS)
        try:
            yield
        finally:
            for number, handler in before.items():
                _on_signals(handler, number)


def fill_rows(
    inputs: Tensor, targets: Tensor, short: int, end_of_text: int
) -> tuple[Tensor, Tensor]:
    """``inputs`` and ``targets`` [B, L] with ``short`` more rows, each one document, whose targets
    are IGNORE.
    """
    filler = int(end_of_text == 0)  # a token that ends nothing
    return F.pad(inputs, (0, 0, 0, short), value=filler), F.pad(
        targets, (0, 0, 0, short), value=IGNORE
    )


def _on_signals(handler: Any, *numbers: signal.Signals) -> dict[signal.Signals, Any]:
    """Set what signals do from here on, and return what they did; nothing outside the main thread,
    which alone may.
    """
    with contextlib.suppress(ValueError):
        return {number: signal.signal(number, handler) for number in numbers}
    return {}
