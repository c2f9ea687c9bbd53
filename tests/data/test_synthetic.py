"""Tasks: every answer recomputed, chance met by guessers, a run on a task alone."""

import dataclasses
import json
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch

import sisa_model as sm
from sisa_model.data.blocks import IGNORE
from sisa_model.data.synthetic import (
    ALONE,
    DEPTHS,
    POOL,
    TASKS,
    RetrievalTask,
    TaskBlocks,
    accuracy,
    exams,
    find_task,
    flipflop,
    needle,
    recall,
)
from sisa_model.experiments.compare import CompareConfig, compare, resolve
from sisa_model.runs.config import TrainConfig
from sisa_model.runs.log import read_rows
from sisa_model.training.trainer import train

TOP = 256
KEYS, VALUES = range(TOP - 2 * POOL, TOP - POOL), range(TOP - POOL, TOP)
NAMES = [*ALONE, "addition-7"]


def draw(name, seq_len=64, count=50, seed=0):
    return find_task(name)(TOP, seq_len, count, np.random.default_rng(seed))


def test_needle_hides_a_random_pair_at_every_depth():
    text, end = np.arange(5000, dtype=np.int32) % 100, 256
    sample = needle(text, end, 64, 40, np.random.default_rng(0))
    assert sample.inputs.shape == sample.targets.shape == (40, 64)
    assert (sample.targets != IGNORE).sum(1).tolist() == [1] * 40
    assert (sample.chance == 1 / POOL).all()
    for row, target, place in zip(
        sample.inputs.tolist(), sample.targets.tolist(), sample.place.tolist()
    ):
        key, value = row[-1], target[-1]
        assert end - 2 * POOL <= key < end - POOL <= value < end
        assert row.index(key) == int(place * 62)
        assert row[row.index(key) + 1] == value
    assert np.bincount((sample.place * DEPTHS).long()).tolist() == [10] * DEPTHS
    again = needle(text, end, 64, 40, np.random.default_rng(0))
    assert (again.inputs == sample.inputs).all()
    assert (needle(text, end, 64, 40, np.random.default_rng(1)).inputs != sample.inputs).any()


def test_recall_asks_every_recurrence_and_only_those():
    sample = recall(256, 128, 20, np.random.default_rng(0))
    places, chances = [], []
    for row, target in zip(sample.inputs.tolist(), sample.targets.tolist()):
        known = {}
        for position in range(0, len(row), 2):
            key = row[position]
            if key in known:
                assert target[position] == row[known[key] + 1]
                places.append(known[key] / 128)
                chances.append(1 / len(known))
            else:
                assert target[position] == IGNORE
            assert position + 1 == len(row) or target[position + 1] == IGNORE
            known[key] = position
    assert sample.place.tolist() == pytest.approx(places)
    assert sample.chance.tolist() == pytest.approx(chances)
    mixed = TASKS["recall"](np.zeros(1, np.int32), 256, 128, 20, np.random.default_rng(0))
    assert mixed.inputs.shape == (20, 63), "short in text, whatever the text's length"


def test_the_flag_offers_every_retrieval_task():
    assert get_args(RetrievalTask) == tuple(TASKS)


@pytest.mark.parametrize(
    ("name", "modulus"), [("parity", 2), ("addition", 5), ("addition-7", 7), ("addition-16", 16)]
)
def test_addition_asks_the_running_sum_everywhere(name, modulus):
    sample = draw(name, 40)
    assert sample.inputs.shape == sample.targets.shape == (50, 40)
    assert sorted(set(sample.inputs.flatten().tolist())) == list(KEYS)[:modulus]
    for row, target in zip(sample.inputs.tolist(), sample.targets.tolist()):
        total = 0
        for token, answer in zip(row, target):
            total += token - KEYS[0]
            assert answer == VALUES[total % modulus]
    assert (sample.chance == 1 / modulus).all()
    assert sample.place.tolist() == pytest.approx(
        [position / 40 for _ in range(50) for position in range(40)]
    )


def test_flipflop_reads_the_last_bit_written():
    sample = flipflop(TOP, 64, 2000, np.random.default_rng(0))
    write, read, ignore = KEYS[:3]
    counts, places = {write: 0, read: 0, ignore: 0}, []
    for row, target in zip(sample.inputs.tolist(), sample.targets.tolist()):
        assert (len(row), row[0], row[62]) == (63, write, read)
        memory, written = row[1], 0
        for position in range(0, 63, 2):
            instruction = row[position]
            counts[instruction] += position not in (0, 62)
            bit = row[position + 1] if position < 62 else target[position]
            assert bit in VALUES[:2]
            if instruction == write:
                memory, written = bit, position
            if instruction == read:
                assert bit == target[position] == memory
                places.append(written / 64)
            else:
                assert target[position] == IGNORE
            assert position == 62 or target[position + 1] == IGNORE
    assert sample.place.tolist() == pytest.approx(places)
    shares = [counts[instruction] / 60_000 for instruction in (write, read, ignore)]
    assert shares == pytest.approx([0.1, 0.1, 0.8], abs=0.006), (
        "five standard deviations of the rarer share"
    )


@pytest.mark.parametrize("name", NAMES)
def test_guessers_reach_chance_and_no_more(name):
    """A guess among the open answers, and the likeliest, are right as ``chance`` says."""
    sample = draw(name, 64, 400)
    answers, rng = sample.targets[sample.targets != IGNORE].numpy(), np.random.default_rng(1)
    chance = sample.chance.mean().item()
    if name == "recall":
        guesses = []
        for row, target in zip(sample.inputs.tolist(), sample.targets.tolist()):
            for position in range(0, 63, 2):
                if target[position] != IGNORE:
                    guesses.append(rng.choice(sorted(set(row[1:position:2]))))
    else:
        guesses = rng.choice(np.unique(answers), len(answers))
        assert np.bincount(answers).max() / len(answers) == pytest.approx(chance, abs=0.025), (
            "none is much likelier"
        )
    deviation = np.sqrt(chance * (1 - chance) / len(answers))
    assert (np.array(guesses) == answers).mean() == pytest.approx(chance, abs=5 * deviation)


@pytest.mark.parametrize("name", NAMES)
def test_a_task_is_a_function_of_seed_and_number(name):
    blocks = TaskBlocks(find_task(name), TOP, 32, seed=3)
    assert blocks.ids(62, 4) == [62, 63, 64, 65]
    inputs, targets = blocks.take(blocks.ids(62, 4))
    assert inputs.shape == targets.shape
    assert len(inputs) == 4
    again = TaskBlocks(find_task(name), TOP, 32, seed=3).take([64])
    assert (again[0] == inputs[2:3]).all()
    assert (again[1] == targets[2:3]).all()
    assert all((inputs[n] != inputs[n + 1]).any() for n in range(3))
    assert (TaskBlocks(find_task(name), TOP, 32, seed=4).take([64])[0] != again[0]).any()


@pytest.mark.parametrize("name", NAMES)
def test_exams_ask_the_lengths_they_are_named_by(name):
    for factor, exam in exams(find_task(name), TOP, 32, 20, seed=0).items():
        asked = (exam.targets != IGNORE).nonzero()[:, 1]
        assert asked.min() >= (0 if factor == 1 else 16 * factor)
        assert 32 * factor - 4 <= asked.max() < 32 * factor
        assert len(asked) == len(exam.place) == len(exam.chance)
        whole = find_task(name)(TOP, 32 * factor, 20, np.random.default_rng([0, factor]))
        assert (exam.inputs == whole.inputs).all()
        assert (exam.targets[:, asked.min() :] == whole.targets[:, asked.min() :]).all()


def test_accuracy_counts_the_right_answers():
    def answer(inputs, asked):
        """That it is the first value of the pool, wherever it is asked."""
        return torch.full_like(inputs[asked], VALUES[0])

    sample = draw("parity")
    overall, by_depth = accuracy(answer, sample, 7)
    even = (sample.targets == VALUES[0]).double()
    assert overall == pytest.approx(even.mean().item())
    assert by_depth == pytest.approx(even.unflatten(1, (DEPTHS, -1)).mean((0, 2)).tolist())
    assert accuracy(answer, sample.beyond(32), 7)[1][:2] == [None, None]


SMALL = {"steps": 2, "seq_len": 16, "batch_size": 4, "val_every": 2}


def test_compare_on_a_task_alone(tmp_path, caplog):
    config = CompareConfig(task="addition-3", seeds=(0, 1), out=tmp_path / "compare", **SMALL)
    folder = compare(config)
    table, sisa, transformer = (folder / "table.md").read_text(), *config.presets
    lengths = " | ".join(f"accuracy at {x}" for x in ("1 to 16", "17 to 32", "33 to 64"))
    assert f"| model | {lengths} | first step with >= 95 % |" in table
    assert "| chance | 33.3 % | 33.3 % | 33.3 % | | |" in table
    assert table in caplog.text
    assert (folder / "compare.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((folder / "results.json").read_text())["val"]
    assert results[transformer][1] == read_rows(folder / f"{transformer}-seed1" / "val.jsonl")
    assert [row["step"] for row in results[transformer][1]] == [0, 2]
    for name in (sisa, transformer):
        line = next(line for line in table.splitlines() if line.startswith(f"| {name} |"))
        assert (
            f" | {50 * sum(run[-1]['addition-3_x4_accuracy'] for run in results[name]):.1f} % ("
            in line
        )
    with pytest.raises(ValueError, match="task must stay 'addition-3'"):
        compare(dataclasses.replace(config, task="recall", resume=True))


def test_a_task_alone_resumes_bit_for_bit_and_needs_no_text(tmp_path, monkeypatch):
    monkeypatch.setattr("sisa_model.training.batches.open_data", None)
    settings = {"task": "recall", "preset": "transformer-tiny", **SMALL}
    train(TrainConfig(out=tmp_path / "a", **settings))
    train(TrainConfig(out=tmp_path / "b", stop_at=1, **settings))
    assert train(TrainConfig(out=tmp_path / "b", resume=True)).finished
    logs = [
        [(row["step"], row["loss"]) for row in read_rows(tmp_path / name / "train.jsonl")]
        for name in "ab"
    ]
    assert logs[0] == logs[1]
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [
        "checkpoints",
        "final",
        "loss.png",
        "run.json",
        "run.toml",
        "train.jsonl",
        "val.jsonl",
    ]


def test_the_longest_exam_fits_the_model(tmp_path, monkeypatch):
    monkeypatch.setattr("sisa_model.training.batches.TASK_EXAM", 2)
    settings = {"steps": 1, "seq_len": 300, "batch_size": 1, "sample_tokens": 5}
    result = train(
        TrainConfig(task="parity", preset="transformer-tiny", out=tmp_path / "run", **settings)
    )
    assert {"parity_accuracy", "parity_x2_accuracy", "parity_x4_accuracy"} <= read_rows(
        result.folder / "val.jsonl"
    )[-1].keys()
    assert sm.load(result.folder / "final").config.max_seq_len == 1200, "the preset's is 1,024"
    assert not (result.folder / "sample.txt").exists(), "a task has no text"


def test_a_task_has_defaults_of_its_own():
    text, parity = resolve(CompareConfig()), resolve(CompareConfig(task="parity", steps=7))
    assert (text.steps, text.seq_len, text.batch_size) == (2500, 128, 8)
    assert (parity.steps, parity.seq_len, parity.batch_size) == (7, 64, 64)


def test_a_tiny_sisa_learns_the_flipflop(tmp_path):
    """Far above chance in 100 steps; `sisa compare --task flipflop` trains ten times as long."""
    settings = {"steps": 100, "seq_len": 32, "batch_size": 32, "val_every": 100}
    result = train(TrainConfig(task="flipflop", out=tmp_path / "run", **settings))
    rows = read_rows(result.folder / "val.jsonl")
    assert rows[0]["flipflop_accuracy"] < 0.6
    assert rows[-1]["flipflop_accuracy"] > 0.9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"task": "chess"},
            "task must be text, parity, addition, flipflop, recall, or addition-K with a modulus",
        ),
        ({"task": "addition-1"}, "got 'addition-1'"),
        ({"task": "addition-17"}, "got 'addition-17'"),
        ({"task": "parity-2"}, "got 'parity-2'"),
        ({"seq_len": 8}, "seq_len must be at least 16 for the task parity, got 8"),
        (
            {"tokenizer": Path("x.json")},
            "tokenizer must be left out with the task parity, which is trained without text, got",
        ),
        ({"data": (Path("text"),)}, "data must be left out with the task parity"),
    ],
)
def test_bad_tasks_are_named_before_anything_is_written(tmp_path, changes, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the message is checked below
        compare(CompareConfig(out=tmp_path / "compare", **{"task": "parity", **SMALL, **changes}))
    assert message in str(error.value)
    assert not (tmp_path / "compare").exists()
