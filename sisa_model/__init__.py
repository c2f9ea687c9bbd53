"""SISA's models and experiments, on the operators of ``sisa_kernels`` (``import sisa_model as sm``)."""

from .checkpoint import load, save
from .generate import generate
from .model import build, count_parameters
from .paper_checkpoint import load_paper_checkpoint
from .presets import presets
from .sisa import SisaAttention, health

__all__ = ["SisaAttention", "build", "count_parameters", "generate", "health", "load", "load_paper_checkpoint", "presets", "save"]
