"""Measures of an error against the fp64 oracle. What is not a number is infinitely wrong."""

import math

from torch import Tensor

from sisa_kernels.testing.gradients import Inputs, ValueAndGrads, named


def relative(x: Tensor, right: Tensor) -> float:
    """``|x - right| / |right|`` over the whole tensor; absolute where ``right`` vanishes."""
    scale = right.norm().item()
    error = (x.double() - right).norm().item()
    return _number(error / (scale if scale > 1e-12 else 1.0))


def worst_row(x: Tensor, right: Tensor) -> float:
    """The largest relative error of a row (last axis) of x."""
    errors = (x.double() - right).norm(dim=-1) / right.norm(dim=-1)
    return _number(errors.max().item())


def relative_errors(found: ValueAndGrads, right: ValueAndGrads) -> dict[str, float]:
    """:func:`relative` of "y" and of every gradient that was found, by name."""
    grads = {name: relative(grad, right[1][name]) for name, grad in found[1].items()}
    return {"y": relative(found[0], right[0])} | grads


def gradient_errors(
    grads: dict[str, Tensor], right: dict[str, Tensor], inputs: Inputs
) -> dict[str, float]:
    """:func:`relative` of every gradient of SISA attention, by name.

    lam's is one number a head, a sum over all tokens that may nearly cancel: it is measured against
    the sum of their sizes."""
    errors = {name: relative(grad, right[name]) for name, grad in grads.items()}
    x = named(inputs)
    by_token = (right["c"] * x["c"].detach().double()).sum(3)
    sizes = by_token.abs().sum((0, 1)) / x["lam"].detach()
    if sizes.any():
        off = (grads["lam"].double() - right["lam"]).norm()
        errors["lam"] = _number((off / sizes.norm()).item())
    return errors


def _number(error: float) -> float:
    return math.inf if math.isnan(error) else error
