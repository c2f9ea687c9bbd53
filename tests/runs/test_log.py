"""A run's rows: jsonl, TensorBoard, Weights & Biases, and what is measured beside the loss."""

import errno
import importlib.machinery
import json
import sys
import types
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sisa_model.runs.config import TrainConfig
from sisa_model.runs.log import RunLog, peak_memory_mib, read_rows
from sisa_model.training.trainer import train
from sisa_model.utils.files import make_folder_atomically, write_atomically

VAL = {
    "step": 2,
    "loss": 1.5,
    "needle_accuracy_by_depth": [0.5, 0.5],
    "layers": [
        {"layer": 0, "lam": [0.25, 0.75], "half_life": [100.0], "g_range": [3.0], "clamped": 0.0}
    ],
}


def curves(folder):
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def test_rows_go_to_jsonl_and_tensorboard(tmp_path):
    log = RunLog(tmp_path, 0, ("tensorboard",))
    log.add("train", {"step": 1, "loss": 2.0, "mfu": None})
    log.add("train", {"step": 2, "loss": 1.75, "mfu": 0.5})
    log.add("val", VAL)
    assert read_rows(tmp_path / "train.jsonl")[0] == {"step": 1, "loss": 2.0, "mfu": None}
    assert read_rows(tmp_path / "val.jsonl") == [VAL]
    assert curves(tmp_path) == {
        "train/loss": [(1, 2.0), (2, 1.75)],
        "train/mfu": [(2, 0.5)],
        "val/loss": [(2, 1.5)],
        "val/layer0/lam": [(2, 0.5)],
        "val/layer0/half_life": [(2, 100.0)],
        "val/layer0/g_range": [(2, 3.0)],
        "val/layer0/clamped": [(2, 0.0)],
    }
    log.close()
    # As after a kill between a checkpoint at step 1 and the next.
    resumed = RunLog(tmp_path, 1, ("tensorboard",))
    resumed.add("train", {"step": 2, "loss": 1.25})
    resumed.close()
    assert [row["loss"] for row in read_rows(tmp_path / "train.jsonl")] == [2.0, 1.25]
    assert curves(tmp_path)["train/loss"] == [(1, 2.0), (2, 1.25)]


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in that records what wandb would be sent."""
    module = types.ModuleType("wandb")
    module.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    module.begun, module.sent = [], []

    class Run:
        def __init__(self, **settings):
            module.begun.append(settings)
            self.id = settings["id"] or "abc123"

        def define_metric(self, name, step_metric):
            assert (name, step_metric) == ("*", "step")

        def log(self, values):
            module.sent.append(values)

        def finish(self):
            module.sent.append("finished")

    module.init = Run
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_weights_and_biases_continues_the_run_it_began(tmp_path, wandb):
    (tmp_path / "run.json").write_text(json.dumps({"train": {"lr": 0.1}}))
    for start in (0, 1):
        log = RunLog(tmp_path, start, ("wandb",))
        log.add("train", {"step": start + 1, "loss": 2.0, "mfu": None})
        log.close()
    assert [settings["id"] for settings in wandb.begun] == [None, "abc123"]
    assert wandb.begun[0]["config"] == {"train": {"lr": 0.1}}
    assert wandb.sent == [
        {"train/loss": 2.0, "step": 1},
        "finished",
        {"train/loss": 2.0, "step": 2},
        "finished",
    ]


def test_a_run_logs_its_speed_memory_and_health(tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog; " * 200)
    monkeypatch.setattr("sisa_model.models.flops.peak_flops", lambda device: 1e12)
    settings = {
        "steps": 2,
        "seq_len": 64,
        "batch_size": 2,
        "sample_tokens": 0,
        "log": ("tensorboard",),
    }
    folder = train(
        TrainConfig(data=(tmp_path / "text.txt",), out=tmp_path / "run", **settings)
    ).folder
    # Two layers of width 64, d_ff 229, two heads of 32 and 16; 32 earlier tokens on average; 257
    # outputs; 2 a MAC, 3 passes.
    flops = 6 * (
        2 * (4 * 64 * 64 + 64 * 2 * (16 + 16 + 1 + 8) + 3 * 64 * 229 + 32 * 2 * (32 + 16 + 32))
        + 64 * 257
    )
    for row in read_rows(folder / "train.jsonl"):
        # The rate is rounded.
        assert row["mfu"] == pytest.approx(row["tokens_per_s"] * flops / 1e12, rel=1e-3)
        assert row["peak_memory_mib"] > 100
    packed = train(
        TrainConfig(
            data=(tmp_path / "text.txt",), out=tmp_path / "packed", documents="packed", **settings
        )
    ).folder
    assert read_rows(packed / "train.jsonl")[0]["mfu"] is None, (
        "pairs of tokens of two documents are not computed"
    )
    found = curves(folder)
    assert {
        "train/tokens_per_s",
        "train/mfu",
        "train/peak_memory_mib",
        "train/grad_norm",
        "val/layer1/half_life",
    } <= found.keys()
    assert [step for step, _ in found["val/loss"]] == [0, 2]
    monkeypatch.undo()
    train(
        TrainConfig(data=(tmp_path / "text.txt",), out=tmp_path / "cpu", **{**settings, "log": ()})
    )
    assert read_rows(tmp_path / "cpu" / "train.jsonl")[0]["mfu"] is None, "no CPU's peak is known"
    assert not (tmp_path / "cpu" / "tensorboard").exists()


@pytest.mark.skipif(
    not Path("/proc/self/status").is_file(), reason="the system has no /proc to compare with"
)
def test_peak_memory_is_what_the_system_counts():
    found = peak_memory_mib(torch.device("cpu"))
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    # Read a moment later.
    assert found == pytest.approx(int(lines["VmHWM"].split()[0]) / 2**10, rel=0.01)


@pytest.mark.parametrize(
    ("log", "message"),
    [
        (("wandb",), "log 'wandb' needs a package that is not installed: pip install wandb"),
        (("tensorboard",), "log 'tensorboard' needs a package that is not installed"),
        (("paper",), "log must be among tensorboard, wandb, each at most once, got paper"),
        (("tensorboard", "tensorboard"), "got tensorboard tensorboard"),
    ],
)
def test_a_log_that_cannot_be_kept_is_named_before_anything_starts(
    tmp_path, monkeypatch, log, message
):
    if len(log) == 1:
        for name in ("wandb", "tensorboard"):
            monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    with pytest.raises(ValueError, match=message):
        train(TrainConfig(out=tmp_path / "run", log=log))
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_names_the_file(tmp_path):
    log = RunLog(tmp_path, 0)
    (tmp_path / "train.jsonl").unlink()
    (tmp_path / "train.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device: .*train.jsonl"):
        log.add("train", {"step": 1, "loss": 2.0})


def test_a_full_disk_names_what_was_to_be_made(tmp_path):
    def full(aside):
        raise OSError(errno.ENOSPC, "No space left on device")

    for make in (write_atomically, make_folder_atomically):
        with pytest.raises(OSError, match=r"No space left on device: .*wanted'"):
            make(tmp_path / "wanted", full)
        assert list(tmp_path.iterdir()) == []
