"""The baseline: causal softmax attention with RoPE, on stock scaled_dot_product_attention."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sisa_kernels.reference import rotate

from .config import ModelConfig
from .layers import Context, PackedLinear


class TransformerAttention(nn.Module):
    """``softmax(q k^T / sqrt(E)) v`` with RoPE on q and k, [B, L, D] -> [B, L, D]."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head_dim = config.head_dim
        width_q, width_kv = config.d_model, config.n_kv_heads * config.head_dim
        self.proj = PackedLinear(config.d_model, {"W_Q": width_q, "W_K": width_kv, "W_V": width_kv})
        self.W_O = nn.Linear(config.d_model, config.d_model, bias=False)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in self.proj(x))
        cos, sin = (table[:, None] for table in context.rotary)
        # Rotated in fp32 whatever the compute dtype, as SISA's operator does.
        q, k = (rotate(t, cos, sin).to(t.dtype) for t in (q, k))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        lengths = [x.shape[1]] if context.cu_seqlens is None else context.cu_seqlens.diff().tolist()
        documents = zip(*(t.split(lengths, 2) for t in (q, k, v)))
        gqa = q.shape[1] != k.shape[1]
        y = torch.cat([F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa) for q, k, v in documents], 2)
        return self.W_O(y.transpose(1, 2).flatten(2))
