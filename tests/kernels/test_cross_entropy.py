"""The Triton cross entropy, interpreted where there is no GPU: values, gradients, rivals."""

import pytest
import torch
import torch.nn.functional as F

from sisa_kernels import selfcheck
from sisa_kernels.testing import relative
from tests.support.attention import first_use

module = pytest.importorskip("sisa_kernels.triton.cross_entropy", reason="needs triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IGNORED = -100


def logits_and_targets(rows, vocab, dtype, pitch=None, spread=3.0):
    generator = torch.Generator().manual_seed(0)
    buffer = spread * torch.randn(rows, pitch or vocab, generator=generator)
    targets = torch.randint(vocab, (rows,), generator=generator)
    targets[1::3] = IGNORED
    return buffer.to(DEVICE, dtype), targets.to(DEVICE)


def exactly(logits, targets):
    logits = logits.double().requires_grad_()
    losses = F.cross_entropy(logits, targets, reduction="none", ignore_index=IGNORED)
    return losses.detach(), torch.autograd.grad(losses.sum(), logits)[0]


@pytest.mark.parametrize("block", [16, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "vocab", "width"), [(7, 101, 128), (1, 1, 16), (4, 64, 64)])
def test_it_is_cross_entropy_and_its_gradient(monkeypatch, dtype, rows, vocab, width, block):
    """Of the first ``vocab`` columns, of rows that lie further apart."""
    monkeypatch.setattr(module, "BLOCK", block)
    buffer, targets = logits_and_targets(rows, vocab, dtype, width + 16)
    logits, behind = buffer[:, :width], buffer[:, width:].clone()
    wanted, gradient = exactly(logits[:, :vocab], targets)
    untouched = buffer.clone()
    losses = module.cross_entropy_(logits, targets, vocab, IGNORED, False)
    assert torch.equal(buffer, untouched)
    assert torch.equal(module.cross_entropy_(logits, targets, vocab, IGNORED, True), losses)
    assert losses.dtype == torch.float32
    assert (losses.double() - wanted).norm() <= 1e-6 * (1 + wanted.norm())
    rounding = (gradient.to(dtype).double() - gradient).norm()
    assert (logits[:, :vocab].double() - gradient).norm() <= 1.01 * rounding + 1e-6
    assert not losses[targets == IGNORED].any()
    assert not logits[targets == IGNORED].any()
    assert not logits[:, vocab:].any()
    assert torch.equal(buffer[:, width:], behind)


@pytest.mark.parametrize("block", [16, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cut", [1, 50, 96])
def test_in_parts_it_is_the_same(monkeypatch, dtype, cut, block):
    """As processes have it that share the vocabulary; one may have no target, or every one."""
    monkeypatch.setattr(module, "BLOCK", block)
    logits, targets = logits_and_targets(7, 101, dtype, 128)
    logits = logits[:, :101]
    targets[0] = 0
    wanted, gradient = exactly(logits, targets)
    losses = module.in_parts(logits, targets, IGNORED, cut)
    assert (losses.double() - wanted).norm() <= 1e-6 * (1 + wanted.norm())
    rounding = (gradient.to(dtype).double() - gradient).norm()
    # A log-sum-exp of 8, which the kernels of parts are given, is known to 2^-22 in fp32.
    assert (logits.double() - gradient).norm() <= 1.01 * rounding + 2**-22 * 7**0.5 + 1e-6
    assert not losses[targets == IGNORED].any()
    assert not logits[targets == IGNORED].any()


def test_past_the_words_of_a_part_there_is_nothing():
    logits, targets = logits_and_targets(4, 48, torch.float32)
    sums = module.softmax_sums(logits, targets.clamp(0, 32), 33)
    assert torch.equal(sums[:, 0], logits[:, :33].amax(1))
    module.softmax_minus_target_(logits, targets.clamp(0, 32), sums[:, 0], 33)
    assert not logits[:, 33:].any()
    assert logits[:, :33].any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_so(bad):
    logits, targets = logits_and_targets(3, 50, torch.float32)
    logits[0, 7] = bad
    losses = module.cross_entropy_(logits, targets, logits.shape[1], IGNORED, True)
    assert not losses[0].isfinite()
    assert not logits[0].isfinite().all()
    assert losses[2].isfinite()
    assert logits[2].isfinite().all()


def test_large_logits_do_not_overflow():
    logits, targets = logits_and_targets(6, 50, torch.float32, spread=1e4)
    wanted, gradient = exactly(logits, targets)
    losses = module.cross_entropy_(logits, targets, logits.shape[1], IGNORED, True)
    assert relative(losses, wanted) < 1e-6
    assert relative(logits, gradient) < 1e-5


def test_ligers_kernel_has_the_same_loss_and_gradient():
    functional = pytest.importorskip("liger_kernel.transformers.functional")
    logits, targets = logits_and_targets(9, 77, torch.float32)
    theirs = logits.clone().requires_grad_()
    loss = functional.liger_cross_entropy(theirs, targets, ignore_index=IGNORED, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, theirs)
    assert (
        relative(module.cross_entropy_(logits, targets, logits.shape[1], IGNORED, True).sum(), loss)
        < 1e-6
    )
    assert relative(logits, gradient.double()) < 1e-6


def test_its_first_use_finds_a_wrong_kernel(monkeypatch):
    logits, _ = logits_and_targets(1, 5, torch.bfloat16)
    with first_use(monkeypatch):
        assert module.fault(logits) is None
        assert module.fault(logits, parts=True) is None
    with first_use(monkeypatch):
        monkeypatch.setattr(module, "cross_entropy_", lambda x, *_: x.float().sum(1))
        assert "relative, on a small problem (torch.bfloat16)" in module.fault(logits)
        assert selfcheck._verdicts
        assert module.fault(logits, parts=True) is None
        monkeypatch.setattr(module, "softmax_sums", None)
        selfcheck._verdicts.clear()
        assert "TypeError" in module.fault(logits, parts=True)
    with first_use(monkeypatch):
        monkeypatch.setattr(module, "cross_entropy_", None)
        assert "TypeError" in module.fault(logits)


def test_it_is_registered_as_an_op():
    logits, targets = logits_and_targets(4, 33, torch.float32)
    torch.library.opcheck(module.cross_entropy_, (logits, targets, logits.shape[1], IGNORED, True))
    torch.library.opcheck(module.softmax_sums, (logits, targets.clamp(min=-1), 33))
    at, log_sums = targets.clamp(min=-1), logits.logsumexp(1)
    torch.library.opcheck(module.softmax_minus_target_, (logits, at, log_sums, 33))
