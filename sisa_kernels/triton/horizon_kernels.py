"""The Triton kernel of the horizon: bounds of tiles in integers, compared pair by pair."""

import triton
import triton.language as tl

UNIT: tl.constexpr = tl.constexpr(20)  # bits below 1 of a bound's logarithm
TILES: tl.constexpr = tl.constexpr(16)  # of either side at a time
TOKENS: tl.constexpr = tl.constexpr(1024)


@triton.jit
def _log2_norm(square):
    """log2 of a norm of at least 1 from its square's bits: a NaN is larger than any number."""
    square = square.to(tl.float32, bitcast=True)
    x = 0.5 * tl.log2(tl.where(square < 1.0, 1.0, square))
    return tl.where(x < 1024.0, x, 1024.0)


@triton.jit
def _bits(square):
    return square.to(tl.int32, bitcast=True)


@triton.jit
def _tile_norms(square, tile, SIZE: tl.constexpr, L):
    """log2 of the largest norm of each of the tiles, [tiles], rounded up to 2^-UNIT."""
    o = (tile * SIZE)[:, None] + tl.arange(0, SIZE)[None, :]
    largest = tl.max(_bits(tl.load(square + o, o < L, 0.0)), 1)
    return tl.ceil(_log2_norm(largest) * 2.0**UNIT).to(tl.int64)


@triton.jit
def _g(level, fraction, o):
    """g of the tokens o in 2^-UNIT."""
    whole = tl.load(level + o).to(tl.int64) << UNIT
    return whole + tl.floor(tl.load(fraction + o) * 2.0**UNIT).to(tl.int64)


@triton.jit
def _reaches(tile, square_b, level, fraction, L, N: tl.constexpr):
    """log2|b_J| - g_J of the key tiles."""
    last = tl.minimum(tile * N + N, L) - 1
    return _tile_norms(square_b, tile, N, L) - _g(level, fraction, last)


@triton.jit
def _needs(tile, square_c, level, fraction, allowed, L, M: tl.constexpr):
    """log2 (tolerance / lam) - log2|c_I| - g_I of the query tiles."""
    first = tl.minimum(tile * M, L - 1)
    return allowed - _tile_norms(square_c, tile, M, L) - _g(level, fraction, first)


@triton.jit
def _starts(
    starts,
    i_p,
    square_b,
    square_c,
    level,
    fraction,
    allowed,
    L,
    M: tl.constexpr,
    N: tl.constexpr,
):
    """For TILES query tiles the first key tile that needs the product, or holds its own tokens."""
    tile_m = i_p * TILES + tl.arange(0, TILES)
    need = _needs(tile_m, square_c, level, fraction, allowed, L, M)
    stop = tl.cdiv(tl.minimum((i_p + 1) * TILES * M, L), N)
    first = tile_m * M // N
    for start in tl.range(0, stop, TILES):
        tile_n = start + tl.arange(0, TILES)
        reach = _reaches(tile_n, square_b, level, fraction, L, N)
        needed = reach[None, :] > need[:, None]
        first = tl.minimum(first, tl.min(tl.where(needed, tile_n[None, :], stop), 1))
    tl.store(starts + tile_m, first * N, tile_m * M < L)


@triton.jit
def _ends(
    ends,
    i_p,
    square_b,
    square_c,
    level,
    fraction,
    allowed,
    L,
    M: tl.constexpr,
    N: tl.constexpr,
):
    """For TILES key tiles the end of the last query tile, not before its own, that needs it."""
    tile_n = i_p * TILES + tl.arange(0, TILES)
    reach = _reaches(tile_n, square_b, level, fraction, L, N)
    end = tile_n * N // M
    for start in tl.range(i_p * TILES * N // M, tl.cdiv(L, M), TILES):
        tile_m = start + tl.arange(0, TILES)
        need = _needs(tile_m, square_c, level, fraction, allowed, L, M)
        needed = (reach[:, None] > need[None, :]) & (tile_m * M < L)[None, :]
        end = tl.maximum(end, tl.max(tl.where(needed, tile_m[None, :] + 1, 0), 1))
    tl.store(ends + tile_n, end * M, tile_n * N < L)


@triton.jit
def horizon_kernel(
    square_b,
    square_c,
    level,
    fraction,
    lam,
    starts,
    ends,
    reach,
    tolerance,
    L,
    H,
    REPEAT: tl.constexpr,
    START_M: tl.constexpr,
    START_N: tl.constexpr,
    END_M: tl.constexpr,
    END_N: tl.constexpr,
):
    """:class:`~sisa_kernels.triton.horizon.Horizon`, of those of its fields that are not None.

    By Cauchy-Schwarz ``|lam exp(g_i - g_j) c_i.b_j| <= lam exp(g_I - g_J) max|c_I| max|b_J|`` for
    every i of a query tile I and j of a key tile J before it, with g_I at I's first token and g_J
    at J's last. With lam and both norms taken as at least 1, where that is <= tolerance no logit
    moves by more, and neither does its derivative in lam, or in c_i or b_j over lam: operands that
    are small, or 0 as at the start of training, keep their gradients. In base 2 a pair of tiles is
    past the horizon where reach_J <= need_I, with reach_J = log2|b_J| - g_J and
    need_I = log2 tolerance - log2 lam - log2|c_I| - g_I, in integers of 2^-UNIT: levels past 2^24
    keep their digits.

    tolerance: log2 of it less SLACK, in 2^-UNIT. Programs: for TILES query tiles each, then for
    TILES key tiles each, then one for reach, all of each head."""
    programs_m = 0
    programs_n = 0
    if starts is not None:
        programs_m = tl.cdiv(tl.cdiv(L, START_M), TILES)
    if ends is not None:
        programs_n = tl.cdiv(tl.cdiv(L, END_N), TILES)
    programs = programs_m + programs_n
    if reach is not None:
        programs += 1
    i_p = tl.program_id(0) % programs
    i_bh = tl.program_id(0) // programs
    i_h = i_bh % H
    i_bg = tl.cast(i_bh // H * (H // REPEAT) + i_h // REPEAT, tl.int64)
    square_c += tl.cast(i_bh, tl.int64) * L
    square_b += i_bg * L
    level += i_bg * L
    fraction += i_bg * L
    lam_h = tl.maximum(tl.load(lam + i_h), 1.0)
    allowed = tolerance - tl.ceil(tl.log2(lam_h) * 2.0**UNIT).to(tl.int64)
    if starts is not None:
        p = starts + tl.cast(i_bh, tl.int64) * tl.cdiv(L, START_M)
        if i_p < programs_m:
            _starts(p, i_p, square_b, square_c, level, fraction, allowed, L, START_M, START_N)
    i_p -= programs_m
    if ends is not None:
        p = ends + tl.cast(i_bh, tl.int64) * tl.cdiv(L, END_N)
        if (i_p >= 0) & (i_p < programs_n):
            _ends(p, i_p, square_b, square_c, level, fraction, allowed, L, END_M, END_N)
    if reach is not None:  # noqa: SIM102  decided when it is compiled
        if i_p == programs_n:
            tl.store(reach + i_bh, _reach(square_b, square_c, level, fraction, allowed, L))


@triton.jit
def _largest_norm(square, L):
    """log2 of a head's largest norm, rounded up to 2^-UNIT."""
    largest = tl.zeros([TOKENS], tl.int32)
    for start in tl.range(0, L, TOKENS):
        o = start + tl.arange(0, TOKENS)
        largest = tl.maximum(largest, _bits(tl.load(square + o, o < L, 0.0)))
    return tl.ceil(_log2_norm(tl.max(largest, 0)) * 2.0**UNIT).to(tl.int64)


@triton.jit
def _reach(square_b, square_c, level, fraction, allowed, L):
    """The largest i - j + 1 of a pair whose bound by the head's largest norms is not allowed.

    g falls: the first j of each i is found by halving."""
    allowed -= _largest_norm(square_b, L) + _largest_norm(square_c, L)
    widest = tl.zeros([TOKENS], tl.int32)
    for start in tl.range(0, L, TOKENS):
        o = tl.minimum(start + tl.arange(0, TOKENS), L - 1)
        g = _g(level, fraction, o)
        past = tl.zeros([TOKENS], tl.int32)  # keys before it are past the horizon
        upto = o + 1
        size = L
        while size > 0:
            middle = (past + upto) // 2
            gone = g - _g(level, fraction, tl.minimum(middle, L - 1)) <= allowed
            past = tl.where((past < upto) & gone, middle + 1, past)
            upto = tl.where((past < upto) & ~gone, middle, upto)
            size = size // 2
        widest = tl.maximum(widest, o - past + 1)
    return tl.max(widest, 0)
