"""The authors' formulation, op by op, from the paper's Proposition 1: the rival that every bench
times beside ours.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

import sisa_model as sm
from sisa_kernels.checks import Rotary
from sisa_kernels.rotation import CLAMP, rotate
from sisa_model.models.context import Context
from sisa_model.models.language_model import LanguageModel
from sisa_model.models.sisa import SisaAttention


def eager_chain(
    q, k, b, c, log_decay, theta, lam, cos, sin, clamp: float = CLAMP
) -> tuple[Tensor, Tensor]:
    """Augmented q and k under autograd, scans, rotations and concatenation in fp32, results in q's
    dtype.
    """
    dtype = q.dtype
    q, k, b, c = (x.float() for x in (q, k, b, c))
    q, k = rotate(q, cos[:, None], sin[:, None]), rotate(k, cos[:, None], sin[:, None])
    g = log_decay.cumsum(1)
    middle = ((g.amax(1, keepdim=True) + g.amin(1, keepdim=True)) / 2).detach()
    x = (g - middle).clamp(-clamp, clamp)[..., None]
    phase = theta.cumsum(1)
    s = (q.shape[3] ** 0.25 * lam.sqrt())[:, None]
    c = s * x.exp() * rotate(c, phase.cos(), phase.sin())
    b = s * (-x).exp() * rotate(b, phase.cos(), phase.sin())
    return torch.cat((q, c), -1).to(dtype), torch.cat((k, b), -1).to(dtype)


def sdpa(q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, **options).transpose(1, 2)


def attention(q, k, v, b, c, log_decay, theta, lam, rotary: Rotary, clamp: float = CLAMP) -> Tensor:
    """The chain, then stock attention with v as narrow as it is, by whichever kernel SDPA picks for
    d_qk != d_v.
    """
    q_aug, k_aug = eager_chain(q, k, b, c, log_decay, theta, lam, *rotary, clamp)
    return sdpa(q_aug, k_aug, v, scale=q.shape[3] ** -0.5)


class Attention(SisaAttention):
    """SISA's layer with the authors' attention in place of ours."""

    def forward(self, x: Tensor, context: Context, cache: None = None) -> Tensor:
        return self.W_O(attention(*self.operands(x), self.lam(), context.rotary).flatten(2))


def ours(preset: str) -> str:
    """The preset that "authors-152m-ds16" is theirs of: sisa-152m-ds16."""
    return preset.replace("authors-", "sisa-")


def build(preset: str, **overrides) -> LanguageModel:
    """:func:`sisa_model.build`, which also knows "authors-...": SISA's models on the authors'
    attention.
    """
    model = sm.build(ours(preset), **overrides)
    if preset != ours(preset):
        for layer in model.layers:
            layer.attn.__class__ = Attention
    return model
