"""Who holds which tokens of a sequence, and which pieces of it see which."""

import functools
import itertools
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

Documents = tuple[int, ...]


def _borders(length: int, pieces: int) -> tuple[int, ...]:
    """Cut [0, length) into pieces that differ by at most one token: the pieces + 1 borders."""
    return tuple(length * n // pieces for n in range(pieces + 1))


def _checked_documents(cu_seqlens: Tensor | Sequence[int] | None, length: int) -> Documents | None:
    if cu_seqlens is None:
        return None
    given = cu_seqlens.tolist() if isinstance(cu_seqlens, Tensor) else list(cu_seqlens)
    rises = all(a <= b for a, b in itertools.pairwise(given))
    if len(given) < 2 or given[0] != 0 or not rises or given[-1] > length:
        raise ValueError(
            f"cu_seqlens must rise from 0 to at most the whole length {length}, got {given}"
        )
    return tuple(given)


@dataclass(frozen=True)
class SequenceLayout:
    """A sequence cut into pieces, each owned by a rank; :meth:`balanced` and :meth:`contiguous`.

    A rank's tokens are those of its pieces, in the order of the sequence. In a call over ranks,
    ``sisa_attention(..., group=group, layout=layout)``, every rank of the group gives its own
    tokens, L = ``layout.size(rank)`` of them, ``rotary`` of ``layout.positions(rank)``, and the
    same cu_seqlens, of the whole sequence. y and all gradients are the rank's own, but for lam's,
    its share of the sum over ranks. Forward and backward communicate: all ranks run both, in the
    same order, also those without a token. In mode "exact" only, within a rank's pieces by
    "native", "triton" or "chunked"; not under torch.func; in a compiled call a graph break."""

    borders: tuple[int, ...]
    """Where pieces begin, and the sequence's end, [pieces + 1]."""
    owners: tuple[int, ...]
    """The rank of each piece."""
    ranks: int
    documents: Documents | None = None
    """Bounds of packed documents, over the whole sequence; None: one, or as each call says."""

    def __post_init__(self) -> None:
        rises = all(a <= b for a, b in itertools.pairwise(self.borders))
        if len(self.borders) != len(self.owners) + 1 or self.borders[0] != 0 or not rises:
            raise ValueError(
                f"borders must rise from 0, one more than owners, got {list(self.borders)} "
                f"of {len(self.owners)} pieces"
            )
        if not set(self.owners) <= set(range(self.ranks)):
            raise ValueError(
                f"owners must be ranks from 0 to {self.ranks - 1}, got {list(self.owners)}"
            )

    @classmethod
    def balanced(
        cls, length: int, ranks: int, cu_seqlens: Tensor | Sequence[int] | None = None
    ) -> "SequenceLayout":
        """Equal causal work: 2 ``ranks`` pieces, rank r owning the r-th from each end.

        Pieces differ by at most one token, whatever the length; with fewer tokens than pieces some
        are empty. ``cu_seqlens`` [documents + 1]: packed documents of the whole sequence, which the
        operators then take from here. Raises ValueError for a length below 1, less than one rank,
        or bounds that do not rise from 0 to at most the length."""
        if length < 1 or ranks < 1:
            raise ValueError(f"length and ranks must be at least 1, got {length} and {ranks}")
        owners = (*range(ranks), *reversed(range(ranks)))
        documents = _checked_documents(cu_seqlens, length)
        return cls(_borders(length, 2 * ranks), owners, ranks, documents)

    @classmethod
    def contiguous(
        cls, sizes: Sequence[int], cu_seqlens: Tensor | Sequence[int] | None = None
    ) -> "SequenceLayout":
        """Rank r owns the next ``sizes[r]`` tokens, which may be none: what Mamba's state likes.

        ``cu_seqlens`` as in :meth:`balanced`. Raises ValueError for negative sizes, no rank or no
        token, or wrong bounds."""
        if not sizes or min(sizes) < 0 or sum(sizes) < 1:
            raise ValueError(f"sizes must be at least 0, one positive, got {list(sizes)}")
        borders = (0, *itertools.accumulate(sizes))
        ranks = len(sizes)
        return cls(borders, tuple(range(ranks)), ranks, _checked_documents(cu_seqlens, borders[-1]))

    @property
    def length(self) -> int:
        """Tokens of the whole sequence."""
        return self.borders[-1]

    def pieces(self, rank: int) -> list[int]:
        """The pieces that ``rank`` owns, in the order of the sequence."""
        if not 0 <= rank < self.ranks:
            raise ValueError(f"rank must be from 0 to {self.ranks - 1}, got {rank}")
        return [piece for piece, owner in enumerate(self.owners) if owner == rank]

    def size(self, rank: int) -> int:
        """Tokens of a rank."""
        return sum(self.borders[n + 1] - self.borders[n] for n in self.pieces(rank))

    def positions(self, rank: int, device: torch.device | str | None = None) -> Tensor:
        """Places in the whole sequence of a rank's tokens, [size(rank)] int64, rising."""
        ranges = [
            torch.arange(self.borders[n], self.borders[n + 1], device=device)
            for n in self.pieces(rank)
        ]
        return torch.cat(ranges) if ranges else torch.arange(0, device=device)

    def shard(self, x: Tensor, rank: int, dim: int = 1) -> Tensor:
        """A rank's tokens of x, which has all of them along ``dim``; ValueError where it hasn't."""
        if x.shape[dim] != self.length:
            raise ValueError(
                f"x must have the layout's {self.length} tokens along dim {dim}, "
                f"got {list(x.shape)}"
            )
        pieces = [
            x.narrow(dim, self.borders[n], self.borders[n + 1] - self.borders[n])
            for n in self.pieces(rank)
        ]
        return torch.cat(pieces, dim) if pieces else x.narrow(dim, 0, 0)

    def unshard(self, parts: Sequence[Tensor], dim: int = 1) -> Tensor:
        """The whole x of every rank's tokens, ``parts`` in the order of ranks; inverts shard."""
        sizes = [self.size(rank) for rank in range(self.ranks)]
        given = [part.shape[dim] for part in parts]
        if given != sizes:
            raise ValueError(
                f"parts must have {sizes} tokens along dim {dim}, one a rank, got {given}"
            )
        cut: dict[int, Tensor] = {}
        for rank, part in enumerate(parts):
            pieces = self.pieces(rank)
            lengths = [self.borders[n + 1] - self.borders[n] for n in pieces]
            cut |= dict(zip(pieces, part.split(lengths, dim)))
        return torch.cat([cut[n] for n in range(len(self.owners))], dim)


class Piece(NamedTuple):
    """A piece on the rank that owns it: rows of the local tensors."""

    number: int
    """Its place among all pieces."""
    rows: slice
    head: slice
    """Of rows, those whose document began in an earlier piece."""
    tail: slice
    """Of rows, those of its last document, if that may go on behind it."""


@dataclass(frozen=True)
class Geometry:
    """Which piece sees which: a rectangle of the head of one and the tail of the other, unmasked.

    There is no other case: where no document begins between them, every query of the head sees
    every key of the tail; elsewhere nothing is seen."""

    layout: SequenceLayout
    documents: Documents
    heads: tuple[int, ...]
    """Tokens of each piece's head."""
    tails: tuple[int, ...]
    """Tokens of each piece's tail."""
    first_seen: tuple[int, ...]
    """Of each piece with a head, the first piece that holds tokens of its document, else itself."""

    def sees(self, query: int, key: int) -> bool:
        """Whether a piece's head sees an earlier piece's tail."""
        return self.first_seen[query] <= key < query and self.tails[key] > 0

    def seen_by(self, query: int) -> list[int]:
        """The pieces that a piece sees, in the order of the sequence."""
        return [key for key in range(self.first_seen[query], query) if self.tails[key]]

    def goes_on(self, piece: int) -> bool:
        """Whether the document of a piece's tail began before the piece."""
        size = self.layout.borders[piece + 1] - self.layout.borders[piece]
        return 0 < self.tails[piece] == size == self.heads[piece]

    def of(self, rank: int) -> list[Piece]:
        """A rank's pieces."""
        found = []
        start = 0
        for n in self.layout.pieces(rank):
            end = start + self.layout.borders[n + 1] - self.layout.borders[n]
            rows = slice(start, end)
            head = slice(start, start + self.heads[n])
            found.append(Piece(n, rows, head, slice(end - self.tails[n], end)))
            start = end
        return found

    def bounds_of(self, rank: int) -> list[int]:
        """Bounds of the documents' parts in a rank's pieces, a piece's border being one, too."""
        bounds = [0]
        for n in self.layout.pieces(rank):
            begin, end = self.layout.borders[n : n + 2]
            covered = min(end, self.documents[-1])
            cuts = {begin, covered, *(cut for cut in self.documents if begin < cut < covered)}
            if begin >= covered:
                continue
            for first, last in itertools.pairwise(sorted(cuts)):
                bounds.append(bounds[-1] + last - first)
        return bounds


@functools.lru_cache(maxsize=64)
def geometry(layout: SequenceLayout, documents: Documents | None) -> Geometry:
    """The geometry of a layout with packed ``documents``; None: one document."""
    documents = documents or (0, layout.length)
    heads = []
    tails = []
    first_seen = []
    for n, (begin, end) in enumerate(itertools.pairwise(layout.borders)):
        first_document = _document_of(begin, documents) if begin < end else None
        last_document = _document_of(end - 1, documents) if begin < end else None
        head = 0
        seen = n
        if first_document is not None and first_document[0] < begin:
            head = min(end, first_document[1]) - begin
            seen = bisect_right(layout.borders, first_document[0]) - 1
        heads.append(head)
        first_seen.append(seen)
        tails.append(0 if last_document is None else end - max(begin, last_document[0]))
    return Geometry(layout, documents, tuple(heads), tuple(tails), tuple(first_seen))


def _document_of(token: int, documents: Documents) -> tuple[int, int] | None:
    """The document of a token, from its first token to its end; None past the last."""
    if token >= documents[-1]:
        return None
    n = bisect_right(documents, token)
    return documents[n - 1], documents[n]
