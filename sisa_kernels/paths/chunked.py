"""Exact SISA attention from stock attention kernels: any length, any decay, memory linear in the
length.

The queries are cut into chunks over which g falls by at most ``MAX_RANGE`` (usually one chunk, the
whole sequence). Inside a chunk the decay is taken about the middle of the chunk's range. From a
chunk to the keys before it, it is taken relative to the chunk's first token, ``exp(g_i - g_start)
exp(g_start - g_j)``: both exponents are <= 0, and old keys underflow harmlessly to 0. The two
partial softmaxes are merged by their log-sum-exp; given the merged one, each part's backward is its
exact share."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sisa_kernels.ops import no_second_derivative
from sisa_kernels.paths.augment import augment, augment_backward
from sisa_kernels.scans import (
    cumulative_decay,
    pair_products,
    segment_middle,
    to_query_heads,
    work_dtype,
)

# Measured at b_a = +1, Ds = 128, L = 4096: gradient of log_decay within 1.6e-5 of fp64 at 80,
# 9.7e-6 at 40, 6.4e-6 at 20.
MAX_RANGE = 40.0
# where scores are held densely (no CPU flash kernel), a chunk's rows x keys bounds the memory
MAX_DENSE_CHUNK = 512


def chunk_bounds(g: Tensor, max_length: int) -> list[tuple[int, int]]:
    """Cut [0, L) greedily into (start, end) pieces over which no head's g [B, L, G] falls by more
    than ``MAX_RANGE``.
    """
    L = g.shape[1]
    fall = g.transpose(1, 2).reshape(-1, L).neg().contiguous()
    bounds, start = [], 0
    while start < L:
        end = int(
            torch.searchsorted(fall, fall[:, start : start + 1] + MAX_RANGE, right=True).min()
        )
        bounds.append((start, min(end, start + max_length)))
        start = bounds[-1][1]
    return bounds


def has_flash(device: torch.device) -> bool:
    """Whether stock flash attention here takes any width and dtype and returns its log-sum-exp;
    elsewhere scores are dense.
    """
    return device.type == "cpu"


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Softmax attention of operands [B, L, heads, W] of one width W: (out [B, Lq, H, W],
    log-sum-exp [B, H, Lq]).
    """
    if has_flash(q.device):
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), 0.0, causal, scale=scale
        )
        return out.transpose(1, 2), lse
    score = _dense_score(q, k, causal, scale)
    out = torch.einsum("bgrij,bjgw->bigrw", score.softmax(-1), v)
    return out.flatten(2, 3), score.logsumexp(-1).flatten(1, 2)


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
    """(dq, dk, dv) of :func:`attend`; out and lse may come from a softmax over more keys, which
    gives these keys' share.
    """
    if has_flash(q.device):
        dout, q, k, v, out = (x.transpose(1, 2) for x in (dout, q, k, v, out))
        backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        dq, dk, dv = backward(dout, q, k, v, out, lse, 0.0, causal, scale=scale)
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)
    split = (k.shape[2], -1)
    weight = (_dense_score(q, k, causal, scale) - lse.unflatten(1, split)[..., None]).exp()
    delta = (dout * out).sum(-1).transpose(1, 2).unflatten(1, split)[..., None]
    dout, q = dout.unflatten(2, split), q.unflatten(2, split)
    dscore = weight * (torch.einsum("bigrw,bjgw->bgrij", dout, v) - delta) * scale
    dq = torch.einsum("bgrij,bjgw->bigrw", dscore, k).flatten(2, 3)
    return (
        dq,
        torch.einsum("bgrij,bigrw->bjgw", dscore, q),
        torch.einsum("bgrij,bigrw->bjgw", weight, dout),
    )


def padded(x: Tensor, width: int) -> Tensor:
    """x [B, L, heads, channels] with zeros up to ``width`` channels, which lie side by side, as
    flash kernels take for granted.
    """
    return F.pad(
        x, (0, width - x.shape[3])
    ).contiguous()  # a pad keeps the order of strides that x has


def merge(part: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The attention over two sets of keys from that over each, all as :func:`attend` returns it."""
    total = torch.logaddexp(part[1], other[1])
    share, share_other = (
        (lse - total).exp().transpose(1, 2)[..., None] for lse in (part[1], other[1])
    )
    return part[0] * share + other[0] * share_other, total


def _dense_score(q: Tensor, k: Tensor, causal: bool, scale: float) -> Tensor:
    score = torch.einsum("bigrw,bjgw->bgrij", q.unflatten(2, (k.shape[2], -1)), k) * scale
    if causal:
        score.masked_fill_(
            torch.ones(score.shape[-2:], dtype=torch.bool, device=q.device).triu(1), -math.inf
        )
    return score


def _chunks(
    k_aug: Tensor, g: Tensor, middle: Tensor, bounds: list[tuple[int, int]], importance: slice
):
    """Yield (start, end, keys before the chunk relative to its start, their scale, the chunk's
    queries' scale) for each chunk.

    :func:`augment` leaves each chunk's operands relative to the chunk's middle m. Between a chunk I
    and an earlier key j, ``exp(g_i - g_j) = [exp(m_I - g_start) e^(g_i - m_I)] [exp(g_start - m_j)
    e^(m_j - g_j)]``: one scale a side, both <= 1."""
    past = k_aug.clone() if len(bounds) > 1 else k_aug
    for start, end in bounds:
        scale_k = (g[:, start : start + 1] - middle[:, :start]).exp().to(k_aug.dtype)[..., None]
        scale_q = (
            (middle[:, start : start + 1] - g[:, start : start + 1])
            .exp()
            .to(k_aug.dtype)[..., None]
        )
        torch.mul(k_aug[:, :start, :, importance], scale_k, out=past[:, :start, :, importance])
        yield start, end, past[:, :start], scale_k, scale_q


def _operands(q, k, v, b, c, log_decay, theta, lam, cos, sin):
    """Augmented q and k and padded v of one width in the working dtype, the chunk bounds, g and the
    middle of each chunk.
    """
    dtype, width = work_dtype(q), max(q.shape[3] + b.shape[3], v.shape[3])
    g = cumulative_decay(log_decay)
    bounds = chunk_bounds(g, g.shape[1] if has_flash(q.device) else MAX_DENSE_CHUNK)
    starts = [start for start, _ in bounds]
    q_aug, k_aug = augment(
        q, k, b, c, log_decay, theta, lam, cos, sin, starts, math.inf, width, dtype
    )
    return q_aug, k_aug, padded(v.to(dtype), width), bounds, g, segment_middle(g, starts)


def _scaled(x: Tensor, scale: Tensor, importance: slice) -> Tensor:
    """A copy of x with its importance channels multiplied by ``scale``."""
    x = x.clone()
    x[..., importance] *= to_query_heads(scale, x.shape[2])
    return x


@torch.library.custom_op("sisa::sdpa_exact", mutates_args=())
def sdpa_exact(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    b: Tensor,
    c: Tensor,
    log_decay: Tensor,
    theta: Tensor,
    lam: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Exact SISA attention (Eq. 2) of one document on stock kernels: (y [B, L, H, Dv], log-sum-exp
    [B, H, L]).

    Shapes as in :func:`sisa_kernels.sisa_attention`, ``cos`` and ``sin`` its ``rotary``. Half
    precision is computed in fp32, and y stays fp32 for the backward: augmented operands rounded to
    bf16 would cost up to 2.7e-3 of y (1e-2 of a row), and bf16 flash is slow on CPUs without bf16
    matrix hardware."""
    Dh, scale, Dv = q.shape[3], q.shape[3] ** -0.5, v.shape[3]
    importance = slice(Dh, Dh + b.shape[3])
    q_aug, k_aug, value, bounds, g, middle = _operands(
        q, k, v, b, c, log_decay, theta, lam, cos, sin
    )
    y = torch.empty(*q.shape[:3], Dv, dtype=q_aug.dtype, device=q.device)
    lse = torch.empty(q.shape[0], q.shape[2], q.shape[1], dtype=q_aug.dtype, device=q.device)
    for start, end, past, _, scale_q in _chunks(k_aug, g, middle, bounds, importance):
        chunk = slice(start, end)
        part = attend(q_aug[:, chunk], k_aug[:, chunk], value[:, chunk], True, scale)
        if start:
            q_past = _scaled(q_aug[:, chunk], scale_q, importance)
            part = merge(part, attend(q_past, past, value[:, :start], False, scale))
        y[:, chunk], lse[..., chunk] = part[0][..., :Dv], part[1]
    return y, lse


@sdpa_exact.register_fake
def _(q, k, v, b, c, log_decay, theta, lam, cos, sin):
    B, L, H, _ = q.shape
    dtype = work_dtype(q)
    return q.new_empty(B, L, H, v.shape[3], dtype=dtype), q.new_empty(B, H, L, dtype=dtype)


@torch.library.custom_op("sisa::sdpa_exact_backward", mutates_args=())
def sdpa_exact_backward(
    dy: Tensor,
    y: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    b: Tensor,
    c: Tensor,
    log_decay: Tensor,
    theta: Tensor,
    lam: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of :func:`sdpa_exact` for q, k, v, b, c, log_decay, theta, lam, from its inputs and
    outputs alone.
    """
    Dh, scale, Dv = q.shape[3], q.shape[3] ** -0.5, v.shape[3]
    importance = slice(Dh, Dh + b.shape[3])
    q_aug, k_aug, value, bounds, g, middle = _operands(
        q, k, v, b, c, log_decay, theta, lam, cos, sin
    )
    dout, out = (padded(t, value.shape[3]) for t in (dy, y))
    decay_flux = g.new_zeros(g.shape[0], len(bounds), g.shape[2])
    phase_flux = g.new_zeros(*decay_flux.shape, b.shape[3] // 2)
    lasts = [end - 1 for _, end in bounds]
    if len(bounds) == 1:
        dq_aug, dk_aug, dv = attend_backward(q_aug, k_aug, value, True, dout, out, lse, scale)
    else:
        dq_aug, dk_aug, dv = (torch.zeros_like(t) for t in (q_aug, k_aug, value))
        for n, (start, end, past, scale_k, scale_q) in enumerate(
            _chunks(k_aug, g, middle, bounds, importance)
        ):
            chunk, before = slice(start, end), slice(0, start)
            softmax = dout[:, chunk], out[:, chunk], lse[..., chunk], scale
            grads = attend_backward(
                q_aug[:, chunk], k_aug[:, chunk], value[:, chunk], True, *softmax
            )
            for total, grad in zip((dq_aug[:, chunk], dk_aug[:, chunk], dv[:, chunk]), grads):
                total += grad
            if start:
                q_past = _scaled(q_aug[:, chunk], scale_q, importance)
                dq, dk, dv_past = attend_backward(q_past, past, value[:, before], False, *softmax)
                col, dphase = pair_products(dk[..., importance], past[..., importance])
                decay_flux[:, :n] += col.cumsum(1)[:, lasts[:n]]
                phase_flux[:, :n] -= dphase.cumsum(1)[:, lasts[:n]]
                dq_aug[:, chunk] += _scaled(dq, scale_q, importance)
                dk_aug[:, before] += _scaled(dk, scale_k, importance)
                dv[:, before] += dv_past
    starts = [start for start, _ in bounds]
    dq, dk, db, dc, dlog_decay, dtheta, dlam = augment_backward(
        dq_aug,
        dk_aug,
        q,
        k,
        b,
        c,
        log_decay,
        theta,
        lam,
        cos,
        sin,
        starts,
        math.inf,
        decay_flux,
        phase_flux,
    )
    return dq, dk, dv[..., :Dv].to(v.dtype).contiguous(), db, dc, dlog_decay, dtheta, dlam


@sdpa_exact_backward.register_fake
def _(dy, y, lse, q, k, v, b, c, log_decay, theta, lam, cos, sin):
    return tuple(t.new_empty(t.shape) for t in (q, k, v, b, c, log_decay, theta, lam))


def _save(ctx, inputs, output):
    ctx.save_for_backward(*output, *inputs)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, dy, _dlse):
    y, lse, *inputs = ctx.saved_tensors
    return *sdpa_exact_backward(dy, y, lse, *inputs), None, None


sdpa_exact.register_autograd(_backward, setup_context=_save)
sdpa_exact_backward.register_autograd(no_second_derivative)
