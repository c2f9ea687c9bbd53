"""The baseline: causal softmax attention with RoPE, on stock scaled_dot_product_attention."""

import torch
import torch.nn.functional as F
from torch import Tensor

from sisa_kernels import TokenCache
from sisa_kernels.cache import uniform, visible
from sisa_kernels.rotation import rotate
from sisa_model.models.context import Context
from sisa_model.models.layers import QKVAttention


class TransformerAttention(QKVAttention):
    """``softmax(q k^T / sqrt(E)) v``, RoPE on q and k; its cache holds k (turned) and v."""

    def forward(self, x: Tensor, context: Context, cache: TokenCache | None = None) -> Tensor:
        q, k, v = self.operands(x)
        cos, sin = (table.unsqueeze(-2) for table in context.rotary)
        # Rotated in fp32 whatever the compute dtype, as SISA's operator does.
        q, k = (rotate(t, cos, sin).to(t.dtype) for t in (q, k))
        gqa = q.shape[2] != k.shape[2]
        if cache is not None:
            held = cache.append(context.lengths, k=k, v=v)
            if any(held):
                return self.W_O(self._attend(q, cache, held, gqa).flatten(2))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        documents = zip(*(t.split(context.documents(x.shape[1]), 2) for t in (q, k, v)))
        y = torch.cat(
            [
                F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
                for q, k, v in documents
            ],
            2,
        )
        return self.W_O(y.transpose(1, 2).flatten(2))

    @staticmethod
    def _attend(q: Tensor, cache: TokenCache, held: list[int], gqa: bool) -> Tensor:
        """New tokens, the last T in the cache behind the ``held``, over all of it: [B, T, H, E]."""
        T = q.shape[1]
        keys, values = (cache.buffers[name][:, :, : max(held) + T] for name in ("k", "v"))
        mask = None if T == 1 and uniform(held) is not None else visible(held, T, q.device)
        return F.scaled_dot_product_attention(
            q.transpose(1, 2), keys, values, attn_mask=mask, enable_gqa=gqa
        ).transpose(1, 2)
