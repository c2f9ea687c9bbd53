"""Decoding: a cache of keys, and sisa_decode, which appends new tokens and attends from them.

What token j brings to every later score (Eq. 2) is k_j, R(Phi_j) b_j and g_j: they are written once
and stay as they are. The weight ``exp(g_i - g_j)`` is formed when it is used and never above 1,
where keys augmented with a fixed offset overflow or clamp. g is kept in fp64: at g = -1e5 the
spacing of fp32 is 0.008, and so would be the error of a difference of two neighbours. That is 8
bytes a token and key head, beside 4 (Dh + Dv + Ds) in fp32. The running phase is fp64 too, and
wrapped into [-pi, pi]."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sisa_kernels.attention import asked_backend, sisa_attention
from sisa_kernels.cache import MAX_ROWS, TokenCache, last, refuse_gradients, visible, write
from sisa_kernels.checks import (
    check_attention,
    check_rotary,
    check_shapes,
    check_tensor,
    check_values,
    wide_dtypes,
)
from sisa_kernels.inputs import Backend, Rotary, SisaInputs, as_rotary
from sisa_kernels.ops import register, without_autocast
from sisa_kernels.rotation import rotate
from sisa_kernels.scans import cumulative_decay, work_dtype


class Held(NamedTuple):
    """What a step reads and changes of a cache, k, v and b in the compute dtype."""

    k: Tensor
    """With RoPE, [B, G, capacity, Dh]."""
    v: Tensor
    """[B, G, capacity, Dv]."""
    b: Tensor
    """Rotated by the phase, [B, G, capacity, Ds]."""
    g: Tensor
    """[B, G, capacity] fp64."""
    phase: Tensor
    """Of each row's last token, [B, G, Ds / 2] fp64."""
    lengths: list[int]
    """The tokens of each row."""


class SisaCache(TokenCache):
    """What :func:`sisa_decode` keeps of the tokens so far, for ``batch`` sequences; empty at first.

    ``buffers`` are k, v, b and g, ``phase`` beside them, all as in :class:`Held`; ``lengths`` are
    the tokens a row holds. Raises ValueError for a batch below 1."""

    def __init__(self, batch: int):
        super().__init__(batch)
        self.phase: Tensor | None = None

    def select(self, rows: list[int]) -> None:
        super().select(rows)
        self.phase = self.phase[rows] if self.phase is not None else None

    def held(self) -> Held:
        """What a step over a cache that holds tokens takes."""
        assert self.phase is not None
        k, v, b, g = (self.buffers[name] for name in ("k", "v", "b", "g"))
        return Held(k, v, b, g, self.phase, self.lengths)


def _wrapped_phase(theta: Tensor, before: Tensor | float = 0.0) -> Tensor:
    """The phase of each token [B, T, G, Ds/2] in fp64, in [-pi, pi].

    ``before``: that of the token before the first."""
    phase = theta.double().cumsum(1) + before
    return phase - 2 * math.pi * (phase / (2 * math.pi)).round()


def _rotated_keys(inputs: SisaInputs, phase: Tensor) -> tuple[Tensor, Tensor]:
    """k with RoPE (tables [T, Dh/2] or [B, T, Dh/2]) and b at ``phase``, in their dtype."""
    k = inputs.k
    work = work_dtype(k)
    if inputs.rotary is not None:
        cos, sin = (table.unsqueeze(-2) for table in inputs.rotary)
        k = rotate(k.to(work), cos, sin).to(k.dtype)
    phase = phase.to(work)
    b = rotate(inputs.b.to(work), phase.cos(), phase.sin())
    return k, b.to(k.dtype)


def _check_step(inputs: SisaInputs, held: Held) -> None:
    """Refuse a wrong shape, dtype, device or range, as csrc/torch/decode.cpp does."""
    q = inputs.q
    check_shapes(inputs.scores()._replace(rotary=None))
    check_values(inputs.v, inputs.k)
    if q.shape[1] != 1:
        raise ValueError(f"q must be [batch, 1, heads, channels], got {list(q.shape)}")
    if held.k.ndim != 4:
        wanted = "[batch, key heads, capacity, channels]"
        raise ValueError(f"k_cache must be {wanted}, got {list(held.k.shape)}")
    B, _, _, Dh = q.shape
    Ds = inputs.b.shape[3]
    slots = (B, inputs.k.shape[2], held.k.shape[2])
    check_tensor("k_cache", held.k, (*slots, Dh), (q.dtype,), q.device)
    check_tensor("v_cache", held.v, (*slots, inputs.v.shape[3]), (q.dtype,), q.device)
    check_tensor("b_cache", held.b, (*slots, Ds), (q.dtype,), q.device)
    check_tensor("g_cache", held.g, slots, (torch.float64,), q.device)
    check_tensor("phase", held.phase, (*slots[:2], Ds // 2), (torch.float64,), q.device)
    _check_tables(inputs.rotary, q)
    capacity = slots[2]
    if len(held.lengths) != B or not all(1 <= n < capacity for n in held.lengths):
        raise ValueError(
            f"lengths must be {B} integers from 1 to the capacity {capacity} less 1, "
            f"got {held.lengths}"
        )


def _check_tables(rotary: Rotary | None, q: Tensor) -> None:
    """Check RoPE's tables [B or 1, 1, Dh / 2] of one new token a row."""
    if rotary is None:
        return
    B, _, _, Dh = q.shape
    if Dh % 2:
        raise ValueError(f"cos and sin need an even head width, got q with {Dh} channels")
    for name, table in zip(("cos", "sin"), rotary):
        shape = (1 if table.shape[0] == 1 else B, 1, Dh // 2)
        check_tensor(name, table, shape, wide_dtypes(q), q.device)


def _step(inputs: SisaInputs, held: Held) -> Tensor:
    """:func:`decode_eager` of any number T of new tokens, T * (max(lengths) + T) scores a head."""
    q = inputs.q
    work = work_dtype(q)
    g = last(held.g.transpose(1, 2), held.lengths)[:, None] + cumulative_decay(inputs.log_decay)
    phases = _wrapped_phase(inputs.theta, held.phase[:, None])
    k, b = _rotated_keys(inputs, phases)
    for buffer, x in ((held.k, k), (held.b, b), (held.v, inputs.v), (held.g, g)):
        write(buffer, x, held.lengths)

    heads = q.shape[2] // inputs.k.shape[2]
    q = q.to(work)
    if inputs.rotary is not None:
        cos, sin = (table.unsqueeze(-2) for table in inputs.rotary)
        q = rotate(q, cos, sin)
    angle = phases.to(work).repeat_interleave(heads, 2)
    c = rotate(inputs.c.to(work), angle.cos(), angle.sin())
    # All before can be done again after an error: slots behind a row's tokens hold nothing.
    y = _attend(q, c, g, inputs.lam.to(work).view(-1, heads, 1, 1), held)
    held.phase.copy_(phases[:, -1])
    return y.to(inputs.v.dtype)


def _attend(q: Tensor, c: Tensor, g: Tensor, lam: Tensor, held: Held) -> Tensor:
    """Attention of new tokens over a cache in which they lie behind ``held.lengths``.

    Given rotated q and c [B, T, H, channels], g [B, T, G] and lam [G, heads, 1, 1]: y [B, T, H,
    Dv]."""
    T = q.shape[1]
    heads = lam.shape[1]
    slots = max(held.lengths) + T
    keys, values, states = (x[:, :, :slots].to(q.dtype) for x in (held.k, held.v, held.b))
    g_keys = held.g[:, :, None, :slots]
    mask = visible(held.lengths, T, q.device)
    out = []
    for start in range(0, T, MAX_ROWS):
        rows = slice(start, start + MAX_ROWS)
        # Query heads of one key head are further rows of its products: [B, G, heads * rows, slots].
        q_rows, c_rows = (
            x[:, rows].transpose(1, 2).unflatten(1, (-1, heads)).flatten(2, 3) for x in (q, c)
        )
        exponent = g[:, rows].transpose(1, 2)[..., None] - g_keys
        decay = exponent.clamp(max=0).to(q.dtype).exp()[:, :, None]
        content = q_rows @ keys.mT * q.shape[3] ** -0.5
        importance = (c_rows @ states.mT).unflatten(2, (heads, -1))
        score = content.unflatten(2, (heads, -1)) + lam * decay * importance
        weight = score.masked_fill(~mask[:, :, None, rows], -math.inf).softmax(-1)
        y = (weight.flatten(2, 3) @ values).unflatten(2, (heads, -1))
        out.append(y.flatten(1, 2).transpose(1, 2))
    return torch.cat(out, 1)


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
    """One new token a row in slot ``lengths[r]``: y [B, 1, H, Dv] over it and the slots before.

    Caches are those of :class:`Held`, ``phase`` moves on to the new token, ``cos`` and ``sin``
    [B or 1, 1, Dh/2] are of its position; the other arguments are those of :func:`sisa_decode` with
    T = 1."""
    inputs = SisaInputs(q, k, v, b, c, log_decay, theta, lam, as_rotary(cos, sin))
    held = Held(k_cache, v_cache, b_cache, g_cache, phase, lengths)
    _check_step(inputs, held)
    return _step(inputs, held)


def _decode_fake(*arguments: Any) -> Tensor:
    *tensors, cos, sin = arguments[:10]
    inputs = SisaInputs._make((*tensors, as_rotary(cos, sin), None))
    _check_step(inputs, Held(*arguments[10:]))
    return inputs.q.new_empty(*inputs.q.shape[:3], inputs.v.shape[3])


decode = register(
    "decode",
    decode_eager,
    _decode_fake,
    mutates=("k_cache", "v_cache", "b_cache", "g_cache", "phase"),
    in_library=True,
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
    backend: Backend = "auto",
) -> Tensor:
    """Append T new tokens to ``cache`` and return their attention over all it then holds.

    :func:`sisa_attention`, continued: y [B, T, H, Dv] in q's dtype, without a gradient. Fed any
    pieces of a sequence one after another, it returns the pieces of what mode "exact" gives for the
    whole (Eq. 2), at any length and decay.

    One token over n costs O(n (Dh + Ds + Dv)) a head: on a
    CPU in one compiled op, elsewhere in PyTorch. The first tokens (the prompt) run through
    :func:`sisa_attention`; several tokens over a cache that holds n cost T n scores. k and b are
    rounded to q's dtype after their rotation, in the cache.

    Args:
        q, k, v, b, c, log_decay, theta, lam: as in :func:`sisa_attention`, [B, T, heads, channels];
            B, G and the widths, the dtype and the device stay those of the first call.
        cache: a :class:`SisaCache` of B sequences, changed in place; after an error as it was.
        rotary: (cos, sin) of the new tokens' positions, each [T, Dh/2] fp32, over a cache that
            holds tokens also [B, T, Dh/2]; None: already applied, or not wanted.
        lengths: for prompts of unequal length, into an empty cache: row r's tokens are its first
            ``lengths[r]``, the rest is (finite) padding on the right, whose results mean nothing.
            Each row goes on from its own last token.
        backend: the path of the first tokens, as in :func:`sisa_attention`.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype, device or range, or one
            that requires grad while gradients are recorded; the message names it. Ranges are
            checked as in :func:`sisa_attention`.
    """
    inputs = SisaInputs(q, k, v, b, c, log_decay, theta, lam, rotary)
    _check_decode(inputs, cache, lengths, backend)
    with without_autocast(q.device):
        if not any(cache.lengths):
            return _prefill(inputs, cache, lengths, backend)
        return _extend(inputs, cache)


def _check_decode(
    inputs: SisaInputs, cache: SisaCache, lengths: list[int] | None, backend: str
) -> None:
    if not isinstance(cache, SisaCache):
        raise TypeError(f"cache must be a sisa_kernels.SisaCache, got {type(cache).__name__}")
    check_attention(inputs._replace(rotary=None), "exact")
    check_rotary(inputs.rotary, inputs.q, by_row=any(cache.lengths))
    asked_backend(backend)
    refuse_gradients(dict(zip(inputs._fields, inputs.tensors())))
    cache.check(_to_cache(inputs), lengths)


def _to_cache(inputs: SisaInputs) -> dict[str, Tensor]:
    """What goes into the cache, with k and b yet to be rotated and g to be summed."""
    return {"k": inputs.k, "v": inputs.v, "b": inputs.b, "g": inputs.log_decay.double()}


def _prefill(
    inputs: SisaInputs, cache: SisaCache, lengths: list[int] | None, backend: Backend
) -> Tensor:
    """The first tokens of an empty cache."""
    y = sisa_attention(**inputs._asdict(), backend=backend)
    phases = _wrapped_phase(inputs.theta)
    k, b = _rotated_keys(inputs, phases)
    cache.append(lengths, k=k, v=inputs.v, b=b, g=cumulative_decay(inputs.log_decay))
    cache.phase = last(phases, cache.lengths)
    return y


def _extend(inputs: SisaInputs, cache: SisaCache) -> Tensor:
    """Tokens behind those that a cache holds."""
    cache.reserve(_to_cache(inputs))
    held = cache.held()
    T = inputs.q.shape[1]
    if T == 1:
        if inputs.rotary is not None:
            cos, sin = (table.view(-1, 1, table.shape[-1]) for table in inputs.rotary)
            inputs = inputs._replace(rotary=(cos, sin))
        wide = inputs.q.dtype == torch.float64  # which the compiled step does not take
        step = torch.ops.sisa.decode_eager if wide else decode
        y = step(*inputs.flat(), *held)
    else:
        y = _step(inputs, held)
    cache.advance(T, None)
    return y
