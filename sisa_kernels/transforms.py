"""The registered operators under torch.func: grad, vjp, jacrev and vmap, in any nesting.

``torch.library.register_autograd`` alone knows PyTorch's own tape. Under a transform an op goes
through an ``autograd.Function`` of the same gradient instead, and vmap's dimension becomes more
heads: a head has its own lam and shares nothing but RoPE's tables and the documents' bounds."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# The axis of the heads of an argument or result, 2 ([B, L, H, ...]) where it is not named here.
HEADS = {"lam": 0, "lse": 1, "dlse": 1, "needed": 1}
SHARED = frozenset(("cos", "sin", "bounds", "cu_seqlens"))  # what all heads have in common
OPERANDS = ("q", "k", "v", "b", "c", "log_decay", "theta", "lam", "log_forget")


def gradient_names(call: dict[str, Any]) -> tuple[str, ...]:
    """The results of a backward op, by the operands whose gradients they are."""
    if "wanted" in call:
        return tuple(name for name, one in zip(OPERANDS, call["wanted"]) if one)
    return tuple(name for name in OPERANDS if call.get(name) is not None)


def follow_transforms(
    library: torch.library.Library,
    op: torch._ops.OpOverload,
    backward: Callable,
    setup_context: Callable | None,
    results: tuple[str, ...] | None,
) -> None:
    """Let ``op`` run under torch.func, with the derivative given to ``register_autograd``.

    ``results``: the names of what it returns; None: gradients of its operands."""
    arguments = op._schema.arguments
    returns_list = len(op._schema.returns) == 1

    class Transformed(torch.autograd.Function):
        @staticmethod
        def forward(*args: Any) -> tuple[Tensor, ...]:
            return tuple(op(*args))

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
            if setup_context is not None:
                setup_context(ctx, inputs, output)

        @staticmethod
        def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[tuple[Tensor, ...], Any]:
            call = {argument.name: x for argument, x in zip(arguments, args)}
            dims = {name: dim for name, dim in zip(call, in_dims) if isinstance(call[name], Tensor)}
            if any(dims.get(name) is not None for name in SHARED):
                found = _one_by_one(op, call, dims, info.batch_size)
            else:
                names = results or gradient_names(call)
                found = _as_heads(op, call, dims, info.batch_size, names)
            return found, (0,) * len(found)

    Transformed.backward = staticmethod(backward)  # type: ignore[method-assign]

    def under_transforms(*args: Any) -> Any:
        # The dispatcher leaves defaults out.
        rest = (argument.default_value for argument in arguments[len(args) :])
        found = Transformed.apply(*args, *rest)
        return list(found) if returns_list else found

    library.impl(op._schema.name, under_transforms, "FuncTorchDynamicLayerFrontMode")


def _as_heads(
    op: Callable, call: dict[str, Any], dims: dict[str, int | None], size: int, names: Any
) -> tuple[Tensor, ...]:
    """One call for all samples, each of which is a group of heads."""
    folded = dict(call)
    for name in dims.keys() - SHARED:
        x = call[name]
        dim = dims[name]
        x = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
        axis = HEADS.get(name, 2)
        folded[name] = x.movedim(0, axis).flatten(axis, axis + 1)
    found = []
    for name, x in zip(names, op(*folded.values())):
        axis = HEADS.get(name, 2)
        found.append(x.unflatten(axis, (size, x.shape[axis] // size)).movedim(axis, 0))
    return tuple(found)


def _one_by_one(
    op: Callable, call: dict[str, Any], dims: dict[str, int | None], size: int
) -> tuple[Tensor, ...]:
    """A call for each sample: where samples differ in what all heads share."""
    found = []
    for n in range(size):
        sample = {
            name: x if dims.get(name) is None else x.select(dims[name], n)
            for name, x in call.items()
        }
        found.append(tuple(op(*sample.values())))
    return tuple(torch.stack(results) for results in zip(*found))
