"""A sequence cut over processes, as a recurrence sees it: what passes from piece to piece."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sisa_kernels.distributed.attention import Place, find_place
from sisa_kernels.distributed.exchange import gather_rows
from sisa_kernels.distributed.layout import Piece
from sisa_model.models.context import Context


class _Gather(torch.autograd.Function):
    """Rows of all pieces; x passes through, so that every process runs the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, own: Tensor, place: Place) -> tuple[Tensor, Tensor]:
        ctx.place = place
        return x.view_as(x), gather_rows(own, place.geometry.layout.owners, place.group)

    @staticmethod
    def backward(ctx: Any, dx: Tensor, dall: Tensor) -> tuple[Tensor, Tensor, None]:
        dall = dall.contiguous()
        dist.all_reduce(dall, group=ctx.place.group)
        return dx, dall[ctx.place.geometry.layout.pieces(ctx.place.rank)], None


@dataclass(frozen=True)
class Part:
    """Tokens of one document in one piece of this process."""

    rows: slice
    head_of: int | None = None
    """The piece, where the document began in an earlier one."""
    tail_of: int | None = None
    """The piece, where the document may go on in a later one."""


class CutSequence:
    """This process' pieces of the sequence of ``context``, and of what all processes gather.

    Raises ValueError where x [B, L, ...] has not the tokens that the layout gives to it."""

    def __init__(self, context: Context, x: Tensor):
        place = find_place(context.group, context.layout, x[:, :, None], context.cu_seqlens)
        assert place is not None
        self.place = place
        self.geometry = place.geometry
        self.pieces: list[Piece] = self.geometry.of(place.rank)
        heads = {p.head.start: p.number for p in self.pieces if p.head.start < p.head.stop}
        tails = {p.tail.stop: p.number for p in self.pieces if p.tail.start < p.tail.stop}
        bounds = self.geometry.bounds_of(place.rank)
        cuts = sorted({*bounds, x.shape[1]})
        self.parts = [
            Part(slice(start, end), heads.get(start), tails.get(end))
            for start, end in itertools.pairwise(cuts)
        ]

    def gather(self, x: Tensor, own: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """x itself, and [pieces, ...] of all processes' ``own``, one tensor a piece of theirs.

        What comes after must be made of this x: so its backward, an all-reduce, runs everywhere."""
        return _Gather.apply(x, torch.stack(list(own)), self.place)

    def behind(self, piece: int, rows: Tensor) -> list[tuple[int, Tensor]]:
        """(tokens, row) of earlier pieces that hold tokens of its head's document, in order."""
        return [(self.geometry.tails[n], rows[n]) for n in self.geometry.seen_by(piece)]

    def incoming(self, piece: int, states: Tensor, log_decay: Tensor) -> Tensor:
        """The state before a piece's first token, of what each piece adds [pieces, B, H, N, P].

        ``log_decay`` [pieces, B, H] fp64: the sum over each piece."""
        total = torch.zeros_like(states[0])
        between = torch.zeros_like(log_decay[0])
        for earlier in reversed(self.geometry.seen_by(piece)):
            total = total + between.exp().to(states.dtype)[..., None, None] * states[earlier]
            between = between + log_decay[earlier]
        return total
