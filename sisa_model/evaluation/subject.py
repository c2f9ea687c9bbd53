"""A trained model to evaluate or sample: found in a folder, without its importance term, with more
positions.
"""

import copy
import dataclasses
from pathlib import Path
from typing import NamedTuple

import torch

from sisa_model.data.tokenizer import Encoder
from sisa_model.models.checkpoint import CONFIG, read_config
from sisa_model.models.config import ModelConfig
from sisa_model.models.language_model import LanguageModel
from sisa_model.runs.folder import read_run, weights_by_step


class Subject(NamedTuple):
    """A trained model: what is evaluated or sampled."""

    weights: Path
    model: ModelConfig
    encoder: Encoder
    step: int | None
    """Training steps done; None: unknown."""
    trained: int
    """Tokens a training sequence."""


def find_subject(run: Path, tokenizer: str | None = None, checkpoint: str = "newest") -> Subject:
    """The model in ``run`` and its tokenizer, the weights not yet read.

    ``checkpoint`` is newest or the step of one. A folder of model weights needs ``tokenizer``: a
    file, or the word bytes. Raises FileNotFoundError or ValueError for a folder of another kind,
    and for a tokenizer that is missing or not the model's."""
    if (run / "run.json").is_file():
        if tokenizer is not None:
            raise ValueError(
                f"tokenizer must be left out for a run folder, which knows its own, got {tokenizer}"
            )
        record = read_run(run)["train"]
        held = weights_by_step(run, record.steps)
        step = [*held][-1] if checkpoint == "newest" else int(checkpoint)
        if step not in held:
            raise ValueError(
                f"checkpoint must be newest, all or one of {', '.join(map(str, held))}, got {checkpoint}"
            )
        weights = held[step]
        model, encoder, trained = (
            read_config(weights / CONFIG),
            Encoder(record.tokenizer),
            record.seq_len,
        )
    elif (run / CONFIG).is_file():
        if tokenizer is None:
            raise ValueError(
                f"tokenizer must be given for a folder of model weights: a file, or bytes ({run})"
            )
        if checkpoint != "newest":
            raise ValueError(
                f"checkpoint must be left at newest for a folder of model weights, got {checkpoint}"
            )
        model, weights, step = read_config(run / CONFIG), run, None
        encoder, trained = (
            Encoder(None if tokenizer == "bytes" else Path(tokenizer)),
            model.max_seq_len,
        )
    else:
        raise FileNotFoundError(
            f"run must be a run folder of sisa train or a folder of model weights, got {run}"
        )
    if encoder.size > model.vocab_size:
        raise ValueError(
            f"tokenizer must be the model's: it has {encoder.size} tokens, the model in {weights} {model.vocab_size}"
        )
    return Subject(weights, model, encoder, step, trained)


def without_importance(model: LanguageModel) -> LanguageModel:
    """``model`` with lambda = 0: its weights in the control that has no importance term. ValueError
    for one that has none.
    """
    if model.config.family != "sisa" or model.config.lam == "zero":
        raise ValueError("lam_zero needs a model with an importance term, and this one has none")
    config = dataclasses.replace(model.config, lam="zero", mode="exact", backend="auto")
    with torch.device("meta"):
        plain = LanguageModel(config)
    plain.to_empty(device=model.embed.weight.device)
    state = model.state_dict()
    plain.load_state_dict({name: state[name] for name in plain.state_dict()})
    return plain


def with_positions(model: LanguageModel, count: int) -> LanguageModel:
    """``model``, its weights shared, for sequences of up to ``count`` tokens: RoPE has no table to
    outgrow.
    """
    longer = copy.copy(model)
    longer.config = dataclasses.replace(model.config, max_seq_len=count)
    return longer
