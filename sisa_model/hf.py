"""``import sisa_model.hf``: Hugging Face transformers' classes (extra ``hf``), from ``interop``."""

from sisa_model.interop.transformers import (
    DecodingCache,
    SisaConfig,
    SisaForCausalLM,
    SisaModel,
)
from sisa_model.models.groups import parameter_groups

__all__ = ["DecodingCache", "SisaConfig", "SisaForCausalLM", "SisaModel", "parameter_groups"]
