"""What measures an operator: random problems, values and gradients, errors against the oracle.

The self-check of a first use, the tests, the benches and examples all take them from here. Nothing
here runs in a model."""

from sisa_kernels.inputs import NAMES
from sisa_kernels.testing.errors import gradient_errors, relative, relative_errors, worst_row
from sisa_kernels.testing.gradients import (
    ValueAndGrads,
    in_fp64,
    named,
    oracle,
    value_and_grads,
)
from sisa_kernels.testing.problems import forgetting_problem, problem

__all__ = [
    "NAMES",
    "ValueAndGrads",
    "forgetting_problem",
    "gradient_errors",
    "in_fp64",
    "named",
    "oracle",
    "problem",
    "relative",
    "relative_errors",
    "value_and_grads",
    "worst_row",
]
