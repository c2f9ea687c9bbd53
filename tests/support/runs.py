"""Run folders for tests, without the training; whether two runs did the same."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file

from sisa_model.runs.config import TrainConfig, resolve
from sisa_model.runs.log import read_rows

# Sums of fp32 in another order: measured at 5e-9 (the gradient's norm: 2e-7) in the first step,
# which shows that they are the same sums, and up to 5e-7 (2e-6) in the fourth: Adam's first steps
# turn the rounding of a gradient near 0 into a part of a whole step.
BAND_FIRST, BAND = 1e-6, 2e-5


def run_folder(path, preset, train, val, evals=(), **settings):
    """A run folder as `sisa train` leaves one, of these rows, without the training."""
    path.mkdir(parents=True)
    config = resolve(TrainConfig(preset=preset, **settings))
    record = {
        "train": dataclasses.asdict(config),
        "corpus": {"sha256": ""},
        "versions": {"commit": "0123456789ab"},
    }
    (path / "run.json").write_text(json.dumps(record, default=str))
    for name, rows in (("train", train), ("val", val), ("eval", evals)):
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_agree(one, many, band):
    """Two runs of the same batches have the same losses and norms, the first step's to rounding."""
    for name, fields in (("train", ("loss", "grad_norm")), ("val", ("loss",))):
        first, second = (read_rows(folder / f"{name}.jsonl") for folder in (one, many))
        assert [row["step"] for row in first] == [row["step"] for row in second]
        for field in fields + tuple(f for f in ("recall_loss", "tokens") if f in first[0]):
            assert second[0][field] == pytest.approx(first[0][field], rel=min(band, BAND_FIRST)), (
                many.name,
                name,
                field,
            )
            assert [row[field] for row in second] == pytest.approx(
                [row[field] for row in first], rel=band
            ), (
                many.name,
                name,
                field,
            )


def weights_agree(one, many):
    """Two runs of the same batches end with the same weights, but for rounding."""
    first, second = (load_file(folder / "final" / "model.safetensors") for folder in (one, many))
    assert first.keys() == second.keys()
    for name in first:
        # Four steps of at most 3e-3 each; Adam turns a gradient's rounding near 0 into a part of a
        # step.
        torch.testing.assert_close(second[name], first[name], rtol=1e-3, atol=2e-4)
