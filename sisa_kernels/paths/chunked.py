"""Exact SISA attention on stock kernels by chunks: any length and decay, memory linear in length.

The queries are cut into chunks over which g falls by at most ``MAX_RANGE`` (usually one chunk, the
whole sequence). Inside a chunk the decay is taken about the middle of the chunk's range. From a
chunk to the keys before it, it is taken relative to the chunk's first token, ``exp(g_i - g_start)
exp(g_start - g_j)``: both exponents are <= 0, and old keys underflow harmlessly to 0. The two
partial softmaxes are merged by their log-sum-exp; given the merged one, each part's backward is its
exact share.

With a finite clamp a document is one chunk, which is the authors' formulation. Where no stock flash
kernel serves (a GPU) exact attention is :mod:`dense`, which reads nothing of the device."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sisa_kernels.inputs import SisaInputs, spans, takes_flat
from sisa_kernels.ops import no_second_derivative, register
from sisa_kernels.paths import dense
from sisa_kernels.paths.augment import augment, augment_backward
from sisa_kernels.rotation import rotate
from sisa_kernels.scans import (
    cumulative_decay,
    cumulative_phase,
    pair_products,
    segment_middle,
    to_query_heads,
    work_dtype,
)

# Measured at b_a = +1, Ds = 128, L = 4096: gradient of log_decay within 1.6e-5 of fp64 at 80,
# 9.7e-6 at 40, 6.4e-6 at 20.
MAX_RANGE = 40.0


def chunk_bounds(g: Tensor) -> list[tuple[int, int]]:
    """Cut [0, L) greedily into (start, end) over which no head's g falls by over ``MAX_RANGE``.

    g is [B, L, G]."""
    L = g.shape[1]
    fallen = g.transpose(1, 2).reshape(-1, L).neg().contiguous()
    bounds: list[tuple[int, int]] = []
    start = 0
    while start < L:
        furthest = fallen[:, start : start + 1] + MAX_RANGE
        end = int(torch.searchsorted(fallen, furthest, right=True).min())
        bounds.append((start, end))
        start = end
    return bounds


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Softmax attention at one width W: (out [B, Lq, H, W], log-sum-exp [B, H, Lq])."""
    if dense.has_flash(q.device):
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), 0.0, causal, scale=scale
        )
        return out.transpose(1, 2), lse
    return dense.softmax(_dense_score(q, k, causal, scale), v)


def attend_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of :func:`attend`; out and lse may come from a softmax over more keys.

    Then it is these keys' share."""
    if dense.has_flash(q.device):
        dout, q, k, v, out = (x.transpose(1, 2) for x in (dout, q, k, v, out))
        backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        dq, dk, dv = backward(dout, q, k, v, out, lse, 0.0, causal, scale=scale)
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)
    score = _dense_score(q, k, causal, scale)
    dscore, dv = dense.softmax_backward(score, v, dout, out, lse)
    dq, dk = dense.products_backward(dscore.mul_(scale), q, k)
    return dq, dk, dv


def padded(x: Tensor, width: int) -> Tensor:
    """x [B, L, heads, channels] with zeros up to ``width`` channels.

    They lie side by side, as flash kernels take for granted: a pad alone keeps x's strides."""
    return F.pad(x, (0, width - x.shape[3])).contiguous()


def finite(v: Tensor) -> tuple[Tensor, Tensor]:
    """Values [B, L, G, Dv] with 0 for what is no finite number, and what they then lack of y.

    A later token has weight 0, which times NaN would be NaN. What y lacks, like v, is a constant of
    the backward: NaN from the first such token on, 0 before it."""
    return torch.where(v.isfinite(), v, 0), (v.detach() * 0).cumsum(1)


def merge(part: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The attention over two sets of keys from that over each, all as :func:`attend` returns it."""
    out, lse = part
    other_out, other_lse = other
    total = torch.logaddexp(lse, other_lse)
    share = (lse - total).exp().transpose(1, 2)[..., None]
    other_share = (other_lse - total).exp().transpose(1, 2)[..., None]
    return out * share + other_out * other_share, total


def _dense_score(q: Tensor, k: Tensor, causal: bool, scale: float) -> Tensor:
    score = dense.products(q, k).mul_(scale)
    if causal:
        above = torch.ones(score.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        score.masked_fill_(above, -math.inf)
    return score


class _Operands(NamedTuple):
    """What forward and backward share."""

    q_aug: Tensor
    k_aug: Tensor
    value: Tensor
    """v, padded to the width of the others, all in the working dtype."""
    g: Tensor
    middle: Tensor
    """Of g in each token's chunk, like g."""
    bounds: list[tuple[int, int]]
    importance: slice
    """The channels of the importance term."""
    scale: float


class _Chunk(NamedTuple):
    """A chunk of queries over the keys before it.

    :func:`augment` leaves each chunk's operands relative to the chunk's middle m. Between a chunk I
    and an earlier key j, ``exp(g_i - g_j) = [exp(m_I - g_start) e^(g_i - m_I)] [exp(g_start - m_j)
    e^(m_j - g_j)]``: one scale a side, both <= 1."""

    rows: slice
    before: slice
    past: Tensor
    """The keys before, relative to the chunk's first token."""
    scale_k: Tensor
    scale_q: Tensor


def _prepare(inputs: SisaInputs, clamp: float) -> _Operands:
    Dh = inputs.q.shape[3]
    Ds = inputs.b.shape[3]
    dtype = work_dtype(inputs.q)
    width = max(Dh + Ds, inputs.v.shape[3])
    g = cumulative_decay(inputs.log_decay)
    L = g.shape[1]
    bounds = [(0, L)]
    if clamp == math.inf:
        bounds = chunk_bounds(g)
    starts = [start for start, _ in bounds]
    q_aug, k_aug = augment(inputs.scores(), starts, clamp, width, dtype)
    value = padded(inputs.v.to(dtype), width)
    middle = segment_middle(g, starts)
    return _Operands(q_aug, k_aug, value, g, middle, bounds, slice(Dh, Dh + Ds), Dh**-0.5)


def _chunks(x: _Operands) -> Iterator[_Chunk]:
    dtype = x.k_aug.dtype
    past = x.k_aug.clone() if len(x.bounds) > 1 else x.k_aug
    for start, end in x.bounds:
        before = slice(0, start)
        first = slice(start, start + 1)
        scale_k = (x.g[:, first] - x.middle[:, before]).exp().to(dtype)[..., None]
        scale_q = (x.middle[:, first] - x.g[:, first]).exp().to(dtype)[..., None]
        keys = x.k_aug[:, before, :, x.importance]
        torch.mul(keys, scale_k, out=past[:, before, :, x.importance])
        yield _Chunk(slice(start, end), before, past[:, before], scale_k, scale_q)


def _scaled(x: Tensor, scale: Tensor, importance: slice) -> Tensor:
    """A copy of x with its importance channels multiplied by ``scale``."""
    x = x.clone()
    x[..., importance] *= to_query_heads(scale, x.shape[2])
    return x


def _is_dense(inputs: SisaInputs, clamp: float) -> bool:
    return clamp == math.inf and not dense.has_flash(inputs.q.device)


def _apart(
    inputs: SisaInputs, cu_seqlens: Tensor | None, clamp: float
) -> list[tuple[slice, SisaInputs]]:
    """Rows and inputs of what is attended to on its own: documents, or some that are a mask."""
    L = inputs.q.shape[1]
    if _is_dense(inputs, clamp):
        parts = dense.apart(cu_seqlens, L)
    else:
        parts = [(rows, None) for rows in spans(cu_seqlens, L)]
    return [(rows, inputs.rows(rows)._replace(cu_seqlens=bounds)) for rows, bounds in parts]


def _dense_operands(x: SisaInputs) -> tuple[dense.Operands, Tensor, Tensor]:
    """What :mod:`dense` takes, and R(Phi) by its cosine and sine [B, L, G, Ds / 2]."""
    dtype = work_dtype(x.q)
    q, k, v, b, c = (t.to(dtype) for t in x[:5])
    if x.rotary is not None:
        q, k = (rotate(t, *(table[:, None] for table in x.rotary)) for t in (q, k))
    cos, sin = cumulative_phase(x.theta, dtype)
    c = rotate(c, *(to_query_heads(table, q.shape[2]) for table in (cos, sin)))
    c *= x.lam.to(dtype)[:, None]
    g = cumulative_decay(x.log_decay)
    return dense.Operands(q, k, v, g, c, rotate(b, cos, sin), x.cu_seqlens), cos, sin


def _dense_backward(dy: Tensor, y: Tensor, lse: Tensor, inputs: SisaInputs) -> tuple[Tensor, ...]:
    """Gradients of q .. lam, of :func:`dense.attend`."""
    x, cos, sin = _dense_operands(inputs)
    dq, dk, dv, dlog_decay, (dc, db, dtheta) = dense.attend_backward(x, dy, y, lse)
    if inputs.rotary is not None:
        cos_q, sin_q = (table[:, None] for table in inputs.rotary)
        dq, dk = (rotate(t, cos_q, -sin_q) for t in (dq, dk))
    dc = rotate(dc, *(to_query_heads(table, dc.shape[2]) for table in (cos, -sin)))
    # Of c as it was given, so that lam = 0 divides nothing.
    dlam = (dc * inputs.c).sum((0, 1, 3))
    dc *= inputs.lam.to(dc.dtype)[:, None]
    grads = dq, dk, dv, rotate(db, cos, -sin), dc, dlog_decay, dtheta, dlam
    return tuple(grad.to(t.dtype).contiguous() for grad, t in zip(grads, inputs.tensors()))


@takes_flat
def chunked_eager(
    inputs: SisaInputs,
    cu_seqlens: Tensor | None,
    clamp: float,
) -> tuple[Tensor, Tensor]:
    """(y [B, L, H, Dv], log-sum-exp [B, H, L]), exact where ``clamp`` is inf.

    Shapes as in :func:`sisa_kernels.sisa_attention`, ``cos`` and ``sin`` its ``rotary``. Half
    precision is computed in fp32, and y stays fp32 for the backward: augmented operands rounded to
    bf16 would cost up to 2.7e-3 of y (1e-2 of a row), and bf16 flash is slow on CPUs without bf16
    matrix hardware. Past the last document y is 0 and the log-sum-exp -inf."""
    B, L, H, _ = inputs.q.shape
    work = work_dtype(inputs.q)
    y = inputs.q.new_zeros(B, L, H, inputs.v.shape[3], dtype=work)
    lse = inputs.q.new_full((B, H, L), -math.inf, dtype=work)
    for rows, document in _apart(inputs, cu_seqlens, clamp):
        _attend_document(document, clamp, y[:, rows], lse[..., rows])
    return y, lse


def _attend_document(inputs: SisaInputs, clamp: float, y: Tensor, lse: Tensor) -> None:
    """Write the attention of one document to y and lse."""
    if _is_dense(inputs, clamp):
        for into, found in zip((y, lse), dense.attend(_dense_operands(inputs)[0])):
            into.copy_(found)
        return
    clean, lacking = finite(inputs.v)
    x = _prepare(inputs._replace(v=clean), clamp)
    Dv = inputs.v.shape[3]
    for chunk in _chunks(x):
        rows = chunk.rows
        query = x.q_aug[:, rows]
        part = attend(query, x.k_aug[:, rows], x.value[:, rows], True, x.scale)
        if rows.start:
            query = _scaled(query, chunk.scale_q, x.importance)
            older = attend(query, chunk.past, x.value[:, chunk.before], False, x.scale)
            part = merge(part, older)
        y[:, rows] = part[0][..., :Dv]
        lse[..., rows] = part[1]
    y += to_query_heads(lacking, y.shape[2])


def _chunked_fake(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor | None) -> tuple[Tensor, Tensor]:
    B, L, H, _ = q.shape
    dtype = work_dtype(q)
    return q.new_empty(B, L, H, v.shape[3], dtype=dtype), q.new_empty(B, H, L, dtype=dtype)


@takes_flat
def chunked_backward_eager(
    dy: Tensor,
    y: Tensor,
    lse: Tensor,
    inputs: SisaInputs,
    cu_seqlens: Tensor | None,
    clamp: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of :func:`chunked_eager`, from its inputs and outputs alone."""
    if cu_seqlens is None:
        return _document_backward(dy, y, lse, inputs, clamp)
    dq, dk, dv, db, dc, dlog_decay, dtheta, dlam = (x.new_zeros(x.shape) for x in inputs.tensors())
    for rows, document in _apart(inputs, cu_seqlens, clamp):
        saved = (dy[:, rows], y[:, rows], lse[..., rows])
        *grads, of_lam = _document_backward(*saved, document, clamp)
        for total, grad in zip((dq, dk, dv, db, dc, dlog_decay, dtheta), grads):
            total[:, rows] = grad
        dlam += of_lam
    return dq, dk, dv, db, dc, dlog_decay, dtheta, dlam


def _document_backward(
    dy: Tensor, y: Tensor, lse: Tensor, inputs: SisaInputs, clamp: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    if _is_dense(inputs, clamp):
        dq, dk, dv, db, dc, dlog_decay, dtheta, dlam = _dense_backward(dy, y, lse, inputs)
        return dq, dk, dv, db, dc, dlog_decay, dtheta, dlam
    x = _prepare(inputs, clamp)
    dout, out = (padded(t, x.value.shape[3]) for t in (dy, y))
    B, _, G = x.g.shape
    # dL/dg and dL/dPhi that each chunk's keys have through later chunks, summed.
    decay_carry = x.g.new_zeros(B, len(x.bounds), G)
    phase_carry = x.g.new_zeros(B, len(x.bounds), G, inputs.b.shape[3] // 2)
    if len(x.bounds) == 1:
        grads = attend_backward(x.q_aug, x.k_aug, x.value, True, dout, out, lse, x.scale)
    else:
        grads = _backward_by_chunks(x, (dout, out, lse), decay_carry, phase_carry)
    dq_aug, dk_aug, dv = grads
    starts = [start for start, _ in x.bounds]
    dq, dk, db, dc, dlog_decay, dtheta, dlam = augment_backward(
        dq_aug, dk_aug, inputs.scores(), starts, clamp, decay_carry, phase_carry
    )
    v = inputs.v
    dv = dv[..., : v.shape[3]].to(v.dtype).contiguous()
    return dq, dk, dv, db, dc, dlog_decay, dtheta, dlam


def _backward_by_chunks(
    x: _Operands,
    softmax: tuple[Tensor, Tensor, Tensor],
    decay_carry: Tensor,
    phase_carry: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq_aug, dk_aug, dv) given (dL/dout, out, log-sum-exp) of all; adds to the carries."""
    lasts = [end - 1 for _, end in x.bounds]
    dout, out, lse = softmax
    dq_aug, dk_aug, dv = (torch.zeros_like(t) for t in (x.q_aug, x.k_aug, x.value))
    for n, chunk in enumerate(_chunks(x)):
        rows = chunk.rows
        before = chunk.before
        of_rows = (dout[:, rows], out[:, rows], lse[..., rows], x.scale)
        query = x.q_aug[:, rows]
        grads = attend_backward(query, x.k_aug[:, rows], x.value[:, rows], True, *of_rows)
        for total, grad in zip((dq_aug, dk_aug, dv), grads):
            total[:, rows] += grad
        if rows.start:
            query = _scaled(query, chunk.scale_q, x.importance)
            dq, dk, dv_past = attend_backward(
                query, chunk.past, x.value[:, before], False, *of_rows
            )
            dg, dphase = pair_products(dk[..., x.importance], chunk.past[..., x.importance])
            decay_carry[:, :n] += dg.cumsum(1)[:, lasts[:n]]
            phase_carry[:, :n] -= dphase.cumsum(1)[:, lasts[:n]]
            dq_aug[:, rows] += _scaled(dq, chunk.scale_q, x.importance)
            dk_aug[:, before] += _scaled(dk, chunk.scale_k, x.importance)
            dv[:, before] += dv_past
    return dq_aug, dk_aug, dv


def _chunked_backward_fake(dy: Tensor, y: Tensor, lse: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in inputs[:8])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.clamp = inputs
    ctx.save_for_backward(*output, *tensors)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, dy: Tensor, _dlse: Tensor) -> tuple[Tensor | None, ...]:
    y, lse, *inputs = ctx.saved_tensors
    return *chunked_backward(dy, y, lse, *inputs, ctx.clamp), None, None, None, None


chunked_op = register("chunked", chunked_eager, _chunked_fake, _backward, _save)
chunked_backward = register(
    "chunked_backward", chunked_backward_eager, _chunked_backward_fake, no_second_derivative
)


def chunked(inputs: SisaInputs, clamp: float = math.inf) -> Tensor:
    """SISA attention by documents: y [B, L, H, Dv] in q's dtype, exact unless there is a clamp."""
    return chunked_op(*inputs.flat(), inputs.cu_seqlens, clamp)[0].to(inputs.q.dtype)
