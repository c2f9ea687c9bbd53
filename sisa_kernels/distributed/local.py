"""A rank's own pieces by the kernels of its device: the pairs of tokens within a piece.

Each returns y and the scores' log-sum-exp, and its backward gives these pairs' share of the
gradients, once y and the log-sum-exp of all pairs are known."""

import math
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from sisa_kernels.inputs import Operands
from sisa_kernels.paths import native
from sisa_kernels.paths.chunked import chunked_backward, chunked_op

try:
    from sisa_kernels.triton import op as triton_op
except ImportError:
    triton_op = None  # type: ignore[assignment]

Softmax = tuple[Tensor, Tensor]  # y [B, L, H, Dv] and log-sum-exp [B, H, L], fp32 or fp64


class Pieces(Protocol):
    """Attention within a rank's pieces, whose documents' parts begin at ``bounds`` [parts + 1]."""

    keeps_own: bool
    """Whether the backward takes y and the log-sum-exp of these pairs, too."""

    def __init__(self, bounds: Tensor, length: int): ...

    def forward(self, x: Operands) -> Softmax:
        """y and log-sum-exp; past the last document 0 and -inf."""
        ...

    def backward(self, x: Operands, dy: Tensor, own: Softmax, merged: Softmax) -> list[Tensor]:
        """Gradients of what is given of q .. lam; dy in the dtype of y."""
        ...


def row_sums(dy: Tensor, own: Softmax, merged: Softmax) -> Tensor:
    """Sums of dL/ds over the keys of one's own pieces, [B, H, L]: 0 where there are no others."""
    y, lse = own
    off = (dy * (y - merged[0])).sum(3).transpose(1, 2)
    return torch.where(lse == merged[1], 0.0, (lse - merged[1]).exp() * off)


class Native:
    """The compiled kernel, on a CPU, for every kind of attention.

    It takes a query's own score from the sum over its row, so that it is given its own pairs'
    softmax and dL/d(log-sum-exp), the sum."""

    keeps_own = True

    def __init__(self, bounds: Tensor, length: int):
        self.bounds = bounds

    def forward(self, x: Operands) -> Softmax:
        return native.attention_op(*x.flat(), self.bounds, 0, native.bf16_products(x.q))

    def backward(self, x: Operands, dy: Tensor, own: Softmax, merged: Softmax) -> list[Tensor]:
        y, lse = own
        share = torch.where(lse == merged[1], 1.0, (lse - merged[1]).exp())
        dlse = row_sums(dy, own, merged).contiguous()
        dy = dy * share.transpose(1, 2)[..., None]
        wanted = [t is not None for t in x.tensors()]
        rest = self.bounds, 0, wanted, native.bf16_products(x.q)
        return torch.ops.sisa.attention_backward(dy, dlse, y, lse, *x.flat(), *rest)


class Triton:
    """The Triton kernels, on a GPU, for SISA; to them every token is of some document."""

    keeps_own = False

    def __init__(self, bounds: Tensor, length: int):
        self.past = torch.arange(length, device=bounds.device) >= bounds[-1]
        self.bounds = F.pad(bounds, (0, 1), value=length)

    def forward(self, x: Operands) -> Softmax:
        horizon = triton_op.default_horizon(x.q.dtype)
        y, lse = triton_op.triton_exact(*x.flat(), self.bounds, horizon)
        y = y.float().masked_fill(self.past[:, None, None], 0)
        return y, (lse * math.log(2)).masked_fill(self.past, -math.inf)

    def backward(self, x: Operands, dy: Tensor, own: Softmax, merged: Softmax) -> list[Tensor]:
        y, lse = merged
        horizon = triton_op.default_horizon(x.q.dtype)
        dy = dy.masked_fill(self.past[:, None, None], 0).to(x.q.dtype)
        lse = (lse / math.log(2)).masked_fill(self.past, math.inf).contiguous()
        inputs = x.flat()
        return triton_op.triton_exact_backward(dy, y, lse, *inputs, self.bounds, horizon)


class Chunked:
    """SISA on stock kernels."""

    keeps_own = False

    def __init__(self, bounds: Tensor, length: int):
        self.bounds = bounds

    def forward(self, x: Operands) -> Softmax:
        return chunked_op(*x.flat(), self.bounds, math.inf)

    def backward(self, x: Operands, dy: Tensor, own: Softmax, merged: Softmax) -> list[Tensor]:
        inputs = x.flat()
        return list(chunked_backward(dy, *merged, *inputs, self.bounds, math.inf))
