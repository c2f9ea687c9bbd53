"""TODO sisa_model.models.linear"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ALIGNED = 16  # fp32 numbers in a cache line


def _matmul_aligned(a: Tensor, b: Tensor) -> Tensor:
    """``a b`` of two matrices, its rows beginning on cache lines whatever the width: a view of a
    buffer with wider rows.
    """
    width = b.shape[1]
    out = a.new_empty(a.shape[0], -(-width // ALIGNED) * ALIGNED)[:, :width]
    return torch.mm(a, b, out=out)


class _AlignedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return _matmul_aligned(x.flatten(0, -2), weight.t()).unflatten(0, x.shape[:-1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        rows, drows = x.flatten(0, -2), dy.flatten(0, -2)
        dx = _matmul_aligned(drows, weight).view(x.shape) if ctx.needs_input_grad[0] else None
        return dx, _matmul_aligned(drows.t(), rows) if ctx.needs_input_grad[1] else None


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """``x weight^T`` without bias, [..., d_in] and [d_out, d_in] -> [..., d_out].

    In fp32 on the CPU, where a width is no multiple of 16, with the rows of the result and of the
    gradients on cache lines: where they are not, the product takes 1.4 times as long (SISA's
    widths: 2,796 x 768 on one core 131 ms against 91)."""
    plain = (
        x.device.type != "cpu"
        or x.dtype != torch.float32
        or torch.is_autocast_enabled("cpu")
        or torch.compiler.is_compiling()
    )
    if plain or not any(width % ALIGNED for width in weight.shape):
        return F.linear(x, weight)
    return _AlignedLinear.apply(x, weight)


class Linear(nn.Linear):
    """``nn.Linear`` without bias by :func:`linear`: a module, so that hooks and what takes its
    place (LoRA, say) see its input.
    """

    def __init__(self, d_in: int, d_out: int):
        super().__init__(d_in, d_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


class PackedLinear(nn.Module):
    """Several bias-free projections of one input as one matrix product; the state dict holds each
    matrix under its own name.

    Args:
        d_in: input width.
        sizes: name -> output width, in the order of the outputs.

    ``forward(x [..., d_in])`` returns one view [..., width] a projection.
    """

    def __init__(self, d_in: int, sizes: dict[str, int]):
        super().__init__()
        self.sizes = sizes
        self.weight = nn.Parameter(torch.empty(sum(sizes.values()), d_in))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return linear(x, self.weight).split(list(self.sizes.values()), -1)

    def matrices(self) -> dict[str, Tensor]:
        """Views [width, d_in] of the packed weight by name."""
        return dict(zip(self.sizes, self.weight.split(list(self.sizes.values()))))

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        for name, matrix in self.matrices().items():
            destination[f"{prefix}{name}.weight"] = matrix if keep_vars else matrix.detach()

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        known = {f"{prefix}{name}.weight": matrix for name, matrix in self.matrices().items()}
        fitting = {}
        if strict:
            unexpected_keys += [
                key for key in state_dict if key.startswith(prefix) and key not in known
            ]
        for key, matrix in known.items():
            given = state_dict.get(key)
            if given is None:
                missing_keys.append(key)
            elif given.shape != matrix.shape:
                error_msgs.append(
                    f"size mismatch for {key}: {list(given.shape)} in the state dict, {list(matrix.shape)} in the model"
                )
            else:
                fitting[key] = given
        if local_metadata.get("assign_to_params_buffers", False) and fitting.keys() == known.keys():
            self.weight = nn.Parameter(
                torch.cat([*fitting.values()]).detach(), self.weight.requires_grad
            )
            return
        for key, given in fitting.items():
            if self.weight.is_meta and not given.is_meta:
                error_msgs.append(
                    f"{key} cannot be copied into a meta model; pass assign=True, or call to_empty before"
                )
            with torch.no_grad():
                known[key].copy_(given)


class Fp32Parameters(nn.Module):
    """A module whose parameters named in ``fp32`` stay fp32 and keep their bits, whatever the
    module is cast to.
    """

    fp32: tuple[str, ...] = ()

    def _apply(self, fn, recurse=True):
        kept = {name: getattr(self, name).detach() for name in self.fp32}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            parameter = getattr(self, name)
            if parameter.dtype != torch.float32:
                parameter.data = before.to(parameter.device)
        return self
