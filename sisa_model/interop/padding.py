"""Padding: real tokens moved to the left, where causal attention sees no padding, and back."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Padding:
    """Where the real tokens of a padded batch are; made by :func:`find_padding`."""

    lengths: list[int]
    """Real tokens of each row, at least 1."""
    order: Tensor
    """[B, max(lengths)]: the places of each row's real tokens, and then of others."""
    back: Tensor
    """[B, L]: for each place, which of its row's real tokens is the last at or before it (before
    the first: the first).
    """

    def pack(self, x: Tensor) -> Tensor:
        """x [B, L, ...] with each row's real tokens first, [B, max(lengths), ...]."""
        return x[torch.arange(len(x), device=x.device)[:, None], self.order]

    def unpack(self, y: Tensor) -> Tensor:
        """y back in its places, [B, L, ...]; padding has what the real token before it has."""
        return y[torch.arange(len(y), device=y.device)[:, None], self.back]


def find_padding(real: Tensor, seen: int = 0) -> Padding | None:
    """The :class:`Padding` where ``real`` [B, L] bool is False, on any side; None without any.

    Raises ValueError, naming ``attention_mask``, for a row without a real token, and for padding
    behind the ``seen`` tokens of a cache."""
    if real.all():
        return None
    if seen:
        raise ValueError(f"attention_mask must be 1 for all tokens behind the {seen} in the cache")
    lengths = real.sum(1).tolist()
    if not min(lengths):
        raise ValueError(f"attention_mask must leave each row at least one token, got {lengths}")
    order = real.int().argsort(dim=1, descending=True, stable=True)[:, : max(lengths)]
    return Padding(lengths, order, (real.cumsum(1) - 1).clamp(min=0))
