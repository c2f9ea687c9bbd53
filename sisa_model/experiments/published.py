"""The paper's published results: percent, zero-shot, of models trained on 5 B tokens.

Models are named as our presets, tasks as our evaluations. Where a table by step says "end", that is
step 9,536."""

from typing import NamedTuple

SOURCE = "Shin and Yang, arXiv 2606.02332v2"
STEPS = 9536
SISA_152M = ("sisa-152m-ds16", "sisa-152m-ds32", "sisa-152m-ds64", "sisa-152m-ds128")

# preset -> task -> accuracy. The main table (152M), the 50M and the 369M columns of the scaling
# table. "sisa-152m-ds32-frozen": lambda_raw kept in bf16, where it cannot move; "sisa-152m-ds32":
# learned in fp32. One row of the table holds both: LAMBADA is given for each, the other columns
# once.
RESULTS: dict[str, dict[str, float]] = {
    "transformer-152m": {
        "lambada": 13.9,
        "niah": 100.0,
        "hellaswag": 25.4,
        "arc_easy": 33.3,
        "winogrande": 51.2,
    },
    "mamba2-152m": {
        "lambada": 12.7,
        "niah": 82.5,
        "hellaswag": 26.5,
        "arc_easy": 36.4,
        "winogrande": 51.4,
    },
    "mamba3-152m": {
        "lambada": 15.5,
        "niah": 99.0,
        "hellaswag": 26.0,
        "arc_easy": 34.9,
        "winogrande": 52.7,
    },
    "sisa-152m-ds16": {
        "lambada": 17.3,
        "niah": 100.0,
        "hellaswag": 26.9,
        "arc_easy": 34.7,
        "winogrande": 52.5,
    },
    "sisa-152m-ds32-frozen": {
        "lambada": 16.1,
        "niah": 100.0,
        "hellaswag": 26.7,
        "arc_easy": 35.8,
        "winogrande": 51.8,
    },
    "sisa-152m-ds32": {
        "lambada": 17.7,
        "niah": 100.0,
        "hellaswag": 26.7,
        "arc_easy": 35.8,
        "winogrande": 51.8,
    },
    "sisa-152m-ds64": {
        "lambada": 16.8,
        "niah": 100.0,
        "hellaswag": 26.6,
        "arc_easy": 35.4,
        "winogrande": 50.8,
    },
    "sisa-152m-ds128": {
        "lambada": 16.8,
        "niah": 100.0,
        "hellaswag": 26.0,
        "arc_easy": 35.0,
        "winogrande": 51.9,
    },
    "transformer-50m": {"lambada": 13.4},
    "sisa-50m-ds16": {"lambada": 14.3},
    "sisa-50m-ds32": {"lambada": 12.8},
    "sisa-50m-ds64": {"lambada": 14.4},
    "sisa-50m-ds128": {"lambada": 13.2},
    "mamba2-50m": {"lambada": 5.6},
    "mamba3-50m": {"lambada": 12.7, "niah": 63.5},
    "transformer-369m": {"lambada": 15.4},
    "sisa-369m-ds32": {"lambada": 14.0, "niah": 100.0},
    "sisa-369m-ds64": {"lambada": 13.1, "niah": 100.0},
    "sisa-369m-ds128": {"lambada": 14.8, "niah": 100.0},
    "mamba2-369m": {"lambada": 10.5},
    "mamba3-369m": {"lambada": 17.4, "niah": 86.5},
}


class Curve(NamedTuple):
    """Accuracy of one model, or of several reported together, against step or length."""

    name: str
    presets: tuple[str, ...]
    points: dict[int, float]
    """Step or length -> percent."""


def _curves(
    at: tuple[int, ...], rows: dict[str, tuple[tuple[str, ...], tuple[float, ...]]]
) -> tuple[Curve, ...]:
    return tuple(
        Curve(name, presets, dict(zip(at, values, strict=True)))
        for name, (presets, values) in rows.items()
    )


# task -> curves by training step, at 152M.
BY_STEP: dict[str, tuple[Curve, ...]] = {
    "niah": _curves(
        (1000, 2000, 3000, 5000, 7000, STEPS),
        {
            "Transformer": (("transformer-152m",), (61.5, 78.0, 93.5, 98.5, 100.0, 100.0)),
            "SISA": (SISA_152M, (100.0,) * 6),
            "Mamba-2": (("mamba2-152m",), (0.0, 6.5, 42.0, 71.0, 78.5, 82.5)),
            "Mamba-3": (("mamba3-152m",), (0.0, 61.0, 96.5, 86.0, 97.5, 99.0)),
        },
    ),
    "lambada": _curves(
        (1000, 2000, 3000, 5000, 7000),
        {
            "Transformer": (("transformer-152m",), (3.5, 5.9, 6.2, 7.2, 13.9)),
            "SISA d_s 32": (("sisa-152m-ds32",), (8.4, 13.9, 14.4, 15.8, 17.4)),
        },
    ),
}
# Needle in a haystack by context length, at 152M and the end of training (at 2,048 tokens a
# sequence). The script behind it is not published; the published builder makes no prompt longer
# than 1,013 tokens.
NIAH_BY_LENGTH = _curves(
    (256, 512, 1024, 1536, 2048, 3072),
    {
        "Transformer": (("transformer-152m",), (100.0, 100.0, 100.0, 100.0, 82.0, 0.0)),
        "SISA": (SISA_152M, (100.0, 100.0, 100.0, 100.0, 91.0, 0.0)),
    },
)
# Training throughput at 152M on one GPU partition, tokens/s, and FLOPs of a SISA step over the
# Transformer's.
TOKENS_PER_S = {
    "transformer-152m": 27714,
    "sisa-152m-ds32": 16783,
    "mamba3-152m": 13460,
    "mamba2-152m": 10719,
}
FLOPS_RATIO = 1.07
