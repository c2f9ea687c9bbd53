"""Layers that every family shares. Shapes: B batch, L length, D d_model, H query heads, G key heads, E head width."""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sisa_kernels.cache import TokenCache, uniform

from .config import ModelConfig


@dataclass
class Context:
    """What a layer must know of its tokens beyond their states: where they stand, and which belong together."""

    rotary: tuple[Tensor, Tensor]
    """RoPE's (cos, sin) of the tokens' positions, each [L, E / 2] fp32; [B, L, E / 2] behind caches of unequal length."""
    cu_seqlens: Tensor | None = None
    """[documents + 1] int32, rising from 0 to L: documents packed into one sequence (B = 1) that do not see each other."""
    lengths: list[int] | None = None
    """Of the first tokens of a cache: how many of each row are real, the rest being padding on the right (None: all)."""
    _documents: list[int] | None = field(default=None, init=False, repr=False)

    def documents(self, length: int) -> list[int]:
        """Tokens of each packed document; without packing ``length``. Read from the device once, for the first layer that asks."""
        if self.cu_seqlens is None:
            return [length]
        if self._documents is None:
            self._documents = self.cu_seqlens.diff().tolist()
        return self._documents


@dataclass
class ModelCache:
    """What a model keeps of the tokens so far, so that each more costs one step; made by ``model.make_cache(batch)``.

    A mixer (``layer.mixer``) has ``make_cache(batch) -> cache``, empty, taking device and dtype from what comes, and
    ``forward(x, context, cache=None)``. Given a cache, x [B, T, D] are tokens that follow those in the cache: the mixer returns
    what it would for them at the end of the whole sequence, and appends them to the cache in place. Where ``context.lengths`` is
    given (with the first tokens only) row r goes on from its own token ``lengths[r] - 1``. A mixer that cannot decode raises
    ValueError in ``make_cache``, saying why.
    """

    layers: list[Any]
    """One mixer's cache a layer."""
    lengths: list[int]
    """Tokens held, and so the next token's position, of each row."""

    def select(self, rows: list[int]) -> None:
        """Let row r be what row ``rows[r]`` was, in every layer; its caches have ``select`` too."""
        self.lengths = [self.lengths[row] for row in rows]
        for layer in self.layers:
            layer.select(rows)


def rotary_tables(length: int, head_dim: int, device: torch.device, base: float = 10000.0) -> tuple[Tensor, Tensor]:
    """RoPE's (cos, sin) of the first ``length`` positions, each [length, head_dim / 2] fp32, for interleaved channel pairs."""
    return rotary_at(torch.arange(length, device=device), head_dim, base)


def rotary_at(positions: Tensor, head_dim: int, base: float = 10000.0) -> tuple[Tensor, Tensor]:
    """RoPE's (cos, sin) of any positions [...], each [..., head_dim / 2] fp32; angles are formed in fp64."""
    frequency = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions.device) / head_dim)
    angle = positions.double()[..., None] * frequency
    return angle.cos().float(), angle.sin().float()


def rotary_behind(held: list[int], length: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """RoPE's (cos, sin) of ``length`` tokens behind ``held[r]`` of each row r, as :class:`Context` has them."""
    start = uniform(held)
    first = start if start is not None else torch.tensor(held, device=device)[:, None]
    return rotary_at(first + torch.arange(length, device=device), head_dim)


ALIGNED = 16  # fp32 numbers in a cache line


def _matmul_aligned(a: Tensor, b: Tensor) -> Tensor:
    """``a b`` of two matrices, its rows beginning on cache lines whatever the width: a view of a buffer with wider rows."""
    width = b.shape[1]
    out = a.new_empty(a.shape[0], -(-width // ALIGNED) * ALIGNED)[:, :width]
    return torch.mm(a, b, out=out)


class _AlignedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return _matmul_aligned(x.flatten(0, -2), weight.t()).unflatten(0, x.shape[:-1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        rows, drows = x.flatten(0, -2), dy.flatten(0, -2)
        dx = _matmul_aligned(drows, weight).view(x.shape) if ctx.needs_input_grad[0] else None
        return dx, _matmul_aligned(drows.t(), rows) if ctx.needs_input_grad[1] else None


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """``x weight^T`` without bias, [..., d_in] and [d_out, d_in] -> [..., d_out].

    In fp32 on the CPU, where a width is no multiple of 16, with the rows of the result and of the gradients on cache lines: where
    they are not, the product takes 1.4 times as long (SISA's widths: 2,796 x 768 on one core 131 ms against 91).
    """
    plain = x.device.type != "cpu" or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling()
    if plain or not any(width % ALIGNED for width in weight.shape):
        return F.linear(x, weight)
    return _AlignedLinear.apply(x, weight)


class Linear(nn.Linear):
    """``nn.Linear`` without bias by :func:`linear`: a module, so that hooks and what takes its place (LoRA, say) see its input."""

    def __init__(self, d_in: int, d_out: int):
        super().__init__(d_in, d_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


class PackedLinear(nn.Module):
    """Several bias-free projections of one input as one matrix product; the state dict holds each matrix under its own name.

    Args:
        d_in: input width.
        sizes: name -> output width, in the order of the outputs.

    ``forward(x [..., d_in])`` returns one view [..., width] a projection.
    """

    def __init__(self, d_in: int, sizes: dict[str, int]):
        super().__init__()
        self.sizes = sizes
        self.weight = nn.Parameter(torch.empty(sum(sizes.values()), d_in))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return linear(x, self.weight).split(list(self.sizes.values()), -1)

    def matrices(self) -> dict[str, Tensor]:
        """Views [width, d_in] of the packed weight by name."""
        return dict(zip(self.sizes, self.weight.split(list(self.sizes.values()))))

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        for name, matrix in self.matrices().items():
            destination[f"{prefix}{name}.weight"] = matrix if keep_vars else matrix.detach()

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs):
        known = {f"{prefix}{name}.weight": matrix for name, matrix in self.matrices().items()}
        fitting = {}
        if strict:
            unexpected_keys += [key for key in state_dict if key.startswith(prefix) and key not in known]
        for key, matrix in known.items():
            given = state_dict.get(key)
            if given is None:
                missing_keys.append(key)
            elif given.shape != matrix.shape:
                error_msgs.append(
                    f"size mismatch for {key}: {list(given.shape)} in the state dict, {list(matrix.shape)} in the model"
                )
            else:
                fitting[key] = given
        if local_metadata.get("assign_to_params_buffers", False) and fitting.keys() == known.keys():
            self.weight = nn.Parameter(torch.cat([*fitting.values()]).detach(), self.weight.requires_grad)
            return
        for key, given in fitting.items():
            if self.weight.is_meta and not given.is_meta:
                error_msgs.append(f"{key} cannot be copied into a meta model; pass assign=True, or call to_empty before")
            with torch.no_grad():
                known[key].copy_(given)


class QKVAttention(nn.Module):
    """The projections of attention without an importance term: q, k and v (``gates``: further widths) in one product, and W_O."""

    def __init__(self, config: ModelConfig, **gates: int):
        super().__init__()
        self.n_heads, self.head_dim = config.n_heads, config.head_dim
        width_q, width_kv = config.d_model, config.n_kv_heads * config.head_dim
        self.proj = PackedLinear(config.d_model, {"W_Q": width_q, "W_K": width_kv, "W_V": width_kv, **gates})
        self.W_O = nn.Linear(config.d_model, config.d_model, bias=False)

    def operands(self, x: Tensor) -> tuple[Tensor, ...]:
        """q [B, L, H, E], k and v [B, L, G, E] and the gates [B, L, width] of the normed input x [B, L, D]."""
        q, k, v, *gates = self.proj(x)
        return *(part.unflatten(-1, (-1, self.head_dim)) for part in (q, k, v)), *gates

    def make_cache(self, batch: int) -> TokenCache:
        """An empty cache of ``batch`` sequences."""
        return TokenCache(batch)


class Fp32Parameters(nn.Module):
    """A module whose parameters named in ``fp32`` stay fp32 and keep their bits, whatever the module is cast to."""

    fp32: tuple[str, ...] = ()

    def _apply(self, fn, recurse=True):
        kept = {name: getattr(self, name).detach() for name in self.fp32}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            parameter = getattr(self, name)
            if parameter.dtype != torch.float32:
                parameter.data = before.to(parameter.device)
        return self


class SwiGLU(nn.Module):
    """``w_down(silu(w_gate x) * w_up x)``, [B, L, D] -> [B, L, D]; gate and up are one packed product."""

    def __init__(self, d_model: int, d_ff: int):
        super().__init__()
        self.w_in = PackedLinear(d_model, {"w_gate": d_ff, "w_up": d_ff})
        self.w_down = Linear(d_ff, d_model)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.w_in(x)
        return self.w_down(F.silu(gate) * up)


class Layer(nn.Module):
    """One pre-norm layer: ``x + attn(norm(x))``, then ``x + SwiGLU(norm(x))``; RMSNorm eps 1e-6."""

    def __init__(self, attn: nn.Module, d_model: int, d_ff: int):
        super().__init__()
        self.attn_norm = nn.RMSNorm(d_model, eps=1e-6)
        self.attn = attn
        self.ffn_norm = nn.RMSNorm(d_model, eps=1e-6)
        self.ffn = SwiGLU(d_model, d_ff)

    @property
    def mixer(self) -> nn.Module:
        """What mixes the tokens, as a Mamba block names it."""
        return self.attn

    def forward(self, x: Tensor, context: Context, cache: Any = None) -> Tensor:
        x = x + self.attn(self.attn_norm(x), context, cache)
        return x + self.ffn(self.ffn_norm(x))
