"""How operators are registered, and what all do alike: refuse, leave autocast, say it once."""

import contextlib
import functools
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from sisa_kernels import _extension as _  # noqa: F401  its kernels, before their schemas
from sisa_kernels.transforms import follow_transforms

CAST_BY_AUTOCAST = (torch.float32, torch.bfloat16, torch.float16)

library = torch.library.Library("sisa", "FRAGMENT")


def register(
    name: str,
    eager: Callable,
    fake: Callable,
    backward: Callable | None = None,
    setup_context: Callable | None = None,
    *,
    results: tuple[str, ...] = ("y", "lse"),
    mutates: tuple[str, ...] = (),
    in_library: bool = False,
) -> torch._ops.OpOverload:
    """The op sisa::``name``, whose schema is that of ``eager``, which runs it on every device.

    Autocast is off inside: a backward has the forward's precision wherever it is called.

    Args:
        fake: of the same arguments, results without values.
        backward, setup_context: as in ``torch.library.register_autograd``; they also serve under
            torch.func (:mod:`sisa_kernels.transforms`).
        results: their names; of a backward op they are its operands' gradients.
        mutates: the arguments that it changes.
        in_library: the compiled library has kernels of it, which where it is loaded go before
            ``eager`` on their devices. sisa::``name``_eager is then the same op by ``eager`` alone:
            for what the kernels do not take (fp64) and where they are found wrong.
    """
    schema = torch.library.infer_schema(eager, mutates_args=mutates)
    for op in (name, f"{name}_eager") if in_library else (name,):
        if hasattr(torch.ops.sisa, op):  # a second import: what the first registered stays
            continue
        library.define(op + schema, tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(op, _out_of_autocast(eager), "CompositeExplicitAutograd")
        torch.library.register_fake(f"sisa::{op}", fake, lib=library)
        if backward is not None:
            torch.library.register_autograd(
                f"sisa::{op}", backward, setup_context=setup_context, lib=library
            )
            named = None if backward is no_second_derivative else results
            overload = getattr(torch.ops.sisa, op).default
            follow_transforms(library, overload, backward, setup_context, named)
    return getattr(torch.ops.sisa, name).default


def _out_of_autocast(function: Callable) -> Callable:
    """``function`` of tensors and others, run without autocast on the device of the first."""

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        first = next(x for x in args if isinstance(x, Tensor))
        with without_autocast(first.device):
            return function(*args)

    return run


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


class _Matmul(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:  # type: ignore[override]
        with without_autocast(a.device):
            return a @ b

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        a, b = ctx.saved_tensors
        da = matmul(dy, b.mT) if ctx.needs_input_grad[0] else None
        db = matmul(a.mT, dy) if ctx.needs_input_grad[1] else None
        return da, db


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """``a b`` of [..., n, k] and [..., k, m], of like batches, in their dtype under autocast, too.

    So are its gradients, where those of PyTorch's own follow the autocast that backward runs under.
    """
    if torch.compiler.is_compiling():
        return a @ b
    return _Matmul.apply(a, b)


def of_one_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors; under autocast, where their dtypes differ, each in autocast's, as SDPA's are.

    fp64 stays, which autocast leaves alone."""
    dtypes = {x.dtype for x in tensors if isinstance(x, Tensor)}
    device = tensors[0].device.type if dtypes and isinstance(tensors[0], Tensor) else "meta"
    if len(dtypes) < 2 or device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) if x.dtype in CAST_BY_AUTOCAST else x for x in tensors)


_said: set[str] = set()


def say_once(message: str, stacklevel: int = 3) -> None:
    """Warn of ``message`` the first time it is given; in a compiled call, while that is traced."""
    if message not in _said:
        _said.add(message)
        warnings.warn(message, stacklevel=stacklevel)


# What torch.compiler.assume_constant_result sets, which would load TorchDynamo, 4 s.
say_once._dynamo_marked_constant = True  # type: ignore[attr-defined]
