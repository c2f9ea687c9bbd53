"""Bias-free linear layers: aligned rows, packed projections, parameters that stay fp32."""

from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.nn.modules.module import _has_any_global_hook

from sisa_model.utils.buffers import CACHE_LINE, empty_aligned

ALIGNED = CACHE_LINE // 4  # fp32 numbers in a line
HALF = (torch.bfloat16, torch.float16)
PLAIN = {Tensor, nn.Parameter}
PADDED = 64  # to a multiple of this: a tile of any kernel's, and 16 bytes many times over
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
        or not {type(x), type(weight)} <= PLAIN  # sharded, quantised
        or torch.is_autocast_enabled("cpu")
        or torch.compiler.is_compiling()
        or x.numel() < MANY_ROWS * x.shape[-1]
    )
    if stock or not any(width % ALIGNED for width in weight.shape):
        return F.linear(x, weight)
    return _AlignedLinear.apply(x, weight)


def alignment(device: torch.device, dtype: torch.dtype) -> int:
    """To what multiple the widths of products of ``dtype`` on ``device`` are padded; 1: not.

    On a GPU in half precision rows that are no multiple of 16 bytes send a product to kernels that
    load single numbers; the copy that a cast makes anyway can be as wide as one likes."""
    return PADDED if device.type == "cuda" and dtype in HALF else 1


def padded_width(width: int, device: torch.device, dtype: torch.dtype) -> int:
    """``width``, or where :func:`alignment` asks for it and 16 do not divide it, a multiple."""
    if width % ALIGNED == 0:
        return width
    multiple = alignment(device, dtype)
    return -(-width // multiple) * multiple


class Linear(nn.Linear):
    """A bias-free ``nn.Linear`` by :func:`linear`: hooks and replacements (LoRA) see its input."""

    def __init__(self, d_in: int, d_out: int, device: torch.device | str | None = None):
        super().__init__(d_in, d_out, bias=False, device=device)

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is not None:  # given to it later
            return super().forward(x)
        weight = local(self.weight)
        if alignment(x.device, HALF[0]) == 1 or type(weight) not in PLAIN:
            return linear(x, weight)
        return _padded_linear(x, weight) if _packing_pays(x, [weight]) else linear(x, weight)


def _padded_linear(x: Tensor, weight: Tensor) -> Tensor:
    """:func:`linear` of x [..., width >= d_in], 0 past d_in, by a padded copy where it serves."""
    dtype = _product_dtype(x, weight)
    rows = padded_width(len(weight), x.device, dtype)
    if (rows, x.shape[-1]) == weight.shape:
        return linear(x, weight)
    return linear(x, pack([weight], dtype, [rows], x.shape[-1]))[..., : len(weight)]


def call_padded(module: nn.Module, x: Tensor, d_in: int) -> Tensor:
    """``module``, of d_in columns, of x [..., width >= d_in], whose columns past d_in are 0.

    By one product with a copy of its weight of x's width where it is a plain :class:`Linear`, else
    by a call with the first d_in columns."""
    if x.shape[-1] == d_in:
        return module(x)
    if weights := _plain_weights([module]):
        return _padded_linear(x, weights[0])
    return module(x[..., :d_in])


class _CastAndPack(torch.autograd.Function):
    """Matrices below each other, with zeros around, in another dtype: a cast's one copy."""

    generate_vmap_rule = True

    @staticmethod
    def forward(dtype, slots, columns, *weights):
        packed = weights[0].new_empty(sum(slots), columns, dtype=dtype)
        width = weights[0].shape[1]
        parts = packed.split(slots)
        filled = [part[: len(weight), :width] for part, weight in zip(parts, weights)]
        torch._foreach_copy_(filled, list(weights))
        rest = [part[len(weight) :] for part, weight in zip(parts, weights)] + [packed[:, width:]]
        for zeros in rest:
            if zeros.numel():
                zeros.zero_()
        return packed

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.slots, _, *weights = inputs
        ctx.heights = [len(weight) for weight in weights]
        ctx.width = weights[0].shape[1]
        ctx.dtype = weights[0].dtype

    @staticmethod
    def backward(ctx, dpacked):
        parts = dpacked[:, : ctx.width].to(ctx.dtype).split(ctx.slots)
        return None, None, None, *(part[:height] for part, height in zip(parts, ctx.heights))


def pack(
    weights: list[Tensor],
    dtype: torch.dtype,
    slots: list[int] | None = None,
    columns: int | None = None,
) -> Tensor:
    """The ``weights`` [height, d_in], of one dtype, below each other: [sum of slots, columns].

    In ``dtype``; each, where slots are given, in its own of at least its height, with zeros below,
    and on the right where columns are more than d_in."""
    if weights[0].dtype != dtype and not torch.compiler.is_compiling():
        slots = slots or [len(weight) for weight in weights]
        return _CastAndPack.apply(dtype, slots, columns or weights[0].shape[1], *weights)
    if slots is not None:
        d_in = weights[0].shape[1]
        right = (columns or d_in) - d_in
        rows = [slot - len(weight) for weight, slot in zip(weights, slots)]
        weights = [F.pad(weight, (0, right, 0, below)) for weight, below in zip(weights, rows)]
    return torch.cat(weights).to(dtype)  # a compiler makes one copy of all


class PackedLinear(nn.Module):
    """Several bias-free projections of one input, each a :class:`Linear` under its own name.

    ``forward(x [..., d_in])`` returns [..., width] of each, in their order: as long as all of them
    are plain, by one product with their weights copied below each other, which under autocast is
    the copy that the cast makes anyway; on a GPU in half precision padded (:func:`padded_width`),
    so that every token's row is aligned. Once one has been replaced, hooked or parametrised, and
    where the copy would cost more than it saves, each is called by itself. With ``padded`` each
    result of one product may be as wide as products like it, with zeros behind its width.

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

    def forward(self, x: Tensor, padded: bool = False) -> tuple[Tensor, ...]:
        weights = self._packable(x)
        if not weights:
            return tuple(child(x) for child in self._children())
        product, slots = _packed_product(x, weights, padded)
        return product.split(slots or [len(w) for w in weights], -1)[: len(weights)]

    def side_by_side(self, x: Tensor, padded: bool = False) -> Tensor:
        """What :meth:`forward` returns as one, [..., sum of widths]: no copy of one product."""
        weights = self._packable(x)
        if not weights:
            return torch.cat([child(x) for child in self._children()], -1)
        product, slots = _packed_product(x, weights, padded)
        return product[..., : -slots[-1]] if len(slots) > len(weights) else product

    def _children(self) -> list[Any]:
        return [self._modules[name] for name in self.sizes]  # quicker than getattr

    def _packable(self, x: Tensor) -> list[Tensor]:
        """The weights that one product takes; none where each is to be called by itself."""
        weights = _plain_weights(self._children())
        return weights if weights and _packing_pays(x, weights) else []


def _packed_product(x: Tensor, weights: list[Tensor], padded: bool) -> tuple[Tensor, list[int]]:
    """x by all ``weights`` side by side, and the widths, where they are padded.

    With ``padded`` each by itself, else all together: then one more width is what is behind."""
    dtype = _product_dtype(x, weights[0])
    if alignment(x.device, dtype) == 1:
        return linear(x, pack(weights, dtype)), []
    slots = [len(weight) for weight in weights]
    if padded:
        slots = [padded_width(slot, x.device, dtype) for slot in slots]
    total = sum(slots)
    rest = padded_width(total, x.device, dtype) - total
    product = linear(x, pack(weights, dtype, [*slots[:-1], slots[-1] + rest]))
    return product, [*slots, rest] if rest else slots


def _plain_weights(modules: list[Any]) -> list[Tensor]:
    """The weights of ``modules``, all of one dtype; none unless each is a plain :class:`Linear`.

    Plain: not replaced, hooked, parametrised, sharded or quantised."""
    unchanged = all(type(module) is Linear and not _is_changed(module) for module in modules)
    if not unchanged or _has_any_global_hook():
        return []
    weights = [local(module._parameters.get("weight")) for module in modules]
    dtype = getattr(weights[0], "dtype", None)
    plain = all(type(weight) in PLAIN and weight.dtype == dtype for weight in weights)
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
