"""``import sisa_model.hf``: the models in Hugging Face transformers (extra ``hf``); they live in
``sisa_model.interop``.
"""

from sisa_model.interop.transformers import DecodingCache, SisaConfig, SisaForCausalLM

__all__ = ["DecodingCache", "SisaConfig", "SisaForCausalLM"]
