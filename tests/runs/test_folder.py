"""Run folders: their record and its former forms; models of one's own."""

import dataclasses
import json
import typing

import pytest

import sisa_model as sm
from sisa_model.cli import main
from sisa_model.models.config import ModelConfig
from sisa_model.runs.config import ModelOverrides, TrainConfig, resolve
from sisa_model.runs.folder import read_run, resumed
from sisa_model.training.trainer import train


@pytest.fixture
def run(corpus, tmp_path):
    """A run of three steps of four, with a model of its own."""
    return train(
        TrainConfig(
            data=(corpus,),
            out=tmp_path / "run",
            model={"n_layers": 1, "d_model": 32},
            steps=4,
            stop_at=3,
            seq_len=64,
            batch_size=2,
            val_blocks=2,
            mix=("recall",),
            sample_tokens=0,
        )
    ).folder


def test_a_model_of_ones_own(run, capsys):
    record = read_run(run)
    assert record.train.model == {"n_layers": 1, "d_model": 32}
    config = dataclasses.asdict(sm.load(run / "checkpoints" / "step-00000003").config)
    assert record.model == config
    assert (config["n_layers"], config["d_model"], config["d_state"]) == (1, 32, 16)
    assert train(TrainConfig(out=run, resume=True)).finished
    assert main(["generate", str(run), "--max-new-tokens", "3"]) == 0
    assert main(["eval", str(run), "--tasks", "niah", "--limit", "1"]) == 0
    with pytest.raises(ValueError, match="model must stay"):
        train(TrainConfig(out=run, resume=True, model={"n_layers": 2}))


def test_the_record_of_an_earlier_version_is_read(run):
    record = json.loads((run / "run.json").read_text())
    settings = record["train"]
    for name in ("model", "text_field", "format", "skip_bad", "recipe"):
        del settings[name]
    del record["model"]
    settings["tasks"] = settings.pop("mix")
    (run / "run.json").write_text(json.dumps(record))
    assert read_run(run).train.mix == ("recall",)
    assert read_run(run).train.model == {}
    assert resumed(TrainConfig(out=run, resume=True)).mix == ("recall",)


def test_model_flags_are_the_models_fields():
    """With its types and its words; --preset, --mode, --backend and --precision say the rest."""
    flags = typing.get_type_hints(ModelOverrides)
    own = {"family", "mode", "backend", "weights"}
    hints = typing.get_type_hints(ModelConfig)
    assert flags == {name: hint for name, hint in hints.items() if name not in own}
    helps = typing.get_type_hints(ModelOverrides, include_extras=True)
    assert all(hint.__metadata__[0].help for hint in helps.values())


def test_vocabulary_and_length_make_room_for_the_run():
    config = resolve(TrainConfig(preset="sisa-50m-ds16", seq_len=64, model={"vocab_size": 100}))
    assert config.model_config(257).vocab_size == 257
    assert config.model_config(50).vocab_size == 100
    parity = resolve(TrainConfig(task="parity", seq_len=64, model={"max_seq_len": 32}))
    assert parity.model_config(257).max_seq_len == 256
