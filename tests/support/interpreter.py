"""Triton's interpreter made to compute as a GPU does: products as PyTorch's, bf16 as numbers.

The interpreter holds bf16 as its bits, which it multiplies as integers, and cuts fp32 off to bf16;
and numpy's rounding of a product depends on the processor, and is up to 5 times worse than
PyTorch's, whose error a kernel's is held to."""

from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

Handle = interpreter.TensorHandle
Builder = interpreter.InterpreterBuilder
_cast_impl = Builder.cast_impl
_binary_op = Builder.binary_op


def _widened(x: Handle) -> torch.Tensor:
    """x in fp32, whatever it holds."""
    data = torch.from_numpy(np.ascontiguousarray(x.data))
    return (data.view(torch.bfloat16) if x.dtype.scalar == tl.bfloat16 else data).float()


def _create_dot(self: Builder, a: Handle, b: Handle, d: Handle, *_: Any) -> Handle:
    return Handle((_widened(a) @ _widened(b)).numpy() + d.data, d.dtype.scalar)


def _cast(self: Builder, x: Handle, dtype: Any) -> Handle:
    given, wanted = x.dtype.scalar, dtype.scalar
    if given == tl.bfloat16 and wanted == tl.float32:
        return Handle(_widened(x).numpy(), wanted)
    if given == tl.float32 and wanted == tl.bfloat16:  # PyTorch rounds to nearest even
        return Handle(_widened(x).bfloat16().view(torch.uint16).numpy(), wanted)
    if tl.bfloat16 in (given, wanted):
        raise NotImplementedError(f"a cast from {given} to {wanted} in the interpreter")
    return _cast_impl(self, x, dtype)


def _of_numbers(self: Builder, x: Handle, y: Handle, op: Any) -> Handle:
    if tl.bfloat16 in (x.dtype.scalar, y.dtype.scalar):
        raise NotImplementedError(f"{op.__name__} of bf16 in the interpreter: widen it first")
    return _binary_op(self, x, y, op)


def patch(patch: pytest.MonkeyPatch) -> None:
    """Let the interpreter compute so until ``patch`` is undone."""
    patch.setattr(Builder, "create_dot", _create_dot)
    patch.setattr(Builder, "cast_impl", _cast)
    patch.setattr(Builder, "binary_op", _of_numbers)
