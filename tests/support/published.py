"""SISA as its paper writes it down: Proposition 1 in plain PyTorch, by autograd alone.

No code in common with the package: a second oracle beside its own, of the clamped mode."""

import math

import torch
from torch import Tensor


def turned(x: Tensor, phase: Tensor) -> Tensor:
    """R(phase) x: channels 2n and 2n + 1 are the parts of a complex number."""
    rotation = torch.polar(torch.ones_like(phase), phase)
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * rotation).flatten(
        -2
    )


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    b: Tensor,
    c: Tensor,
    log_decay: Tensor,
    theta: Tensor,
    lam: Tensor,
    clamp: float = 11.0,
) -> Tensor:
    """y [B, L, H, Dv] of one sequence, a key head for each query head; dense scores."""
    width = q.shape[3]
    q_aug, k_aug = augmented(q, k, b, c, log_decay, theta, lam, clamp)
    score = torch.einsum("bihw,bjhw->bhij", q_aug, k_aug) / math.sqrt(width)
    future = torch.ones(score.shape[-2:], dtype=torch.bool).triu(1)
    return torch.einsum("bhij,bjhd->bihd", score.masked_fill(future, -math.inf).softmax(-1), v)


def augmented(
    q: Tensor,
    k: Tensor,
    b: Tensor,
    c: Tensor,
    log_decay: Tensor,
    theta: Tensor,
    lam: Tensor,
    clamp: float = 11.0,
) -> tuple[Tensor, Tensor]:
    """The wider queries and keys [B, L, H, Dh + Ds], g - (max g + min g) / 2 clamped."""
    g = log_decay.cumsum(1)
    phase = theta.cumsum(1)
    offset = (g.amax(1, keepdim=True) + g.amin(1, keepdim=True)) / 2
    exponent = (g - offset).clamp(-clamp, clamp)[..., None]
    s = q.shape[3] ** 0.25 * lam.sqrt()[:, None]
    q_aug = torch.cat((q, s * exponent.exp() * turned(c, phase)), -1)
    k_aug = torch.cat((k, s * (-exponent).exp() * turned(b, phase)), -1)
    return q_aug, k_aug
