"""Gradients, validation and checkpoints of four processes in grids of dp x cp x tp: one's own."""

import contextlib
import dataclasses
import os
import shutil
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import sisa_model as sm
from sisa_model.models.linear import TENSOR
from sisa_model.runs.config import TrainConfig
from sisa_model.training import loss as loss_module
from sisa_model.training.batches import Splitter
from sisa_model.training.loss import Objective, linear_cross_entropy
from sisa_model.training.parallel import Parallel, World, gathered
from sisa_model.training.trainer import train
from tests.support.ranks import spawned
from tests.support.runs import BAND, rows_agree, weights_agree

EOS = 0
# Sums of fp32 in another order: measured at 8e-6 at most, of a gradient that is a small rest of
# large terms (decay_bias). A term that is missing or counted twice shows as 0.1 and more.
GRADIENTS = 5e-5


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, and how four processes share it."""

    context: int
    tensor: int
    kind: str = "ddp"
    preset: str = "sisa-tiny-ds16"
    packed: bool = False
    checkpointing: bool = False
    model: tuple[tuple[str, Any], ...] = ()

    def __str__(self):
        grid = f"{self.preset}-dp{4 // self.context // self.tensor}"
        return f"{grid}-cp{self.context}-tp{self.tensor}-{self.kind}"


CASES = [
    Case(4, 1, packed=True),
    Case(2, 1, "fsdp", packed=True, checkpointing=True),
    Case(2, 1, "ddp"),
    Case(2, 2, "ddp", packed=True, model=(("n_heads", 4), ("n_kv_heads", 2))),
    Case(2, 2, "fsdp", "fox-tiny"),
    Case(2, 1, "fsdp", "transformer-tiny", packed=True),
    # Widths that no number of processes divides: of the SwiGLU, and 257 words.
    Case(1, 2, "fsdp", model=(("d_ff", 101), ("lam", "shared")), packed=True),
    Case(1, 4, "ddp", model=(("n_heads", 8), ("n_kv_heads", 4)), checkpointing=True),
    Case(1, 2, "fsdp", "alibi-tiny"),
    Case(4, 1, "ddp", "mamba2-tiny", packed=True),
    Case(2, 1, "fsdp", "mamba3-tiny", packed=True, checkpointing=True),
]


def gradients(case, world, kind):
    """Loss, gradient norm, gradients, accuracy and health of a step of ``world``."""
    torch.manual_seed(0)
    model = sm.build(case.preset, **dict(case.model))
    with torch.no_grad():
        for parameter in model.parameters():  # norms and lambdas that differ, too
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.checkpoint_layers = case.checkpointing
    inputs, targets = torch.randint(1, 257, (2, 3, 61))
    inputs[:, 20] = EOS
    targets[0, 5:40] = -100
    parallel = Parallel(Objective(model, contextlib.nullcontext()), world, kind, bf16=False)
    splitter = Splitter(world, torch.device("cpu"), 1, EOS, case.packed)
    answers = int((targets != -100).sum())
    pieces = list(splitter.pieces(*splitter.share(inputs, targets), text=True))
    losses = [parallel.backward(p, 1 / answers, p is pieces[-1]) for p in pieces]
    (loss,) = world.sum([sum(losses) / answers], alike=world.tensor)
    norm = parallel.clip(1e9).item()
    found = {name: gathered(p.grad) for name, p in parallel.parameters.items()}
    said = parallel.answers(inputs, targets != -100)
    return loss, norm, found, said, [dataclasses.asdict(x) for x in parallel.health(inputs)]


def train_here(rank, group, fields):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(group.size())}
    train(TrainConfig(**fields))


def of_rank(rank, group, case):
    return gradients(case, World(rank, 4).arranged(case.context, case.tensor), case.kind)


@pytest.fixture(scope="module")
def four():
    with spawned(4) as ranks:
        yield ranks


@pytest.mark.parametrize("case", CASES, ids=str)
def test_four_processes_have_the_gradients_of_one(four, case):
    loss, norm, grads, said, layers = gradients(case, World(), "auto")
    for many in four.run(of_rank, case):
        assert many[0] == pytest.approx(loss, rel=1e-6)
        assert many[1] == pytest.approx(norm, rel=1e-6)
        for name, grad in grads.items():
            assert (many[2][name] - grad).norm() < GRADIENTS * grad.norm(), name
        assert torch.equal(many[3], said)
        for layer, own in zip(many[4], layers, strict=True):
            for name, values in own.items():
                assert layer[name] == pytest.approx(values, rel=1e-4), name


def settings(corpus, out, **changes):
    fields = {"steps": 4, "seq_len": 65, "batch_size": 5, "micro_batch_size": 2, "warmup_steps": 2}
    fields |= {"val_every": 4, "val_blocks": 3, "sample_tokens": 0}
    return {"data": (corpus,), "out": out, **fields, **changes}


@pytest.mark.slow
def test_a_run_goes_on_in_any_grid(four, corpus, tmp_path):
    """Resumed as it began it does the same to the bit, otherwise to rounding."""
    one = train(TrainConfig(**settings(corpus, tmp_path / "one"))).folder
    grid = {"context_parallel": 2, "tensor_parallel": 2}
    four.run(train_here, settings(corpus, tmp_path / "straight", **grid))
    four.run(train_here, settings(corpus, tmp_path / "stopped", stop_at=2, **grid))
    moved = tmp_path / "moved"
    shutil.copytree(tmp_path / "stopped", moved)
    four.run(train_here, {"out": tmp_path / "stopped", "resume": True, **grid})
    sharded = {"out": moved, "resume": True, "parallel": "fsdp"}
    four.run(train_here, {**sharded, "tensor_parallel": 2, "stop_at": 3})
    four.run(train_here, {**sharded, "context_parallel": 2, "stop_at": 4})
    for folder in (tmp_path / "straight", moved):
        rows_agree(one, folder, BAND)
        weights_agree(one, folder)
    first, second = (
        load_file(tmp_path / name / "final" / "model.safetensors")
        for name in ("straight", "stopped")
    )
    assert all(torch.equal(second[name], x) for name, x in first.items())
    assert sm.generate(sm.load(moved / "final"), torch.zeros(1, 1).long(), 3).shape == (1, 4)


def sharded_loss(rank, group, hidden, weight, targets, fused):
    loss_module._runs_fused = lambda logits, parts=False: fused
    mesh = init_device_mesh("cpu", (group.size(),), mesh_dim_names=(TENSOR,))
    hidden.requires_grad_()
    split = distribute_tensor(weight, mesh, [Shard(0)]).requires_grad_()
    loss = linear_cross_entropy(hidden, split, targets)
    (3 * loss).backward()
    dist.all_reduce(hidden.grad)
    return loss.item(), hidden.grad, split.grad.full_tensor()


@pytest.mark.parametrize(("words", "fused"), [(257, False), (10, False), (257, True)])
def test_the_loss_over_split_words_is_that_over_all(four, words, fused):
    """Also of logits of hundreds, whose highest are in one process, and without any target.

    ``fused``: by Triton's kernels, interpreted."""
    if fused:
        pytest.importorskip("triton")
    torch.manual_seed(0)
    hidden = torch.randn(40, 16)
    weight = torch.randn(words, 16).index_add_(0, torch.tensor([3]), torch.full((1, 16), 30.0))
    targets = torch.randint(words, (40,))
    targets[::7] = -100
    for y in (targets, torch.full_like(targets, -100)):
        h, w = (x.double().requires_grad_() for x in (hidden, weight))
        expected = F.cross_entropy(h @ w.T, y, reduction="sum")
        (3 * expected).backward()
        for loss, dhidden, dweight in four.run(sharded_loss, hidden, weight, y, fused):
            assert loss == pytest.approx(expected.item(), rel=1e-6)
            torch.testing.assert_close(dhidden, h.grad.float(), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(dweight, w.grad.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tensor_parallel": 3}, "tensor_parallel must be 1, or what divides the model"),
        ({"tensor_parallel": 0}, "tensor_parallel must be at least 1, got 0"),
        ({"context_parallel": 0}, "context_parallel must be at least 1, got 0"),
        ({"tensor_parallel": 2, "preset": "mamba2-tiny"}, "in_proj is one matrix"),
        ({"tensor_parallel": 2, "preset": "hybrid-sisa-152m"}, "in_proj is one matrix"),
        ({"tensor_parallel": 2, "model": {"d_ff": 1}}, "d_ff = 1 leaves a process without a part"),
        ({"tensor_parallel": 2, "compile": True}, "compile must be left out with tensor_parallel"),
        ({"context_parallel": 2, "mode": "clamped"}, "mode 'clamped' depends on the whole"),
        ({"context_parallel": 4, "seq_len": 7}, "seq_len must be at least 8"),
        (
            {"context_parallel": 2, "tensor_parallel": 2},
            "context_parallel = 2 times tensor_parallel = 2 must divide the number of processes, "
            "got 1; launch several with torchrun",
        ),
    ],
)
def test_what_cannot_be_shared_is_refused_before_any_work(tmp_path, fields, message):
    config = TrainConfig(out=tmp_path / "run", **fields)
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the message is checked below
        train(config)
    assert message in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_sixteen_thousand_tokens_over_four_processes_train_as_in_one(four, tmp_path):
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "forgets"]
    picked = torch.randint(len(words), (90_000,), generator=torch.Generator().manual_seed(0))
    text = tmp_path / "text.txt"
    text.write_text(" ".join(words[n] for n in picked))
    fields = {"seq_len": 16384, "batch_size": 1, "micro_batch_size": 1, "steps": 2}
    one = train(TrainConfig(**settings(text, tmp_path / "one", **fields))).folder
    for context, tensor in ((4, 1), (2, 2)):
        out = tmp_path / f"cp{context}-tp{tensor}"
        split = {"context_parallel": context, "tensor_parallel": tensor}
        four.run(train_here, settings(text, out, **fields, **split))
        rows_agree(one, out, BAND)
        weights_agree(one, out)


def resident(key):
    """MiB of VmRSS, this process's memory, or VmHWM, its peak."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith(key))


def peak_of_step(rank, group, length, layers):
    """MiB that forward and backward of ``length`` tokens take above what was there before."""
    model = sm.build("sisa-152m-ds16", n_layers=layers, vocab_size=257, max_seq_len=length)
    world = World(rank, group.size()).arranged(group.size(), 1)
    parallel = Parallel(Objective(model, contextlib.nullcontext()), world, "ddp", bf16=False)
    splitter = Splitter(world, torch.device("cpu"), 1, EOS, packed=False)
    for tokens in (256, length):  # the first makes gradients and what is made once
        before = resident("VmRSS")
        with open("/proc/self/clear_refs", "w") as peak:
            peak.write("5")
        inputs, targets = torch.randint(257, (2, 1, tokens))
        (piece,) = splitter.pieces(inputs, targets, text=True)
        parallel.backward(piece, 1 / tokens, last=True)
    return resident("VmHWM") - before


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="asks Linux")
def test_memory_of_a_step_falls_with_the_processes():
    """Layers of the 152M model; -s shows the table of docs/distributed-training.md."""
    length, layers = 4096, 4
    peaks = {}
    for size in (1, 2, 4):
        with spawned(size) as ranks:
            peaks[size] = max(ranks.run(peak_of_step, length, layers))
        print(f"{length} tokens, {layers} layers, {size} processes: {peaks[size]:.0f} MiB")
    assert peaks[2] < 0.7 * peaks[1]
    assert peaks[4] < 0.4 * peaks[1]
