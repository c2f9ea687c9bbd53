"""Hybrids of attention and Mamba-2, ordered by ``ModelConfig.pattern``, one letter a layer.

- ``hybrid-transformer``, ``hybrid-sisa`` (the paper's): Mamba-2 blocks first, then attention layers
  with their SwiGLU.
- ``hybrid-block``: the same layers interleaved, one attention layer amid every few Mamba-2 blocks,
  as in Jamba (arXiv 2403.19887). Simplified: Mamba-2 for Mamba-1, one attention layer in 6 rather
  than in 8, RoPE, no mixture of experts and no MLP after a Mamba-2 block; the SwiGLU is widened so
  that the model has the Transformer's parameters.
- ``hybrid-head``: heads of both kinds in every layer, as in Hymba (:class:`HeadMix`)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from sisa_model.models.config import ModelConfig
from sisa_model.models.context import Context
from sisa_model.models.layers import Layer
from sisa_model.models.mamba import Mamba2, Mamba3, MambaBlock


@dataclass
class HeadCaches:
    """What both kinds of heads of a layer keep of the tokens so far."""

    attn: Any
    ssd: Any

    def select(self, rows: list[int]) -> None:
        """Let row r be what row ``rows[r]`` was: the beams that go on, say."""
        self.attn.select(rows)
        self.ssd.select(rows)


class HeadMix(nn.Module):
    """Attention heads and as many SSD (Mamba-2) heads on one input, averaged.

    ``W_O (RMSNorm(attention) + RMSNorm(ssd silu(z))) / 2``.

    Follows Hymba (arXiv 2411.13676), whose heads of both kinds run in parallel, are normed, scaled
    by learned vectors (the norms' weights here) and averaged before one output matrix. Simplified:
    Mamba-2's heads in place of Mamba-1's, each kind with input projections of its own, global
    attention in every layer, no meta tokens, no keys shared between layers."""

    def __init__(self, attention: Callable[[ModelConfig], nn.Module], config: ModelConfig):
        super().__init__()
        self.attn = attention(config)
        self.ssd = Mamba2(config, expand=1)
        # One output matrix serves both: no modules in its places, where adapters would find them.
        del self.attn.W_O, self.ssd.out_proj
        self.attn.W_O = _unchanged  # type: ignore[assignment]
        self.ssd.out_proj = _unchanged  # type: ignore[assignment]
        self.norm = nn.RMSNorm(config.d_model, eps=1e-6)
        self.W_O = nn.Linear(config.d_model, config.d_model, bias=False)

    def make_cache(self, batch: int) -> HeadCaches:
        """An empty cache for each kind of heads; ValueError where the attention has none."""
        attn, ssd = (heads.make_cache(batch) for heads in (self.attn, self.ssd))  # type: ignore[operator]
        return HeadCaches(attn, ssd)

    def forward(self, x: Tensor, context: Context, cache: HeadCaches | None = None) -> Tensor:
        attn_cache, ssd_cache = (None, None) if cache is None else (cache.attn, cache.ssd)
        attention = self.norm(self.attn(x, context, attn_cache))
        return self.W_O((attention + self.ssd(x, context, ssd_cache)) / 2)


def _unchanged(x: Tensor) -> Tensor:
    return x


def make_layer(
    kind: str, attention: Callable[[ModelConfig], nn.Module], config: ModelConfig
) -> nn.Module:
    """The layer of a letter of ``config.layer_kinds``; ``attention`` makes the family's mixer."""
    if kind == "m":
        mixer = Mamba3(config) if config.family == "mamba3" else Mamba2(config)
        return MambaBlock(mixer, config.d_model)
    heads = attention(config) if kind == "a" else HeadMix(attention, config)
    return Layer(heads, config.d_model, config.d_ff)
