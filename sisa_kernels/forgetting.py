"""Forgetting attention, the additive score bias of FoX and ALiBi, exact at any length and decay.

``s_ij = q_i.k_j / sqrt(Dh) + g_i - g_j``. The softmax of a row forgets a constant of the row, so
that ``ref - g_j`` does, on the keys alone: a channel for each query head of the key's group,
against a constant in the query, on stock attention kernels. A bias is rounded in proportion to its
size; hence queries are cut into chunks over which g falls by at most ``chunked.MAX_RANGE``, ref in
the middle of a chunk's range. The keys that a chunk can see have small biases, old keys large
negative ones whose rounding nothing sees; nothing overflows. The Triton kernel could add g_i - g_j
to its fp32 scores as it multiplies by the decay; that is not built."""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from sisa_kernels.cache import TokenCache, refuse_gradients
from sisa_kernels.checks import check_forgetting
from sisa_kernels.distributed.attention import attend_over_ranks, find_place
from sisa_kernels.distributed.layout import SequenceLayout
from sisa_kernels.distributed.local import Native, Softmax, row_sums
from sisa_kernels.inputs import Operands, Rotary, by_document, is_grouped, spans
from sisa_kernels.ops import (
    no_second_derivative,
    of_one_dtype,
    refuse_forward_mode,
    register,
    without_autocast,
)
from sisa_kernels.paths import chunked, dense, native
from sisa_kernels.rotation import rotate
from sisa_kernels.scans import cumulative_decay, to_query_heads, work_dtype
from sisa_kernels.step import extend, held_by

# Queries a call in half precision: over them g falls by less than 2^14 unless its mean step passes
# -8.
HALF_CHUNK = 2048
HALF_UNIT = 256.0  # the query's constant there: keeps a bias of 10^6 within fp16
HALF_PARTS = 3  # bf16 numbers that together hold a bias to fp32


def alibi_slopes(heads: int, device: torch.device | str | None = None) -> Tensor:
    """ALiBi's slopes (arXiv 2108.12409, section 3), [heads] fp32: ``log_forget = -slopes``.

    For a power of two of heads ``2^(-8h/heads)``, h = 1 .. heads; for other numbers those of the
    power of two below, then every other one of twice that power's. Raises ValueError for less than
    one head."""
    if heads < 1:
        raise ValueError(f"heads must be at least 1, got {heads}")
    power = 2 ** (heads.bit_length() - 1)
    steps = torch.arange(1, power + 1, dtype=torch.float32, device=device) * (8 / power)
    odd = 2 * torch.arange(heads - power, dtype=torch.float32, device=device) + 1
    between = odd * (4 / power)
    return torch.cat((steps, between)).neg().exp2()


def forgetting_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_forget: Tensor,
    *,
    rotary: Rotary | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
    group: ProcessGroup | None = None,
    layout: SequenceLayout | None = None,
) -> Tensor:
    """Causal softmax attention with a forget gate (FoX); ALiBi with :func:`alibi_slopes`.

    ``s_ij = q_i.k_j / sqrt(Dh) + g_i - g_j`` for i >= j, ``y_i = sum_j softmax_j(s_ij) v_j`` (arXiv
    2503.02130, section 3); g is the running sum of ``log_forget``. With fewer key heads than query
    heads, head h uses key head h // (H/G). Returns y [B, L, H, Dv] in q's dtype, differentiable in
    q, k, v and log_forget.

    Args:
        q: queries [B, L, H, Dh], fp32, bf16, fp16 or fp64.
        k: keys [B, L, G, Dh] in q's dtype; G divides H.
        v: values [B, L, G, Dv] in q's dtype.
        log_forget: natural log of each query head's forget gate, [B, L, H] fp32, <= 0; below -1000
            it counts as -1000, whose exp is 0 (-inf: the token forgets all before it).
        rotary: (cos, sin) of the positions, each [L, Dh/2] fp32, applied to q and k inside; None
            (as in FoX and ALiBi): no RoPE.
        cu_seqlens: [documents + 1] int32 or int64, rising from 0 to at most L: documents packed
            into one sequence (B = 1), where g and attention restart at each. A document may be
            empty; past the last bound y and the gradients are 0.
        backend: "auto": "native" on a CPU (in fp64, and without the compiled library, "chunked"),
            elsewhere "chunked"; "native", the compiled kernel that also runs SISA; "chunked", stock
            attention kernels by query chunks.
        group, layout: one sequence over several ranks, as in :func:`sisa_kernels.sisa_attention`.

    For fp64, pass log_forget and rotary in fp64 or fp32. On a CPU half precision is computed in
    fp32; on a GPU by stock flash kernels (:func:`half_document`).

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype, device or range; the
            message names it. The range of log_forget is checked for CPU tensors only, the bounds in
            cu_seqlens as in :func:`sisa_kernels.sisa_attention`.
    """
    q, k, v = of_one_dtype(q, k, v)
    place = find_place(group, layout, q, cu_seqlens)
    documents = cu_seqlens if place is None else None
    check_forgetting(q, k, v, log_forget, rotary, documents, empty=place is not None)
    refuse_forward_mode(q, k, v, log_forget)
    compiled = native.choose_plain(backend, "chunked", q, v, "forgetting attention", forgets=True)
    with without_autocast(q.device):
        if place is not None:
            x = Operands(q, k, v, log_decay=log_forget, rotary=rotary)
            return attend_over_ranks(x, place, Native if compiled else StockPieces)
        if compiled:
            return native.attend_plain(q, k, v, rotary, cu_seqlens, log_forget)
        return _on_stock_kernels(q, k, v, log_forget, rotary, cu_seqlens)


def _on_stock_kernels(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_forget: Tensor,
    rotary: Rotary | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    dtype = q.dtype
    half = q.device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)
    if rotary is not None:
        cos, sin = (table[:, None] for table in rotary)
        q, k = (rotate(x, cos, sin) for x in (q, k))
    q, k, v = (x.to(dtype if half else work_dtype(x)) for x in (q, k, v))
    if half:
        return by_document(
            lambda rows: half_document(*(x[:, rows] for x in (q, k, v, log_forget))),
            cu_seqlens,
            q.shape[1],
        )
    return forgetting(q, k, v, log_forget, cu_seqlens)[0].to(dtype)


def forgetting_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_forget: Tensor,
    cache: TokenCache,
    *,
    lengths: list[int] | None = None,
    backend: str = "auto",
) -> Tensor:
    """Append T new tokens to ``cache`` and return their attention over all it then holds.

    :func:`forgetting_attention`, continued: y [B, T, H, Dv] in q's dtype, without a gradient. The
    cache holds k, v and g: a score's bias ``g_i - g_j`` is formed when it is used, from running
    sums in fp64 (8 bytes a token and query head). The first tokens run through
    :func:`forgetting_attention`; one, and several, over a cache by the same kernels as
    :func:`sisa_kernels.sisa_decode`, or where "native" does not run by their T (n + T) scores.

    Args:
        q, k, v, log_forget: as in :func:`forgetting_attention`, [B, T, heads(, channels)]; B, the
            heads, the widths, the dtype and the device stay those of the first call.
        cache: a :class:`TokenCache` of B sequences, changed in place; after an error it is as it
            was.
        lengths: for prompts of unequal length, into an empty cache: row r's tokens are its first
            ``lengths[r]``, the rest is (finite) padding on the right, whose results mean nothing.
        backend: as in :func:`forgetting_attention`.

    Raises:
        TypeError, ValueError: as :func:`forgetting_attention` and :meth:`TokenCache.append`, the
            latter for q, too.
    """
    if not isinstance(cache, TokenCache):
        raise TypeError(f"cache must be a sisa_kernels.TokenCache, got {type(cache).__name__}")
    q, k, v = of_one_dtype(q, k, v)
    check_forgetting(q, k, v, log_forget, None, None)
    refuse_gradients({"q": q, "log_forget": log_forget})
    new = {"k": k, "v": v, "g": log_forget.double()}
    cache.check(new, lengths)
    if not any(cache.lengths):
        y = forgetting_attention(q, k, v, log_forget, backend=backend)
        cache.append(lengths, k=k, v=v, g=cumulative_decay(log_forget))
        return y
    compiled = native.choose_plain(backend, "chunked", q, v, "forgetting attention", forgets=True)
    cache.reserve(new)
    with without_autocast(q.device):
        y = extend(Operands(q, k, v, log_decay=log_forget), held_by(cache), compiled=compiled)
    cache.advance(q.shape[1], None)  # last: after an error the cache is as it was
    return y


def half_document(q: Tensor, k: Tensor, v: Tensor, log_forget: Tensor) -> Tensor:
    """Forgetting attention of one document, y [B, L, H, Dv], by stock SDPA in half precision.

    Each bias is spread over ``HALF_PARTS`` channels. No value is read from the device: chunks have
    a fixed length. A bias is off by 2^-24 of its size, which is the rounding of a logit of 1 in
    bf16 where g falls by 2^15 in a chunk. The gradient of log_forget is a running sum over tokens
    in which the rounding of y inside any half-precision flash backward adds up: in bf16 0.7 % at
    half-lives of 100 tokens, 14 % at one token (L = 257 and 2,500, against 0.6 % and 10 % for exact
    arithmetic on a rounded y)."""
    L, H, Dh = q.shape[1:]
    G = k.shape[2]
    Dv = v.shape[3]
    g = cumulative_decay(log_forget)
    # Flash kernels take one width, a multiple of 8.
    width = -(-max(Dh + HALF_PARTS * H // G, Dv) // 8) * 8
    v, lacking = chunked.finite(v)
    unit = (HALF_UNIT * _head_channels(q, G)).repeat(1, HALF_PARTS).expand(*q.shape[:2], -1, -1)
    with_unit = torch.cat((q, unit), 3)
    query, value = (chunked.padded(x, width).transpose(1, 2) for x in (with_unit, v))
    pieces = []
    for start in range(0, L, HALF_CHUNK):
        end = min(start + HALF_CHUNK, L)
        by_key_head = (_middle(g, start, end) - g[:, :end]).unflatten(2, (G, -1))
        parts = _in_parts(by_key_head * (math.sqrt(Dh) / HALF_UNIT), q.dtype)
        key = chunked.padded(torch.cat((k[:, :end], *parts), 3), width).transpose(1, 2)
        causal = {"attn_mask": _lower_right(end - start, end)} if start else {"is_causal": True}
        rows = query[:, :, start:end], key, value[:, :, :end]
        pieces.append(
            F.scaled_dot_product_attention(
                *rows, scale=Dh**-0.5, enable_gqa=is_grouped(H, G), **causal
            )
        )
    return torch.cat(pieces, 2)[..., :Dv].transpose(1, 2) + to_query_heads(lacking, H)


def _in_parts(bias: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """``HALF_PARTS`` tensors of ``dtype`` whose sum is the bias; the first carries the gradient."""
    rest = bias.clamp(min=-6e4).float()  # fp16's lowest; in the score -2e6
    parts = [rest.to(dtype)]
    for _ in range(1, HALF_PARTS):
        rest = (rest - parts[-1]).detach()
        parts.append(rest.to(dtype))
    return parts


def _lower_right(queries: int, keys: int) -> Tensor:
    """The causal mask that aligns the last query with the last key; SDPA's is_causal the first."""
    from torch.nn.attention.bias import causal_lower_right  # here: it loads TorchDynamo, 4 seconds

    return causal_lower_right(queries, keys)


def _head_channels(q: Tensor, G: int) -> Tensor:
    """[H, H/G]: 1 in the channel of the query head's bias among those of its key head."""
    return torch.eye(q.shape[2] // G, dtype=q.dtype, device=q.device).repeat(G, 1)


def _middle(g: Tensor, start: int, end: int) -> Tensor:
    """The middle of each head's range of g over a chunk, [B, 1, H]; a constant of the backward."""
    return ((g[:, start : start + 1] + g[:, end - 1 : end]) / 2).detach()


def _operands(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, slice]:
    """Queries with their constants, keys and values, of one width; and the biases' channels."""
    H, Dh = q.shape[2:]
    G = k.shape[2]
    bias = slice(Dh, Dh + H // G)
    width = max(bias.stop, v.shape[3])
    q_aug, k_aug, value = (chunked.padded(x, width) for x in (q, k, v))
    q_aug[..., bias] = math.sqrt(Dh) * _head_channels(q, G)
    return q_aug, k_aug, value, bias


def _chunks(k_aug: Tensor, log_forget: Tensor, bias: slice) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of each chunk, the keys up to its end holding their biases about it."""
    G = k_aug.shape[2]
    g = cumulative_decay(log_forget)
    for start, end in chunked.chunk_bounds(g):
        relative = (_middle(g, start, end) - g[:, :end]).unflatten(2, (G, -1))
        k_aug[:, :end, :, bias] = relative.to(k_aug.dtype)
        yield start, end


def row_frames(log_forget: Tensor, cu_seqlens: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    """Rows of each chunk, and what their log-sum-exp lacks in :func:`forgetting_eager`.

    That is g_i less the middle of the chunk's range, [B, chunk, H] fp64; of dense scores
    none."""
    if not dense.has_flash(log_forget.device):
        return
    for document in spans(cu_seqlens, log_forget.shape[1]):
        g = cumulative_decay(log_forget[:, document])
        for start, end in chunked.chunk_bounds(g):
            rows = slice(document.start + start, document.start + end)
            yield rows, g[:, start:end] - _middle(g, start, end)


def forgetting_eager(
    q: Tensor, k: Tensor, v: Tensor, log_forget: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """In fp32 or fp64: (y [B, L, H, Dv], log-sum-exp [B, H, L] within a query's chunk).

    By dense scores it is that of the scores themselves. Past the last document y is 0 and it is
    -inf."""
    B, L, H, _ = q.shape
    y = q.new_zeros(B, L, H, v.shape[3])
    lse = q.new_full((B, H, L), -math.inf)
    for rows, bounds in dense.apart(cu_seqlens, L):
        query, key, value, gates = (x[:, rows] for x in (q, k, v, log_forget))
        _attend_document(query, key, value, gates, bounds, y[:, rows], lse[..., rows])
    return y, lse


def _attend_document(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_forget: Tensor,
    bounds: Tensor | None,
    y: Tensor,
    lse: Tensor,
) -> None:
    """Write the attention of one document, or by dense scores of some, to y and lse."""
    if not dense.has_flash(q.device):
        g = cumulative_decay(log_forget)
        y[:], lse[:] = dense.attend(dense.Operands(q, k, v, g, bounds=bounds))
        return
    H, Dh = q.shape[2:]
    Dv = v.shape[3]
    scale = Dh**-0.5
    v, lacking = chunked.finite(v)
    q_aug, k_aug, value, bias = _operands(q, k, v)
    for start, end in _chunks(k_aug, log_forget, bias):
        rows = slice(start, end)
        query = q_aug[:, rows]
        part = chunked.attend(query, k_aug[:, rows], value[:, rows], True, scale)
        if start:
            older = chunked.attend(query, k_aug[:, :start], value[:, :start], False, scale)
            part = chunked.merge(part, older)
        y[:, rows] = part[0][..., :Dv]
        lse[..., rows] = part[1]
    y += to_query_heads(lacking, H)


def _forgetting_fake(
    q: Tensor, k: Tensor, v: Tensor, *rest: Tensor | None
) -> tuple[Tensor, Tensor]:
    B, L, H, _ = q.shape
    return q.new_empty(B, L, H, v.shape[3]), q.new_empty(B, H, L)


def forgetting_backward_eager(
    dy: Tensor,
    y: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_forget: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of :func:`forgetting_eager`, from its inputs and outputs alone."""
    if cu_seqlens is None:
        return _document_backward(dy, y, lse, q, k, v, log_forget, None)
    dq, dk, dv, dlog_forget = (x.new_zeros(x.shape) for x in (q, k, v, log_forget))
    for rows, bounds in dense.apart(cu_seqlens, q.shape[1]):
        query, key, value, gates = (x[:, rows] for x in (q, k, v, log_forget))
        saved = dy[:, rows], y[:, rows], lse[..., rows]
        grads = _document_backward(*saved, query, key, value, gates, bounds)
        for total, grad in zip((dq, dk, dv, dlog_forget), grads):
            total[:, rows] = grad
    return dq, dk, dv, dlog_forget


def _document_backward(
    dy: Tensor,
    y: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_forget: Tensor,
    bounds: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of :func:`_attend_document`.

    With dS = dL/ds, ``dL/d log_forget_t`` is the sum of dS_ij over i >= t > j. A row of dS sums to
    0, so that all rows i of a chunk may be counted: a running sum, over the chunk's keys, of the
    gradients of their biases. It starts at the oldest keys, which have none, and ends with the
    chunk, so that rounding errors stay where they were made."""
    if not dense.has_flash(q.device):
        x = dense.Operands(q, k, v, cumulative_decay(log_forget), bounds=bounds)
        found = zip(dense.attend_backward(x, dy, y, lse)[:4], (q, k, v, log_forget))
        dq, dk, dv, dlog_forget = (grad.to(t.dtype).contiguous() for grad, t in found)
        return dq, dk, dv, dlog_forget
    Dh = q.shape[3]
    Dv = v.shape[3]
    q_aug, k_aug, value, bias = _operands(q, k, v)
    dout, out = (chunked.padded(x, value.shape[3]) for x in (dy, y))
    dq_aug, dk_aug, dv = (torch.zeros_like(x) for x in (q_aug, k_aug, value))
    dlog_forget = torch.zeros_like(log_forget, dtype=torch.float64)
    for start, end in _chunks(k_aug, log_forget, bias):
        rows = slice(start, end)
        older = slice(0, start)
        query = q_aug[:, rows]
        softmax = (dout[:, rows], out[:, rows], lse[..., rows], Dh**-0.5)
        parts = []
        for keys, causal in ((older, False), (rows, True)) if start else ((rows, True),):
            grads = chunked.attend_backward(query, k_aug[:, keys], value[:, keys], causal, *softmax)
            parts.append(grads)
            dq_aug[:, rows] += grads[0]
        dk, dv_keys = (torch.cat([part[n] for part in parts], 1) for n in (1, 2))
        dk_aug[:, :end] += dk
        dv[:, :end] += dv_keys
        dlog_forget[:, 1:end] += dk[:, :-1, :, bias].flatten(2).double().cumsum(1)
    # contiguous(): an op's results are no views of wider tensors.
    dq, dk, dv = (x.contiguous() for x in (dq_aug[..., :Dh], dk_aug[..., :Dh], dv[..., :Dv]))
    return dq, dk, dv, dlog_forget.to(log_forget.dtype)


def _forgetting_backward_fake(
    dy: Tensor, y: Tensor, lse: Tensor, *inputs: Any
) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in inputs[:4])


def _save(ctx: Any, inputs: tuple[Tensor | None, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*output, *inputs)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, dy: Tensor, _dlse: Tensor) -> tuple[Tensor | None, ...]:
    return *forgetting_backward(dy, *ctx.saved_tensors), None


forgetting = register("forgetting", forgetting_eager, _forgetting_fake, _backward, _save)
forgetting_backward = register(
    "forgetting_backward",
    forgetting_backward_eager,
    _forgetting_backward_fake,
    no_second_derivative,
)


class StockPieces:
    """FoX, ALiBi and no term on stock kernels.

    Their log-sum-exp is that within a chunk's frame; their gradient of log_forget counts on rows of
    dL/ds that sum to 0, which a part's do not."""

    keeps_own = True

    def __init__(self, bounds: Tensor, length: int):
        self.bounds = bounds

    def _operands(self, x: Operands) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        work = work_dtype(x.q)
        q, k, v = (t.to(work) for t in x[:3])
        if x.rotary is not None:
            cos, sin = (table[:, None] for table in x.rotary)
            q, k = (rotate(t, cos, sin) for t in (q, k))
        log_forget = q.new_zeros(q.shape[:3]) if x.log_decay is None else x.log_decay
        return q, k, v, log_forget

    def _frames(self, log_forget: Tensor) -> Tensor:
        """[B, H, L], 0 past the last document."""
        found = torch.zeros_like(log_forget, dtype=torch.float64)
        for rows, frame in row_frames(log_forget, self.bounds):
            found[:, rows] = frame
        return found.transpose(1, 2)

    def forward(self, x: Operands) -> Softmax:
        operands = self._operands(x)
        y, lse = forgetting_eager(*operands, self.bounds)
        return y, (lse + self._frames(operands[3])).to(lse.dtype)

    def backward(self, x: Operands, dy: Tensor, own: Softmax, merged: Softmax) -> list[Tensor]:
        operands = self._operands(x)
        y, lse = merged
        in_frame = (lse - self._frames(operands[3])).to(lse.dtype)
        dq, dk, dv, dlog = forgetting_backward_eager(dy, y, in_frame, *operands, self.bounds)
        if x.rotary is not None:
            cos, sin = (table[:, None] for table in x.rotary)
            dq, dk = (rotate(t, cos, -sin) for t in (dq, dk))
        if x.log_decay is None:
            return [dq, dk, dv]
        sums = row_sums(dy, own, merged).transpose(1, 2).double()
        for rows, _ in row_frames(operands[3], self.bounds):
            of_rows = sums[:, rows]
            dlog[:, rows] -= (of_rows.cumsum(1) - of_rows).to(dlog.dtype)
        return [dq, dk, dv, dlog]
