"""Exact SISA attention in Triton: FlashAttention over ``q.k`` and the decayed importance product.

The score of Eq. 2 is formed tile by tile: ``q.k`` and, beside it, the product of ``R(Phi_i) c_i``
and ``R(Phi_j) b_j``, whose decay ``2^(g_i - g_j)`` (g in base 2) is put together from three parts.
With g = level + fraction, level an integer, the fractions are multiplied into c and b before they
are rounded; powers of two cost no digit. In a tile off the diagonal b is lowered to the level of
the key tile's last token, c to that of the query tile's first, and one number a tile is left for
the product, ``lam 2^(level_I - level_J)``; every exponent is <= 0 whatever the length and the
decay. On the diagonal ``2^(level_i - level_j)`` multiplies the product element by element.

Past the *horizon* the importance product of a tile is skipped (:func:`horizon_starts`). Without the
importance operands the kernel is plain causal attention.

Written for the GPU; ``TRITON_INTERPRET=1`` runs the same source on the CPU, for tests."""

import copy
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from sisa_kernels.checks import (
    check_attention,
    check_documents,
    check_qk,
    check_rotary,
    check_values,
)
from sisa_kernels.inputs import Operands, Rotary, ScoreInputs, SisaInputs, takes_flat
from sisa_kernels.ops import no_second_derivative, refuse_forward_mode, register, say_once
from sisa_kernels.triton.epilogue import importance_gradients, row_products
from sisa_kernels.triton.horizon import Horizon, horizons
from sisa_kernels.triton.kernels import (
    INTERPRETED,
    backward_key_kernel,
    backward_query_kernel,
    forward_kernel,
)
from sisa_kernels.triton.prologue import (
    LOG2E,
    Importance,
    documents,
    prologue,
    rotate_qk,
    unrotate,
)
from sisa_kernels.triton.tiles import Tile, Tiles, choose_tiles

MAX_WIDTH = 128
ALIGNED = 16  # elements, and bytes of an address: what Triton tells a kernel about its arguments
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Triton's interpreter multiplies the raw bits of bf16, unless it is mended, as in the tests.
INTERPRETED_DTYPES = DTYPES[:2]


def padded_width(width: int) -> int:
    """The width a kernel computes at: the next power of two, at least Triton's least, 16."""
    return max(16, triton.next_power_of_2(width))


class _Launcher:
    """What the launches of one problem share: operands, sizes, strides, padded widths, tiles."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        x: Importance | None,
        cu_seqlens: Tensor | None,
        tiles: Tiles,
    ):
        self.tiles = tiles
        B, self.L, H, Dh = q.shape
        G = k.shape[2]
        Dv = v.shape[3]
        Ds = 0 if x is None else x.b.shape[3]
        self.programs_of_queries = B * H
        self.programs_of_keys = B * G
        first = self.last = None
        if cu_seqlens is not None:
            first, self.last = documents(cu_seqlens.to(q.device), self.L)
        importance = dict.fromkeys(("c", "b", "level", "lam"))
        if x is not None:
            importance = {name: getattr(x, name) for name in importance}
        strides = {
            f"{name}_{axis}": stride
            for name, t in (("q", q), ("k", k), ("v", v))
            for axis, stride in zip("blh", _strides(t))
        }
        padded = {"BH": padded_width(Dh), "BV": padded_width(Dv), "BS": padded_width(Ds)}
        tensors = {"q": q, "k": k, "v": v, "first": first, **importance}
        sizes = {"L": self.L, "H": H, "REPEAT": H // G, "scale": LOG2E / math.sqrt(Dh)}
        kinds = {"IMPORTANCE": Ds > 0, "PACKED": cu_seqlens is not None}
        whole = {"flags": None, "WANTED": 0, "WINDOW": 0}
        widths = {"DH": Dh, "DV": Dv, "DS": Ds, **padded}
        self.shared: dict[str, Any] = {**tensors, **strides, **sizes, **kinds, **whole, **widths}

    def only(self, flags: Tensor, wanted: int, window: int = 0) -> "_Launcher":
        """The same of the key heads whose ``flags`` [B, G] int32 are ``wanted``; others return.

        ``window``: of each query's last ``window`` keys alone, itself among them; 0: of all."""
        part = copy.copy(self)
        part.shared = {**self.shared, "flags": flags, "WANTED": wanted, "WINDOW": window}
        return part

    def __call__(
        self, kernel: Any, tile: Tile, rows: int, heads: int, **tensors: Tensor | None
    ) -> None:
        """Run ``kernel``, a program for every ``rows`` tokens of every head."""
        programs = -(-self.L // rows) * heads
        with torch.cuda.device_of(self.shared["q"]):  # Triton launches on the current device
            kernel[(programs,)](
                **self.shared,
                **tensors,
                BM=tile.m,
                BN=tile.n,
                BD=tile.diagonal,
                num_warps=tile.warps,
                num_stages=tile.stages,
            )


def _tiles(q: Tensor, v: Tensor, b: Tensor | None) -> Tiles:
    """The tiles for operands of these widths; b None: plain attention."""
    width = max(padded_width(q.shape[3]), padded_width(v.shape[3]))
    return choose_tiles(q.device, q.dtype, width, 0 if b is None else padded_width(b.shape[3]))


def _strides(x: Tensor) -> list[int]:
    """Of batch, token and head; 0 where there is one alone, whatever the tensor says."""
    return [stride if size > 1 else 0 for size, stride in zip(x.shape[:3], x.stride())]


def _readable(x: Tensor, name: str) -> Tensor:
    """x, or a copy, said once, where the kernels could not read it or only by single numbers.

    They want channels side by side, a tile of 128 rows within 2^31 elements, and rows that begin at
    multiples of 16 elements: what Triton must know to load 16 bytes at a time, asynchronously. A
    copy of a width that is no multiple of 16 would not begin so either."""
    strides = _strides(x)
    odd = x.shape[3] % ALIGNED == 0 and (
        x.data_ptr() % ALIGNED != 0 or any(stride % ALIGNED for stride in strides)
    )
    if x.stride(3) == 1 and strides[1] < 2**24 and not odd:
        return x
    say_once(
        f"the Triton kernels copy {name}, whose strides are {tuple(x.stride())}: they load "
        f"channels side by side, from rows that begin at multiples of {ALIGNED} elements"
    )
    return x.clone(memory_format=torch.contiguous_format)


def _prepared(
    inputs: SisaInputs | Operands, keys: int, queries: int | None = None
) -> tuple[Tensor, Tensor, Importance | None]:
    """q and k with RoPE, and the importance operands, where there are any."""
    q, k, _, *terms = inputs[:8]
    given = [x for x in terms if x is not None]
    if given:
        x = ScoreInputs._make((q, k, *given, inputs.rotary))
        q, k, importance = prologue(x, keys, queries)
    else:
        q, k = rotate_qk(q, k, inputs.rotary)
        importance = None
    return _readable(q, "q"), _readable(k, "k"), importance


class Far(NamedTuple):
    """Attention over the keys before the window, which launches with a window continue.

    Contiguous; R = L - window rows: of y and q the last ones of the sequence, of k and v the first.
    """

    y: Tensor | None = None
    """[B, R, H, Dv]."""
    lse: Tensor | None = None
    """[B, H, R] fp32, natural logarithm."""
    dq: Tensor | None = None
    """[B, R, H, Dh]."""
    dk: Tensor | None = None
    """[B, R, G, Dh]."""
    dv: Tensor | None = None
    """[B, R, G, Dv]."""


NOTHING_FAR = Far()


class Saved(NamedTuple):
    """What both backward kernels read of the result, contiguous."""

    dy: Tensor
    """[B, L, H, Dv]."""
    lse: Tensor
    """[B, H, L] fp32, base 2."""
    delta: Tensor
    """<dy, y> of each row, [B, H, L] fp32."""


class RawGradients(NamedTuple):
    """What the backward kernels write, contiguous: gradients of the prologue's operands."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    dc: Tensor | None
    """[B, L, H, Ds] fp32, without the pairs i = j; like the rest None for plain attention."""
    db: Tensor | None
    """[B, L, G, Ds] fp32, without the pairs i = j."""
    d_diagonal: Tensor | None
    """dL/ds_ii [B, H, L] fp32."""


def forward_horizon(
    x: Importance | None, tiles: Tiles, tolerance: float | None, reach: bool = False
) -> Horizon:
    """What the forward may leave out; with ``reach`` that of each head, too."""
    if x is None:
        return Horizon(None, None, None)
    return horizons(x, tolerance, starts=tiles.forward, reach=reach)


def backward_horizon(x: Importance | None, tiles: Tiles, tolerance: float | None) -> Horizon:
    """What the two backward kernels may leave out."""
    if x is None:
        return Horizon(None, None, None)
    return horizons(x, tolerance, starts=tiles.query, ends=tiles.key)


def run_forward(
    launch: _Launcher,
    x: Importance | None,
    past: Horizon,
    y: Tensor,
    lse: Tensor,
    far: Far = NOTHING_FAR,
) -> None:
    """Write y [B, L, H, Dv] and the base-2 logarithm of each softmax's sum, lse [B, H, L] fp32.

    ``past``: :func:`forward_horizon`."""
    tile = launch.tiles.forward
    launch(
        forward_kernel,
        tile,
        rows=tile.m,
        heads=launch.programs_of_queries,
        near_b=None if x is None else x.near_b,
        horizon_start=past.starts,
        far_y=far.y,
        far_lse=far.lse,
        y=y,
        lse=lse,
    )


def run_backward(
    launch: _Launcher,
    x: Importance | None,
    past: Horizon,
    saved: Saved,
    into: RawGradients,
    far: Far = NOTHING_FAR,
) -> None:
    """Write every gradient of the prologue's operands, ``into``.

    ``past``: :func:`backward_horizon`."""
    tile = launch.tiles.query
    launch(
        backward_query_kernel,
        tile,
        rows=tile.m,
        heads=launch.programs_of_queries,
        near_b=None if x is None else x.near_b,
        horizon_start=past.starts,
        far_dq=far.dq,
        dq=into.dq,
        dc=into.dc,
        d_diagonal=into.d_diagonal,
        **saved._asdict(),
    )
    tile = launch.tiles.key
    launch(
        backward_key_kernel,
        tile,
        rows=tile.n,
        heads=launch.programs_of_keys,
        near_c=None if x is None else x.near_c,
        horizon_end=past.ends,
        last=launch.last,
        far_dk=far.dk,
        far_dv=far.dv,
        dk=into.dk,
        dv=into.dv,
        db=into.db,
        **saved._asdict(),
    )


def empty_gradients(q: Tensor, k: Tensor, v: Tensor, x: Importance | None) -> RawGradients:
    """Of the prologue's operands, not yet written."""
    dq, dk, dv = (_empty(t) for t in (q, k, v))
    if x is None:
        return RawGradients(dq, dk, dv, None, None, None)
    B, L, H, _ = q.shape
    d_diagonal = q.new_empty(B, H, L, dtype=torch.float32)
    dc, db = (_empty(t, torch.float32) for t in (x.c, x.b))
    return RawGradients(dq, dk, dv, dc, db, d_diagonal)


def finished(
    raw: RawGradients, x: Importance | None, rotary: Rotary | None, last: Tensor | None
) -> list[Tensor]:
    """Gradients of the inputs from those of the prologue's operands."""
    dq, dk, dv, dc, db, d_diagonal = raw
    if rotary is not None:
        dq, dk = unrotate(dq, dk, *rotary)
    if x is None or dc is None or db is None or d_diagonal is None:
        return [dq, dk, dv]
    return [dq, dk, dv, *importance_gradients(dc, db, d_diagonal, x, last)]


@takes_flat
def triton_exact_eager(
    inputs: Operands,
    cu_seqlens: Tensor | None,
    horizon: float | None,
) -> tuple[Tensor, Tensor]:
    """y [B, L, H, Dv] in q's dtype, and log2 of each softmax's sum [B, H, L] fp32.

    Without b: plain attention."""
    v = inputs.v
    tiles = _tiles(inputs.q, v, inputs.b)
    q, k, x = _prepared(inputs, tiles.forward.n)
    launch = _Launcher(q, k, _readable(v, "v"), x, cu_seqlens, tiles)
    B, L, H, _ = q.shape
    y = q.new_empty(B, L, H, v.shape[3])
    lse = q.new_empty(B, H, L, dtype=torch.float32)
    run_forward(launch, x, forward_horizon(x, tiles, horizon), y, lse)
    return y, lse


def _triton_exact_fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    B, L, H, _ = q.shape
    return q.new_empty(B, L, H, v.shape[3]), q.new_empty(B, H, L, dtype=torch.float32)


@takes_flat
def triton_exact_backward_eager(
    dy: Tensor,
    y: Tensor,
    lse: Tensor,
    inputs: Operands,
    cu_seqlens: Tensor | None,
    horizon: float | None,
) -> list[Tensor]:
    """Gradients of what is given of q .. lam, from the forward's inputs and results alone."""
    v = inputs.v
    tiles = _tiles(inputs.q, v, inputs.b)
    q, k, x = _prepared(inputs, tiles.query.n, tiles.key.m)
    launch = _Launcher(q, k, _readable(v, "v"), x, cu_seqlens, tiles)
    dy = dy.contiguous()
    saved = Saved(dy, lse, row_products(dy, y))
    raw = empty_gradients(q, k, v, x)
    run_backward(launch, x, backward_horizon(x, tiles, horizon), saved, raw)
    return finished(raw, x, inputs.rotary, launch.last)


def _empty(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Contiguous, of x's shape and device, whatever x's strides are."""
    return torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)


def _triton_exact_backward_fake(dy: Tensor, y: Tensor, lse: Tensor, *inputs: Any) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in inputs[:8] if x is not None]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.horizon = inputs
    ctx.save_for_backward(*output, *tensors)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, dy: Tensor, _dlse: Tensor) -> tuple[Tensor | None, ...]:
    y, lse, *tensors = ctx.saved_tensors
    grads: Iterator[Tensor] = iter(triton_exact_backward(dy, y, lse, *tensors, ctx.horizon))
    found = (next(grads) if x is not None else None for x in tensors[:8])
    return *found, None, None, None, None


triton_exact = register("triton_exact", triton_exact_eager, _triton_exact_fake, _backward, _save)
triton_exact_backward = register(
    "triton_exact_backward",
    triton_exact_backward_eager,
    _triton_exact_backward_fake,
    no_second_derivative,
)


def refusal(q: Tensor, v: Tensor, b: Tensor | None) -> str | None:
    """Why the kernels cannot run on operands of these dtypes, widths and device; None: they can."""
    if q.device.type == "cpu" and not INTERPRETED:
        return "its kernels run on a GPU (TRITON_INTERPRET=1 runs them on the CPU, for tests)"
    taken = INTERPRETED_DTYPES if INTERPRETED else DTYPES
    if q.dtype not in taken:
        where = " in the interpreter" if INTERPRETED else ""
        return f"its kernels take {', '.join(map(str, taken))}{where}, not {q.dtype}"
    widths = {"Dh": q.shape[3], "Dv": v.shape[3], "Ds": 16 if b is None else b.shape[3]}
    wide = [f"{name} = {width}" for name, width in widths.items() if width > MAX_WIDTH]
    return f"its kernels take widths up to {MAX_WIDTH}, not {', '.join(wide)}" if wide else None


def default_horizon(dtype: torch.dtype) -> float:
    """Half a unit in the last place of a logit of size 1: fp32 2^-24, fp16 2^-11, bf16 2^-8."""
    return torch.finfo(dtype).eps / 2


def attend(inputs: SisaInputs) -> Tensor:
    """Exact SISA attention by the kernels, of operands that they take, to their dtype's horizon."""
    horizon = default_horizon(inputs.q.dtype)
    return triton_exact(*inputs.flat(), inputs.cu_seqlens, horizon)[0]


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
    """:func:`sisa_kernels.sisa_attention` with ``backend="triton"``, and a choice of the horizon.

    Args:
        horizon: the largest change of a logit (natural logarithm) that leaving out an importance
            product may make; "auto": the rounding of a logit in q's dtype
            (:func:`default_horizon`); None: every product is made.
        the others: as there, but fp32, fp16 or bf16 only, Dh, Ds and Dv at most 128.

    Raises:
        TypeError, ValueError: as there, and for operands that the kernels do not take or a horizon
        that is not > 0.
    """
    inputs = SisaInputs(q, k, v, b, c, log_decay, theta, lam, rotary, cu_seqlens)
    check_attention(inputs, "exact")
    _refuse(q, v, b)
    if horizon == "auto":
        horizon = default_horizon(q.dtype)
    if horizon is not None and not (isinstance(horizon, float) and horizon > 0):
        raise ValueError(f'horizon must be "auto", None or a float > 0, got {horizon!r}')
    refuse_forward_mode(*inputs.tensors())
    return triton_exact(*inputs.flat(), cu_seqlens, horizon)[0]


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    rotary: Rotary | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Plain causal attention by the same kernels, the importance term absent: SISA's baseline.

    ``softmax(q k^T / sqrt(Dh)) v``.

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
    no_importance = (None,) * 5
    tables = rotary or (None, None)
    return triton_exact(q, k, v, *no_importance, *tables, cu_seqlens, None)[0]


def _refuse(q: Tensor, v: Tensor, b: Tensor | None) -> None:
    why = refusal(q, v, b)
    if why is not None:
        raise ValueError(f"the Triton path cannot run: {why}")
