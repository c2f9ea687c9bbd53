"""Bias-free linear layers: aligned rows, packed projections, parameters that stay fp32."""

from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.nn.modules.module import _has_any_global_hook

from sisa_model.utils.buffers import CACHE_LINE, empty_aligned

ALIGNED = CACHE_LINE // 4  # fp32 numbers in a line
# Copying weights pays for many rows, or where they are so few that the calls count (measured: for
# one row the copy of the 2.1 million of a 152M layer takes 4 times as long as its products).
MANY_ROWS = 64
FEW_WEIGHTS = 2**17
TENSOR = "tp"  # the mesh dimension along which tensor parallel splits parameters


def is_split(parameter: Any) -> TypeGuard[DTensor]:
    """Whether tensor parallel splits this parameter."""
    return isinstance(parameter, DTensor) and parameter.device_mesh.mesh_dim_names == (TENSOR,)


def local(parameter: Tensor) -> Tensor:
    """This process's part of a parameter that tensor parallel splits; any other as it is."""
    if not is_split(parameter):
        return parameter
    # What every process has whole gets from each a share of its gradient.
    shares = [Partial() if isinstance(x, Replicate) else x for x in parameter.placements]
    return parameter.to_local(grad_placements=shares)


def _matmul_aligned(a: Tensor, b: Tensor) -> Tensor:
    """``a b`` of matrices into :func:`empty_aligned`."""
    return torch.mm(a, b, out=empty_aligned(a, a.shape[0], b.shape[1]))


class _AlignedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return _matmul_aligned(x.flatten(0, -2), weight.t()).unflatten(0, x.shape[:-1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        dy = dy.flatten(0, -2)
        dx = dweight = None
        if ctx.needs_input_grad[0]:
            dx = _matmul_aligned(dy, weight).view(x.shape)
        if ctx.needs_input_grad[1]:
            dweight = _matmul_aligned(dy.t(), x.flatten(0, -2))
        return dx, dweight


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """``x weight^T`` without bias, [..., d_in] and [d_out, d_in] -> [..., d_out].

    In fp32 on the CPU, of many rows, where a width is no multiple of 16, with the rows of the
    result and of the gradients on cache lines: where they are not, the product takes 1.4 times as
    long (SISA's widths: 2,796 x 768 on one core 131 ms against 91)."""
    stock = (
        x.device.type != "cpu"
        or x.dtype != torch.float32
        or not {type(x), type(weight)} <= {Tensor, nn.Parameter}  # sharded, quantised
        or torch.is_autocast_enabled("cpu")
        or torch.compiler.is_compiling()
        or x.numel() < MANY_ROWS * x.shape[-1]
    )
    if stock or not any(width % ALIGNED for width in weight.shape):
        return F.linear(x, weight)
    return _AlignedLinear.apply(x, weight)


class Linear(nn.Linear):
    """A bias-free ``nn.Linear`` by :func:`linear`: hooks and replacements (LoRA) see its input."""

    def __init__(self, d_in: int, d_out: int, device: torch.device | str | None = None):
        super().__init__(d_in, d_out, bias=False, device=device)

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is not None:  # given to it later
            return super().forward(x)
        return linear(x, local(self.weight))


class _CastAndPack(torch.autograd.Function):
    """Matrices of one width below each other in another dtype: the one copy that a cast makes."""

    generate_vmap_rule = True

    @staticmethod
    def forward(dtype, *weights):
        heights = [len(weight) for weight in weights]
        packed = weights[0].new_empty(sum(heights), weights[0].shape[1], dtype=dtype)
        torch._foreach_copy_(list(packed.split(heights)), list(weights))
        return packed

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, *weights = inputs
        ctx.heights = [len(weight) for weight in weights]
        ctx.dtype = weights[0].dtype

    @staticmethod
    def backward(ctx, dpacked):
        return None, *dpacked.to(ctx.dtype).split(ctx.heights)


def _pack(weights: list[Tensor], dtype: torch.dtype) -> Tensor:
    """The ``weights`` [height, d_in], of one dtype, below each other in ``dtype``."""
    if weights[0].dtype == dtype or torch.compiler.is_compiling():
        return torch.cat(weights).to(dtype)  # a compiler makes one copy of both
    return _CastAndPack.apply(dtype, *weights)


class PackedLinear(nn.Module):
    """Several bias-free projections of one input, each a :class:`Linear` under its own name.

    ``forward(x [..., d_in])`` returns [..., width] of each, in their order: as long as all of them
    are plain, by one product with their weights copied below each other, which under autocast is
    the copy that the cast makes anyway. Once one has been replaced, hooked or parametrised, and
    where the copy would cost more than it saves, each is called by itself.

    Args:
        d_in: input width.
        sizes: name -> output width.
        device, dtype: of the weights; None: torch's defaults.
    """

    def __init__(
        self,
        d_in: int,
        sizes: dict[str, int],
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.sizes = sizes
        for name, width in sizes.items():
            projection = Linear(d_in, width, device="meta")  # which draws nothing
            empty = torch.empty(width, d_in, device=device, dtype=dtype)
            projection.weight = nn.Parameter(empty)
            self.add_module(name, projection)

    @torch.no_grad()
    def reset_parameters(self, std: float) -> None:
        """Draw every weight from N(0, std^2), all in one draw, in their order."""
        weights = [self.get_parameter(f"{name}.weight") for name in self.sizes]
        heights = [len(weight) for weight in weights]
        drawn = weights[0].new_empty(sum(heights), weights[0].shape[1]).normal_(std=std)
        for weight, values in zip(weights, drawn.split(heights)):
            weight.copy_(values)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        parts = self._parts(x)
        if isinstance(parts, tuple):
            return parts
        return parts.split([len(local(child.weight)) for child in self._children()], -1)

    def side_by_side(self, x: Tensor) -> Tensor:
        """What :meth:`forward` returns as one, [..., sum of widths]: no copy of one product."""
        parts = self._parts(x)
        return torch.cat(parts, -1) if isinstance(parts, tuple) else parts

    def _children(self) -> list[Any]:
        return [self._modules[name] for name in self.sizes]  # quicker than getattr

    def _parts(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        """All projections side by side from one product, or one by one."""
        children = self._children()
        weights = _plain_weights(children)
        if not weights or not _packing_pays(x, weights):
            return tuple(child(x) for child in children)
        return linear(x, _pack(weights, _product_dtype(x, weights[0])))


def _plain_weights(modules: list[Any]) -> list[Tensor]:
    """The weights of ``modules``, all of one dtype; none unless each is a plain :class:`Linear`.

    Plain: not replaced, hooked, parametrised, sharded or quantised."""
    unchanged = all(type(module) is Linear and not _is_changed(module) for module in modules)
    if not unchanged or _has_any_global_hook():
        return []
    weights = [local(module._parameters.get("weight")) for module in modules]
    dtype = getattr(weights[0], "dtype", None)
    plain = all(
        type(weight) in (nn.Parameter, Tensor) and weight.dtype == dtype for weight in weights
    )
    return weights if plain else []


def _is_changed(module: nn.Module) -> bool:
    """Whether a call of ``module`` does something else than its class says, or more."""
    return bool(
        module._parameters.get("bias") is not None
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def _packing_pays(x: Tensor, weights: list[Tensor]) -> bool:
    """Whether one product of x and a copy of ``weights`` takes less time than a product each."""
    if torch.is_grad_enabled() or x.shape[:-1].numel() >= MANY_ROWS:
        return True
    return sum(weight.numel() for weight in weights) <= FEW_WEIGHTS


def _product_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """What autocast, where it is on, casts ``weight`` to for its product with x; else its own."""
    device = x.device.type
    if weight.dtype == torch.float64 or device == "meta" or not torch.is_autocast_enabled(device):
        return weight.dtype
    return torch.get_autocast_dtype(device)


class Fp32Parameters(nn.Module):
    """A module whose parameters in ``fp32`` stay fp32, with their bits, whatever it is cast to.

    A model may be built with them in bf16 (ModelConfig.weights): then they are cast as the rest."""

    fp32: tuple[str, ...] = ()

    def _apply(self, fn, recurse=True):
        kept = {name: getattr(self, name).detach() for name in self.fp32}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            parameter = getattr(self, name)
            if before.dtype == torch.float32 and parameter.dtype != torch.float32:
                parameter.data = before.to(parameter.device)
        return self
