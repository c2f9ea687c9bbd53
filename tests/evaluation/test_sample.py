"""sisa generate: text as it comes, in whole characters; prompts from everywhere; samples."""

import io
import subprocess
import sys

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import sisa_model as sm
from sisa_model.cli import main
from sisa_model.data.text import END_OF_TEXT
from sisa_model.data.tokenizer import Encoder
from sisa_model.evaluation import sample
from sisa_model.evaluation.sample import GenerateConfig, continue_prompt

TEXT = "naïve 你好 👩‍🚀 done\n"


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, vocab_size=270
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("weights") / "model"
    sm.save(sm.build("sisa-tiny-ds16", vocab_size=300), folder)
    return folder


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
@pytest.mark.parametrize("cut", [0, 1, 2])
def test_a_stream_gives_whole_characters_and_all_of_them(bpe, kind, cut):
    encoder = Encoder(bpe if kind == "bpe" else None)
    ids = [*encoder.encode_text(TEXT), encoder.end_of_text, *encoder.encode_text("你")]
    ids = ids[: len(ids) - cut]
    stream = encoder.stream()
    pieces = [stream.add(token) for token in ids]
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)
    assert "".join(pieces) + stream.rest() == encoder.decode(ids)
    assert sum(map(bool, pieces)) > 8  # as they come, not at the end
    assert "".join(pieces).startswith(TEXT)


def test_bytes_that_are_no_text_are_marked():
    encoder = Encoder(None)
    ids = [0xFF, 65, 0xE4, 256, 0xE4, 66]
    stream = encoder.stream()
    assert "".join(map(stream.add, ids)) + stream.rest() == encoder.decode(ids)


def scripted(monkeypatch, rows):
    """Let the model say ``rows`` of tokens, whatever it is asked, and keep what was asked."""
    asked = []

    def generate(model, input_ids, max_new_tokens, *args, stop, on_token, **kwargs):
        asked.append((input_ids.tolist(), max_new_tokens, set(stop)))
        for tokens in zip(*rows):
            on_token(torch.tensor(tokens))

    monkeypatch.setattr(sample, "generate", generate)
    return asked


def said(weights, **settings):
    pieces = []
    config = GenerateConfig(run=weights, tokenizer="bytes", device="cpu", **settings)
    continue_prompt(config, pieces.append)
    return pieces


def test_text_comes_as_it_is_chosen(weights, monkeypatch):
    asked = scripted(monkeypatch, ["né".encode()])
    assert said(weights, prompt="a") == ["a", "n", "", "é", "\n"]
    assert asked == [([[256, 97]], 200, {256})]


def test_it_stops_at_the_end_unless_told_otherwise(weights, monkeypatch):
    scripted(monkeypatch, [[97, 256, 98]])
    assert "".join(said(weights)) == "a\n"
    asked = scripted(monkeypatch, [[97, 256, 98]])
    assert "".join(said(weights, stop_at_end=False)) == f"a{END_OF_TEXT}b\n"
    assert asked[0][2] == set()


def test_several_samples_are_drawn_together(weights, monkeypatch):
    asked = scripted(monkeypatch, [[97, 256, 256], [98, 99, 0xE4]])
    text = "".join(said(weights, prompt="x", num_samples=2))
    assert text == ("--- sample 1 of 2\nxa\n--- sample 2 of 2\nxbc\N{REPLACEMENT CHARACTER}\n")
    assert asked[0][0] == [[256, 120]] * 2


def test_prompts_from_the_standard_input(weights, monkeypatch):
    asked = scripted(monkeypatch, [[33]])
    monkeypatch.setattr("sys.stdin", io.StringIO("two\nlines\n"))
    assert "".join(said(weights, prompt="-")) == "two\nlines!\n"
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n\ntwo"))
    assert "".join(said(weights, interactive=True)) == "one!\n!\ntwo!\n"
    assert [bytes(ids[0][1:]).decode() for ids, _, _ in asked] == ["two\nlines", "one", "", "two"]


def test_a_sample_is_a_function_of_its_seed(weights, capsys):
    flags = ["generate", str(weights), "--tokenizer", "bytes", "--max-new-tokens", "8"]
    texts = []
    for more in (["--seed", "1"], ["--seed", "1"], ["--seed", "2"], ["--num-samples", "2"]):
        assert main([*flags, *more, "--no-stop-at-end"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    assert "--- sample 2 of 2" in texts[3]


def test_bad_settings_are_named_before_the_model_is_read(weights, monkeypatch):
    monkeypatch.setattr(sample, "load", None)
    for settings, message in (
        ({"num_samples": 0}, "num_samples must be at least 1, got 0"),
        ({"interactive": True, "prompt": "x"}, "prompt must be left out with interactive"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            said(weights, **settings)


def test_a_closed_pipe_ends_a_command_quietly():
    command = [sys.executable, "-m", "sisa_model", "info"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.wait(120) == 141
    assert process.stderr.read() == b""
