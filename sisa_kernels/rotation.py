"""The rotation and the bounds of the paths; the oracle has its own."""

import torch
from torch import Tensor

CLAMP = 11.0  # the authors' bound on the exponent g - m
SMALLEST_LAM = 1e-24  # stands for 0, which would divide its own gradient away; no score sees it


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """R(phase) x: rotate the channel pairs (2n, 2n+1) by each pair's cosine and sine."""
    x0 = x[..., 0::2]
    x1 = x[..., 1::2]
    return torch.stack((x0 * cos - x1 * sin, x0 * sin + x1 * cos), -1).flatten(-2)
