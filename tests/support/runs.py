"""Run folders for tests, without the training."""

import dataclasses
import json

from sisa_model.runs.config import TrainConfig, resolve


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
