"""New tokens over a cache that holds some: SISA's, FoX's and plain attention's, in one op.

What token j brings to every later score (Eq. 2) is k_j, R(Phi_j) b_j and g_j: they are written once
and stay as they are. The weight ``exp(g_i - g_j)`` is formed when it is used and never above 1,
where keys augmented with a fixed offset overflow or clamp. g is kept in fp64: at g = -1e5 the
spacing of fp32 is 0.008, and so would be the error of a difference of two neighbours. That is 8
bytes a token and key head, beside 4 (Dh + Dv + Ds) in fp32. The running phase is fp64 too, and
wrapped into [-pi, pi]."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sisa_kernels import _extension
from sisa_kernels.cache import MAX_ROWS, TokenCache, last, uniform, visible, write
from sisa_kernels.checks import (
    check_qk,
    check_shapes,
    check_tensor,
    check_values,
    wide_dtypes,
)
from sisa_kernels.inputs import Operands, Rotary, ScoreInputs, as_rotary, takes_flat
from sisa_kernels.ops import register
from sisa_kernels.paths import native
from sisa_kernels.rotation import rotate
from sisa_kernels.scans import cumulative_decay, work_dtype

FEW = 4  # new tokens that are quicker one after another than together


class Held(NamedTuple):
    """What a step reads and changes of a cache, k, v and b in the compute dtype."""

    k: Tensor
    """With RoPE, [B, G, capacity, Dh]."""
    v: Tensor
    """[B, G, capacity, Dv]."""
    b: Tensor | None
    """Rotated by the phase, [B, G, capacity, Ds]."""
    g: Tensor | None
    """[B, G, capacity] fp64, in forgetting attention [B, H, capacity]."""
    phase: Tensor | None
    """Of each row's last token, [B, G, Ds / 2] fp64."""
    reach: Tensor | None
    """The largest norm that b had, [B, G] fp64: what bounds the importance of old tokens."""
    lengths: list[int]
    """The tokens of each row."""


def held_by(cache: TokenCache) -> Held:
    """What a cache of keys and values, and of g in forgetting attention, holds."""
    buffers = cache.buffers
    return Held(buffers["k"], buffers["v"], None, buffers.get("g"), None, None, cache.lengths)


class Rotated(NamedTuple):
    """What new tokens attend with, in the dtype that is computed in."""

    q: Tensor
    """[B, T, H, Dh]."""
    c: Tensor | None
    """[B, T, H, Ds]."""
    g: Tensor | None
    """[B, T, G], in forgetting attention [B, T, H], fp64."""
    lam: Tensor | None
    """[H]."""


def wrapped_phase(theta: Tensor, before: Tensor | float = 0.0) -> Tensor:
    """The phase of each token [B, T, G, Ds/2] in fp64, in [-pi, pi].

    ``before``: that of the token before the first."""
    phase = theta.double().cumsum(1) + before
    return phase - 2 * math.pi * (phase / (2 * math.pi)).round()


def with_rope(x: Tensor, rotary: Rotary | None) -> Tensor:
    """x [B, T, heads, Dh] in fp32 (fp64), with RoPE of tables [T, Dh/2] or [B, T, Dh/2]."""
    x = x.to(work_dtype(x))
    if rotary is None:
        return x
    cos, sin = (table.unsqueeze(-2) for table in rotary)
    return rotate(x, cos, sin)


def at_phase(x: Tensor, phase: Tensor) -> Tensor:
    """x [B, T, heads, Ds] in fp32 (fp64), rotated by phases [B, T, G, Ds/2] of its key heads."""
    x = x.to(work_dtype(x))
    angle = phase.to(x.dtype).repeat_interleave(x.shape[2] // phase.shape[2], 2)
    return rotate(x, angle.cos(), angle.sin())


def reach_of(b: Tensor) -> Tensor:
    """The largest norm of rotated states b [B, T, G, Ds] in fp64, [B, G]; a NaN stays."""
    return b.double().norm(dim=-1).amax(1)


def _check_step(new: Operands, held: Held) -> None:
    """Refuse a wrong shape, dtype, device or range, as csrc/torch/decode.cpp does."""
    q = new.q
    check_qk(q, new.k)
    check_values(new.v, new.k)
    if q.shape[1] != 1:
        raise ValueError(f"q must be [batch, 1, heads, channels], got {list(q.shape)}")
    importance = new.b is not None
    gates = q.shape[2]
    if importance:
        if new.c is None or new.log_decay is None or new.theta is None or new.lam is None:
            raise ValueError("b, c, log_decay, theta and lam must be given together")
        check_shapes(ScoreInputs(q, new.k, *new[3:8]))  # type: ignore[arg-type]
        gates = new.k.shape[2]
    elif new.log_decay is not None:
        check_tensor("log_decay", new.log_decay, tuple(q.shape[:3]), wide_dtypes(q), q.device)
    _check_held(new, held, gates)
    _check_tables(new.rotary, q)


def _check_held(new: Operands, held: Held, gates: int) -> None:
    q = new.q
    if held.k.ndim != 4:
        wanted = "[batch, key heads, capacity, channels]"
        raise ValueError(f"k_cache must be {wanted}, got {list(held.k.shape)}")
    B, _, _, Dh = q.shape
    capacity = held.k.shape[2]
    slots = (B, new.k.shape[2], capacity)
    check_tensor("k_cache", held.k, (*slots, Dh), (q.dtype,), q.device)
    check_tensor("v_cache", held.v, (*slots, new.v.shape[3]), (q.dtype,), q.device)
    if new.b is not None:
        Ds = new.b.shape[3]
        wide = (torch.float64,)
        check_tensor("b_cache", held.b, (*slots, Ds), (q.dtype,), q.device)
        check_tensor("phase", held.phase, (*slots[:2], Ds // 2), wide, q.device)
        check_tensor("reach", held.reach, slots[:2], wide, q.device)
    if new.log_decay is not None:
        check_tensor("g_cache", held.g, (B, gates, capacity), (torch.float64,), q.device)
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


def takes_apart() -> bool:
    """Whether vmap is at work: on plain PyTorch, not on an op that changes its arguments."""
    return torch._C._are_functorch_transforms_active()


def one_token(rotary: Rotary | None) -> tuple[Tensor | None, Tensor | None]:
    """Tables [1, Dh/2] or [B, 1, Dh/2] as the ops of one token take them, [1 or B, 1, Dh/2]."""
    if rotary is None:
        return None, None
    cos, sin = (table.reshape(-1, 1, table.shape[-1]) for table in rotary)
    return cos, sin


def extend(new: Operands, held: Held, *, compiled: bool) -> Tensor:
    """T new tokens behind those of ``held``, which they are written to: y [B, T, H, Dv].

    ``compiled``, for what :func:`sisa_kernels.paths.native.refusal` lets through: a few by
    sisa::decode, one after another, more together by sisa::attention. Else in PyTorch."""
    T = new.q.shape[1]
    if takes_apart():
        return _step(new, held, _attend)
    if T == 1:
        # The compiled step does not take fp64.
        plain = new.q.dtype == torch.float64 or not (compiled and _extension.LOADED)
        step = torch.ops.sisa.decode_eager if plain else decode
        return step(*new[:8], *one_token(new.rotary), *held)
    if not compiled:
        return _step(new, held, _attend)
    if T > FEW:
        return _step(new, held, _attend_compiled)
    # What moves on is kept until all are done, so that after an error all can be done again.
    now = held._replace(phase=_copy(held.phase), reach=_copy(held.reach))
    y = []
    for t in range(T):
        lengths = [n + t for n in held.lengths]
        y.append(extend(new.token(t), now._replace(lengths=lengths), compiled=True))
    for kept, moved in ((held.phase, now.phase), (held.reach, now.reach)):
        if kept is not None and moved is not None:
            kept.copy_(moved)
    return torch.cat(y, 1)


def _copy(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.clone()


def _step(new: Operands, held: Held, attend: Callable[[Rotated, Held], Tensor]) -> Tensor:
    """:func:`extend` of any number T of new tokens."""
    g = phases = c = b = None
    lam = new.lam
    if new.log_decay is not None:
        assert held.g is not None
        g = last(held.g.transpose(1, 2), held.lengths)[:, None] + cumulative_decay(new.log_decay)
    if new.b is not None:
        assert new.c is not None
        assert new.theta is not None
        assert lam is not None
        assert held.phase is not None
        phases = wrapped_phase(new.theta, held.phase[:, None])
        b = at_phase(new.b, phases)
        c = at_phase(new.c, phases)
        lam = lam.to(c.dtype)
    k = with_rope(new.k, new.rotary)
    for buffer, x in ((held.k, k), (held.b, b), (held.v, new.v), (held.g, g)):
        if buffer is not None and x is not None:
            write(buffer, x, held.lengths)
    # All before can be done again after an error: slots behind a row's tokens hold nothing.
    y = attend(Rotated(with_rope(new.q, new.rotary), c, g, lam), held)
    if b is not None and phases is not None:
        assert held.phase is not None
        assert held.reach is not None
        held.phase.copy_(phases[:, -1])
        held.reach.copy_(held.reach.maximum(reach_of(b)))
    return y.to(new.v.dtype)


def _attend(new: Rotated, held: Held) -> Tensor:
    """Attention of tokens that lie in a cache behind ``held.lengths``, all their scores at once.

    In PyTorch: y [B, T, H, Dv]."""
    q = new.q
    T, H = q.shape[1:3]
    G = held.k.shape[1]
    slots = max(held.lengths) + T
    keys, values = (x[:, :, :slots].to(q.dtype) for x in (held.k, held.v))
    mask = visible(held.lengths, T, q.device)
    out = []
    for start in range(0, T, MAX_ROWS):
        rows = slice(start, start + MAX_ROWS)
        # Query heads of one key head are further rows of its products: [B, G, heads * rows, slots].
        score = (_by_key_head(q[:, rows], G) @ keys.mT).unflatten(2, (H // G, -1))
        score = score * q.shape[3] ** -0.5
        if new.g is not None:
            assert held.g is not None
            fall = new.g[:, rows].transpose(1, 2)[..., None] - held.g[:, :, None, :slots]
            fall = fall.clamp(max=0).to(q.dtype).unflatten(1, (G, -1))
        if new.c is not None:
            assert held.b is not None
            assert new.lam is not None
            states = held.b[:, :, :slots].to(q.dtype)
            importance = (_by_key_head(new.c[:, rows], G) @ states.mT).unflatten(2, (H // G, -1))
            score = score + new.lam.reshape(G, -1, 1, 1) * fall.exp() * importance
        elif new.g is not None:
            score = score + fall
        weight = score.masked_fill(~mask[:, :, None, rows], -math.inf).softmax(-1)
        y = (weight.flatten(2, 3) @ values).unflatten(2, (H // G, -1))
        out.append(y.flatten(1, 2).transpose(1, 2))
    return torch.cat(out, 1)


def _by_key_head(x: Tensor, G: int) -> Tensor:
    """x [B, T, H, channels] as rows of its key heads, [B, G, H / G * T, channels]."""
    return x.transpose(1, 2).unflatten(1, (G, -1)).flatten(2, 3)


def _attend_compiled(new: Rotated, held: Held) -> Tensor:
    """:func:`_attend` by sisa::attention, tile by tile.

    In the cache's k and b the rotations are done and g is summed: the op turns by a phase of 0 and
    sums g's differences, which are the decays as they came."""
    T = new.q.shape[1]
    start = uniform(held.lengths)
    rows = [slice(None)] if start is not None else [slice(r, r + 1) for r in range(len(new.q))]
    return torch.cat([_attend_rows(new, held, row, held.lengths[row][0], T) for row in rows])


def _attend_rows(new: Rotated, held: Held, rows: slice, offset: int, T: int) -> Tensor:
    """Rows of one length ``offset``."""
    dtype = new.q.dtype

    def tokens(cache: Tensor) -> Tensor:
        return cache[rows, :, : offset + T].transpose(1, 2)

    c = log_decay = b = theta = None
    if held.g is not None:
        g = tokens(held.g)
        log_decay = g.diff(dim=1, prepend=g[:, :1]).to(dtype)
        if held.b is not None and new.c is not None:
            c = new.c[rows]
            b = tokens(held.b).to(dtype)
            theta = log_decay.new_zeros(b.shape[3] // 2).expand(*log_decay.shape, -1)
    k, v = (tokens(x).to(dtype) for x in (held.k, held.v))
    operands = new.q[rows], k, v, b, c, log_decay, theta, new.lam
    return native.attention_op(*operands, None, None, None, offset)[0]


@takes_flat
def decode_eager(
    new: Operands,
    k_cache: Tensor,
    v_cache: Tensor,
    b_cache: Tensor | None,
    g_cache: Tensor | None,
    phase: Tensor | None,
    reach: Tensor | None,
    lengths: list[int],
) -> Tensor:
    """One new token a row in slot ``lengths[r]``: y [B, 1, H, Dv] over it and the slots before.

    Caches are those of :class:`Held`, ``phase`` and ``reach`` move on to the new token, ``cos`` and
    ``sin`` [B or 1, 1, Dh/2] are of its position; the others are those of :class:`Operands`."""
    held = Held(k_cache, v_cache, b_cache, g_cache, phase, reach, lengths)
    _check_step(new, held)
    return _step(new, held, _attend)


@takes_flat
def _decode_fake(new: Operands, *held: Any) -> Tensor:
    _check_step(new, Held(*held))
    return new.q.new_empty(*new.q.shape[:3], new.v.shape[3])


CACHES = ("k_cache", "v_cache", "b_cache", "g_cache", "phase", "reach")
decode = register("decode", decode_eager, _decode_fake, mutates=CACHES, in_library=True)


def _unpacked(packed: Tensor, decay_bias: Tensor, raw_lam: Tensor, held: Held) -> Operands:
    """What one product of all of a layer's projections holds, with its gates."""
    G, _, Dh = held.k.shape[1:]
    assert held.b is not None
    Ds = held.b.shape[3]
    of_keys = [G * Dh, G * held.v.shape[3], G * Ds, G, G * Ds // 2]
    H = (packed.shape[-1] - sum(of_keys)) // (Dh + Ds)
    widths = [H * Dh, *of_keys[:3], H * Ds, *of_keys[3:]]
    if sum(widths) != packed.shape[-1]:
        raise ValueError(
            "packed must have the channels of q, k, v, b, c, decay and phase, of some number of "
            f"heads and the cache's {G} key heads, got {packed.shape[-1]}"
        )
    q, k, v, b, c, alpha, theta = packed.split(widths, -1)
    heads = [x.unflatten(-1, (n, -1)) for x, n in ((q, H), (k, G), (v, G), (b, G), (c, H))]
    log_decay = -F.softplus(alpha.float() + decay_bias)
    steps = theta.float().unflatten(-1, (G, -1))
    return Operands._make((*heads, log_decay, steps, F.softplus(raw_lam), None))


def decode_packed_eager(
    packed: Tensor,
    decay_bias: Tensor,
    raw_lam: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    b_cache: Tensor,
    g_cache: Tensor,
    phase: Tensor,
    reach: Tensor,
    lengths: list[int],
) -> Tensor:
    """:func:`decode_eager` of the channels of q, k, v, b, c, decay and phase side by side.

    ``packed`` [B, 1, width]; log_decay is -softplus(decay + decay_bias [G]), theta the phase's
    channels, lam softplus(raw_lam [H]), all in fp32."""
    held = Held(k_cache, v_cache, b_cache, g_cache, phase, reach, lengths)
    new = _unpacked(packed, decay_bias, raw_lam, held)._replace(rotary=as_rotary(cos, sin))
    _check_step(new, held)
    return _step(new, held, _attend)


def _decode_packed_fake(packed: Tensor, decay_bias: Tensor, raw_lam: Tensor, *rest: Any) -> Tensor:
    held = Held(*rest[2:])
    new = _unpacked(packed, decay_bias, raw_lam, held)
    return packed.new_empty(*new.q.shape[:3], held.v.shape[3])


decode_packed = register(
    "decode_packed", decode_packed_eager, _decode_packed_fake, mutates=CACHES, in_library=True
)
