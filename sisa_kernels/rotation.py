"""TODO sisa_kernels.rotation"""

from collections.abc import Callable

import torch
from torch import Tensor

CLAMP = 11.0  # the authors' bound on the exponent g - c
LOWEST_LOG_DECAY = (
    -1e3
)  # exp of it is 0 in fp64: a bound that changes nothing, but keeps the digits of the running sum


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """R(phase) x: rotate the interleaved pairs (2n, 2n+1) of the last axis, given the cosine and
    sine of each pair's phase.
    """
    x0, x1 = x[..., 0::2], x[..., 1::2]
    return torch.stack((x0 * cos - x1 * sin, x0 * sin + x1 * cos), -1).flatten(-2)


def by_document(
    attend: Callable[..., Tensor], cu_seqlens: Tensor | None, *tensors: Tensor
) -> Tensor:
    """``attend`` on each document's part of the tensors [1, L, ...], the results joined; without
    cu_seqlens on the whole.
    """
    if cu_seqlens is None:
        return attend(*tensors)
    lengths = cu_seqlens.diff().tolist()
    return torch.cat(
        [attend(*document) for document in zip(*(x.split(lengths, 1) for x in tensors))], 1
    )
