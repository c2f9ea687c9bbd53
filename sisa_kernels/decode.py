"""Decoding: a cache of keys, and sisa_decode, which appends new tokens to it and attends from them
over all of it.

What token j brings to every later score (Eq. 2) is k_j, R(Phi_j) b_j and g_j: they are written once
and stay as they are. The weight ``exp(g_i - g_j)`` is formed when it is used and never above 1,
where keys augmented with a fixed offset overflow or clamp. g is kept in fp64: at g = -1e5 the
spacing of fp32 is 0.008, and so would be the error of a difference of two neighbours. That is 8
bytes a token and key head, beside 4 (Dh + Dv + Ds) in fp32. The running phase is fp64 too, and
wrapped into [-pi, pi]."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sisa_kernels.attention import asked_backend, sisa_attention
from sisa_kernels.cache import MAX_ROWS, TokenCache, last, refuse_gradients, visible, write
from sisa_kernels.checks import (
    Rotary,
    check_attention,
    check_rotary,
    check_shapes,
    check_tensor,
    check_values,
    wide_dtypes,
)
from sisa_kernels.ops import register, without_autocast
from sisa_kernels.rotation import rotate
from sisa_kernels.scans import cumulative_decay, work_dtype


class SisaCache(TokenCache):
    """What :func:`sisa_decode` keeps of the tokens so far, for ``batch`` sequences; empty at first.

    ``buffers`` are k (with RoPE) [B, G, capacity, Dh], b (rotated by the phase) [..., Ds] and v
    [..., Dv] in the compute dtype and g [B, G, capacity] fp64; ``phase`` [B, G, Ds / 2] fp64 is
    that of each row's last token, ``lengths`` the tokens a row holds. Raises ValueError for a batch
    below 1."""

    def __init__(self, batch: int):
        super().__init__(batch)
        self.phase: Tensor | None = None

    def select(self, rows: list[int]) -> None:
        super().select(rows)
        self.phase = self.phase[rows] if self.phase is not None else None


def _wrapped_phase(theta: Tensor, before: Tensor | float = 0.0) -> Tensor:
    """The phase of each token [B, T, G, Ds/2] in fp64, in [-pi, pi]; ``before``: that of the token
    before the first.
    """
    phase = theta.double().cumsum(1) + before
    return phase - 2 * math.pi * (phase / (2 * math.pi)).round()


def _rotated_keys(
    k: Tensor, b: Tensor, phase: Tensor, cos: Tensor | None, sin: Tensor | None
) -> tuple[Tensor, Tensor]:
    """k with RoPE (tables [T, Dh/2] or [B, T, Dh/2]) and b rotated by ``phase`` [B, T, G, Ds/2]
    fp64, in their dtype.
    """
    work = work_dtype(k)
    if cos is not None and sin is not None:
        k = rotate(k.to(work), cos.unsqueeze(-2), sin.unsqueeze(-2)).to(k.dtype)
    phase = phase.to(work)
    return k, rotate(b.to(work), phase.cos(), phase.sin()).to(b.dtype)


def _check(
    q,
    k,
    v,
    b,
    c,
    log_decay,
    theta,
    lam,
    cos,
    sin,
    k_cache,
    v_cache,
    b_cache,
    g_cache,
    phase,
    lengths,
) -> None:
    """Refuse what csrc/sisa.cpp refuses: every wrong shape, dtype, device or range of a direct call
    of the op.
    """
    check_shapes(q, k, b, c, log_decay, theta, lam, None)
    check_values(v, k)
    if q.shape[1] != 1:
        raise ValueError(f"q must be [batch, 1, heads, channels], got {list(q.shape)}")
    if k_cache.ndim != 4:
        raise ValueError(
            f"k_cache must be [batch, key heads, capacity, channels], got {list(k_cache.shape)}"
        )
    (B, _, _, Dh), G, Dv, Ds, capacity = (
        q.shape,
        k.shape[2],
        v.shape[3],
        b.shape[3],
        k_cache.shape[2],
    )
    same, double = (q.dtype,), (torch.float64,)
    if (cos is None) != (sin is None) or (cos is not None and Dh % 2):
        raise ValueError(
            f"cos and sin must be given together, and need an even head width, got q with {Dh} channels"
        )
    for name, x, shape, dtypes in (
        ("k_cache", k_cache, (B, G, capacity, Dh), same),
        ("v_cache", v_cache, (B, G, capacity, Dv), same),
        ("b_cache", b_cache, (B, G, capacity, Ds), same),
        ("g_cache", g_cache, (B, G, capacity), double),
        ("phase", phase, (B, G, Ds // 2), double),
    ):
        check_tensor(name, x, shape, dtypes, q.device)
    for name, table in (("cos", cos), ("sin", sin)):
        if table is not None:
            check_tensor(
                name, table, (1 if table.shape[0] == 1 else B, 1, Dh // 2), wide_dtypes(q), q.device
            )
    if len(lengths) != B or not all(1 <= n < capacity for n in lengths):
        raise ValueError(
            f"lengths must be {B} integers from 1 to the capacity {capacity} less 1, got {lengths}"
        )


def _step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    b: Tensor,
    c: Tensor,
    log_decay: Tensor,
    theta: Tensor,
    lam: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    b_cache: Tensor,
    g_cache: Tensor,
    phase: Tensor,
    lengths: list[int],
) -> Tensor:
    """:func:`decode_eager` of any number T of new tokens, T * (max(lengths) + T) scores a head."""
    T, work = q.shape[1], work_dtype(q)
    g = last(g_cache.transpose(1, 2), lengths)[:, None] + cumulative_decay(log_decay)
    phases = _wrapped_phase(theta, phase[:, None])
    for buffer, x in zip(
        (k_cache, b_cache, v_cache, g_cache), (*_rotated_keys(k, b, phases, cos, sin), v, g)
    ):
        write(buffer, x, lengths)

    heads = q.shape[2] // k.shape[2]
    q, c = q.to(work), c.to(work)
    if cos is not None and sin is not None:
        q = rotate(q, cos.unsqueeze(-2), sin.unsqueeze(-2))
    angle = phases.to(work).repeat_interleave(heads, 2)
    c = rotate(c, angle.cos(), angle.sin())
    keys, values, states = (
        x[:, :, : max(lengths) + T].to(work) for x in (k_cache, v_cache, b_cache)
    )
    mask = visible(lengths, T, q.device)
    lam = lam.to(work).view(-1, heads, 1, 1)
    out = []
    for start in range(0, T, MAX_ROWS):
        piece = slice(start, start + MAX_ROWS)
        # Query heads of one key head are further rows of its products: [B, G, heads * rows, slots].
        q_rows, c_rows = (
            x[:, piece].transpose(1, 2).unflatten(1, (-1, heads)).flatten(2, 3) for x in (q, c)
        )
        fall = g[:, piece].transpose(1, 2)[..., None] - g_cache[:, :, None, : keys.shape[2]]
        decay = fall.clamp(max=0).to(work).exp()[:, :, None]
        score = q_rows @ keys.mT * q.shape[3] ** -0.5
        score = score.unflatten(2, (heads, -1)) + lam * decay * (c_rows @ states.mT).unflatten(
            2, (heads, -1)
        )
        weight = score.masked_fill(~mask[:, :, None, piece], -math.inf).softmax(-1)
        out.append(
            (weight.flatten(2, 3) @ values).unflatten(2, (heads, -1)).flatten(1, 2).transpose(1, 2)
        )
    phase.copy_(
        phases[:, -1]
        # last: all before can be done again after an error, as slots behind a row's tokens hold nothing
    )
    return torch.cat(out, 1).to(v.dtype)


def decode_eager(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    b: Tensor,
    c: Tensor,
    log_decay: Tensor,
    theta: Tensor,
    lam: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    b_cache: Tensor,
    g_cache: Tensor,
    phase: Tensor,
    lengths: list[int],
) -> Tensor:
    """One new token a row: written into slot ``lengths[r]`` of the caches, y [B, 1, H, Dv] over it
    and the slots before.

    Caches are those of :class:`SisaCache`, ``phase`` moves on to the new token, ``cos`` and ``sin``
    [B or 1, 1, Dh/2] are of its position; the other arguments are those of :func:`sisa_decode` with
    T = 1."""
    _check(
        q,
        k,
        v,
        b,
        c,
        log_decay,
        theta,
        lam,
        cos,
        sin,
        k_cache,
        v_cache,
        b_cache,
        g_cache,
        phase,
        lengths,
    )
    return _step(
        q,
        k,
        v,
        b,
        c,
        log_decay,
        theta,
        lam,
        cos,
        sin,
        k_cache,
        v_cache,
        b_cache,
        g_cache,
        phase,
        lengths,
    )


def _decode_fake(
    q,
    k,
    v,
    b,
    c,
    log_decay,
    theta,
    lam,
    cos,
    sin,
    k_cache,
    v_cache,
    b_cache,
    g_cache,
    phase,
    lengths,
):
    _check(
        q,
        k,
        v,
        b,
        c,
        log_decay,
        theta,
        lam,
        cos,
        sin,
        k_cache,
        v_cache,
        b_cache,
        g_cache,
        phase,
        lengths,
    )
    return q.new_empty(*q.shape[:3], v.shape[3])


decode = register(
    "decode",
    decode_eager,
    _decode_fake,
    mutates=("k_cache", "v_cache", "b_cache", "g_cache", "phase"),
)


def sisa_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    b: Tensor,
    c: Tensor,
    log_decay: Tensor,
    theta: Tensor,
    lam: Tensor,
    cache: SisaCache,
    *,
    rotary: Rotary | None = None,
    lengths: list[int] | None = None,
    backend: str = "auto",
) -> Tensor:
    """Append T new tokens to ``cache`` and return their attention over all it then holds:
    :func:`sisa_attention`, continued.

    Fed any pieces of a sequence one after another, it returns the pieces of what mode "exact" gives
    for the whole (Eq. 2), at any length and decay. One token over n costs O(n (Dh + Ds + Dv)) a
    head: on a CPU in one compiled op, elsewhere in PyTorch. The first tokens (the prompt) run
    through :func:`sisa_attention`; several tokens over a cache that holds n cost T n scores.

    Args:
        q, k, v, b, c, log_decay, theta, lam: as in :func:`sisa_attention`, [B, T, heads, channels];
            B, G and the widths, the dtype and the device stay those of the first call.
        cache: a :class:`SisaCache` of B sequences, changed in place; after an error it is as it
            was.
        rotary: (cos, sin) of the new tokens' positions, each [T, Dh/2] fp32, over a cache that
            holds tokens also [B, T, Dh/2]; None: already applied, or not wanted.
        lengths: for prompts of unequal length, into an empty cache: row r's tokens are its first
            ``lengths[r]``, the rest is (finite) padding on the right, whose results mean nothing.
            Each row goes on from its own last token.
        backend: the path of the first tokens, as in :func:`sisa_attention`.

    Returns:
        y [B, T, H, Dv] in q's dtype, without a gradient. k and b are rounded to q's dtype after
        their rotation, in the cache.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype, device or range, or one
            that requires grad while gradients are recorded; the message names it. Ranges are
            checked as in :func:`sisa_attention`.
    """
    if not isinstance(cache, SisaCache):
        raise TypeError(f"cache must be a sisa_kernels.SisaCache, got {type(cache).__name__}")
    empty = not any(cache.lengths)
    check_attention(q, k, v, b, c, log_decay, theta, lam, None, "exact", None)
    check_rotary(rotary, q, by_row=not empty)
    asked_backend(backend)
    inputs = {
        "q": q,
        "k": k,
        "v": v,
        "b": b,
        "c": c,
        "log_decay": log_decay,
        "theta": theta,
        "lam": lam,
    }
    refuse_gradients(inputs)
    new = {
        "k": k,
        "v": v,
        "b": b,
        "g": log_decay.double(),
    }  # k and b yet to be rotated, g to be summed
    cache.check(new, lengths)
    cos, sin = rotary or (None, None)
    with without_autocast(q.device):
        if empty:
            y = sisa_attention(q, k, v, b, c, log_decay, theta, lam, rotary=rotary, backend=backend)
            phases = _wrapped_phase(theta)
            k, b = _rotated_keys(k, b, phases, cos, sin)
            cache.append(lengths, k=k, v=v, b=b, g=cumulative_decay(log_decay))
            cache.phase = last(phases, cache.lengths)
            return y
        assert cache.phase is not None
        cache.reserve(new)
        step: Callable[..., Tensor] = _step
        if q.shape[1] == 1:
            step = decode
            cos, sin = (
                None if table is None else table.view(-1, 1, table.shape[-1])
                for table in (cos, sin)
            )
        caches = (cache.buffers[name] for name in ("k", "v", "b", "g"))
        y = step(
            q, k, v, b, c, log_decay, theta, lam, cos, sin, *caches, cache.phase, cache.lengths
        )
    cache.advance(q.shape[1], None)
    return y
