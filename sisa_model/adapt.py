"""``import sisa_model.adapt``: SISA in a Hugging Face Llama (extra ``hf``); it lives in
``sisa_model.interop``.
"""

from sisa_model.interop.llama import LlamaSisaAttention, SisaCacheLayer, replace_attention

__all__ = ["LlamaSisaAttention", "SisaCacheLayer", "replace_attention"]
