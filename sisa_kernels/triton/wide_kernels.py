"""The Triton kernels around the wide form's stock call: operands widened, gradients narrowed.

A program a tile of tokens and head; every element is written by one program."""

import triton
import triton.language as tl


@triton.jit
def _place(L, H, ROWS: tl.constexpr):
    """The program's sequence, its head and its tokens."""
    tiles = tl.cdiv(L, ROWS)
    i_bh = tl.program_id(0) // tiles
    o_t = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    return tl.cast(i_bh // H, tl.int64), tl.cast(i_bh % H, tl.int64), o_t


@triton.jit
def _factor(level, lam, scale, o_t, L):
    """What the importance channels of the tokens o_t are multiplied by; lam None: of a key."""
    middle = (tl.load(level) + tl.load(level + L - 1)) >> 1
    exponent = tl.load(level + o_t, mask=o_t < L, other=0) - middle
    if lam is None:
        exponent = -exponent
    bits = (tl.minimum(tl.maximum(exponent, -127), 128) + 127) << 23
    factor = bits.to(tl.float32, bitcast=True)
    if lam is None:
        return factor
    else:
        return factor * (tl.load(lam) * scale)


@triton.jit
def _channels(x, o_t, stride, first, WIDTH: tl.constexpr, BLOCK: tl.constexpr, L):
    """Addresses of WIDTH channels from ``first`` on, and which of them there are."""
    o_d = tl.arange(0, BLOCK)
    p = x + tl.cast(o_t, tl.int64)[:, None] * stride + (first + o_d)[None, :]
    return p, (o_t < L)[:, None] & (o_d < WIDTH)[None, :]


@triton.jit
def widen_kernel(
    x,
    y,
    level,
    lam,
    out,
    x_b,
    x_l,
    x_h,
    L,
    H,
    scale,
    REPEAT: tl.constexpr,
    DX: tl.constexpr,
    DY: tl.constexpr,
    BX: tl.constexpr,
    BY: tl.constexpr,
    ROWS: tl.constexpr,
):
    """out [B, L, H, DX + DY]: the rows of x, then those of y [B, L, H, DY] times their factor."""
    i_b, i_h, o_t = _place(L, H, ROWS)
    level += (i_b * (H // REPEAT) + i_h // REPEAT) * L
    factor = _factor(level, lam if lam is None else lam + i_h, scale, o_t, L)
    out += (i_b * L * H + i_h) * (DX + DY)
    p, there = _channels(x + i_b * x_b + i_h * x_h, o_t, x_l, 0, DX, BX, L)
    p_out, _ = _channels(out, o_t, H * (DX + DY), 0, DX, BX, L)
    tl.store(p_out, tl.load(p, mask=there, other=0.0), mask=there)
    p, there = _channels(y + (i_b * L * H + i_h) * DY, o_t, H * DY, 0, DY, BY, L)
    p_out, _ = _channels(out, o_t, H * (DX + DY), DX, DY, BY, L)
    rows = tl.load(p, mask=there, other=0.0).to(tl.float32) * factor[:, None]
    tl.store(p_out, rows.to(out.dtype.element_ty), mask=there)


@triton.jit
def narrow_kernel(
    d_out,
    level,
    lam,
    dx,
    dy,
    L,
    H,
    scale,
    REPEAT: tl.constexpr,
    DX: tl.constexpr,
    DY: tl.constexpr,
    BX: tl.constexpr,
    BY: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Gradients dx [B, L, H, DX], and dy [B, L, H, DY] fp32, of :func:`widen_kernel`."""
    i_b, i_h, o_t = _place(L, H, ROWS)
    level += (i_b * (H // REPEAT) + i_h // REPEAT) * L
    factor = _factor(level, lam if lam is None else lam + i_h, scale, o_t, L)
    d_out += (i_b * L * H + i_h) * (DX + DY)
    p, there = _channels(d_out, o_t, H * (DX + DY), 0, DX, BX, L)
    p_dx, _ = _channels(dx + (i_b * L * H + i_h) * DX, o_t, H * DX, 0, DX, BX, L)
    tl.store(p_dx, tl.load(p, mask=there, other=0.0), mask=there)
    p, there = _channels(d_out, o_t, H * (DX + DY), DX, DY, BY, L)
    p_dy, _ = _channels(dy + (i_b * L * H + i_h) * DY, o_t, H * DY, 0, DY, BY, L)
    tl.store(p_dy, tl.load(p, mask=there, other=0.0).to(tl.float32) * factor[:, None], mask=there)
