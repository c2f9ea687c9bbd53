"""What ``python -m bench cpu`` times, by section: groups of cases that take turns.

A new model, shape or path is a line.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from bench.cases import (
    Case,
    Setting,
    attention_case,
    attention_groups,
    augmentation_groups,
    decode_groups,
    gemm_case,
    layer_groups,
    model_groups,
    step_groups,
)
from bench.paths import (
    ATTENTION_ON_CPU,
    AUTHORS,
    CHUNKED,
    EXACT_ON_CPU,
    FLEX,
    HALF_LIFE,
    STOCK,
    Path,
)
from bench.roofline import Shape

CPU = torch.device("cpu")
QUICK = os.environ.get("SISA_BENCH_QUICK") == "1"  # sizes that say nothing: for tests
DENSE_GIB = 0.5  # of scores, past which the authors' formulation, dense on a CPU, is left out


@dataclass(frozen=True)
class Group:
    """Cases that are timed together, for ``seconds`` but at least ``least`` rounds."""

    setting: Setting
    cases: tuple[Case, ...]
    seconds: float = 20.0
    least: int = 5


# Batch 1: an attention layer of the 152M model.
FULL = Setting(CPU, torch.float32, (2048, 512), tokens=1)
TINY = Setting(CPU, torch.float32, (64,), (16,), tokens=1, heads=1, head_dim=16)
BASE = Shape(1, 2048, 4, 64, 16, 64)
GROWTH = {  # the field of BASE that grows, and its values
    "length": (256, 512, 1024, 2048, 4096, 8192, 16384, 32768),
    "d_state": (16, 32, 64, 128),
    "heads": (1, 2, 4, 8, 16),
    "batch": (1, 2, 4, 8),
}
LAYERS = (
    "stock-transformer-152m",
    "transformer-152m",
    "sisa-152m-ds16",
    "sisa-152m-ds32",
    "authors-152m-ds16",
    "authors-152m-ds32",
    "fox-152m",
    "alibi-152m",
    "mamba2-152m",
    "mamba3-152m",
)
# The authors' formulation has no cache.
DECODERS = tuple(preset for preset in LAYERS if not preset.startswith("authors"))
CONTEXTS = (512, 4096, 8192)
MODELS = {  # by (batch, length), the trainer's
    (8, 128): (
        "stock-transformer-tiny",
        "transformer-tiny",
        "sisa-tiny-ds16",
        "authors-tiny-ds16",
        "mamba2-tiny",
        "mamba3-tiny",
    ),
    (8, 2048): (
        "stock-transformer-tiny",
        "transformer-tiny",
        "sisa-tiny-ds16",
        "authors-tiny-ds16",
    ),
    (1, 2048): (
        "stock-transformer-50m",
        "transformer-50m",
        "sisa-50m-ds16",
        "authors-50m-ds16",
    ),
}
DECAYS = (100.0, 14.0, 5.5, 2.2, 1.0, 0.33)  # half-lives, of b_a from -5 to 2
DECAY_LENGTHS = (2048, 8192)
STEPS = {(1, 2048): ("transformer-50m", "sisa-50m-ds16")}  # by (batch, length)
if QUICK:
    FULL = TINY
    BASE = Shape(1, 64, 1, 16, 16, 16)
    GROWTH = {"length": (64, 128)}
    DECAYS = (100.0, 1.0)
    DECAY_LENGTHS = (64,)
    LAYERS = (
        "stock-transformer-tiny",
        "transformer-tiny",
        "sisa-tiny-ds16",
        "authors-tiny-ds16",
        "fox-tiny",
        "alibi-tiny",
        "mamba2-tiny",
        "mamba3-tiny",
    )
    MODELS = {(2, 32): MODELS[8, 128]}
    STEPS = {(2, 32): MODELS[2, 32][1:3]}
    DECODERS = tuple(preset for preset in LAYERS if not preset.startswith("authors"))
    CONTEXTS = (64,)


def augment() -> Iterator[Group]:
    for dtype in (torch.float32, torch.bfloat16):
        setting = replace(FULL, dtype=dtype, lengths=FULL.lengths[:1])
        for cases in augmentation_groups(setting, baseline="chain"):
            yield Group(setting, tuple(cases), seconds=10.0)


def attention() -> Iterator[Group]:
    for cases in attention_groups(FULL, ATTENTION_ON_CPU):
        yield Group(FULL, tuple(cases))


def compared(
    op: str, paths: Sequence[Path], shape: Shape, passes: str, half_life: float = HALF_LIFE
) -> tuple[Case, ...]:
    """A case for each path; baseline: plain attention by the stock flash kernel."""
    return tuple(
        attention_case(
            op, path, shape, passes, FULL, half_life=half_life, baseline=path is STOCK[1]
        )
        for path in paths
    )


def decay() -> Iterator[Group]:
    """Ours and plain attention as heads learn to forget, forward + backward.

    Beside them PyTorch's product of square matrices, for its rate."""
    for length in DECAY_LENGTHS:
        shape = replace(BASE, length=length)
        for half_life in DECAYS:
            paths = (STOCK[1], EXACT_ON_CPU, CHUNKED)
            cases = compared("decay", paths, shape, "fwd+bwd", half_life)
            yield Group(FULL, (*cases, gemm_case("decay", shape, FULL)), seconds=8.0, least=3)


def flex() -> Iterator[Group]:
    """FlexAttention beside the others at one shape, forward: Inductor takes a minute for it."""
    shape = FULL.shapes()[0]
    paths = (STOCK[1], EXACT_ON_CPU, AUTHORS, FLEX)
    yield Group(FULL, compared("flex", paths, shape, "fwd"))


def layer() -> Iterator[Group]:
    setting = replace(FULL, models=LAYERS)
    for cases in layer_groups(setting):
        yield Group(setting, tuple(cases))


def decode() -> Iterator[Group]:
    setting = replace(FULL, lengths=CONTEXTS, models=DECODERS)
    for cases in decode_groups(setting):
        yield Group(setting, tuple(cases), seconds=5.0)


def model() -> Iterator[Group]:
    for (batch, length), models in MODELS.items():
        setting = replace(FULL, lengths=(length,), tokens=batch * length, models=models)
        for cases in model_groups(setting):
            yield Group(setting, tuple(cases))


def step() -> Iterator[Group]:
    for (batch, length), models in STEPS.items():
        setting = replace(FULL, lengths=(length,), tokens=batch * length, models=models)
        for cases in step_groups(setting):
            yield Group(setting, tuple(cases), seconds=60.0)


def growth() -> Iterator[Group]:
    """Plain attention, ours and the authors', forward + backward, as one of the sizes grows."""
    grown = [replace(BASE, **{name: value}) for name in GROWTH for value in GROWTH[name]]
    for shape in dict.fromkeys(grown):
        dense = 4 * shape.batch * shape.heads * shape.length**2 / 2**30
        paths = [STOCK[1], EXACT_ON_CPU]
        if dense <= DENSE_GIB:
            paths.append(AUTHORS)
        yield Group(FULL, compared("growth", paths, shape, "fwd+bwd"), seconds=10.0, least=3)


SECTIONS = {
    "augment": augment,
    "attention": attention,
    "decay": decay,
    "flex": flex,
    "layer": layer,
    "decode": decode,
    "model": model,
    "step": step,
    "growth": growth,
}
