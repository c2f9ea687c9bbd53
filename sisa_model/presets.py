"""The named models of the paper's study, as one table of ModelConfig fields."""

import difflib
from typing import Any

from .config import ModelConfig

D_STATES = (16, 32, 64, 128)
BYTE_VOCAB = 257  # 256 bytes and an end-of-text token

_PAPER = {"vocab_size": 50277, "max_seq_len": 2048}
_TINY = {
    "d_model": 64, "n_heads": 2, "n_layers": 2, "d_ff_transformer": 256, "vocab_size": BYTE_VOCAB, "max_seq_len": 1024,
    # Measured: the paper's 0.02 is for wide models; at width 64 it trains to 1.79 nats a byte where 0.1 trains to 1.65.
    "init_std": 0.1,
}  # fmt: skip
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
        table[f"transformer-{scale}-reduced"] = {"family": "transformer", **sizes, "d_ff": ModelConfig(**sisa).d_ff}
        for rival in ("fox", "alibi"):
            table[f"{rival}-{scale}"] = {"family": rival, **sizes}
    return table


PRESETS = _table()


def presets() -> list[str]:
    """Names of the models that :func:`sisa_model.build` knows."""
    return list(PRESETS)


def preset_config(name: str, **overrides: Any) -> ModelConfig:
    """The configuration of a preset with some of ModelConfig's fields overridden; d_ff follows unless it is given.

    Raises ValueError for an unknown name (with the nearest known ones) or field, or a field's value.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=3) or ["sisa-tiny-ds16"]
        raise ValueError(f"preset must be one of those that `sisa info` lists, such as {', '.join(near)}; got {name!r}")
    unknown = sorted(overrides.keys() - ModelConfig.__dataclass_fields__.keys())
    if unknown:
        raise ValueError(f"{unknown[0]} is not a field of the model; the fields are {', '.join(ModelConfig.__dataclass_fields__)}")
    return ModelConfig(**{**PRESETS[name], **overrides})
