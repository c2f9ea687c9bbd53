"""SISA's models and experiments on ``sisa_kernels``' operators (``import sisa_model as sm``).

A name is read from its file when it is first asked for: the command line lives in this package, and
answers ``sisa --help`` without torch."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
_FILES = {
    "SisaAttention": "models.sisa",
    "build": "models.language_model",
    "count_parameters": "models.language_model",
    "generate": "models.generate",
    "health": "models.health",
    "load": "models.checkpoint",
    "load_paper_checkpoint": "interop.authors",
    "presets": "models.presets",
    "save": "models.checkpoint",
}


def __getattr__(name: str) -> Any:
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_FILES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
