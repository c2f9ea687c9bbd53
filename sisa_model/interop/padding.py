"""Padding and packing: a batch's real tokens, laid out as causal models take them, and back.

Rows of one document each have their real tokens moved to the left, where causal attention sees no
padding; documents packed into rows are put behind each other in one sequence, with their bounds."""

from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor
from typing_extensions import Unpack


@dataclass
class Layout:
    """Where the tokens of a batch [B, L] go, a batch [R, W]."""

    order: Tensor
    """[R, W]: which of the B L places, row after row, each token is taken from."""
    back: Tensor
    """[B, L]: which of the R W tokens each place gets: its own, or, padding, that of the real token
    before it in its row (before the first: of the first).
    """
    lengths: list[int] | None = None
    """Of rows of one document each (R = B): the real tokens, before padding on the right."""
    cu_seqlens: Tensor | None = None
    """[documents + 1] int32: the bounds of documents in one sequence (R = 1)."""

    def pack(self, x: Tensor) -> Tensor:
        """x [B, L, ...] as [R, W, ...]."""
        return x.flatten(0, 1)[self.order]

    def unpack(self, y: Tensor) -> Tensor:
        """y [R, W, ...] back in its places, [B, L, ...]."""
        return y.flatten(0, 1)[self.back]


class PackedBounds(TypedDict, total=False):
    """What collators send of packed documents beside ``position_ids``, which say the same."""

    cu_seq_lens_q: Tensor | None
    cu_seq_lens_k: Tensor | None
    max_length_q: int | None
    max_length_k: int | None
    seq_idx: Tensor | None


def real_tokens(attention_mask: Tensor | None, batch: int, seen: int, length: int) -> Tensor | None:
    """Which of the new tokens [B, L] bool are no padding; None: all, as far as can be read.

    Of ``attention_mask`` [B, seen + L]. ValueError for another shape, a row without a real token,
    and padding behind the ``seen`` tokens of a cache."""
    if attention_mask is None:
        return None
    if attention_mask.shape != (batch, seen + length):
        raise ValueError(
            f"attention_mask must have shape {[batch, seen + length]}, "
            f"got {list(attention_mask.shape)}"
        )
    real = attention_mask[:, seen:].bool()
    if _is_traced():
        return real
    if real.all():
        return None
    if seen:
        raise ValueError(f"attention_mask must be 1 for all tokens behind the {seen} in the cache")
    if not real.any(1).all():
        counts = real.sum(1).tolist()
        raise ValueError(f"attention_mask must leave each row at least one token, got {counts}")
    return real


def find_layout(
    real: Tensor | None, begins: Tensor | None, *, joined: bool = False
) -> Layout | None:
    """The :class:`Layout` of rows with padding or several documents; None where tokens can stay.

    Args:
        real: of :func:`real_tokens`.
        begins: of :func:`find_begins`.
        joined: put rows of one document behind each other too, rather than pad them on the right.
    """
    if begins is not None and begins.any():
        return _join(torch.ones_like(begins) if real is None else real, begins)
    if real is None:
        return None
    return _join(real, torch.zeros_like(real)) if joined else _pad_right(real)


def blank(x: Tensor, real: Tensor) -> Tensor:
    """x [B, L, ...] with zeros for padding."""
    return x.masked_fill(~real.view(*real.shape, *[1] * (x.ndim - 2)), 0)


def _is_traced() -> bool:
    """Whether values cannot be read, because the call is compiled or exported."""
    return torch.compiler.is_compiling()


def _pad_right(real: Tensor) -> Layout:
    """Each row's real tokens first, over the longest row; over all places where it is unknown."""
    batch, width = real.shape
    lengths = None
    if not _is_traced():
        lengths = real.sum(1).tolist()
        width = max(lengths)
    row = torch.arange(batch, device=real.device)[:, None]
    order = real.int().argsort(dim=1, descending=True, stable=True)[:, :width]
    back = (real.cumsum(1) - 1).clamp(min=0)
    return Layout(order + row * real.shape[1], back + row * width, lengths)


def _join(real: Tensor, begins: Tensor) -> Layout:
    """All real tokens in one sequence; each row, and each of ``begins``, begins a document."""
    counts = real.sum(1)
    first = counts.cumsum(0) - counts
    places = real.flatten().nonzero().squeeze(1)
    begin = begins.flatten()[places]
    begin[first] = True
    end = begin.new_tensor([len(places)], dtype=torch.int64)
    bounds = torch.cat((begin.nonzero().squeeze(1), end)).int()
    back = first[:, None] + (real.cumsum(1) - 1).clamp(min=0)
    return Layout(places[None], back, cu_seqlens=bounds)


def find_begins(
    shape: tuple[int, int],
    position_ids: Tensor | None,
    real: Tensor | None,
    **bounds: Unpack[PackedBounds],
) -> Tensor | None:
    """The tokens that begin a further document of their row, [B, L] bool; None: none are named.

    Args:
        shape: (B, L).
        position_ids: [B or 1, L], rising by one within a document, and falling where one begins.
        real: of :func:`real_tokens`.
        bounds: cu_seq_lens_q or _k [documents + 1] (B = 1), seq_idx [B, L]; as transformers' and
            TRL's collators send them. Lengths of the longest add nothing, and are not read.

    Raises:
        TypeError, ValueError: naming the argument, for an unknown one, another shape, a position
            left out, and for arguments that name different documents.
    """
    if unknown := bounds.keys() - PackedBounds.__annotations__.keys():
        raise TypeError(f"forward() got an unexpected keyword argument {min(unknown)!r}")
    found = {}
    if position_ids is not None:
        _check_rows("position_ids", position_ids, shape)
        found["position_ids"] = _restarts(position_ids.expand(shape), real)
    if (ends := bounds.get("cu_seq_lens_q")) is not None:
        found["cu_seq_lens_q"] = _inner_bounds("cu_seq_lens_q", ends, shape)
    if (ends := bounds.get("cu_seq_lens_k")) is not None:
        found["cu_seq_lens_k"] = _inner_bounds("cu_seq_lens_k", ends, shape)
    if (index := bounds.get("seq_idx")) is not None:
        _check_rows("seq_idx", index, shape)
        found["seq_idx"] = index.diff(dim=1, prepend=index[:, :1]) != 0
    if not found:
        return None
    (name, begins), *others = found.items()
    for other, same in others:
        if not torch.equal(begins, same):
            raise ValueError(f"{name} and {other} must name the same documents")
    return begins


def _check_rows(name: str, x: Tensor, shape: tuple[int, int]) -> None:
    batch, length = shape
    if x.shape not in {(batch, length), (1, length)} or x.is_floating_point():
        raise ValueError(
            f"{name} must be integers of shape {[batch, length]}, got {x.dtype} {list(x.shape)}"
        )


def _restarts(position_ids: Tensor, real: Tensor | None) -> Tensor:
    """Where positions [B, L] fall; ValueError where they skip one."""
    if real is None:
        step = position_ids.diff(dim=1, prepend=position_ids[:, :1] - 1)
    else:
        places = torch.arange(real.shape[1], device=real.device).where(real, -1)
        before = places.cummax(1).values.roll(1, 1)  # the real token before each, or -1
        before[:, 0] = -1
        step = position_ids - position_ids.gather(1, before.clamp(min=0))
        step = step.masked_fill(~real | (before < 0), 1)
    if not _is_traced() and (step > 1).any():
        row, column = (step > 1).nonzero()[0].tolist()
        raise ValueError(
            "position_ids must rise by one within a document and fall back where the next begins, "
            f"got a step of {int(step[row, column])} at [{row}, {column}]"
        )
    return step < 1


def _inner_bounds(name: str, cu_seqlens: Tensor, shape: tuple[int, int]) -> Tensor:
    """The bounds [documents + 1] but the first and last, as [1, L] bool."""
    batch, length = shape
    if batch != 1 or cu_seqlens.ndim != 1 or cu_seqlens[[0, -1]].tolist() != [0, length]:
        raise ValueError(
            f"{name} must rise from 0 to the length {length} of one row, got {cu_seqlens.tolist()} "
            f"with batch {batch}"
        )
    begins = torch.zeros(1, length + 1, dtype=torch.bool, device=cu_seqlens.device)
    begins[0, cu_seqlens[1:].long()] = True
    return begins[:, :length]
