"""Layers that every family shares.

Shapes: B batch, L length, D d_model, H query heads, G key heads, E head width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sisa_kernels.cache import TokenCache
from sisa_model.models.config import ModelConfig
from sisa_model.models.context import Context
from sisa_model.models.linear import Linear, PackedLinear, call_padded
from sisa_model.utils.buffers import empty_aligned, tiles


class QKVAttention(nn.Module):
    """The projections of attention: q, k, v and ``gates`` (further widths) packed, and W_O."""

    def __init__(self, config: ModelConfig, **gates: int):
        super().__init__()
        self.n_heads = config.n_heads
        self.head_dim = config.head_dim
        d = config.d_model
        width_kv = config.n_kv_heads * config.head_dim
        self.proj = PackedLinear(d, {"W_Q": d, "W_K": width_kv, "W_V": width_kv, **gates})
        self.W_O = Linear(d, d)

    def operands(self, x: Tensor) -> tuple[Tensor, ...]:
        """q [B, L, H, E], k and v [B, L, G, E], gates [B, L, width] of the normed x [B, L, D]."""
        q, k, v, *gates = self.proj(x)
        heads = (part.unflatten(-1, (-1, self.head_dim)) for part in (q, k, v))
        return *heads, *gates

    def share_heads(self, rank: int, size: int) -> None:
        """Be what process ``rank`` of ``size`` has, once the parameters are split by heads."""
        self.n_heads //= size

    def make_cache(self, batch: int) -> TokenCache:
        """An empty cache of ``batch`` sequences."""
        return TokenCache(batch)


class _GatedSilu(torch.autograd.Function):
    """``silu(gate) * up`` of [..., gate | up], which is all that the backward keeps.

    Its bits are those of the plain formula, whose backward makes more passes over memory and
    which keeps silu(gate) besides."""

    generate_vmap_rule = True

    @staticmethod
    def forward(gate_up):
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, dy):
        (gate_up,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # for a second derivative
            gate, up = gate_up.chunk(2, -1)
            sigmoid = gate.sigmoid()
            slope = sigmoid * (1 + gate * (1 - sigmoid))
            return torch.cat([dy * up * slope, dy * F.silu(gate)], -1)
        rows = gate_up.flatten(0, -2)
        dgate_up = empty_aligned(rows, *rows.shape)
        for packed, gradient, d in tiles(rows, dgate_up, dy.flatten(0, -2)):
            gate, up = packed.chunk(2, -1)
            dgate, dup = gradient.chunk(2, -1)
            dup.copy_(d * F.silu(gate))
            dgate.copy_(torch.ops.aten.silu_backward(d * up, gate))
        return dgate_up.view(gate_up.shape)


class SwiGLU(nn.Module):
    """``w_down(silu(w_gate x) * w_up x)``, [B, L, D] -> [B, L, D]; w_gate and w_up are packed.

    Where products like it, the hidden width is padded with zeros, which silu(0) * 0 keeps."""

    def __init__(self, d_model: int, d_ff: int):
        super().__init__()
        self.d_ff = d_ff
        self.w_in = PackedLinear(d_model, {"w_gate": d_ff, "w_up": d_ff})
        self.w_down = Linear(d_ff, d_model)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            hidden = _GatedSilu.apply(self.w_in.side_by_side(x, padded=True))
        else:
            gate, up = self.w_in(x, padded=True)
            hidden = F.silu(gate) * up
        return call_padded(self.w_down, hidden, self.d_ff)


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
