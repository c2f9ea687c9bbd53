"""A training run (paper, section 4): its parts put together, its loop, its end."""

import contextlib
import dataclasses
import logging
import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sisa_model.data.tokenizer import Encoder
from sisa_model.models.checkpoint import load_state
from sisa_model.models.config import MAMBAS, ModelConfig
from sisa_model.models.flops import utilisation
from sisa_model.models.language_model import LanguageModel, count_parameters
from sisa_model.models.mamba import MambaMixer
from sisa_model.runs.config import ResolvedConfig, TrainConfig, resolve, runs_in_bf16
from sisa_model.runs.folder import (
    RunRecord,
    begin_run,
    go_on,
    own_folder,
    require_same_run,
    resumed,
)
from sisa_model.runs.log import NoLog, RunLog, peak_memory_mib, read_rows
from sisa_model.runs.weights import find_weights
from sisa_model.training.artifacts import TEMPERATURE, draw_figures, write_final, write_sample
from sisa_model.training.batches import Batch, Batches, RunData, Splitter, open_run_data
from sisa_model.training.checkpoints import Checkpointer, training_tensors
from sisa_model.training.interrupt import Interrupt
from sisa_model.training.loss import Objective
from sisa_model.training.optimizer import learning_rate, make_optimizer
from sisa_model.training.parallel import Parallel, World, world
from sisa_model.training.step import Step, Stepper
from sisa_model.training.validation import Validation
from sisa_model.utils.lock import only_writer
from sisa_model.utils.machine import find_device, versions
from sisa_model.utils.progress import Progress

log = logging.getLogger(__name__)


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
    """Held-out loss of a unigram model of the training tokens, on the same held-out tokens (nan for
    a task)."""
    bigram: float
    """The same of a bigram model."""


def train(config: TrainConfig) -> TrainResult:
    """Run (or resume) a training run and return how it ended.

    Raises ValueError or FileNotFoundError for bad settings before anything is written,
    FileExistsError for a run folder that exists, FloatingPointError for a loss or gradient that is
    not finite (before the optimizer step, leaving bad-batch-N.json), OSError for a full disk. Under
    torchrun every process calls this; RuntimeError if another one is gone."""
    settings = resumed(config) if config.resume else resolve(config)
    with world() as processes:
        arranged = processes.arranged(settings.context_parallel, settings.tensor_parallel)
        return _train(settings, arranged)


def continue_run(config: TrainConfig) -> bool:
    """Begin the run in ``config.out``, resume it, or leave it finished; True once it is finished.

    Raises as :func:`train` does, and ValueError for a field of ``config`` that is set, and set
    otherwise in a run that was begun."""
    out = config.out
    assert out is not None
    # Which it needs is for one process to say: a shared disk may show another something else.
    with world() as processes:
        begun, finished = processes.from_main(
            lambda: ((out / "run.json").is_file(), (out / "final").is_dir())
        )
        if begun and finished:
            require_same_run(config)
            return True
        return train(dataclasses.replace(config, resume=begun)).finished


def _train(config: ResolvedConfig, world: World) -> TrainResult:
    """A run from its settings to its end. Nothing is written before its last check."""
    device = run_device(config, world)
    named = config.out is not None
    config = dataclasses.replace(config, out=world.from_main(lambda: own_folder(config)))

    encoder = Encoder(config.tokenizer)
    model_config = config.model_config(encoder.size)
    top = model_config.vocab_size - 1
    data = open_run_data(config, encoder, top, world)
    packed = config.documents == "packed"
    splitter = Splitter(world, device, config.micro_batch_size, encoder.end_of_text, packed)

    bf16 = runs_in_bf16(config.precision, device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=bf16)
    objective = Objective(_build(config, model_config, device, autocast), autocast)
    parallel = Parallel(objective, world, config.parallel, bf16)
    optimizer = make_optimizer(objective.model, config)
    unigram, bigram = data.ngram_losses(model_config.vocab_size)
    with contextlib.ExitStack() as held:
        record = _record(config, model_config, data)
        folder, before = world.from_main(lambda: _open(record, data, named, held))
        config = dataclasses.replace(config, out=folder)
        checkpointer = held.enter_context(Checkpointer(folder, config.keep, world))
        trainer = Trainer(
            config=config,
            folder=folder,
            parallel=parallel,
            batches=Batches(config, data, top, splitter),
            stepper=Stepper(config, parallel, optimizer, splitter, folder),
            validation=Validation(parallel, data, splitter),
            checkpointer=checkpointer,
            encoder=encoder if config.task == "text" else None,
        )
        if config.resume:
            trainer.restore()
            if world.main:
                _say_what_changed(trainer.step, before, config)
        rows = RunLog(folder, trainer.step, config.log) if world.main else NoLog()
        if world.main:
            _announce(parallel, config, data, device)
            _say_where_it_begins(trainer.step, config)
        trainer.run(rows)
    rows.close()
    finished = trainer.step == config.steps
    result = TrainResult(folder, trainer.step, finished, trainer.validation.loss, unigram, bigram)
    if world.main:
        draw_figures(folder, config.title, unigram, bigram)
        _say_how_it_ended(result, config, encoder, device)
    world.sum([0.0])  # torchrun ends all processes with the first, and the main one has spoken now
    return result


def _open(
    record: RunRecord, data: RunData, named: bool, held: contextlib.ExitStack
) -> tuple[Path, ResolvedConfig]:
    """The run's folder, begun or found, and the run's settings until this launch.

    ``held`` keeps others from writing there."""
    folder = record.train.out
    assert folder is not None
    if record.train.resume:
        held.enter_context(only_writer(folder))
        return folder, go_on(folder, record)
    folder = begin_run(record, data.held_out(), named)
    held.enter_context(only_writer(folder))
    return folder, record.train


def run_device(config: ResolvedConfig, world: World) -> torch.device:
    """This process's device; ValueError for one it cannot have, and for ``parallel`` alone."""
    if world.size > 1 and ":" in config.device:
        raise ValueError(
            f"device must be left without a number in {world.size} processes, which take a GPU "
            f"each, got {config.device!r}"
        )
    device = find_device(config.device, world.local_rank)
    if world.size == 1 and config.parallel != "auto":
        raise ValueError(
            f"parallel must be left at 'auto' in one process, got {config.parallel!r}; launch "
            "several with torchrun"
        )
    return device


def _build(
    config: ResolvedConfig,
    model_config: ModelConfig,
    device: torch.device,
    autocast: torch.autocast,
) -> LanguageModel:
    """The model as training begins with it; ValueError for a path that cannot run."""
    torch.manual_seed(config.seed)
    model = LanguageModel(model_config)
    if config.init_from is not None and not config.resume:
        load_state(model, find_weights(config.init_from))
    elif config.recipe == "paper" and model_config.family in MAMBAS:
        for module in model.modules():
            if isinstance(module, MambaMixer):
                module.draw_matrices()
    model = model.to(device)
    with torch.no_grad(), autocast:
        model.eval()(torch.zeros(1, 2, dtype=torch.int64, device=device))
    model.checkpoint_layers = config.activation_checkpointing
    if config.compile:
        for layer in model.layers:
            layer.compile()
    return model


def _record(config: ResolvedConfig, model_config: ModelConfig, data: RunData) -> RunRecord:
    return RunRecord(
        train=config,
        sha256=data.sha256,
        split=data.about,
        model=dataclasses.asdict(model_config),
        versions=versions(),
    )


def _announce(
    parallel: Parallel, config: ResolvedConfig, data: RunData, device: torch.device
) -> None:
    world = parallel.world
    kinds = [parallel.kind]
    kinds += [f"context parallel {world.context}"] if world.context > 1 else []
    kinds += [f"tensor parallel {world.tensor}"] if world.tensor > 1 else []
    shared = f" and {world.size - 1} more ({', '.join(kinds)})" if world.size > 1 else ""
    count = count_parameters(parallel.objective.model)
    log.info(f"{config.title}: {count:,} parameters on {device}{shared}, run folder {config.out}")
    log.info(data.about)


def _say_what_changed(step: int, before: ResolvedConfig, config: ResolvedConfig) -> None:
    """Of steps and learning rate, told anew to a run that goes on."""
    if (before.steps, before.lr) == (config.steps, config.lr):
        return
    was, is_now = (learning_rate(step, x) for x in (before, config))
    log.info(
        f"{before.steps:,} steps become {config.steps:,} ({config.schedule}): from step {step:,} "
        f"on the learning rate is {is_now:.3g}, where it was {was:.3g}"
    )


def _say_where_it_begins(step: int, config: ResolvedConfig) -> None:
    if step == config.steps:
        log.info(f"the run is finished: it has done its {step:,} steps")
    elif step:
        assert config.out is not None
        tokens = sum(row.get("tokens", 0) for row in read_rows(config.out / "train.jsonl"))
        log.info(
            f"resumed in {config.out} after step {step:,} of {config.steps:,}, {tokens:,} tokens"
        )
    if 0 < config.steps <= config.warmup_steps:
        log.warning(
            f"the learning rate never reaches {config.lr:g}: it warms up for {config.warmup_steps} "
            f"steps of {config.steps}"
        )


def _say_how_it_ended(
    result: TrainResult, config: ResolvedConfig, encoder: Encoder, device: torch.device
) -> None:
    """Also writes the sample of a run of text that is finished."""
    folder = result.folder
    if not result.finished:
        log.info(
            f"stopped after step {result.steps:,} of {config.steps:,}; continue with: "
            f"sisa train --out {shlex.quote(str(folder))} --resume"
        )
        return
    compared = ""
    if config.task == "text":
        compared = f"; a unigram model {result.unigram:.3f}, a bigram model {result.bigram:.3f}"
        if config.sample_tokens:
            text = write_sample(folder, config, encoder, device)
            path = folder / "sample.txt"
            log.info(f"a sample at temperature {TEMPERATURE} ({path}):\n{text}\n")
    log.info(f"held-out loss {result.val_loss:.3f} nats a token{compared}")


@dataclass(kw_only=True)
class Trainer:
    """The loop of a run over its parts; every process has one, and the main one writes."""

    config: ResolvedConfig
    folder: Path
    parallel: Parallel
    batches: Batches
    stepper: Stepper
    validation: Validation
    checkpointer: Checkpointer
    encoder: Encoder | None
    """What its text is encoded by; None for a task."""
    step: int = 0
    """Steps done."""
    best: tuple[int, float] | None = None
    """The step of the lowest held-out loss, and that, with ``keep_best``."""

    @property
    def model(self) -> LanguageModel:
        """What is trained."""
        return self.parallel.objective.model

    def run(self, rows: RunLog | NoLog) -> None:
        """Train from ``step`` to this launch's last step, or until a signal, and save."""
        world = self.parallel.world
        progress = Progress("step", self.config.steps, self.step, quiet=not world.main)
        with Interrupt(world.main) as interrupt, progress:
            if self.step == 0:
                self._validate(rows)
            while self.step < self.config.last_step:
                row = self._take_step(interrupt)
                if row is None:
                    break
                rows.add("train", row)
                progress.advance(facts=self._progress(row))
                if self.step % self.config.val_every == 0 or self.step == self.config.steps:
                    self._validate(rows)
                if self.step % self.config.save_every == 0 or self.step == self._fork:
                    self._save()
                self.checkpointer.poll()
            interrupt.refuse()
            self._save()
            self.checkpointer.wait()
            if self.step == self.config.steps:
                weights = self.parallel.whole()
                model = self.model.config
                world.from_main(lambda: write_final(self.folder, weights, model, self.encoder))

    @property
    def _fork(self) -> int | None:
        """The last step that a longer run with the schedule wsd would do alike."""
        config = self.config
        return config.steps - config.decay_steps if config.decay_steps is not None else None

    def _validate(self, rows: RunLog | NoLog) -> None:
        rows.add("val", self.validation.measure(self.step))
        if not self.config.keep_best or not self.step:
            return
        if self.best is None or self.validation.loss < self.best[1]:
            self.best = (self.step, self.validation.loss)
            self._save()

    def _take_step(self, interrupt: Interrupt) -> dict[str, Any] | None:
        """Take one step; its row of train.jsonl. None, and none taken, if any was told to stop."""
        start = time.perf_counter()
        batch = self.batches.of_step(self.step)
        world = self.parallel.world
        stop, *answers = world.sum([interrupt.requested, *batch.answers()], alike=world.copies)
        if stop:
            return None
        taken = self.stepper.take(self.step, batch, answers)
        self.step += 1
        return self._row(batch, taken, time.perf_counter() - start)

    def _row(self, batch: Batch, taken: Step, seconds: float) -> dict[str, Any]:
        device = self.batches.splitter.device
        mfu = None
        # Of packed documents not all pairs that it counts are computed.
        if self.config.documents == "joined":
            shapes = [inputs.shape for inputs, _ in batch.groups]
            mfu = utilisation(self.model.config, shapes, seconds, device)
            mfu = mfu and mfu / self.parallel.world.copies
        losses = [None if taken.skipped else loss for loss in taken.losses]
        row = {
            "step": self.step,
            "loss": losses[0],
            "lr": taken.lr,
            "grad_norm": None if taken.skipped else taken.grad_norm,
            "tokens": batch.tokens,
            "tokens_per_s": round(batch.tokens / seconds, 1),
            "mfu": mfu,
            "peak_memory_mib": peak_memory_mib(device),
        }
        mixed = zip(self.config.mix, losses[1:])
        return {**row, **{f"{task}_loss": loss for task, loss in mixed}}

    def _progress(self, row: dict[str, Any]) -> dict[str, str]:
        return {
            "loss": "passed over" if row["loss"] is None else f"{row['loss']:.3f}",
            "val": f"{self.validation.loss:.3f}",
            "tokens/s": f"{row['tokens_per_s']:,.0f}",
        }

    def _tensors(self) -> dict[str, torch.Tensor]:
        return training_tensors(self.parallel.parameters, self.stepper.optimizer)

    def _save(self) -> None:
        best = self.best and self.best[0]
        self.checkpointer.staying = {step for step in (best, self._fork) if step is not None}
        state = {
            "best": self.best,
            "step": self.step,
            "val_loss": self.validation.loss,
            "warned_clamped": self.validation.warned_clamped,
        }
        config = dataclasses.asdict(self.model.config)
        self.checkpointer.save(self.step, self._tensors(), config, state)

    def restore(self) -> None:
        """Go on where the newest checkpoint is; without one the run resumes at step 0."""
        state = self.checkpointer.restore(self._tensors())
        if state is not None:
            self.step = state["step"]
            self.validation.loss = state["val_loss"]
            self.validation.warned_clamped = state["warned_clamped"]
            self.best = state.get("best") and tuple(state["best"])
