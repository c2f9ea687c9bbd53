"""``import sisa_model.adapt``: SISA in a Hugging Face Llama (extra ``hf``), from ``interop``."""

from sisa_model.interop.adapted_llama import (
    SisaLlamaConfig,
    SisaLlamaForCausalLM,
    SisaLlamaModel,
    replace_attention,
)
from sisa_model.interop.llama import LlamaSisaAttention, SisaCacheLayer

__all__ = [
    "LlamaSisaAttention",
    "SisaCacheLayer",
    "SisaLlamaConfig",
    "SisaLlamaForCausalLM",
    "SisaLlamaModel",
    "replace_attention",
]
