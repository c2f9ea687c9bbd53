"""Training: resume bit for bit, faults that lose nothing, every setting alive, artifacts."""

import dataclasses
import itertools
import json
import math
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import sisa_kernels as sk
import sisa_model as sm
from sisa_model.cli import main
from sisa_model.data.corpus import open_data
from sisa_model.data.tokenizer import Encoder
from sisa_model.models.presets import preset_config
from sisa_model.runs.config import TrainConfig, resolve
from sisa_model.runs.folder import resumed
from sisa_model.runs.log import read_rows
from sisa_model.runs.weights import checkpoints
from sisa_model.training.optimizer import learning_rate, make_optimizer
from sisa_model.training.parallel import World
from sisa_model.training.trainer import run_device, train
from sisa_model.utils.files import make_folder_atomically, write_atomically
from sisa_model.utils.machine import find_device
from tests.support import ROOT

COMMAND = [
    sys.executable,
    "-c",
    "import sys; from sisa_model.cli import main; sys.exit(main(sys.argv[1:]))",
]


def config(corpus, out, **changes):
    defaults = {
        "steps": 6,
        "seq_len": 64,
        "batch_size": 4,
        "warmup_steps": 2,
        "val_every": 3,
        "val_blocks": 4,
        "sample_tokens": 0,
    }
    return TrainConfig(data=(corpus,), out=out, **{**defaults, **changes})


def weights(folder):
    return load_file(folder / "final" / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def losses(folder, name="train"):
    return [row["loss"] for row in read_rows(folder / f"{name}.jsonl")]


def test_forty_steps_are_twenty_and_resume_and_twenty(corpus, tmp_path):
    settings = {"steps": 40, "val_every": 15, "mix": ("needle", "recall")}
    straight = train(config(corpus, tmp_path / "a", **settings))
    stopped = train(config(corpus, tmp_path / "b", stop_at=20, **settings))
    assert (straight.finished, stopped.finished, stopped.steps) == (True, False, 20)
    assert not (tmp_path / "b" / "final").exists()
    resumed = train(TrainConfig(out=tmp_path / "b", resume=True))
    assert resumed.finished
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert losses(tmp_path / "a", "val") == losses(tmp_path / "b", "val")
    assert [row["step"] for row in read_rows(tmp_path / "b" / "train.jsonl")] == list(range(1, 41))


@pytest.mark.slow
@pytest.mark.skipif(
    sk.backends()["extension"] != "available",
    reason=f"the extension is {sk.backends()['extension']}",
)
def test_extension_and_plain_pytorch_train_alike(corpus, tmp_path):
    """Fifty steps with and without compiled kernels: every loss within 1e-4, relatively."""
    for name, extension in (("compiled", "1"), ("plain", "0")):
        flags = ["--data", str(corpus), "--out", str(tmp_path / name)]
        flags += ["--steps", "50", "--seq-len", "64", "--batch-size", "4"]
        environment = {**os.environ, "SISA_EXTENSION": extension}
        subprocess.run(
            [*COMMAND, "train", *flags, "--sample-tokens", "0"],
            cwd=ROOT,
            env=environment,
            check=True,
            capture_output=True,
        )
    compiled, plain = losses(tmp_path / "compiled"), losses(tmp_path / "plain")
    assert len(compiled) == 50
    assert compiled == pytest.approx(plain, rel=1e-4)
    assert compiled != plain, "the two runs took the same path"


def test_ctrl_c_saves_and_says_how_to_resume(corpus, tmp_path, caplog):
    arguments = ["--data", str(corpus), "--out", str(tmp_path / "run")]
    arguments += ["--steps", "2000", "--seq-len", "64", "--batch-size", "2"]
    process = subprocess.Popen(
        [*COMMAND, "train", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    log = tmp_path / "run" / "train.jsonl"
    deadline = time.time() + 120
    while len(read_rows(log)) < 3 and time.time() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 75, err
    done = len(read_rows(log))
    assert f"stopped after step {done:,} of 2,000; continue with: sisa train --out " in out
    assert f"{tmp_path / 'run'} --resume" in out
    resumed = train(TrainConfig(out=tmp_path / "run", resume=True, stop_at=done + 2))
    assert resumed.steps == done + 2
    told = f"resumed in {tmp_path / 'run'} after step {done:,} of 2,000, {128 * done:,} tokens"
    assert told in caplog.messages


def test_nothing_interrupts_the_last_save(corpus, tmp_path, monkeypatch):
    from sisa_model.training.checkpoints import Checkpointer

    real = Checkpointer.save

    def save(self, *args):
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
        real(self, *args)

    monkeypatch.setattr(Checkpointer, "save", save)
    before = signal.getsignal(signal.SIGINT)
    assert train(config(corpus, tmp_path / "run", steps=1)).finished
    assert signal.getsignal(signal.SIGINT) is before


def test_a_run_folder_holds_the_whole_record(corpus, tmp_path, caplog):
    result = train(config(corpus, tmp_path / "run", sample_tokens=20, mix=("needle",)))
    assert sorted(p.name for p in result.folder.iterdir()) == [
        "checkpoints",
        "final",
        "health.png",
        "held-out.npy",
        "loss.png",
        "run.json",
        "run.toml",
        "sample.txt",
        "train.jsonl",
        "val.jsonl",
    ]
    record = json.loads((result.folder / "run.json").read_text())
    assert record["train"]["lr"] == 3e-3
    assert record["model"] == dataclasses.asdict(sm.load(result.folder / "final").config)
    assert {"sisa", "commit", "torch", "python"} <= record["versions"].keys()
    assert "held out" in record["corpus"]["split"]
    row = read_rows(result.folder / "train.jsonl")[-1]
    assert {
        "step",
        "loss",
        "lr",
        "grad_norm",
        "tokens",
        "tokens_per_s",
        "mfu",
        "peak_memory_mib",
        "needle_loss",
    } <= row.keys()
    val = read_rows(result.folder / "val.jsonl")
    assert [row["step"] for row in val] == [0, 3, 6]
    assert {"lam", "half_life", "g_range", "clamped"} <= val[-1]["layers"][1].keys()
    assert val[-1]["needle_chance"] == 1 / 16
    assert [p.name for p in (result.folder / "checkpoints").iterdir()] == ["step-00000006"]
    assert (result.folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (
        f"held-out loss {result.val_loss:.3f} nats a token; a unigram model {result.unigram:.3f}"
        in caplog.text
    )


def test_it_learns(corpus, tmp_path):
    result = train(config(corpus, tmp_path / "run", steps=60, batch_size=8))
    assert result.val_loss < result.bigram < result.unigram < math.log(257)


def test_packed_documents_are_trained_apart(corpus, tmp_path):
    """A block is its documents one by one: the first packed loss from the documents alone."""
    for micro in (1, 4):
        assert train(
            config(
                corpus,
                tmp_path / f"run{micro}",
                documents="packed",
                micro_batch_size=micro,
                steps=2,
            )
        ).finished
    assert losses(tmp_path / "run1") == pytest.approx(losses(tmp_path / "run4"), rel=1e-5)
    torch.manual_seed(0)
    model, blocks = sm.build("sisa-tiny-ds16"), open_data((corpus,), (), Encoder(None), 64, 0).train
    total = 0.0
    for inputs, targets in zip(*blocks.take(blocks.ids(0, 4))):
        starts = [0, *((inputs[1:] == 256).nonzero()[:, 0] + 1).tolist(), 64]
        for a, b in itertools.pairwise(starts):
            total += F.cross_entropy(
                model(inputs[None, a:b])[0], targets[a:b], reduction="sum"
            ).item()
    assert losses(tmp_path / "run4")[0] == pytest.approx(total / 256, rel=1e-5)


CHANGES = {
    "preset": "sisa-tiny-ds32",
    "seed": 1,
    "steps": 5,
    "seq_len": 32,
    "batch_size": 2,
    "lr": 1e-3,
    "lambda_lr_scale": 1.0,
    "warmup_steps": 0,
    "weight_decay": 0.5,
    "beta1": 0.5,
    "beta2": 0.5,
    "clip": 0.01,
    "precision": "bf16",
    "recipe": "paper",
    "backend": "reference",
    "documents": "packed",
    "task": "flipflop",
    "mix": ("recall",),
    "model": {"n_layers": 1},
    "micro_batch_size": 1,
    "schedule": "constant",
}
# What changes no weight is tested by name elsewhere in this file or in test_data.py.
ELSEWHERE = {
    "data",
    "val_data",
    "tokenizer",
    "out",
    "mode",
    "val_every",
    "val_blocks",
    "save_every",
    "keep",
    "sample_tokens",
    "device",
    "stop_at",
    "resume",
    "text_field",  # tests/data/test_sources.py
    "format",
    "skip_bad",
    "init_from",  # tests/training/test_going_on.py
    "decay_steps",
    "skip_bad_batches",
    "keep_best",
    "activation_checkpointing",
    "log",
    "compile",
    "parallel",  # test_parallel.py
    "context_parallel",
    "tensor_parallel",
}


@pytest.fixture(scope="module")
def baseline(corpus, tmp_path_factory):
    return weights(train(config(corpus, tmp_path_factory.mktemp("baseline") / "run")).folder)


def test_every_hyperparameter_has_a_case():
    assert set(CHANGES) | ELSEWHERE == set(TrainConfig.__dataclass_fields__)


@pytest.mark.parametrize("field", CHANGES)
def test_changing_a_hyperparameter_changes_the_result(corpus, tmp_path, baseline, field):
    besides = {"data": ()} if field == "task" else {}
    if field == "recipe":  # by itself, without what it sets of other fields
        besides = {"precision": "fp32", "mode": "exact"}
    changed = weights(
        train(
            dataclasses.replace(
                config(corpus, tmp_path / "run", **{field: CHANGES[field]}), **besides
            )
        ).folder
    )
    assert not same(changed, baseline)
    if field in ("micro_batch_size", "backend"):  # the same sum in another order
        for name in baseline:
            torch.testing.assert_close(changed[name], baseline[name], rtol=0.02, atol=2e-3)


def test_validation_settings_are_alive(corpus, tmp_path):
    result = train(config(corpus, tmp_path / "run", val_every=2, val_blocks=1, save_every=2))
    assert [row["step"] for row in read_rows(result.folder / "val.jsonl")] == [0, 2, 4, 6]
    assert [path.name[-1] for path in checkpoints(result.folder)] == ["4", "6"]
    other = train(config(corpus, tmp_path / "other", val_every=2, val_blocks=4))
    assert losses(result.folder, "val") != losses(other.folder, "val")
    assert losses(result.folder) == losses(other.folder)


def test_lambda_has_a_tenth_of_the_rate_and_no_decay():
    model = sm.build("sisa-tiny-ds16")
    rest, lambdas = make_optimizer(model, resolve(TrainConfig())).param_groups
    assert [p.shape for p in lambdas["params"]] == [(2,), (2,)]
    assert (lambdas["weight_decay"], lambdas["lr_scale"]) == (0.0, 0.1)
    assert (rest["weight_decay"], rest["lr_scale"], rest["betas"]) == (0.1, 1.0, (0.9, 0.95))
    assert sum(len(group["params"]) for group in (rest, lambdas)) == len(list(model.parameters()))


@pytest.mark.parametrize(
    ("preset", "lr"),
    [("sisa-152m-ds16", 6e-4), ("transformer-50m", 6e-4), ("sisa-369m-ds32", 3e-4)],
)
def test_paper_presets_train_with_the_papers_settings(preset, lr):
    c = resolve(TrainConfig(preset=preset))
    assert (c.steps, c.batch_size * c.seq_len, c.seq_len) == (9536, 524_288, 2048)
    assert (c.lr, c.warmup_steps, c.lambda_lr_scale) == (lr, 500, 0.1)
    assert (c.beta1, c.beta2, c.weight_decay, c.clip) == (0.9, 0.95, 0.1, 1.0)
    assert (c.val_every, c.save_every) == (1000, 500)
    assert preset_config(preset).vocab_size == 50277


def test_learning_rate_warms_up_and_falls_to_zero():
    c = resolve(TrainConfig(steps=100, warmup_steps=10, lr=1.0))
    assert [learning_rate(step, c) for step in (0, 4, 9, 10)] == pytest.approx([0.1, 0.5, 1.0, 1.0])
    assert learning_rate(55, c) == pytest.approx(0.5)
    assert learning_rate(100, c) == pytest.approx(0.0, abs=1e-12)


def test_a_loss_that_is_not_finite_stops_before_the_step(corpus, tmp_path, monkeypatch):
    from sisa_model.models.language_model import LanguageModel

    real, calls = LanguageModel.hidden, []

    def hidden(self, *args, **kwargs):
        states = real(self, *args, **kwargs)
        if self.training:
            calls.append(None)
            if len(calls) == 4:
                return states * torch.nan
        return states

    train(config(corpus, tmp_path / "good", stop_at=3, save_every=3))
    monkeypatch.setattr(LanguageModel, "hidden", hidden)
    with pytest.raises(
        FloatingPointError,
        match=r"the loss must be finite, got nan .* at step 4, on blocks \[\d+, \d+, \d+, \d+\]",
    ) as stopped:
        train(config(corpus, tmp_path / "bad", save_every=3))
    assert len(losses(tmp_path / "bad")) == 3
    dumped = json.loads((tmp_path / "bad" / "bad-batch-00000004.json").read_text())
    assert (dumped["step"], dumped["seq_len"], math.isnan(dumped["losses"][0])) == (4, 64, True)
    assert f"blocks {dumped['blocks']} " in str(stopped.value)
    good, bad = (
        sm.load(tmp_path / name / "checkpoints" / "step-00000003").state_dict()
        for name in ("good", "bad")
    )
    assert same(good, bad)
    monkeypatch.undo()
    assert train(TrainConfig(out=tmp_path / "bad", resume=True)).finished


def test_a_full_disk_keeps_the_checkpoint_before(corpus, tmp_path, capsys):
    train(config(corpus, tmp_path / "run", stop_at=2))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # A write past this fails as one to a full disk does.
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        assert main(["train", "--out", str(tmp_path / "run"), "--resume"]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "sisa: error: [Errno 27] File too large" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"], (
        "no half-written folder is left"
    )
    assert train(TrainConfig(out=tmp_path / "run", resume=True)).finished


def test_damaged_checkpoints_are_named(corpus, tmp_path):
    train(config(corpus, tmp_path / "run", stop_at=2))
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000002"
    resume = TrainConfig(out=tmp_path / "run", resume=True)
    assert sorted(p.name for p in checkpoint.iterdir()) == [
        ".metadata",
        "__0_0.distcp",
        "config.json",
        "state.json",
    ]
    for path in checkpoint.iterdir():
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match=r"checkpoint .*step-00000002 is truncated or damaged"):
            train(resume)
        path.write_bytes(whole)
    assert train(resume).finished


def test_a_damaged_checkpoint_gives_way_to_the_one_before(corpus, tmp_path):
    straight = train(config(corpus, tmp_path / "a"))
    train(config(corpus, tmp_path / "b", save_every=1, stop_at=4))
    file = tmp_path / "b" / "checkpoints" / "step-00000004" / "__0_0.distcp"
    for stop_at in (4, None):  # the same step's may be damaged twice
        flipped = bytearray(file.read_bytes())
        flipped[len(flipped) // 2] ^= 1
        file.write_bytes(flipped)
        with pytest.warns(UserWarning, match="aside as damaged-step-00000004, and step-00000003"):
            resumed = train(TrainConfig(out=tmp_path / "b", resume=True, stop_at=stop_at))
    assert same(weights(straight.folder), weights(resumed.folder))
    assert [row["step"] for row in read_rows(tmp_path / "b" / "train.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert (tmp_path / "b" / "checkpoints" / "damaged-step-00000004").is_dir()


def test_a_checkpoint_of_another_model_is_named(corpus, tmp_path):
    for name, preset in (
        ("a", "sisa-tiny-ds16"),
        ("b", "sisa-tiny-ds32"),
        ("c", "transformer-tiny"),
    ):
        train(config(corpus, tmp_path / name, preset=preset, stop_at=1))
    for name in ("b", "c"):
        shutil.rmtree(tmp_path / "a" / "checkpoints")
        shutil.copytree(tmp_path / name / "checkpoints", tmp_path / "a" / "checkpoints")
        with pytest.raises(
            ValueError, match=r"checkpoint .* does not hold this model: (Size mismatch|Missing key)"
        ):
            train(TrainConfig(out=tmp_path / "a", resume=True))


class _Call:
    def __reduce__(self):
        return os.mkdir, ("owned",)


def test_a_checkpoint_runs_no_code(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(config(corpus, tmp_path / "run", stop_at=1))
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000001"
    (checkpoint / ".metadata").write_bytes(pickle.dumps(_Call()))
    with pytest.raises(
        ValueError, match=r"truncated or .*mkdir has no place in a checkpoint's index"
    ):
        sm.load(checkpoint)
    assert not (tmp_path / "owned").exists()


def test_keep_says_how_many_checkpoints_stay(corpus, tmp_path):
    run = tmp_path / "run"
    train(config(corpus, run, save_every=1, keep=3, stop_at=4))
    assert [path.name[-1] for path in checkpoints(run)] == ["2", "3", "4"]
    train(TrainConfig(out=run, resume=True, stop_at=5))
    assert [path.name[-1] for path in checkpoints(run)] == ["3", "4", "5"]
    train(TrainConfig(out=run, resume=True, keep=1))
    assert [path.name[-1] for path in checkpoints(run)] == ["6"]


def test_activation_checkpointing_runs_layers_twice_to_the_same_weights(
    corpus, tmp_path, baseline, monkeypatch
):
    from sisa_model.models.layers import Layer

    real, calls = Layer.forward, []

    def forward(self, *args):
        if self.training:
            calls.append(None)
        return real(self, *args)

    monkeypatch.setattr(Layer, "forward", forward)
    assert same(weights(train(config(corpus, tmp_path / "plain")).folder), baseline)
    once = len(calls)
    assert same(
        weights(train(config(corpus, tmp_path / "twice", activation_checkpointing=True)).folder),
        baseline,
    )
    assert (once, len(calls) - once) == (12, 24)


def test_clamped_mode_warns_once_and_logs_the_share(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("sisa_model.models.sisa.DECAY_BIAS_INIT", 2.0)
    with pytest.warns(
        UserWarning, match=r"mode 'clamped' clamps positions in layers \[0, 1\] at step 0"
    ) as caught:
        result = train(config(corpus, tmp_path / "run", mode="clamped"))
    assert len([w for w in caught if "clamps positions" in str(w.message)]) == 1
    assert read_rows(result.folder / "val.jsonl")[-1]["layers"][0]["clamped"] > 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"lr": -1.0}, "lr must be above 0 and finite, got -1.0"),
        ({"lr": math.inf}, "lr must be above 0 and finite, got inf"),
        ({"beta2": 1.0}, "beta2 must be in [0, 1), got 1.0"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0"),
        ({"precision": "fp8"}, "precision must be one of auto, fp32, bf16, bf16-pure, got 'fp8'"),
        ({"documents": "apart"}, "documents must be one of"),
        ({"backend": "triton", "mode": "clamped"}, "backend 'triton' cannot run here"),
        ({"mix": ("needle", "needle")}, "mix must be all different"),
        ({"keep": 0}, "keep must be at least 1, got 0"),
        ({"parallel": "tensor"}, "parallel must be one of"),
        ({"parallel": "fsdp"}, "parallel must be left at 'auto' in one process, got 'fsdp'"),
        ({"seed": 2**63}, "seed must be below 2 ** 63"),
        ({"mix": ("chess",)}, "mix must be among needle, recall"),
        ({"model": {"depth": 3}}, "model must hold fields among d_model"),
        ({"model": {"n_heads": 3}}, "n_heads must be"),
        ({"seq_len": 32, "mix": ("needle",)}, "seq_len must be at least 64 with retrieval tasks"),
        ({"preset": "gpt-5"}, "preset must be one of those that `sisa info` lists"),
        ({"device": "cuda:99"}, "device must be one this machine has, got 'cuda:99'"),
        ({"device": "abacus"}, "device must be one this machine has, got 'abacus'"),
        ({"seq_len": 10**6}, "the training corpus must hold at least one block of 1000001 tokens"),
        ({"mode": "fast"}, "mode must be one of exact, clamped"),
        (
            {"preset": "transformer-tiny", "mode": "clamped"},
            "mode must be left at 'exact' for a transformer",
        ),
    ],
)
def test_bad_settings_are_named_before_anything_is_written(corpus, tmp_path, changes, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the message is checked below
        train(config(corpus, tmp_path / "run", **changes))
    assert message in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("changes", [{"mode": "fast"}, {"backend": "fast"}])
def test_what_the_model_refuses_is_known_before_data_is_read(changes):
    with pytest.raises(ValueError, match=f"{next(iter(changes))} must be one of"):
        resolve(TrainConfig(**changes))


def test_a_gpu_that_is_asked_for_becomes_the_current_one(monkeypatch):
    current = []
    monkeypatch.setattr(torch, "empty", lambda *_, device: None)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert find_device("cuda:1") == torch.device("cuda:1")
    assert find_device("cpu") == torch.device("cpu")
    assert current == [torch.device("cuda:1")]


def test_several_processes_cannot_share_a_gpu_by_name():
    with pytest.raises(ValueError, match="device must be left without a number in 2 processes"):
        run_device(resolve(TrainConfig(device="cuda:1")), World(1, 2, 1))


def test_an_empty_folder_may_be_the_runs(corpus, tmp_path):
    (tmp_path / "run").mkdir()
    assert train(config(corpus, tmp_path / "run", steps=1)).finished


def test_a_finished_run_without_checkpoints_is_not_begun_again(corpus, tmp_path):
    folder = train(config(corpus, tmp_path / "run")).folder
    shutil.rmtree(folder / "checkpoints")
    rows = read_rows(folder / "train.jsonl")
    with pytest.raises(ValueError, match="is finished, and has no checkpoint"):
        train(TrainConfig(out=folder, resume=True))
    assert read_rows(folder / "train.jsonl") == rows


def test_a_resumed_run_may_find_its_data_elsewhere_and_take_other_micro_batches(
    corpus, tmp_path, baseline
):
    moved = shutil.copytree(corpus, tmp_path / "moved")
    train(config(moved, tmp_path / "run", stop_at=3))
    moved.rename(tmp_path / "here")
    (tmp_path / "run" / ".final.killed").mkdir()
    finished = train(TrainConfig(out=tmp_path / "run", resume=True, data=(tmp_path / "here",)))
    assert same(weights(finished.folder), baseline)
    assert not (tmp_path / "run" / ".final.killed").exists()
    assert (
        resumed(TrainConfig(out=tmp_path / "run", resume=True, micro_batch_size=3)).micro_batch_size
        == 3
    )


def test_an_existing_run_is_not_overwritten_nor_silently_changed(corpus, tmp_path):
    train(config(corpus, tmp_path / "run", stop_at=2, weight_decay=0.5))
    with pytest.raises(FileExistsError, match=r"out .*run exists"):
        train(config(corpus, tmp_path / "run"))
    with pytest.raises(ValueError, match=r"clip must stay 1.0, as the run in .* has it, got 0.1"):
        train(TrainConfig(out=tmp_path / "run", resume=True, clip=0.1))
    begun = TrainConfig(out=tmp_path / "run", resume=True, weight_decay=TrainConfig.weight_decay)
    assert resumed(begun).weight_decay == 0.5, "a flag at its default counts as left out"
    copy = shutil.copytree(corpus, tmp_path / "copy")
    train(config(copy, tmp_path / "other", stop_at=2))
    (copy / "0.txt").write_text("another text")
    with pytest.raises(ValueError, match=r"data must be what the run in .*other began with"):
        train(TrainConfig(out=tmp_path / "other", resume=True))
    with pytest.raises(FileNotFoundError, match="is not a run folder of sisa train"):
        train(TrainConfig(out=tmp_path / "none", resume=True))
    with pytest.raises(ValueError, match="resume needs out"):
        train(TrainConfig(resume=True))


def test_a_run_that_ended_before_its_first_checkpoint_resumes_at_its_start(corpus, tmp_path):
    straight = train(config(corpus, tmp_path / "a"))
    train(config(corpus, tmp_path / "b", stop_at=2))
    shutil.rmtree(tmp_path / "b" / "checkpoints")
    train(TrainConfig(out=tmp_path / "b", resume=True))
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert [row["step"] for row in read_rows(tmp_path / "b" / "val.jsonl")] == [0, 3, 6]
    assert straight.finished


def test_foreign_records_are_named(tmp_path):
    for text in ("{}", "{", json.dumps({"train": {"preset": "sisa-tiny-ds16"}})):
        (tmp_path / "run.json").write_text(text)
        with pytest.raises(
            ValueError, match=r"run.json is not the record of a run of this version"
        ):
            train(TrainConfig(out=tmp_path, resume=True))


def test_a_weight_that_is_not_finite_is_named_with_its_step(corpus, tmp_path):
    with pytest.raises(FloatingPointError, match=r"(at|after) step \d"):
        train(config(corpus, tmp_path / "run", lr=1e30, warmup_steps=0))
    assert not (tmp_path / "run" / "final").exists()


def test_short_runs_warm_up_for_a_tenth():
    assert resolve(TrainConfig(steps=50)).warmup_steps == 5
    assert resolve(TrainConfig(steps=50, warmup_steps=30)).warmup_steps == 30


def test_without_out_a_free_folder_is_taken(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, second = (train(config(corpus, None, steps=1)).folder for _ in range(2))
    assert (first, second) == (Path("runs/sisa-tiny-ds16"), Path("runs/sisa-tiny-ds16-2"))


def test_half_written_files_never_have_their_name(tmp_path):
    def fail(path):
        path = path / "x" if path.is_dir() else path
        path.write_text("half")
        raise OSError(28, "No space left on device")

    for make in (write_atomically, make_folder_atomically):
        with pytest.raises(OSError, match="No space left"):
            make(tmp_path / "thing", fail)
        assert list(tmp_path.iterdir()) == []
