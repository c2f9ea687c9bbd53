"""The baseline: causal softmax attention with RoPE."""

from typing import cast

import torch.nn.functional as F
from torch import Tensor

from sisa_kernels import TokenCache, causal_attention
from sisa_kernels.cache import uniform, visible
from sisa_kernels.inputs import PlainBackend, is_grouped
from sisa_kernels.paths import native
from sisa_kernels.plain import causal_decode, stock_attention
from sisa_kernels.rotation import rotate
from sisa_model.models.config import ModelConfig
from sisa_model.models.context import Context
from sisa_model.models.layers import QKVAttention


class TransformerAttention(QKVAttention):
    """``softmax(q k^T / sqrt(E)) v``, RoPE on q and k; its cache holds k (turned) and v.

    On a CPU by :func:`sisa_kernels.causal_attention` and :func:`sisa_kernels.plain.causal_decode`,
    whose kernels run SISA too, unless backend is "sdpa"; elsewhere by
    scaled_dot_product_attention."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.backend = cast(PlainBackend, config.backend)  # as the config has checked

    def forward(self, x: Tensor, context: Context, cache: TokenCache | None = None) -> Tensor:
        q, k, v = self.operands(x)
        if cache is None and (context.group is not None or not x.is_cuda):
            y = causal_attention(
                q,
                k,
                v,
                rotary=context.rotary,
                cu_seqlens=context.cu_seqlens,
                backend=self.backend,
                **context.split,
            )
            return self.W_O(y.flatten(2))
        if cache is not None and any(cache.lengths) and self._is_native(q, v):
            return self.W_O(causal_decode(q, k, v, cache, rotary=context.rotary).flatten(2))
        cos, sin = (table.unsqueeze(-2) for table in context.rotary)
        # Rotated in fp32 whatever the compute dtype, as SISA's operator does.
        q, k = (rotate(t, cos, sin).to(t.dtype) for t in (q, k))
        if cache is None:
            # By the context, which reads the documents from the device once for all layers.
            y = stock_attention(q, k, v, context.documents(x.shape[1]))
            return self.W_O(y.flatten(2))
        held = cache.append(context.lengths, k=k, v=v)
        y = (
            self._attend(q, cache, held)
            if any(held)
            else causal_attention(q, k, v, backend=self.backend)
        )
        return self.W_O(y.flatten(2))

    def _is_native(self, q: Tensor, v: Tensor) -> bool:
        """Whether new tokens over a cache run on the kernel that runs SISA's."""
        return native.choose_plain(self.backend, "sdpa", q, v, "causal attention")

    @staticmethod
    def _attend(q: Tensor, cache: TokenCache, held: list[int]) -> Tensor:
        """New tokens, the last T in the cache behind the ``held``, over all of it: [B, T, H, E]."""
        T = q.shape[1]
        keys, values = (cache.buffers[name][:, :, : max(held) + T] for name in ("k", "v"))
        mask = None if T == 1 and uniform(held) is not None else visible(held, T, q.device)
        gqa = is_grouped(q.shape[2], keys.shape[1])
        return F.scaled_dot_product_attention(
            q.transpose(1, 2), keys, values, attn_mask=mask, enable_gqa=gqa
        ).transpose(1, 2)
