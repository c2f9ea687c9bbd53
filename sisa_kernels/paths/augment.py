"""The augmentation: queries and keys so widened that SISA is one attention call on them.

``Qhat_i = [q_i ; s exp(g_i - m) R(Phi_i) c_i]``, ``Khat_j = [k_j ; s exp(m - g_j) R(Phi_j) b_j]``,
``s = Dh^(1/4) sqrt(lam)`` (paper, Proposition 1). The ops ``sisa::augment`` and
``sisa::augment_backward`` are compiled (csrc/) where the extension is loaded: for the CPU, and for
CUDA if it was built so. Their PyTorch implementation here serves everywhere else, fp64 included."""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sisa_kernels import _extension, selfcheck
from sisa_kernels.checks import DTYPES, check_operands, check_shapes, check_tensor
from sisa_kernels.inputs import Rotary, ScoreInputs, takes_flat
from sisa_kernels.ops import (
    no_second_derivative,
    of_one_dtype,
    refuse_forward_mode,
    register,
    say_once,
)
from sisa_kernels.rotation import CLAMP, SMALLEST_LAM, rotate
from sisa_kernels.scans import (
    cumulative_decay,
    cumulative_phase,
    pair_products,
    segment_middle,
    to_key_heads,
    to_query_heads,
    work_dtype,
)
from sisa_kernels.testing import relative

MAX_STATE_ON_CUDA = 256  # csrc/cuda/augment.h


class _Factors:
    """The factors exp(+-(g - m)) s and the phases' cosines and sines, for forward and backward."""

    def __init__(self, x: ScoreInputs, starts: list[int], clamp: float):
        H = x.q.shape[2]
        G = x.k.shape[2]
        dtype = work_dtype(x.q)
        g = cumulative_decay(x.log_decay)
        exponent = g - segment_middle(g, starts)
        self.unclamped = exponent.abs() <= clamp
        exponent = exponent.clamp(-clamp, clamp)
        self.lam = x.lam.to(dtype).clamp(min=SMALLEST_LAM)
        s2 = math.sqrt(x.q.shape[3]) * self.lam[:, None]
        # With shared key heads all of s^2 = sqrt(Dh) lam rides on the query, since lam differs
        # among the heads of one key.
        s_q, s_k = (s2.sqrt(), s2.sqrt()) if H == G else (s2, 1.0)
        self.q = to_query_heads(exponent.exp().to(dtype)[..., None], H) * s_q
        self.k = exponent.neg().exp().to(dtype)[..., None] * s_k
        self.cos_k, self.sin_k = cumulative_phase(x.theta, dtype)
        self.cos_q = to_query_heads(self.cos_k, H)
        self.sin_q = to_query_heads(self.sin_k, H)


# ---- The ops; like csrc they refuse every wrong shape, dtype, device or range of a direct call ---


def _check(x: ScoreInputs, starts: list[int], clamp: float) -> None:
    """Check what both ops take."""
    check_shapes(x)
    if not clamp >= 0:
        raise ValueError(f"clamp must be >= 0, got {clamp}")
    L = x.q.shape[1]
    rises = all(lo < hi for lo, hi in zip(starts, [*starts[1:], L]))
    if not starts or starts[0] != 0 or not rises:
        raise ValueError(f"starts must rise from 0 and stay below the length {L}, got {starts}")


def _check_results(x: ScoreInputs, width: int, dtype: torch.dtype) -> None:
    least = x.q.shape[3] + x.b.shape[3]
    if width < least:
        raise ValueError(f"width must be at least Dh + Ds = {least}, got {width}")
    if dtype not in DTYPES:
        raise TypeError(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype}")


def _check_gradients(
    x: ScoreInputs,
    segments: int,
    dq_aug: Tensor,
    dk_aug: Tensor,
    decay_flux: Tensor | None,
    phase_flux: Tensor | None,
) -> None:
    least = x.q.shape[3] + x.b.shape[3]
    if dq_aug.ndim != 4 or dq_aug.shape[3] < least:
        given = list(dq_aug.shape)
        raise ValueError(f"dq_aug must have at least Dh + Ds = {least} channels, got {given}")
    check_tensor("dq_aug", dq_aug, (*x.q.shape[:3], dq_aug.shape[3]), DTYPES, x.q.device)
    check_tensor("dk_aug", dk_aug, (*x.k.shape[:3], dq_aug.shape[3]), (dq_aug.dtype,), x.q.device)
    per_segment = (x.q.shape[0], segments, x.k.shape[2])
    double = (torch.float64,)
    if decay_flux is not None:
        check_tensor("decay_flux", decay_flux, per_segment, double, x.q.device)
    if phase_flux is not None:
        shape = (*per_segment, x.b.shape[3] // 2)
        check_tensor("phase_flux", phase_flux, shape, double, x.q.device)


@takes_flat
def augment_eager(
    x: ScoreInputs,
    starts: list[int],
    clamp: float,
    width: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """:func:`augment` as the op takes it. Differentiable."""
    _check(x, starts, clamp)
    _check_results(x, width, dtype)
    q, k, b, c = x[:4]
    Dh = q.shape[3]
    importance = slice(Dh, Dh + b.shape[3])
    factors = _Factors(x, starts, clamp)
    work = factors.cos_k.dtype
    q_aug, k_aug = (t.new_zeros(*t.shape[:3], width, dtype=dtype) for t in (q, k))
    if x.rotary is not None:
        cos, sin = (table[:, None] for table in x.rotary)
        q, k = (rotate(t.to(work), cos, sin) for t in (q, k))
    q_aug[..., :Dh] = q
    k_aug[..., :Dh] = k
    q_aug[..., importance] = factors.q * rotate(c.to(work), factors.cos_q, factors.sin_q)
    k_aug[..., importance] = factors.k * rotate(b.to(work), factors.cos_k, factors.sin_k)
    return q_aug, k_aug


@takes_flat
def _augment_fake(
    x: ScoreInputs, starts: list[int], clamp: float, width: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    _check(x, starts, clamp)
    _check_results(x, width, dtype)
    q_aug, k_aug = (t.new_empty(*t.shape[:3], width, dtype=dtype) for t in (x.q, x.k))
    return q_aug, k_aug


@takes_flat
def augment_backward_eager(
    dq_aug: Tensor,
    dk_aug: Tensor,
    x: ScoreInputs,
    starts: list[int],
    clamp: float,
    decay_flux: Tensor | None,
    phase_flux: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """:func:`augment_backward` as the op takes it; the fluxes are its carries."""
    _check(x, starts, clamp)
    _check_gradients(x, len(starts), dq_aug, dk_aug, decay_flux, phase_flux)
    q, k, b, c, log_decay = x[:5]
    Dh = q.shape[3]
    G = k.shape[2]
    importance = slice(Dh, Dh + b.shape[3])
    factors = _Factors(x, starts, clamp)
    work = factors.cos_k.dtype
    dq, dk = _derotated(dq_aug[..., :Dh], dk_aug[..., :Dh], x, work)
    dc = factors.q * dq_aug[..., importance]
    db = factors.k * dk_aug[..., importance]
    row, dphase_q = pair_products(dc, rotate(c.to(work), factors.cos_q, factors.sin_q))
    col, dphase_k = pair_products(db, rotate(b.to(work), factors.cos_k, factors.sin_k))
    # s^2 = sqrt(Dh) lam, split evenly between query and key or all on the query (see _Factors).
    if q.shape[2] == G:
        dlam = (row.sum((0, 1)) + col.sum((0, 1))) / (2 * factors.lam)
    else:
        dlam = row.sum((0, 1)) / factors.lam
    dg = to_key_heads(row, G) - col
    if math.isfinite(clamp):
        dg = _through_middle(dg * factors.unclamped, log_decay, starts)
    dphase = to_key_heads(dphase_q, G) + dphase_k
    dlog_decay = _segment_reverse_cumsum(dg, starts, decay_flux)
    dtheta = _segment_reverse_cumsum(dphase, starts, phase_flux)
    dc = rotate(dc, factors.cos_q, -factors.sin_q)
    db = rotate(db, factors.cos_k, -factors.sin_k)
    grads = (dq, dk, db, dc, dlog_decay, dtheta, dlam)
    # contiguous() also copies dq and dk out of dq_aug and dk_aug: an op's results may not alias its
    # inputs.
    dq, dk, db, dc, dlog_decay, dtheta, dlam = (
        grad.to(t.dtype).contiguous() for grad, t in zip(grads, x.tensors())
    )
    return dq, dk, db, dc, dlog_decay, dtheta, dlam


@takes_flat
def _augment_backward_fake(
    dq_aug: Tensor, dk_aug: Tensor, x: ScoreInputs, starts: list[int], clamp: float, *fluxes: Any
) -> tuple[Tensor, ...]:
    _check(x, starts, clamp)
    _check_gradients(x, len(starts), dq_aug, dk_aug, *fluxes)
    return tuple(t.new_empty(t.shape) for t in x.tensors())


def _derotated(dq: Tensor, dk: Tensor, x: ScoreInputs, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """dL/dq and dL/dk before RoPE, in ``dtype``."""
    dq = dq.to(dtype)
    dk = dk.to(dtype)
    if x.rotary is None:
        return dq, dk
    cos, sin = (table[:, None] for table in x.rotary)
    return rotate(dq, cos, -sin), rotate(dk, cos, -sin)


def _through_middle(dg: Tensor, log_decay: Tensor, starts: list[int]) -> Tensor:
    """dL/dg with what comes through m, the mean of the largest and smallest g of each segment.

    dL/dm is minus the sum of the direct part. As amax and amin have it, all tokens of the largest g
    share its gradient evenly, and those of the smallest: runs without decay at a segment's ends."""
    moves = (log_decay != 0).cumsum(1)  # counts, since equal g may differ by rounding
    cuts = starts[1:]
    pieces = []
    for direct, moved in zip(dg.tensor_split(cuts, 1), moves.tensor_split(cuts, 1)):
        largest = (moved == moved[:, :1]).to(dg.dtype)
        smallest = (moved == moved[:, -1:]).to(dg.dtype)
        share = largest / largest.sum(1, keepdim=True) + smallest / smallest.sum(1, keepdim=True)
        pieces.append(direct - direct.sum(1, keepdim=True) / 2 * share)
    return torch.cat(pieces, 1)


def _segment_reverse_cumsum(x: Tensor, starts: list[int], carry_in: Tensor | None) -> Tensor:
    """Sum over u >= t within each segment of axis 1, plus what is carried into the segment."""
    pieces = []
    for n, piece in enumerate(x.tensor_split(starts[1:], 1)):
        total = piece.flip(1).cumsum(1).flip(1)
        pieces.append(total if carry_in is None else total + carry_in[:, n : n + 1])
    return torch.cat(pieces, 1)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.starts, ctx.clamp, _, _ = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, dq_aug: Tensor, dk_aug: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # once: under an activation checkpoint a second look is an error
    op = _in_service("augment_backward", q=saved[0], b=saved[2])
    grads = op(dq_aug, dk_aug, *saved, ctx.starts, ctx.clamp, None, None)
    return *grads, None, None, None, None, None, None


register(
    "augment",
    augment_eager,
    _augment_fake,
    _backward,
    _save,
    results=("q_aug", "k_aug"),
    in_library=True,
)
register(
    "augment_backward",
    augment_backward_eager,
    _augment_backward_fake,
    no_second_derivative,
    in_library=True,
)


# ---- The compiled ops, and plain PyTorch in their place where they are wrong --------------------


def _in_service(name: str, q: Tensor, b: Tensor) -> Callable[..., Any]:
    """The op of this name: compiled where it takes such operands and has not been found wrong."""
    refused = q.dtype == torch.float64 or (q.is_cuda and b.shape[3] > MAX_STATE_ON_CUDA)
    refused = refused or not _extension.LOADED
    if refused or selfcheck.ruled_out("augment", q.device.type):
        name = f"{name}_eager"
    return getattr(torch.ops.sisa, name).default


def augment(
    x: ScoreInputs, starts: list[int], clamp: float, width: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """q_aug [B, L, H, width] and k_aug [B, L, G, width], zero past the first Dh + Ds channels.

    The exponents are taken about the middle m of g's range in each segment (segments begin at
    ``starts``, the first at 0) and clamped to +-``clamp``. With clamp inf they are not, and m is a
    constant of the backward: it cancels in exact attention. The phase runs on over segments."""
    return _in_service("augment", x.q, x.b)(*x.flat(), starts, clamp, width, dtype)


def augment_backward(
    dq_aug: Tensor,
    dk_aug: Tensor,
    x: ScoreInputs,
    starts: list[int],
    clamp: float,
    decay_carry: Tensor | None = None,
    phase_carry: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Gradients of :func:`augment` for q, k, b, c, log_decay, theta and lam.

    Those of log_decay and theta are reverse running sums of dL/dg and dL/dPhi, which restart at
    each segment, so that rounding errors end where they were made. What they carry in from later
    segments is given: ``decay_carry`` [B, segments, G] and ``phase_carry`` [B, segments, G, Ds/2],
    fp64, are dL/dg and dL/dPhi summed over all tokens past the segment (None: no attention across
    segments, nothing to carry)."""
    op = _in_service("augment_backward", x.q, x.b)
    return op(dq_aug, dk_aug, *x.flat(), starts, clamp, decay_carry, phase_carry)


def guard_compiled(x: ScoreInputs) -> None:
    """Check the compiled augmentation on its first use; plain PyTorch takes a wrong one's place."""
    device = x.q.device
    dtype = x.q.dtype
    if dtype == torch.float64 or not _extension.has_kernels(device.type):
        return
    # Asked first: a compiled call would guard a verdict, and be compiled anew once there is one.
    if not selfcheck.possible(device) or selfcheck.ruled_out("augment", device.type):
        return
    key = ("augment", str(device), str(dtype), x.q.shape[3], x.b.shape[3])
    find = functools.partial(_compiled_fault, device, dtype, *key[3:])
    why = selfcheck.verdict(key, device, find)
    if why is None:
        return
    selfcheck.rule_out("augment", device.type, why)
    say_once(
        f"the compiled augmentation is out on {device.type}, and plain PyTorch runs instead: {why}",
        stacklevel=4,
    )


def _compiled_fault(device: torch.device, dtype: torch.dtype, Dh: int, Ds: int) -> str | None:
    """What the compiled ops do otherwise than plain PyTorch in fp64, in every branch of theirs."""
    inputs, dq = selfcheck.small_problem(device, dtype, Dh=Dh, Ds=Ds, Dv=Dh + Ds)
    L = inputs.q.shape[1]
    angle = torch.arange(L * (Dh // 2), device=device).view(L, Dh // 2).float()
    rotary = None if Dh % 2 else (angle.cos(), angle.sin())
    operands = [t.detach() for t in inputs.scores().tensors()]

    def outcome(forward: Callable, backward: Callable, tensors: list[Tensor]) -> list[Tensor]:
        x = ScoreInputs._make((*tensors, rotary))
        # Two segments and a clamp that binds.
        shared = (*x.flat(), [0, L // 2], 1.0)
        out = x.q.dtype
        grads = backward(dq.to(out), dq.to(out), *shared, None, None)
        return [*forward(*shared, Dh + Ds, out), *grads]

    try:
        right = outcome(augment_eager, augment_backward_eager, [t.double() for t in operands])
        ops = torch.ops.sisa
        found = outcome(ops.augment.default, ops.augment_backward.default, operands)
        worst = max(relative(x, r) for x, r in zip(found, right))
    except Exception as error:  # whatever keeps a kernel from launching there
        return f"{type(error).__name__}: {error}"
    if worst <= selfcheck.ALLOWED[dtype]:
        return None
    return (
        f"off by {worst:.1e}, relative, on a small problem (Dh {Dh}, Ds {Ds}, {dtype}) "
        "against plain PyTorch in fp64"
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
    """The paper's augmented queries and keys (Proposition 1), clamped to +-11 as published.

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
        lam: weight of the importance term, [H] fp32, >= 0.
        rotary: (cos, sin), each [L, Dh/2] fp32, applied to q and k; None if already applied or not
            wanted.

    Returns:
        (q_aug [B, L, H, Dh + Ds], k_aug [B, L, G, Dh + Ds]) in q's dtype. For G = H both carry s =
        Dh^(1/4) sqrt(lam); for G < H the query carries s^2, so that keys stay shared.
        Differentiable in all seven inputs, as published: through the middle of g's range too.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype, device or range; the
            message names it.
    """
    q, k, b, c = of_one_dtype(q, k, b, c)
    x = ScoreInputs(q, k, b, c, log_decay, theta, lam, rotary)
    check_operands(x)
    refuse_forward_mode(*x.tensors())
    guard_compiled(x)
    return augment(x, [0], CLAMP, q.shape[3] + b.shape[3], q.dtype)
