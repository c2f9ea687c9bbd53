"""The authors' formulation, op by op (Proposition 1): the rival that every bench times."""

import torch
import torch.nn.functional as F
from torch import Tensor

import sisa_model as sm
from sisa_kernels.inputs import SisaInputs
from sisa_kernels.rotation import CLAMP, rotate
from sisa_model.models.context import Context
from sisa_model.models.language_model import LanguageModel
from sisa_model.models.sisa import SisaAttention


def eager_chain(x: SisaInputs, clamp: float = CLAMP) -> tuple[Tensor, Tensor]:
    """Augmented q and k [B, L, H, Dh + Ds] under autograd, in q's dtype.

    Scans, rotations and concatenation are in fp32; a key head for each query head.
    """
    q, k, b, c = (t.float() for t in (x.q, x.k, x.b, x.c))
    cos, sin = (table[:, None] for table in x.rotary)
    q = rotate(q, cos, sin)
    k = rotate(k, cos, sin)
    g = x.log_decay.cumsum(1)
    middle = (g.amax(1, keepdim=True) + g.amin(1, keepdim=True)) / 2
    exponent = (g - middle).clamp(-clamp, clamp)[..., None]
    phase = x.theta.cumsum(1)
    weight = (q.shape[3] ** 0.25 * x.lam.sqrt())[:, None]
    c = weight * exponent.exp() * rotate(c, phase.cos(), phase.sin())
    b = weight * (-exponent).exp() * rotate(b, phase.cos(), phase.sin())
    return torch.cat((q, c), -1).to(x.q.dtype), torch.cat((k, b), -1).to(x.q.dtype)


def sdpa(q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
    """Causal stock attention of [B, L, H, ...]."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, **options).transpose(1, 2)


def attention(x: SisaInputs, clamp: float = CLAMP) -> Tensor:
    """The chain, then stock attention with v as narrow as it is, by whichever kernel SDPA picks."""
    q_aug, k_aug = eager_chain(x, clamp)
    return sdpa(q_aug, k_aug, x.v, scale=x.q.shape[3] ** -0.5)


class Attention(SisaAttention):
    """SISA's layer with the authors' attention in place of ours."""

    def forward(self, x: Tensor, context: Context, cache: None = None) -> Tensor:
        inputs = self.operands(x, context)
        return self.W_O(attention(inputs).flatten(2))


def is_theirs(name: str) -> bool:
    """Whether a model is SISA's on the authors' attention, such as "authors-152m-ds16"."""
    return name.startswith("authors-")


STOCK = "stock-"  # before a preset: on PyTorch's own attention


def ours(name: str) -> str:
    """The preset of a model: sisa-152m-ds16 of "authors-152m-ds16", X of "stock-X"."""
    return name.removeprefix(STOCK).replace("authors-", "sisa-")


def build(name: str, **overrides) -> LanguageModel:
    """:func:`sisa_model.build`, which also knows models on the authors' or on stock attention."""
    if name.startswith(STOCK):
        overrides["backend"] = "sdpa"
    model = sm.build(ours(name), **overrides)
    if is_theirs(name):
        for layer in model.layers:
            layer.attn.__class__ = Attention
    return model
