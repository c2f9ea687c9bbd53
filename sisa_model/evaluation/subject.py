"""The trained model that is evaluated or sampled: found in a folder, and variants of it."""

import copy
import dataclasses
from pathlib import Path
from typing import NamedTuple

import torch

from sisa_model.data.tokenizer import Encoder
from sisa_model.models.checkpoint import CONFIG, read_config
from sisa_model.models.config import ModelConfig
from sisa_model.models.language_model import LanguageModel
from sisa_model.runs.folder import RECORD, read_run, weights_by_step


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
    if (run / RECORD).is_file():
        subject = _in_run(run, tokenizer, checkpoint)
    elif (run / CONFIG).is_file():
        subject = _in_weights(run, tokenizer, checkpoint)
    else:
        raise FileNotFoundError(
            f"run must be a run folder of sisa train or a folder of model weights, got {run}"
        )
    size = subject.encoder.size
    room = subject.model.vocab_size
    if size > room:
        raise ValueError(
            f"tokenizer must be the model's: it has {size} tokens, "
            f"the model in {subject.weights} {room}"
        )
    return subject


def _in_run(run: Path, tokenizer: str | None, checkpoint: str) -> Subject:
    if tokenizer is not None:
        raise ValueError(
            f"tokenizer must be left out for a run folder, which knows its own, got {tokenizer}"
        )
    train = read_run(run).train
    held = weights_by_step(run, train.steps)
    step = [*held][-1] if checkpoint == "newest" else int(checkpoint)
    if step not in held:
        steps = ", ".join(map(str, held))
        raise ValueError(f"checkpoint must be newest, all or one of {steps}, got {checkpoint}")
    model = read_config(held[step] / CONFIG)
    return Subject(held[step], model, Encoder(train.tokenizer), step, train.seq_len)


def _in_weights(folder: Path, tokenizer: str | None, checkpoint: str) -> Subject:
    if tokenizer is None:
        raise ValueError(
            f"tokenizer must be given for a folder of model weights: a file, or bytes ({folder})"
        )
    if checkpoint != "newest":
        raise ValueError(
            f"checkpoint must be left at newest for a folder of model weights, got {checkpoint}"
        )
    model = read_config(folder / CONFIG)
    encoder = Encoder(None if tokenizer == "bytes" else Path(tokenizer))
    return Subject(folder, model, encoder, None, model.max_seq_len)


def without_importance(model: LanguageModel) -> LanguageModel:
    """``model``'s weights in the control that has no importance term (lambda = 0).

    Raises ValueError for a model that has none."""
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
    """``model``, its weights shared, for sequences of up to ``count`` tokens.

    RoPE has no table to outgrow."""
    longer = copy.copy(model)
    longer.config = dataclasses.replace(model.config, max_seq_len=count)
    return longer
