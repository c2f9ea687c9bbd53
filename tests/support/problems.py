"""The operators' random problem as tests take it: by name."""

from sisa_kernels import testing


def problem(decay=-5.0, lam=None, **shape):
    """:func:`sisa_kernels.testing.problem`, its inputs as a dictionary that a test may change."""
    inputs, dy = testing.problem(decay=decay, lam=lam, **shape)
    return testing.named(inputs), dy
