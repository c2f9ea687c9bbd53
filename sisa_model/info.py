"""sisa info: the models that there are, and what one costs."""

from dataclasses import dataclass

import torch
import tyro

from sisa_kernels.version import __version__
from sisa_model.models.language_model import LanguageModel, count_parameters
from sisa_model.models.presets import find_preset, preset_config, presets
from sisa_model.models.size import ModelSize, model_size


@dataclass(frozen=True, kw_only=True)
class InfoConfig:
    """List the presets, or say what one costs: parameters, FLOPs a token, memory."""

    preset: tyro.conf.Positional[str | None] = None
    """Show every field of this one and its costs."""


def info(config: InfoConfig) -> str:
    """The presets, or one preset's fields and costs."""
    if config.preset is None:
        return _presets()
    preset = find_preset(config.preset)
    fields = [f"{name:18} {value}" for name, value in vars(preset.model).items()]
    seq_len = preset.training.seq_len
    costs = _costs(model_size(preset.model, seq_len))
    about = f"Trained with AdamW on sequences of {seq_len:,} tokens:"
    return "\n".join([*fields, "", about, *(f"{name:34} {value:>15}" for name, value in costs)])


def _costs(size: ModelSize) -> list[tuple[str, str]]:
    def mib(count: int) -> str:
        return f"{count / 2**20:,.1f} MiB"

    costs = [
        ("parameters", f"{size.parameters:,}"),
        ("FLOPs a token, forward", f"{size.forward_flops:,.0f}"),
        ("FLOPs a token, with backward", f"{size.training_flops:,.0f}"),
        ("weights", mib(size.weights)),
        ("gradients", mib(size.weights)),
        ("optimizer's moments", mib(2 * size.weights)),
        ("activations of a sequence, fp32", mib(size.activations)),
        ("activations of a sequence, bf16", mib(size.activations_bf16)),
    ]
    if size.cache_per_token is not None and size.cache_per_sequence is not None:
        costs.append(("cache in decoding, of a token", f"{size.cache_per_token:,} bytes"))
        costs.append(("cache in decoding, of a sequence", f"{size.cache_per_sequence:,} bytes"))
    return costs


def _presets() -> str:
    columns = {
        "d_model": "d_model",
        "heads": "n_heads",
        "layers": "n_layers",
        "d_state": "d_state",
        "mamba": "mamba_state",
        "d_ff": "d_ff",
    }
    widths = {title: max(5, len(title)) for title in columns}
    longest = max(map(len, presets()))
    titles = " ".join(f"{title:>{width}}" for title, width in widths.items())
    lines = [f"sisa {__version__}", f"{'preset':{longest}} {'parameters':>11} {titles}"]
    for name in presets():
        with torch.device("meta"):
            model = LanguageModel(preset_config(name))
        values = {title: getattr(model.config, field) for title, field in columns.items()}
        row = " ".join(f"{value or '':>{widths[title]}}" for title, value in values.items())
        lines.append(f"{name:{longest}} {count_parameters(model):11,} {row}".rstrip())
    return "\n".join(lines)
