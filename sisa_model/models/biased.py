"""SISA's rivals, with a bias on a Transformer's score: FoX's forget gate and ALiBi."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sisa_kernels as sk
from sisa_model.models.config import ModelConfig
from sisa_model.models.context import Context
from sisa_model.models.layers import QKVAttention
from sisa_model.models.linear import local

STOCK = {"sdpa": "chunked"}  # what stock attention is called by forgetting_attention


class BiasedAttention(QKVAttention):
    """Softmax attention without RoPE; a score loses ``-log_forget`` at each token after the key."""

    def __init__(self, config: ModelConfig, **gates: int):
        super().__init__(config, **gates)
        self.backend = STOCK.get(config.backend, config.backend)

    def log_forget(self, q: Tensor, *gates: Tensor) -> Tensor:
        """[B, L, H] fp32, <= 0, for queries q [B, L, H, E]."""
        raise NotImplementedError

    def forward(self, x: Tensor, context: Context, cache: sk.TokenCache | None = None) -> Tensor:
        q, k, v, *gates = self.operands(x)
        log_forget = self.log_forget(q, *gates)
        if cache is None:
            y = sk.forgetting_attention(
                q,
                k,
                v,
                log_forget,
                cu_seqlens=context.cu_seqlens,
                backend=self.backend,
                **context.split,
            )
        else:
            y = sk.forgetting_decode(
                q, k, v, log_forget, cache, lengths=context.lengths, backend=self.backend
            )
        return self.W_O(y.flatten(2))


class ForgettingAttention(BiasedAttention):
    """FoX's attention (arXiv 2503.02130, section 3; its LLaMA form).

    ``log_forget = logsigmoid(w_f.x + b_f)`` for each query head, in fp32; as in the paper no RoPE,
    and b_f = 0 at first: every gate begins at a half and learns not to forget. Of the paper's "Pro"
    block (output gate and norm, QK-norm, shifts) nothing."""

    def __init__(self, config: ModelConfig):
        super().__init__(config, W_F=config.n_heads)
        self.forget_bias = nn.Parameter(torch.empty(config.n_heads))

    def reset_parameters(self) -> None:
        """FoX's own initial values; the matrices of every family are set by the model."""
        nn.init.zeros_(self.forget_bias)

    def log_forget(self, q: Tensor, *gates: Tensor) -> Tensor:
        return F.logsigmoid(gates[0].float() + local(self.forget_bias).float())


class AlibiAttention(BiasedAttention):
    """Attention with ALiBi's linear bias (arXiv 2108.12409, section 3)."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.all_heads = config.n_heads
        self.first_head = 0

    def share_heads(self, rank: int, size: int) -> None:
        super().share_heads(rank, size)
        self.first_head = rank * self.n_heads

    def log_forget(self, q: Tensor, *gates: Tensor) -> Tensor:
        # Made anew each time: a buffer would follow the module to bf16.
        slopes = sk.alibi_slopes(self.all_heads, q.device)
        mine = slopes[self.first_head : self.first_head + self.n_heads]
        return -mine.expand(*q.shape[:2], -1)
