"""Saving and loading: a folder of config.json and model.safetensors."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sisa_model.models.config import ModelConfig
from sisa_model.models.dcp import INDEX, read_tensors
from sisa_model.models.language_model import LanguageModel
from sisa_model.utils.files import write_atomically, write_json, write_text

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
SHARDS = "model.safetensors.index.json"  # of weights in several files, by transformers
PREFIX = "model."  # of names in transformers, where the embedding is HEAD, too
HEAD = "lm_head.weight"
EMBEDDING = "embed.weight"
MODEL_TYPE = "sisa"  # what transformers' Auto classes know the models by (sisa_model.hf)
# A folder's code, by which transformers finds the classes where nobody imported CODE_MODULE.
CODE_FILE = "modeling_sisa.py"
CODE_MODULE = "sisa_model.hf"
CODE_CLASSES = {
    "AutoConfig": "SisaConfig",
    "AutoModel": "SisaModel",
    "AutoModelForCausalLM": "SisaForCausalLM",
}
CODE = '''"""The model's classes, which the package sisa-attention holds."""

try:
    from {module} import {names}
except ImportError as error:
    raise ImportError(
        f"this model needs the package sisa-attention: pip install 'sisa-attention[hf]' ({{error}})"
    ) from error
'''
# What config.json holds beside ModelConfig's fields.
FOR_TRANSFORMERS = ("model_type", "architectures", "auto_map")


class Saveable(Protocol):
    """A tokenizer: one of transformers', or a run's."""

    def save_pretrained(self, folder: Any, /) -> Any: ...


def save(model: LanguageModel, folder: str | Path, tokenizer: Saveable | None = None) -> None:
    """Write ``config.json`` and ``model.safetensors`` into ``folder``, made if need be.

    And ``tokenizer``, where it is given. Each file is written aside and renamed; transformers reads
    the folder too (:mod:`sisa_model.hf`), by the code that is written beside them where nobody
    imported that. Raises TypeError for another library's model, and OSError (a full disk, say) with
    any earlier files still whole."""
    if not isinstance(model.config, ModelConfig):
        raise TypeError(
            f"model must be a LanguageModel, got {type(model).__name__}: call its save_pretrained"
        )
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
    write_code(folder, CODE_MODULE, CODE_CLASSES)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    named = {
        "model_type": MODEL_TYPE,
        "architectures": [CODE_CLASSES["AutoModelForCausalLM"]],
        "auto_map": code_map(CODE_CLASSES),
    }
    write_json(folder / CONFIG, named | dataclasses.asdict(model.config))


def code_map(classes: dict[str, str]) -> dict[str, str]:
    """config.json's ``auto_map``: in what file of the folder each Auto class finds its class."""
    return {auto: f"{Path(CODE_FILE).stem}.{name}" for auto, name in classes.items()}


def write_code(folder: Path, module: str, classes: dict[str, str]) -> None:
    """Write the code that :func:`code_map` names, which imports ``classes`` from ``module``."""
    names = ", ".join(sorted(classes.values()))
    write_text(folder / CODE_FILE, CODE.format(module=module, names=names))


def load(folder: str | Path, device: str | torch.device = "cpu", **overrides: Any) -> LanguageModel:
    """The model in ``folder``, in the dtype that its ``weights`` say: fp32, or bf16.

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
    if (folder / INDEX).is_file():
        read_tensors(folder, {f"model.{name}": p.detach() for name, p in model.named_parameters()})
        return
    state: dict[str, Tensor] = {}
    for weights in _weight_files(folder):
        if not weights.is_file():
            raise FileNotFoundError(f"no weights at {weights}")
        try:
            state |= load_file(weights)
        except SafetensorError as error:
            raise ValueError(
                f"{weights} is truncated or not a safetensors file: {error}"
            ) from error
    copy_state(model, _own_names(state), folder)


def _weight_files(folder: Path) -> list[Path]:
    """The files of ``folder`` that hold its weights: one, or the shards that its index names."""
    index = folder / SHARDS
    if (folder / WEIGHTS).is_file() or not index.is_file():
        return [folder / WEIGHTS]
    try:
        shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return [folder / Path(shard).name for shard in sorted(set(shards))]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{index} is not an index of shards: {error!r}") from error


def with_prefix(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """``state`` by the names of the model in transformers, where it has LanguageModel's."""
    if any(name.startswith((PREFIX, HEAD)) for name in state):
        return state
    theirs = {f"{PREFIX}{name}": x for name, x in state.items()}
    return {**theirs, HEAD: state[EMBEDDING]} if EMBEDDING in state else theirs


def _own_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """``state`` by LanguageModel's names, where it has those of the model in transformers.

    There the names begin with "model.", and the embedding is the tied "lm_head.weight", too."""
    if not any(name.startswith(PREFIX) for name in state):
        return state
    own = {name.removeprefix(PREFIX): x for name, x in state.items() if name != HEAD}
    return {EMBEDDING: state[HEAD], **own} if HEAD in state else own


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
        if fields.get("model_type", MODEL_TYPE) != MODEL_TYPE:
            raise ValueError("its model_type is not 'sisa'")
        if not fields.get("tie_word_embeddings", True):
            raise ValueError("its output matrix is not the embedding; sisa_model.hf reads it")
        for name in FOR_TRANSFORMERS:
            fields.pop(name, None)
        if "transformers_version" in fields:  # save_pretrained adds settings of its own
            known = ModelConfig.__dataclass_fields__
            fields = {name: value for name, value in fields.items() if name in known}
        return ModelConfig(**{**fields, **overrides})
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a model configuration of this package: {error}") from error
