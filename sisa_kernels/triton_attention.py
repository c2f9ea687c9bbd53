"""Exact SISA attention in Triton: one FlashAttention over two products, ``q.k`` and the decayed importance product.

The score of Eq. 2 is formed tile by tile from the *undecayed* operands ``R(Phi_i) c_i`` and ``R(Phi_j) b_j``; the decay
``exp(g_i - g_j)`` multiplies their product in fp32. Off the diagonal it is ``exp(g_i - g_I) exp(g_I - g_J) exp(g_J - g_j)``, g_I at
the query tile's first token and g_J at the key tile's last: a vector for each side and one number a tile, every exponent <= 0
whatever the length and the decay. On the diagonal it is taken element by element. g is kept in fp64; only differences of it are
rounded. Nothing is multiplied into the operands, so they need neither the range of fp32 nor references at fixed blocks.

Past the *horizon* the importance product of a tile is skipped (:func:`horizon_starts`). Without the importance operands the kernel
is plain causal attention.

Written for the GPU; ``TRITON_INTERPRET=1`` runs the same source on the CPU (fp32 and fp16), for tests.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .checks import Rotary, check_attention, check_documents, check_qk, check_rotary, check_values
from .ops import no_second_derivative, refuse_forward_mode
from .reference import rotate
from .scans import cumulative_decay, cumulative_phase, pair_products, to_key_heads, to_query_heads
from .tiles import Tile, choose_tiles

LOG2E = 1 / math.log(2)
MAX_WIDTH = 128
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# ---- Kernels --------------------------------------------------------------------------------------------------------------------
#
# Suffixes: _m rows of a query tile, _n rows of a key tile. Logarithms are base 2: exp2 is the GPU's own. Each walks the other
# side's tiles in up to three phases: FAR (past the horizon, no importance product), NEAR, and DIAGONAL (masked). Every program owns
# the rows it writes: there are no atomics, and two runs give the same bits.

FAR: tl.constexpr = tl.constexpr(0)
NEAR: tl.constexpr = tl.constexpr(1)
DIAGONAL: tl.constexpr = tl.constexpr(2)
LN2: tl.constexpr = tl.constexpr(math.log(2))


@triton.jit
def _rows(x, start, stride, L, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, WHOLE: tl.constexpr):
    """Rows start ... of one head, [ROWS, BLOCK]: zero past the WIDTH channels and, unless the tile is WHOLE, past row L."""
    o_r, o_d = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    p = x + tl.cast(start, tl.int64) * stride + o_r[:, None] * stride + o_d[None, :]
    if WHOLE and WIDTH == BLOCK:
        return tl.load(p)
    elif WHOLE:
        return tl.load(p, mask=o_d[None, :] < WIDTH, other=0.0)
    else:
        return tl.load(p, mask=(start + o_r < L)[:, None] & (o_d < WIDTH)[None, :], other=0.0)


@triton.jit
def _store_rows(x, values, start, stride, L, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    o_r, o_d = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    p = x + tl.cast(start, tl.int64) * stride + o_r[:, None] * stride + o_d[None, :]
    tl.store(p, values.to(x.dtype.element_ty), mask=(start + o_r < L)[:, None] & (o_d < WIDTH)[None, :])


@triton.jit
def _decay(g_hi, g_lo, o, L):
    """g of the tokens o as its two halves; past L it is so low that such a query weighs nothing."""
    return tl.load(g_hi + o, mask=o < L, other=-1e30), tl.load(g_lo + o, mask=o < L, other=0.0)


@triton.jit
def _fall(hi_m, lo_m, hi_n, lo_n):
    """2^(g_m - g_n) for g = hi + lo, 1 where g would rise (in pairs that the causal mask removes, and rows past L)."""
    return tl.exp2(tl.minimum((hi_m - hi_n) + (lo_m - lo_n), 0.0))


@triton.jit
def _visible(s, o_m, o_n, first_m, ON_DIAGONAL: tl.constexpr, PACKED: tl.constexpr):
    """The scores s of queries o_m and keys o_n, both broadcast to its shape; -inf where the key is later or of another document."""
    if ON_DIAGONAL:
        s = tl.where(o_m >= o_n, s, float("-inf"))
    if PACKED:
        s = tl.where(o_n >= first_m, s, float("-inf"))
    return s


@triton.jit
def _weights(g_hi, g_lo, o_n, last, hi_m, lo_m, hi_first, lo_first, weight_m, lam_h, L, ON_DIAGONAL: tl.constexpr):
    """lam_h exp(g_i - g_j) of a query tile and a key tile whose last token is ``last``; weight_m: the tile's own share of it."""
    hi_n, lo_n = _decay(g_hi, g_lo, o_n, L)
    if ON_DIAGONAL:
        return lam_h * _fall(hi_m[:, None], lo_m[:, None], hi_n[None, :], lo_n[None, :])
    else:
        hi_last, lo_last = tl.load(g_hi + last), tl.load(g_lo + last)
        between = _fall(hi_first, lo_first, hi_last, lo_last)
        return (weight_m * between)[:, None] * _fall(hi_last, lo_last, hi_n, lo_n)[None, :]


@triton.jit
def _forward_kernel(
    q, k, v, c, b, g_hi, g_lo, lam, near, first, y, lse,
    q_b, q_l, q_h, k_b, k_l, k_h, v_b, v_l, v_h, L, H, REPEAT, scale,
    IMPORTANCE: tl.constexpr, PACKED: tl.constexpr,
    DH: tl.constexpr, DV: tl.constexpr, DS: tl.constexpr, BH: tl.constexpr, BV: tl.constexpr, BS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """y [B, L, H, DV] and the base-2 logarithm of each softmax's sum, lse [B, H, L]; one program a query tile and head.

    q, k, v are strided; c [B, L, H, DS], b [B, L, G, DS], g [B, G, L] (base 2, in halves), near [B, H, tiles], first [L] are not.
    """
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
    near_from = whole
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
        hi_m, lo_m = _decay(g_hi, g_lo, o_m, L)
        weight_m = lam_h * _fall(hi_m, lo_m, hi_first, lo_first)
        near_from = tl.minimum(tl.maximum(tl.load(near + i_bh * tiles + tile), begin), whole)
    for phase in tl.static_range(3):
        if phase == FAR:
            lo, hi = begin, near_from
        elif phase == NEAR:
            lo, hi = near_from, whole
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
                    g_hi, g_lo, o_n, end_n, hi_m, lo_m, hi_first, lo_first, weight_m, lam_h, L, phase == DIAGONAL
                )  # fmt: skip
                s = tl.dot(c_m, tl.trans(b_n), input_precision="ieee") * weight
            s = tl.dot(q_m, tl.trans(k_n), s, input_precision="ieee")
            s = _visible(s, o_m[:, None], o_n[None, :], first_m, phase == DIAGONAL, PACKED)
            new_top = tl.maximum(top, tl.max(s, 1) * scale)
            # A row whose document begins in a later tile has no key yet: its maximum is -inf, and -inf - -inf would be NaN.
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
def _backward_query_kernel(
    q, k, v, c, b, g_hi, g_lo, lam, near, first, dy, lse, delta, dq, dc, own,
    q_b, q_l, q_h, k_b, k_l, k_h, v_b, v_l, v_h, L, H, REPEAT, scale,
    IMPORTANCE: tl.constexpr, PACKED: tl.constexpr,
    DH: tl.constexpr, DV: tl.constexpr, DS: tl.constexpr, BH: tl.constexpr, BV: tl.constexpr, BS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """dq [B, L, H, DH], dc [B, L, H, DS] without the pairs i = j, and own [B, H, L], dL/ds_ii, in fp32.

    One program a query tile and head. dy [B, L, H, DV], delta [B, H, L] = <dy, y> and the rest as in the forward. The pairs i = j
    do not depend on decay and phase; kept apart, their rounding does not enter those gradients, which are differences.
    """
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
    near_from = whole
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
        hi_m, lo_m = _decay(g_hi, g_lo, o_m, L)
        weight_m = lam_h * _fall(hi_m, lo_m, hi_first, lo_first)
        near_from = tl.minimum(tl.maximum(tl.load(near + i_bh * tiles + tile), begin), whole)
        dc_m = tl.zeros([BM, BS], tl.float32)
        own_m = tl.zeros([BM], tl.float32)
    for phase in tl.static_range(3):
        if phase == FAR:
            lo, hi = begin, near_from
        elif phase == NEAR:
            lo, hi = near_from, whole
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
                    g_hi, g_lo, o_n, end_n, hi_m, lo_m, hi_first, lo_first, weight_m, lam_h, L, phase == DIAGONAL
                )  # fmt: skip
                s = tl.dot(c_m, tl.trans(b_n), input_precision="ieee") * weight
            s = tl.dot(q_m, tl.trans(k_n), s, input_precision="ieee")
            s = _visible(s, o_m[:, None], o_n[None, :], first_m, phase == DIAGONAL, PACKED)
            v_n = _rows(v, start_n, v_l, L, DV, BV, STEP[phase], phase != DIAGONAL)
            ds = tl.exp2(s * scale - lse_m[:, None]) * (tl.dot(dy_m, tl.trans(v_n), input_precision="ieee") - delta_m[:, None])
            dq_m = tl.dot(ds.to(k_n.dtype), k_n, dq_m, input_precision="ieee")
            if IMPORTANCE and phase != FAR:
                if phase == DIAGONAL:
                    same = o_m[:, None] == o_n[None, :]
                    own_m += tl.sum(tl.where(same, ds, 0.0), 1)
                    ds = tl.where(same, 0.0, ds)
                dc_m = tl.dot((ds * weight).to(b_n.dtype), b_n, dc_m, input_precision="ieee")
    _store_rows(dq + (i_b * L * H + i_h) * DH, dq_m * (scale * LN2), start_m, H * DH, L, DH, BH, BM)
    if IMPORTANCE:
        _store_rows(dc + (i_b * L * H + i_h) * DS, dc_m * (scale * LN2), start_m, H * DS, L, DS, BS, BM)
        tl.store(own + row, own_m, mask=o_m < L)


@triton.jit
def _backward_key_kernel(
    q, k, v, c, b, g_hi, g_lo, lam, near, first, last, dy, lse, delta, dk, dv, db,
    q_b, q_l, q_h, k_b, k_l, k_h, v_b, v_l, v_h, L, H, REPEAT, scale,
    IMPORTANCE: tl.constexpr, PACKED: tl.constexpr,
    DH: tl.constexpr, DV: tl.constexpr, DS: tl.constexpr, BH: tl.constexpr, BV: tl.constexpr, BS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """dk [B, L, G, DH], dv [B, L, G, DV], and db [B, L, G, DS] without the pairs i = j; one program a key tile and key head.

    near [B, H, tiles] is here the first query past the horizon, last [L] the end of each token's document. Scores are formed
    transposed, keys down: transposing a product in registers gave wrong gradients on Hopper (flash-linear-attention issue 640).
    """
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
        hi_n, lo_n = _decay(g_hi, g_lo, o_n, L)
        weight_n = _fall(hi_last, lo_last, hi_n, lo_n)
    for i_r in tl.range(REPEAT):
        i_h = i_g * REPEAT + i_r
        i_bh = i_b * H + i_h
        q_h0 = q + i_b * q_b + i_h * q_h
        dy_h0 = dy + (i_b * L * H + i_h) * DV
        near_to = below
        if IMPORTANCE:
            c_h0 = c + (i_b * L * H + i_h) * DS
            lam_h = tl.load(lam + i_h) / (scale * LN2)
            near_to = tl.minimum(tl.maximum(tl.load(near + i_bh * tiles + tile), below), end)
        for phase in tl.static_range(3):
            if phase == FAR:
                lo, hi = near_to, end
            elif phase == NEAR:
                lo, hi = below, near_to
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
                    hi_m, lo_m = _decay(g_hi, g_lo, o_m, L)
                    if phase == DIAGONAL:
                        weight = lam_h * _fall(hi_m[None, :], lo_m[None, :], hi_n[:, None], lo_n[:, None])
                    else:
                        weight = (lam_h * _fall(hi_m, lo_m, hi_last, lo_last))[None, :] * weight_n[:, None]
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
        _store_rows(db + (i_b * L * G + i_g) * DS, db_n * (scale * LN2), start_n, G * DS, L, DS, BS, BN)


INTERPRETED = not isinstance(_forward_kernel, triton.JITFunction)


# ---- Prologue and epilogue ------------------------------------------------------------------------------------------------------


class _Importance(NamedTuple):
    """The kernels' importance operands: b and c at their phase in their own dtype, and what belongs to them."""

    b: Tensor  # [B, L, G, Ds]
    c: Tensor  # [B, L, H, Ds]
    g_hi: Tensor  # [B, G, L] fp32: the cumulative log2-decay is g_hi + g_lo, whose differences keep fp32's precision
    g_lo: Tensor
    lam: Tensor  # [H] fp32
    size_b: Tensor  # [B, G, L] fp32: the norm of each row of b
    size_c: Tensor  # [B, H, L]
    cos: Tensor | None  # [B, L, G, Ds / 2] fp32, of the phase; for the backward only
    sin: Tensor | None


def _prologue(q, k, b, c, log_decay, theta, lam, cos, sin, backward: bool) -> tuple[Tensor, Tensor, _Importance | None]:
    """q and k with RoPE, where given, and the importance operands, where given."""
    if cos is not None:
        q, k = (rotate(x.float(), cos[:, None], sin[:, None]).to(x.dtype) for x in (q, k))
    if b is None:
        return q, k, None
    g = (cumulative_decay(log_decay) * LOG2E).transpose(1, 2).contiguous()
    g_hi = g.float()
    cos_k, sin_k = cumulative_phase(theta)
    cos_q, sin_q = (to_query_heads(x, q.shape[2]) for x in (cos_k, sin_k))
    b = rotate(b.float(), cos_k, sin_k).to(b.dtype)
    c = rotate(c.float(), cos_q, sin_q).to(c.dtype)
    size_b, size_c = (x.float().square().sum(3).sqrt().transpose(1, 2).contiguous() for x in (b, c))
    tables = (cos_k, sin_k) if backward else (None, None)
    return q, k, _Importance(b, c, g_hi, (g - g_hi).float(), lam.contiguous(), size_b, size_c, *tables)


def _row_products(dy, y):
    """<dy, y> of each row in fp32, [B, H, L]."""
    return (dy.float() * y.float()).sum(3).transpose(1, 2).contiguous()


def _unrotate(dq, dk, cos, sin):
    """dL/dq and dL/dk before RoPE, in the operands' dtype."""
    return tuple(rotate(x.float(), cos[:, None], -sin[:, None]).to(x.dtype) for x in (dq, dk))


def _importance_gradients(dc, db, own, b, c, lam, cos_k, sin_k, last):
    """Gradients for b, c, log_decay, theta and lam from those of the rotated operands without the pairs i = j (``own``: dL/ds_ii).

    ``last`` [L] int32: the end of each token's document, where the reverse running sums of dL/dg and dL/dPhi begin anew; None: one
    document.
    """
    H, G = c.shape[2], b.shape[2]
    b_float, c_float = b.float(), c.float()
    row, phase_q = pair_products(dc, c_float)
    col, phase_k = pair_products(db, b_float)
    dlog_decay = _reverse_sums(to_key_heads(row, G) - col, last)
    dtheta = _reverse_sums(to_key_heads(phase_q, G) + phase_k, last)
    b_all, own = to_query_heads(b_float, H), own.transpose(1, 2)[..., None]
    dlam = (row / lam + (own * c_float * b_all).sum(3)).sum((0, 1))
    own = own * lam[:, None]
    dc = rotate(dc + own * b_all, to_query_heads(cos_k, H), -to_query_heads(sin_k, H))
    db = rotate(db + to_key_heads(own * c_float, G), cos_k, -sin_k)
    return db.to(b.dtype), dc.to(c.dtype), dlog_decay, dtheta, dlam.float()


def _reverse_sums(x: Tensor, last: Tensor | None) -> Tensor:
    """Sum over t <= u < last[t] of axis 1, in fp32."""
    total = F.pad(x.transpose(1, -1), (0, 1)).flip(-1).cumsum(-1).flip(-1)
    total = total[..., :-1] if last is None else total[..., :-1] - total[..., last.long()]
    return total.transpose(1, -1).float().contiguous()


def _fused(device: torch.device, function: Callable) -> Callable:
    """``function`` as it is on the CPU; on a GPU compiled by Inductor, which makes a few passes of the chain."""
    return _compiled(function) if device.type == "cuda" else function


@functools.cache
def _compiled(function: Callable) -> Callable:
    return torch.compile(function)


# ---- The horizon ----------------------------------------------------------------------------------------------------------------


def _tile_maxima(x: Tensor, size: int) -> Tensor:
    """[B, heads, L] >= 0 -> the largest of each tile of ``size`` tokens, [B, heads, tiles]."""
    return F.pad(x, (0, -x.shape[2] % size)).unflatten(2, (-1, size)).amax(-1)


def _bounds(x: _Importance, tile: Tile, tolerance: float) -> tuple[Tensor, Tensor]:
    """(need [B, H, query tiles], reach [B, H, key tiles]): the tiles I and J < I are past the horizon where reach_J <= need_I.

    By Cauchy-Schwarz ``|lam exp(g_i - g_j) c_i.b_j| <= lam exp(g_I - g_J) max|c_I| max|b_J|`` for every i in I and j in J, with g_I
    at I's first token and g_J at J's last. With lam and both norms taken as at least 1, where that is <= tolerance no logit moves
    by more, and neither does its derivative in lam, or in c_i or b_j over lam: operands that are small, or 0 as at the start of
    training, keep their gradients. In base-2 logarithms: ``log2 |b_J| - g_J <= log2 tolerance - log2 lam - log2 |c_I| - g_I``.
    """
    H, (_, G, L) = x.lam.shape[0], x.g_hi.shape
    g = x.g_hi.double() + x.g_lo
    last = (torch.arange(tile.n, L + tile.n, tile.n, device=g.device) - 1).clamp(max=L - 1)
    reach = _tile_maxima(x.size_b, tile.n).clamp(min=1).double().log2() - g[:, :, last]
    largest = _tile_maxima(x.size_c, tile.m).clamp(min=1).double() * x.lam.double().clamp(min=1)[:, None]
    need = math.log2(tolerance) - largest.log2() - g[:, :, :: tile.m].repeat_interleave(H // G, 1)
    return need, reach.repeat_interleave(H // G, 1)


def horizon_starts(x: _Importance, tile: Tile, tolerance: float | None) -> Tensor:
    """For each query tile the first key that needs the importance product, [B, H, tiles] int32, a multiple of ``tile.n``.

    All key tiles before it are past the horizon: leaving their product out changes no logit by more than ``tolerance``
    (:func:`_bounds`). None: there is no horizon.
    """
    (B, H, L) = x.size_c.shape
    if tolerance is None:
        return torch.zeros(B, H, -(-L // tile.m), dtype=torch.int32, device=x.lam.device)
    need, reach = _bounds(x, tile, tolerance)
    return (torch.searchsorted(reach.cummax(2).values, need, right=True) * tile.n).int()


def horizon_ends(x: _Importance, tile: Tile, tolerance: float | None) -> Tensor:
    """For each key tile the query from which on none needs the importance product, [B, H, tiles] int32, a multiple of ``tile.m``;
    otherwise as :func:`horizon_starts`. Kernels of other tiles may leave out other pairs: each stays within the tolerance."""
    (B, H, L) = x.size_c.shape
    if tolerance is None:
        return torch.full((B, H, -(-L // tile.n)), -(-L // tile.m) * tile.m, dtype=torch.int32, device=x.lam.device)
    need, reach = _bounds(x, tile, tolerance)
    return (torch.searchsorted(need.flip(2).cummin(2).values.flip(2), reach) * tile.m).int()


# ---- Operators ------------------------------------------------------------------------------------------------------------------


def padded_width(width: int) -> int:
    """The width a kernel computes at: the next power of two, at least 16 (the least of Triton's products)."""
    return max(16, triton.next_power_of_2(width))


def _documents(L: int, cu_seqlens: Tensor | None, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    """For each token the first of its document and that document's end, each [L] int32, where documents are packed.

    With ``cu_seqlens`` on the device nothing waits for it: the call may be captured in a CUDA graph.
    """
    if cu_seqlens is None:
        return None, None
    bounds = cu_seqlens.to(device)
    first, last = (x.repeat_interleave(bounds.diff(), output_size=L) for x in (bounds[:-1], bounds[1:]))
    return first, last


class _Launcher:
    """What the launches of one problem share: sizes, strides, padded widths, tiles, documents."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, importance: _Importance | None, cu_seqlens: Tensor | None):
        (B, self.L, H, Dh), G, Dv = q.shape, k.shape[2], v.shape[3]
        Ds = 0 if importance is None else importance.b.shape[3]
        widths = {"DH": Dh, "DV": Dv, "DS": Ds}
        padded = {"BH": padded_width(Dh), "BV": padded_width(Dv), "BS": padded_width(Ds)}
        self.flags = {"IMPORTANCE": Ds > 0, "PACKED": cu_seqlens is not None, **widths, **padded}
        self.sizes = (*(n for t in (q, k, v) for n in t.stride()[:3]), self.L, H, H // G, LOG2E / math.sqrt(Dh))
        self.heads, self.key_heads = B * H, B * G
        self.tiles = choose_tiles(q.device, q.dtype, max(padded["BH"], padded["BV"]), padded["BS"] if Ds else 0)
        self.first, self.last = _documents(self.L, cu_seqlens, q.device)

    def __call__(self, kernel: Any, tile: Tile, rows: int, heads: int, *tensors: Tensor | None) -> None:
        programs = -(-self.L // rows) * heads
        blocks = {"BM": tile.m, "BN": tile.n, "BD": tile.diagonal}
        with torch.cuda.device_of(tensors[0]):  # Triton launches on the current device, whatever the tensors are on
            kernel[(programs,)](*tensors, *self.sizes, **self.flags, **blocks, num_warps=tile.warps, num_stages=tile.stages)


def _readable(x: Tensor) -> Tensor:
    """x itself where the kernels can address it: channels side by side, and a tile of 128 rows within 2^31 elements."""
    return x if x.stride(3) == 1 and x.stride(1) < 2**24 else x.contiguous()


def _operands(q, k, v, b, c, log_decay, theta, lam, cos, sin, backward) -> tuple[Tensor, Tensor, Tensor, _Importance | None]:
    q, k, importance = _fused(q.device, _prologue)(q, k, b, c, log_decay, theta, lam, cos, sin, backward)
    return _readable(q), _readable(k), _readable(v), importance


def _arguments(x: _Importance | None) -> tuple[Tensor | None, ...]:
    """The kernels' (c, b, g_hi, g_lo, lam)."""
    return (None,) * 5 if x is None else (x.c, x.b, x.g_hi, x.g_lo, x.lam)


@torch.library.custom_op("sisa::triton_exact", mutates_args=())
def triton_exact(
    q: Tensor, k: Tensor, v: Tensor,
    b: Tensor | None, c: Tensor | None, log_decay: Tensor | None, theta: Tensor | None, lam: Tensor | None,
    cos: Tensor | None, sin: Tensor | None, cu_seqlens: Tensor | None, horizon: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y [B, L, H, Dv] in q's dtype and the base-2 logarithm of each softmax's sum, [B, H, L] fp32; without b: plain attention."""
    q, k, v, x = _operands(q, k, v, b, c, log_decay, theta, lam, cos, sin, False)
    launch = _Launcher(q, k, v, x, cu_seqlens)
    B, L, H, _ = q.shape
    y, lse = q.new_empty(B, L, H, v.shape[3]), q.new_empty(B, H, L, dtype=torch.float32)
    tile = launch.tiles.forward
    starts = None if x is None else horizon_starts(x, tile, horizon)
    launch(_forward_kernel, tile, tile.m, launch.heads, q, k, v, *_arguments(x), starts, launch.first, y, lse)
    return y, lse


@triton_exact.register_fake
def _(q, k, v, b, c, log_decay, theta, lam, cos, sin, cu_seqlens, horizon):
    B, L, H, _ = q.shape
    return q.new_empty(B, L, H, v.shape[3]), q.new_empty(B, H, L, dtype=torch.float32)


@torch.library.custom_op("sisa::triton_exact_backward", mutates_args=())
def triton_exact_backward(
    dy: Tensor, y: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor,
    b: Tensor | None, c: Tensor | None, log_decay: Tensor | None, theta: Tensor | None, lam: Tensor | None,
    cos: Tensor | None, sin: Tensor | None, cu_seqlens: Tensor | None, horizon: float | None,
) -> list[Tensor]:  # fmt: skip
    """Gradients for q, k, v, and where given for b, c, log_decay, theta, lam, from the forward's inputs and results alone."""
    q, k, v, x = _operands(q, k, v, b, c, log_decay, theta, lam, cos, sin, True)
    launch, dy = _Launcher(q, k, v, x, cu_seqlens), dy.contiguous()
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    dc, db, own, starts, ends = None, None, None, None, None
    query, key = launch.tiles.query, launch.tiles.key
    if x is not None:
        dc, db = (torch.empty(t.shape, dtype=torch.float32, device=t.device) for t in (x.c, x.b))
        own = torch.empty_like(lse)
        starts, ends = horizon_starts(x, query, horizon), horizon_ends(x, key, horizon)
    delta = _fused(q.device, _row_products)(dy, y)
    operands, saved = (q, k, v, *_arguments(x)), (dy, lse, delta)
    launch(_backward_query_kernel, query, query.m, launch.heads, *operands, starts, launch.first, *saved, dq, dc, own)
    launch(_backward_key_kernel, key, key.n, launch.key_heads, *operands, ends, launch.first, launch.last, *saved, dk, dv, db)
    if cos is not None:
        dq, dk = _fused(q.device, _unrotate)(dq, dk, cos, sin)
    if x is None:
        return [dq, dk, dv]
    return [dq, dk, dv, *_fused(q.device, _importance_gradients)(dc, db, own, x.b, x.c, x.lam, x.cos, x.sin, launch.last)]


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


# ---- Functions ------------------------------------------------------------------------------------------------------------------


def refusal(q: Tensor, v: Tensor, b: Tensor | None) -> str | None:
    """Why the kernels cannot run on operands of these dtypes, widths and device; None where they can."""
    if q.device.type == "cpu" and not INTERPRETED:
        return "its kernels run on a GPU (TRITON_INTERPRET=1 runs them on the CPU, for tests)"
    taken = DTYPES[:2] if INTERPRETED else DTYPES  # Triton interprets bf16 wrongly: it multiplies the raw bits
    if q.dtype not in taken:
        return f"its kernels take {', '.join(map(str, taken))}{' in the interpreter' if INTERPRETED else ''}, not {q.dtype}"
    widths = {"Dh": q.shape[3], "Dv": v.shape[3], "Ds": 16 if b is None else b.shape[3]}
    wide = [f"{name} = {width}" for name, width in widths.items() if width > MAX_WIDTH]
    return f"its kernels take widths up to {MAX_WIDTH}, not {', '.join(wide)}" if wide else None


def default_horizon(dtype: torch.dtype) -> float:
    """Half a unit in the last place of a logit of size 1 in the operands' dtype: 2^-24 in fp32, 2^-11 in fp16, 2^-8 in bf16."""
    return torch.finfo(dtype).eps / 2


def exact_attention(
    q: Tensor, k: Tensor, v: Tensor, b: Tensor, c: Tensor, log_decay: Tensor, theta: Tensor, lam: Tensor, *,
    rotary: Rotary | None = None, cu_seqlens: Tensor | None = None, horizon: float | str | None = "auto",
) -> Tensor:  # fmt: skip
    """SISA attention, Eq. 2: :func:`sisa_kernels.sisa_attention` with ``backend="triton"``, and a choice of the horizon.

    Args:
        horizon: the largest change of a logit (natural logarithm) that leaving out an importance product may make; "auto": the
            rounding of a logit in q's dtype (:func:`default_horizon`); None: every product is made.
        the others: as there, but fp32, fp16 or bf16 only, Dh, Ds and Dv at most 128.

    Raises:
        TypeError, ValueError: as there, and for operands that the kernels do not take or a horizon that is not > 0.
    """
    check_attention(q, k, v, b, c, log_decay, theta, lam, rotary, "exact", cu_seqlens)
    _refuse(q, v, b)
    if horizon == "auto":
        horizon = default_horizon(q.dtype)
    if horizon is not None and not (isinstance(horizon, float) and horizon > 0):
        raise ValueError(f'horizon must be "auto", None or a float > 0, got {horizon!r}')
    refuse_forward_mode(q, k, v, b, c, log_decay, theta, lam)
    return triton_exact(q, k, v, b, c, log_decay, theta, lam, *(rotary or (None, None)), cu_seqlens, horizon)[0]


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, *, rotary: Rotary | None = None, cu_seqlens: Tensor | None = None
) -> Tensor:  # fmt: skip
    """Plain causal attention ``softmax(q k^T / sqrt(Dh)) v`` by the same kernels, the importance term absent: SISA's baseline.

    Args:
        q: [B, L, H, Dh], fp32, fp16 or bf16, Dh at most 128.
        k: [B, L, G, Dh] in q's dtype; G divides H.
        v: [B, L, G, Dv] in q's dtype, Dv at most 128.
        rotary, cu_seqlens: as in :func:`sisa_kernels.sisa_attention`.

    Returns:
        y [B, L, H, Dv] in q's dtype, differentiable in q, k and v.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype or device; the message names it.
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
