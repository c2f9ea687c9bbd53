"""The Triton kernels around the wide form's stock call: operands widened, gradients narrowed.

A program a tile of tokens and head; every element is written by one program."""

import triton
import triton.language as tl

from sisa_kernels.triton.prologue_kernels import load_pairs, store_pairs


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
def _as_rounded(d0, d1, y0, y1, factor, dtype: tl.constexpr):
    """The gradient of y from that of u, which is y times the factor, rounded to the dtype.

    As complex numbers of two channels, d times the conjugate of u / y: then y and its gradient have
    the products, real and imaginary, of u and its own. dL/dg and dL/dPhi are differences of these
    between queries and keys, in which the rounding of u would stay."""
    u0 = (y0 * factor).to(dtype).to(tl.float32)
    u1 = (y1 * factor).to(dtype).to(tl.float32)
    size = y0 * y0 + y1 * y1
    seen = (size > 0) & (u0 * u0 + u1 * u1 > 0)  # past them lam is 0, whose gradient is not
    size = tl.where(seen, size, 1.0)
    along = tl.where(seen, (u0 * y0 + u1 * y1) / size, factor)
    across = tl.where(seen, (u1 * y0 - u0 * y1) / size, 0.0)
    return d0 * along + d1 * across, d1 * along - d0 * across


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
    y,
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
    """Gradients dx [B, L, H, DX], and dy [B, L, H, DY] fp32, of :func:`widen_kernel`.

    y as there; read where there is lam, which has rounded it."""
    i_b, i_h, o_t = _place(L, H, ROWS)
    level += (i_b * (H // REPEAT) + i_h // REPEAT) * L
    factor = _factor(level, lam if lam is None else lam + i_h, scale, o_t, L)
    d_out += (i_b * L * H + i_h) * (DX + DY)
    p, there = _channels(d_out, o_t, H * (DX + DY), 0, DX, BX, L)
    p_dx, _ = _channels(dx + (i_b * L * H + i_h) * DX, o_t, H * DX, 0, DX, BX, L)
    tl.store(p_dx, tl.load(p, mask=there, other=0.0), mask=there)
    d0, d1 = load_pairs(d_out + DX, o_t, H * (DX + DY), 1, L, 0, DY // 2, BY // 2)
    scales = factor[:, None]
    if lam is None:  # a power of two: nothing was rounded
        d0 *= scales
        d1 *= scales
    else:
        y += (i_b * L * H + i_h) * DY
        y0, y1 = load_pairs(y, o_t, H * DY, 1, L, 0, DY // 2, BY // 2)
        d0, d1 = _as_rounded(d0, d1, y0, y1, scales, d_out.dtype.element_ty)
    store_pairs(dy + (i_b * L * H + i_h) * DY, d0, d1, o_t, H * DY, L, 0, DY // 2, BY // 2)
