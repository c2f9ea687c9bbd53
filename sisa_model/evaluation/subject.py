"""The trained model that is evaluated or sampled: found in a folder, and variants of it."""

import copy
import dataclasses
from pathlib import Path
from typing import NamedTuple

import torch

from sisa_model.data.shards import TOKENIZER
from sisa_model.data.tokenizer import Encoder
from sisa_model.evaluation.scoring import ScoringPrecision
from sisa_model.models.checkpoint import CONFIG, load, read_config
from sisa_model.models.config import ModelConfig
from sisa_model.models.language_model import LanguageModel
from sisa_model.runs.folder import RECORD, read_run
from sisa_model.runs.weights import checkpoints, step_of, weights_by_step

PADDING = 128  # entries that a vocabulary may be filled up with beyond its tokenizer's


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

    ``checkpoint`` is newest or the step of one; of a run's weights, given by their own folder, the
    run is found. ``tokenizer`` is a file, or the word bytes; a
    folder that holds its own needs none, and is given none but the same. Raises FileNotFoundError
    or ValueError for a folder of another kind, and for a tokenizer that is missing or not the
    model's."""
    around = run.resolve().parent.parent
    if (run / RECORD).is_file():
        subject = _in_run(run, tokenizer, checkpoint)
    elif run.resolve() in checkpoints(around) and (around / RECORD).is_file():
        subject = _in_run(around, tokenizer, str(step_of(run)))
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
    train = read_run(run).train
    own = Encoder(train.tokenizer)
    _check_same(run, own, tokenizer)
    held = weights_by_step(run, train.steps)
    step = int(checkpoint) if checkpoint.isdecimal() else None
    if checkpoint == "newest":
        step = [*held][-1]
    if step not in held:
        steps = ", ".join(map(str, held))
        raise ValueError(f"checkpoint must be newest, all or one of {steps}, got {checkpoint}")
    model = read_config(held[step] / CONFIG)
    return Subject(held[step], model, own, step, train.seq_len)


def _in_weights(folder: Path, tokenizer: str | None, checkpoint: str) -> Subject:
    if checkpoint != "newest":
        raise ValueError(
            f"checkpoint must be left at newest for a folder of model weights, got {checkpoint}"
        )
    model = read_config(folder / CONFIG)
    own = folder / TOKENIZER
    if own.is_file():
        encoder = Encoder(own)
        _check_same(folder, encoder, tokenizer)
    elif tokenizer is None:
        raise ValueError(
            f"tokenizer must be given for {folder}, which holds none: a file, or bytes"
        )
    else:
        encoder = _named(tokenizer)
        if not 0 <= model.vocab_size - encoder.size < PADDING:
            raise ValueError(
                f"tokenizer must be the model's: {tokenizer} has {encoder.size} tokens, the model "
                f"in {folder} {model.vocab_size}"
            )
    return Subject(folder, model, encoder, None, model.max_seq_len)


def _named(tokenizer: str) -> Encoder:
    return Encoder(None if tokenizer == "bytes" else Path(tokenizer))


def _check_same(folder: Path, own: Encoder, tokenizer: str | None) -> None:
    if tokenizer is not None and not own.is_same(_named(tokenizer)):
        raise ValueError(
            f"tokenizer must be the one that {folder} holds, or be left out, got {tokenizer}"
        )


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


@torch.no_grad()
def load_in(precision: ScoringPrecision, weights: Path, device: torch.device) -> LanguageModel:
    """The model in the folder ``weights``, as it is scored in ``precision``.

    bf16-pure is what the authors evaluate: every weight in bf16, and what stays fp32 for the
    operators, lambda_raw say, rounded to bf16's values. Raises as
    :func:`sisa_model.models.checkpoint.load` does."""
    if precision != "bf16-pure":
        return load(weights, device, weights="fp32")
    model = load(weights, device, weights="bf16")
    for parameter in model.parameters():
        parameter.copy_(parameter.bfloat16())
    return model


def with_positions(model: LanguageModel, count: int) -> LanguageModel:
    """``model``, its weights shared, for sequences of up to ``count`` tokens.

    RoPE has no table to outgrow."""
    longer = copy.copy(model)
    longer.config = dataclasses.replace(model.config, max_seq_len=count)
    return longer
