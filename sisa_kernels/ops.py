"""How operators are registered, and what all do alike: refuse, leave autocast, say it once."""

import contextlib
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from sisa_kernels import _extension

library = torch.library.Library("sisa", "FRAGMENT")


def register(
    name: str,
    eager: Callable,
    fake: Callable,
    backward: Callable | None = None,
    setup_context: Callable | None = None,
    *,
    mutates: tuple[str, ...] = (),
    in_extension: bool = False,
) -> torch._ops.OpOverload:
    """The op sisa::``name``, whose schema is that of ``eager``, which runs it on every device.

    Args:
        fake: of the same arguments, results without values.
        backward, setup_context: as in ``torch.library.register_autograd``.
        mutates: the arguments that it changes.
        in_extension: the compiled extension has kernels of it, which go before ``eager`` on their
            devices. Then sisa::``name``_eager is the same op by ``eager`` alone: the kernels hand
            it fp64, and :func:`sisa_kernels.paths.augment` all where they are wrong.
    """
    schema = torch.library.infer_schema(eager, mutates_args=mutates)
    compiled = hasattr(torch.ops.sisa, name)
    if in_extension and _extension.LOADED and not compiled:
        warnings.warn(
            f"sisa_kernels runs sisa::{name} in plain PyTorch: its compiled extension is of older "
            f"sources. To build it: {_extension.REBUILD}",
            RuntimeWarning,
            stacklevel=3,
        )
    undefined = f"{name}_eager" if compiled else name
    library.define(undefined + schema, tags=(torch.Tag.pt2_compliant_tag,))
    for op in {name, undefined}:
        library.impl(op, eager, "CompositeExplicitAutograd")
        torch.library.register_fake(f"sisa::{op}", fake, lib=library)
        if backward is not None:
            torch.library.register_autograd(
                f"sisa::{op}", backward, setup_context=setup_context, lib=library
            )
    return getattr(torch.ops.sisa, name).default


def no_second_derivative(ctx: Any, *grads: Tensor) -> NoReturn:
    """The backward of the backward ops: an error, where autograd's would be a wrong gradient."""
    raise RuntimeError(
        "SISA's operators are differentiable once: no double backward (create_graph=True), "
        "nested grad or hessian"
    )


def refuse_forward_mode(*tensors: Tensor) -> None:
    """An error where PyTorch would take an op without a forward-mode derivative for a constant."""
    if torch.compiler.is_compiling():
        return
    if any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise NotImplementedError("SISA's operators have no forward-mode derivative (jvp)")


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Within it autocast is off, which would run the operators' fp32 products in half precision."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


_said: set[str] = set()


def say_once(message: str, stacklevel: int = 3) -> None:
    """Warn of ``message`` the first time it is given; in a compiled call, while that is traced."""
    if message not in _said:
        _said.add(message)
        warnings.warn(message, stacklevel=stacklevel)


# What torch.compiler.assume_constant_result sets, which would load TorchDynamo, 4 s.
say_once._dynamo_marked_constant = True  # type: ignore[attr-defined]
