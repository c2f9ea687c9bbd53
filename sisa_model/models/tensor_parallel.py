"""Tensor parallel: each process has some heads, some of the SwiGLU's width, some of the words.

Between them lies the residual stream, split along the sequence (arXiv 2205.05198): a layer's halves
gather their normed input, compute with this process's rows of the projections in and columns of the
projection out, and scatter the sum of what all processes have. torch's ``parallelize_module``
applies the plan; every parameter becomes a DTensor on the mesh's one dimension."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import (
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from sisa_model.models.config import ModelConfig

SEQUENCE = Shard(1)  # of the residual stream [B, L, D]
OUT = ("W_O.weight", "w_down.weight")  # projections back to the residual stream


def tensor_refusal(config: ModelConfig, size: int) -> str | None:
    """Why ``size`` processes cannot share each layer of such a model, or None."""
    if "m" in config.layer_kinds or "h" in config.layer_kinds:
        return (
            "a Mamba mixer is not split: its in_proj is one matrix whose parts (z, x, B, C, dt) "
            "would each have to be cut by heads"
        )
    if config.n_kv_heads % size:
        return f"n_kv_heads = {config.n_kv_heads} is not a multiple of it"
    for name in ("d_ff", "vocab_size"):
        width = getattr(config, name)
        if width <= (size - 1) * _most(width, size):
            return f"{name} = {width} leaves a process without a part"
    return None


def _most(width: int, size: int) -> int:
    """The largest part of ``width``, cut as torch.chunk does."""
    return -(-width // size)


def parallelize(model: Any, mesh: DeviceMesh) -> None:
    """Share ``model``, a LanguageModel, out over the one dimension of ``mesh``, in place.

    Every process of ``mesh`` calls this with the same weights. The model takes and gives whole
    tensors as before; the gradient of :meth:`LanguageModel.hidden` is then taken as this process's
    share of a sum. Raises ValueError for a model that :func:`tensor_refusal` refuses."""
    if why := tensor_refusal(model.config, mesh.size()):
        raise ValueError(f"tensor_parallel must be 1, got {mesh.size()}: {why}")
    plan: dict[str, ParallelStyle] = {
        "embed": RowwiseParallel(
            input_layouts=Replicate(), output_layouts=SEQUENCE, use_local_output=False
        ),
        "layers.*.attn_norm": SequenceParallel(),
        "layers.*.attn": _SplitWidth(),
        "layers.*.ffn_norm": SequenceParallel(),
        "layers.*.ffn": _SplitWidth(),
        "final_norm": SequenceParallel(),
    }
    parallelize_module(model, mesh, plan, src_data_rank=None)
    model.final_norm.register_forward_hook(lambda norm, args, states: _whole(states))
    for layer in model.layers:
        layer.attn.share_heads(mesh.get_local_rank(), mesh.size())


class _SplitWidth(ParallelStyle):
    """A module between residual streams: its projections in by rows, the one out by columns.

    Its forward runs on whole tokens and this process's weights, as plain tensors: packed
    projections stay one product, and widths need not be multiples of the number of processes."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        distribute_module(module, device_mesh, self._split)
        module.register_forward_pre_hook(lambda module, args: (_gather(args[0]), *args[1:]))
        module.register_forward_hook(lambda module, args, y: _scatter(y, device_mesh))
        return module

    @staticmethod
    def _split(name: str, module: nn.Module, mesh: DeviceMesh) -> None:
        for own, parameter in list(module.named_parameters(recurse=False)):
            path = f"{name}.{own}" if name else own
            shard = Shard(1) if path in OUT else Shard(0)
            # One lambda that all heads share is every process's.
            placement: Placement = Replicate() if parameter.numel() == 1 else shard
            split = distribute_tensor(parameter.data, mesh, [placement], src_data_rank=None)
            module.register_parameter(own, nn.Parameter(split, parameter.requires_grad))


def _gather(x: DTensor) -> Tensor:
    """The whole of x [B, L, D], whose gradient here is this process's share of a sum."""
    if torch.is_autocast_enabled(x.device.type):  # as the products would cast it
        return _whole(x.to(torch.get_autocast_dtype(x.device.type)))  # type: ignore[arg-type]
    return _whole(x)


def _whole(x: DTensor) -> Tensor:
    return x.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])


def _scatter(x: Tensor, mesh: DeviceMesh) -> DTensor:
    """The sum over all processes of x [B, L, D], split along the sequence."""
    shares = DTensor.from_local(x, mesh, [Partial()], run_check=False)
    return shares.redistribute(placements=[SEQUENCE])


def vocabulary_shard(weight: DTensor) -> slice:
    """Which rows of the split embedding this process holds."""
    words = weight.shape[0]
    most = _most(words, weight.device_mesh.size())
    first = min(most * weight.device_mesh.get_local_rank(), words)
    return slice(first, min(first + most, words))


def gather_logits(logits: Tensor, weight: DTensor) -> Tensor:
    """[..., V] of each process's [..., its words], by the embedding's ``weight``."""
    shape = (*logits.shape[:-1], weight.shape[0])
    strides = [1]
    for width in reversed(shape[1:]):
        strides.append(strides[-1] * width)
    split = DTensor.from_local(
        logits.contiguous(),
        weight.device_mesh,
        [Shard(logits.ndim - 1)],
        run_check=False,
        shape=shape,  # type: ignore[arg-type]
        stride=tuple(reversed(strides)),
    )
    return split.full_tensor()
