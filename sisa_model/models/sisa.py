"""SISA's attention layer, its controls, and its health: lambda, half-life, range of g."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sisa_kernels as sk
from sisa_model.models.config import ModelConfig
from sisa_model.models.context import Context, rotary_behind
from sisa_model.models.linear import Fp32Parameters, PackedLinear

LAMBDA_RAW_INIT = -1.0  # softplus(-1) = 0.3133
DECAY_BIAS_INIT = -5.0  # a half-life of about 103 tokens
THETA_INIT_STD = 0.01


class SisaAttention(Fp32Parameters):
    """Softmax attention with the importance term inside the score (paper, section 3), [B, L, D] ->
    [B, L, D].

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
        known = ("n_kv_heads", "init_std", "decay", "rotation", "lam", "mode", "backend")
        if unknown := sorted(fields.keys() - set(known)):
            raise ValueError(
                f"{unknown[0]} is not a field of the layer by itself, which has {', '.join(known)}"
            )
        if fields.get("lam") == "zero":
            raise ValueError(
                "lam must be per-head or shared, got 'zero', which leaves no importance term"
            )
        model: dict[str, Any] = {
            "n_layers": 1,
            "vocab_size": 1,
            "max_seq_len": 1,
            "d_ff_transformer": 1,
            "d_ff": 1,
        }
        config = ModelConfig(
            family="sisa", d_model=d_model, n_heads=n_heads, d_state=d_state, **model, **fields
        )
        attn = cls(config)
        for matrix in (attn.proj.weight, attn.W_O.weight):
            nn.init.normal_(matrix, std=config.init_std)
        attn.reset_parameters()
        return attn

    def __init__(self, config: ModelConfig):
        super().__init__()
        d, H, G, E, Ds = (
            config.d_model,
            config.n_heads,
            config.n_kv_heads,
            config.head_dim,
            config.d_state,
        )
        self.n_heads, self.n_kv_heads, self.head_dim, self.d_state = H, G, E, Ds
        self.mode, self.backend = config.mode, config.backend
        self.decay, self.rotation = config.decay, config.rotation
        sizes = {"W_Q": H * E, "W_K": G * E, "W_V": G * E, "W_B": G * Ds, "W_C": H * Ds}
        if self.decay:
            sizes["W_alpha"] = G
            self.decay_bias = nn.Parameter(torch.empty(G))
        if self.rotation:
            sizes["W_theta"] = G * Ds // 2
        self.proj = PackedLinear(d, sizes)
        self.W_O = nn.Linear(d, d, bias=False)
        self.lambda_raw = nn.Parameter(
            torch.empty(H if config.lam == "per-head" else 1, dtype=torch.float32)
        )

    def reset_parameters(self) -> None:
        """SISA's own initial values; the matrices of every family are set by the model."""
        nn.init.constant_(self.lambda_raw, LAMBDA_RAW_INIT)
        if self.decay:
            nn.init.constant_(self.decay_bias, DECAY_BIAS_INIT)
        if self.rotation:
            nn.init.normal_(self.proj.matrices()["W_theta"].detach(), std=THETA_INIT_STD)

    def lam(self) -> Tensor:
        """lambda of each head, [H] fp32, > 0."""
        return F.softplus(self.lambda_raw).expand(self.n_heads)

    def operands(self, x: Tensor) -> tuple[Tensor, ...]:
        """(q, k, v, b, c, log_decay, theta) of :func:`sisa_kernels.sisa_attention` from the normed
        input x [B, L, D].
        """
        parts = dict(zip(self.proj.sizes, self.proj(x)))
        heads = {
            "W_Q": self.head_dim,
            "W_K": self.head_dim,
            "W_V": self.head_dim,
            "W_B": self.d_state,
            "W_C": self.d_state,
        }
        q, k, v, b, c = (parts[name].unflatten(-1, (-1, width)) for name, width in heads.items())
        shape = (*x.shape[:2], self.n_kv_heads)
        if self.decay:
            log_decay = -F.softplus(parts["W_alpha"].float() + self.decay_bias.float())
        else:
            log_decay = x.new_zeros(shape, dtype=torch.float32)
        if self.rotation:
            theta = parts["W_theta"].float().unflatten(-1, (self.n_kv_heads, -1))
        else:
            theta = x.new_zeros(*shape, self.d_state // 2, dtype=torch.float32)
        return q, k, v, b, c, log_decay, theta

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
        q, k, v, b, c, log_decay, theta = self.operands(x)
        if cache is not None:
            y = sk.sisa_decode(
                q,
                k,
                v,
                b,
                c,
                log_decay,
                theta,
                self.lam(),
                cache,
                rotary=context.rotary,
                lengths=context.lengths,
                backend=self.backend,
            )
            return self.W_O(y.flatten(2))
        y = sk.sisa_attention(
            q,
            k,
            v,
            b,
            c,
            log_decay,
            theta,
            self.lam(),
            rotary=context.rotary,
            mode=self.mode,
            backend=self.backend,
            cu_seqlens=context.cu_seqlens,
        )
        return self.W_O(y.flatten(2))
