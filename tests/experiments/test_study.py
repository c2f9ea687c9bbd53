"""sisa study: the paper's runs as one list and one command. sisa plot: runs side by side."""

import dataclasses
import json
import math
import shlex

import numpy as np
import pytest
import torch

import sisa_model as sm
from sisa_model.cli import main
from sisa_model.experiments import plot_runs, study
from sisa_model.experiments import published as paper
from sisa_model.experiments.study import PAPER, StudyConfig, run_study
from sisa_model.models.presets import preset_config
from sisa_model.reporting import figures
from sisa_model.runs.log import read_rows
from sisa_model.training.step import Stepper
from tests.support.runs import run_folder

SMALL = shlex.split(
    "--steps 4 --seq-len 32 --batch-size 2 --val-every 2 --val-blocks 2 --save-every 2"
)
BACKEND = ["--sample-tokens", "0", "--backend", "reference"]  # which a Transformer would reject


def flags(text, out, *more):
    places = ["--data", str(text), "--out", str(out)]
    return ["study", "paper", "--scale", "tiny", *places, *SMALL, *BACKEND, *more]


def test_the_paper_at_152m():
    names = [run.name for run in PAPER["152m"]]
    assert len(set(names)) == len(names) == 15
    assert {
        "transformer-152m",
        *paper.SISA_152M,
        "mamba2-152m",
        "mamba3-152m",
        "hybrid-sisa-152m",
    } <= set(names)
    for scale in ("50m", "152m", "369m"):
        published = {name for name in paper.RESULTS if f"-{scale}" in name}
        assert published <= {run.name for run in PAPER[scale]}, "a published figure without a run"
    # The control with lambda = 0 is left out as the same model as this one.
    same = [
        dataclasses.asdict(preset_config(name))
        for name in ("transformer-152m-reduced", "sisa-152m-ds32-lambda0")
    ]
    assert same[0]["d_ff"] == same[1]["d_ff"]
    states = []
    for name in ("transformer-tiny-reduced", "sisa-tiny-ds32-lambda0"):
        torch.manual_seed(0)
        states.append(sm.build(name).state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[1])


@pytest.mark.parametrize("scale", PAPER)
def test_every_run_has_the_papers_settings(scale):
    for run in PAPER[scale]:
        config = study.train_config(StudyConfig(scale=scale), run)
        c = study.resolve(config)
        assert (c.out.name, c.preset) == (run.name, run.preset.name)
        assert c.lambda_lr_scale == (0.0 if run.name.endswith("frozen") else 0.1)
        if scale != "tiny":
            assert (c.steps, c.batch_size * c.seq_len, c.val_every, c.save_every) == (
                9536,
                524_288,
                1000,
                500,
            )


def test_the_same_command_after_a_kill_continues(text, tmp_path, monkeypatch, capsys):
    names, out = (
        ["transformer-tiny", "sisa-tiny-ds16", "sisa-tiny-ds32", "sisa-tiny-ds32-frozen"],
        tmp_path / "study",
    )
    command = flags(text, out, "--only", *names)
    assert main([*command, "--list"]) == 0
    assert capsys.readouterr().out.count("not begun") == len(names)
    assert not out.exists()

    real, steps = Stepper.take, []

    def killed(self, *args):
        if len(steps) == 4 + 3:
            raise KeyboardInterrupt
        steps.append(None)
        return real(self, *args)

    monkeypatch.setattr(Stepper, "take", killed)
    assert main(command) == 130
    monkeypatch.undo()
    capsys.readouterr()
    assert main([*command, "--list"]) == 0
    first, second, third = capsys.readouterr().out.splitlines()[1:4]
    loss = read_rows(out / names[0] / "val.jsonl")[-1]["loss"]
    assert first.split() == [names[0], "finished", f"{loss:.3f}"]
    assert second.split()[:5] == [names[1], "step", "3", "of", "4"]
    assert third.split() == [names[2], "not", "begun"]

    whole = (out / names[0] / "final" / "model.safetensors").stat().st_mtime_ns
    assert main(command) == 0
    listed = capsys.readouterr().out.splitlines()[-len(names) :]
    assert [line.split()[:2] for line in listed] == [[name, "finished"] for name in names]
    assert (out / names[0] / "final" / "model.safetensors").stat().st_mtime_ns == whole, (
        "what is finished is left alone"
    )
    assert [row["step"] for row in read_rows(out / names[1] / "train.jsonl")] == [1, 2, 3, 4]
    lam = [
        read_rows(out / name / "val.jsonl")[-1]["layers"][0]["lam"][0]
        for name in ("sisa-tiny-ds32-frozen", "sisa-tiny-ds32")
    ]
    assert lam[0] == pytest.approx(math.log1p(math.exp(-1)), rel=1e-6)
    assert lam[1] != pytest.approx(lam[0], rel=1e-6)
    records = {name: json.loads((out / name / "run.json").read_text()) for name in names}
    assert {record["train"]["seq_len"] for record in records.values()} == {32}
    assert records["sisa-tiny-ds16"]["train"]["backend"] == "reference"
    assert records["transformer-tiny"]["train"]["backend"] == "auto"

    assert main([*command, "--lr", "0.5"]) == 1, "another study than the one in the folder"
    assert "lr must stay 0.003" in capsys.readouterr().err
    assert (
        main(["plot", *(str(out / name) for name in names), "--out", str(tmp_path / "all.png")])
        == 0
    )
    assert (tmp_path / "all.png").read_bytes().startswith(b"\x89PNG")


def test_the_study_of_the_clamp_is_every_pair_of_three_seeds(tmp_path, capsys):
    configs = [study.train_config(StudyConfig(study="clamp"), run) for run in study.CLAMP]
    cells = {(c.seed, c.mode, c.precision) for c in configs}
    assert len(cells) == len(configs) == 12
    assert {c.out.name for c in configs} == {f"{m}-{p}-seed{s}" for s, m, p in cells}
    for c in map(study.resolve, configs):
        model = c.model_config(2048)
        assert (model.mode, model.d_state, model.n_layers) == (c.mode, 16, 4)
        assert model.weights == ("bf16" if c.precision == "bf16-pure" else "fp32")
    assert main(["study", "clamp", "--list", "--out", str(tmp_path / "clamp")]) == 0
    assert capsys.readouterr().out.count("not begun") == 12
    assert main(["study", "clamp", "--scale", "152m", "--list"]) == 1
    assert "scale must be tiny with the study clamp, got '152m'" in capsys.readouterr().err


@pytest.mark.parametrize("scale", PAPER)
def test_a_study_by_the_authors_recipe(scale):
    for run in PAPER[scale]:
        c = study.resolve(study.train_config(StudyConfig(scale=scale, recipe="paper"), run))
        model = preset_config(run.preset.name)
        clamps = model.family == "sisa" and model.lam != "zero"
        expected = ("paper", "bf16-pure", "clamped" if clamps else "exact")
        assert (c.recipe, c.precision, c.mode) == expected


@pytest.mark.slow
def test_the_whole_study_in_miniature(text, tmp_path, capsys):
    assert main(flags(text, tmp_path / "study")) == 0
    assert {p.name for p in (tmp_path / "study").iterdir()} == {run.name for run in PAPER["tiny"]}
    assert capsys.readouterr().out.count(" finished ") == len(PAPER["tiny"])


def test_bad_studies_are_named_before_anything_starts(text, tmp_path):
    for changes, message in (
        ({"only": ("lstm",)}, "only must be among transformer-tiny, .*, got 'lstm'"),
        ({"scale": "152m", "only": ("sisa-152m-ds16",)}, "data must be given at scale 152m"),
        ({"steps": 0, "only": ("transformer-tiny",)}, "steps must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            run_study(StudyConfig(out=tmp_path / "study", **changes))
    assert not (tmp_path / "study").exists()


def run_of(path, preset="sisa-152m-ds32", layers=True, evals=()):
    """A run folder of a thousand steps, without the training."""
    health = (
        [
            {"layer": n, "lam": [0.1 * n, 0.3 * n], "half_life": [50.0], "g_range": [4.0]}
            for n in range(2)
        ]
        if layers
        else []
    )
    steps = [
        {"step": s, "loss": 1 / s, "lr": 0.1, "grad_norm": 1.0, "tokens_per_s": 9.0, "mfu": None}
        for s in range(1, 1001)
    ]
    val = [
        {"step": s, "loss": 2.0, "needle_accuracy": 0.5, "layers": health} for s in (0, 500, 1000)
    ]
    return run_folder(path, preset, steps, val, evals)


def test_plot_draws_what_the_runs_hold(tmp_path, monkeypatch):
    evals = [
        {"step": step, "task": "lambada", "protocol": "paper", "accuracy": step / 1e4}
        for step in (2000, 1000)
    ]
    sisa = run_of(tmp_path / "a" / "run", evals=evals)
    plain = run_of(tmp_path / "b" / "run", "transformer-152m", layers=False)
    drawn = []
    real = plot_runs.panels
    monkeypatch.setattr(plot_runs, "panels", lambda runs: drawn.append(real(runs)) or drawn[-1])
    assert main(["plot", str(sisa), str(plain), "--out", str(tmp_path / "new" / "runs.png")]) == 0
    assert (tmp_path / "new" / "runs.png").read_bytes().startswith(b"\x89PNG")
    (panels,) = drawn
    band = "(mean, least and greatest of the layers)"
    assert list(panels) == [
        "held-out loss, nats a token",
        "training loss, nats a token",
        "learning rate",
        "gradient norm",
        "tokens/s",
        "needle accuracy",
        "lambada accuracy, evaluated",
        f"lambda {band}",
        f"half-life, tokens {band}",
        f"range of g {band}",
    ]
    assert [line.label for line in panels["gradient norm"]] == [str(sisa), str(plain)], (
        "two folders of one name: their paths"
    )
    training = panels["training loss, nats a token"][0]
    assert (len(training.steps), training.steps[0]) == (250, 2.5)
    assert training.values[0] == pytest.approx(np.mean([1, 1 / 2, 1 / 3, 1 / 4]))
    ours, transformer, theirs = panels["lambada accuracy, evaluated"]
    assert (ours.label, list(ours.steps), list(ours.values)) == (
        str(sisa),
        [1000, 2000],
        [0.1, 0.2],
    )
    assert (transformer.run, transformer.label, transformer.values[0]) == (
        -1,
        "paper: Transformer",
        0.035,
    )
    assert (theirs.label, theirs.values[-1]) == ("paper: SISA d_s 32", 0.174)
    assert (
        len(
            real([plot_runs.RunRows("tiny", "sisa-tiny-ds16", [], [], evals)])[
                "lambada accuracy, evaluated"
            ]
        )
        == 1
    ), "152M's"
    (lam,) = panels[f"lambda {band}"]
    assert (lam.low[-1], lam.values[-1], lam.high[-1]) == pytest.approx((0.0, 0.1, 0.2))


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are drawn, kept open."""
    kept = []
    monkeypatch.setattr(figures.plt, "close", kept.append)
    yield kept
    monkeypatch.undo()
    for figure in kept:
        figures.plt.close(figure)


def test_the_legend_names_every_run(tmp_path, drawn):
    """Also one missing from the first panel, as it was evaluated before its first step only."""
    begun, run = (
        run_of(tmp_path / "begun"),
        run_of(tmp_path / "run", evals=[{"step": 9, "task": "niah", "accuracy": 1}]),
    )
    first = (begun / "val.jsonl").read_text().splitlines()[0]
    (begun / "val.jsonl").write_text(first + "\n")
    assert main(["plot", str(begun), str(run), "--out", str(tmp_path / "runs.png")]) == 0
    legends = [axis.get_legend() for axis in drawn[0].axes if axis.get_legend()]
    assert [text.get_text() for text in legends[-1].get_texts()] == ["begun", "run"]


def test_health_is_drawn_by_the_layers_own_numbers(tmp_path, drawn):
    health = [
        {"layer": n, "lam": [0.3], "half_life": [50.0], "g_range": [4.0], "clamped": 0.0}
        for n in (20, 23)
    ]
    figures.plot_health(
        tmp_path / "health.png", "a hybrid", [{"step": step, "layers": health} for step in (0, 9)]
    )
    assert [text.get_text() for text in drawn[0].axes[0].get_legend().get_texts()] == [
        "layer 20",
        "layer 23",
    ]


def test_health_leaves_out_what_says_nothing(tmp_path, drawn):
    plain = {"layer": 0, "lam": [0.3], "half_life": [50.0], "g_range": [4.0], "clamped": 0.0}
    still = {**plain, "half_life": [6.9e11], "g_range": [0.0]}
    cases = {
        ("lambda", "half-life, tokens", "range of g"): plain,
        ("lambda", "half-life, tokens", "range of g", "share of positions clamped"): {
            **plain,
            "clamped": 0.5,
        },
        ("lambda",): still,
    }
    for titles, layer in cases.items():
        figures.plot_health(
            tmp_path / "health.png", "", [{"step": step, "layers": [layer]} for step in (0, 9)]
        )
        assert tuple(axis.get_title() for axis in drawn.pop().axes) == titles
    still_run = plot_runs.RunRows("x", "sisa-tiny-ds16", [], [{"step": 9, "layers": [still]}], [])
    assert list(plot_runs.panels([still_run])) == [
        "lambda (mean, least and greatest of the layers)"
    ]


def test_folders_that_are_no_runs_are_named(tmp_path, capsys):
    run = run_of(tmp_path / "run")
    bad = run_of(tmp_path / "bad", evals=[{"step": 9, "accuracy": 0.5}])
    (tmp_path / "empty").mkdir()
    begun = run_of(tmp_path / "begun")
    for name in ("train", "val"):
        (begun / f"{name}.jsonl").write_text("")
    for arguments, message in (
        ([run, tmp_path / "empty"], "is not a run folder of sisa train: it has no run.json"),
        ([run, tmp_path / "missing"], "is not a run folder of sisa train: it has no run.json"),
        ([begun], "holds no step yet"),
        ([bad], "eval.jsonl must hold rows of step, task and accuracy"),
        ([run, run], "runs must name at least one run folder, each once"),
        ([run, "--out", tmp_path / "x.pdf"], "out must be a .png file"),
    ):
        assert main(["plot", *map(str, arguments)]) == 1
        assert message in capsys.readouterr().err


def test_the_papers_numbers_are_whole():
    assert all(0 <= value <= 100 for tasks in paper.RESULTS.values() for value in tasks.values())
    for task, curves in paper.BY_STEP.items():
        for curve in curves:  # where the table by step has the end, it is the main table's figure
            for preset in curve.presets:
                if paper.STEPS in curve.points and task in paper.RESULTS[preset]:
                    assert curve.points[paper.STEPS] == paper.RESULTS[preset][task]
    assert paper.TOKENS_PER_S["sisa-152m-ds32"] / paper.TOKENS_PER_S[
        "transformer-152m"
    ] == pytest.approx(0.61, abs=5e-3)


@pytest.mark.parametrize(
    ("command", "what"),
    [(["compare"], "comparison"), (["study", "--scale", "tiny"], "study")],
)
def test_what_a_signal_stopped_does_not_count_as_done(command, what, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sisa_model.experiments.study.continue_run", lambda config: False)
    assert main([*command, "--out", str(tmp_path / "out")]) == 75
    assert f"stopped; the same command continues the {what}" in capsys.readouterr().out
