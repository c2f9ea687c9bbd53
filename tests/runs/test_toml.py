"""Settings files: read as written, for every command; errors name the file and the key."""

import dataclasses
import json
import math
import typing
from pathlib import Path

import pytest

from sisa_model.cli import COMMANDS, main
from sisa_model.experiments.study import StudyConfig
from sisa_model.runs.config import TrainConfig
from sisa_model.runs.toml import read_settings, to_toml, write_settings
from tests.support.commands import run_instead


def test_what_is_written_is_read(tmp_path):
    written = TrainConfig(
        data=(Path("a b"), Path('"\\\u00fc\x7f\n'), Path("not utf-8: \udcff")),
        lr=1e-05,
        clip=math.inf,
        steps=7,
        mix=("recall",),
        compile=True,
        model={"n_layers": 1, "init_std": 0.5, "decay": False},
    )
    write_settings(tmp_path / "a.toml", dataclasses.asdict(written))
    assert TrainConfig(**read_settings(tmp_path / "a.toml", TrainConfig)) == written


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps = 1\nstepz = 2", r"a\.toml: stepz is not among its flags: preset, "),
        ("[model]\nfamily = 'fox'", r"a\.toml: model\.family is not among its flags: d-model, "),
        ("steps = 'many'", r"a\.toml: steps must be of type int, got 'many'"),
        ("steps = true", r"a\.toml: steps must be of type int, got True"),
        ("data = 'here'", r"a\.toml: data must be a list, got 'here'"),
        ("model = 3", r"a\.toml: model must be a table, got 3"),
        ("mix = ['chess']", r"a\.toml: mix must be one of needle, recall, got 'chess'"),
        ("steps = ", r"a\.toml is not TOML: "),
    ],
)
def test_errors_name_the_file_and_the_key(tmp_path, text, message):
    (tmp_path / "a.toml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_settings(tmp_path / "a.toml", TrainConfig)
    with pytest.raises(FileNotFoundError, match=r"config .*none\.toml does not exist"):
        read_settings(tmp_path / "none.toml", TrainConfig)


def test_a_study_has_no_preset_to_set(tmp_path):
    (tmp_path / "a.toml").write_text("preset = 'fox-tiny'")
    with pytest.raises(ValueError, match="preset is not among its flags"):
        read_settings(tmp_path / "a.toml", StudyConfig)


EXAMPLES = {int: 3, float: 0.5, bool: True, str: "x", Path: "x"}


def example(hint):
    """A TOML value for a flag of this type, and the value it is."""
    if typing.is_typeddict(hint):
        return {"n_layers": 3}, {"n_layers": 3}
    if typing.get_origin(hint) is tuple:
        item, value = example(typing.get_args(hint)[0])
        return [item], (value,)
    if typing.get_origin(hint) is typing.Literal:
        return (typing.get_args(hint)[-1],) * 2
    if hint in EXAMPLES:
        return EXAMPLES[hint], hint(EXAMPLES[hint])
    return example(next(x for x in typing.get_args(hint) if x is not type(None)))


@pytest.mark.parametrize("name", COMMANDS)
def test_a_file_holds_any_flag_of_a_command(tmp_path, name, monkeypatch):
    config, _ = COMMANDS[name].load()
    hidden = {"preset", "stop_at", "resume"} if name == "study" else set()
    hints = {x: h for x, h in typing.get_type_hints(config).items() if x not in hidden}
    examples = {field: example(hint) for field, hint in hints.items()}
    written = {field.replace("_", "-"): value for field, (value, _) in examples.items()}
    (tmp_path / "a.toml").write_text(to_toml(written))
    seen = []
    run_instead(monkeypatch, name, seen.append)
    assert main([name, "--config", str(tmp_path / "a.toml")]) == 0
    assert {field: getattr(seen[0], field) for field in examples} == {
        field: value for field, (_, value) in examples.items()
    }


def test_flags_win_over_the_file(tmp_path, monkeypatch, capsys):
    path = tmp_path / "a.toml"
    path.write_text("steps = 5\nresume = true\nmix = ['needle']\n[model]\nn-layers = 1\nd_ff = 8")
    seen = []
    run_instead(monkeypatch, "train", seen.append)
    flags = ["--steps", "6", "--no-resume", "--tasks", "recall", "--model.n-layers", "3"]
    assert main(["train", f"--config={path}", *flags]) == 0
    expected = TrainConfig(steps=6, mix=("recall",), model={"n_layers": 3, "d_ff": 8})
    assert seen == [expected]
    path.write_text("depth = 5")
    assert main(["train", "--config", str(path)]) == 1
    assert f"sisa: error: config {path}: depth is not among its flags" in capsys.readouterr().err


def test_what_a_file_leaves_out_is_still_demanded(tmp_path, monkeypatch, capsys):
    path = tmp_path / "a.toml"
    path.write_text("mode = 'exact'\ncheckpoint = 'weights.pt'")
    seen = []
    run_instead(monkeypatch, "convert", seen.append)
    assert main(["convert", "--config", str(path), "--preset", "sisa-tiny-ds16"]) == 2
    assert "convert needs --out" in capsys.readouterr().err
    given = ["--preset", "sisa-tiny-ds16", "--out", str(tmp_path / "out")]
    assert main(["convert", "--config", str(path), *given]) == 0
    assert (seen[0].checkpoint, seen[0].mode) == (Path("weights.pt"), "exact")


def test_a_runs_own_file_repeats_it(corpus, tmp_path):
    flags = ["--data", str(corpus), "--steps", "4", "--seq-len", "64", "--batch-size", "4"]
    flags += ["--mix", "recall", "--model.n-layers", "1"]
    flags += ["--val-blocks", "2", "--sample-tokens", "9"]
    assert main(["train", *flags, "--out", str(tmp_path / "a"), "--stop-at", "3"]) == 75
    assert main(["train", "--out", str(tmp_path / "a"), "--resume"]) == 0
    run = ["train", "--config", str(tmp_path / "a" / "run.toml")]
    assert main([*run, "--out", str(tmp_path / "b")]) == 0
    for name in ("run.toml", "sample.txt", "val.jsonl", "final/model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    first, second = (
        [
            json.loads(row)["loss"]
            for row in (tmp_path / run / "train.jsonl").read_text().splitlines()
        ]
        for run in ("a", "b")
    )
    assert first == second
    assert len(first) == 4
    model = json.loads((tmp_path / "b" / "run.json").read_text())["model"]
    assert (model["n_layers"], model["d_model"]) == (1, 64)
