"""A stock Hugging Face Llama of the sizes of our Transformer, trained as a user of it would."""

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from sisa_model.models.config import ModelConfig
from sisa_model.models.language_model import LanguageModel, count_parameters
from sisa_model.models.presets import preset_config


def build(config: ModelConfig) -> Any:
    """The Llama with the sizes of ``config``, its output tied to its embedding."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.d_model,
            intermediate_size=config.d_ff,
            num_hidden_layers=config.n_layers,
            num_attention_heads=config.n_heads,
            num_key_value_heads=config.n_kv_heads,
            max_position_embeddings=config.max_seq_len,
            rms_norm_eps=1e-6,
            tie_word_embeddings=True,
        )
    )


def failure(preset: str) -> str | None:
    """Why a step beside ``preset``'s must not be timed: no transformers, or another model."""
    if importlib.util.find_spec("transformers") is None:
        return "skipped: transformers is not installed"
    config = preset_config(preset)
    with torch.device("meta"):
        theirs = count_parameters(build(config))
        ours = count_parameters(LanguageModel(config))
    return None if theirs == ours else f"wrong: {theirs:,} parameters, {preset} has {ours:,}"


def training_step(
    preset: str, batch: int, length: int, device: torch.device
) -> Callable[[], object]:
    """A step with the loss of its own, gradients clipped and torch's AdamW as it comes."""
    torch.manual_seed(0)
    model = build(preset_config(preset, max_seq_len=length)).to(device)
    ids = torch.randint(model.config.vocab_size, (batch, length), device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)

    def call() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return call
