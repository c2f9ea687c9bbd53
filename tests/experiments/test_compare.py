"""sisa compare and the other commands."""

import dataclasses
import json
import re
import shutil

import pytest

import sisa_model as sm
from sisa_model.cli import COMMANDS, main
from sisa_model.experiments.compare import CompareConfig, compare
from sisa_model.models.config import ModelConfig
from sisa_model.runs.log import read_rows


@pytest.fixture
def small(text, tmp_path):
    settings = {"steps": 4, "seq_len": 64, "batch_size": 2, "val_every": 2, "data": (text,)}
    return {"seeds": (0, 1), "out": tmp_path / "compare", **settings}


@pytest.mark.slow
def test_compare_trains_alike_and_reports(small, caplog, monkeypatch):
    folder = compare(CompareConfig(**small))
    runs = sorted(p.name for p in folder.iterdir() if p.is_dir())
    assert runs == [
        "sisa-tiny-ds16-seed0",
        "sisa-tiny-ds16-seed1",
        "transformer-tiny-seed0",
        "transformer-tiny-seed1",
    ]
    records = {name: json.loads((folder / name / "run.json").read_text())["train"] for name in runs}
    for record in records.values():
        record.pop("out")
    assert records[runs[0]] | {"preset": ""} == records[runs[2]] | {"preset": ""}, (
        "same data, seed and budget"
    )
    results = json.loads((folder / "results.json").read_text())["val"]
    assert results["transformer-tiny"][1] == read_rows(folder / runs[3] / "val.jsonl")
    assert results["sisa-tiny-ds16"][0] != results["sisa-tiny-ds16"][1], "seeds differ"
    table = (folder / "table.md").read_text()
    assert table in caplog.text
    mean = sum(rows[-1]["loss"] for rows in results["sisa-tiny-ds16"]) / 2
    assert f"| sisa-tiny-ds16 | {mean:.3f} (" in table
    assert "| chance | | 6.2 % | 27.8 % | | |" in table
    assert (folder / "compare.png").read_bytes().startswith(b"\x89PNG")

    with pytest.raises(FileExistsError, match="exists and holds no run of this comparison"):
        compare(CompareConfig(**{**small, "out": folder.parent}))
    shutil.rmtree(folder / runs[3])
    whole = {name: (folder / name / "val.jsonl").stat().st_mtime_ns for name in runs[:3]}
    compare(CompareConfig(**small))
    assert {name: (folder / name / "val.jsonl").stat().st_mtime_ns for name in runs[:3]} == whole, (
        "what is finished is left alone"
    )
    assert json.loads((folder / "results.json").read_text())["val"] == results, (
        "the run that was gone is made again"
    )
    monkeypatch.setattr("sisa_model.training.trainer.train", None)
    compare(CompareConfig(**small, resume=True))
    with pytest.raises(ValueError, match=r"steps must stay 4, as the run in .* has it, got 9"):
        compare(CompareConfig(**{**small, "steps": 9}))
    with pytest.raises(FileExistsError, match="exists and holds no run of this comparison"):
        compare(CompareConfig(**{**small, "seeds": (0,)}))  # its figure would replace this one
    (folder.parent / "empty").mkdir()
    for options in ({"out": folder.parent / "empty"}, {"seeds": (0, 2), "resume": True}):
        with pytest.raises(TypeError):  # train() itself is called
            compare(CompareConfig(**{**small, **options}))


def test_a_comparison_by_the_authors_recipe(small):
    config = CompareConfig(**{**small, "seeds": (0,), "recipe": "paper"})
    folder = compare(config)
    found = {}
    for preset in config.presets:
        found[preset] = json.loads((folder / f"{preset}-seed0" / "run.json").read_text())["train"]
        assert (found[preset]["recipe"], found[preset]["precision"]) == ("paper", "bf16-pure")
    assert found["sisa-tiny-ds16"]["mode"] == "clamped"
    assert found["transformer-tiny"]["mode"] == "exact"
    with pytest.raises(FileExistsError, match="exists and holds no run of this comparison"):
        compare(dataclasses.replace(config, recipe="ours"))


@pytest.mark.slow
def test_a_comparison_takes_a_folder_that_is_free_or_its_own(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = {name: value for name, value in small.items() if name != "out"}
    assert [
        str(compare(CompareConfig(**options))) for options in (own, own, own | {"seeds": (0,)})
    ] == [
        "runs/compare",
        "runs/compare",
        "runs/compare-2",
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"presets": ("sisa-tiny-ds16",)}, "presets must name at least two different models"),
        (
            {"presets": ("transformer-tiny", "transformer-tiny")},
            "presets must name at least two different models",
        ),
        ({"presets": ("transformer-tiny", "lstm")}, "preset must be one of"),
        ({"seeds": ()}, "seeds must be at least one and all different"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"seeds": (0, -1)}, "seed must be at least 0, got -1"),
    ],
)
def test_bad_comparisons_are_named(small, changes, message):
    with pytest.raises(ValueError, match=message):
        compare(CompareConfig(**{**small, **changes}))
    assert not small["out"].exists(), "the first run has begun before the last was checked"


def test_info_lists_every_preset(capsys):
    assert main(["info"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in sm.presets())
    assert "151,878,432" in listed
    assert main(["info", "--preset", "transformer-50m"]) == 0
    assert "d_model            512" in capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_explains_every_flag(command, capsys):
    assert main([command, "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    flags = ["config"]
    for field in dataclasses.fields(COMMANDS[command].load()[0]):
        marks = str(getattr(field.type, "__metadata__", ""))
        if field.name == "model":
            own = {"family", "mode", "backend", "weights"}  # the preset's, and flags of the run
            shape = {x.name for x in dataclasses.fields(ModelConfig)} - own
            flags += [rf"model\.(?:\[no-\])?{name}" for name in shape]
        elif "Suppress" not in marks and "Positional" not in marks:
            flags.append(rf"(?:\[no-\])?{field.name}")
    for flag in flags:
        found = re.search(
            rf"--{flag.replace('_', '-')}((?: [A-Z]{{3,}})?(?: \.\.\.)?) \S+ \S*[a-z]", shown
        )
        assert found, f"{flag} is not shown with what it means"
    if command == "train":
        fixed = "preset data tokenizer out steps seed seq-len batch-size lr device resume"
        assert all(f"--{flag}" in shown for flag in fixed.split())
