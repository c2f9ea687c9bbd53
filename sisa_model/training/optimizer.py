"""What a step does with gradients: AdamW in groups, its learning rate (paper, section 4)."""

import math
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from sisa_model.models.language_model import LanguageModel
from sisa_model.runs.config import ResolvedConfig


def learning_rate(step: int, config: ResolvedConfig) -> float:
    """That of ``step``, from 0: linear warm-up, then a cosine that would reach 0 at ``steps``."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.lr * 0.5 * (1 + math.cos(math.pi * done))


def make_optimizer(model: LanguageModel, config: ResolvedConfig) -> torch.optim.AdamW:
    """AdamW; lambda_raw has a smaller learning rate and no decay (paper, section 4).

    Nor is there decay on what a module names in ``no_weight_decay``: Mamba's steps, decay rates and
    D."""
    lambdas = [p for name, p in model.named_parameters() if name.endswith("lambda_raw")]
    undecayed = [
        getattr(m, name) for m in model.modules() for name in getattr(m, "no_weight_decay", ())
    ]
    apart = {id(p) for p in (*lambdas, *undecayed)}
    rest = [p for p in model.parameters() if id(p) not in apart]
    groups = [
        {"params": rest, "weight_decay": config.weight_decay, "lr_scale": 1.0},
        {"params": undecayed, "weight_decay": 0.0, "lr_scale": 1.0},
        {"params": lambdas, "weight_decay": 0.0, "lr_scale": config.lambda_lr_scale},
    ]
    return torch.optim.AdamW(
        by_kind(groups), lr=0.0, betas=(config.beta1, config.beta2), fused=True
    )


def by_kind(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Parameter groups, each split in plain and sharded: a fused step takes no mixture."""
    kinds = [
        {**group, "params": [p for p in group["params"] if isinstance(p, DTensor) is sharded]}
        for group in groups
        for sharded in (False, True)
    ]
    return [group for group in kinds if group["params"]]
