"""SISA's rivals with a bias on the score instead of a term in it: FoX's forget gate and ALiBi, on the Transformer's trunk."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sisa_kernels as sk

from .config import ModelConfig
from .layers import Context, PackedLinear


class ForgettingAttention(nn.Module):
    """FoX's attention (arXiv 2503.02130, section 3; its LLaMA form), [B, L, D] -> [B, L, D].

    ``log_forget = logsigmoid(w_f.x + b_f)`` for each query head, in fp32; as in the paper no RoPE, and b_f = 0 at first: every
    gate begins at a half and learns not to forget. Of the paper's "Pro" block (output gate and norm, QK-norm, shifts) nothing.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head_dim = config.head_dim
        width_q, width_kv = config.d_model, config.n_kv_heads * config.head_dim
        sizes = {"W_Q": width_q, "W_K": width_kv, "W_V": width_kv, "W_F": config.n_heads}
        self.proj = PackedLinear(config.d_model, sizes)
        self.forget_bias = nn.Parameter(torch.empty(config.n_heads))
        self.W_O = nn.Linear(config.d_model, config.d_model, bias=False)

    def reset_parameters(self) -> None:
        """FoX's own initial values; the matrices of every family are set by the model."""
        nn.init.zeros_(self.forget_bias)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        *heads, forget = self.proj(x)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in heads)
        log_forget = F.logsigmoid(forget.float() + self.forget_bias.float())
        return self.W_O(sk.forgetting_attention(q, k, v, log_forget, cu_seqlens=context.cu_seqlens).flatten(2))


class AlibiAttention(nn.Module):
    """Attention with ALiBi's linear bias (arXiv 2108.12409, section 3) in place of RoPE, [B, L, D] -> [B, L, D]."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.n_heads, self.head_dim = config.n_heads, config.head_dim
        width_q, width_kv = config.d_model, config.n_kv_heads * config.head_dim
        self.proj = PackedLinear(config.d_model, {"W_Q": width_q, "W_K": width_kv, "W_V": width_kv})
        self.W_O = nn.Linear(config.d_model, config.d_model, bias=False)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in self.proj(x))
        # Made anew each time: a buffer would follow the module to bf16.
        log_forget = -sk.alibi_slopes(self.n_heads, x.device).expand(*x.shape[:2], -1)
        return self.W_O(sk.forgetting_attention(q, k, v, log_forget, cu_seqlens=context.cu_seqlens).flatten(2))
