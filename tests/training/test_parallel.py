"""Two processes over gloo: one process's losses, resharded checkpoints, faults of one."""

import copy
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

import sisa_model as sm
from sisa_model.models.layers import Layer
from sisa_model.models.mamba import MambaBlock
from sisa_model.runs.config import TrainConfig
from sisa_model.runs.log import read_rows
from sisa_model.training.loss import Objective
from sisa_model.training.parallel import replicated, shard
from sisa_model.training.trainer import train
from tests.support import ROOT
from tests.support.runs import BAND, rows_agree, weights_agree

# The number of answers differs between processes and micro-batches, and 33 is a multiple of
# neither.
RECALL = {"mix": ("recall",), "batch_size": 33, "micro_batch_size": 16}
# Numbers that round to bf16 the other way: measured at 1.4e-4 in the fourth step.
BAND_BF16 = 2e-3


@pytest.fixture(autouse=True)
def one_thread(two_threads):
    torch.set_num_threads(1)  # as torchrun's workers have


def settings(corpus, out, **changes):
    defaults = {
        "steps": 4,
        "seq_len": 64,
        "batch_size": 4,
        "micro_batch_size": 2,
        "warmup_steps": 2,
        "val_every": 4,
        "val_blocks": 5,
    }
    return {"data": (corpus,), "out": out, "sample_tokens": 0, **defaults, **changes}


def torchrun(processes, *arguments, **kwargs):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(processes),
        *arguments,
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        **kwargs,
    )


def train_each(processes, folder, *runs):
    """Train ``runs``, fields of TrainConfig, one after the other in one launch."""
    (folder / "runs.json").write_text(json.dumps(runs, default=str))
    process = torchrun(processes, "tests/training/torchrun_worker.py", str(folder / "runs.json"))
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    return out


def test_two_processes_train_as_one_does(corpus, tmp_path):
    many = [
        settings(corpus, tmp_path / "ddp", parallel="auto", **RECALL),
        settings(corpus, tmp_path / "fsdp", parallel="fsdp", **RECALL),
        settings(corpus, tmp_path / "stopped", parallel="fsdp", stop_at=2, **RECALL),
        settings(
            corpus,
            tmp_path / "bf16",
            parallel="fsdp",
            precision="bf16",
            activation_checkpointing=True,
        ),
        settings(corpus, tmp_path / "pure", precision="bf16-pure"),
    ]
    out = train_each(2, tmp_path, *many)
    assert "parameters on cpu and 1 more (ddp)" in out
    assert "parameters on cpu and 1 more (fsdp)" in out
    assert out.count("held-out loss") == 4, "one process prints"
    one = train(TrainConfig(**settings(corpus, tmp_path / "one", **RECALL))).folder
    assert train(
        TrainConfig(out=tmp_path / "stopped", resume=True)
    ).finished  # what two saved in shares, one process loads whole
    for name in ("ddp", "fsdp", "stopped"):
        rows_agree(one, tmp_path / name, BAND)
        weights_agree(one, tmp_path / name)
    one = train(TrainConfig(**settings(corpus, tmp_path / "one-bf16", precision="bf16"))).folder
    rows_agree(one, tmp_path / "bf16", BAND_BF16)
    one = train(TrainConfig(**settings(corpus, tmp_path / "one-pure", precision="bf16-pure")))
    first, second = (read_rows(run / "train.jsonl") for run in (one.folder, tmp_path / "pure"))
    assert [row["loss"] for row in second] == pytest.approx(
        [row["loss"] for row in first], rel=BAND_BF16
    )
    raw = load_file(tmp_path / "bf16" / "final" / "model.safetensors")[
        "layers.0.attn.lambda_raw"
    ].tolist()
    lam = read_rows(tmp_path / "bf16" / "val.jsonl")[-1]["layers"][0]["lam"]
    assert lam == pytest.approx([math.log1p(math.exp(x)) for x in raw], rel=1e-6), (
        "lambda is not computed from fp32"
    )


@pytest.fixture
def one_of_gloo():
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "preset", ["sisa-tiny-ds16", "transformer-tiny", "fox-tiny", "mamba2-tiny", "mamba3-tiny"]
)
def test_fsdp_computes_in_the_dtypes_of_one_process(one_of_gloo, preset):
    """Under bf16 autocast: fp32 residual stream and norms, the same bits in loss and gradients."""
    autocast = torch.autocast("cpu", torch.bfloat16)
    model = sm.build(preset)
    whole = Objective(copy.deepcopy(model), autocast)
    kept = replicated(model)
    shard(model, init_device_mesh("cpu", (1,)), kept, bf16=True)
    inputs, targets = torch.randint(257, (2, 2, 65))
    dtypes, gathered = set(), set()

    def see(norm, args, y):
        dtypes.update((args[0].dtype, norm.weight.dtype, y.dtype))
        linears = [m for m in model.layers.modules() if isinstance(m, nn.Linear)]
        gathered.update(m.weight.dtype for m in linears if not isinstance(m.weight, DTensor))

    for module in model.modules():
        if isinstance(module, nn.RMSNorm):
            module.register_forward_hook(see)
        if isinstance(module, (nn.Embedding, Layer, MambaBlock)):
            module.register_forward_hook(lambda _, args, y: dtypes.add(y.dtype))
    losses = [objective(inputs, targets) for objective in (Objective(model, autocast), whole)]
    for loss in losses:
        loss.backward()
    assert dtypes == {torch.float32}
    assert gathered == {torch.bfloat16}
    assert losses[0].item() == losses[1].item()
    for (name, shared), alone in zip(model.named_parameters(), whole.model.parameters()):
        assert isinstance(shared, DTensor) is all(shared is not p for p in kept), name
        grad = shared.grad.full_tensor() if isinstance(shared, DTensor) else shared.grad
        assert torch.equal(grad, alone.grad), name


def workers(process):
    """The process ids of torchrun's workers by rank."""
    found = {}
    for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        fields = dict(
            x.split("=", 1)
            for x in Path(f"/proc/{pid}/environ").read_text().split("\0")
            if "=" in x
        )
        if "RANK" in fields:
            found[int(fields["RANK"])] = int(pid)
    return found


def await_rows(process, log, count):
    deadline = time.time() + 180
    while len(read_rows(log)) < count:
        assert process.poll() is None, process.communicate()[0]
        assert time.time() < deadline
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the workers in /proc")
def test_sigterm_to_one_process_stops_all_and_a_kill_ends_the_job(corpus, tmp_path):
    run, log = tmp_path / "run", tmp_path / "run" / "train.jsonl"
    flags = ["--data", corpus, "--out", run]
    flags += ["--steps", "100000", "--seq-len", "32", "--batch-size", "2", "--val-every", "1000000"]
    command = ["-m", "sisa_model", "train"]

    process = torchrun(2, *command, *map(str, flags))
    await_rows(process, log, 3)
    os.kill(workers(process)[1], signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 1, out  # torchrun's own, for processes that ended with 75
    assert "exitcode  : 75" in out
    done = len(read_rows(log))
    assert f"stopped after step {done:,} of 100,000" in out
    assert [p.name for p in (run / "checkpoints").iterdir()][-1:] == [f"step-{done:08d}"]

    process = torchrun(2, *command, "--out", str(run), "--resume")
    await_rows(process, log, done + 3)
    os.kill(workers(process)[1], signal.SIGKILL)
    started = time.time()
    out, _ = process.communicate(timeout=120)
    assert process.returncode != 0, out
    assert time.time() - started < 60, "the job hung"


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(
            ["compare", "--presets", "sisa-tiny-ds16", "transformer-tiny"], marks=pytest.mark.slow
        ),
        pytest.param(
            ["study", "--only", "sisa-tiny-ds16", "transformer-tiny"], marks=pytest.mark.slow
        ),
    ],
)
def test_several_runs_follow_each_other_in_one_launch(corpus, tmp_path, command):
    """A batch of one leaves the second process without a share; all is said once."""
    flags = ["--data", corpus, "--out", tmp_path / "all"]
    flags += ["--steps", "2", "--seq-len", "64", "--batch-size", "1", "--val-every", "2"]
    process = torchrun(2, "-m", "sisa_model", *command, *map(str, flags))
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    runs = [path.parent for path in (tmp_path / "all").glob("*/final")]
    assert len(runs) == 2
    assert all(len(read_rows(run / "train.jsonl")) == 2 for run in runs)
    assert out.count("| chance |" if command[0] == "compare" else "state ") == 1, out


@pytest.mark.slow
def test_what_two_saved_four_resume(corpus, tmp_path):
    for kind in ("ddp", "fsdp"):
        train_each(
            2, tmp_path, settings(corpus, tmp_path / kind, parallel=kind, stop_at=2, **RECALL)
        )
        resumed = settings(corpus, tmp_path / kind, parallel="fsdp", resume=True, **RECALL)
        train_each(4, tmp_path, resumed)
    one = train(TrainConfig(**settings(corpus, tmp_path / "one", **RECALL))).folder
    for kind in ("ddp", "fsdp"):
        rows_agree(one, tmp_path / kind, BAND)
        weights_agree(one, tmp_path / kind)


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["sisa-tiny-ds16", "transformer-tiny"])
def test_compiled_layers_train_alike(corpus, tmp_path, preset):
    plain = train(TrainConfig(**settings(corpus, tmp_path / "plain", preset=preset))).folder
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = train(
        TrainConfig(**settings(corpus, tmp_path / "compiled", preset=preset, compile=True))
    ).folder
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0, "nothing was compiled"
    assert not torch._dynamo.utils.counters["graph_break"]
    rows_agree(plain, compiled, BAND)


@pytest.mark.slow
def test_twenty_kills_change_nothing():
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "tools/kill_test.py"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "after 20 kills: weights the same, every step logged once" in done.stdout
