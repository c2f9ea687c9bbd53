"""The oracles: SISA attention (arXiv 2606.02332, Eq. 2) and forgetting attention, dense, in fp64.

No trick of numerics or speed, and no arithmetic shared with what is measured against them; they
are themselves checked by ``torch.autograd.gradcheck`` and by loops over single scores."""

import math

import torch
from torch import Tensor

from sisa_kernels.checks import check_attention, check_forgetting
from sisa_kernels.inputs import Mode, Rotary, SisaInputs, by_document

CLAMP = 11.0  # the authors' bound on the exponent g - m
LOWEST_LOG = -1e3  # exp of it is 0 in fp64, and a running sum of -inf would lose g_i - g_j


def sisa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    b: Tensor,
    c: Tensor,
    log_decay: Tensor,
    theta: Tensor,
    lam: Tensor,
    *,
    rotary: Rotary | None = None,
    mode: Mode = "exact",
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """SISA attention, Eq. 2 of the paper, O(L^2) memory, computed in fp64 whatever comes in.

    ``s_ij = q_i.k_j / sqrt(Dh) + lam exp(g_i - g_j) (R(Phi_i) c_i).(R(Phi_j) b_j)`` for i >= j,
    ``y_i = sum_j softmax_j(s_ij) v_j``, with g and Phi the running sums of ``log_decay`` and
    ``theta``. In ``mode="clamped"`` g_i - g_j becomes ``clip(g_i - m) - clip(g_j - m)``: clip to
    +-11, m = (max g + min g) / 2 over the sequence or document, which has a gradient of its own.

    Arguments, shapes and errors are those of :func:`sisa_kernels.sisa_attention`; returns y [B, L,
    H, Dv] in q's dtype."""
    inputs = SisaInputs(q, k, v, b, c, log_decay, theta, lam, rotary, cu_seqlens)
    check_attention(inputs, mode)
    dtype = q.dtype
    heads = q.shape[2] // k.shape[2]
    *tokens, lam = (x.double() for x in inputs.tensors())
    tokens[:2] = _with_rotary(tokens[0], tokens[1], rotary)

    def attend(rows: slice) -> Tensor:
        q, k, v, b, c, log_decay, theta = (x[:, rows] for x in tokens)
        content, importance = scores(q, k, b, c, log_decay, theta, lam, mode)
        weight = (content + importance).softmax(-1)
        return _weighted(weight, v.repeat_interleave(heads, 2))

    return by_document(attend, cu_seqlens, q.shape[1]).to(dtype)


def scores(
    q: Tensor,
    k: Tensor,
    b: Tensor,
    c: Tensor,
    log_decay: Tensor,
    theta: Tensor,
    lam: Tensor,
    mode: Mode = "exact",
) -> tuple[Tensor, Tensor]:
    """The terms of s_ij, fp64 [B, H, L, L]: ``q_i.k_j / sqrt(Dh)``, and the importance.

    Above the diagonal the first is -inf and the second 0. Arguments are those of
    :func:`sisa_attention`, with RoPE applied to q, k."""
    q, k, b, c, log_decay, theta, lam = (x.double() for x in (q, k, b, c, log_decay, theta, lam))
    L, H, Dh = q.shape[1:]
    g = log_decay.clamp(min=LOWEST_LOG).cumsum(1)
    phase = theta.cumsum(1)
    b = _rotated(b, phase.cos(), phase.sin())
    k, b, g, phase = (x.repeat_interleave(H // k.shape[2], 2) for x in (k, b, g, phase))
    c = _rotated(c, phase.cos(), phase.sin())
    if mode == "clamped":
        middle = (g.amax(1, keepdim=True) + g.amin(1, keepdim=True)) / 2
        g = (g - middle).clamp(-CLAMP, CLAMP)
    above = torch.ones(L, L, dtype=torch.bool, device=q.device).triu(1)
    g = g.transpose(1, 2)
    decay = (g[..., :, None] - g[..., None, :]).masked_fill(above, -math.inf).exp()
    content = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(Dh)
    importance = lam[:, None, None] * decay * torch.einsum("bihd,bjhd->bhij", c, b)
    return content.masked_fill(above, -math.inf), importance.masked_fill(above, 0)


def forgetting_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_forget: Tensor,
    *,
    rotary: Rotary | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Forgetting attention (arXiv 2503.02130, section 3), O(L^2) memory, in fp64.

    ``s_ij = q_i.k_j / sqrt(Dh) + F_i - F_j`` for i >= j, ``y_i = sum_j softmax_j(s_ij) v_j``, with
    F the running sum of ``log_forget``. Arguments, shapes and errors are those of
    :func:`sisa_kernels.forgetting_attention`; returns y [B, L, H, Dv] in q's dtype."""
    check_forgetting(q, k, v, log_forget, rotary, cu_seqlens)
    tokens = [x.double() for x in (q, k, v, log_forget)]
    tokens[:2] = _with_rotary(tokens[0], tokens[1], rotary)

    def attend(rows: slice) -> Tensor:
        return _forgetting_document(*(x[:, rows] for x in tokens))

    return by_document(attend, cu_seqlens, q.shape[1]).to(q.dtype)


def _forgetting_document(q: Tensor, k: Tensor, v: Tensor, log_forget: Tensor) -> Tensor:
    L, H, Dh = q.shape[1:]
    F = log_forget.clamp(min=LOWEST_LOG).cumsum(1).transpose(1, 2)
    k, v = (x.repeat_interleave(H // k.shape[2], 2) for x in (k, v))
    causal = torch.ones(L, L, dtype=torch.bool, device=q.device).tril()
    content = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(Dh)
    score = content + F[..., :, None] - F[..., None, :]
    weight = score.masked_fill(~causal, -math.inf).softmax(-1)
    return _weighted(weight, v)


def _weighted(weight: Tensor, v: Tensor) -> Tensor:
    """``sum_{j <= i} weight_ij v_j``, where a later v_j may be no number: 0 * NaN is NaN."""
    numbers = torch.einsum("bhij,bjhd->bihd", weight, v.nan_to_num(0, 0, 0))
    return numbers + (v.detach() * 0).cumsum(1)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """R(phase) x: the channel pairs (2n, 2n+1) of the last axis, rotated."""
    even = x[..., 0::2]
    odd = x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)


def _with_rotary(q: Tensor, k: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor]:
    if rotary is None:
        return q, k
    cos, sin = (table.double()[:, None] for table in rotary)
    return _rotated(q, cos, sin), _rotated(k, cos, sin)
