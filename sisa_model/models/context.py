"""What a layer knows of its tokens beside their states: RoPE's tables, documents, caches."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sisa_kernels import SequenceLayout
from sisa_kernels.cache import TokenCache, uniform
from sisa_model.models.config import ModelConfig
from sisa_model.utils.buffers import to_device


@dataclass
class Context:
    """Where the tokens of a call stand, and which of them belong together."""

    rotary: tuple[Tensor, Tensor]
    """RoPE's (cos, sin) of the tokens' positions, each [L, E / 2] fp32; [B, L, E / 2] behind caches
    of unequal length.
    """
    cu_seqlens: Tensor | None = None
    """[documents + 1] int32 or int64, rising from 0 to at most L: documents packed into one
    sequence (B = 1) that do not see each other. On the tokens' device.
    """
    lengths: list[int] | None = None
    """Of the first tokens of a cache: how many of each row are real, the rest being padding on the
    right (None: all).
    """
    group: dist.ProcessGroup | None = None
    """The processes that the sequence is cut over; then all but ``cu_seqlens`` is of this one's
    tokens."""
    layout: SequenceLayout | None = None
    """Who of ``group`` has which tokens."""
    bounds: Tensor | None = None
    """cu_seqlens on the CPU, where they came from there; :meth:`on_cpu` has them in any case."""
    _documents: list[int] | None = field(default=None, init=False, repr=False)

    @property
    def split(self) -> dict[str, Any]:
        """What the operators take of a sequence that several processes have."""
        return {"group": self.group, "layout": self.layout}

    def on_device(self) -> "Context":
        """The same with bounds that are on the CPU copied to the tokens' device, unawaited.

        Not for a sequence that several processes have, whose layout is known on the CPU."""
        device = self.rotary[0].device
        held = self.cu_seqlens
        if self.layout is not None or held is None or held.device == device or held.is_cuda:
            return self
        return replace(self, cu_seqlens=to_device(held, device), bounds=held)

    def on_cpu(self) -> Tensor | None:
        """cu_seqlens on the CPU, for what runs document by document: read only once."""
        if self.bounds is None and self.cu_seqlens is not None:
            held = self.cu_seqlens
            self.bounds = held.cpu() if held.is_cuda else held
        return self.bounds

    def documents(self, length: int) -> list[int]:
        """Tokens of each packed document that has any, or ``length``; what is past them is another.

        As :meth:`on_cpu`."""
        bounds_on_cpu = self.on_cpu()
        if bounds_on_cpu is None:
            return [length]
        if self._documents is None:
            bounds = [*bounds_on_cpu.tolist(), length]
            counts = [end - start for start, end in itertools.pairwise(bounds)]
            self._documents = [count for count in counts if count]
        return self._documents


def as_bounds(cu_seqlens: Tensor | Sequence[int] | None) -> Tensor | None:
    """cu_seqlens as a tensor: integers become one on the CPU."""
    if cu_seqlens is None or isinstance(cu_seqlens, Tensor):
        return cu_seqlens
    return torch.tensor(cu_seqlens, device="cpu")


def context_refusal(config: ModelConfig) -> str | None:
    """Why a sequence cannot be cut over several processes in such a model, or None."""
    if config.mode == "clamped":
        return "mode 'clamped' depends on the whole sequence"
    return None


@dataclass
class ModelCache:
    """What a model keeps of the tokens so far, so that each more costs one step.

    ``model.make_cache(batch)`` makes it.

    A mixer (``layer.mixer``) has ``make_cache(batch) -> cache``, empty, taking device and dtype
    from what comes, and ``forward(x, context, cache=None)``. Given a cache, x [B, T, D] are tokens
    that follow those in the cache: the mixer returns what it would for them at the end of the whole
    sequence, and appends them to the cache in place. Where ``context.lengths`` is given (with the
    first tokens only) row r goes on from its own token ``lengths[r] - 1``. A mixer that cannot
    decode raises ValueError in ``make_cache``, saying why."""

    layers: list[Any]
    """One mixer's cache a layer."""
    lengths: list[int]
    """Tokens held, and so the next token's position, of each row."""

    def select(self, rows: list[int]) -> None:
        """Let row r be what row ``rows[r]`` was, in every layer; its caches have ``select`` too."""
        self.lengths = [self.lengths[row] for row in rows]
        for layer in self.layers:
            layer.select(rows)

    def crop_refusal(self) -> str | None:
        """Why :meth:`crop` cannot forget tokens, or None."""
        if all(isinstance(layer, TokenCache) for layer in self.layers):
            return None
        return "a Mamba layer's state has no way back to an earlier token"

    def crop(self, count: int) -> None:
        """Forget each row's last ``count`` tokens.

        Raises ValueError where a row would be left without a token, or a layer cannot."""
        if why := self.crop_refusal():
            raise ValueError(f"the cache cannot be cropped: {why}; keep a copy of it instead")
        for layer in self.layers:
            layer.crop(count)
        self.lengths = [held - count for held in self.lengths]


def rotary_tables(
    length: int, head_dim: int, device: torch.device, base: float = 10000.0
) -> tuple[Tensor, Tensor]:
    """RoPE's (cos, sin) of the first ``length`` positions, each [length, head_dim / 2] fp32.

    For interleaved channel pairs."""
    return rotary_at(torch.arange(length, device=device), head_dim, base)


def rotary_at(positions: Tensor, head_dim: int, base: float = 10000.0) -> tuple[Tensor, Tensor]:
    """RoPE's (cos, sin) of positions [...], [..., head_dim / 2] fp32 each, of fp64 angles."""
    frequency = base ** (
        -torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions.device) / head_dim
    )
    angle = positions.double()[..., None] * frequency
    return angle.cos().float(), angle.sin().float()


def rotary_behind(
    held: list[int], length: int, head_dim: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """RoPE's (cos, sin) of ``length`` tokens behind ``held[r]`` of each row, as in Context."""
    start = uniform(held)
    first = start if start is not None else torch.tensor(held, device=device)[:, None]
    return rotary_at(first + torch.arange(length, device=device), head_dim)
