"""Exact SISA attention: operators on tensors (``import sisa_kernels as sk``).

What lives here takes tensors and returns tensors: no ``nn.Module``, no configuration, nothing of
``sisa_model``. ``python -m sisa_kernels`` checks this machine."""

from sisa_kernels import reference
from sisa_kernels.attention import backends, sisa_attention
from sisa_kernels.cache import TokenCache
from sisa_kernels.decode import SisaCache, sisa_decode
from sisa_kernels.distributed.layout import SequenceLayout
from sisa_kernels.forgetting import alibi_slopes, forgetting_attention, forgetting_decode
from sisa_kernels.paths.augment import augment_qk
from sisa_kernels.plain import causal_attention
from sisa_kernels.version import __version__

__all__ = [
    "SequenceLayout",
    "SisaCache",
    "TokenCache",
    "__version__",
    "alibi_slopes",
    "augment_qk",
    "backends",
    "causal_attention",
    "forgetting_attention",
    "forgetting_decode",
    "reference",
    "sisa_attention",
    "sisa_decode",
]
