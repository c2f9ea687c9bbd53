"""Exact SISA attention: operators on tensors (``import sisa_kernels as sk``); ``python -m sisa_kernels`` checks this machine."""

from . import reference
from .attention import backends, sisa_attention
from .augment import augment_qk
from .version import __version__

__all__ = ["__version__", "augment_qk", "backends", "reference", "sisa_attention"]
