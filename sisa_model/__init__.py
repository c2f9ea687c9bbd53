"""SISA's models and experiments, on the operators of ``sisa_kernels`` (``import sisa_model as sm``)."""

from .model import build, count_parameters
from .presets import presets
from .sisa import health

__all__ = ["build", "count_parameters", "health", "presets"]
