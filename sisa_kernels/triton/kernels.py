"""The Triton kernels: the forward and the backward's query side (dq, dc) and key side (dk, dv, db).

Suffixes: _m rows of a query tile, _n rows of a key tile. Logarithms are base 2: exp2 is the GPU's
own. Each walks the other side's tiles in up to three phases: NEAR, DIAGONAL (masked), and FAR (past
the horizon, no importance product). Their order counts on sm_90. A product into an accumulator is
still under way when its loop ends, and where ptxas must copy accumulators on the way around the
next loop it gives up and waits after every product (its remark C7515); in this order it need not.
tools/resources.py fails on that remark.

The decay of a pair is 2^(level_i - level_j), a power of two: the fractions of g are in c and b. On
the diagonal it multiplies the product element by element. In a NEAR tile c is lowered to its tile's
first level and b to its tile's last, both without rounding, and what is left is one number a tile.

Every program owns the rows it writes: there are no atomics, and two runs give the same bits."""

import math

import triton
import triton.language as tl

NEAR: tl.constexpr = tl.constexpr(0)
DIAGONAL: tl.constexpr = tl.constexpr(1)
FAR: tl.constexpr = tl.constexpr(2)
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
def _far_rows(x, start, stride, rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """Rows start ... of one head of far attention's results, in fp32: zero before 0, past rows."""
    o_r, o_d = start + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    p = x + tl.cast(o_r, tl.int64)[:, None] * stride + o_d[None, :]
    seen = ((o_r >= 0) & (o_r < rows))[:, None] & (o_d < WIDTH)[None, :]
    return tl.load(p, mask=seen, other=0.0).to(tl.float32)


@triton.jit
def _levels(level, o, L):
    """The levels of the tokens o; 0 past L, where the operands are 0."""
    return tl.load(level + o, mask=o < L, other=0)


@triton.jit
def _power_of_two(exponent):
    """2^exponent in fp32 from its bits: 0 below -126, and 1 above 0 (in masked pairs, past L)."""
    bits = (tl.minimum(tl.maximum(exponent, -127), 0) + 127) << 23
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _lowered(x, exponent):
    """Rows x times 2^exponent, in x's dtype."""
    return (x.to(tl.float32) * _power_of_two(exponent)[:, None]).to(x.dtype)


@triton.jit
def _visible(s, key, first_m, last_m, ON_DIAGONAL: tl.constexpr, PACKED: tl.constexpr):
    """Scores s of each query's keys from first_m to last_m (broadcast), -inf at the others."""
    if ON_DIAGONAL:
        s = tl.where(key <= last_m, s, float("-inf"))
    if PACKED:
        s = tl.where(key >= first_m, s, float("-inf"))
    return s


@triton.jit
def _visible_keys(s, start_n, o_m, first_m, ON_DIAGONAL: tl.constexpr, PACKED: tl.constexpr):
    """Scores s [queries o_m, keys from start_n on], -inf at later keys and other documents."""
    o_n = tl.arange(0, s.shape[1])[None, :]
    if ON_DIAGONAL:
        return _visible(s, start_n + o_n, first_m, o_m[:, None], True, PACKED)
    else:  # against constants: a thread's keys would be held in 32 registers
        return _visible(s, o_n, first_m - start_n, 0, False, PACKED)


@triton.jit
def forward_kernel(
    q,
    k,
    v,
    c,
    b,
    near_b,
    level,
    lam,
    horizon_start,
    first,
    y,
    lse,
    flags,
    far_y,
    far_lse,
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
    REPEAT: tl.constexpr,
    scale,
    IMPORTANCE: tl.constexpr,
    PACKED: tl.constexpr,
    WANTED: tl.constexpr,
    WINDOW: tl.constexpr,
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

    One program a query tile and head. q, k, v are strided; c [B, L, H, DS], b and near_b
    [B, L, G, DS], level [B, G, L], horizon_start [B, H, tiles], first [L] are not."""
    STEP: tl.constexpr = (BN, BD, BN)
    tiles = tl.cdiv(L, BM)
    tile = tiles - 1 - tl.program_id(0) % tiles  # the longest rows first
    i_bh = tl.program_id(0) // tiles
    i_b, i_h = tl.cast(i_bh // H, tl.int64), tl.cast(i_bh % H, tl.int64)
    i_g, G = i_h // REPEAT, H // REPEAT
    if flags is not None:  # noqa: SIM102  the first is the compiler's, the second the program's
        if tl.load(flags + i_b * G + i_g) != WANTED:
            return
    start_m = tile * BM
    o_m = start_m + tl.arange(0, BM)
    k += i_b * k_b + i_g * k_h
    v += i_b * v_b + i_g * v_h
    q_m = _rows(q + i_b * q_b + i_h * q_h, start_m, q_l, L, DH, BH, BM, False)
    acc = tl.zeros([BM, BV], tl.float32)
    norm = tl.zeros([BM], tl.float32)
    top = tl.full([BM], float("-inf"), tl.float32)
    if far_y is not None:  # the softmax is continued from that over the keys before the window
        rows, row = L - WINDOW, start_m - WINDOW
        acc = _far_rows(far_y + (i_b * rows * H + i_h) * DV, row, H * DV, rows, DV, BV, BM)
        seen = (o_m >= WINDOW) & (o_m < L)
        p_lse = far_lse + tl.cast(i_bh, tl.int64) * rows + (o_m - WINDOW)
        top = tl.load(p_lse, mask=seen, other=float("-inf")) / LN2
        norm = tl.where(seen, 1.0, 0.0)
    begin, first_m = 0, 0
    whole = start_m // BN * BN  # the keys before it are seen by every row
    horizon = whole
    if PACKED:
        first_m = tl.load(first + tl.minimum(o_m, L - 1))[:, None]
        begin = tl.load(first + start_m) // BN * BN
    if WINDOW > 0:
        first_m = (o_m - (WINDOW - 1))[:, None]
        begin = tl.maximum(start_m - (WINDOW - 1), 0) // BN * BN
    if IMPORTANCE:
        b += (i_b * L * G + i_g) * DS
        near_b += (i_b * L * G + i_g) * DS
        level += (i_b * G + i_g) * L
        c_m = _rows(c + (i_b * L * H + i_h) * DS, start_m, H * DS, L, DS, BS, BM, False)
        lam_h = tl.load(lam + i_h) / (scale * LN2)
        level_m = _levels(level, o_m, L)
        level_first = tl.load(level + start_m)
        near_c_m = _lowered(c_m, level_m - level_first)
        horizon = tl.minimum(tl.maximum(tl.load(horizon_start + i_bh * tiles + tile), begin), whole)
    for phase in tl.static_range(3):
        if phase == NEAR:
            lo, hi = horizon, whole
        elif phase == DIAGONAL:
            lo, hi = whole, tl.minimum(start_m + BM, L)
        else:
            lo, hi = begin, horizon
        for start_n in tl.range(lo, hi, STEP[phase]):
            k_n = _rows(k, start_n, k_l, L, DH, BH, STEP[phase], phase != DIAGONAL)
            s = tl.zeros([BM, STEP[phase]], tl.float32)
            if IMPORTANCE and phase == NEAR:
                b_n = _rows(near_b, start_n, G * DS, L, DS, BS, BN, True)
                level_last = tl.load(level + start_n + BN - 1)
                weight = lam_h * _power_of_two(level_first - level_last)
                s = tl.dot(near_c_m, tl.trans(b_n), input_precision="ieee") * weight
            if IMPORTANCE and phase == DIAGONAL:
                b_n = _rows(b, start_n, G * DS, L, DS, BS, BD, False)
                o_n = start_n + tl.arange(0, BD)
                level_n = _levels(level, o_n, L)
                weight = lam_h * _power_of_two(level_m[:, None] - level_n[None, :])
                s = tl.dot(c_m, tl.trans(b_n), input_precision="ieee") * weight
            s = tl.dot(q_m, tl.trans(k_n), s, input_precision="ieee")
            s = _visible_keys(s, start_n, o_m, first_m, phase == DIAGONAL, PACKED or WINDOW > 0)
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
    near_b,
    level,
    lam,
    horizon_start,
    first,
    dy,
    lse,
    delta,
    dq,
    dc,
    d_diagonal,
    flags,
    far_dq,
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
    REPEAT: tl.constexpr,
    scale,
    IMPORTANCE: tl.constexpr,
    PACKED: tl.constexpr,
    WANTED: tl.constexpr,
    WINDOW: tl.constexpr,
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
    STEP: tl.constexpr = (BN, BD, BN)
    tiles = tl.cdiv(L, BM)
    tile = tiles - 1 - tl.program_id(0) % tiles
    i_bh = tl.program_id(0) // tiles
    i_b, i_h = tl.cast(i_bh // H, tl.int64), tl.cast(i_bh % H, tl.int64)
    i_g, G = i_h // REPEAT, H // REPEAT
    if flags is not None:  # noqa: SIM102  the first is the compiler's, the second the program's
        if tl.load(flags + i_b * G + i_g) != WANTED:
            return
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
    if far_dq is not None:
        rows, first_row = L - WINDOW, start_m - WINDOW
        dq_m = _far_rows(far_dq + (i_b * rows * H + i_h) * DH, first_row, H * DH, rows, DH, BH, BM)
        dq_m = dq_m / (scale * LN2)
    begin, first_m = 0, 0
    whole = start_m // BN * BN
    horizon = whole
    if PACKED:
        first_m = tl.load(first + tl.minimum(o_m, L - 1))[:, None]
        begin = tl.load(first + start_m) // BN * BN
    if WINDOW > 0:
        first_m = (o_m - (WINDOW - 1))[:, None]
        begin = tl.maximum(start_m - (WINDOW - 1), 0) // BN * BN
    if IMPORTANCE:
        b += (i_b * L * G + i_g) * DS
        near_b += (i_b * L * G + i_g) * DS
        level += (i_b * G + i_g) * L
        c_m = _rows(c + (i_b * L * H + i_h) * DS, start_m, H * DS, L, DS, BS, BM, False)
        lam_h = tl.load(lam + i_h) / (scale * LN2)
        level_m = _levels(level, o_m, L)
        level_first = tl.load(level + start_m)
        near_c_m = _lowered(c_m, level_m - level_first)
        horizon = tl.minimum(tl.maximum(tl.load(horizon_start + i_bh * tiles + tile), begin), whole)
        dc_m = tl.zeros([BM, BS], tl.float32)
        diagonal_m = tl.zeros([BM], tl.float32)
    for phase in tl.static_range(3):
        if phase == NEAR:
            lo, hi = horizon, whole
        elif phase == DIAGONAL:
            lo, hi = whole, tl.minimum(start_m + BM, L)
        else:
            lo, hi = begin, horizon
        for start_n in tl.range(lo, hi, STEP[phase]):
            k_n = _rows(k, start_n, k_l, L, DH, BH, STEP[phase], phase != DIAGONAL)
            s = tl.zeros([BM, STEP[phase]], tl.float32)
            if IMPORTANCE and phase == NEAR:
                b_n = _rows(near_b, start_n, G * DS, L, DS, BS, BN, True)
                level_last = tl.load(level + start_n + BN - 1)
                weight = lam_h * _power_of_two(level_first - level_last)
                s = tl.dot(near_c_m, tl.trans(b_n), input_precision="ieee") * weight
            if IMPORTANCE and phase == DIAGONAL:
                b_n = _rows(b, start_n, G * DS, L, DS, BS, BD, False)
                o_n = start_n + tl.arange(0, BD)
                level_n = _levels(level, o_n, L)
                weight = lam_h * _power_of_two(level_m[:, None] - level_n[None, :])
                s = tl.dot(c_m, tl.trans(b_n), input_precision="ieee") * weight
            s = tl.dot(q_m, tl.trans(k_n), s, input_precision="ieee")
            s = _visible_keys(s, start_n, o_m, first_m, phase == DIAGONAL, PACKED or WINDOW > 0)
            v_n = _rows(v, start_n, v_l, L, DV, BV, STEP[phase], phase != DIAGONAL)
            ds = tl.exp2(s * scale - lse_m[:, None]) * (
                tl.dot(dy_m, tl.trans(v_n), input_precision="ieee") - delta_m[:, None]
            )
            dq_m = tl.dot(ds.to(k_n.dtype), k_n, dq_m, input_precision="ieee")
            if IMPORTANCE and phase == NEAR:
                dc_m += tl.dot(ds.to(b_n.dtype), b_n, input_precision="ieee") * weight
            if IMPORTANCE and phase == DIAGONAL:
                same = o_m[:, None] == o_n[None, :]
                diagonal_m += tl.sum(tl.where(same, ds, 0.0), 1)
                ds = tl.where(same, 0.0, ds) * weight
                dc_m = tl.dot(ds.to(b_n.dtype), b_n, dc_m, input_precision="ieee")
        if IMPORTANCE and phase == NEAR:
            dc_m *= _power_of_two(level_m - level_first)[:, None]
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
    near_c,
    level,
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
    flags,
    far_dk,
    far_dv,
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
    REPEAT: tl.constexpr,
    scale,
    IMPORTANCE: tl.constexpr,
    PACKED: tl.constexpr,
    WANTED: tl.constexpr,
    WINDOW: tl.constexpr,
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
    STEP: tl.constexpr = (BM, BD, BM)
    tiles = tl.cdiv(L, BN)
    tile = tl.program_id(0) % tiles
    i_bg = tl.program_id(0) // tiles
    G = H // REPEAT
    i_b, i_g = tl.cast(i_bg // G, tl.int64), tl.cast(i_bg % G, tl.int64)
    if flags is not None:  # noqa: SIM102  the first is the compiler's, the second the program's
        if tl.load(flags + i_bg) != WANTED:
            return
    start_n = tile * BN
    o_n = start_n + tl.arange(0, BN)
    k_n = _rows(k + i_b * k_b + i_g * k_h, start_n, k_l, L, DH, BH, BN, False)
    v_n = _rows(v + i_b * v_b + i_g * v_h, start_n, v_l, L, DV, BV, BN, False)
    dk_n = tl.zeros([BN, BH], tl.float32)
    dv_n = tl.zeros([BN, BV], tl.float32)
    if far_dk is not None:
        rows = L - WINDOW
        dk_n = _far_rows(far_dk + (i_b * rows * G + i_g) * DH, start_n, G * DH, rows, DH, BH, BN)
        dk_n = dk_n / (scale * LN2)
        dv_n = _far_rows(far_dv + (i_b * rows * G + i_g) * DV, start_n, G * DV, rows, DV, BV, BN)
    below = tl.minimum(tl.cdiv(start_n + BN, BM) * BM, L)  # the queries from it on see every key
    end = L
    if PACKED:
        end = tl.load(last + tl.minimum(start_n + BN, L) - 1)
    if WINDOW > 0:
        end = tl.minimum(start_n + (BN - 1 + WINDOW), L)
    if IMPORTANCE:
        b_n = _rows(b + (i_b * L * G + i_g) * DS, start_n, G * DS, L, DS, BS, BN, False)
        db_n = tl.zeros([BN, BS], tl.float32)
        level += (i_b * G + i_g) * L
        level_n = _levels(level, o_n, L)
        level_last = tl.load(level + tl.minimum(start_n + BN, L) - 1)
        near_b_n = _lowered(b_n, level_last - level_n)
    for phase in tl.static_range(3):
        for i_r in tl.range(REPEAT):
            i_h = i_g * REPEAT + i_r
            i_bh = i_b * H + i_h
            q_h0 = q + i_b * q_b + i_h * q_h
            dy_h0 = dy + (i_b * L * H + i_h) * DV
            horizon = below
            if IMPORTANCE:
                c_h0 = (near_c if phase == NEAR else c) + (i_b * L * H + i_h) * DS
                lam_h = tl.load(lam + i_h) / (scale * LN2)
                horizon = tl.load(horizon_end + i_bh * tiles + tile)
                horizon = tl.minimum(tl.maximum(horizon, below), end)
            if phase == NEAR:
                lo, hi = below, horizon
            elif phase == DIAGONAL:
                lo, hi = start_n // BM * BM, tl.minimum(below, end)
                if not IMPORTANCE:  # it is the first loop: no way around it, as at the top
                    tl.assume(lo < hi)
            else:
                lo, hi = horizon, end
            for start_m in tl.range(lo, hi, STEP[phase]):
                o_m = start_m + tl.arange(0, STEP[phase])
                q_m = _rows(q_h0, start_m, q_l, L, DH, BH, STEP[phase], False)
                dy_m = _rows(dy_h0, start_m, H * DV, L, DV, BV, STEP[phase], False)
                lse_m = tl.load(lse + i_bh * L + o_m, mask=o_m < L, other=0.0)
                delta_m = tl.load(delta + i_bh * L + o_m, mask=o_m < L, other=0.0)
                s = tl.zeros([BN, STEP[phase]], tl.float32)
                if IMPORTANCE and phase != FAR:
                    c_m = _rows(c_h0, start_m, H * DS, L, DS, BS, STEP[phase], False)
                if IMPORTANCE and phase == NEAR:
                    weight = lam_h * _power_of_two(tl.load(level + start_m) - level_last)
                    s = tl.dot(near_b_n, tl.trans(c_m), input_precision="ieee") * weight
                if IMPORTANCE and phase == DIAGONAL:
                    level_m = _levels(level, o_m, L)
                    weight = lam_h * _power_of_two(level_m[None, :] - level_n[:, None])
                    s = tl.dot(b_n, tl.trans(c_m), input_precision="ieee") * weight
                s = tl.dot(k_n, tl.trans(q_m), s, input_precision="ieee")
                first_m = 0
                if PACKED:
                    first_m = tl.load(first + tl.minimum(o_m, L - 1))[None, :]
                if WINDOW > 0:
                    first_m = (o_m - (WINDOW - 1))[None, :]
                s = _visible(
                    s, o_n[:, None], first_m, o_m[None, :], phase == DIAGONAL, PACKED or WINDOW > 0
                )
                p = tl.exp2(s * scale - lse_m[None, :])
                dv_n = tl.dot(p.to(dy_m.dtype), dy_m, dv_n, input_precision="ieee")
                ds = p * (tl.dot(v_n, tl.trans(dy_m), input_precision="ieee") - delta_m[None, :])
                dk_n = tl.dot(ds.to(q_m.dtype), q_m, dk_n, input_precision="ieee")
                if IMPORTANCE and phase == NEAR:
                    db_n += tl.dot(ds.to(c_m.dtype), c_m, input_precision="ieee") * weight
                if IMPORTANCE and phase == DIAGONAL:
                    ds = tl.where(o_m[None, :] == o_n[:, None], 0.0, ds) * weight
                    db_n = tl.dot(ds.to(c_m.dtype), c_m, db_n, input_precision="ieee")
        if IMPORTANCE and phase == NEAR:
            db_n *= _power_of_two(level_last - level_n)[:, None]
    _store_rows(dk + (i_b * L * G + i_g) * DH, dk_n * (scale * LN2), start_n, G * DH, L, DH, BH, BN)
    _store_rows(dv + (i_b * L * G + i_g) * DV, dv_n, start_n, G * DV, L, DV, BV, BN)
    if IMPORTANCE:
        _store_rows(
            db + (i_b * L * G + i_g) * DS, db_n * (scale * LN2), start_n, G * DS, L, DS, BS, BN
        )


INTERPRETED = not isinstance(forward_kernel, triton.JITFunction)
