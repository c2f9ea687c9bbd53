"""sisa generate: prompts continued by a trained model, as the text comes."""

import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from sisa_model.data.tokenizer import Encoder
from sisa_model.evaluation.subject import find_subject
from sisa_model.models.checkpoint import load
from sisa_model.models.generate import check_sampling, generate
from sisa_model.models.language_model import LanguageModel
from sisa_model.utils.machine import find_device

log = logging.getLogger(__name__)

Write = Callable[[str], object]
STDIN = "-"


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Continue a prompt with a model that `sisa train` or `sisa convert` made."""

    run: tyro.conf.Positional[Path]
    """Run folder of `sisa train`, even unfinished, or a folder of weights."""
    checkpoint: str = "newest"
    """Weights of a run: newest (the final ones of a finished one), or the step of a checkpoint."""
    tokenizer: str | None = None
    """For a folder of model weights: its tokenizer, a `tokenizers` JSON file or the word bytes."""
    prompt: str = ""
    """Text to continue; - reads it from the standard input. Default: the start of a document."""
    interactive: bool = False
    """Continue each line of the standard input, one after the other."""
    num_samples: int = 1
    """Continuations of each prompt; several are drawn together, and written once all are there."""
    max_new_tokens: int = 200
    """Tokens to add at most."""
    stop_at_end: bool = True
    """Stop where the model ends the document."""
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


def continue_prompt(config: GenerateConfig, write: Write) -> None:
    """Give ``write`` the prompt with its continuation, in pieces as they come, and a newline.

    Raises ValueError for settings that are bad or exclude each other, before the model is read, and
    as :func:`sisa_model.evaluation.subject.find_subject` and :func:`sisa_model.generate` do."""
    check_sampling(config.max_new_tokens, config.temperature, config.top_k, config.top_p)
    if config.num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {config.num_samples}")
    if config.interactive and config.prompt:
        raise ValueError(f"prompt must be left out with interactive, got {config.prompt!r}")
    device = find_device(config.device)
    subject = find_subject(config.run, config.tokenizer, config.checkpoint)
    model = load(subject.weights, device)
    if why := model.cache_refusal():
        log.warning(f"every token runs all before it again: {why}")
    generator = torch.Generator(device).manual_seed(config.seed)
    for prompt in _prompts(config, write):
        _continue(config, model, subject.encoder, prompt, generator, write)


def _prompts(config: GenerateConfig, write: Write) -> Iterator[str]:
    if not config.interactive:
        yield sys.stdin.read().removesuffix("\n") if config.prompt == STDIN else config.prompt
        return
    while True:
        if sys.stdin.isatty():
            write("> ")
        line = sys.stdin.readline()
        if not line:
            return
        yield line.removesuffix("\n")


def _continue(
    config: GenerateConfig,
    model: LanguageModel,
    encoder: Encoder,
    prompt: str,
    generator: torch.Generator,
    write: Write,
) -> None:
    ids = [encoder.end_of_text, *encoder.encode_text(prompt)]
    streams = [encoder.stream() for _ in range(config.num_samples)]
    ended = [False] * config.num_samples
    several = config.num_samples > 1
    texts = ["".join(map(stream.add, ids[1:])) for stream in streams]
    if not several:
        write(texts[0])

    def add(tokens: torch.Tensor) -> None:
        for number, token in enumerate(tokens.tolist()):
            ended[number] |= config.stop_at_end and token == encoder.end_of_text
            if ended[number]:
                continue
            text = streams[number].add(token)
            texts[number] += text
            if not several:
                write(text)

    generate(
        model,
        torch.tensor([ids] * config.num_samples, device=generator.device),
        config.max_new_tokens,
        config.temperature,
        model.cache_refusal() is None,
        top_k=config.top_k,
        top_p=config.top_p,
        generator=generator,
        stop=(encoder.end_of_text,) if config.stop_at_end else (),
        on_token=add,
    )
    if not several:
        write(streams[0].rest() + "\n")
        return
    for number, (text, stream) in enumerate(zip(texts, streams), 1):
        write(f"--- sample {number} of {config.num_samples}\n{text}{stream.rest()}\n")
