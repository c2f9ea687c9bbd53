"""The fused linear + cross entropy against whole logits: values, gradients, memory."""

import contextlib
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import sisa_model as sm
from sisa_kernels import ops
from sisa_kernels.testing import relative
from sisa_model.data.blocks import IGNORE
from sisa_model.training import loss as module
from sisa_model.training.loss import Objective, linear_cross_entropy
from tests.support import ROOT


def whole(hidden, weight, targets):
    return F.cross_entropy(
        (hidden @ weight.t()).flatten(0, -2),
        targets.flatten(),
        ignore_index=IGNORE,
        reduction="sum",
    )


def operands(shape, width, vocab, ignored, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(*shape, width, generator=generator).to(dtype).requires_grad_()
    weight = (0.3 * torch.randn(vocab, width, generator=generator)).to(dtype).requires_grad_()
    targets = torch.randint(vocab, shape, generator=generator)
    return (
        hidden,
        weight,
        targets.masked_fill(torch.rand(shape, generator=generator) < ignored, IGNORE),
    )


@pytest.mark.parametrize("chunk", [1, 1000, 2**24])
@pytest.mark.parametrize("ignored", [0.0, 0.6, 1.0])
@pytest.mark.parametrize(
    ("shape", "width", "vocab"), [((3, 37), 24, 101), ((1, 1), 5, 2), ((257,), 16, 7)]
)
def test_it_is_cross_entropy_of_the_whole_logits(monkeypatch, shape, width, vocab, ignored, chunk):
    monkeypatch.setattr(module, "CHUNK_LOGITS", chunk)
    hidden, weight, targets = operands(shape, width, vocab, ignored)
    loss = linear_cross_entropy(hidden, weight, targets)
    found = torch.autograd.grad(0.7 * loss, (hidden, weight))
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    wanted_loss = whole(*exact, targets)
    wanted = torch.autograd.grad(0.7 * wanted_loss, exact)
    # fp32 sums of up to 257 terms against fp64.
    assert relative(loss, wanted_loss.detach()) < 1e-6
    assert max(relative(f, w) for f, w in zip(found, wanted)) < 1e-6
    assert [f.dtype for f in found] == [torch.float32, torch.float32]


@pytest.mark.parametrize("autocast", [False, True])
def test_padded_logits_and_targets_that_stay_count_for_nothing(monkeypatch, autocast):
    """As on a GPU, where the vocabulary is padded and nothing is asked of the targets."""
    monkeypatch.setattr("sisa_model.models.linear.alignment", lambda device, dtype: 64)
    monkeypatch.setattr(module, "CHUNK_LOGITS", 1000)
    hidden, weight, targets = operands((77,), 24, 101, 0.4)
    dtype = torch.bfloat16 if autocast else torch.float32
    loss = module._ChunkedCrossEntropy.apply(hidden, weight, targets, dtype, None)
    found = torch.autograd.grad(0.7 * loss, (hidden, weight))
    exact = [x.detach().to(dtype).double().requires_grad_() for x in (hidden, weight)]
    wanted_loss = whole(*exact, targets)
    wanted = torch.autograd.grad(0.7 * wanted_loss, exact)
    band = 4 * 2**-8 if autocast else 1e-6
    assert relative(loss.detach(), wanted_loss.detach()) < band
    assert max(relative(f, w) for f, w in zip(found, wanted)) < band
    assert not found[0][targets == IGNORE].any()
    assert found[1].shape == weight.shape


def test_under_autocast_the_products_are_bf16_and_the_rest_fp32():
    hidden, weight, targets = operands((64,), 48, 301, 0.2)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, targets)
    found = torch.autograd.grad(loss, (hidden, weight))
    with torch.autocast("cpu", torch.bfloat16):
        logits = F.linear(hidden, weight)
    wanted_loss = F.cross_entropy(logits.float(), targets, ignore_index=IGNORE, reduction="sum")
    wanted = torch.autograd.grad(wanted_loss, (hidden, weight))
    # The logits are the same bf16 numbers; the gradients differ by the rounding of the products'
    # operands and results.
    assert relative(loss.detach(), wanted_loss.detach().double()) < 1e-6
    assert max(relative(f, w.double()) for f, w in zip(found, wanted)) < 4 * 2**-8
    assert loss.dtype == torch.float32
    exact = whole(hidden, weight, targets)
    assert 1e-5 < relative(loss.detach(), exact.detach().double()) < 1e-2, "bf16 was not used"


def test_a_models_objective_is_the_cross_entropy_of_its_logits():
    torch.manual_seed(0)
    model = sm.build("sisa-tiny-ds16")
    ids = torch.randint(257, (2, 65))
    inputs, targets = ids[:, :-1], ids[:, 1:].masked_fill(torch.rand(2, 64) < 0.3, IGNORE)
    loss = Objective(model, contextlib.nullcontext())(inputs, targets)
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    wanted = F.cross_entropy(
        model(inputs).flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum"
    )
    wanted.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    for name, p in model.named_parameters():
        assert relative(found[name], p.grad.double()) < 1e-5, name


def test_without_triton_a_gpu_says_once_what_runs_instead(monkeypatch):
    monkeypatch.setattr(module, "fused", None)
    monkeypatch.setattr(ops, "_said", set())
    with pytest.warns(UserWarning, match="plain PyTorch, slower: the package triton") as caught:
        assert not any(module._runs_fused(SimpleNamespace(is_cuda=True)) for _ in range(3))
    assert len(caught) == 1


def test_memory_stays_far_below_the_logits():
    """8,192 tokens of 8,192: logits are 256 MiB in fp32, of which a plain loss has three."""
    code = """
import resource, torch
from sisa_model.training.loss import linear_cross_entropy
hidden = torch.randn(8192, 32, requires_grad=True)
weight = torch.randn(8192, 32, requires_grad=True)
linear_cross_entropy(hidden[:8], weight, torch.zeros(8, dtype=torch.int64)).backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
linear_cross_entropy(hidden, weight, torch.zeros(8192, dtype=torch.int64)).backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    # Chunks of 128 MiB in one buffer, that become their gradient in place.
    assert int(done.stdout) < 150 * 1024, f"{int(done.stdout) / 1024:.0f} MiB"


def test_a_second_backward_is_refused():
    hidden, weight, targets = operands((5,), 8, 11, 0.0)
    loss = linear_cross_entropy(hidden, weight, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
