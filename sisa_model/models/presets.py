"""The named models of the paper's study, as one table of ModelConfig fields."""

import difflib
from typing import Any

from sisa_model.models.config import ModelConfig

D_STATES = (16, 32, 64, 128)
BYTE_VOCAB = 257  # 256 bytes and an end-of-text token

_PAPER = {"vocab_size": 50277, "max_seq_len": 2048}
_TINY = {
    "d_model": 64,
    "n_heads": 2,
    "n_layers": 2,
    "d_ff_transformer": 256,
    "vocab_size": BYTE_VOCAB,
    "max_seq_len": 1024,
    # Measured: the paper's 0.02 is for wide models; at width 64 it trains to 1.79 nats a byte where
    # 0.1 trains to 1.65.
    "init_std": 0.1,
}
_SCALES: dict[str, dict[str, Any]] = {
    "tiny": _TINY,
    "50m": {"d_model": 512, "n_heads": 8, "n_layers": 6, "d_ff_transformer": 2048, **_PAPER},
    "152m": {"d_model": 768, "n_heads": 12, "n_layers": 12, "d_ff_transformer": 3072, **_PAPER},
    "369m": {"d_model": 1024, "n_heads": 16, "n_layers": 24, "d_ff_transformer": 2944, **_PAPER},
}
_CONTROLS: dict[str, dict[str, Any]] = {
    "nodecay": {"decay": False},
    "norotation": {"rotation": False},
    "bilinear": {"decay": False, "rotation": False},
    "lambda0": {"lam": "zero"},
    "lambdashared": {"lam": "shared"},
}
# The paper's layer counts. Tiny: heads as wide as the Transformer's (32), then the layers and the
# multiple of 4 of state channels that come closest to its 147,840 parameters: 147,920 and 147,744.
_MAMBA_LAYERS = {
    "mamba2": {"tiny": 4, "50m": 14, "152m": 31, "369m": 49},
    "mamba3": {"tiny": 4, "50m": 14, "152m": 30, "369m": 48},
}
_MAMBA_TINY_STATE = {"mamba2": 52, "mamba3": 48}
_MAMBA_STATE = 64
# sisa_model/hybrid.py says which papers these follow. The 3309 brings hybrid-block-152m closest to
# transformer-152m.
_HYBRIDS: dict[str, dict[str, Any]] = {
    "transformer-tiny": {"n_layers": 3, "pattern": "mma"},
    "sisa-tiny": {"n_layers": 3, "pattern": "mma", "family": "sisa", "d_state": 32},
    "block-tiny": {"n_layers": 3, "pattern": "mam"},
    "head-tiny": {"pattern": "h"},
    "transformer-152m": {"n_layers": 24, "pattern": "m" * 20 + "a" * 4},
    "sisa-152m": {"n_layers": 24, "pattern": "m" * 20 + "a" * 4, "family": "sisa", "d_state": 32},
    "block-152m": {"n_layers": 24, "pattern": "mmmamm", "d_ff": 3309},
    "head-152m": {"pattern": "h"},
}


def _table() -> dict[str, dict[str, Any]]:
    table: dict[str, dict[str, Any]] = {}
    for scale, sizes in _SCALES.items():
        for d_state in D_STATES:
            table[f"sisa-{scale}-ds{d_state}"] = {"family": "sisa", "d_state": d_state, **sizes}
        sisa = table[f"sisa-{scale}-ds32"]
        for control, change in _CONTROLS.items():
            table[f"sisa-{scale}-ds32-{control}"] = {**sisa, **change}
        table[f"transformer-{scale}"] = {"family": "transformer", **sizes}
        # SISA's narrower SwiGLU without the importance term that pays for it.
        table[f"transformer-{scale}-reduced"] = {
            "family": "transformer",
            **sizes,
            "d_ff": ModelConfig(**sisa).d_ff,
        }
        for rival in ("fox", "alibi"):
            table[f"{rival}-{scale}"] = {"family": rival, **sizes}
        for family, layers in _MAMBA_LAYERS.items():
            state = _MAMBA_TINY_STATE[family] if scale == "tiny" else _MAMBA_STATE
            mamba = {
                "family": family,
                "n_layers": layers[scale],
                "d_ff_transformer": 0,
                "mamba_state": state,
            }
            table[f"{family}-{scale}"] = {**sizes, **mamba}
    for name, change in _HYBRIDS.items():
        scale = name.split("-")[1]
        base = {
            **table[f"transformer-{scale}"],
            "mamba_state": table[f"mamba2-{scale}"]["mamba_state"],
        }
        table[f"hybrid-{name}"] = {**base, **change}
    return table


PRESETS = _table()


def presets() -> list[str]:
    """Names of the models that :func:`sisa_model.build` knows."""
    return list(PRESETS)


def preset_config(name: str, **overrides: Any) -> ModelConfig:
    """The configuration of a preset with some of ModelConfig's fields overridden; d_ff follows
    unless it is given.

    Raises ValueError for an unknown name (with the nearest known ones) or field, or a field's
    value."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=3) or ["sisa-tiny-ds16"]
        raise ValueError(
            f"preset must be one of those that `sisa info` lists, such as {', '.join(near)}; got {name!r}"
        )
    unknown = sorted(overrides.keys() - ModelConfig.__dataclass_fields__.keys())
    if unknown:
        raise ValueError(
            f"{unknown[0]} is not a field of the model; the fields are {', '.join(ModelConfig.__dataclass_fields__)}"
        )
    return ModelConfig(**{**PRESETS[name], **overrides})
