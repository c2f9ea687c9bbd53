"""The Triton kernels before attention: RoPE, and the running sums of decay and phase folded in.

A running sum is one of integers, which is exact in any order: of log2-decay in units of 2^-44, of
phase in 2^-56 of a turn, whole turns lost by themselves. An fp32 step enters as the exact products
of its two halves with those of the constant (:func:`_fixed`). So the sums keep the digits that fp64
would, without its arithmetic, which consumer GPUs run at a 64th of the speed.

L is cut into chunks of CHUNK tokens, a program each: sums_kernel leaves every chunk's sum, and
fold_kernel adds up those before its own. Programs of neighbouring heads run side by side: the
sectors of log_decay, 8 heads wide, come from memory once."""

import math

import triton
import triton.language as tl

from sisa_kernels.rotation import SMALLEST_LAM
from sisa_kernels.triton.kernels import _power_of_two

CHUNK = 128  # tokens of a program; no tile is larger
PAIRS = 8  # channel pairs of a program at a time, at most: 8 sums of 64 bits a thread


def _halves(x: float) -> tuple[float, float, float]:
    """x as two numbers of 12 bits and the rest."""
    scale = 2.0 ** (11 - math.floor(math.log2(x)))
    first = math.floor(x * scale) / scale
    scale *= 2.0**12
    second = math.floor((x - first) * scale) / scale
    return first, second, x - first - second


_LOG2E = _halves(1 / math.log(2))
_TURN = _halves(1 / (2 * math.pi))
LOG2E_0: tl.constexpr = tl.constexpr(_LOG2E[0])
LOG2E_1: tl.constexpr = tl.constexpr(_LOG2E[1])
LOG2E_2: tl.constexpr = tl.constexpr(_LOG2E[2])
TURN_0: tl.constexpr = tl.constexpr(_TURN[0])
TURN_1: tl.constexpr = tl.constexpr(_TURN[1])
TURN_2: tl.constexpr = tl.constexpr(_TURN[2])
STEEPEST: tl.constexpr = tl.constexpr(-200.0)  # nepers a token: fp32's exp of it is 0
LEAST_LAM: tl.constexpr = tl.constexpr(SMALLEST_LAM)
ROWS: tl.constexpr = tl.constexpr(64)  # chunks whose sums are added at a time
RADIANS: tl.constexpr = tl.constexpr(2 * math.pi / 2**32)


# ---- Channel pairs -------------------------------------------------------------------------------


@triton.jit
def load_pairs(x, o_t, stride, step, L, first, C: tl.constexpr, BLOCK: tl.constexpr):
    """Even and odd channels of the pairs first ... of the tokens o_t, fp32, each [tokens, BLOCK].

    0 past L and C. Loaded as they lie, 16 bytes at a time, then parted."""
    channel = first * 2 + tl.arange(0, 2 * BLOCK)
    p = x + (o_t.to(tl.int64) * stride)[:, None] + (channel * step)[None, :]
    rows = tl.load(p, (o_t < L)[:, None] & (channel < 2 * C)[None, :], 0.0)
    return tl.split(tl.reshape(rows.to(tl.float32), [o_t.shape[0], BLOCK, 2]))


@triton.jit
def store_pairs(x, x0, x1, o_t, stride, L, first, C: tl.constexpr, BLOCK: tl.constexpr):
    channel = first * 2 + tl.arange(0, 2 * BLOCK)
    p = x + (o_t.to(tl.int64) * stride)[:, None] + channel[None, :]
    rows = tl.reshape(tl.join(x0, x1), [o_t.shape[0], 2 * BLOCK]).to(x.dtype.element_ty)
    tl.store(p, rows, (o_t < L)[:, None] & (channel < 2 * C)[None, :])


@triton.jit
def load_halves(x, o_t, stride, step, L, first, C: tl.constexpr, BLOCK: tl.constexpr):
    """One number a channel pair, [tokens, BLOCK]: 0 past L and C."""
    channel = first + tl.arange(0, BLOCK)
    p = x + (o_t.to(tl.int64) * stride)[:, None] + (channel * step)[None, :]
    return tl.load(p, (o_t < L)[:, None] & (channel < C)[None, :], 0.0)


@triton.jit
def store_halves(x, values, o_t, stride, L, first, C: tl.constexpr, BLOCK: tl.constexpr):
    channel = first + tl.arange(0, BLOCK)
    p = x + (o_t.to(tl.int64) * stride)[:, None] + channel[None, :]
    tl.store(p, values, (o_t < L)[:, None] & (channel < C)[None, :])


# ---- Sums of integers ----------------------------------------------------------------------------


@triton.jit
def _fixed(x, a0, a1, a2, BITS: tl.constexpr, WRAP: tl.constexpr):
    """x (a0 + a1 + a2) in units of 2^-BITS, int64; with WRAP up to whole numbers.

    x, a0 and a1 are cut into 12 bits each: the products are exact, fused into a sum or not."""
    x0 = (x.to(tl.int32, bitcast=True) & -4096).to(tl.float32, bitcast=True)
    x1 = x - x0
    p = x0 * a0
    q = x0 * a1
    r = x1 * a0
    if WRAP:
        p -= tl.floor(p + 0.5)
        q -= tl.floor(q + 0.5)
        r -= tl.floor(r + 0.5)
    unit = 2.0**BITS
    rest = x1 * a1 + x * a2
    total = (p * unit).to(tl.int64) + (q * unit).to(tl.int64)
    return total + (r * unit).to(tl.int64) + (rest * unit).to(tl.int64)


@triton.jit
def _decay_steps(log_decay):
    """log2 of the decay in 2^-44, int64."""
    return _fixed(log_decay, LOG2E_0, LOG2E_1, LOG2E_2, 44, False)


@triton.jit
def _phase_steps(theta):
    """The steps in 2^-56 of a turn, int64; 256 turns are 0."""
    return _fixed(theta, TURN_0, TURN_1, TURN_2, 56, True)


@triton.jit
def _load_decay(log_decay, o_t, stride, L):
    """A step of 2^-200 is 0 in fp32 beside any other, and levels stay within int32."""
    x = tl.load(log_decay + o_t.to(tl.int64) * stride, o_t < L, 0.0)
    return tl.where(x < STEEPEST, STEEPEST, x)  # a NaN stays


@triton.jit
def cos_sin(phase):
    """Of a phase in 2^-32 turns (int32) to about 1e-7, without a branch: csrc/augment_math.h."""
    phase = phase.to(tl.int64)
    quarter = (phase + 2**29) >> 30
    x = (phase - (quarter << 30)).to(tl.float32) * RADIANS
    xx = x * x
    s = x + x * xx * (-1.6666654611e-1 + xx * (8.3321608736e-3 + xx * -1.9515295891e-4))
    c = xx * (
        -0.5
        + xx * (4.166664568298827e-2 + xx * (-1.388731625493765e-3 + xx * 2.443315711809948e-5))
    )
    c = 1.0 + c
    odd = (quarter & 1) != 0
    cos = tl.where(odd, s, c)
    sin = tl.where(odd, c, s)
    cos = tl.where(((quarter + 1) & 2) != 0, -cos, cos)
    sin = tl.where((quarter & 2) != 0, -sin, sin)
    return cos, sin


# ---- The kernels ---------------------------------------------------------------------------------


@triton.jit
def documents_kernel(bounds, first, last, count, L, TOKENS: tl.constexpr):
    """The first token and the end of each token's document, first and last [L].

    bounds [count], rising from 0, are searched by halving. One program for TOKENS tokens."""
    o_t = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    low = tl.zeros([TOKENS], tl.int32)  # the last bound that is not behind the token lies from it
    high = low + count  # to before it
    size = count
    while size > 0:
        middle = (low + high) // 2
        reached = tl.load(bounds + middle) <= o_t
        low = tl.where(reached, middle, low)
        high = tl.where(reached, high, middle)
        size = size // 2
    tl.store(first + o_t, tl.load(bounds + low).to(tl.int32), o_t < L)
    end = tl.load(bounds + low + 1, low + 1 < count, L)
    tl.store(last + o_t, end.to(tl.int32), o_t < L)


@triton.jit
def _turned(x, cos, sin, y, o_t, stride, step, y_stride, L, C: tl.constexpr, BLOCK: tl.constexpr):
    x0, x1 = load_pairs(x, o_t, stride, step, L, 0, C, BLOCK)
    store_pairs(y, x0 * cos - x1 * sin, x0 * sin + x1 * cos, o_t, y_stride, L, 0, C, BLOCK)


@triton.jit
def rotary_kernel(
    q,
    k,
    cos,
    sin,
    q_out,
    k_out,
    q_b,
    q_l,
    q_h,
    q_d,
    k_b,
    k_l,
    k_h,
    k_d,
    cos_l,
    cos_d,
    sin_l,
    sin_d,
    L,
    H,
    G,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    INVERSE: tl.constexpr,
):
    """q [B, L, H, 2 C] and k [B, L, G, 2 C] turned by RoPE's tables [L, C], or back (INVERSE).

    q_out and k_out are contiguous; they may be q and k. One program for ROWS tokens of a head of
    either, heads innermost: their tables are read from memory once."""
    tiles = tl.cdiv(L, ROWS)
    i_h = tl.program_id(0) % (H + G)
    i_t = tl.program_id(0) // (H + G)
    i_b = tl.cast(i_t // tiles, tl.int64)
    o_t = i_t % tiles * ROWS + tl.arange(0, ROWS)
    cos_t = load_halves(cos, o_t, cos_l, cos_d, L, 0, C, BLOCK)
    sin_t = load_halves(sin, o_t, sin_l, sin_d, L, 0, C, BLOCK)
    if INVERSE:
        sin_t = -sin_t
    if i_h < H:
        x = q + i_b * q_b + i_h * q_h
        y = q_out + (i_b * L * H + i_h) * C * 2
        _turned(x, cos_t, sin_t, y, o_t, q_l, q_d, H * C * 2, L, C, BLOCK)
    else:
        x = k + i_b * k_b + (i_h - H) * k_h
        y = k_out + (i_b * L * G + i_h - H) * C * 2
        _turned(x, cos_t, sin_t, y, o_t, k_l, k_d, G * C * 2, L, C, BLOCK)


@triton.jit
def sums_kernel(
    log_decay,
    theta,
    decay_sums,
    phase_sums,
    a_b,
    a_l,
    a_h,
    t_b,
    t_l,
    t_h,
    t_d,
    L,
    G,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    UNIT: tl.constexpr,
):
    """Each chunk's sum of decay, [B, G, chunks], and of phase, [B, G, chunks, C], int64.

    theta's strides are given over UNIT. One program a chunk and key head."""
    chunks = tl.cdiv(L, CHUNK)
    i_g = tl.program_id(0) % G
    i_c = tl.program_id(0) // G % chunks
    i_b = tl.cast(tl.program_id(0) // G // chunks, tl.int64)
    o_t = i_c * CHUNK + tl.arange(0, CHUNK)
    decay = _load_decay(log_decay + i_b * a_b + i_g * a_h, o_t, a_l, L)
    row = (i_b * G + i_g) * chunks + i_c
    tl.store(decay_sums + row, tl.sum(_decay_steps(decay), 0))
    for first in tl.range(0, C, BLOCK):
        x = load_halves(
            theta + (i_b * t_b + i_g * t_h) * UNIT, o_t, t_l * UNIT, t_d, L, first, C, BLOCK
        )
        channel = first + tl.arange(0, BLOCK)
        tl.store(phase_sums + row * C + channel, tl.sum(_phase_steps(x), 0), channel < C)


@triton.jit
def _decay_before(sums, i_c):
    """The sum of the chunks before i_c: whole levels, and the rest in [0, 1) in 2^-44."""
    levels = tl.zeros([ROWS], tl.int64)
    rests = tl.zeros([ROWS], tl.int64)
    for start in tl.range(0, i_c, ROWS):
        o = start + tl.arange(0, ROWS)
        x = tl.load(sums + o, o < i_c, 0)
        levels += x >> 44
        rests += x - ((x >> 44) << 44)
    rest = tl.sum(rests, 0)
    return tl.sum(levels, 0) + (rest >> 44), rest - ((rest >> 44) << 44)


@triton.jit
def _phase_before(sums, i_c, first, C: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of the chunks before i_c, [BLOCK]."""
    total = tl.zeros([ROWS, BLOCK], tl.int64)
    channel = first + tl.arange(0, BLOCK)
    for start in tl.range(0, i_c, ROWS):
        o = start + tl.arange(0, ROWS)
        p = sums + (o * C)[:, None] + channel[None, :]
        total += tl.load(p, (o < i_c)[:, None] & (channel < C)[None, :], 0)
    return tl.sum(total, 0)


@triton.jit
def _of_tile(level, SIZE: tl.constexpr, PICK: tl.constexpr, CHUNK: tl.constexpr):
    """For each token the level of token PICK of its tile of SIZE tokens."""
    tiles = tl.reshape(level, [CHUNK // SIZE, SIZE])
    picked = tl.sum(tl.where(tl.arange(0, SIZE)[None, :] == PICK, tiles, 0), 1)
    return tl.reshape(tl.broadcast_to(picked[:, None], [CHUNK // SIZE, SIZE]), [CHUNK])


@triton.jit
def _fold(
    x,
    folded,
    near,
    cos,
    sin,
    factor,
    lowering,
    o_t,
    stride,
    step,
    heads,
    L,
    first,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    NEAR: tl.constexpr,
):
    """x turned and times ``factor``, rounded, and that lowered."""
    x0, x1 = load_pairs(x, o_t, stride, step, L, first, C, BLOCK)
    y0 = ((x0 * cos - x1 * sin) * factor[:, None]).to(folded.dtype.element_ty)
    y1 = ((x0 * sin + x1 * cos) * factor[:, None]).to(folded.dtype.element_ty)
    store_pairs(folded, y0, y1, o_t, heads * C * 2, L, first, C, BLOCK)
    if NEAR:
        y0 = y0.to(tl.float32) * lowering[:, None]
        y1 = y1.to(tl.float32) * lowering[:, None]
        store_pairs(near, y0, y1, o_t, heads * C * 2, L, first, C, BLOCK)


@triton.jit
def _store_squares(
    squares, x, o_t, stride, step, L, C: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr
):
    """Of each row of x its squared norm."""
    total = tl.zeros([CHUNK], tl.float32)
    for first in tl.range(0, C, BLOCK):
        x0, x1 = load_pairs(x, o_t, stride, step, L, first, C, BLOCK)
        total += tl.sum(x0 * x0 + x1 * x1, 1)
    tl.store(squares + o_t, total, o_t < L)


@triton.jit
def fold_kernel(
    log_decay,
    theta,
    b,
    c,
    lam,
    decay_sums,
    phase_sums,
    b_out,
    c_out,
    near_b,
    near_c,
    level,
    fraction,
    lam_out,
    square_b,
    square_c,
    phase,
    a_b,
    a_l,
    a_h,
    t_b,
    t_l,
    t_h,
    t_d,
    b_b,
    b_l,
    b_h,
    b_d,
    c_b,
    c_l,
    c_h,
    c_d,
    lam_h,
    L,
    G,
    REPEAT: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    UNIT: tl.constexpr,
    KEYS: tl.constexpr,
    QUERIES: tl.constexpr,
    BACKWARD: tl.constexpr,
):
    """All of :class:`~sisa_kernels.triton.prologue.Importance`; near_c and phase where BACKWARD.

    theta's strides are given over UNIT. One program a chunk and key head, with the query heads that
    share it."""
    chunks = tl.cdiv(L, CHUNK)
    i_g = tl.program_id(0) % G
    i_c = tl.program_id(0) // G % chunks
    i_b = tl.cast(tl.program_id(0) // G // chunks, tl.int64)
    H = G * REPEAT
    o_t = i_c * CHUNK + tl.arange(0, CHUNK)
    i_bg = i_b * G + i_g
    decay = _load_decay(log_decay + i_b * a_b + i_g * a_h, o_t, a_l, L)
    whole, rest = _decay_before(decay_sums + i_bg * chunks, i_c)
    total = rest + tl.cumsum(_decay_steps(decay), 0)
    nearest = (total + 2**43) >> 44
    level_t = (whole + nearest).to(tl.int32)
    fraction_t = (total - (nearest << 44)).to(tl.float32) * 2.0**-44
    tl.store(level + i_bg * L + o_t, level_t, o_t < L)
    tl.store(fraction + i_bg * L + o_t, fraction_t, o_t < L)
    fraction_t += decay - decay  # integers know no NaN: its token's rows are to be
    raised = tl.exp2(fraction_t)
    lowered = tl.exp2(-fraction_t)
    to_last = _power_of_two(_of_tile(level_t, KEYS, KEYS - 1, CHUNK) - level_t)
    from_first = to_last
    if BACKWARD:
        from_first = _power_of_two(level_t - _of_tile(level_t, QUERIES, 0, CHUNK))
    for first in tl.range(0, C, BLOCK):
        x = load_halves(
            theta + (i_b * t_b + i_g * t_h) * UNIT, o_t, t_l * UNIT, t_d, L, first, C, BLOCK
        )
        before = _phase_before(phase_sums + i_bg * chunks * C, i_c, first, C, BLOCK)
        turns = before[None, :] + tl.cumsum(_phase_steps(x), 0)
        phase_t = ((turns + 2**23) >> 24).to(tl.int32)
        if BACKWARD:
            store_halves(phase + (i_b * L * G + i_g) * C, phase_t, o_t, G * C, L, first, C, BLOCK)
        cos, sin = cos_sin(phase_t)
        cos += x - x  # and of a NaN among the steps
        rows = (i_b * L * G + i_g) * C * 2
        _fold(
            b + i_b * b_b + i_g * b_h,
            b_out + rows,
            near_b + rows,
            cos,
            sin,
            lowered,
            to_last,
            o_t,
            b_l,
            b_d,
            G,
            L,
            first,
            C,
            BLOCK,
            True,
        )
        for i_r in tl.range(REPEAT):
            i_h = i_g * REPEAT + i_r
            rows = (i_b * L * H + i_h) * C * 2
            _fold(
                c + i_b * c_b + i_h * c_h,
                c_out + rows,
                near_c + rows if BACKWARD else c_out,
                cos,
                sin,
                raised,
                from_first,
                o_t,
                c_l,
                c_d,
                H,
                L,
                first,
                C,
                BLOCK,
                BACKWARD,
            )
    x = b + i_b * b_b + i_g * b_h
    _store_squares(square_b + i_bg * L, x, o_t, b_l, b_d, L, C, BLOCK, CHUNK)
    for i_r in tl.range(REPEAT):
        i_h = i_g * REPEAT + i_r
        x = c + i_b * c_b + i_h * c_h
        _store_squares(square_c + (i_b * H + i_h) * L, x, o_t, c_l, c_d, L, C, BLOCK, CHUNK)
    if (i_c == 0) & (i_b == 0):
        for i_r in tl.range(REPEAT):
            i_h = i_g * REPEAT + i_r
            tl.store(lam_out + i_h, tl.maximum(tl.load(lam + i_h * lam_h), LEAST_LAM))
