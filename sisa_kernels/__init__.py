"""Exact SISA attention: operators on tensors (``import sisa_kernels as sk``); ``python -m sisa_kernels`` checks this machine."""

from . import reference
from .attention import backends, sisa_attention
from .augment import augment_qk
from .cache import TokenCache
from .decode import SisaCache, sisa_decode
from .forgetting import alibi_slopes, forgetting_attention, forgetting_decode
from .version import __version__

__all__ = [
    "SisaCache",
    "TokenCache",
    "__version__",
    "alibi_slopes",
    "augment_qk",
    "backends",
    "forgetting_attention",
    "forgetting_decode",
    "reference",
    "sisa_attention",
    "sisa_decode",
]
