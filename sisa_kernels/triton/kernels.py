"""The Triton kernels: the forward and the backward's query side (dq, dc) and key side (dk, dv, db).

Suffixes: _m rows of a query tile, _n rows of a key tile. Logarithms are base 2: exp2 is the GPU's
own. Each walks the other side's tiles in up to three phases: FAR (past the horizon, no importance
product), NEAR, and DIAGONAL (masked). Every program owns the rows it writes: there are no atomics,
and two runs give the same bits."""

import math

import triton
import triton.language as tl

FAR: tl.constexpr = tl.constexpr(0)
NEAR: tl.constexpr = tl.constexpr(1)
DIAGONAL: tl.constexpr = tl.constexpr(2)
LN2: tl.constexpr = tl.constexpr(math.log(2))


@triton.jit
def _rows(
    x,
    start,
    stride,
    L,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Rows start ... of one head, [ROWS, BLOCK]: zero past WIDTH and, unless WHOLE, past row L."""
    o_r, o_d = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    p = x + tl.cast(start, tl.int64) * stride + o_r[:, None] * stride + o_d[None, :]
    if WHOLE and WIDTH == BLOCK:
        return tl.load(p)
    elif WHOLE:
        return tl.load(p, mask=o_d[None, :] < WIDTH, other=0.0)
    else:
        return tl.load(p, mask=(start + o_r < L)[:, None] & (o_d < WIDTH)[None, :], other=0.0)


@triton.jit
def _store_rows(
    x, values, start, stride, L, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr
):
    o_r, o_d = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    p = x + tl.cast(start, tl.int64) * stride + o_r[:, None] * stride + o_d[None, :]
    tl.store(
        p, values.to(x.dtype.element_ty), mask=(start + o_r < L)[:, None] & (o_d < WIDTH)[None, :]
    )


@triton.jit
def _load_g(g_hi, g_lo, o, L):
    """g of the tokens o as its two halves; past L it is so low that such a query weighs nothing."""
    return tl.load(g_hi + o, mask=o < L, other=-1e30), tl.load(g_lo + o, mask=o < L, other=0.0)


@triton.jit
def _decay_between(hi_m, lo_m, hi_n, lo_n):
    """2^(g_m - g_n) for g = hi + lo, 1 where g would rise (in masked pairs, and rows past L)."""
    return tl.exp2(tl.minimum((hi_m - hi_n) + (lo_m - lo_n), 0.0))


@triton.jit
def _visible(s, o_m, o_n, first_m, ON_DIAGONAL: tl.constexpr, PACKED: tl.constexpr):
    """Scores s of queries o_m and keys o_n (broadcast); -inf at later keys, other documents."""
    if ON_DIAGONAL:
        s = tl.where(o_m >= o_n, s, float("-inf"))
    if PACKED:
        s = tl.where(o_n >= first_m, s, float("-inf"))
    return s


@triton.jit
def _weights(
    g_hi,
    g_lo,
    o_n,
    last,
    hi_m,
    lo_m,
    hi_first,
    lo_first,
    weight_m,
    lam_h,
    L,
    ON_DIAGONAL: tl.constexpr,
):
    """lam_h exp(g_i - g_j) of a query tile (weight_m its share) and a key tile up to ``last``."""
    hi_n, lo_n = _load_g(g_hi, g_lo, o_n, L)
    if ON_DIAGONAL:
        return lam_h * _decay_between(hi_m[:, None], lo_m[:, None], hi_n[None, :], lo_n[None, :])
    else:
        hi_last, lo_last = tl.load(g_hi + last), tl.load(g_lo + last)
        between = _decay_between(hi_first, lo_first, hi_last, lo_last)
        return (weight_m * between)[:, None] * _decay_between(hi_last, lo_last, hi_n, lo_n)[None, :]


@triton.jit
def forward_kernel(
    q,
    k,
    v,
    c,
    b,
    g_hi,
    g_lo,
    lam,
    horizon_start,
    first,
    y,
    lse,
    q_b,
    q_l,
    q_h,
    k_b,
    k_l,
    k_h,
    v_b,
    v_l,
    v_h,
    L,
    H,
    REPEAT,
    scale,
    IMPORTANCE: tl.constexpr,
    PACKED: tl.constexpr,
    DH: tl.constexpr,
    DV: tl.constexpr,
    DS: tl.constexpr,
    BH: tl.constexpr,
    BV: tl.constexpr,
    BS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    """y [B, L, H, DV] and the base-2 logarithm of each softmax's sum, lse [B, H, L].

    One program a query tile and head. q, k, v are strided; c [B, L, H, DS], b [B, L, G, DS], g
    [B, G, L] (base 2, in halves), horizon_start [B, H, tiles], first [L] are not."""
    STEP: tl.constexpr = (BN, BN, BD)
    tiles = tl.cdiv(L, BM)
    tile = tiles - 1 - tl.program_id(0) % tiles  # the longest rows first
    i_bh = tl.program_id(0) // tiles
    i_b, i_h = tl.cast(i_bh // H, tl.int64), tl.cast(i_bh % H, tl.int64)
    i_g, G = i_h // REPEAT, H // REPEAT
    start_m = tile * BM
    o_m = start_m + tl.arange(0, BM)
    k += i_b * k_b + i_g * k_h
    v += i_b * v_b + i_g * v_h
    q_m = _rows(q + i_b * q_b + i_h * q_h, start_m, q_l, L, DH, BH, BM, False)
    acc = tl.zeros([BM, BV], tl.float32)
    norm = tl.zeros([BM], tl.float32)
    top = tl.full([BM], float("-inf"), tl.float32)
    begin, first_m = 0, None
    whole = start_m // BN * BN  # the keys before it are seen by every row
    horizon = whole
    if PACKED:
        first_m = tl.load(first + tl.minimum(o_m, L - 1))[:, None]
        begin = tl.load(first + start_m) // BN * BN
    if IMPORTANCE:
        b += (i_b * L * G + i_g) * DS
        g_hi += (i_b * G + i_g) * L
        g_lo += (i_b * G + i_g) * L
        c_m = _rows(c + (i_b * L * H + i_h) * DS, start_m, H * DS, L, DS, BS, BM, False)
        lam_h = tl.load(lam + i_h) / (scale * LN2)
        hi_first, lo_first = tl.load(g_hi + start_m), tl.load(g_lo + start_m)
        hi_m, lo_m = _load_g(g_hi, g_lo, o_m, L)
        weight_m = lam_h * _decay_between(hi_m, lo_m, hi_first, lo_first)
        horizon = tl.minimum(tl.maximum(tl.load(horizon_start + i_bh * tiles + tile), begin), whole)
    for phase in tl.static_range(3):
        if phase == FAR:
            lo, hi = begin, horizon
        elif phase == NEAR:
            lo, hi = horizon, whole
        else:
            lo, hi = whole, tl.minimum(start_m + BM, L)
        for start_n in tl.range(lo, hi, STEP[phase]):
            o_n = start_n + tl.arange(0, STEP[phase])
            k_n = _rows(k, start_n, k_l, L, DH, BH, STEP[phase], phase != DIAGONAL)
            s = tl.zeros([BM, STEP[phase]], tl.float32)
            if IMPORTANCE and phase != FAR:
                b_n = _rows(b, start_n, G * DS, L, DS, BS, STEP[phase], phase != DIAGONAL)
                end_n = start_n + BN - 1
                weight = _weights(
                    g_hi,
                    g_lo,
                    o_n,
                    end_n,
                    hi_m,
                    lo_m,
                    hi_first,
                    lo_first,
                    weight_m,
                    lam_h,
                    L,
                    phase == DIAGONAL,
                )
                s = tl.dot(c_m, tl.trans(b_n), input_precision="ieee") * weight
            s = tl.dot(q_m, tl.trans(k_n), s, input_precision="ieee")
            s = _visible(s, o_m[:, None], o_n[None, :], first_m, phase == DIAGONAL, PACKED)
            new_top = tl.maximum(top, tl.max(s, 1) * scale)
            # A row whose document begins in a later tile has no key yet: its maximum is -inf, and
            # -inf - -inf would be NaN.
            pivot = tl.where(new_top == float("-inf"), 0.0, new_top)
            shrink = tl.exp2(top - pivot)
            p = tl.exp2(s * scale - pivot[:, None])
            v_n = _rows(v, start_n, v_l, L, DV, BV, STEP[phase], phase != DIAGONAL)
            acc = tl.dot(p.to(v_n.dtype), v_n, acc * shrink[:, None], input_precision="ieee")
            norm = norm * shrink + tl.sum(p, 1)
            top = new_top
    _store_rows(y + (i_b * L * H + i_h) * DV, acc / norm[:, None], start_m, H * DV, L, DV, BV, BM)
    tl.store(lse + tl.cast(i_bh, tl.int64) * L + o_m, top + tl.log2(norm), mask=o_m < L)


@triton.jit
def backward_query_kernel(
    q,
    k,
    v,
    c,
    b,
    g_hi,
    g_lo,
    lam,
    horizon_start,
    first,
    dy,
    lse,
    delta,
    dq,
    dc,
    d_diagonal,
    q_b,
    q_l,
    q_h,
    k_b,
    k_l,
    k_h,
    v_b,
    v_l,
    v_h,
    L,
    H,
    REPEAT,
    scale,
    IMPORTANCE: tl.constexpr,
    PACKED: tl.constexpr,
    DH: tl.constexpr,
    DV: tl.constexpr,
    DS: tl.constexpr,
    BH: tl.constexpr,
    BV: tl.constexpr,
    BS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    """dq [B, L, H, DH], dc [B, L, H, DS] without the pairs i = j, and d_diagonal [B, H, L].

    The last is dL/ds_ii; it and dc are fp32. One program a query tile and head. dy [B, L, H, DV],
    delta [B, H, L] = <dy, y> and the rest as in the forward. The pairs i = j do not depend on decay
    and phase; kept apart, their rounding does not enter those gradients, which are differences."""
    STEP: tl.constexpr = (BN, BN, BD)
    tiles = tl.cdiv(L, BM)
    tile = tiles - 1 - tl.program_id(0) % tiles
    i_bh = tl.program_id(0) // tiles
    i_b, i_h = tl.cast(i_bh // H, tl.int64), tl.cast(i_bh % H, tl.int64)
    i_g, G = i_h // REPEAT, H // REPEAT
    start_m = tile * BM
    o_m = start_m + tl.arange(0, BM)
    k += i_b * k_b + i_g * k_h
    v += i_b * v_b + i_g * v_h
    q_m = _rows(q + i_b * q_b + i_h * q_h, start_m, q_l, L, DH, BH, BM, False)
    dy_m = _rows(dy + (i_b * L * H + i_h) * DV, start_m, H * DV, L, DV, BV, BM, False)
    row = tl.cast(i_bh, tl.int64) * L + o_m
    lse_m = tl.load(lse + row, mask=o_m < L, other=0.0)
    delta_m = tl.load(delta + row, mask=o_m < L, other=0.0)
    dq_m = tl.zeros([BM, BH], tl.float32)
    begin, first_m = 0, None
    whole = start_m // BN * BN
    horizon = whole
    if PACKED:
        first_m = tl.load(first + tl.minimum(o_m, L - 1))[:, None]
        begin = tl.load(first + start_m) // BN * BN
    if IMPORTANCE:
        b += (i_b * L * G + i_g) * DS
        g_hi += (i_b * G + i_g) * L
        g_lo += (i_b * G + i_g) * L
        c_m = _rows(c + (i_b * L * H + i_h) * DS, start_m, H * DS, L, DS, BS, BM, False)
        lam_h = tl.load(lam + i_h) / (scale * LN2)
        hi_first, lo_first = tl.load(g_hi + start_m), tl.load(g_lo + start_m)
        hi_m, lo_m = _load_g(g_hi, g_lo, o_m, L)
        weight_m = lam_h * _decay_between(hi_m, lo_m, hi_first, lo_first)
        horizon = tl.minimum(tl.maximum(tl.load(horizon_start + i_bh * tiles + tile), begin), whole)
        dc_m = tl.zeros([BM, BS], tl.float32)
        diagonal_m = tl.zeros([BM], tl.float32)
    for phase in tl.static_range(3):
        if phase == FAR:
            lo, hi = begin, horizon
        elif phase == NEAR:
            lo, hi = horizon, whole
        else:
            lo, hi = whole, tl.minimum(start_m + BM, L)
        for start_n in tl.range(lo, hi, STEP[phase]):
            o_n = start_n + tl.arange(0, STEP[phase])
            k_n = _rows(k, start_n, k_l, L, DH, BH, STEP[phase], phase != DIAGONAL)
            s = tl.zeros([BM, STEP[phase]], tl.float32)
            if IMPORTANCE and phase != FAR:
                b_n = _rows(b, start_n, G * DS, L, DS, BS, STEP[phase], phase != DIAGONAL)
                end_n = start_n + BN - 1
                weight = _weights(
                    g_hi,
                    g_lo,
                    o_n,
                    end_n,
                    hi_m,
                    lo_m,
                    hi_first,
                    lo_first,
                    weight_m,
                    lam_h,
                    L,
                    phase == DIAGONAL,
                )
                s = tl.dot(c_m, tl.trans(b_n), input_precision="ieee") * weight
            s = tl.dot(q_m, tl.trans(k_n), s, input_precision="ieee")
            s = _visible(s, o_m[:, None], o_n[None, :], first_m, phase == DIAGONAL, PACKED)
            v_n = _rows(v, start_n, v_l, L, DV, BV, STEP[phase], phase != DIAGONAL)
            ds = tl.exp2(s * scale - lse_m[:, None]) * (
                tl.dot(dy_m, tl.trans(v_n), input_precision="ieee") - delta_m[:, None]
            )
            dq_m = tl.dot(ds.to(k_n.dtype), k_n, dq_m, input_precision="ieee")
            if IMPORTANCE and phase != FAR:
                if phase == DIAGONAL:
                    same = o_m[:, None] == o_n[None, :]
                    diagonal_m += tl.sum(tl.where(same, ds, 0.0), 1)
                    ds = tl.where(same, 0.0, ds)
                dc_m = tl.dot((ds * weight).to(b_n.dtype), b_n, dc_m, input_precision="ieee")
    _store_rows(dq + (i_b * L * H + i_h) * DH, dq_m * (scale * LN2), start_m, H * DH, L, DH, BH, BM)
    if IMPORTANCE:
        _store_rows(
            dc + (i_b * L * H + i_h) * DS, dc_m * (scale * LN2), start_m, H * DS, L, DS, BS, BM
        )
        tl.store(d_diagonal + row, diagonal_m, mask=o_m < L)


@triton.jit
def backward_key_kernel(
    q,
    k,
    v,
    c,
    b,
    g_hi,
    g_lo,
    lam,
    horizon_end,
    first,
    last,
    dy,
    lse,
    delta,
    dk,
    dv,
    db,
    q_b,
    q_l,
    q_h,
    k_b,
    k_l,
    k_h,
    v_b,
    v_l,
    v_h,
    L,
    H,
    REPEAT,
    scale,
    IMPORTANCE: tl.constexpr,
    PACKED: tl.constexpr,
    DH: tl.constexpr,
    DV: tl.constexpr,
    DS: tl.constexpr,
    BH: tl.constexpr,
    BV: tl.constexpr,
    BS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    """dk [B, L, G, DH], dv [B, L, G, DV], and db [B, L, G, DS] without the pairs i = j.

    One program a key tile and key head. horizon_end [B, H, tiles] is the first query past the
    horizon, last [L] the end of each token's document. Scores are formed transposed, keys down:
    transposing a product in registers gave wrong gradients on Hopper (flash-linear-attention issue
    640)."""
    STEP: tl.constexpr = (BM, BM, BD)
    tiles = tl.cdiv(L, BN)
    tile = tl.program_id(0) % tiles
    i_bg = tl.program_id(0) // tiles
    G = H // REPEAT
    i_b, i_g = tl.cast(i_bg // G, tl.int64), tl.cast(i_bg % G, tl.int64)
    start_n = tile * BN
    o_n = start_n + tl.arange(0, BN)
    k_n = _rows(k + i_b * k_b + i_g * k_h, start_n, k_l, L, DH, BH, BN, False)
    v_n = _rows(v + i_b * v_b + i_g * v_h, start_n, v_l, L, DV, BV, BN, False)
    dk_n = tl.zeros([BN, BH], tl.float32)
    dv_n = tl.zeros([BN, BV], tl.float32)
    below = tl.minimum(tl.cdiv(start_n + BN, BM) * BM, L)  # the queries from it on see every key
    end = L
    if PACKED:
        end = tl.load(last + tl.minimum(start_n + BN, L) - 1)
    if IMPORTANCE:
        b_n = _rows(b + (i_b * L * G + i_g) * DS, start_n, G * DS, L, DS, BS, BN, False)
        db_n = tl.zeros([BN, BS], tl.float32)
        g_hi += (i_b * G + i_g) * L
        g_lo += (i_b * G + i_g) * L
        end_n = tl.minimum(start_n + BN, L) - 1
        hi_last, lo_last = tl.load(g_hi + end_n), tl.load(g_lo + end_n)
        hi_n, lo_n = _load_g(g_hi, g_lo, o_n, L)
        weight_n = _decay_between(hi_last, lo_last, hi_n, lo_n)
    for i_r in tl.range(REPEAT):
        i_h = i_g * REPEAT + i_r
        i_bh = i_b * H + i_h
        q_h0 = q + i_b * q_b + i_h * q_h
        dy_h0 = dy + (i_b * L * H + i_h) * DV
        horizon = below
        if IMPORTANCE:
            c_h0 = c + (i_b * L * H + i_h) * DS
            lam_h = tl.load(lam + i_h) / (scale * LN2)
            horizon = tl.minimum(tl.maximum(tl.load(horizon_end + i_bh * tiles + tile), below), end)
        for phase in tl.static_range(3):
            if phase == FAR:
                lo, hi = horizon, end
            elif phase == NEAR:
                lo, hi = below, horizon
            else:
                lo, hi = start_n // BM * BM, tl.minimum(below, end)
            for start_m in tl.range(lo, hi, STEP[phase]):
                o_m = start_m + tl.arange(0, STEP[phase])
                q_m = _rows(q_h0, start_m, q_l, L, DH, BH, STEP[phase], False)
                dy_m = _rows(dy_h0, start_m, H * DV, L, DV, BV, STEP[phase], False)
                lse_m = tl.load(lse + i_bh * L + o_m, mask=o_m < L, other=0.0)
                delta_m = tl.load(delta + i_bh * L + o_m, mask=o_m < L, other=0.0)
                s = tl.zeros([BN, STEP[phase]], tl.float32)
                if IMPORTANCE and phase != FAR:
                    c_m = _rows(c_h0, start_m, H * DS, L, DS, BS, STEP[phase], False)
                    hi_m, lo_m = _load_g(g_hi, g_lo, o_m, L)
                    if phase == DIAGONAL:
                        weight = lam_h * _decay_between(
                            hi_m[None, :], lo_m[None, :], hi_n[:, None], lo_n[:, None]
                        )
                    else:
                        weight = (lam_h * _decay_between(hi_m, lo_m, hi_last, lo_last))[
                            None, :
                        ] * weight_n[:, None]
                    s = tl.dot(b_n, tl.trans(c_m), input_precision="ieee") * weight
                s = tl.dot(k_n, tl.trans(q_m), s, input_precision="ieee")
                first_m = None
                if PACKED:
                    first_m = tl.load(first + tl.minimum(o_m, L - 1))[None, :]
                s = _visible(s, o_m[None, :], o_n[:, None], first_m, phase == DIAGONAL, PACKED)
                p = tl.exp2(s * scale - lse_m[None, :])
                dv_n = tl.dot(p.to(dy_m.dtype), dy_m, dv_n, input_precision="ieee")
                ds = p * (tl.dot(v_n, tl.trans(dy_m), input_precision="ieee") - delta_m[None, :])
                dk_n = tl.dot(ds.to(q_m.dtype), q_m, dk_n, input_precision="ieee")
                if IMPORTANCE and phase != FAR:
                    if phase == DIAGONAL:
                        ds = tl.where(o_m[None, :] == o_n[:, None], 0.0, ds)
                    db_n = tl.dot((ds * weight).to(c_m.dtype), c_m, db_n, input_precision="ieee")
    _store_rows(dk + (i_b * L * G + i_g) * DH, dk_n * (scale * LN2), start_n, G * DH, L, DH, BH, BN)
    _store_rows(dv + (i_b * L * G + i_g) * DV, dv_n, start_n, G * DV, L, DV, BV, BN)
    if IMPORTANCE:
        _store_rows(
            db + (i_b * L * G + i_g) * DS, db_n * (scale * LN2), start_n, G * DS, L, DS, BS, BN
        )


INTERPRETED = not isinstance(forward_kernel, triton.JITFunction)
