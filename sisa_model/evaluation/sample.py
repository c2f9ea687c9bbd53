"""sisa generate: a prompt continued by a trained model."""

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from sisa_model.evaluation.subject import find_subject
from sisa_model.models.checkpoint import load
from sisa_model.models.generate import check_sampling, generate
from sisa_model.utils.machine import find_device

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Continue a prompt with a model that `sisa train` or `sisa convert` made."""

    run: tyro.conf.Positional[Path]
    """Run folder of `sisa train`, even unfinished, or with --tokenizer a folder of weights."""
    tokenizer: str | None = None
    """For a folder of model weights: its tokenizer, a `tokenizers` JSON file or the word bytes."""
    prompt: str = ""
    """Text to continue. Default: the start of a document."""
    max_new_tokens: int = 200
    """Tokens to add."""
    temperature: float = 0.8
    """Sampling temperature; 0 takes the likeliest token every time."""
    top_k: int | None = None
    """Sample among the k likeliest tokens only."""
    top_p: float = 1.0
    """Sample among the likeliest tokens that together reach this probability only."""
    seed: int = 0
    """Seed of the sampling."""
    device: str = "auto"
    """cpu, cuda, cuda:1 ...; auto: a GPU if there is one."""


def continue_prompt(config: GenerateConfig) -> str:
    """The prompt with its continuation.

    Raises as :func:`sisa_model.evaluation.subject.find_subject` and :func:`sisa_model.generate` do,
    for bad settings before the model is read."""
    check_sampling(config.max_new_tokens, config.temperature, config.top_k, config.top_p)
    device = find_device(config.device)
    subject = find_subject(config.run, config.tokenizer)
    encoder = subject.encoder
    model = load(subject.weights, device)
    prompt = encoder.encode_text(config.prompt)
    ids = torch.tensor([[encoder.end_of_text, *prompt]], device=device)
    if why := model.cache_refusal():
        log.warning(f"every token runs all before it again: {why}")
    out = generate(
        model,
        ids,
        config.max_new_tokens,
        config.temperature,
        why is None,
        top_k=config.top_k,
        top_p=config.top_p,
        generator=torch.Generator(device).manual_seed(config.seed),
    )
    return encoder.decode(out[0, 1:].tolist())
