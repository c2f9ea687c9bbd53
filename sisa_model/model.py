"""The language model: embedding, layers, tied output; and build(), which makes one from a preset."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sisa_kernels.checks import check_documents

from .config import ModelConfig
from .layers import Context, Layer, PackedLinear, rotary_tables
from .presets import preset_config
from .sisa import SisaAttention
from .transformer import TransformerAttention


class LanguageModel(nn.Module):
    """A causal language model: ``model(input_ids [B, L] int64) -> logits [B, L, V]``.

    ``cu_seqlens`` [documents + 1] int32, rising from 0 to L, packs documents into one sequence (B = 1): none sees another.
    Works under ``torch.device("meta")``; after ``to_empty`` call :meth:`reset_parameters`. Raises ValueError for a sequence
    longer than ``config.max_seq_len`` and, on the CPU, for a token outside the vocabulary.
    With ``checkpoint_layers`` training keeps the layers' inputs only, and runs each layer again in the backward.
    """

    checkpoint_layers = False

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        # With lambda = 0 the importance term is gone, and with it every parameter it had: a Transformer of SISA's d_ff.
        attention = SisaAttention if config.family == "sisa" and config.lam != "zero" else TransformerAttention
        self.layers = nn.ModuleList(Layer(attention(config), config.d_model, config.d_ff) for _ in range(config.n_layers))
        self.final_norm = nn.RMSNorm(config.d_model, eps=1e-6)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the initial values: std ``init_std`` for every matrix and the embedding, and SISA's own (paper, section 4)."""
        for module in self.modules():
            if isinstance(module, (nn.Embedding, nn.Linear, PackedLinear)):
                nn.init.normal_(module.weight, std=self.config.init_std)
            elif isinstance(module, nn.RMSNorm):
                nn.init.ones_(module.weight)
        for module in self.modules():
            if isinstance(module, SisaAttention):
                module.reset_parameters()

    def forward(self, input_ids: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        return F.linear(self.hidden(input_ids, cu_seqlens), self.embed.weight)

    def hidden(self, input_ids: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """The final normed states [B, L, D], before the output matrix."""
        if input_ids.ndim != 2 or input_ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"input_ids must be int64 [batch, length], got {input_ids.dtype} {list(input_ids.shape)}")
        length, config = input_ids.shape[1], self.config
        if not 1 <= length <= config.max_seq_len:
            raise ValueError(f"input_ids must be 1 to {config.max_seq_len} (max_seq_len) tokens long, got {length}")
        if input_ids.device.type == "cpu" and not torch.compiler.is_compiling():
            lo, hi = (int(x) for x in torch.aminmax(input_ids))
            if lo < 0 or hi >= config.vocab_size:
                raise ValueError(f"input_ids must lie in [0, {config.vocab_size}), got {lo} to {hi}")
        check_documents(cu_seqlens, input_ids)
        x = self.embed(input_ids)
        context = Context(rotary_tables(length, config.head_dim, input_ids.device), cu_seqlens)
        for layer in self.layers:
            if self.checkpoint_layers and self.training:
                x = checkpoint(layer, x, context, use_reentrant=False)
            else:
                x = layer(x, context)
        return self.final_norm(x)


def build(preset: str, **overrides: Any) -> LanguageModel:
    """A new model from a preset (``sisa_model.presets()``), initialised from torch's random state.

    ``overrides`` are fields of :class:`ModelConfig` (d_model n_heads n_kv_heads n_layers d_ff d_state vocab_size max_seq_len
    mode backend ...); d_ff is computed anew unless it is given. Raises ValueError as :func:`preset_config` does.
    """
    return LanguageModel(preset_config(preset, **overrides))


def count_parameters(model: nn.Module) -> int:
    """Number of parameters, the tied embedding counted once."""
    return sum(p.numel() for p in model.parameters())
