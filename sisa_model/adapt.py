"""``import sisa_model.adapt``: SISA in a Hugging Face Llama (extra ``hf``), from ``interop``."""

from sisa_model.interop.llama import LlamaSisaAttention, SisaCacheLayer, replace_attention

__all__ = ["LlamaSisaAttention", "SisaCacheLayer", "replace_attention"]
