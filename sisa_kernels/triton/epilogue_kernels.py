"""The Triton kernels after attention's backward: the gradients of what the prologue took.

The gradients of decay and phase are running sums, from the end of each token's document backwards,
of differences of products; they nearly cancel. A chunk's are summed as integers in units of 2^-50
of its largest number, which is exact in any order, and the sum is left as a pair of fp32 (hi, lo):
products_kernel leaves the products and each chunk's sum, reverse_sums_kernel the sums of tokens."""

import triton
import triton.language as tl

from sisa_kernels.triton.prologue_kernels import (
    ROWS,
    cos_sin,
    load_halves,
    load_pairs,
    store_halves,
    store_pairs,
)


@triton.jit
def _two_sum(a, b):
    """a + b and what its rounding lost, which is exact."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


@triton.jit
def _units(x, axis: tl.constexpr):
    """2^50 over the power of two at the largest of |x| along the axis, its inverse, and 0 or NaN.

    Of the bits: a NaN is larger than infinity, and neither is lost."""
    bits = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis)
    largest = bits.to(tl.float32, bitcast=True)
    exponent = tl.maximum((bits >> 23) - 127, -70)
    up = ((50 - exponent + 127) << 23).to(tl.float32, bitcast=True)
    down = ((exponent - 50 + 127) << 23).to(tl.float32, bitcast=True)
    return up, down, largest - largest


@triton.jit
def _pair(x, down):
    """The integers x times ``down`` as hi + lo, fp32."""
    hi = x.to(tl.float32)
    lo = (x - hi.to(tl.int64)).to(tl.float32)
    return hi * down, lo * down


@triton.jit
def _exact_sum(x):
    """The sum of x over its first axis as hi + lo."""
    up, down, poison = _units(x, 0)
    if len(x.shape) == 1:
        total = tl.sum((x * up).to(tl.int64), 0)
    else:
        total = tl.sum((x * up[None, :]).to(tl.int64), 0)
    hi, lo = _pair(total, down)
    return hi + poison, lo


@triton.jit
def row_products_kernel(
    x,
    y,
    out,
    x_b,
    x_l,
    x_h,
    x_d,
    y_b,
    y_l,
    y_h,
    y_d,
    L,
    H,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """<x, y> of each row of x and y [B, L, H, WIDTH] in fp32, [B, H, L].

    One program for ROWS tokens of a head."""
    i_h = tl.program_id(0) % H
    tiles = tl.cdiv(L, ROWS)
    i_b = tl.cast(tl.program_id(0) // H // tiles, tl.int64)
    o_t = tl.program_id(0) // H % tiles * ROWS + tl.arange(0, ROWS)
    u = load_halves(x + i_b * x_b + i_h * x_h, o_t, x_l, x_d, L, 0, WIDTH, BLOCK)
    v = load_halves(y + i_b * y_b + i_h * y_h, o_t, y_l, y_d, L, 0, WIDTH, BLOCK)
    total = tl.sum(u.to(tl.float32) * v.to(tl.float32), 1)
    tl.store(out + (i_b * H + i_h) * L + o_t, total, o_t < L)


@triton.jit
def products_kernel(
    b,
    c,
    fraction,
    phase,
    lam,
    dc,
    db,
    d_diagonal,
    last,
    dc_out,
    db_out,
    dlog_decay,
    dtheta,
    decay_sums,
    phase_sums,
    lam_sums,
    L,
    G,
    REPEAT: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    PACKED: tl.constexpr,
):
    """dL/db and dL/dc, and what the other gradients are sums of.

    dlog_decay [B, L, G] and dtheta [B, L, G, C] get dL/dg and dL/dPhi of each token; a chunk's sums
    of them, up to the end of its first token's document, are pairs, [B, G, chunks, 2] and
    [B, G, chunks, 2, C]; those of dL/dlam [H, B, chunks, blocks of channels, 2]. The rest as in
    :func:`~sisa_kernels.triton.epilogue.importance_gradients`. One program a chunk and key head,
    with the query heads that share it."""
    chunks = tl.cdiv(L, CHUNK)
    i_g = tl.program_id(0) % G
    i_c = tl.program_id(0) // G % chunks
    i_b = tl.cast(tl.program_id(0) // G // chunks, tl.int64)
    batch = tl.num_programs(0) // G // chunks
    H = G * REPEAT
    blocks: tl.constexpr = (C + BLOCK - 1) // BLOCK
    start = i_c * CHUNK
    o_t = start + tl.arange(0, CHUNK)
    i_bg = i_b * G + i_g
    fraction_t = tl.load(fraction + i_bg * L + o_t, o_t < L, 0.0)
    raised = tl.exp2(fraction_t)[:, None]
    lowered = tl.exp2(-fraction_t)[:, None]
    counted = o_t < L
    if PACKED:
        counted = o_t < tl.load(last + start)
    dg = tl.zeros([CHUNK], tl.float32)
    dg_lo = tl.zeros([CHUNK], tl.float32)
    keys = (i_b * L * G + i_g) * C * 2
    halves = (i_b * L * G + i_g) * C
    for first in tl.range(0, C, BLOCK):
        b0, b1 = load_pairs(b + keys, o_t, G * C * 2, 1, L, first, C, BLOCK)
        db0, db1 = load_pairs(db + keys, o_t, G * C * 2, 1, L, first, C, BLOCK)
        phase_t = load_halves(phase + halves, o_t, G * C, 1, L, first, C, BLOCK)
        cos, sin = cos_sin(phase_t)
        dg, lost = _two_sum(dg, -tl.sum(db0 * b0 + db1 * b1, 1))
        dg_lo += lost
        turn = b0 * db1 - b1 * db0
        turn_lo = tl.zeros([CHUNK, BLOCK], tl.float32)
        for i_r in tl.range(REPEAT):
            i_h = i_g * REPEAT + i_r
            queries = (i_b * L * H + i_h) * C * 2
            c0, c1 = load_pairs(c + queries, o_t, H * C * 2, 1, L, first, C, BLOCK)
            dc0, dc1 = load_pairs(dc + queries, o_t, H * C * 2, 1, L, first, C, BLOCK)
            diagonal = tl.load(d_diagonal + (i_b * H + i_h) * L + o_t, o_t < L, 0.0)
            lam_h = tl.load(lam + i_h)
            row = tl.sum(dc0 * c0 + dc1 * c1, 1)
            dg, lost = _two_sum(dg, row)
            dg_lo += lost
            turn, lost_turn = _two_sum(turn, c0 * dc1 - c1 * dc0)
            turn_lo += lost_turn
            of_lam, of_lam_lo = _exact_sum(row / lam_h + diagonal * tl.sum(c0 * b0 + c1 * b1, 1))
            p = lam_sums + (((i_h * batch + i_b) * chunks + i_c) * blocks + first // BLOCK) * 2
            tl.store(p, of_lam)
            tl.store(p + 1, of_lam_lo)
            diagonal = (diagonal * lam_h)[:, None]
            dc0 = (dc0 + diagonal * b0) * raised
            dc1 = (dc1 + diagonal * b1) * raised
            y0 = dc0 * cos + dc1 * sin
            y1 = dc1 * cos - dc0 * sin
            store_pairs(dc_out + queries, y0, y1, o_t, H * C * 2, L, first, C, BLOCK)
            db0 += diagonal * c0
            db1 += diagonal * c1
        db0 *= lowered
        db1 *= lowered
        y0 = db0 * cos + db1 * sin
        y1 = db1 * cos - db0 * sin
        store_pairs(db_out + keys, y0, y1, o_t, G * C * 2, L, first, C, BLOCK)
        turn += turn_lo
        store_halves(dtheta + halves, turn, o_t, G * C, L, first, C, BLOCK)
        turns, turns_lo = _exact_sum(tl.where(counted[:, None], turn, 0.0))
        channel = first + tl.arange(0, BLOCK)
        sums = phase_sums + (i_bg * chunks + i_c) * 2 * C + channel
        tl.store(sums, turns, channel < C)
        tl.store(sums + C, turns_lo, channel < C)
    dg += dg_lo
    tl.store(dlog_decay + (i_b * L + o_t) * G + i_g, dg, o_t < L)
    hi, lo = _exact_sum(tl.where(counted, dg, 0.0))
    p = decay_sums + (i_bg * chunks + i_c) * 2
    tl.store(p, hi)
    tl.store(p + 1, lo)


@triton.jit
def _sums_behind(sums, i_c, stop, stride, first, C: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of the pairs of chunks i_c + 1 to stop, hi + lo, [BLOCK]."""
    hi = tl.zeros([BLOCK], tl.float32)
    lo = tl.zeros([BLOCK], tl.float32)
    channel = first + tl.arange(0, BLOCK)
    for start in tl.range(i_c + 1, stop, ROWS):
        o = start + tl.arange(0, ROWS)
        p = sums + (o * stride)[:, None] + channel[None, :]
        mask = (o < stop)[:, None] & (channel < C)[None, :]
        more, more_lo = _exact_sum(tl.load(p, mask, 0.0))
        hi, lost = _two_sum(hi, more)
        lo += lost + more_lo + tl.sum(tl.load(p + C, mask, 0.0), 0)
    return hi, lo


@triton.jit
def _reverse_sums(x, hi, lo, o_t, end, last_t, PACKED: tl.constexpr):
    """Sum of x [tokens, channels] from each token on, hi + lo behind the chunk's end."""
    up, down, poison = _units(x, 0)
    total = tl.cumsum((x * up[None, :]).to(tl.int64), 0, reverse=True)
    if PACKED:
        inside = last_t < end
        index = tl.where(inside, last_t - (end - o_t.shape[0]), 0)
        beyond = tl.gather(total, tl.broadcast_to(index[:, None], total.shape), 0)
        total -= tl.where(inside[:, None], beyond, 0)
        hi = tl.where(inside[:, None], 0.0, hi[None, :])
        lo = tl.where(inside[:, None], 0.0, lo[None, :])
    else:
        hi = hi[None, :]
        lo = lo[None, :]
    within, within_lo = _pair(total, down[None, :])
    result, lost = _two_sum(within, hi + tl.zeros_like(within))
    return result + (lost + within_lo + lo + poison[None, :])


@triton.jit
def reverse_sums_kernel(
    dlog_decay,
    dtheta,
    decay_sums,
    phase_sums,
    lam_sums,
    last,
    dlam,
    terms,
    L,
    G,
    REPEAT: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    PACKED: tl.constexpr,
):
    """What products_kernel left in dlog_decay and dtheta, summed in place; and dlam [H].

    ``terms``: the pairs of a head in lam_sums. One program a chunk and key head; the first of each
    head sums its dlam."""
    chunks = tl.cdiv(L, CHUNK)
    i_g = tl.program_id(0) % G
    i_c = tl.program_id(0) // G % chunks
    i_b = tl.cast(tl.program_id(0) // G // chunks, tl.int64)
    i_bg = i_b * G + i_g
    end = (i_c + 1) * CHUNK
    o_t = i_c * CHUNK + tl.arange(0, CHUNK)
    stop = chunks
    last_t = o_t
    if PACKED:
        last_t = tl.load(last + tl.minimum(o_t, L - 1))
        stop = tl.cdiv(tl.load(last + tl.minimum(end, L) - 1), CHUNK)
    p = dlog_decay + i_b * L * G + i_g
    dg = load_halves(p, o_t, G, 1, L, 0, 1, 1)
    hi, lo = _sums_behind(decay_sums + i_bg * chunks * 2, i_c, stop, 2, 0, 1, 1)
    store_halves(p, _reverse_sums(dg, hi, lo, o_t, end, last_t, PACKED), o_t, G, L, 0, 1, 1)
    for first in tl.range(0, C, BLOCK):
        p_turn = dtheta + (i_b * L * G + i_g) * C
        turn = load_halves(p_turn, o_t, G * C, 1, L, first, C, BLOCK)
        sums = phase_sums + i_bg * chunks * 2 * C
        turns, turns_lo = _sums_behind(sums, i_c, stop, 2 * C, first, C, BLOCK)
        turn = _reverse_sums(turn, turns, turns_lo, o_t, end, last_t, PACKED)
        store_halves(p_turn, turn, o_t, G * C, L, first, C, BLOCK)
    if (i_c == 0) & (i_b == 0):
        for i_r in tl.range(REPEAT):
            i_h = i_g * REPEAT + i_r
            sums = lam_sums + tl.cast(i_h, tl.int64) * terms * 2
            total, total_lo = _sums_behind(sums, -1, terms, 2, 0, 1, 1)
            tl.store(dlam + i_h + tl.arange(0, 1), total + total_lo)
