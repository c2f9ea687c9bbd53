"""What a step does with gradients: AdamW in groups, its learning rate (paper, section 4)."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from sisa_model.models.groups import split_parameters
from sisa_model.models.language_model import LanguageModel
from sisa_model.runs.config import ResolvedConfig


def learning_rate(step: int, config: ResolvedConfig) -> float:
    """That of ``step``, from 0: linear warm-up, then by the schedule.

    The cosine, and wsd in its last ``decay_steps``, would reach 0 at ``steps``. The first rate is a
    step's worth, in the recipe "paper" 0."""
    if step < config.warmup_steps:
        begun = step if config.recipe == "paper" else step + 1
        return config.lr * begun / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "wsd":
        assert config.decay_steps is not None
        return config.lr * min(1.0, (config.steps - step) / config.decay_steps)
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.lr * 0.5 * (1 + math.cos(math.pi * done))


def make_optimizer(model: LanguageModel, config: ResolvedConfig) -> torch.optim.AdamW:
    """AdamW; lambda_raw has a smaller learning rate and no decay (paper, section 4).

    Nor is there decay on what a module names in ``no_weight_decay``: Mamba's steps, decay rates and
    D; but in the recipe "paper". Parameters in bf16 are stepped operation by operation, as the
    authors' were: each result is rounded, where the fused step would round once."""
    rest, undecayed, lambdas = split_parameters(model)
    without = config.weight_decay if config.recipe == "paper" else 0.0
    groups = [
        {"params": rest, "weight_decay": config.weight_decay, "lr_scale": 1.0},
        {"params": undecayed, "weight_decay": without, "lr_scale": 1.0},
        {"params": lambdas, "weight_decay": 0.0, "lr_scale": config.lambda_lr_scale},
    ]
    fused = config.precision != "bf16-pure"
    return torch.optim.AdamW(
        by_kind(groups), lr=0.0, betas=(config.beta1, config.beta2), fused=fused
    )


def by_kind(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Parameter groups, each split by mesh: a fused step takes no mixture, nor plain tensors."""
    kinds = []
    for group in groups:
        by_mesh: dict[DeviceMesh | None, list[Tensor]] = {}
        for p in group["params"]:
            by_mesh.setdefault(p.device_mesh if isinstance(p, DTensor) else None, []).append(p)
        kinds += [{**group, "params": alike} for alike in by_mesh.values()]
    return kinds
