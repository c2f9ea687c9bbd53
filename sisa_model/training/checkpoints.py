"""A run's checkpoints: written in the background, whole or absent, checked when read."""

import contextlib
import json
import os
import shutil
import warnings
import zlib
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from sisa_model.models.checkpoint import CONFIG
from sisa_model.models.dcp import expect_one_process, read_tensors
from sisa_model.runs.weights import checkpoints, step_of
from sisa_model.training.parallel import World
from sisa_model.utils.files import remove_folder, write_json

STATE = "state.json"


def training_tensors(
    parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """All that steps change, by name: ``parameters``, and AdamW's state of each.

    The state is made as the first step would make it."""
    found: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        state = optimizer.state[parameter]
        if not state:
            fused = optimizer.defaults["fused"]
            state["step"] = torch.zeros((), device=parameter.device if fused else "cpu")
            for moment in ("exp_avg", "exp_avg_sq"):
                state[moment] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        found[f"model.{name}"] = parameter.detach()
        found |= {f"optimizer.{name}.{key}": value for key, value in state.items()}
    return found


class Checkpointer:
    """Saves and restores tensors by name in RUN/checkpoints/step-N; the ``keep`` newest stay.

    Every process of ``world`` calls the same methods in the same order, on a file system that they
    share. A folder gets its name when all of its files are on the disk, with their checksums: a
    kill at any moment leaves the checkpoints before it."""

    def __init__(self, run: Path, keep: int, world: World):
        self.run = run
        self.keep = keep
        self.staying: set[int] = set()
        """Steps whose checkpoints are not removed, however old."""
        self.world = world
        # Of its own, as it is used from another thread.
        self.group = dist.new_group(backend="gloo") if world.size > 1 else None
        self._threads = ThreadPoolExecutor(1)
        self._pending: Future | None = None
        self._newest: int | None = None

    def save(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        config: dict[str, Any],
        state: dict[str, Any],
    ) -> None:
        """Begin to save ``tensors``, copied before this returns. Raises as :meth:`wait` does."""
        self.wait()
        if step == self._newest:
            return
        self._newest = step
        final = self.run / "checkpoints" / f"step-{step:08d}"
        aside = final.with_name(f".{final.name}")
        writer = dcp.FileSystemWriter(aside)
        if self.group is None:
            expect_one_process()
        written = dcp.async_save(
            dict(tensors),
            storage_writer=writer,
            process_group=self.group,
            no_dist=self.group is None,
        )
        self._pending = self._threads.submit(self._finish, written, aside, final, config, state)

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        # After an error, that one is what the caller hears of.
        with contextlib.nullcontext() if error is None else contextlib.suppress(OSError):
            self.wait()
        self._threads.shutdown()

    def poll(self) -> None:
        """Raise the error of a save that has failed, if one has."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Return when nothing is being saved; OSError (a full disk, say) for a failed save."""
        pending = self._pending
        self._pending = None
        if pending is not None:
            pending.result()

    def _finish(
        self, written: Any, aside: Path, final: Path, config: dict[str, Any], state: dict[str, Any]
    ) -> None:
        try:
            try:
                written.result()
            except CheckpointException as error:
                first = next(iter(error.failures.values()))[0]
                raise _os_error(first) or OSError(f"cannot write {final}: {first}") from error
            if self.world.main:
                write_json(aside / CONFIG, config)
                files = {path.name: _checksum(path) for path in sorted(aside.iterdir())}
                write_json(aside / STATE, {**state, "files": files})
                os.replace(aside, final)
                self._drop_old()
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise

    def _drop_old(self) -> None:
        """Remove all but the newest and those that stay."""
        for old in checkpoints(self.run)[: -self.keep]:
            if step_of(old) not in self.staying:
                remove_folder(old)

    def restore(self, tensors: Mapping[str, Tensor]) -> dict[str, Any] | None:
        """Fill ``tensors`` from the newest whole checkpoint; its state, or None without any.

        A damaged one is said, set aside under another name, and the one before it taken. Raises
        ValueError if all are damaged, or hold other tensors."""
        found = self.world.from_main(self._newest_whole)
        if found is None:
            return None
        folder, state = found
        read_tensors(folder, dict(tensors), self.group)
        self._newest = state["step"]
        return state

    def _newest_whole(self) -> tuple[Path, dict[str, Any]] | None:
        for unfinished in (self.run / "checkpoints").glob(".step-*"):
            shutil.rmtree(unfinished)
        damaged: list[tuple[Path, ValueError]] = []
        for folder in reversed(checkpoints(self.run)):
            try:
                state = _verified(folder)
            except ValueError as error:
                damaged.append((folder, error))
                continue
            for bad, reason in damaged:
                _set_aside(bad, reason, taken=folder)
            return folder, state
        if damaged:
            _, newest_reason = damaged[0]
            raise newest_reason
        return None


def _set_aside(damaged: Path, reason: ValueError, taken: Path) -> None:
    """Give a damaged checkpoint another name, and warn of it and of the one ``taken`` instead."""
    aside = damaged.with_name(f"damaged-{damaged.name}")
    shutil.rmtree(aside, ignore_errors=True)  # of the same step, damaged before
    damaged.rename(aside)
    warnings.warn(f"{reason}; set aside as {aside.name}, and {taken.name} is taken", stacklevel=3)


def _os_error(error: BaseException | None) -> OSError | None:
    """The OSError that led to ``error``: torch.save hides a full disk behind one of its own."""
    while error is not None and not isinstance(error, OSError):
        error = error.__context__
    return error


def _checksum(path: Path) -> str:
    crc = 0
    with open(path, "rb") as file:
        while piece := file.read(2**20):
            crc = zlib.crc32(piece, crc)
    return f"{crc:08x}"


def _verified(folder: Path) -> dict[str, Any]:
    """A checkpoint's state; ValueError naming its first file that is not as it was written."""
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        for name, checksum in state["files"].items():
            if _checksum(folder / name) != checksum:
                raise ValueError(f"{name} is not what was written")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"checkpoint {folder} is truncated or damaged: {error}") from error
    return state
