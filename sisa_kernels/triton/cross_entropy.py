"""Cross entropy of logits, which become their own gradient in place: one kernel, no wait.

A program takes a row: one pass for the softmax's largest logit and sum, one for the gradient."""

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
    loss = tl.log(total) + highest - at_target
    tl.store(losses + row, tl.where(counts, loss, 0.0))
    if GRADIENT:
        share = tl.where(counts, 1.0 / total, 0.0)
        place = tl.where(counts, target, -1)
        for start in range(0, width, BLOCK):
            inside = start + column < width
            x = tl.load(logits + start + column, mask=inside, other=0.0)
            x = tl.where(start + column < vocab, x.to(tl.float32), float("-inf"))
            softmax = tl.exp(x - highest) * share
            softmax = tl.where(start + column == place, softmax - 1.0, softmax)
            tl.store(logits + start + column, softmax, mask=inside)


def cross_entropy_eager(
    logits: Tensor, targets: Tensor, vocab: int, ignored: int, gradient: bool
) -> Tensor:
    """The cross entropy of each row of ``logits`` [N, W >= V] at ``targets`` [N] int64: [N] fp32.

    Of the first V = ``vocab`` columns; 0 where a target is ``ignored``. Columns lie side by side,
    rows may lie further apart. With ``gradient`` the logits become that of the sum,
    ``softmax(logits) - onehot(targets)``, 0 where ignored and past V. All is computed in fp32."""
    rows, width = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    block = min(BLOCK, triton.next_power_of_2(width))
    launch(
        _kernel,
        rows,
        logits,
        targets.contiguous(),
        losses,
        logits.stride(0),
        width,
        vocab,
        ignored,
        GRADIENT=gradient,
        BLOCK=block,
        num_warps=WARPS,
    )
    return losses


def _fake(logits: Tensor, *_: object) -> Tensor:
    return logits.new_empty(len(logits), dtype=torch.float32)


cross_entropy_ = register("cross_entropy_", cross_entropy_eager, _fake, mutates=("logits",))


def fault(logits: Tensor) -> str | None:
    """What is known to be wrong with the kernel on such logits, found on first use; or None."""
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
            off = max(relative(cross_entropy_(x, targets, 333, 83, True), loss), relative(x, right))
        except Exception as error:  # whatever keeps a kernel from compiling or launching there
            return selfcheck.described(error)
        if off <= selfcheck.ALLOWED[dtype]:
            return None
        return f"off by {off:.1e}, relative, on a small problem ({dtype})"

    return selfcheck.verdict(("cross_entropy", str(device), str(dtype)), device, find)
