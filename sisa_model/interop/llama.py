"""SISA's attention in a layer of Hugging Face's Llama, and its cache (extra ``hf``)."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb

import sisa_kernels as sk
from sisa_kernels.inputs import SisaInputs
from sisa_model.interop.padding import Layout, find_layout, real_tokens
from sisa_model.models.linear import Fp32Parameters, PackedLinear
from sisa_model.models.sisa import DECAY_BIAS_INIT, THETA_INIT_STD

OF_TOKENS = ("q", "k", "v", "b", "c", "log_decay", "theta")


class SisaCacheLayer(CacheLayerMixin):
    """A :class:`LlamaSisaAttention`'s tokens so far, as a layer of transformers' cache."""

    def __init__(self) -> None:
        super().__init__()
        self.held: sk.SisaCache | None = None
        self.seen = 0
        """Tokens of each row, padding among them."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the cache takes device and dtype from its first tokens."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        raise TypeError("this layer's attention was replaced: it holds more than keys and values")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.held = None
        self.seen = 0

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.held is not None:
            self.held.select(indices.tolist())

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.held is not None:
            self.batch_select_indices(
                torch.arange(len(self.held.lengths)).repeat_interleave(repeats)
            )

    def crop(self, tokens_to_remove: int) -> None:
        raise ValueError(
            "this cache cannot be cropped: the running phase before its last tokens is gone"
        )


class LlamaSisaAttention(Fp32Parameters):
    """A LlamaAttention with the importance term, on [B, L, D], for one that is there.

    q, k, v and the output keep the old projections, under their names, quantised ones too;
    ``importance`` makes b, c, the decay and theta, in ``dtype``. RoPE is Llama's own, of whatever
    type. ``lambda_raw`` (lambda = softplus(lambda_raw)) stays fp32."""

    fp32 = ("lambda_raw",)

    def __init__(self, old: LlamaAttention, d_state: int, lam: float, dtype: torch.dtype):
        super().__init__()
        H = old.q_proj.out_features // old.head_dim
        G = old.k_proj.out_features // old.head_dim
        self.layer_idx = old.layer_idx
        self.head_dim = old.head_dim
        self.d_state = d_state
        self.n_kv_heads = G
        self.q_proj = old.q_proj
        self.k_proj = old.k_proj
        self.v_proj = old.v_proj
        self.o_proj = old.o_proj
        like: Any = {"device": old.q_proj.weight.device, "dtype": dtype}
        sizes = {
            "W_B": G * d_state,
            "W_C": H * d_state,
            "W_alpha": G,
            "W_theta": G * d_state // 2,
        }
        self.importance = PackedLinear(old.q_proj.in_features, sizes, **like)
        self.importance.register_load_state_dict_pre_hook(_split_packed_weight)
        self.decay_bias = nn.Parameter(torch.empty(G, **like))
        self.lambda_raw = nn.Parameter(torch.empty(H, device=like["device"], dtype=torch.float32))
        for projection in self.importance.children():
            # Its values are drawn over; those drawn after it depend on how many were.
            projection.reset_parameters()  # type: ignore[operator]
        self.importance.reset_parameters(old.config.initializer_range)
        self.reset_own_parameters(lam)

    def reset_own_parameters(self, lam: float) -> None:
        """The initial lambda, decay and theta; the other projections are drawn as Llama's are."""
        raw = lam + math.log(-math.expm1(-lam))  # softplus's inverse
        nn.init.constant_(self.lambda_raw, raw)
        nn.init.constant_(self.decay_bias, DECAY_BIAS_INIT)
        nn.init.normal_(self.importance.get_parameter("W_theta.weight"), std=THETA_INIT_STD)

    def lam(self) -> Tensor:
        """lambda of each head, [H] fp32, > 0."""
        return F.softplus(self.lambda_raw)

    def operands(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor]
    ) -> SisaInputs:
        """What :func:`sisa_kernels.sisa_attention` attends with, q and k turned by Llama's RoPE."""
        q, k, v = (
            projection(hidden_states).unflatten(-1, (-1, self.head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        # Under autocast the tables are fp32, and what they turn would be.
        q, k = (
            t.to(v.dtype) for t in apply_rotary_pos_emb(q, k, *position_embeddings, unsqueeze_dim=2)
        )
        b, c, alpha, theta = self.importance(hidden_states)
        log_decay = -F.softplus(alpha.float() + self.decay_bias.float())
        b, c = (t.unflatten(-1, (-1, self.d_state)) for t in (b, c))
        theta = theta.float().unflatten(-1, (self.n_kv_heads, -1))
        return SisaInputs(q, k, v, b, c, log_decay, theta, self.lam())

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        operands = self.operands(hidden_states, position_embeddings)._asdict()
        layer = self._cache_layer(cache)
        padding = llama_padding(attention_mask, layer.seen if layer is not None else 0)
        if padding is not None:
            operands |= {name: padding.pack(operands[name]) for name in OF_TOKENS}
        if layer is None:
            y = sk.sisa_attention(**operands)
        else:
            del operands["cu_seqlens"]
            layer.held = layer.held or sk.SisaCache(len(hidden_states))
            lengths = padding.lengths if padding is not None else None
            y = sk.sisa_decode(**operands, cache=layer.held, lengths=lengths)
            layer.seen += hidden_states.shape[1]
        y = padding.unpack(y) if padding is not None else y
        return self.o_proj(y.flatten(2)), None

    def _cache_layer(self, cache: Cache | None) -> SisaCacheLayer | None:
        """This layer's place in transformers' cache, taken on the first call."""
        if cache is None:
            return None
        index = self.layer_idx
        if index == len(cache.layers):
            cache.layers.append(SisaCacheLayer())
        layer = cache.layers[index]
        if not isinstance(layer, SisaCacheLayer):
            if cache.get_seq_length(index):
                raise ValueError(
                    f"cache already holds tokens of layer {index} without their importance"
                )
            cache.layers[index] = layer = SisaCacheLayer()
        return layer


def _split_packed_weight(
    importance: PackedLinear, state_dict: dict[str, Tensor], prefix: str, *args: Any
) -> None:
    """Before loading: split ``importance.weight``, as version 0.1.0 saved it, by rows."""
    packed = state_dict.get(f"{prefix}weight")
    heights = list(importance.sizes.values())
    if packed is None or len(packed) != sum(heights):
        return  # load_state_dict says what is wrong with it
    del state_dict[f"{prefix}weight"]
    for name, rows in zip(importance.sizes, packed.split(heights)):
        state_dict[f"{prefix}{name}.weight"] = rows.clone()  # no two may share memory


def llama_padding(mask: Tensor | None, seen: int) -> Layout | None:
    """The padding among T new tokens behind ``seen`` others, from the mask of Llama's layers.

    That is None, or [B, 1, T, seen + T], bool or to be added to the scores. Raises ValueError for
    one that is more than causal with padding (packed documents, say), or that pads behind a cache.
    """
    if mask is None:
        return None
    sees = (mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2)[
        :, 0, :, seen:
    ]
    real = sees[:, -1]  # a last place that is padding on the right sees all real tokens, too
    expected = torch.ones_like(sees).tril() & real[:, None]
    # A place with no real token up to it sees, in their masks, nothing or, lest its softmax be NaN,
    # everything.
    idle = ~expected.any(-1) & (sees.all(-1) | ~sees.any(-1))
    if not (idle | (sees == expected).all(-1)).all():
        raise ValueError(
            "attention_mask must be causal with padding: "
            "SISA's running decay and phase know no other"
        )
    seen_too = F.pad(real, (seen, 0), value=True)
    return find_layout(real_tokens(seen_too, len(real), seen, real.shape[1]), None)
