"""SISA's attention layer and its controls."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sisa_kernels as sk
from sisa_kernels.decode import sisa_decode_packed
from sisa_kernels.inputs import SisaInputs
from sisa_model.models.config import ModelConfig
from sisa_model.models.context import Context, rotary_behind
from sisa_model.models.linear import Fp32Parameters, Linear, PackedLinear, local

LAMBDA_RAW_INIT = -1.0  # softplus(-1) = 0.3133
DECAY_BIAS_INIT = -5.0  # a half-life of about 103 tokens
THETA_INIT_STD = 0.01
# The fields of ModelConfig that the layer by itself has.
OWN_FIELDS = ("n_kv_heads", "init_std", "decay", "rotation", "lam", "mode", "backend")


class SisaAttention(Fp32Parameters):
    """Softmax attention with the importance term in its score (paper, section 3), on [B, L, D].

    q, k, v, b, c, theta and the decay come from one packed product in the compute dtype;
    ``log_decay = -softplus(w_a.x + b_a)`` and theta are fp32 from there on, and so is
    ``lambda_raw`` (lambda = softplus(lambda_raw)) whatever the module is cast to: in bf16 it would
    never move. Controls drop the parameters that they make idle: without decay g = 0, without
    rotation Phi = 0.

    In a model of one's own, :meth:`of` makes it from widths, and ``attn(x)`` is causal attention
    with RoPE over x [B, L, D]."""

    fp32 = ("lambda_raw",)

    @classmethod
    def of(cls, d_model: int, n_heads: int, d_state: int = 16, **fields: Any) -> "SisaAttention":
        """The layer by itself, initialised; ``fields`` are the layer's others of ModelConfig.

        These are n_kv_heads, init_std, decay, rotation, lam (not "zero"), mode and backend. Raises
        ValueError as ModelConfig does, and for fields of whole models."""
        if unknown := sorted(fields.keys() - set(OWN_FIELDS)):
            raise ValueError(
                f"{unknown[0]} is not a field of the layer by itself, which has "
                f"{', '.join(OWN_FIELDS)}"
            )
        if fields.get("lam") == "zero":
            raise ValueError(
                "lam must be per-head or shared, got 'zero', which leaves no importance term"
            )
        unused = ("n_layers", "vocab_size", "max_seq_len", "d_ff_transformer", "d_ff")
        model: dict[str, Any] = {"family": "sisa", **dict.fromkeys(unused, 1)}
        config = ModelConfig(d_model=d_model, n_heads=n_heads, d_state=d_state, **model, **fields)
        attn = cls(config)
        attn.proj.reset_parameters(config.init_std)
        nn.init.normal_(attn.W_O.weight, std=config.init_std)
        attn.reset_parameters()
        return attn

    def __init__(self, config: ModelConfig):
        super().__init__()
        d = config.d_model
        self.n_heads = H = config.n_heads
        self.n_kv_heads = G = config.n_kv_heads
        self.head_dim = E = config.head_dim
        self.d_state = Ds = config.d_state
        self.mode = config.mode
        self.backend = config.backend
        self.decay = config.decay
        self.rotation = config.rotation
        self.weights = config.weights
        sizes = {"W_Q": H * E, "W_K": G * E, "W_V": G * E, "W_B": G * Ds, "W_C": H * Ds}
        if self.decay:
            sizes["W_alpha"] = G
            self.decay_bias = nn.Parameter(torch.empty(G))
        if self.rotation:
            sizes["W_theta"] = G * Ds // 2
        self.proj = PackedLinear(d, sizes)
        self.W_O = Linear(d, d)
        lambdas = H if config.lam == "per-head" else 1
        self.lambda_raw = nn.Parameter(torch.empty(lambdas, dtype=torch.float32))

    def reset_parameters(self) -> None:
        """SISA's own initial values; the matrices of every family are set by the model."""
        nn.init.constant_(self.lambda_raw, LAMBDA_RAW_INIT)
        if self.decay:
            nn.init.constant_(self.decay_bias, DECAY_BIAS_INIT)
        if self.rotation:
            nn.init.normal_(self.proj.get_parameter("W_theta.weight"), std=THETA_INIT_STD)

    def lam(self) -> Tensor:
        """lambda of each head, [H] fp32, > 0."""
        return F.softplus(local(self.lambda_raw).float()).expand(self.n_heads)

    def share_heads(self, rank: int, size: int) -> None:
        """Be what process ``rank`` of ``size`` has, once the parameters are split by heads."""
        self.n_heads //= size
        self.n_kv_heads //= size

    def operands(self, x: Tensor, context: Context | None = None) -> SisaInputs:
        """The operator's inputs, of the normed x [B, L, D]; rotary and documents of ``context``."""
        parts = dict(zip(self.proj.sizes, self.proj(x)))
        q, k, v = (parts[name].unflatten(-1, (-1, self.head_dim)) for name in ("W_Q", "W_K", "W_V"))
        b, c = (parts[name].unflatten(-1, (-1, self.d_state)) for name in ("W_B", "W_C"))
        key_heads = (*x.shape[:2], self.n_kv_heads)
        if self.decay:
            logits = parts["W_alpha"].float() + local(self.decay_bias).float()
            if self.weights == "bf16":  # a layer of bf16 with its bias, as the authors'
                logits = logits.bfloat16().float()
            log_decay = -F.softplus(logits)
        else:
            log_decay = x.new_zeros(key_heads, dtype=torch.float32)
        if self.rotation:
            theta = parts["W_theta"].float().unflatten(-1, (self.n_kv_heads, -1))
        else:
            theta = x.new_zeros(*key_heads, self.d_state // 2, dtype=torch.float32)
        inputs = SisaInputs(q, k, v, b, c, log_decay, theta, self.lam())
        if context is None:
            return inputs
        return inputs._replace(rotary=context.rotary, cu_seqlens=context.cu_seqlens)

    def make_cache(self, batch: int) -> sk.SisaCache:
        """An empty cache of ``batch`` sequences; ValueError in mode "clamped"."""
        if self.mode == "clamped":
            raise ValueError(
                "SISA in mode 'clamped' has no cache: what it clamps depends on the whole sequence"
            )
        return sk.SisaCache(batch)

    def forward(
        self, x: Tensor, context: Context | None = None, cache: sk.SisaCache | None = None
    ) -> Tensor:
        held = cache.lengths if cache is not None else [0]
        context = context or Context(rotary_behind(held, x.shape[1], self.head_dim, x.device))
        if cache is not None and self._is_one_step(x, cache):
            return self.W_O(self._next_token(x, context, cache).flatten(2))
        operands = self.operands(x, context)._asdict()
        if cache is None:
            y = sk.sisa_attention(**operands, mode=self.mode, backend=self.backend, **context.split)
        else:
            del operands["cu_seqlens"]  # a cache's rows are one document each
            y = sk.sisa_decode(
                **operands, cache=cache, lengths=context.lengths, backend=self.backend
            )
        return self.W_O(y.flatten(2))

    def _is_one_step(self, x: Tensor, cache: sk.SisaCache) -> bool:
        """Whether x is the next token of each row, whose gates the op itself can make."""
        with_gates = self.decay and self.rotation and self.weights != "bf16"
        return with_gates and x.shape[1] == 1 and any(cache.lengths) and x.dtype != torch.float64

    def _next_token(self, x: Tensor, context: Context, cache: sk.SisaCache) -> Tensor:
        """y [B, 1, H, E] of x [B, 1, D]."""
        packed = self.proj.side_by_side(x)
        lambda_raw = local(self.lambda_raw).expand(self.n_heads)
        bias = local(self.decay_bias).float()
        return sisa_decode_packed(packed, bias, lambda_raw, cache, rotary=context.rotary)
