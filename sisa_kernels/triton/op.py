"""Exact SISA attention in Triton: one FlashAttention over two products, ``q.k`` and the decayed
importance product.

The score of Eq. 2 is formed tile by tile from the *undecayed* operands ``R(Phi_i) c_i`` and
``R(Phi_j) b_j``; the decay ``exp(g_i - g_j)`` multiplies their product in fp32. Off the diagonal it
is ``exp(g_i - g_I) exp(g_I - g_J) exp(g_J - g_j)``, g_I at the query tile's first token and g_J at
the key tile's last: a vector for each side and one number a tile, every exponent <= 0 whatever the
length and the decay. On the diagonal it is taken element by element. g is kept in fp64; only
differences of it are rounded. Nothing is multiplied into the operands, so they need neither the
range of fp32 nor references at fixed blocks.

Past the *horizon* the importance product of a tile is skipped (:func:`horizon_starts`). Without the
importance operands the kernel is plain causal attention.

Written for the GPU; ``TRITON_INTERPRET=1`` runs the same source on the CPU (fp32 and fp16), for
tests."""

import math
from typing import Any

import torch
import triton
from torch import Tensor

from sisa_kernels.checks import (
    Rotary,
    check_attention,
    check_documents,
    check_qk,
    check_rotary,
    check_values,
)
from sisa_kernels.ops import no_second_derivative, refuse_forward_mode
from sisa_kernels.triton.horizon import horizon_ends, horizon_starts
from sisa_kernels.triton.kernels import (
    INTERPRETED,
    backward_key_kernel,
    backward_query_kernel,
    forward_kernel,
)
from sisa_kernels.triton.prologue import (
    LOG2E,
    Importance,
    fused,
    importance_gradients,
    prologue,
    row_products,
    unrotate,
)
from sisa_kernels.triton.tiles import Tile, choose_tiles

MAX_WIDTH = 128
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


# ---- Operators -----------------------------------------------------------------------------------


def padded_width(width: int) -> int:
    """The width a kernel computes at: the next power of two, at least 16 (the least of Triton's
    products).
    """
    return max(16, triton.next_power_of_2(width))


def _documents(
    L: int, cu_seqlens: Tensor | None, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """For each token the first of its document and that document's end, each [L] int32, where
    documents are packed.

    With ``cu_seqlens`` on the device nothing waits for it: the call may be captured in a CUDA
    graph."""
    if cu_seqlens is None:
        return None, None
    bounds = cu_seqlens.to(device)
    first, last = (
        x.repeat_interleave(bounds.diff(), output_size=L) for x in (bounds[:-1], bounds[1:])
    )
    return first, last


class _Launcher:
    """What the launches of one problem share: sizes, strides, padded widths, tiles, documents."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        importance: Importance | None,
        cu_seqlens: Tensor | None,
    ):
        (B, self.L, H, Dh), G, Dv = q.shape, k.shape[2], v.shape[3]
        Ds = 0 if importance is None else importance.b.shape[3]
        widths = {"DH": Dh, "DV": Dv, "DS": Ds}
        padded = {"BH": padded_width(Dh), "BV": padded_width(Dv), "BS": padded_width(Ds)}
        self.flags = {"IMPORTANCE": Ds > 0, "PACKED": cu_seqlens is not None, **widths, **padded}
        self.sizes = (
            *(n for t in (q, k, v) for n in t.stride()[:3]),
            self.L,
            H,
            H // G,
            LOG2E / math.sqrt(Dh),
        )
        self.heads, self.key_heads = B * H, B * G
        self.tiles = choose_tiles(
            q.device, q.dtype, max(padded["BH"], padded["BV"]), padded["BS"] if Ds else 0
        )
        self.first, self.last = _documents(self.L, cu_seqlens, q.device)

    def __call__(
        self, kernel: Any, tile: Tile, rows: int, heads: int, *tensors: Tensor | None
    ) -> None:
        programs = -(-self.L // rows) * heads
        blocks = {"BM": tile.m, "BN": tile.n, "BD": tile.diagonal}
        with torch.cuda.device_of(
            tensors[0]
        ):  # Triton launches on the current device, whatever the tensors are on
            kernel[(programs,)](
                *tensors,
                *self.sizes,
                **self.flags,
                **blocks,
                num_warps=tile.warps,
                num_stages=tile.stages,
            )


def _readable(x: Tensor) -> Tensor:
    """x itself where the kernels can address it: channels side by side, and a tile of 128 rows
    within 2^31 elements.
    """
    return x if x.stride(3) == 1 and x.stride(1) < 2**24 else x.contiguous()


def _operands(
    q, k, v, b, c, log_decay, theta, lam, cos, sin, backward
) -> tuple[Tensor, Tensor, Tensor, Importance | None]:
    q, k, importance = fused(q.device, prologue)(
        q, k, b, c, log_decay, theta, lam, cos, sin, backward
    )
    return _readable(q), _readable(k), _readable(v), importance


def _arguments(x: Importance | None) -> tuple[Tensor | None, ...]:
    """The kernels' (c, b, g_hi, g_lo, lam)."""
    return (None,) * 5 if x is None else (x.c, x.b, x.g_hi, x.g_lo, x.lam)


@torch.library.custom_op("sisa::triton_exact", mutates_args=())
def triton_exact(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    b: Tensor | None,
    c: Tensor | None,
    log_decay: Tensor | None,
    theta: Tensor | None,
    lam: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    cu_seqlens: Tensor | None,
    horizon: float | None,
) -> tuple[Tensor, Tensor]:
    """y [B, L, H, Dv] in q's dtype and the base-2 logarithm of each softmax's sum, [B, H, L] fp32;
    without b: plain attention.
    """
    q, k, v, x = _operands(q, k, v, b, c, log_decay, theta, lam, cos, sin, False)
    launch = _Launcher(q, k, v, x, cu_seqlens)
    B, L, H, _ = q.shape
    y, lse = q.new_empty(B, L, H, v.shape[3]), q.new_empty(B, H, L, dtype=torch.float32)
    tile = launch.tiles.forward
    starts = None if x is None else horizon_starts(x, tile, horizon)
    launch(
        forward_kernel,
        tile,
        tile.m,
        launch.heads,
        q,
        k,
        v,
        *_arguments(x),
        starts,
        launch.first,
        y,
        lse,
    )
    return y, lse


@triton_exact.register_fake
def _(q, k, v, b, c, log_decay, theta, lam, cos, sin, cu_seqlens, horizon):
    B, L, H, _ = q.shape
    return q.new_empty(B, L, H, v.shape[3]), q.new_empty(B, H, L, dtype=torch.float32)


@torch.library.custom_op("sisa::triton_exact_backward", mutates_args=())
def triton_exact_backward(
    dy: Tensor,
    y: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    b: Tensor | None,
    c: Tensor | None,
    log_decay: Tensor | None,
    theta: Tensor | None,
    lam: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    cu_seqlens: Tensor | None,
    horizon: float | None,
) -> list[Tensor]:
    """Gradients for q, k, v, and where given for b, c, log_decay, theta, lam, from the forward's
    inputs and results alone.
    """
    q, k, v, x = _operands(q, k, v, b, c, log_decay, theta, lam, cos, sin, True)
    launch, dy = _Launcher(q, k, v, x, cu_seqlens), dy.contiguous()
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    dc, db, own, starts, ends = None, None, None, None, None
    query, key = launch.tiles.query, launch.tiles.key
    if x is not None:
        dc, db = (torch.empty(t.shape, dtype=torch.float32, device=t.device) for t in (x.c, x.b))
        own = torch.empty_like(lse)
        starts, ends = horizon_starts(x, query, horizon), horizon_ends(x, key, horizon)
    delta = fused(q.device, row_products)(dy, y)
    operands, saved = (q, k, v, *_arguments(x)), (dy, lse, delta)
    launch(
        backward_query_kernel,
        query,
        query.m,
        launch.heads,
        *operands,
        starts,
        launch.first,
        *saved,
        dq,
        dc,
        own,
    )
    launch(
        backward_key_kernel,
        key,
        key.n,
        launch.key_heads,
        *operands,
        ends,
        launch.first,
        launch.last,
        *saved,
        dk,
        dv,
        db,
    )
    if cos is not None:
        dq, dk = fused(q.device, unrotate)(dq, dk, cos, sin)
    if x is None:
        return [dq, dk, dv]
    return [
        dq,
        dk,
        dv,
        *fused(q.device, importance_gradients)(
            dc, db, own, x.b, x.c, x.lam, x.cos, x.sin, launch.last
        ),
    ]


@triton_exact_backward.register_fake
def _(dy, y, lse, q, k, v, b, c, log_decay, theta, lam, cos, sin, cu_seqlens, horizon):
    return [x.new_empty(x.shape) for x in (q, k, v, b, c, log_decay, theta, lam) if x is not None]


def _save(ctx, inputs, output):
    *tensors, ctx.horizon = inputs
    ctx.save_for_backward(*output, *tensors)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, dy, _dlse):
    y, lse, *tensors = ctx.saved_tensors
    grads = iter(triton_exact_backward(dy, y, lse, *tensors, ctx.horizon))
    return *(next(grads) if x is not None else None for x in tensors[:8]), None, None, None, None


triton_exact.register_autograd(_backward, setup_context=_save)
triton_exact_backward.register_autograd(no_second_derivative)


# ---- Functions -----------------------------------------------------------------------------------


def refusal(q: Tensor, v: Tensor, b: Tensor | None) -> str | None:
    """Why the kernels cannot run on operands of these dtypes, widths and device; None where they
    can.
    """
    if q.device.type == "cpu" and not INTERPRETED:
        return "its kernels run on a GPU (TRITON_INTERPRET=1 runs them on the CPU, for tests)"
    taken = (
        DTYPES[:2] if INTERPRETED else DTYPES
    )  # Triton interprets bf16 wrongly: it multiplies the raw bits
    if q.dtype not in taken:
        return f"its kernels take {', '.join(map(str, taken))}{' in the interpreter' if INTERPRETED else ''}, not {q.dtype}"
    widths = {"Dh": q.shape[3], "Dv": v.shape[3], "Ds": 16 if b is None else b.shape[3]}
    wide = [f"{name} = {width}" for name, width in widths.items() if width > MAX_WIDTH]
    return f"its kernels take widths up to {MAX_WIDTH}, not {', '.join(wide)}" if wide else None


def default_horizon(dtype: torch.dtype) -> float:
    """Half a unit in the last place of a logit of size 1 in the operands' dtype: 2^-24 in fp32,
    2^-11 in fp16, 2^-8 in bf16.
    """
    return torch.finfo(dtype).eps / 2


def exact_attention(
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
    cu_seqlens: Tensor | None = None,
    horizon: float | str | None = "auto",
) -> Tensor:
    """SISA attention, Eq. 2: :func:`sisa_kernels.sisa_attention` with ``backend="triton"``, and a
    choice of the horizon.

    Args:
        horizon: the largest change of a logit (natural logarithm) that leaving out an importance
            product may make; "auto": the rounding of a logit in q's dtype
            (:func:`default_horizon`); None: every product is made.
        the others: as there, but fp32, fp16 or bf16 only, Dh, Ds and Dv at most 128.

    Raises:
        TypeError, ValueError: as there, and for operands that the kernels do not take or a horizon
        that is not > 0.
    """
    check_attention(q, k, v, b, c, log_decay, theta, lam, rotary, "exact", cu_seqlens)
    _refuse(q, v, b)
    if horizon == "auto":
        horizon = default_horizon(q.dtype)
    if horizon is not None and not (isinstance(horizon, float) and horizon > 0):
        raise ValueError(f'horizon must be "auto", None or a float > 0, got {horizon!r}')
    refuse_forward_mode(q, k, v, b, c, log_decay, theta, lam)
    return triton_exact(
        q, k, v, b, c, log_decay, theta, lam, *(rotary or (None, None)), cu_seqlens, horizon
    )[0]


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    rotary: Rotary | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Plain causal attention ``softmax(q k^T / sqrt(Dh)) v`` by the same kernels, the importance
    term absent: SISA's baseline.

    Args:
        q: [B, L, H, Dh], fp32, fp16 or bf16, Dh at most 128.
        k: [B, L, G, Dh] in q's dtype; G divides H.
        v: [B, L, G, Dv] in q's dtype, Dv at most 128.
        rotary, cu_seqlens: as in :func:`sisa_kernels.sisa_attention`.

    Returns:
        y [B, L, H, Dv] in q's dtype, differentiable in q, k and v.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype or device; the message
        names it.
    """
    check_qk(q, k)
    check_values(v, k)
    check_rotary(rotary, q)
    check_documents(cu_seqlens, q)
    _refuse(q, v, None)
    refuse_forward_mode(q, k, v)
    return triton_exact(q, k, v, *(None,) * 5, *(rotary or (None, None)), cu_seqlens, None)[0]


def _refuse(q: Tensor, v: Tensor, b: Tensor | None) -> None:
    why = refusal(q, v, b)
    if why is not None:
        raise ValueError(f"the Triton path cannot run: {why}")
