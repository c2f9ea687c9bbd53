"""One optimizer step: forward and backward over micro-batches, clipping, AdamW."""

import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sisa_model.runs.config import ResolvedConfig
from sisa_model.training.batches import Batch, Splitter
from sisa_model.training.loss import Piece
from sisa_model.training.optimizer import learning_rate
from sisa_model.training.parallel import Parallel
from sisa_model.utils.files import write_json

log = logging.getLogger(__name__)


class Step(NamedTuple):
    """How a step went."""

    losses: list[float]
    """Mean loss of each group of the batch, nats a target."""
    grad_norm: float
    """Of all gradients, before clipping."""
    lr: float
    """Learning rate."""
    skipped: bool = False
    """Nothing was learned, as a loss or a gradient is not finite."""


class Stepper:
    """Takes a run's optimizer steps; ``folder`` is told of a batch that none can be taken on."""

    def __init__(
        self,
        config: ResolvedConfig,
        parallel: Parallel,
        optimizer: torch.optim.Optimizer,
        splitter: Splitter,
        folder: Path,
    ):
        self.config = config
        self.parallel = parallel
        self.optimizer = optimizer
        self.splitter = splitter
        self.folder = folder
        self.skipped = 0
        """Batches passed over so far."""

    def take(self, step: int, batch: Batch, answers: Sequence[float]) -> Step:
        """Take ``step``, counted from 0, on ``batch``.

        ``answers`` are each group's targets that count, over all processes. For a weight, loss or
        gradient that is not finite RUN/bad-batch-N.json says on what; ``skip_bad_batches`` such
        batches are passed over, then one raises FloatingPointError. Nothing is learned of them."""
        lr = learning_rate(step, self.config)
        try:
            losses = self._gradients(step, batch, answers)
            grad_norm = self.parallel.clip(self.config.clip)
            self._check(step, batch, losses, grad_norm)
        except FloatingPointError as error:
            self.optimizer.zero_grad(set_to_none=True)
            if self.skipped == self.config.skip_bad_batches:
                raise
            self.skipped += 1
            left = self.config.skip_bad_batches - self.skipped
            if self.splitter.world.main:
                log.warning(f"passed over a batch, {left} more may be: {error}")
            return Step([math.nan] * len(answers), math.nan, lr, skipped=True)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return Step(losses, grad_norm, lr)

    def _check(self, step: int, batch: Batch, losses: list[float], grad_norm: float) -> None:
        """FloatingPointError, in every process alike, for what is not finite."""
        if math.isfinite(sum(losses)) and math.isfinite(grad_norm):
            return
        self._report(step, batch, {"losses": losses, "grad_norm": grad_norm})
        raise FloatingPointError(
            f"the loss must be finite, got {sum(losses)} (gradient norm {grad_norm}) at step "
            f"{step + 1}, on blocks {batch.blocks} of the training data (losses of text and "
            f"tasks: {losses}). The optimizer step was not taken"
        )

    def _gradients(self, step: int, batch: Batch, answers: Sequence[float]) -> list[float]:
        """Leave the batch's gradients on the parameters; the mean loss of each group.

        Over all processes and micro-batches each target of a group weighs the same, wherever it
        is."""
        self.parallel.objective.model.train()
        pieces = list(self._pieces(batch))
        sums = torch.zeros(len(answers), dtype=torch.float64, device=self.splitter.device)
        for count, (group, piece) in enumerate(pieces, 1):
            try:
                sums[group] += self.parallel.backward(
                    piece, 1 / answers[group], last=count == len(pieces)
                )
            # The operators' checks meet a weight that is not finite before the loss does.
            except ValueError as error:
                self._report(step, batch, {"error": str(error)})
                kind = FloatingPointError if self.splitter.world.size == 1 else ValueError
                raise kind(
                    f"{error}, at step {step + 1}, on blocks {batch.blocks} of the training data"
                ) from error
        world = self.splitter.world
        totals = world.sum(sums.tolist(), alike=world.tensor)
        return [total / count for total, count in zip(totals, answers)]

    def _pieces(self, batch: Batch) -> Iterator[tuple[int, Piece]]:
        """The micro-batches of all groups, each with its group's number."""
        for number, group in enumerate(batch.groups):
            for piece in self.splitter.pieces(*group, text=number == 0):
                yield number, piece

    def _report(self, step: int, batch: Batch, found: dict[str, Any]) -> None:
        if self.splitter.world.main:
            about = {"step": step + 1, "blocks": batch.blocks, "seq_len": self.config.seq_len}
            write_json(self.folder / f"bad-batch-{step + 1:08d}.json", {**about, **found})
