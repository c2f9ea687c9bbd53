"""The oracles: SISA attention (arXiv 2606.02332, Eq. 2) and its rival's, densely in fp64, with no
trick of numerics or speed.

Every other path of this package is measured against this file, and this file is checked by
``torch.autograd.gradcheck``."""

import functools
import math

import torch
from torch import Tensor

from sisa_kernels.checks import Rotary, check_attention, check_forgetting
from sisa_kernels.rotation import CLAMP, LOWEST_LOG_DECAY, by_document, rotate


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
    mode: str = "exact",
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """SISA attention, Eq. 2 of the paper, O(L^2) memory, computed in fp64 whatever comes in.

    ``s_ij = q_i.k_j / sqrt(Dh) + lam exp(g_i - g_j) (R(Phi_i) c_i).(R(Phi_j) b_j)`` for i >= j,
    ``y_i = sum_j softmax_j(s_ij) v_j``, with g and Phi the running sums of ``log_decay`` and
    ``theta``. In ``mode="clamped"`` g_i - g_j becomes ``clip(g_i - m) - clip(g_j - m)``: clip to
    +-11, m the middle of g's range in the sequence, a constant.

    Arguments, shapes and errors are those of :func:`sisa_kernels.sisa_attention`; returns y [B, L,
    H, Dv] in q's dtype."""
    check_attention(q, k, v, b, c, log_decay, theta, lam, rotary, mode, cu_seqlens)
    dtype = q.dtype
    q, k, v, b, c, log_decay, theta, lam = (
        x.double() for x in (q, k, v, b, c, log_decay, theta, lam)
    )
    if rotary is not None:
        cos, sin = (table.double()[:, None] for table in rotary)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    attend = functools.partial(_document, lam=lam, mode=mode)
    return by_document(attend, cu_seqlens, q, k, v, b, c, log_decay, theta).to(dtype)


def scores(
    q: Tensor,
    k: Tensor,
    b: Tensor,
    c: Tensor,
    log_decay: Tensor,
    theta: Tensor,
    lam: Tensor,
    mode: str = "exact",
) -> tuple[Tensor, Tensor]:
    """The two terms of Eq. 2, whose sum is s_ij: ``q_i.k_j / sqrt(Dh)`` and the importance term,
    each fp64 [B, H, L, L].

    Above the diagonal the first is -inf and the second 0. Arguments are those of
    :func:`sisa_attention`, with RoPE applied to q, k."""
    q, k, b, c, log_decay, theta, lam = (x.double() for x in (q, k, b, c, log_decay, theta, lam))
    L, H, Dh = q.shape[1:]
    g = log_decay.clamp(min=LOWEST_LOG_DECAY).cumsum(1)
    phase = theta.cumsum(1)
    b = rotate(b, phase.cos(), phase.sin())
    k, b, g, phase = (x.repeat_interleave(H // k.shape[2], 2) for x in (k, b, g, phase))
    c = rotate(c, phase.cos(), phase.sin())
    if mode == "clamped":
        g = (g - (g[:, :1] + g[:, -1:]).detach() / 2).clamp(-CLAMP, CLAMP)
    above = torch.ones(L, L, dtype=torch.bool, device=q.device).triu(1)
    g = g.transpose(1, 2)
    decay = (g[..., :, None] - g[..., None, :]).masked_fill(above, -math.inf).exp()
    content = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(Dh)
    importance = lam[:, None, None] * decay * torch.einsum("bihd,bjhd->bhij", c, b)
    return content.masked_fill(above, -math.inf), importance


def _document(q, k, v, b, c, log_decay, theta, lam: Tensor, mode: str) -> Tensor:
    content, importance = scores(q, k, b, c, log_decay, theta, lam, mode)
    v = v.repeat_interleave(q.shape[2] // k.shape[2], 2)
    return torch.einsum("bhij,bjhd->bihd", (content + importance).softmax(-1), v)


def forgetting_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_forget: Tensor,
    *,
    rotary: Rotary | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Forgetting attention (arXiv 2503.02130, section 3), O(L^2) memory, computed in fp64 whatever
    comes in.

    ``s_ij = q_i.k_j / sqrt(Dh) + F_i - F_j`` for i >= j, ``y_i = sum_j softmax_j(s_ij) v_j``, with
    F the running sum of ``log_forget``. Arguments, shapes and errors are those of
    :func:`sisa_kernels.forgetting_attention`; returns y [B, L, H, Dv] in q's dtype."""
    check_forgetting(q, k, v, log_forget, rotary, cu_seqlens)
    dtype = q.dtype
    q, k, v, log_forget = (x.double() for x in (q, k, v, log_forget))
    if rotary is not None:
        cos, sin = (table.double()[:, None] for table in rotary)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    return by_document(_forgetting_document, cu_seqlens, q, k, v, log_forget).to(dtype)


def _forgetting_document(q: Tensor, k: Tensor, v: Tensor, log_forget: Tensor) -> Tensor:
    L, H, Dh = q.shape[1:]
    F = log_forget.clamp(min=LOWEST_LOG_DECAY).cumsum(1).transpose(1, 2)
    k, v = (x.repeat_interleave(H // k.shape[2], 2) for x in (k, v))
    causal = torch.ones(L, L, dtype=torch.bool, device=q.device).tril()
    score = (
        torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(Dh) + F[..., :, None] - F[..., None, :]
    )
    weight = score.masked_fill(~causal, -math.inf).softmax(-1)
    return torch.einsum("bhij,bjhd->bihd", weight, v)
