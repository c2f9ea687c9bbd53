"""The operands of SISA attention as records, and the choices that go with them."""

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

Rotary = tuple[Tensor, Tensor]
Mode = Literal["exact", "clamped"]
Backend = Literal["auto", "native", "triton", "one_call", "chunked", "reference", "flash", "sdpa"]
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


def by_document(cu_seqlens: Tensor | None, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Each packed document's part of the tensors [1, L, ...]; without cu_seqlens the tensors."""
    if cu_seqlens is None:
        return [tensors]
    lengths = cu_seqlens.diff().tolist()
    return list(zip(*(x.split(lengths, 1) for x in tensors)))


def joined(pieces: list[Tensor]) -> Tensor:
    """The results of :func:`by_document`, as one sequence again; one alone is not copied."""
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

    def documents(self) -> list["SisaInputs"]:
        """The inputs of each packed document on its own."""
        if self.cu_seqlens is None:
            return [self]
        parts = by_document(self.cu_seqlens, *self[:7])
        tables: list[Rotary | None] = [None] * len(parts)
        if self.rotary is not None:
            split = by_document(self.cu_seqlens, *(table[None] for table in self.rotary))
            tables = [(cos[0], sin[0]) for cos, sin in split]
        return [
            SisaInputs._make((*part, self.lam, table, None)) for part, table in zip(parts, tables)
        ]


# The fields of SisaInputs that have a gradient.
NAMES = SisaInputs._fields[:8]
