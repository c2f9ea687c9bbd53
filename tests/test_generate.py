"""Generation and the command line around it."""

import shutil

import pytest
import torch

import sisa_model as sm
from sisa_model.cli import main
from sisa_model.generate import filter_logits
from sisa_model.train import TrainConfig, train


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return sm.build("sisa-tiny-ds16", max_seq_len=32)


def prompt():
    return torch.randint(256, (2, 7), generator=torch.Generator().manual_seed(0))


def test_greedy_is_the_argmax_of_the_whole_sequence(model):
    out = sm.generate(model, prompt(), 5)
    assert out.shape == (2, 12)
    assert torch.equal(out[:, :7], prompt())
    assert torch.equal(out[:, 7:], model(out[:, :-1]).argmax(-1)[:, 6:])


def test_sampling_is_seeded_and_narrowed(model):
    def sample(seed, **kwargs):
        return sm.generate(model, prompt(), 20, 1.0, generator=torch.Generator().manual_seed(seed), **kwargs)

    assert torch.equal(sample(0), sample(0))
    assert not torch.equal(sample(0), sample(1))
    greedy = sm.generate(model, prompt(), 20)
    assert torch.equal(sample(0, top_k=1), greedy)
    assert torch.equal(sample(0, top_p=1e-6), greedy)
    cold = sm.generate(model, prompt(), 20, 1e-40, generator=torch.Generator().manual_seed(0))
    assert torch.equal(cold, greedy)


def test_filter_keeps_the_smallest_set_that_reaches_top_p():
    logits = torch.tensor([[0.5, 0.05, 0.3, 0.15]]).log()
    kept = [filter_logits(logits, None, p).isfinite().tolist()[0] for p in (0.4, 0.5, 0.75, 0.95, 1.0)]
    assert kept == [
        [True, False, False, False],
        [True, False, False, False],
        [True, False, True, False],
        [True, False, True, True],
        [True, True, True, True],
    ]
    assert filter_logits(logits, 2, 1.0).isfinite().tolist() == [[True, False, True, False]]
    assert torch.equal(filter_logits(logits, 99, 1.0), logits)


def test_a_window_of_max_seq_len_slides(model):
    out = sm.generate(model, prompt(), 40)
    assert torch.equal(out[:, -1], model(out[:, -33:-1]).argmax(-1)[:, -1])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"temperature": -1.0}, "temperature must be at least 0 and finite, got -1.0"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"top_p": 1.5}, r"top_p must be in \(0, 1\], got 1.5"),
    ],
)
def test_bad_sampling_settings_are_named(model, kwargs, message):
    with pytest.raises(ValueError, match=message):
        sm.generate(model, prompt(), **{"max_new_tokens": 3, **kwargs})


def test_command_line_continues_a_prompt_of_a_run(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("all work and no play " * 200)
    run = train(
        TrainConfig(data=(tmp_path / "text.txt",), out=tmp_path / "run", steps=3, seq_len=32, batch_size=2, sample_tokens=0)
    )
    capsys.readouterr()
    flags = ["--prompt", "all work", "--max-new-tokens", "9", "--seed", "3", "--top-k", "20", "--top-p", "0.9"]
    assert main(["generate", str(run.folder), *flags]) == 0
    first = capsys.readouterr().out
    assert first.startswith("all work")
    assert main(["generate", str(run.folder), *flags]) == 0
    assert capsys.readouterr().out == first
    shutil.move(run.folder / "final", tmp_path / "elsewhere")
    assert main(["generate", str(run.folder), *flags]) == 0
    assert capsys.readouterr().out == first, "the newest checkpoint serves as well"
    shutil.rmtree(run.folder / "checkpoints")
    assert main(["generate", str(run.folder)]) == 1
    assert "holds no final weights and no checkpoint" in capsys.readouterr().err
    assert main(["generate", str(tmp_path)]) == 1
    assert "is not a run folder of sisa train" in capsys.readouterr().err
    assert main(["generate", str(run.folder), "--top-p", "0"]) == 1
    assert "top_p must be in (0, 1], got 0.0" in capsys.readouterr().err
