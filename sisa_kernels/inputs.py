"""The operands of SISA attention as records, and the choices that go with them."""

import functools
import inspect
import itertools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

Rotary = tuple[Tensor, Tensor]
Mode = Literal["exact", "clamped"]
Backend = Literal[
    "auto",
    "native",
    "triton",
    "far_and_band",
    "wide",
    "adaptive",
    "one_call",
    "chunked",
    "reference",
    "flash",
    "sdpa",
]
# Of attention without an importance term.
PlainBackend = Literal["auto", "native", "sdpa"]
MODES: tuple[str, ...] = get_args(Mode)
BACKENDS: tuple[str, ...] = get_args(Backend)
PLAIN_BACKENDS: tuple[str, ...] = get_args(PlainBackend)


def as_rotary(cos: Tensor | None, sin: Tensor | None) -> Rotary | None:
    """RoPE's tables as a registered op takes them, paired; ValueError for one without the other."""
    if cos is None and sin is None:
        return None
    if cos is None or sin is None:
        raise ValueError("cos and sin must be given together")
    return cos, sin


def is_grouped(query_heads: int, key_heads: int) -> bool:
    """Whether query heads share key heads: a bool also of a compiled call's symbolic sizes."""
    if query_heads != key_heads:  # noqa: SIM103  a branch, on which the compiler guards
        return True
    return False


def spans(cu_seqlens: Tensor | None, length: int) -> list[slice]:
    """The tokens of each packed document that has any; without cu_seqlens all ``length``."""
    if cu_seqlens is None:
        return [slice(0, length)]
    bounds = cu_seqlens.tolist()
    return [slice(start, end) for start, end in itertools.pairwise(bounds) if start < end]


def by_document(
    attend: Callable[[slice], Tensor], cu_seqlens: Tensor | None, length: int
) -> Tensor:
    """``attend(rows)`` [1, rows, ...] of each document's rows, 0 past the last one's end."""
    documents = spans(cu_seqlens, length)
    pieces = [attend(rows) for rows in documents]
    if not pieces:  # for its shape, and as a part of the graph
        pieces = [attend(slice(0, 1))[:, :0]]
    rest = length - (documents[-1].stop if documents else 0)
    if rest:
        first = pieces[0]
        pieces.append(first.new_zeros(first.shape[0], rest, *first.shape[2:]))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)


class ScoreInputs(NamedTuple):
    """What the scores of Eq. 2 are made of: :class:`SisaInputs` without the values."""

    q: Tensor
    k: Tensor
    b: Tensor
    c: Tensor
    log_decay: Tensor
    theta: Tensor
    lam: Tensor
    rotary: Rotary | None = None

    def tensors(self) -> tuple[Tensor, ...]:
        """All that gradients flow to, in the order of the operators' arguments."""
        return self[:7]

    def flat(self) -> tuple[Tensor | None, ...]:
        """As a registered op takes it: (q, k, b, c, log_decay, theta, lam, cos, sin)."""
        return *self[:7], *(self.rotary or (None, None))


class SisaInputs(NamedTuple):
    """What one call of SISA attention (Eq. 2) attends with, under the names of its arguments.

    ``sisa_attention(**inputs._asdict())`` takes it. B batch, L length, H query heads, G key heads.
    """

    q: Tensor
    """Queries [B, L, H, Dh]."""
    k: Tensor
    """Keys [B, L, G, Dh]."""
    v: Tensor
    """Values [B, L, G, Dv]."""
    b: Tensor
    """Importance keys [B, L, G, Ds]."""
    c: Tensor
    """Importance queries [B, L, H, Ds]."""
    log_decay: Tensor
    """Natural log of the decay [B, L, G] <= 0."""
    theta: Tensor
    """Phase steps [B, L, G, Ds / 2], radians."""
    lam: Tensor
    """Weight of the importance term [H]."""
    rotary: Rotary | None = None
    """RoPE's (cos, sin), each [L, Dh / 2]; None: applied already, or not wanted."""
    cu_seqlens: Tensor | None = None
    """Bounds of packed documents [documents + 1]; None: one document a row."""

    def tensors(self) -> tuple[Tensor, ...]:
        """All that gradients flow to, in the order of the operators' arguments."""
        return self[:8]

    def flat(self) -> tuple[Tensor | None, ...]:
        """As a registered op takes it: (q, k, v, b, c, log_decay, theta, lam, cos, sin)."""
        return *self[:8], *(self.rotary or (None, None))

    def scores(self) -> ScoreInputs:
        """All but the values and the documents."""
        return ScoreInputs(
            self.q, self.k, self.b, self.c, self.log_decay, self.theta, self.lam, self.rotary
        )

    def rows(self, rows: slice) -> "SisaInputs":
        """The inputs of these tokens on their own."""
        tokens = (x[:, rows] for x in self[:7])
        rotary = self.rotary and (self.rotary[0][rows], self.rotary[1][rows])
        return SisaInputs._make((*tokens, self.lam, rotary, None))


class Operands(NamedTuple):
    """Tokens and what some kind of attention takes of them; what it does not take is None.

    With all, SISA, under the names of :class:`SisaInputs`; with q, k, v and log_decay FoX or ALiBi;
    with q, k and v plain attention."""

    q: Tensor
    k: Tensor
    v: Tensor
    b: Tensor | None = None
    c: Tensor | None = None
    log_decay: Tensor | None = None
    """[B, L, G] with b; without it FoX's [B, L, H]."""
    theta: Tensor | None = None
    lam: Tensor | None = None
    rotary: Rotary | None = None
    """As in SisaInputs; of new tokens over a cache also [B, L, Dh / 2]."""

    def tensors(self) -> tuple[Tensor | None, ...]:
        """All that gradients flow to."""
        return self[:8]

    def given(self) -> list[Tensor]:
        """:meth:`tensors` without those that there are not."""
        return [x for x in self[:8] if x is not None]

    def flat(self) -> tuple[Tensor | None, ...]:
        """As a registered op takes it: (q, k, v, b, c, log_decay, theta, lam, cos, sin)."""
        return *self[:8], *(self.rotary or (None, None))

    def token(self, t: int) -> "Operands":
        """The operands of the token t."""
        parts = (None if x is None else x[:, t : t + 1] for x in self[:7])
        rotary = self.rotary
        if rotary is not None:
            rotary = (rotary[0][..., t : t + 1, :], rotary[1][..., t : t + 1, :])
        return Operands._make((*parts, self.lam, rotary))


def takes_flat(function: Callable) -> Callable:
    """``function`` of one record of operands as a registered op takes it, with that signature.

    In the place of the record stand what its ``flat()`` gives: its tensors, cos and sin."""
    signature = inspect.signature(function)
    parameters = list(signature.parameters.values())
    kinds = [parameter.annotation for parameter in parameters]
    (start,) = (n for n, kind in enumerate(kinds) if kind in (ScoreInputs, SisaInputs, Operands))
    record = kinds[start]
    tensors = record._fields[: record._fields.index("rotary")]
    flat = {name: record.__annotations__[name] for name in tensors}
    flat |= dict.fromkeys(("cos", "sin"), Tensor | None)
    cos = start + len(tensors)

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        rotary = as_rotary(*args[cos : cos + 2])
        return function(*args[:start], record(*args[start:cos], rotary), *args[cos + 2 :])

    parameters[start : start + 1] = [
        parameters[start].replace(name=name, annotation=kind) for name, kind in flat.items()
    ]
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return run


# The fields of SisaInputs that have a gradient.
NAMES = SisaInputs._fields[:8]
