"""Needles in a haystack: what is asked, what counts as right, depth and length, the picture."""

import json

import numpy as np
import pytest
import torch
from matplotlib import image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn

import sisa_model as sm
from sisa_model.cli import main
from sisa_model.data.text import END_OF_TEXT
from sisa_model.data.tokenizer import Encoder
from sisa_model.evaluation import needles
from sisa_model.evaluation.needles import Haystack, grid_lengths
from sisa_model.evaluation.niah import FILLER, PAIRS, SEEDS, NiahBuilder
from sisa_model.evaluation.scoring import Scorer
from sisa_model.runs.config import TrainConfig
from sisa_model.runs.log import read_rows
from sisa_model.training.trainer import train


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A byte-level BPE of the tests' own text, as GPT-NeoX's is one."""
    path = tmp_path_factory.mktemp("tokenizer") / "bpe.json"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        [FILLER * 9, *(f" {phrase} {value}." for phrase, value in PAIRS)] * 9, trainer
    )
    tokenizer.save(str(path))
    return path


@pytest.fixture(params=["bytes", "bpe"])
def encoder(request, words):
    return Encoder(words if request.param == "bpe" else None)


class Copier(nn.Module):
    """A stand-in that continues the longest run of tokens met before, as an induction head.

    ``blind``: of the last 9 only."""

    def __init__(self, encoder, blind=False):
        super().__init__()
        self.config = sm.build("transformer-tiny", vocab_size=encoder.size, max_seq_len=4096).config
        self.embed, self.blind = nn.Embedding.from_pretrained(torch.eye(encoder.size)), blind

    def hidden(self, input_ids):
        out = torch.zeros(*input_ids.shape, len(self.embed.weight))
        for row, ids in enumerate(input_ids.tolist()):
            for place in range(len(ids) - 8, len(ids)):  # where answers stand
                start = max(0, place - 8) if self.blind else 0
                before = range(start, place)

                def run(j, ids=ids, place=place):
                    return next((n for n in range(j + 1) if ids[j - n] != ids[place - n]), j + 1)

                best = max(before, key=run)
                out[row, place, ids[best + 1]] = 1
        return out


def share(encoder, trials, **kwargs):
    requests = [trial.request for trial in trials]
    return np.mean([score.greedy for score in Scorer(Copier(encoder, **kwargs), 1)(requests)])


def test_words_hide_anywhere(encoder):
    stack = Haystack(encoder)
    trials = stack.words(512, 42, 60)
    assert trials == Haystack(encoder).words(512, 42, 60)
    assert trials != stack.words(512, 123, 60)
    values = dict(PAIRS)
    depths, firsts = [], {}
    for (ids, start), length, depth, seed in trials:
        assert (start, length, seed) == (512, 512, 42)
        assert len(ids) == 513, "the first token of the value is scored"
        text = encoder.decode(ids[:512])
        phrase = next(phrase for phrase in values if text.count(phrase) == 2)
        assert text.count(f" {phrase} {values[phrase]}.") == 1
        assert text.rstrip(" ").endswith(phrase)
        assert values[phrase].startswith(encoder.decode(ids[512:]).strip())
        assert text.count("The quick brown fox jumps over the lazy dog") > 5
        firsts[phrase] = ids[512]
        depths.append(depth)
        place = text.index(phrase) / (len(text) - 45)
        assert place == pytest.approx(depth, abs=0.1)
    assert firsts.keys() == values.keys()
    assert len(set(firsts.values())) == 5, "the value's first token tells the needles apart"
    assert min(depths) < 0.1
    assert max(depths) > 0.85
    assert share(encoder, trials[:12]) == 1
    assert share(encoder, trials[:12], blind=True) == 0


def test_the_authors_needle_can_be_found(encoder):
    """In bytes it is the space before it, which says nothing."""
    builder = NiahBuilder(encoder)
    assert builder.chance == (0.2 if encoder.tokenizer else 1)
    trials = builder.trials(512, 42, 12)
    assert share(encoder, trials) == 1
    assert max(trial.depth for trial in trials) <= 0.5


def test_a_score_is_the_argmax_after_the_question():
    torch.manual_seed(0)
    model = sm.build("sisa-tiny-ds16").eval()
    requests = [trial.request for trial in Haystack(Encoder(None)).words(300, 42, 8)]
    with torch.no_grad():
        best = [model(torch.tensor([ids[:-1]]))[0, -1].argmax().item() for ids, _ in requests]
    requests += [
        request._replace(ids=[*request.ids[:-1], token]) for request, token in zip(requests, best)
    ]
    assert [score.greedy for score in Scorer(model, 2000)(requests)] == [False] * 8 + [True] * 8


@pytest.mark.parametrize("depth", needles.GRID_DEPTHS)
def test_the_grid_hides_five_digits_at_its_depth(encoder, depth):
    trials = Haystack(encoder).grid(700, depth, 42, 5)
    numbers = set()
    for (ids, start), *cell in trials:
        assert cell == [700, depth, 42]
        assert start == 700
        text, answer = encoder.decode(ids[:start]), encoder.decode(ids[start:])
        assert text.endswith(" The pass key is")
        assert len(answer) == 6
        assert 10_000 <= int(answer) < 100_000, "every digit is scored"
        assert text.count(f" The pass key is{answer}.") == 1
        place = encoder.encode_text(text[: text.index(" The pass key is")])
        assert len(place) / (700 - 24) == pytest.approx(depth, abs=0.08)
        numbers.add(answer)
    assert len(numbers) == 5
    assert share(encoder, trials[:2]) == 1
    assert share(encoder, trials[:2], blind=True) == 0


def test_grid_lengths_reach_twice_the_training_length():
    assert grid_lengths(2048) == [256, 512, 1024, 1536, 2048, 2560, 3072, 4096]


def test_a_length_without_room_is_named(encoder):
    with pytest.raises(
        ValueError, match=r"length must be above \d+ tokens, a needle and its question, got 8"
    ):
        Haystack(encoder).words(8, 42, 1)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    (folder / "text.txt").write_text(FILLER * 400)
    settings = {"steps": 2, "seq_len": 640, "batch_size": 1, "val_blocks": 1, "sample_tokens": 0}
    return train(TrainConfig(data=(folder / "text.txt",), out=folder / "run", **settings)).folder


def test_the_command_finds_needles_past_the_positions_and_draws(run, monkeypatch, capsys):
    monkeypatch.setattr(needles, "TRIALS", 2)
    monkeypatch.setattr(needles, "GRID_TRIALS", 1)
    monkeypatch.setattr(needles, "GRID_DEPTHS", (0.0, 0.5, 1.0))
    monkeypatch.setattr(needles, "LONG_LENGTHS", (256, 1100))
    tasks = "niah,niah_long,needle,needle_long,needle_grid"
    assert main(["eval", str(run), "--tasks", tasks]) == 0
    out = capsys.readouterr().out
    for task, needed in (("niah_long", 1090), ("needle_long", 1100), ("needle_grid", 1285)):
        assert (
            f"{task}: raises the model's 1024 positions (max_seq_len) to the {needed} it needs"
            in out
        )
    assert "niah: raises" not in out
    rows = {row["task"]: row for row in read_rows(run / "eval.jsonl")}
    assert {task: (row["step"], row["count"], row["protocol"]) for task, row in rows.items()} == {
        "niah": (2, 10, "paper"),
        "niah_long": (2, 20, "paper"),
        "needle": (2, 10, "ours"),
        "needle_long": (2, 20, "ours"),
        "needle_grid": (2, 8 * 3 * 5, "ours"),
    }
    assert (rows["niah"]["chance"], rows["needle"]["chance"]) == (1, 0.2), (
        "every byte value: a space"
    )
    assert list(rows["niah_long"]["by_length"]) == ["256", "1100"]
    assert list(rows["niah_long"]["by_seed"]) == sorted(map(str, SEEDS), key=int)
    assert rows["niah_long"]["tokens_by_length"] == {"256": [246, 246], "1100": [1090, 1090]}
    grid = rows["needle_grid"]
    assert grid["lengths"] == [80, 160, 320, 480, 640, 800, 960, 1280]
    assert grid["trials_a_cell"] == 5
    assert np.shape(grid["by_depth_and_length"]) == (3, 8)
    assert image.imread(run / "eval" / "step-00000002-needle_grid.png").ndim == 3
    for task in ("niah_long", "needle_long", "needle_grid"):
        for name, format in (("length", "at {:,} tokens"), ("depth", "at depth {}")):
            for key, count in rows[task][f"count_by_{name}"].items():
                title = format.format(float(key) if name == "depth" else int(key))
                (line,) = (x for x in out.splitlines() if x.startswith(task) and title in x)
                assert line.split()[-1] == str(count), "its trials, after its interval"


def test_the_grid_leaves_out_lengths_without_room(tmp_path, capsys):
    """Of the tiny run's 256 tokens an eighth is too short for a needle and its question."""
    torch.manual_seed(0)
    for length in (256, 16):
        sm.save(sm.build("transformer-tiny", max_seq_len=length), tmp_path / str(length))
    flags = ["--tokenizer", "bytes", "--tasks", "needle_grid", "--limit", "1"]
    assert main(["eval", str(tmp_path / "256"), *flags]) == 0
    assert (
        capsys.readouterr().out.count(
            "needle_grid: leaves out lengths of 32 tokens; a needle and its question take 40"
        )
        == 1
    )
    record = json.loads((tmp_path / "256" / "eval" / "needle_grid-limit1.json").read_text())[
        "figures"
    ][0]
    assert record["details"]["lengths"] == [64, 128, 192, 256, 320, 384, 512]
    assert record["count"] == 7 * 11 * 5
    assert main(["eval", str(tmp_path / "16"), *flags]) == 1
    assert (
        "needle_grid needs a model trained on 20 tokens or more, got 16" in capsys.readouterr().err
    )


def test_limit_takes_trials_a_seed(run):
    assert main(["eval", str(run), "--tasks", "niah", "--limit", "3"]) == 0
    record = json.loads((run / "eval" / "step-00000002-niah-limit3.json").read_text())
    assert record["figures"][0]["count"] == 15


def test_the_grid_is_put_together_by_depth_length_and_seed(run, monkeypatch):
    """A stand-in finds needles in the last half of texts to 640 tokens, for the first seed."""
    monkeypatch.setattr(needles, "GRID_DEPTHS", (0.0, 0.25, 0.75, 1.0))
    asked = []
    make = Haystack.grid

    def noted(self, length, depth, seed, trials):
        asked.extend([length <= 640 and depth > 0.5 and seed == 42] * trials)
        return make(self, length, depth, seed, trials)

    class Found(Scorer):
        def __call__(self, requests, name="requests"):
            return [type("Found", (), {"greedy": right}) for right in asked]

    monkeypatch.setattr(Haystack, "grid", noted)
    monkeypatch.setattr("sisa_model.evaluation.evaluate.Scorer", Found)
    assert main(["eval", str(run), "--tasks", "needle_grid", "--limit", "2"]) == 0
    record = json.loads((run / "eval" / "step-00000002-needle_grid-limit2.json").read_text())[
        "figures"
    ][0]
    expected = np.outer([0, 0, 1, 1], [1, 1, 1, 1, 1, 0, 0, 0]) / 5
    assert np.array(record["details"]["by_depth_and_length"]) == pytest.approx(expected)
    assert record["details"]["by_seed"] == pytest.approx(
        {"42": 10 / 32, "123": 0, "456": 0, "789": 0, "1024": 0}
    )
    assert record["details"]["by_length"] == pytest.approx(
        dict(zip(map(str, record["details"]["lengths"]), expected.mean(0)))
    )
    assert record["details"]["by_depth"] == pytest.approx(
        dict(zip(map(str, record["details"]["depths"]), expected.mean(1)))
    )
