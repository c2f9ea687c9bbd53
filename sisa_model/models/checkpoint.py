"""Saving and loading: a folder of config.json and model.safetensors."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sisa_model.models.config import ModelConfig
from sisa_model.models.dcp import INDEX, read_tensors
from sisa_model.models.language_model import LanguageModel
from sisa_model.utils.files import write_atomically, write_json

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
MODEL_TYPE = "sisa"  # what transformers' Auto classes know the models by (sisa_model.hf)


def save(model: LanguageModel, folder: str | Path) -> None:
    """Write ``config.json`` and ``model.safetensors`` into ``folder``, made if need be.

    Each file is written aside and renamed; transformers reads the folder too
    (:mod:`sisa_model.hf`). Raises OSError (a full disk, say) with any earlier files still whole.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # Clones: of weights that share memory (tied layers, say) the file holds each by itself.
    state = {
        name: x.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, x in model.state_dict().items()
    }
    try:
        write_atomically(
            folder / WEIGHTS, lambda aside: save_file(state, aside, metadata={"format": "pt"})
        )
    except SafetensorError as error:
        raise OSError(f"cannot write {folder / WEIGHTS}: {error}") from error
    named = {"model_type": MODEL_TYPE, "architectures": ["SisaForCausalLM"]}
    write_json(folder / CONFIG, named | dataclasses.asdict(model.config))


def load(folder: str | Path, device: str | torch.device = "cpu", **overrides: Any) -> LanguageModel:
    """The model in ``folder``, in fp32.

    :func:`save`, transformers' ``save_pretrained`` or a run's checkpoint left it there.
    ``overrides`` change fields that do not change the weights' shapes (mode, backend, max_seq_len).
    Raises FileNotFoundError if a file is missing and ValueError for one that is truncated, foreign,
    or of another model."""
    folder = Path(folder)
    config = read_config(folder / CONFIG, **overrides)
    with torch.device("meta"):
        model = LanguageModel(config)
    model.to_empty(device=device)
    load_state(model, folder)
    return model


def load_state(model: LanguageModel, folder: Path) -> None:
    """Copy ``folder``'s weights into ``model``.

    Raises FileNotFoundError, or ValueError for a damaged file or naming the first tensors that are
    missing, unknown or of another shape."""
    weights = folder / WEIGHTS
    if (folder / INDEX).is_file():
        read_tensors(folder, {f"model.{name}": p.detach() for name, p in model.named_parameters()})
        return
    if not weights.is_file():
        raise FileNotFoundError(f"no weights at {weights}")
    try:
        state = load_file(weights)
    except SafetensorError as error:
        raise ValueError(f"{weights} is truncated or not a safetensors file: {error}") from error
    copy_state(model, state, weights)


def copy_state(model: LanguageModel, state: dict[str, Tensor], source: str | Path) -> None:
    """Copy all of ``state``, from ``source``, into ``model``; raises as :func:`load_state` does."""
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reasons = "; ".join(line.strip() for line in str(error).splitlines()[1:4])
        raise ValueError(
            f"{source} does not hold this {model.config.family} model: {reasons}"
        ) from error


def read_config(path: Path, **overrides: Any) -> ModelConfig:
    """The ModelConfig in a JSON file; FileNotFoundError or ValueError naming the file."""
    if not path.is_file():
        raise FileNotFoundError(f"no model configuration at {path}")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        if fields.pop("model_type", MODEL_TYPE) != MODEL_TYPE:
            raise ValueError("its model_type is not 'sisa'")
        fields.pop("architectures", None)
        if "transformers_version" in fields:  # save_pretrained adds settings of its own
            known = ModelConfig.__dataclass_fields__
            fields = {name: value for name, value in fields.items() if name in known}
        return ModelConfig(**{**fields, **overrides})
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a model configuration of this package: {error}") from error
