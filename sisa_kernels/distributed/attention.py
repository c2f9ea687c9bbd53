"""Attention of one sequence over several ranks: own pieces, rectangles, their merge and backward.

A rank attends within its own pieces by the kernels of its device, and over each earlier piece that
one of its own sees by a stock kernel (:mod:`sisa_kernels.distributed.rectangle`); parts merge by
their log-sum-exp. The backward of each part takes the merged output and log-sum-exp; gradients of
other ranks' keys go home, and the owner derives from them what is beside k and v."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from sisa_kernels.checks import readable
from sisa_kernels.distributed.exchange import Exchange, gather_rows
from sisa_kernels.distributed.layout import Geometry, Piece, SequenceLayout, geometry
from sisa_kernels.distributed.local import Pieces, Softmax
from sisa_kernels.distributed.rectangle import operand_dtype, rectangle, rectangle_backward
from sisa_kernels.distributed.terms import ForgetTerm, ImportanceTerm, PlainTerm
from sisa_kernels.inputs import Operands, Rotary
from sisa_kernels.ops import without_autocast
from sisa_kernels.paths.chunked import merge
from sisa_kernels.rotation import rotate
from sisa_kernels.scans import work_dtype


@dataclass(frozen=True)
class Place:
    """Where a call's tokens stand: which rank of which group, and the geometry of all pieces."""

    group: ProcessGroup
    rank: int
    geometry: Geometry


def find_place(
    group: ProcessGroup | None,
    layout: SequenceLayout | None,
    q: Tensor,
    cu_seqlens: Tensor | None,
) -> Place | None:
    """The place of this rank's tokens; None without group and layout.

    Raises TypeError, ValueError where layout, group, q [B, L, ...] and the whole sequence's
    ``cu_seqlens`` do not fit each other, NotImplementedError under torch.func."""
    if group is None and layout is None:
        return None
    if group is None or layout is None:
        missing = "group" if group is None else "layout"
        raise ValueError(
            f"group and layout must be given together, got no {missing}; "
            "torch.distributed.group.WORLD is the group of all ranks"
        )
    if not isinstance(layout, SequenceLayout):
        raise TypeError(
            f"layout must be a sisa_kernels.SequenceLayout, got {type(layout).__name__}"
        )
    if torch._C._are_functorch_transforms_active():
        raise NotImplementedError(
            "group: attention over several ranks does not run under torch.func; "
            "torch.autograd differentiates it once"
        )
    ranks = dist.get_world_size(group)
    rank = dist.get_rank(group)
    if ranks != layout.ranks or rank < 0:
        raise ValueError(
            f"layout must be of as many ranks as the group has, got {layout.ranks} "
            f"and {ranks if rank >= 0 else 'a group without this rank'}"
        )
    if isinstance(q, Tensor) and q.ndim == 4 and q.shape[1] != layout.size(rank):
        raise ValueError(
            f"q must have the {layout.size(rank)} tokens that layout gives to rank {rank}, "
            f"got {list(q.shape)}"
        )
    return Place(group, rank, geometry(layout, _documents(layout, cu_seqlens)))


def _documents(layout: SequenceLayout, cu_seqlens: Tensor | None) -> tuple[int, ...] | None:
    """The bounds of a call, those of the layout where it has them."""
    if cu_seqlens is None:
        return layout.documents
    values = readable(cu_seqlens)
    if layout.documents is not None and values is None:  # a GPU's: reading them would wait
        return layout.documents
    given = tuple((cu_seqlens if values is None else values).tolist())
    if layout.documents is not None:
        if given != layout.documents:
            raise ValueError(
                f"cu_seqlens must be the layout's, {list(layout.documents)}, got {list(given)}"
            )
        return layout.documents
    whole = SequenceLayout(layout.borders, layout.owners, layout.ranks)
    if given[0] != 0 or list(given) != sorted(given) or given[-1] > whole.length:
        raise ValueError(
            "cu_seqlens must be of the whole sequence: rise from 0 to at most the layout's "
            f"length {whole.length}, got {list(given)}"
        )
    return given


def _term(x: Operands, place: Place, pieces: list[Piece]) -> PlainTerm:
    """What the scores have beside q.k."""
    beside = place.geometry, pieces, x.q, x.k
    if x.log_decay is None:
        return PlainTerm(*beside)
    if x.b is None or x.c is None or x.theta is None or x.lam is None:
        return ForgetTerm(*beside, x.log_decay)
    return ImportanceTerm(*beside, x.b, x.c, x.log_decay, x.theta, x.lam)


class _Round:
    """What forward and backward share: pieces, operands of rectangles, who needs what."""

    def __init__(
        self, x: Operands, place: Place, within: type[Pieces], prefix: Tensor | None = None
    ):
        self.x = x
        self.place = place
        self.geometry = place.geometry
        self.pieces = self.geometry.of(place.rank)
        self.scale = x.q.shape[3] ** -0.5
        self.work = work_dtype(x.q)
        self.products = operand_dtype(x.q)
        length = x.q.shape[1]
        bounds = torch.tensor(
            self.geometry.bounds_of(place.rank), dtype=torch.int32, device=x.q.device
        )
        self.local = within(bounds, length)
        self.term = _term(x, place, self.pieces)
        owners = self.geometry.layout.owners
        if prefix is None:
            prefix = gather_rows(self.term.own_prefix(), owners, place.group)
        self.term.set_prefix(prefix)
        self.needed = {
            (query, key)
            for query in range(len(owners))
            for key in self.geometry.seen_by(query)
            if self.term.is_needed(query, key)
        }
        sizes = [[self._size(a, b) for b in self._ranks()] for a in self._ranks()]
        self.exchange = Exchange(place.group, sizes, x.q.dtype, x.q.device)

    def _ranks(self) -> range:
        return range(self.geometry.layout.ranks)

    def _sent(self, source: int, to: int) -> Iterator[tuple[int, int, int]]:
        """(piece, tokens, channels beside k) of what one rank's queries need of another's keys."""
        layout = self.geometry.layout
        for key in layout.pieces(source):
            queries = [n for n in layout.pieces(to) if self.geometry.sees(n, key)]
            if queries:
                with_term = any((query, key) in self.needed for query in queries)
                yield key, self.geometry.tails[key], self.term.channels if with_term else 0

    def _size(self, source: int, to: int) -> int:
        """Elements from one rank to another."""
        if source == to:
            return 0
        B, _, G, Dh = self.x.k.shape
        width = Dh + self.x.v.shape[3]
        return sum(B * G * n * (width + extra) for _, n, extra in self._sent(source, to))

    def keys(self, piece: Piece, channels: int) -> Tensor:
        """k, the term's channels and v of a piece's tail, side by side, as they are sent."""
        tail = piece.tail
        dtype = self.x.q.dtype
        parts = [self.rotated(self.x.k, tail).to(dtype)]
        if channels:
            parts.append(self.term.key_channels(piece, dtype))
        return torch.cat((*parts, self.x.v[:, tail]), 3)

    def rotated(self, x: Tensor, rows: slice, back: bool = False) -> Tensor:
        """Rows of x with RoPE, in the working dtype; ``back``: without it again."""
        x = x[:, rows].to(self.work)
        if self.x.rotary is None:
            return x
        cos, sin = (table[rows][:, None].to(self.work) for table in self.x.rotary)
        return rotate(x, cos, -sin if back else sin)

    def message(self, to: int) -> Tensor:
        """What goes to another rank, flat."""
        own = {piece.number: piece for piece in self.pieces}
        sent = self._sent(self.place.rank, to)
        return torch.cat([self.keys(own[key], extra).flatten() for key, _, extra in sent])

    def unpacked(self, source: int, to: int, message: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(piece, [B, tail, G, channels]) of a message from source to another rank."""
        B, _, G, Dh = self.x.k.shape
        start = 0
        for key, n, extra in self._sent(source, to):
            width = Dh + extra + self.x.v.shape[3]
            end = start + B * n * G * width
            yield key, message[start:end].view(B, n, G, width)
            start = end

    def own_keys(self) -> Iterator[tuple[int, Tensor]]:
        """As :meth:`unpacked`, of the pieces that others of the same rank see."""
        own = {piece.number: piece for piece in self.pieces}
        for key, _, extra in self._sent(self.place.rank, self.place.rank):
            yield key, self.keys(own[key], extra)

    def operands(
        self, piece: Piece, key: int, keys: Tensor, probe: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v of a rectangle; ``probe``: with a channel whose gradient sums the rows'."""
        Dh = self.x.k.shape[3]
        Dv = self.x.v.shape[3]
        keys = keys.to(self.products)
        query = [self.rotated(self.x.q, piece.head).to(self.products)]
        k = keys[..., :Dh]
        if (piece.number, key) in self.needed:
            query.append(self.term.query_channels(piece, key, self.products))
            k = keys[..., :-Dv]
        if probe:
            query.append(torch.zeros_like(query[0][..., :1]))
            k = torch.cat((k, torch.ones_like(k[..., :1])), 3)
        return torch.cat(query, 3), k, keys[..., -Dv:]

    def queries_of(self, key: int) -> Iterator[Piece]:
        """The own pieces that see a piece."""
        return (piece for piece in self.pieces if self.geometry.sees(piece.number, key))


def _forward(x: _Round) -> tuple[Softmax, Softmax]:
    """(y, log-sum-exp) of one's own pieces and of all."""
    x.exchange.start(x.message)
    own = x.local.forward(x.x) if x.x.q.numel() else _nothing(x.x)
    sees = any(piece.head.start < piece.head.stop for piece in x.pieces)
    y, lse = (t.clone() for t in own) if sees else own

    def attend(key: int, keys: Tensor) -> None:
        for piece in x.queries_of(key):
            out, part = rectangle(*x.operands(piece, key, keys), x.scale)
            bias = x.term.row_bias(piece, key)
            part = part if bias is None else (part + bias).to(part.dtype)
            rows = piece.head
            y[:, rows], lse[..., rows] = merge((y[:, rows], lse[..., rows]), (out, part))

    def visit(source: int, message: Tensor) -> None:
        for key, keys in x.unpacked(source, x.place.rank, message):
            attend(key, keys)

    for key, keys in x.own_keys():
        attend(key, keys)
    x.exchange.finish(visit)
    return own, (y, lse)


def _nothing(x: Operands) -> Softmax:
    """Of no token."""
    B, _, H, _ = x.q.shape
    work = work_dtype(x.q)
    y = x.q.new_zeros(B, 0, H, x.v.shape[3], dtype=work)
    return y, x.q.new_zeros(B, H, 0, dtype=work)


class _Gradients:
    """Sums of the rectangles' gradients, in the working dtype."""

    def __init__(self, x: _Round, dy: Tensor, merged: Softmax):
        self.round = x
        self.dy = dy
        self.y, self.lse = merged
        self.term = x.term
        self.probe = isinstance(x.term, ForgetTerm)
        self.dq, self.dk, self.dv = (torch.zeros_like(t, dtype=x.work) for t in x.x.given()[:3])
        x.term.start_backward()

    def of_keys(self, key: int, keys: Tensor) -> Tensor:
        """Those of a piece's keys [B, tail, G, channels], as sent; adds those of own queries."""
        x = self.round
        Dh = x.x.k.shape[3]
        Dv = x.x.v.shape[3]
        total = torch.zeros_like(keys, dtype=x.work)
        for piece in x.queries_of(key):
            rows = piece.head
            bias = self.term.row_bias(piece, key)
            lse = self.lse[..., rows]
            lse = lse if bias is None else (lse - bias).to(lse.dtype)
            operands = x.operands(piece, key, keys, self.probe)
            softmax = self.dy[:, rows], self.y[:, rows], lse
            dq, dk, dv = rectangle_backward(*operands, *softmax, x.scale)
            self.dq[:, rows] += dq[..., :Dh]
            end = dk.shape[3]
            sums = None
            if self.probe:
                end -= 1
                sums = dq[..., end] / x.scale
            if end > Dh:
                self.term.add_queries(piece, key, dq[..., Dh:end], sums)
            total[..., :end] += dk[..., :end]
            total[..., total.shape[3] - Dv :] += dv
        return total

    def at_home(self, key: int, grads: Tensor) -> None:
        """Add the gradients of an own piece's keys, from the queries of one rank."""
        x = self.round
        Dh = x.x.k.shape[3]
        Dv = x.x.v.shape[3]
        piece = next(piece for piece in x.pieces if piece.number == key)
        grads = grads.to(x.work)
        self.dk[:, piece.tail] += grads[..., :Dh]
        self.dv[:, piece.tail] += grads[..., grads.shape[3] - Dv :]
        if grads.shape[3] > Dh + Dv:
            self.term.add_keys(piece, grads[..., Dh : grads.shape[3] - Dv])

    def finish(self) -> list[Tensor]:
        """Of all operands, from all pairs in different pieces."""
        x = self.round
        through = self.term.through_pieces()
        if through is not None:
            dist.all_reduce(through, group=x.place.group)
        whole = slice(None)
        dq = x.rotated(self.dq, whole, back=True)
        dk = x.rotated(self.dk, whole, back=True)
        return [dq, dk, self.dv, *self.term.gradients()]


def _backward(x: _Round, dy: Tensor, own: Softmax, merged: Softmax) -> list[Tensor | None]:
    """Gradients of all operands that there are, None for the others."""
    grads = _Gradients(x, dy, merged)
    rank = x.place.rank

    def reply(source: int, message: Tensor) -> Tensor:
        parts = [grads.of_keys(key, keys) for key, keys in x.unpacked(source, rank, message)]
        return torch.cat([part.to(message.dtype).flatten() for part in parts])

    def home(destination: int, message: Tensor) -> None:
        for key, found in x.unpacked(rank, destination, message):
            grads.at_home(key, found)

    x.exchange.start(x.message)
    within = x.local.backward(x.x, dy, own, merged) if dy.numel() else None
    for key, keys in x.own_keys():
        grads.at_home(key, grads.of_keys(key, keys))
    x.exchange.finish(reply, home)
    across = grads.finish()
    given = x.x.given()
    sums = across if within is None else [a.to(w) + w for a, w in zip(across, within)]
    dtypes = iter(total.to(t.dtype) for total, t in zip(sums, given))
    return [None if t is None else next(dtypes) for t in x.x.tensors()]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, place: Place, within: type[Pieces], rotary: Rotary | None, *tensors: Any
    ) -> Tensor:
        x = _Round(Operands._make((*tensors, rotary)), place, within)
        own, merged = _forward(x)
        ctx.call = place, within, rotary
        kept = own if x.local.keeps_own else merged
        ctx.save_for_backward(*tensors, *kept, *merged, x.term.prefix)
        return merged[0].to(x.x.q.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, y_own, lse_own, y, lse, prefix = ctx.saved_tensors
        place, within, rotary = ctx.call
        with without_autocast(y.device):
            x = _Round(Operands._make((*tensors, rotary)), place, within, prefix)
            grads = _backward(x, dy.to(y.dtype), (y_own, lse_own), (y, lse))
        return None, None, None, *grads


def attend_over_ranks(x: Operands, place: Place, within: type[Pieces]) -> Tensor:
    """y [B, L, H, Dv] in q's dtype of this rank's tokens, which all ranks of the group call.

    ``within``: what runs on a rank's own pieces. Gradients are whole but lam's, which is this
    rank's share. Forward and backward communicate: every rank must run both, in the same order."""
    return _Attention.apply(place, within, x.rotary, *x.tensors())


# A graph break of a compiled call. torch.compiler.disable would load TorchDynamo here, in 4 s.
attend_over_ranks._torchdynamo_disable = True  # type: ignore[attr-defined]
attend_over_ranks._torchdynamo_disable_msg = "attention over several ranks communicates"  # type: ignore[attr-defined]
