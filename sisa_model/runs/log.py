"""A run's rows: appended to jsonl files, and on request to TensorBoard and Weights & Biases."""

import contextlib
import importlib.util
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch

from sisa_model.utils.files import naming, write_text

LogTarget = Literal["tensorboard", "wandb"]


def check_logs(logs: Sequence[str]) -> None:
    """ValueError for a log that is unknown, named twice or not installed, with what installs it."""
    for log in logs:
        allowed = get_args(LogTarget)
        if log not in allowed or logs.count(log) > 1:
            raise ValueError(
                f"log must be among {', '.join(allowed)}, each at most once, got {' '.join(logs)}"
            )
        if importlib.util.find_spec(log) is None:
            raise ValueError(
                f"log {log!r} needs a package that is not installed: pip install {log}"
            )


class RunLog:
    """Rows appended to RUN/train.jsonl and RUN/val.jsonl; those after ``from_step`` are dropped.

    ``logs`` adds TensorBoard (RUN/tensorboard) and Weights & Biases (project "sisa", the run's
    folder as its name; the run that RUN/wandb-id names is continued). Their scalars are NAME/FIELD;
    of a layer's heads they get the mean."""

    def __init__(self, folder: Path, from_step: int, logs: tuple[str, ...] = ()):
        check_logs(logs)
        self.folder = folder
        for name in ("train", "val"):
            kept = [
                row
                for row in read_rows(folder / f"{name}.jsonl")
                if from_step > 0 and row["step"] <= from_step
            ]
            write_text(folder / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in kept))
        self.tensorboard = self.wandb = None
        if "tensorboard" in logs:
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(folder / "tensorboard", purge_step=from_step + 1)
        if "wandb" in logs:
            import wandb

            path = folder / "wandb-id"
            known = path.read_text(encoding="utf-8") if path.is_file() else None
            record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
            self.wandb = wandb.init(
                project="sisa",
                name=folder.name,
                dir=folder,
                id=known,
                resume="allow",
                config=record,
            )
            write_text(path, self.wandb.id)
            # The step as a value, not W&B's own counter: that one would refuse the steps repeated
            # after a kill.
            self.wandb.define_metric("*", step_metric="step")

    def add(self, name: str, row: dict[str, Any]) -> None:
        """Append ``row``, which has a "step", to the file ``name``: "train" or "val"."""
        path = self.folder / f"{name}.jsonl"
        with naming(path), open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        scalars = {f"{name}/{field}": value for field, value in _scalars(row)}
        if self.tensorboard is not None:
            for field, value in scalars.items():
                self.tensorboard.add_scalar(field, value, row["step"])
            self.tensorboard.flush()
        if self.wandb is not None:
            self.wandb.log({**scalars, "step": row["step"]})

    def close(self) -> None:
        """Let TensorBoard and Weights & Biases write what they hold back."""
        if self.tensorboard is not None:
            self.tensorboard.close()
        if self.wandb is not None:
            self.wandb.finish()


class NoLog:
    """What processes other than the main one add rows to: nothing."""

    def add(self, name: str, row: dict[str, Any]) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def _scalars(row: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """A row's numbers for curves, of each layer the mean over heads; no step, nothing null."""
    for field, value in row.items():
        if field == "layers":
            for layer in value:
                yield from (
                    (f"layer{layer['layer']}/{name}", float(np.mean(x)))
                    for name, x in layer.items()
                    if name != "layer"
                )
        elif isinstance(value, (int, float)) and field != "step":
            yield field, value


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a run's jsonl file; a last line cut short by a kill is dropped."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def peak_memory_mib(device: torch.device) -> float | None:
    """Most memory used so far, MiB: PyTorch's on a GPU, else the process's; None on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 2**10  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
