"""What every path shares: running sums of decay and phase, and heads that share a key head."""

import math

import torch
from torch import Tensor

# exp of it is 0 in fp64: a bound that changes nothing, but keeps the digits of the running sum
LOWEST_LOG_DECAY = -1e3


def work_dtype(x: Tensor) -> torch.dtype:
    """The dtype a path computes in: fp64 for fp64 inputs, fp32 for every other."""
    return torch.promote_types(x.dtype, torch.float32)


def cumulative_decay(log_decay: Tensor) -> Tensor:
    """g [B, L, G] in fp64, whose differences keep fp32's last digit, for one scalar a token."""
    return log_decay.double().clamp(min=LOWEST_LOG_DECAY).cumsum(1)


def cumulative_phase(theta: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the phase, each [B, L, G, Ds/2] in ``dtype``, summed in fp64."""
    phase = theta.double().cumsum(1).remainder(2 * math.pi).to(dtype)
    return phase.cos(), phase.sin()


def to_query_heads(x: Tensor, heads: int) -> Tensor:
    """Repeat each key head (axis 2) for the query heads that share it."""
    return x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], 2)


def to_key_heads(x: Tensor, heads: int) -> Tensor:
    """Sum over the query heads of a key head (axis 2), the derivative of to_query_heads."""
    return x if x.shape[2] == heads else x.unflatten(2, (heads, -1)).sum(3)


def segment_middle(g: Tensor, starts: list[int]) -> Tensor:
    """The middle of g's range in each token's segment, [B, L, G]; segments begin at ``starts``."""
    ends = [*starts[1:], g.shape[1]]
    pieces = []
    for start, end in zip(starts, ends):
        middle = (g[:, start : start + 1] + g[:, end - 1 : end]) / 2
        pieces.append(middle.expand(-1, end - start, -1))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)


def pair_products(du: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """At u = e^x R(phase) c with du = dL/du: (dL/dx, dL/dphase of each channel pair), in fp64."""
    du0 = du[..., 0::2]
    du1 = du[..., 1::2]
    u0 = u[..., 0::2]
    u1 = u[..., 1::2]
    return (du * u).sum(-1).double(), (u0 * du1 - u1 * du0).double()
