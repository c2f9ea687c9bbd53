"""Exact SISA attention: operators on tensors (``import sisa_kernels as sk``); ``python -m sisa_kernels`` checks this machine."""

from . import reference
from .attention import backends, sisa_attention
from .augment import augment_qk
from .cache import TokenCache
from .decode import SisaCache, sisa_decode
from .version import __version__

__all__ = ["SisaCache", "TokenCache", "__version__", "augment_qk", "backends", "reference", "sisa_attention", "sisa_decode"]
