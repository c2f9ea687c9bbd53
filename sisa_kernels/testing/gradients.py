"""A function's value and its gradients by name, and those of the fp64 oracle."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from sisa_kernels import reference
from sisa_kernels.inputs import SisaInputs

ValueAndGrads = tuple[Tensor, dict[str, Tensor]]
Inputs = SisaInputs | Mapping[str, Tensor]


def named(inputs: Inputs) -> dict[str, Tensor]:
    """The tensors that gradients flow to, by name."""
    if isinstance(inputs, SisaInputs):
        return dict(zip(inputs._fields, inputs.tensors()))
    return dict(inputs)


def value_and_grads(
    function: Callable[..., Tensor], inputs: Inputs, dy: Tensor, **options: object
) -> ValueAndGrads:
    """``y = function(**inputs, **options)`` and dL/dinput by name given dL/dy, from new leaves."""
    leaves = {name: x.detach().requires_grad_() for name, x in named(inputs).items()}
    y = function(**leaves, **options)
    grads = torch.autograd.grad(y, list(leaves.values()), dy)
    return y.detach(), dict(zip(leaves, grads))


def in_fp64(inputs: Inputs) -> dict[str, Tensor]:
    """The inputs by name in fp64, without their gradients."""
    return {name: x.detach().double() for name, x in named(inputs).items()}


def oracle(inputs: Inputs, dy: Tensor, **options: object) -> ValueAndGrads:
    """:func:`value_and_grads` of Eq. 2 in fp64 (:func:`sisa_kernels.reference.sisa_attention`)."""
    return value_and_grads(reference.sisa_attention, in_fp64(inputs), dy.double(), **options)
