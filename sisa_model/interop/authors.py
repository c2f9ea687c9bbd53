"""The checkpoints that the paper's authors released, as models of this package."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sisa_kernels.inputs import MODES, Mode
from sisa_model.models.language_model import LanguageModel
from sisa_model.models.presets import PRESETS, preset_config

FAMILIES = ("sisa", "transformer")  # whose files are read
COMPILED = "_orig_mod."  # what torch.compile puts before every name
# Of a layer, our name -> theirs. Both keep the rows of a projection by head: row h * n + e is
# channel e of head h.
LAYER = {
    **{
        f"attn.proj.{name}.weight": f"{name}.weight" for name in ("W_Q", "W_K", "W_V", "W_B", "W_C")
    },
    "attn.proj.W_alpha.weight": "alpha_proj.weight",
    "attn.decay_bias": "alpha_proj.bias",
    "attn.proj.W_theta.weight": "theta_proj.weight",
    "attn.lambda_raw": "lambda_raw",
    "attn.W_O.weight": "W_O.weight",
    **{f"ffn.w_in.{name}.weight": f"ffn.{name}.weight" for name in ("w_gate", "w_up")},
}


def _their_name(name: str) -> str:
    """The authors' name of a tensor in our state dict."""
    if not name.startswith("layers."):
        return name
    layers, number, rest = name.split(".", 2)
    return f"{layers}.{number}.{LAYER.get(rest, rest)}"


def load_paper_checkpoint(
    path: str | Path,
    preset: str,
    mode: Mode = "clamped",
    device: str | torch.device = "cpu",
    **overrides: Any,
) -> LanguageModel:
    """The SISA model or Transformer in a file of the paper's authors, in fp32 on ``device``.

    Args:
        path: what their ``torch.save`` wrote: a dictionary whose "model" is a state dict, of a
            compiled model or not. It is read with ``weights_only``: no code in it is run.
        preset: the model it holds (:func:`sisa_model.presets`); ``overrides`` are fields of
            its configuration. A Transformer's number of heads is taken on trust: no shape in the
            file shows it.
        mode: SISA's numerics: "clamped", what it was trained with, or "exact". A Transformer has
            neither.

    Raises FileNotFoundError if ``path`` is no file, and ValueError for one that is truncated,
    foreign or without "model", for a preset of another family, and for a wrong preset, naming the
    first tensor that disagrees and the presets that fit."""
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    config = preset_config(preset, **overrides)
    if config.family not in FAMILIES:
        raise ValueError(
            "preset must be a SISA model or a Transformer, as the authors' files hold, "
            f"got {preset!r}"
        )
    if config.family == "sisa" and config.lam != "zero":
        config = preset_config(preset, **{**overrides, "mode": mode})
    state = _read(Path(path))
    with torch.device("meta"):
        model = LanguageModel(config)
    wrong = _disagreement(model, state)
    if wrong:
        fitting = ", ".join(_fitting(state, overrides)) or "none"
        raise ValueError(f"{path} does not hold {preset}: {wrong}. Presets that fit it: {fitting}")
    model.to_empty(device=device)
    model.load_state_dict({name: state[_their_name(name)] for name in model.state_dict()})
    return model


def _read(path: Path) -> dict[str, Tensor]:
    """The state dict in an authors' file, without the prefix of a compiled model."""
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        # Mapped: what else is in the file, such as an optimizer's state, is not read.
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch.load raises many kinds for a damaged file
        raise ValueError(
            f"{path} is truncated or no checkpoint that can be read as data alone: {error}"
        ) from error
    if not isinstance(saved, dict) or not isinstance(saved.get("model"), dict):
        held = (
            f"the keys {', '.join(map(str, list(saved)[:5]))}"
            if isinstance(saved, dict)
            else f"a {type(saved).__name__}"
        )
        raise ValueError(f"{path} must hold a dictionary whose 'model' is a state dict, got {held}")
    for name, value in saved["model"].items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"{path} must hold a state dict under 'model', "
                f"got a {type(value).__name__} under {name!r}"
            )
    return {name.removeprefix(COMPILED): tensor for name, tensor in saved["model"].items()}


def _disagreement(model: LanguageModel, state: dict[str, Tensor]) -> str:
    """What first sets ``state`` apart: lacking, of another shape, or unknown; "" if nothing."""
    shapes = {_their_name(name): list(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, shape in shapes.items():
        if name not in state:
            return f"it has no {name}"
        if list(state[name].shape) != shape:
            return f"{name} is {list(state[name].shape)} in the file, {shape} in the model"
    return next((f"the model has no {name}" for name in state if name not in shapes), "")


def _fitting(state: dict[str, Tensor], overrides: dict[str, Any]) -> list[str]:
    """The presets that have the tensors of ``state``, each in its shape."""
    embedding = state.get("embed.weight")
    if embedding is None:
        return []
    found = []
    for name, preset in PRESETS.items():
        if preset.model.family not in FAMILIES:
            continue
        try:
            config = preset_config(name, **overrides)
        except ValueError:  # the overrides do not go with this one
            continue
        if list(embedding.shape) != [config.vocab_size, config.d_model]:
            continue
        with torch.device("meta"):
            model = LanguageModel(config)
        if not _disagreement(model, state):
            found.append(name)
    return found
