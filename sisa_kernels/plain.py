"""Plain causal attention: what SISA and its rivals are compared with, on the same engine."""

import torch
import torch.nn.functional as F
from torch import Tensor

from sisa_kernels.checks import check_documents, check_qk, check_rotary, check_values
from sisa_kernels.inputs import PlainBackend, Rotary
from sisa_kernels.ops import refuse_forward_mode, without_autocast
from sisa_kernels.paths import native
from sisa_kernels.rotation import rotate


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    rotary: Rotary | None = None,
    cu_seqlens: Tensor | None = None,
    backend: PlainBackend = "auto",
) -> Tensor:
    """Causal softmax attention: a Transformer's, with RoPE inside where its tables are given.

    ``y_i = sum_j softmax_j(q_i.k_j / sqrt(Dh)) v_j`` over j <= i. With fewer key heads than query
    heads, head h uses key head h // (H/G). Returns y [B, L, H, Dv] in q's dtype, differentiable in
    q, k and v.

    Args:
        q, k, v: [B, L, H, Dh], [B, L, G, Dh], [B, L, G, Dv], of one dtype: fp32, bf16, fp16, fp64.
        rotary: (cos, sin) of the positions, each [L, Dh/2] fp32, applied to q and k (interleaved
            pairs); None: already applied, or not wanted.
        cu_seqlens: [documents + 1] int32: documents packed into one sequence (B = 1).
        backend: "auto": "native" on a CPU (in fp64, and without the compiled library, "sdpa"),
            elsewhere "sdpa"; "native", the compiled kernel that also runs SISA; "sdpa", PyTorch's
            scaled_dot_product_attention.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype, device or range, or a
            backend that cannot run; the message names it.
    """
    check_qk(q, k)
    check_values(v, k)
    check_rotary(rotary, q)
    check_documents(cu_seqlens, q)
    refuse_forward_mode(q, k, v)
    if native.choose_plain(backend, "sdpa", q, v, "causal attention"):
        with without_autocast(q.device):
            return native.attend_plain(q, k, v, rotary, cu_seqlens)
    if rotary is not None:
        cos, sin = (table[:, None] for table in rotary)
        q, k = (rotate(x, cos, sin).to(x.dtype) for x in (q, k))
    lengths = [q.shape[1]] if cu_seqlens is None else cu_seqlens.diff().tolist()
    return stock_attention(q, k, v, lengths)


def stock_attention(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    """PyTorch's own for documents of these lengths, RoPE applied: y [B, L, H, Dv]."""
    grouped = q.shape[2] != k.shape[2]
    documents = zip(*(x.transpose(1, 2).split(lengths, 2) for x in (q, k, v)))
    pieces = [
        F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        for q, k, v in documents
    ]
    return (pieces[0] if len(pieces) == 1 else torch.cat(pieces, 2)).transpose(1, 2)
