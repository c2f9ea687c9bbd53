"""Parameter groups for an optimizer: lambda at a rate of its own, no decay on rates and steps."""

from typing import Any

from torch import nn


def split_parameters(
    model: nn.Module,
) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
    """The trainable parameters: most, those without weight decay, and every ``lambda_raw``.

    Without decay is what a module names in ``no_weight_decay``: Mamba's steps, decay rates and
    D."""
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    undecayed = {
        id(getattr(module, name))
        for module in model.modules()
        for name in getattr(module, "no_weight_decay", ())
    }
    lambdas = [p for name, p in trainable.items() if name.endswith("lambda_raw")]
    free = [p for p in trainable.values() if id(p) in undecayed]
    apart = {id(p) for p in (*lambdas, *free)}
    return [p for p in trainable.values() if id(p) not in apart], free, lambdas


def parameter_groups(
    model: nn.Module, lr: float, weight_decay: float, lambda_lr_scale: float = 0.1
) -> list[dict[str, Any]]:
    """The groups with which `sisa train` trains, for another optimizer or Trainer.

    Of any model in which layers of this package stand: a wrapped, an adapted or one's own, with
    adapters or without; only what ``requires_grad``. In transformers::

        groups = parameter_groups(model, lr=6e-4, weight_decay=0.1)
        Trainer(model, args, optimizers=(torch.optim.AdamW(groups), None), ...)

    Args:
        lr: the rate of all but lambda_raw.
        weight_decay: of all but lambda_raw and Mamba's steps, decay rates and D.
        lambda_lr_scale: lambda_raw's rate over ``lr`` (paper, section 4).
    """
    rest, undecayed, lambdas = split_parameters(model)
    groups = [
        {"params": rest, "lr": lr, "weight_decay": weight_decay},
        {"params": undecayed, "lr": lr, "weight_decay": 0.0},
        {"params": lambdas, "lr": lr * lambda_lr_scale, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
