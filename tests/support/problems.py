"""Problems for operators by name, and from sisa_kernels.testing what is measured on them."""

from sisa_kernels import testing
from sisa_kernels.testing import (
    NAMES,
    forgetting_problem,
    gradient_errors,
    in_fp64,
    oracle,
    relative,
    value_and_grads,
    worst_row,
)

__all__ = [
    "NAMES",
    "forgetting_problem",
    "gradient_errors",
    "in_fp64",
    "oracle",
    "problem",
    "relative",
    "value_and_grads",
    "worst_row",
]


def problem(decay=-5.0, lam=None, **shape):
    """:func:`sisa_kernels.testing.problem`, its inputs as a dictionary that a test may change."""
    inputs, dy = testing.problem(decay=decay, lam=lam, **shape)
    return testing.named(inputs), dy
