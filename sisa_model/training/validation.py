"""What a run measures of its model between steps: held-out loss, exams, health."""

import dataclasses
import math
import warnings
from typing import Any

import torch

from sisa_model.data.blocks import IGNORE
from sisa_model.data.synthetic import accuracy
from sisa_model.models.health import Health
from sisa_model.training.batches import RunData, Splitter
from sisa_model.training.parallel import Parallel

HEALTH_BLOCKS = 4  # held-out blocks that lambda, half-life and the range of g are measured on


class Validation:
    """Measures a model on what its run held out.

    ``loss`` is the held-out loss of the last measurement, nats a token, ``warned_clamped`` whether
    the clamp was warned of: both are part of a checkpoint."""

    def __init__(self, parallel: Parallel, data: RunData, splitter: Splitter):
        self.parallel = parallel
        self.objective = parallel.objective
        self.data = data
        self.splitter = splitter
        self.loss = math.nan
        self.warned_clamped = False

    @torch.no_grad()
    def measure(self, step: int) -> dict[str, Any]:
        """The row of val.jsonl after ``step`` steps; every process calls this.

        They share the text and each take the whole of the rest, as FSDP must run in step. Raises
        FloatingPointError for a loss that is not finite."""
        self.objective.model.eval()
        self.loss = self._held_out_loss()
        if not math.isfinite(self.loss):
            raise FloatingPointError(
                f"the held-out loss must be finite, got {self.loss} after step {step}"
            )
        row: dict[str, Any] = {"step": step, "loss": self.loss}
        for name, exam in self.data.exams.items():
            with self.objective.autocast:
                share, by_depth = accuracy(self.parallel.answers, exam, self.splitter.rows)
            row[f"{name}_accuracy"] = share
            row[f"{name}_accuracy_by_depth"] = by_depth
            row[f"{name}_chance"] = exam.chance.mean().item()
        inputs = self.data.val_inputs[:HEALTH_BLOCKS]
        # Compiled layers would not run the hooks that it sets.
        with self.objective.autocast, torch.compiler.set_stance("force_eager"):
            layers = self.parallel.health(inputs)
        row["layers"] = [dataclasses.asdict(layer) for layer in layers]
        self._warn_clamped(layers, step)
        return row

    def _held_out_loss(self) -> float:
        share = self.splitter.share(self.data.val_inputs, self.data.val_targets)
        pieces = self.splitter.pieces(*share, text=True)
        mine = sum(self.objective(*piece).item() for piece in pieces)
        world = self.splitter.world
        (total,) = world.sum([mine], alike=world.tensor)
        return total / int((self.data.val_targets != IGNORE).sum())

    def _warn_clamped(self, layers: list[Health], step: int) -> None:
        clamped = [layer.layer for layer in layers if layer.clamped > 0]
        if clamped and not self.warned_clamped and self.splitter.world.main:
            self.warned_clamped = True
            warnings.warn(
                f"mode 'clamped' clamps positions in layers {clamped} at step {step}: their "
                "attention is no longer Eq. 2. mode 'exact' has no such limit",
                stacklevel=3,
            )
