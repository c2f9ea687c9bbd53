"""A run folder stands alone, has one writer, and says how it ended."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import sisa_model as sm
from sisa_model.cli import main
from sisa_model.data.text import END_OF_TEXT
from sisa_model.data.tokenizer import Encoder
from sisa_model.evaluation.subject import find_subject
from sisa_model.runs.config import TrainConfig
from sisa_model.runs.folder import read_run
from sisa_model.training import trainer as trainer_module
from sisa_model.training.trainer import train
from sisa_model.utils.lock import LOCK, only_writer

SETTINGS = {
    "steps": 4,
    "seq_len": 32,
    "batch_size": 2,
    "val_blocks": 2,
    "val_every": 2,
    "save_every": 2,
    "sample_tokens": 0,
    "device": "cpu",
}


def make_tokenizer(path, size):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, vocab_size=size
    )
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog"], trainer)
    tokenizer.save(str(path))
    return path


def test_a_second_process_on_a_prepared_folder_is_refused(text, tmp_path, capsys):
    (tmp_path / "data").mkdir()
    flags = ["--tokenizer", "bytes", "--held-out", "0.4", "--workers", "1"]
    text.write_text("<|endoftext|>\n".join(f"document {n}\n" for n in range(40)))
    with only_writer(tmp_path / "data"):
        assert main(["prepare", str(text), "--out", str(tmp_path / "data"), *flags]) == 1
        assert f"process {os.getpid()} on" in capsys.readouterr().err
    assert main(["prepare", str(text), "--out", str(tmp_path / "data"), *flags]) == 0


@pytest.fixture(scope="module")
def moved(tmp_path_factory):
    """A finished run at another place, its data and tokenizer gone."""
    folder = tmp_path_factory.mktemp("begun")
    data = folder / "text.txt"
    data.write_text("the quick brown fox jumps over the lazy dog; " * 200)
    tokenizer = make_tokenizer(folder / "bpe.json", 280)
    run = folder / "run"
    train(TrainConfig(out=run, data=(data,), tokenizer=tokenizer, **SETTINGS))
    there = tmp_path_factory.mktemp("moved") / "run"
    shutil.copytree(run, there)
    shutil.rmtree(folder)
    return there


def test_a_moved_run_is_sampled_inspected_and_evaluated_at_every_checkpoint(moved, capsys):
    flags = ["--device", "cpu"]
    assert main(["generate", str(moved), "--max-new-tokens", "3", *flags]) == 0
    assert main(["generate", str(moved / "final"), "--max-new-tokens", "3", *flags]) == 0
    capsys.readouterr()
    for weights in ([str(moved), "--checkpoint", "2"], [str(moved / "checkpoints/step-00000002")]):
        assert main(["generate", *weights, "--max-new-tokens", "9", *flags]) == 0
    once, again = capsys.readouterr().out.splitlines()
    assert once == again
    assert main(["inspect", str(moved), "--checkpoint", "2", *flags]) == 0
    assert "step-00000002: " in capsys.readouterr().out
    assert main(["inspect", str(moved), *flags]) == 0
    assert "held-out text of the run" in capsys.readouterr().out
    needles = ["--tasks", "needle", "--checkpoint", "all"]
    assert main(["eval", str(moved), *needles, *flags]) == 0
    steps = [json.loads(line)["step"] for line in (moved / "eval.jsonl").read_text().splitlines()]
    assert steps == [2, 4]
    assert main(["report", str(moved), "--out", str(moved.parent / "report")]) == 0


def test_its_tokenizer_is_its_own_and_known_by_its_bytes(moved, tmp_path):
    own = moved / "tokenizer.json"
    assert read_run(moved).train.tokenizer == own
    same = shutil.copy(own, tmp_path / "same.json")
    other = make_tokenizer(tmp_path / "other.json", 270)
    assert find_subject(moved, str(same)).encoder.size == 280
    assert find_subject(moved / "final", str(same)).encoder.size == 280
    for folder in (moved, moved / "final"):
        for wrong in (str(other), "bytes"):
            with pytest.raises(ValueError, match=r"tokenizer must be the one that .* holds"):
                find_subject(folder, wrong)
    broken = tmp_path / "broken"
    shutil.copytree(moved, broken)
    shutil.copy(other, broken / "tokenizer.json")
    with pytest.raises(ValueError, match=r"is not the tokenizer that the run in .* was trained"):
        read_run(broken)
    (broken / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match="has lost its tokenizer"):
        read_run(broken)


def test_a_tokenizer_of_another_size_is_refused_both_ways(moved, tmp_path):
    weights = tmp_path / "weights"
    weights.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(moved / "final" / name, weights)
    tokenizer = make_tokenizer(tmp_path / "more.json", 286)
    with pytest.raises(ValueError, match=r"has 286 tokens, the model .* 280"):
        find_subject(weights, str(tokenizer))
    sm.save(sm.build("sisa-tiny-ds16", vocab_size=512), tmp_path / "large")
    with pytest.raises(ValueError, match=r"bytes has 257 tokens, the model .* 512"):
        find_subject(tmp_path / "large", "bytes")
    sm.save(sm.build("sisa-tiny-ds16", vocab_size=384), tmp_path / "padded")
    assert find_subject(tmp_path / "padded", "bytes").encoder.size == 257
    with pytest.raises(ValueError, match=r"tokenizer must be given for .*, which holds none"):
        find_subject(weights)


def test_a_run_of_bytes_needs_no_tokenizer_either(text, tmp_path):
    run = tmp_path / "run"
    train(TrainConfig(out=run, data=(text,), **{**SETTINGS, "steps": 2}))
    assert not (run / "tokenizer.json").exists()
    ids = Encoder(None).encode_text("naïve")
    for folder, given in ((run, None), (run, "bytes"), (run / "final", None)):
        encoder = find_subject(folder, given).encoder
        assert encoder.encode_text("naïve") == ids
        assert (encoder.size, encoder.end_of_text) == (257, 256)
    find_subject(run / "final", "bytes")


def test_what_it_held_out_stays_with_it(text, tmp_path):
    run = tmp_path / "run"
    train(TrainConfig(out=run, data=(text,), **SETTINGS))
    blocks = np.load(run / "held-out.npy")
    assert blocks.shape == (2, 33)
    held_out = Encoder(None).decode(blocks[0].tolist())
    assert held_out in text.read_text()
    assert main(["inspect", str(run), "--length", "33"]) == 1
    assert main(["inspect", str(run), "--length", "8", "--blocks", "3"]) == 0
    found = json.loads((run / "inspect" / "inspect.json").read_text())
    assert (found["blocks"], found["length"]) == (3, 8)


def test_a_second_process_on_a_run_is_refused(text, tmp_path, capsys):
    run = tmp_path / "run"
    train(TrainConfig(out=run, data=(text,), stop_at=2, **SETTINGS))
    assert not (run / LOCK).exists()
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    with only_writer(run):
        assert main(["train", "--out", str(run), "--resume"]) == 1
    message = capsys.readouterr().err
    assert f"process {os.getpid()} on" in message
    assert str(run) in message
    after = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert before
    assert after == before
    assert main(["train", "--out", str(run), "--resume"]) == 0


def test_two_runs_begun_at_once_take_two_folders(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    meeting = threading.Barrier(2)
    really = trainer_module.begin_run

    def begin_run(*args):
        meeting.wait(120)  # both have chosen the same folder by now
        return really(*args)

    monkeypatch.setattr(trainer_module, "begin_run", begin_run)
    monkeypatch.setattr(trainer_module, "draw_figures", lambda *_: None)  # no two threads may draw
    folders = []
    settings = {**SETTINGS, "steps": 1}
    threads = [
        threading.Thread(
            target=lambda: folders.append(train(TrainConfig(data=(text,), **settings)).folder)
        )
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(folder.name for folder in folders) == ["sisa-tiny-ds16", "sisa-tiny-ds16-2"]
    for folder in folders:
        assert read_run(folder).train.out == folder


@pytest.mark.parametrize("name", ["SIGUSR1", pytest.param("SIGHUP", marks=pytest.mark.slow)])
def test_signals_save_and_the_command_says_that_it_is_not_done(text, tmp_path, name):
    run = tmp_path / "a run"
    flags = ["--data", str(text), "--steps", "100000", "--seq-len", "32", "--batch-size", "1"]
    command = [sys.executable, "-m", "sisa_model", "train", "--out", str(run), *flags]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(
            signal.SIGHUP, signal.SIG_DFL
        ),  # not nohup's, of the tests
    )
    for line in process.stdout:
        if line.startswith("step 1 of"):
            break
    process.send_signal(getattr(signal, name))
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 75
    assert list((run / "checkpoints").iterdir())
    resume = said.split("continue with: ")[1].splitlines()[0]
    assert shlex.split(resume) == ["sisa", "train", "--out", str(run), "--resume"]


def test_what_a_process_was_started_to_ignore_it_ignores(monkeypatch):
    from sisa_model.training.interrupt import Interrupt

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupt(main=False) as interrupt:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not interrupt.requested
            os.kill(os.getpid(), signal.SIGUSR1)
            assert interrupt.requested
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_finished_run_says_so_and_a_long_warm_up_is_said(text, tmp_path, capsys):
    run = tmp_path / "run"
    flags = ["--data", str(text), "--steps", "2", "--warmup-steps", "2", "--seq-len", "32"]
    flags += ["--batch-size", "2", "--val-blocks", "2", "--sample-tokens", "0"]
    assert main(["train", "--out", str(run), *flags]) == 0
    assert "the learning rate never reaches" in capsys.readouterr().err
    assert main(["train", "--out", str(run), "--resume"]) == 0
    assert "the run is finished: it has done its 2 steps" in capsys.readouterr().out
