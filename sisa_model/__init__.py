"""SISA's models and experiments on ``sisa_kernels``' operators (``import sisa_model as sm``)."""

from sisa_model.interop.authors import load_paper_checkpoint
from sisa_model.models.checkpoint import load, save
from sisa_model.models.generate import generate
from sisa_model.models.health import health
from sisa_model.models.language_model import build, count_parameters
from sisa_model.models.presets import presets
from sisa_model.models.sisa import SisaAttention

__all__ = [
    "SisaAttention",
    "build",
    "count_parameters",
    "generate",
    "health",
    "load",
    "load_paper_checkpoint",
    "presets",
    "save",
]
