"""SisaInputs: the operands of SISA attention as one record, and the choices that go with them."""

from typing import Literal, NamedTuple

from torch import Tensor

Rotary = tuple[Tensor, Tensor]
Mode = Literal["exact", "clamped"]
Backend = Literal["auto", "triton", "one_call", "chunked", "reference", "flash", "sdpa"]


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
