"""Cross entropy of logits, which become their own gradient in place: one kernel, no wait.

A program takes a row: one pass for the softmax's largest logit and sum, one for the gradient. Where
several processes have some columns each, the two are kernels, between which sums are exchanged."""

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from sisa_kernels import selfcheck
from sisa_kernels.ops import register
from sisa_kernels.testing import relative
from sisa_kernels.triton.prologue import launch

BLOCK = 4096  # logits that a program holds at a time
WARPS = 8


@triton.jit
def _softmax_sum(logits, width, vocab, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """A row's highest logit, and the sum of the exponentials below it."""
    column = tl.arange(0, BLOCK)
    highest = float("-inf")
    total = 0.0
    # Masked by the width, which where it is a multiple of 16 lets 16 bytes be loaded at a time.
    for start in range(0, width, BLOCK):
        x = tl.load(logits + start + column, mask=start + column < width, other=0.0)
        x = tl.where(start + column < vocab, x.to(tl.float32), float("-inf"))
        higher = tl.maximum(highest, tl.max(x, 0))
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(x - higher), 0)
        highest = higher
    return highest, total


@triton.jit
def _to_gradient(  # type: ignore[no-untyped-def]
    logits, width, vocab, highest, share, place, BLOCK: tl.constexpr
):
    """Let a row become ``share exp(x - highest)``, less 1 at ``place``, and 0 past ``vocab``."""
    column = tl.arange(0, BLOCK)
    for start in range(0, width, BLOCK):
        inside = start + column < width
        x = tl.load(logits + start + column, mask=inside, other=0.0)
        x = tl.where(start + column < vocab, x.to(tl.float32), float("-inf"))
        softmax = tl.exp(x - highest) * share
        softmax = tl.where(start + column == place, softmax - 1.0, softmax)
        tl.store(logits + start + column, softmax, mask=inside)


@triton.jit
def _kernel(  # type: ignore[no-untyped-def]
    logits,
    targets,
    losses,
    stride,
    width,
    vocab,
    ignored,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    target = tl.load(targets + row)
    counts = target != ignored
    # Before the loop, whose sums make all threads meet: below it is overwritten.
    at_target = tl.load(logits + tl.where(counts, target, 0)).to(tl.float32)
    highest, total = _softmax_sum(logits, width, vocab, BLOCK)
    loss = tl.log(total) + highest - at_target
    tl.store(losses + row, tl.where(counts, loss, 0.0))
    if GRADIENT:
        share = tl.where(counts, 1.0 / total, 0.0)
        place = tl.where(counts, target, -1)
        _to_gradient(logits, width, vocab, highest, share, place, BLOCK)


@triton.jit
def _sums_kernel(logits, at, sums, stride, width, vocab, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    place = tl.load(at + row)
    at_target = tl.load(logits + tl.maximum(place, 0)).to(tl.float32)
    highest, total = _softmax_sum(logits, width, vocab, BLOCK)
    tl.store(sums + 3 * row, highest)
    tl.store(sums + 3 * row + 1, total)
    tl.store(sums + 3 * row + 2, tl.where(place >= 0, at_target, 0.0))


@triton.jit
def _gradient_kernel(logits, at, log_sums, stride, width, vocab, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    place = tl.load(at + row)
    log_sum = tl.load(log_sums + row)
    _to_gradient(logits + row * stride, width, vocab, log_sum, 1.0, place, BLOCK)


def _launch(kernel: Any, logits: Tensor, *args: Any, **options: Any) -> None:
    """Run ``kernel``, a program for every row."""
    rows, width = logits.shape
    block = min(BLOCK, triton.next_power_of_2(width))
    launch(kernel, rows, logits, *args, BLOCK=block, num_warps=WARPS, **options)


def cross_entropy_eager(
    logits: Tensor, targets: Tensor, vocab: int, ignored: int, gradient: bool
) -> Tensor:
    """The cross entropy of each row of ``logits`` [N, W >= V] at ``targets`` [N] int64: [N] fp32.

    Of the first V = ``vocab`` columns; 0 where a target is ``ignored``. Columns lie side by side,
    rows may lie further apart. With ``gradient`` the logits become that of the sum,
    ``softmax(logits) - onehot(targets)``, 0 where ignored and past V. All is computed in fp32."""
    rows, width = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    sizes = logits.stride(0), width, vocab
    _launch(_kernel, logits, targets.contiguous(), losses, *sizes, ignored, GRADIENT=gradient)
    return losses


def _fake(logits: Tensor, *_: object) -> Tensor:
    return logits.new_empty(len(logits), dtype=torch.float32)


cross_entropy_ = register("cross_entropy_", cross_entropy_eager, _fake, mutates=("logits",))


def softmax_sums_eager(logits: Tensor, at: Tensor, vocab: int) -> Tensor:
    """What several processes exchange that have some columns of the logits each: [N, 3] fp32.

    Of each row of ``logits`` [N, W >= V], of the first V = ``vocab`` columns, the highest, the sum
    of the exponentials below it, and the one ``at`` [N] int64, 0 where that is -1."""
    sums = torch.empty(len(logits), 3, dtype=torch.float32, device=logits.device)
    _launch(_sums_kernel, logits, at.contiguous(), sums, logits.stride(0), logits.shape[1], vocab)
    return sums


def _sums_fake(logits: Tensor, *_: object) -> Tensor:
    return logits.new_empty(len(logits), 3, dtype=torch.float32)


softmax_sums = register("softmax_sums", softmax_sums_eager, _sums_fake)


def softmax_minus_target_eager(logits: Tensor, at: Tensor, log_sums: Tensor, vocab: int) -> None:
    """Let ``logits`` become ``exp(logits - log_sums)``, less 1 ``at``, and 0 past ``vocab``.

    Arguments as of :func:`softmax_sums_eager`; ``log_sums`` [N] fp32, inf where a row counts for
    nothing."""
    sizes = logits.stride(0), logits.shape[1], vocab
    _launch(_gradient_kernel, logits, at.contiguous(), log_sums.contiguous(), *sizes)


softmax_minus_target_ = register(
    "softmax_minus_target_", softmax_minus_target_eager, lambda *_: None, mutates=("logits",)
)


def in_parts(logits: Tensor, targets: Tensor, ignored: int, cut: int) -> Tensor:
    """:func:`cross_entropy_eager` of all columns, as two processes would have them, cut at one."""
    counts = targets != ignored
    sums, pieces = [], []
    for first, part in ((0, logits[:, :cut]), (cut, logits[:, cut:])):
        at = targets - first
        at = at.where((at >= 0) & (at < part.shape[1]) & counts, -1)
        sums.append(softmax_sums(part, at, part.shape[1]))
        pieces.append((part, at))
    highest, exps, at_target = torch.stack(sums).unbind(2)
    log_sums = (highest + exps.log()).logsumexp(0)
    for part, at in pieces:
        softmax_minus_target_(part, at, log_sums.where(counts, torch.inf), part.shape[1])
    return (log_sums - at_target.sum(0)).where(counts, 0)


def fault(logits: Tensor, parts: bool = False) -> str | None:
    """What is known to be wrong with the kernel on such logits, found on first use; or None.

    With ``parts`` with the two kernels of logits whose columns several processes have."""
    device = logits.device
    dtype = logits.dtype

    def find() -> str | None:
        try:
            generator = torch.Generator(device).manual_seed(0)
            x = torch.randn(5, 333, generator=generator, device=device).to(dtype)
            targets = torch.arange(5, device=device) * 83
            exact = x.double().requires_grad_()
            loss = F.cross_entropy(exact, targets, reduction="none", ignore_index=83)
            (right,) = torch.autograd.grad(loss.sum(), exact)
            if parts:
                losses = in_parts(x, targets, 83, 200)
            else:
                losses = cross_entropy_(x, targets, 333, 83, True)
            off = max(relative(losses, loss), relative(x, right))
        except Exception as error:  # whatever keeps a kernel from compiling or launching there
            return selfcheck.described(error)
        if off <= selfcheck.ALLOWED[dtype]:
            return None
        return f"off by {off:.1e}, relative, on a small problem ({dtype})"

    return selfcheck.verdict(("cross_entropy", parts, str(device), str(dtype)), device, find)
