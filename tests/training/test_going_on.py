"""Runs that go on: extended, begun from weights, rescued, with the best of them kept."""

import math

import pytest
import torch
from safetensors.torch import load_file

import sisa_model as sm
from sisa_model.cli import main
from sisa_model.runs.config import TrainConfig, resolve
from sisa_model.runs.folder import read_run
from sisa_model.runs.log import read_rows
from sisa_model.runs.weights import checkpoints, find_weights, step_of
from sisa_model.training.optimizer import learning_rate
from sisa_model.training.step import Stepper
from sisa_model.training.trainer import train

SETTINGS = {
    "seq_len": 32,
    "batch_size": 2,
    "val_blocks": 2,
    "val_every": 2,
    "save_every": 2,
    "sample_tokens": 0,
    "warmup_steps": 2,
    "device": "cpu",
}


def begun(text, out, **changes):
    return train(TrainConfig(out=out, data=(text,), **{**SETTINGS, **changes}))


def weights(folder):
    return load_file(folder / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_rates_of_every_schedule():
    settings = {"steps": 100, "warmup_steps": 10, "lr": 1.0}
    constant = resolve(TrainConfig(**settings, schedule="constant"))
    assert [learning_rate(n, constant) for n in (0, 9, 10, 99)] == [0.1, 1.0, 1.0, 1.0]
    wsd = resolve(TrainConfig(**settings, schedule="wsd", decay_steps=20))
    found = [learning_rate(n, wsd) for n in (4, 10, 80, 81, 90, 99)]
    assert found == pytest.approx([0.5, 1.0, 1.0, 0.95, 0.5, 0.05])
    assert resolve(TrainConfig(**settings, schedule="wsd")).decay_steps == 10
    cosine = resolve(TrainConfig(**settings))
    assert learning_rate(55, cosine) == pytest.approx(0.5 * (1 + math.cos(math.pi / 2)))


@pytest.mark.parametrize("finished", [True, False])
def test_wsd_is_extended_as_if_it_had_always_been_longer(text, tmp_path, finished):
    wsd = {"schedule": "wsd", "decay_steps": 3}
    straight = begun(text, tmp_path / "straight", steps=11, **wsd).folder
    run = tmp_path / "run"
    # From step 5 on the rate falls; the newest checkpoint is of the end, or of step 6.
    begun(text, run, steps=8, keep=1, stop_at=None if finished else 6, **wsd)
    short = weights(run / "final") if finished else None
    assert [step_of(x) for x in checkpoints(run)] == [5, 8 if finished else 6]
    result = train(TrainConfig(out=run, resume=True, steps=11))
    assert (result.finished, result.steps) == (True, 11)
    assert same(weights(run / "final"), weights(straight / "final"))
    for name in ("train", "val"):
        rows = [read_rows(folder / f"{name}.jsonl") for folder in (run, straight)]
        assert [row["loss"] for row in rows[0]] == [row["loss"] for row in rows[1]]
    assert read_run(run).train.steps == 11
    if finished:
        assert same(weights(run / "final-8"), short)


def test_a_cosine_is_extended_from_where_it_was_and_says_what_changes(text, tmp_path, caplog):
    run = tmp_path / "run"
    begun(text, run, steps=4)
    short = weights(run / "final")
    train(TrainConfig(out=run, resume=True, steps=8))
    assert "4 steps become 8 (cosine): from step 4 on the learning rate is" in caplog.text
    assert [row["step"] for row in read_rows(run / "train.jsonl")] == list(range(1, 9))
    longer = read_run(run).train
    rates = [row["lr"] for row in read_rows(run / "train.jsonl")]
    assert rates[4:] == [learning_rate(n, longer) for n in range(4, 8)]
    assert same(weights(run / "final-4"), short)
    assert not same(weights(run / "final"), short)
    with pytest.raises(ValueError, match="steps must be at least 8, which the run in"):
        train(TrainConfig(out=run, resume=True, steps=6))


def test_a_rate_may_be_told_anew(text, tmp_path):
    run = tmp_path / "run"
    begun(text, run, steps=4, stop_at=2, schedule="constant", lr=1e-3)
    train(TrainConfig(out=run, resume=True, lr=1e-4))
    rates = [row["lr"] for row in read_rows(run / "train.jsonl")]
    assert rates == [5e-4, 1e-3, 1e-4, 1e-4]
    assert read_run(run).train.lr == 1e-4


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A finished run of a model of its own shape."""
    folder = tmp_path_factory.mktemp("teacher")
    (folder / "text.txt").write_text("".join(f"{n} green bottles; " for n in range(900)))
    shape = {"n_layers": 1, "d_model": 32}
    data = (folder / "text.txt",)
    return train(
        TrainConfig(out=folder / "run", data=data, steps=2, model=shape, **SETTINGS)
    ).folder


@pytest.mark.parametrize("kind", ["run", "final", "checkpoint", "hf"])
def test_a_run_begins_with_given_weights(teacher, text, tmp_path, kind):
    if kind == "hf":
        hf = pytest.importorskip("sisa_model.hf")
        hf.SisaForCausalLM.from_pretrained(teacher / "final").save_pretrained(tmp_path / "hf")
    folders = {
        "run": teacher,
        "final": teacher / "final",
        "checkpoint": checkpoints(teacher)[-1],
        "hf": tmp_path / "hf",
    }
    run = tmp_path / "run"
    begun(text, run, steps=1, init_from=folders[kind], lr=1e-30, seq_len=64, weight_decay=0.0)
    assert read_run(run).train.model == {
        "n_layers": 1,
        "d_model": 32,
        **(
            {"d_ff": read_run(run).train.model["d_ff"]}
            if "d_ff" in read_run(run).train.model
            else {}
        ),
    }
    assert same(weights(run / "final"), weights(teacher / "final"))


def test_a_begun_run_needs_its_beginning_no_more(teacher, text, tmp_path):
    moved = tmp_path / "teacher"
    moved.mkdir()
    for path in (teacher / "final").iterdir():
        (moved / path.name).write_bytes(path.read_bytes())
    run = tmp_path / "run"
    begun(text, run, steps=4, stop_at=2, init_from=moved)
    straight = begun(text, tmp_path / "straight", steps=4, init_from=moved).folder
    for path in moved.iterdir():
        path.unlink()
    train(TrainConfig(out=run, resume=True))
    assert same(weights(run / "final"), weights(straight / "final"))


def test_weights_that_do_not_fit_are_named(teacher, text, tmp_path):
    with pytest.raises(ValueError, match="preset must be of the family sisa"):
        begun(text, tmp_path / "run", steps=1, init_from=teacher, preset="transformer-tiny")
    with pytest.raises(FileNotFoundError, match="holds no final weights and no checkpoint"):
        begun(text, tmp_path / "run", steps=1, init_from=tmp_path)
    assert not (tmp_path / "run").exists()
    assert find_weights(teacher) == teacher / "final"


def spoil(monkeypatch, bad):
    """Make the losses of some steps, counted from 0, not finite."""
    really = Stepper._gradients

    def gradients(self, step, batch, answers):
        sums = really(self, step, batch, answers)
        return torch.full_like(sums, math.nan) if step in bad else sums

    monkeypatch.setattr(Stepper, "_gradients", gradients)


def test_bad_batches_are_passed_over_as_often_as_told(text, tmp_path, monkeypatch, caplog):
    spoil(monkeypatch, {1, 3})
    run = tmp_path / "run"
    with pytest.raises(FloatingPointError, match="at step 2"):
        begun(text, run, steps=6)
    with pytest.raises(FloatingPointError, match="at step 4"):
        train(TrainConfig(out=run, resume=True, skip_bad_batches=1))
    result = train(TrainConfig(out=run, resume=True, skip_bad_batches=2))
    assert result.finished
    assert "passed over a batch, 0 more may be: the loss must be finite" in caplog.text
    rows = read_rows(run / "train.jsonl")
    assert [row["loss"] is None for row in rows] == [False, True, False, True, False, False]
    assert (run / "bad-batch-00000002.json").is_file()
    assert main(["plot", str(run), "--out", str(tmp_path / "x.png")]) == 0
    assert main(["watch", str(run), "--once", "--out", str(tmp_path / "x.html")]) == 0


def test_a_batch_passed_over_changes_nothing(text, tmp_path, monkeypatch):
    two = begun(text, tmp_path / "two", steps=3, stop_at=2, schedule="constant").folder
    spoil(monkeypatch, {2})
    three = begun(text, tmp_path / "three", steps=3, skip_bad_batches=1, schedule="constant").folder
    kept = sm.load(checkpoints(two)[-1]).state_dict()
    assert same(weights(three / "final"), kept)


def test_a_weight_that_is_not_finite_is_not_passed_over_for_good(text, tmp_path, monkeypatch):
    really = Stepper._gradients

    def gradients(self, step, batch, answers):
        if step == 1:
            raise FloatingPointError("log_decay must be finite, at step 2")
        return really(self, step, batch, answers)

    monkeypatch.setattr(Stepper, "_gradients", gradients)
    assert begun(text, tmp_path / "run", steps=3, skip_bad_batches=1).finished


def test_the_best_checkpoint_stays(text, tmp_path, monkeypatch):
    from sisa_model.training.validation import Validation

    losses = iter([9.0, 3.0, 1.0, 2.0, 4.0, 5.0])
    really = Validation.measure

    def measure(self, step):
        row = really(self, step)
        self.loss = row["loss"] = next(losses)
        return row

    monkeypatch.setattr(Validation, "measure", measure)
    run = tmp_path / "run"
    begun(text, run, steps=10, stop_at=8, keep=1, keep_best=True)
    assert [step_of(x) for x in checkpoints(run)] == [4, 8]
    train(TrainConfig(out=run, resume=True))
    assert [step_of(x) for x in checkpoints(run)] == [4, 10]
    losses = iter([9.0, 3.0, 1.0, 2.0])
    begun(text, tmp_path / "plain", steps=6, keep=1)
    assert [step_of(x) for x in checkpoints(tmp_path / "plain")] == [6]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": "linear"}, "schedule must be one of cosine, wsd, constant"),
        ({"decay_steps": 2}, "decay_steps must be left out with the schedule cosine"),
        ({"schedule": "wsd", "decay_steps": 5}, "decay_steps must be from 1 to the 4 steps"),
        ({"skip_bad_batches": -1}, "skip_bad_batches must be at least 0"),
    ],
)
def test_bad_settings_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        resolve(TrainConfig(steps=4, **changes))
