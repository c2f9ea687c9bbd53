"""SISA's decoding: its cache, and sisa_decode, which appends new tokens and attends from them."""

from collections.abc import Callable

from torch import Tensor

from sisa_kernels.attention import asked_backend, runs_native, sisa_attention
from sisa_kernels.cache import TokenCache, last, refuse_gradients
from sisa_kernels.checks import check_attention, check_rotary
from sisa_kernels.inputs import Backend, Operands, Rotary, SisaInputs
from sisa_kernels.ops import of_one_dtype, without_autocast
from sisa_kernels.paths.choice import Adaptive
from sisa_kernels.scans import cumulative_decay
from sisa_kernels.step import (
    Held,
    at_phase,
    decode_packed,
    decode_packed_eager,
    extend,
    one_token,
    reach_of,
    takes_apart,
    with_rope,
    wrapped_phase,
)


class SisaCache(TokenCache):
    """What :func:`sisa_decode` keeps of the tokens so far, for ``batch`` sequences; empty at first.

    ``buffers`` are k, v, b and g, ``phase`` and ``reach`` beside them, all as in
    :class:`sisa_kernels.step.Held`; ``lengths`` are the tokens a row holds. Raises ValueError for a
    batch below 1."""

    def __init__(self, batch: int):
        super().__init__(batch)
        self.phase: Tensor | None = None
        self.reach: Tensor | None = None
        self.phases: TokenCache | None = None

    def keep_phases(self) -> None:
        """Keep each token's phase [B, G, Ds / 2] fp64 from the first on, which :meth:`crop` needs.

        Raises ValueError for a cache that holds tokens."""
        if any(self.lengths):
            raise ValueError(f"phases are kept from the first token on, this holds {self.lengths}")
        self.phases = TokenCache(len(self.lengths))

    def select(self, rows: list[int]) -> None:
        super().select(rows)
        if self.phase is not None and self.reach is not None:
            self.phase = self.phase[rows]
            self.reach = self.reach[rows]
        if self.phases is not None:
            self.phases.select(rows)

    def crop(self, count: int) -> None:
        """Forget each row's last ``count`` tokens; ValueError unless each row keeps one.

        It must have been told to :meth:`keep_phases`, or is a ValueError too."""
        if self.phases is None:
            raise ValueError("a SisaCache can be cropped if keep_phases() was called at first")
        super().crop(count)
        self.phases.crop(count)
        self.phase = last(self.phases.buffers["phase"].transpose(1, 2), self.lengths)

    def last_phase(self) -> Tensor:
        """A copy of the phase of each row's last token, [B, 1, G, Ds / 2]."""
        assert self.phase is not None
        return self.phase[:, None].clone()

    def held(self) -> Held:
        """What a step over a cache that holds tokens takes."""
        k, v, b, g = (self.buffers[name] for name in ("k", "v", "b", "g"))
        return Held(k, v, b, g, self.phase, self.reach, self.lengths)


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
    backend: Backend | Adaptive = "auto",
) -> Tensor:
    """Append T new tokens to ``cache`` and return their attention over all it then holds.

    :func:`sisa_attention`, continued: y [B, T, H, Dv] in q's dtype, without a gradient. Fed any
    pieces of a sequence one after another, it returns the pieces of what mode "exact" gives for the
    whole (Eq. 2), at any length and decay.

    One token over n costs O(n (Dh + Ds + Dv)) a head, on a CPU in one compiled op, which leaves b
    out where it is forgotten; elsewhere in PyTorch. The first tokens (the prompt) run through
    :func:`sisa_attention`, and so do several over a cache where that runs "native"; elsewhere they
    hold their T (n + T) scores. k and b are rounded to q's dtype after their rotation, in the
    cache.

    Args:
        q, k, v, b, c, log_decay, theta, lam: as in :func:`sisa_attention`, [B, T, heads, channels];
            B, G and the widths, the dtype and the device stay those of the first call.
        cache: a :class:`SisaCache` of B sequences, changed in place; after an error as it was.
        rotary: (cos, sin) of the new tokens' positions, each [T, Dh/2] fp32, over a cache that
            holds tokens also [B, T, Dh/2]; None: already applied, or not wanted.
        lengths: for prompts of unequal length, into an empty cache: row r's tokens are its first
            ``lengths[r]``, the rest is (finite) padding on the right, whose results mean nothing.
            Each row goes on from its own last token.
        backend: the path of the first tokens and of several, as in :func:`sisa_attention`.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype, device or range, or one
            that requires grad while gradients are recorded; the message names it. Ranges are
            checked as in :func:`sisa_attention`.
    """
    q, k, v, b, c = of_one_dtype(q, k, v, b, c)
    inputs = SisaInputs(q, k, v, b, c, log_decay, theta, lam, rotary)
    _check_decode(inputs, cache, lengths, backend)
    with without_autocast(q.device):
        if not any(cache.lengths):
            return _prefill(inputs, cache, lengths, backend)
        return _extend(inputs, cache, backend)


def _check_decode(
    inputs: SisaInputs, cache: SisaCache, lengths: list[int] | None, backend: Backend | Adaptive
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
    inputs: SisaInputs, cache: SisaCache, lengths: list[int] | None, backend: Backend | Adaptive
) -> Tensor:
    """The first tokens of an empty cache."""
    y = sisa_attention(**inputs._asdict(), backend=backend)
    phases = wrapped_phase(inputs.theta)
    k = with_rope(inputs.k, inputs.rotary).to(y.dtype)
    b = at_phase(inputs.b, phases)
    g = cumulative_decay(inputs.log_decay)
    cache.append(lengths, k=k, v=inputs.v, b=b.to(y.dtype), g=g)
    cache.phase = last(phases, cache.lengths)
    cache.reach = reach_of(b)
    if cache.phases is not None:
        cache.phases.append(lengths, phase=phases)
    return y


def _extend(inputs: SisaInputs, cache: SisaCache, backend: Backend | Adaptive) -> Tensor:
    """Tokens behind those that a cache holds."""
    T = inputs.q.shape[1]
    cache.reserve(_to_cache(inputs))
    held = cache.held()
    before = cache.last_phase()
    # One token takes the op, which is compiled where it can be.
    compiled = T == 1 or runs_native(inputs, backend)
    y = extend(Operands(*inputs[:9]), held, compiled=compiled)
    cache.advance(T, None)
    if cache.phases is not None:
        cache.phases.append(phase=wrapped_phase(inputs.theta, before))
    return y


def sisa_decode_packed(
    packed: Tensor,
    decay_bias: Tensor,
    raw_lam: Tensor,
    cache: SisaCache,
    *,
    rotary: Rotary | None = None,
) -> Tensor:
    """:func:`sisa_decode` of one token a row behind those of a cache, from a layer's projections.

    On a CPU one compiled op makes its gates, too: y [B, 1, H, Dv].

    Args:
        packed: [B, 1, width], the channels of q, k, v, b, c, decay and phase side by side, in the
            cache's dtype: fp32, bf16 or fp16.
        decay_bias: [G] fp32, ``log_decay = -softplus(decay + decay_bias)``.
        raw_lam: [H] fp32, ``lam = softplus(raw_lam)``.
        cache: a :class:`SisaCache` of B sequences that hold tokens, changed in place.
        rotary: (cos, sin) of the tokens' positions, [1, Dh/2] or [B, 1, Dh/2] fp32, or None.

    Raises:
        ValueError, RuntimeError: a shape or dtype that does not fit the cache, or packed requires
            grad while gradients are recorded.
    """
    refuse_gradients({"packed": packed, "decay_bias": decay_bias, "raw_lam": raw_lam})
    held = cache.buffers["k"]
    like = (len(held), held.dtype, held.device)
    if (len(packed), packed.dtype, packed.device) != like:
        raise ValueError(
            f"packed must have the cache's batch, dtype and device {like}, "
            f"got {(len(packed), packed.dtype, packed.device)}"
        )
    cache.make_room(1)
    step: Callable[..., Tensor] = decode_packed_eager if takes_apart() else decode_packed
    with without_autocast(packed.device):
        y = step(packed, decay_bias, raw_lam, *one_token(rotary), *cache.held())
    cache.advance(1, None)
    if cache.phases is not None:
        cache.phases.append(phase=cache.last_phase())
    return y
