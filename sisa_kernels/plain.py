"""Plain causal attention: what SISA and its rivals are compared with, on the same engine."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from sisa_kernels.cache import TokenCache, refuse_gradients
from sisa_kernels.checks import check_documents, check_qk, check_rotary, check_values, readable
from sisa_kernels.distributed.attention import attend_over_ranks, find_place
from sisa_kernels.distributed.layout import SequenceLayout
from sisa_kernels.distributed.local import Native
from sisa_kernels.forgetting import StockPieces
from sisa_kernels.inputs import Operands, PlainBackend, Rotary, by_document, is_grouped
from sisa_kernels.ops import of_one_dtype, refuse_forward_mode, without_autocast
from sisa_kernels.paths import native
from sisa_kernels.paths.chunked import finite
from sisa_kernels.rotation import rotate
from sisa_kernels.scans import to_query_heads
from sisa_kernels.step import extend, held_by


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    rotary: Rotary | None = None,
    cu_seqlens: Tensor | None = None,
    backend: PlainBackend = "auto",
    group: ProcessGroup | None = None,
    layout: SequenceLayout | None = None,
) -> Tensor:
    """Causal softmax attention: a Transformer's, with RoPE inside where its tables are given.

    ``y_i = sum_j softmax_j(q_i.k_j / sqrt(Dh)) v_j`` over j <= i. With fewer key heads than query
    heads, head h uses key head h // (H/G). Returns y [B, L, H, Dv] in q's dtype, differentiable in
    q, k and v.

    Args:
        q, k, v: [B, L, H, Dh], [B, L, G, Dh], [B, L, G, Dv], of one dtype: fp32, bf16, fp16, fp64.
        rotary: (cos, sin) of the positions, each [L, Dh/2] fp32, applied to q and k (interleaved
            pairs); None: already applied, or not wanted.
        cu_seqlens: [documents + 1] int32 or int64, rising from 0 to at most L: documents packed
            into one sequence (B = 1). A document may be empty; past the last bound y is 0.
        backend: "auto": "native" on a CPU (in fp64, and without the compiled library, "sdpa"),
            elsewhere "sdpa"; "native", the compiled kernel that also runs SISA; "sdpa", PyTorch's
            scaled_dot_product_attention.
        group, layout: one sequence over several ranks, as in :func:`sisa_kernels.sisa_attention`.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype, device or range, or a
            backend that cannot run; the message names it.
    """
    q, k, v = of_one_dtype(q, k, v)
    place = find_place(group, layout, q, cu_seqlens)
    check_qk(q, k, empty=place is not None)
    check_values(v, k)
    check_rotary(rotary, q)
    check_documents(cu_seqlens if place is None else None, q)
    refuse_forward_mode(q, k, v)
    compiled = native.choose_plain(backend, "sdpa", q, v, "causal attention")
    if place is not None:
        with without_autocast(q.device):
            x = Operands(q, k, v, rotary=rotary)
            return attend_over_ranks(x, place, Native if compiled else StockPieces)
    if compiled:
        with without_autocast(q.device):
            return native.attend_plain(q, k, v, rotary, cu_seqlens)
    if rotary is not None:
        cos, sin = (table[:, None] for table in rotary)
        q, k = (rotate(x, cos, sin).to(x.dtype) for x in (q, k))
    if cu_seqlens is not None and q.device.type in ("cpu", "meta") and readable(cu_seqlens) is None:
        return _masked_attention(q, k, v, cu_seqlens)
    return by_document(
        lambda rows: _stock_attention(q[:, rows], k[:, rows], v[:, rows]), cu_seqlens, q.shape[1]
    )


def causal_decode(
    q: Tensor, k: Tensor, v: Tensor, cache: TokenCache, *, rotary: Rotary | None = None
) -> Tensor:
    """Append T new tokens to a cache of keys, turned, and values that holds some; attend over all.

    :func:`causal_attention` continued by "native", which must run such operands: y [B, T, H, Dv] in
    q's dtype, without a gradient.

    Args:
        q, k, v: as in :func:`causal_attention`, [B, T, heads, channels], as the cache's.
        cache: a :class:`TokenCache` of B sequences, changed in place; after an error it is as it
            was.
        rotary: (cos, sin) of the new tokens' positions, each [T, Dh/2] or [B, T, Dh/2] fp32; None:
            already applied, or not wanted.

    Raises:
        TypeError, ValueError: as :func:`causal_attention` and :meth:`TokenCache.append`.
    """
    check_qk(q, k)
    check_values(v, k)
    check_rotary(rotary, q, by_row=True)
    refuse_gradients({"q": q})
    new = {"k": k, "v": v}
    cache.check(new, None)
    cache.reserve(new)
    with without_autocast(q.device):
        y = extend(Operands(q, k, v, rotary=rotary), held_by(cache), compiled=True)
    cache.advance(q.shape[1], None)  # last: after an error the cache is as it was
    return y


def stock_attention(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    """PyTorch's own for documents of these lengths, RoPE applied: y [B, L, H, Dv]."""
    documents = zip(*(x.split(lengths, 1) for x in (q, k, v)))
    pieces = [_stock_attention(*document) for document in documents]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)


def _stock_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Of one document; ``mask`` [L, L]: of whatever it lets each query see."""
    lacking = None
    if v.device.type == "cpu":  # on a GPU as PyTorch has it, for speed
        v, lacking = finite(v)
    grouped = is_grouped(q.shape[2], k.shape[2])
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    y = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped
    ).transpose(1, 2)
    return y if lacking is None else y + to_query_heads(lacking, y.shape[2])


def _masked_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Of packed documents with a mask [L, L], so that a compiled call takes any number of them."""
    token = torch.arange(q.shape[1], device=q.device)
    document = torch.searchsorted(cu_seqlens[1:].contiguous(), token, right=True)
    mask = (document[:, None] == document) & (token[:, None] >= token)
    y = _stock_attention(q, k, v, mask)
    return y.masked_fill((token >= cu_seqlens[-1])[:, None, None], 0)
