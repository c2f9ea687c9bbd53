"""The augmentation: decay, phase and lambda folded into wider queries and keys, so that SISA is one
attention call.

``Qhat_i = [q_i ; s exp(g_i - m) R(Phi_i) c_i]``, ``Khat_j = [k_j ; s exp(m - g_j) R(Phi_j) b_j]``,
``s = Dh^(1/4) sqrt(lam)`` (paper, Proposition 1). The ops ``sisa::augment`` and
``sisa::augment_backward`` are compiled (csrc/) where the extension is loaded: for the CPU, and for
CUDA if it was built so. Their PyTorch implementation here serves everywhere else, fp64 included.
"""

import functools
import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from sisa_kernels import _extension, selfcheck
from sisa_kernels.checks import DTYPES, Rotary, check_operands, check_shapes, check_tensor
from sisa_kernels.ops import library, no_second_derivative, refuse_forward_mode, register
from sisa_kernels.rotation import CLAMP, rotate
from sisa_kernels.scans import (
    cumulative_decay,
    cumulative_phase,
    pair_products,
    segment_middle,
    to_key_heads,
    to_query_heads,
    work_dtype,
)


class _Factors:
    """What forward and backward share: the factors exp(+-(g - m)) s and the cosines and sines of
    the phases.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        log_decay: Tensor,
        theta: Tensor,
        lam: Tensor,
        starts: list[int],
        clamp: float,
    ):
        H, G, Dh = q.shape[2], k.shape[2], q.shape[3]
        dtype = work_dtype(q)
        g = cumulative_decay(log_decay)
        x = g - segment_middle(g, starts)
        self.unclamped = x.abs() <= clamp
        x = x.clamp(-clamp, clamp)
        s = math.sqrt(Dh) * lam.to(dtype)[:, None]
        # With shared key heads all of s^2 = sqrt(Dh) lam rides on the query, since lam differs
        # among the heads of one key.
        s_q, s_k = (s.sqrt(), s.sqrt()) if H == G else (s, 1.0)
        self.factor_q = to_query_heads(x.exp().to(dtype)[..., None], H) * s_q
        self.factor_k = x.neg().exp().to(dtype)[..., None] * s_k
        self.cos_k, self.sin_k = cumulative_phase(theta)
        self.cos_q, self.sin_q = to_query_heads(self.cos_k, H), to_query_heads(self.sin_k, H)


def _check(
    q: Tensor,
    k: Tensor,
    b: Tensor,
    c: Tensor,
    log_decay: Tensor,
    theta: Tensor,
    lam: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    starts: list[int],
    clamp: float,
) -> None:
    """Refuse what csrc/sisa.cpp refuses: every wrong shape, dtype, device or range of a direct call
    of the ops.
    """
    if (cos is None) != (sin is None):
        raise ValueError("cos and sin must be given together")
    check_shapes(
        q, k, b, c, log_decay, theta, lam, None if cos is None or sin is None else (cos, sin)
    )
    if not clamp >= 0:
        raise ValueError(f"clamp must be >= 0, got {clamp}")
    if (
        not starts
        or starts[0] != 0
        or any(lo >= hi for lo, hi in zip(starts, [*starts[1:], q.shape[1]]))
    ):
        raise ValueError(
            f"starts must rise from 0 and stay below the length {q.shape[1]}, got {starts}"
        )


def _check_forward(
    q, k, b, c, log_decay, theta, lam, cos, sin, starts, clamp, width, dtype
) -> None:
    _check(q, k, b, c, log_decay, theta, lam, cos, sin, starts, clamp)
    if width < q.shape[3] + b.shape[3]:
        raise ValueError(f"width must be at least Dh + Ds = {q.shape[3] + b.shape[3]}, got {width}")
    if dtype not in DTYPES:
        raise TypeError(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype}")


def _check_backward(
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
    clamp,
    decay_flux,
    phase_flux,
) -> None:
    _check(q, k, b, c, log_decay, theta, lam, cos, sin, starts, clamp)
    used = q.shape[3] + b.shape[3]
    if dq_aug.ndim != 4 or dq_aug.shape[3] < used:
        raise ValueError(
            f"dq_aug must have at least Dh + Ds = {used} channels, got {list(dq_aug.shape)}"
        )
    check_tensor("dq_aug", dq_aug, (*q.shape[:3], dq_aug.shape[3]), DTYPES, q.device)
    check_tensor("dk_aug", dk_aug, (*k.shape[:3], dq_aug.shape[3]), (dq_aug.dtype,), q.device)
    flux = (q.shape[0], len(starts), k.shape[2])
    if decay_flux is not None:
        check_tensor("decay_flux", decay_flux, flux, (torch.float64,), q.device)
    if phase_flux is not None:
        check_tensor("phase_flux", phase_flux, (*flux, b.shape[3] // 2), (torch.float64,), q.device)


def augment_eager(
    q: Tensor,
    k: Tensor,
    b: Tensor,
    c: Tensor,
    log_decay: Tensor,
    theta: Tensor,
    lam: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    starts: list[int],
    clamp: float,
    width: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Augmented queries [B, L, H, width] and keys [B, L, G, width] in ``dtype``, zero past the
    first Dh + Ds channels.

    The exponents are taken about the middle m of g's range in each segment (segments begin at
    ``starts``, the first at 0) and clamped to +-``clamp`` (inf: not clamped); m is a constant of
    the backward. ``cos`` and ``sin`` are the rotary tables. The phase runs on over segments. The
    other arguments are those of :func:`augment_qk`. Differentiable."""
    _check_forward(q, k, b, c, log_decay, theta, lam, cos, sin, starts, clamp, width, dtype)
    Dh, Ds = q.shape[3], b.shape[3]
    x = _Factors(q, k, log_decay, theta, lam, starts, clamp)
    work = x.cos_k.dtype
    q_aug, k_aug = (t.new_zeros(*t.shape[:3], width, dtype=dtype) for t in (q, k))
    if cos is None or sin is None:
        q_aug[..., :Dh], k_aug[..., :Dh] = q, k
    else:
        q_aug[..., :Dh], k_aug[..., :Dh] = (
            rotate(t.to(work), cos[:, None], sin[:, None]) for t in (q, k)
        )
    q_aug[..., Dh : Dh + Ds] = x.factor_q * rotate(c.to(work), x.cos_q, x.sin_q)
    k_aug[..., Dh : Dh + Ds] = x.factor_k * rotate(b.to(work), x.cos_k, x.sin_k)
    return q_aug, k_aug


def _augment_fake(q, k, b, c, log_decay, theta, lam, cos, sin, starts, clamp, width, dtype):
    _check_forward(q, k, b, c, log_decay, theta, lam, cos, sin, starts, clamp, width, dtype)
    return tuple(t.new_empty(*t.shape[:3], width, dtype=dtype) for t in (q, k))


def augment_backward_eager(
    dq_aug: Tensor,
    dk_aug: Tensor,
    q: Tensor,
    k: Tensor,
    b: Tensor,
    c: Tensor,
    log_decay: Tensor,
    theta: Tensor,
    lam: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    starts: list[int],
    clamp: float,
    decay_flux: Tensor | None,
    phase_flux: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of :func:`augment_eager` for q, k, b, c, log_decay, theta and lam (SISA's
    gradients: dg, dPhi, reverse sums).

    The reverse running sums restart at each segment, so that rounding errors end where they were
    made. What they carry over from later segments is given: ``decay_flux`` [B, segments, G] and
    ``phase_flux`` [B, segments, G, Ds/2], fp64, are dL/dg and dL/dPhi summed over all tokens past
    the segment (None: no attention across segments, nothing to carry)."""
    _check_backward(
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
        clamp,
        decay_flux,
        phase_flux,
    )
    Dh, Ds, G = q.shape[3], b.shape[3], k.shape[2]
    x = _Factors(q, k, log_decay, theta, lam, starts, clamp)
    work = x.cos_k.dtype
    dq, dk = dq_aug[..., :Dh].to(work), dk_aug[..., :Dh].to(work)
    if cos is not None and sin is not None:
        dq, dk = rotate(dq, cos[:, None], -sin[:, None]), rotate(dk, cos[:, None], -sin[:, None])
    dc, db = x.factor_q * dq_aug[..., Dh : Dh + Ds], x.factor_k * dk_aug[..., Dh : Dh + Ds]
    row, dphase_q = pair_products(dc, rotate(c.to(work), x.cos_q, x.sin_q))
    col, dphase_k = pair_products(db, rotate(b.to(work), x.cos_k, x.sin_k))
    # s^2 = sqrt(Dh) lam, split evenly between query and key or all on the query (see _Factors).
    dlam = (
        (row.sum((0, 1)) + col.sum((0, 1))) / (2 * lam)
        if q.shape[2] == G
        else row.sum((0, 1)) / lam
    )
    dg = (to_key_heads(row, G) - col) * x.unclamped
    dlog_decay = _segment_reverse_cumsum(dg, starts, decay_flux)
    dtheta = _segment_reverse_cumsum(to_key_heads(dphase_q, G) + dphase_k, starts, phase_flux)
    dc, db = rotate(dc, x.cos_q, -x.sin_q), rotate(db, x.cos_k, -x.sin_k)
    # contiguous() also copies dq and dk out of dq_aug and dk_aug: an op's results may not alias its
    # inputs.
    return (
        dq.to(q.dtype).contiguous(),
        dk.to(k.dtype).contiguous(),
        db.to(b.dtype),
        dc.to(c.dtype),
        dlog_decay.to(log_decay.dtype),
        dtheta.to(theta.dtype),
        dlam.to(lam.dtype),
    )


def _augment_backward_fake(
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
    clamp,
    decay_flux,
    phase_flux,
):
    _check_backward(
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
        clamp,
        decay_flux,
        phase_flux,
    )
    return tuple(t.new_empty(t.shape) for t in (q, k, b, c, log_decay, theta, lam))


def _segment_reverse_cumsum(x: Tensor, starts: list[int], flux: Tensor | None) -> Tensor:
    """Sum over u >= t within each segment of axis 1, plus the segment's ``flux`` where given."""
    pieces = []
    for n, piece in enumerate(x.tensor_split(starts[1:], 1)):
        total = piece.flip(1).cumsum(1).flip(1)
        pieces.append(total if flux is None else total + flux[:, n : n + 1])
    return torch.cat(pieces, 1)


def _save(ctx, inputs, output):
    *tensors, starts, clamp, _, _ = inputs
    ctx.save_for_backward(*tensors)
    ctx.starts, ctx.clamp = starts, clamp


def _backward(ctx, dq_aug, dk_aug):
    grads = augment_backward(dq_aug, dk_aug, *ctx.saved_tensors, ctx.starts, ctx.clamp, None, None)
    return *grads, None, None, None, None, None, None


augment = register("augment", augment_eager, _augment_fake, _backward, _save)
augment_backward = register(
    "augment_backward", augment_backward_eager, _augment_backward_fake, no_second_derivative
)


_out: set[str] = set()  # kinds of device whose compiled augmentation was found wrong


def guard_compiled(q: Tensor, b: Tensor) -> None:
    """Check the compiled augmentation on the first use of a device, dtype and widths; plain PyTorch
    takes a wrong one's place.
    """
    if _extension.LOADED and q.dtype != torch.float64 and selfcheck.possible(q.device):
        _guard_compiled(q.device, q.dtype, q.shape[3], b.shape[3])


@functools.cache
def _guard_compiled(device: torch.device, dtype: torch.dtype, Dh: int, Ds: int) -> None:
    if device.type in _out:
        return
    (q, k, _, *rest), dq = selfcheck.problem(
        device, dtype, Dh=Dh, Ds=Ds, Dv=Dh + Ds, decay=selfcheck.DECAY
    )
    inputs = [q, k, *rest]
    angle = torch.arange(q.shape[1] * (Dh // 2), device=device).view(q.shape[1], Dh // 2).float()
    tables = (None, None) if Dh % 2 else (angle.cos(), angle.sin())

    def outcome(forward: Callable, backward: Callable, work: torch.dtype | None) -> list[Tensor]:
        x = [t.detach().to(work or t.dtype) for t in inputs]
        # Two segments and a clamp that binds: every branch of the kernels.
        shared: tuple = (*tables, [0, q.shape[1] // 2], 1.0)
        grads = backward(dq.to(x[0].dtype), dq.to(x[0].dtype), *x, *shared, None, None)
        return [*forward(*x, *shared, Dh + Ds, x[0].dtype), *grads]

    try:
        right = outcome(augment_eager, augment_backward_eager, torch.float64)
        worst = max(selfcheck.relative_errors(outcome(augment, augment_backward, None), right))
        if worst <= selfcheck.ALLOWED[dtype]:
            return
        why = f"off by {worst:.1e}, relative, on a small problem (Dh {Dh}, Ds {Ds}, {dtype}) against plain PyTorch in fp64"
    except Exception as error:  # whatever keeps a kernel from launching there
        why = f"{type(error).__name__}: {error}"
    _out.add(device.type)
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "Warning only once for all operators"
        )  # that a kernel is replaced is what is wanted
        for name, eager in (
            ("augment", augment_eager),
            ("augment_backward", augment_backward_eager),
        ):
            library.impl(name, eager, device.type.upper(), allow_override=True)
    warnings.warn(
        f"the compiled augmentation is out on {device.type}, and plain PyTorch runs instead: {why}",
        stacklevel=4,
    )


def augment_qk(
    q: Tensor,
    k: Tensor,
    b: Tensor,
    c: Tensor,
    log_decay: Tensor,
    theta: Tensor,
    lam: Tensor,
    *,
    rotary: Rotary | None = None,
) -> tuple[Tensor, Tensor]:
    """The paper's augmented queries and keys (Proposition 1), clamped to +-11 as its authors run
    it.

    ``scaled_dot_product_attention(q_aug, k_aug, v, is_causal=True, scale=Dh ** -0.5)`` on them is
    SISA as published: right while the range of the cumulative log-decay stays under 22, wrong by
    half or more past it. :func:`sisa_attention` is exact.

    Args:
        q: queries [B, L, H, Dh], fp32, bf16, fp16 or fp64.
        k: keys [B, L, G, Dh] in q's dtype; G divides H, query head h uses key head h // (H/G).
        b: importance keys [B, L, G, Ds] in q's dtype, Ds even.
        c: importance queries [B, L, H, Ds] in q's dtype.
        log_decay: log of the decay, [B, L, G] fp32, <= 0.
        theta: phase steps in radians, [B, L, G, Ds/2] fp32.
        lam: weight of the importance term, [H] fp32, > 0.
        rotary: (cos, sin), each [L, Dh/2] fp32, applied to q and k; None if already applied or not
            wanted.

    Returns:
        (q_aug [B, L, H, Dh + Ds], k_aug [B, L, G, Dh + Ds]) in q's dtype. For G = H both carry s =
        Dh^(1/4) sqrt(lam); for G < H the query carries s^2, so that keys stay shared.
        Differentiable in all seven inputs.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype, device or range; the
        message names it.
    """
    check_operands(q, k, b, c, log_decay, theta, lam, rotary)
    refuse_forward_mode(q, k, b, c, log_decay, theta, lam)
    guard_compiled(q, b)
    cos, sin = rotary or (None, None)
    return augment(
        q, k, b, c, log_decay, theta, lam, cos, sin, [0], CLAMP, q.shape[3] + b.shape[3], q.dtype
    )
