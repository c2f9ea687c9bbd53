"""``import sisa_model.hf``: Hugging Face transformers' classes (extra ``hf``), from ``interop``."""

from sisa_model.interop.transformers import DecodingCache, SisaConfig, SisaForCausalLM

__all__ = ["DecodingCache", "SisaConfig", "SisaForCausalLM"]
