"""Processes launched by torchrun: what they agree on, how they share a model, tokens, gradients.

They stand in a grid of dp x cp x tp. Along dp each takes sequences of its own, along cp pieces of
the same sequences, along tp heads and widths of the same layers. Gradients are summed, and FSDP
shards, over dp x cp."""

import contextlib
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Replicate
from torch.nn.parallel import DistributedDataParallel

from sisa_kernels import SequenceLayout
from sisa_model.models.health import Health, health
from sisa_model.models.language_model import LanguageModel
from sisa_model.models.linear import TENSOR
from sisa_model.models.tensor_parallel import parallelize
from sisa_model.runs.config import Sharing
from sisa_model.training.loss import Objective, Piece

# For a process that hangs: one that dies closes its connections, which is seen at once.
TIMEOUT = timedelta(minutes=5)
T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """The processes of a run, and this one's place among them.

    Neighbours in ``rank`` differ along tp first, then along cp: what talks most is nearest."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    context: int = 1
    """Processes that a sequence is cut over, cp."""
    tensor: int = 1
    """Processes that a layer is cut over, tp."""

    def arranged(self, context: int, tensor: int) -> "World":
        """The same processes in a grid; ValueError if they do not fill one."""
        if self.size % (context * tensor):
            several = "; launch several with torchrun" if self.size == 1 else ""
            raise ValueError(
                f"context_parallel = {context} times tensor_parallel = {tensor} must divide the "
                f"number of processes, got {self.size}{several}"
            )
        return replace(self, context=context, tensor=tensor)

    @property
    def main(self) -> bool:
        """True in the one process that prints and writes."""
        return self.rank == 0

    @property
    def sharers(self) -> int:
        """Processes that have tokens of their own and so a share of every gradient, dp x cp."""
        return self.size // self.tensor

    @property
    def copies(self) -> int:
        """Processes that are given the same sequences, cp x tp."""
        return self.context * self.tensor

    def layout(self, length: int, cu_seqlens: Tensor | None = None) -> SequenceLayout | None:
        """Which process along cp has which tokens of a sequence; None where one has them all."""
        if self.context == 1:
            return None
        return SequenceLayout.balanced(length, self.context, cu_seqlens)

    @property
    def place_in_context(self) -> int:
        """This process's place along cp."""
        return self.rank // self.tensor % self.context

    def sum(self, values: Sequence[float | Tensor], alike: int = 1) -> list[float]:
        """Each value summed over the processes, which all call this with as many values.

        ``alike`` processes each have the same values, which count once."""
        found = torch.tensor([float(x) for x in values], dtype=torch.float64)
        if self.size > 1:
            dist.all_reduce(found)
        return (found / alike).tolist()

    def from_main(self, function: Callable[[], T]) -> T:
        """In every process what ``function`` returns in the main one, or the error it raises."""
        if self.size == 1:
            return function()
        outcome: list[Any] = [None, None]
        if self.main:
            try:
                outcome[0] = function()
            except Exception as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, device=torch.device("cpu"))
        result, raised = outcome
        if raised is not None:
            raise raised
        return result

    def share(self, count: int) -> tuple[range, int]:
        """Which of ``count`` rows are this process's, and how many short of the largest share."""
        most = -(-count * self.copies // self.size)
        place = self.rank // self.copies
        mine = range(count)[place * most : (place + 1) * most]
        return mine, most - len(mine)


@contextlib.contextmanager
def world() -> Iterator[World]:
    """The world that torchrun describes in the environment, or this process alone.

    gloo serves CPU tensors, NCCL CUDA's."""
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        yield World()
        return
    rank = int(os.environ.get("RANK", 0))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    begun = dist.is_initialized()
    if not begun:
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(local_rank % torch.cuda.device_count())
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=TIMEOUT)
    yield World(rank, size, local_rank)
    # Not after an error: the others may be gone, and exiting without a farewell is what ends them.
    if not begun:
        dist.destroy_process_group()


def replicated(model: nn.Module) -> list[nn.Parameter]:
    """What FSDP leaves whole and fp32: all but the matrices of linear layers and embeddings.

    It is little, and what autocast, too, leaves in fp32: norms, convolutions, gates, lambda."""
    matrices = {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, (nn.Linear, nn.Embedding))
    }
    return [parameter for parameter in model.parameters() if id(parameter) not in matrices]


def shard(model: LanguageModel, mesh: DeviceMesh, whole: list[nn.Parameter], bf16: bool) -> None:
    """Let FSDP share ``model``, but for the parameters ``whole``, among the processes of ``mesh``.

    With ``bf16`` the layers' matrices are gathered as autocast would cast them. The embedding is
    gathered in fp32: its rows are the residual stream's first term."""
    fp32 = MixedPrecisionPolicy(cast_forward_inputs=False, reduce_dtype=torch.float32)
    half = replace(fp32, param_dtype=torch.bfloat16)
    # Of the final states over tensor parallel, into which nobody writes. Not around each call: that
    # would make Python forget what it has said once.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    settings: dict[str, Any] = {
        "mesh": mesh,
        "ignored_params": set(whole),
    }
    for layer in model.layers:
        fully_shard(layer, mp_policy=half if bf16 else fp32, **settings)
    # The embedding is used again by the loss, after hidden() has returned: the root stays gathered
    # until the backward.
    fully_shard(model, reshard_after_forward=False, mp_policy=fp32, **settings)
    register_fsdp_forward_method(model, "hidden")


@dataclass(frozen=True)
class Meshes:
    """The meshes of several processes: what each dimension of their grid shares."""

    sharers: DeviceMesh
    """dp x cp: FSDP shards parameters over it, gradients are summed over it."""
    context: DeviceMesh
    """cp: pieces of one sequence."""
    tensor: DeviceMesh
    """tp: heads and widths of one layer."""

    @classmethod
    def of(cls, world: World, device: str) -> "Meshes":
        """Those of ``world``, on devices of a type; every process calls this."""
        # FSDP over tensor parallel wants one mesh that has both as dimensions.
        parameters = init_device_mesh(
            device, (world.sharers, world.tensor), mesh_dim_names=("dp_cp", TENSOR)
        )
        grid = (world.size // world.copies, world.context, world.tensor)
        tokens = init_device_mesh(device, grid, mesh_dim_names=("dp", "cp", TENSOR))
        return cls(parameters["dp_cp"], tokens["cp"], parameters[TENSOR])


class Parallel:
    """A model's objective on the processes of ``world``.

    "ddp": whole copies over dp x cp; "fsdp": sharded over it layer by layer; "single": what one
    process has. Over tp each layer is split, whatever the kind.

    Args:
        objective: on its device, with the same weights in every process. Its model is split and
            sharded in place.
        kind: ddp, fsdp, or auto: ddp.
        bf16: FSDP gathers the layers' matrices in bf16 and reduces gradients in fp32; sharded
            weights stay fp32.

    ``parameters`` are the leaves that the optimizer steps, by name. FSDP neither shards nor casts
    those of :func:`replicated`."""

    def __init__(self, objective: Objective, world: World, kind: Sharing, bf16: bool):
        self.objective = objective
        self.world = world
        self.kind = "single" if world.size == 1 else kind.replace("auto", "ddp")
        self._call: nn.Module = objective
        self._summed_here: list[nn.Parameter] = []
        """Those whose gradients neither DDP nor FSDP sums."""
        if world.size > 1:
            self._share(bf16)
        self.parameters = dict(objective.model.named_parameters())

    def _share(self, bf16: bool) -> None:
        model = self.objective.model
        self.meshes = Meshes.of(self.world, model.embed.weight.device.type)
        if self.world.context > 1:
            self.objective.group = self.meshes.context.get_group()
        if self.world.tensor > 1:
            parallelize(model, self.meshes.tensor)
        if self.kind == "fsdp":
            self._summed_here = replicated(model)
            shard(model, self.meshes.sharers, self._summed_here, bf16)
        elif self.world.tensor > 1:  # DDP takes no split parameters
            self._summed_here = list(model.parameters())
        else:
            group = self.meshes.sharers.get_group()
            self._call = DistributedDataParallel(
                self.objective, process_group=group, gradient_as_bucket_view=True
            )

    def backward(self, piece: Piece, weight: float, last: bool) -> Tensor:
        """Add the gradients of ``weight`` x this process's sum of losses, and return that sum.

        The processes share what has been added when ``last`` is true."""
        model = self.objective.model
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(last)
        quiet = isinstance(self._call, DistributedDataParallel) and not last
        with self._call.no_sync() if quiet else contextlib.nullcontext():  # type: ignore[operator]
            loss = self._call(*piece)
            # All average over processes, where the sum is wanted.
            weighted = loss * (weight * self.world.sharers)
            weighted.backward()
        return loss.detach()

    def clip(self, limit: float) -> Tensor:
        """Scale the gradients down to norm ``limit`` if theirs is larger; their norm before.

        A scalar on their device, for which nothing has waited."""
        if not self._summed_here:
            return torch.nn.utils.clip_grad_norm_(self.parameters.values(), limit)
        grads = [_settled(p) for p in self.parameters.values() if p.grad is not None]
        self._average([_own(p.grad) for p in self._summed_here if p.grad is not None])
        by_copies: dict[int, list[Tensor]] = {}
        for grad in grads:
            by_copies.setdefault(self.world.size // _shards(grad), []).append(_own(grad))
        squares = [
            torch.nn.utils.get_total_norm(alike).double().square() / copies
            for copies, alike in by_copies.items()
        ]
        total = torch.stack(squares).sum()
        dist.all_reduce(total)
        norm = total.sqrt()
        scale = (limit / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_([_own(grad) for grad in grads], scale.float())
        return norm

    def _average(self, grads: list[Tensor]) -> None:
        """Average fp32 ``grads`` over dp x cp, all in one reduction."""
        summed = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(summed, group=self.meshes.sharers.get_group())
        parts = summed.div_(self.world.sharers).split([grad.numel() for grad in grads])
        torch._foreach_copy_(grads, [part.view_as(grad) for part, grad in zip(parts, grads)])

    @torch.no_grad()
    def answers(self, inputs: Tensor, asked: Tensor) -> Tensor:
        """The likeliest next token at each place of ``inputs`` that is ``asked``, both [B, L].

        All processes that have the same sequences call this."""
        model = self.objective.model
        inputs, layout = self._cut(inputs)
        states = model.hidden(inputs, group=self.objective.group, layout=layout)
        if layout is None:
            return model.logits(states[asked]).argmax(-1)
        place = self.world.place_in_context
        numbers = (asked.flatten().cumsum(0) - 1).view_as(asked)
        numbers, here = (layout.shard(x, place).to(states.device) for x in (numbers, asked))
        all_asked = states.new_zeros(int(asked.sum()), states.shape[-1])
        all_asked[numbers[here]] = states[here]
        dist.all_reduce(all_asked, group=self.objective.group)
        return model.logits(all_asked).argmax(-1)

    def health(self, inputs: Tensor) -> list[Health]:
        """The health of all layers on ``inputs`` [B, L].

        All processes that have the same sequences call this."""
        inputs, layout = self._cut(inputs)
        layers = health(self.objective.model, inputs, self.objective.group, layout)
        if self.world.tensor == 1:
            return layers
        found: list[Any] = [None] * self.world.tensor
        dist.all_gather_object(found, layers, self.meshes.tensor.get_group())
        return [Health.of_parts(parts) for parts in zip(*found)]

    def _cut(self, inputs: Tensor) -> tuple[Tensor, SequenceLayout | None]:
        """This process's tokens of ``inputs`` [B, L], on its device."""
        layout = self.world.layout(inputs.shape[1])
        if layout is not None:
            inputs = layout.shard(inputs, self.world.place_in_context)
        return inputs.to(self.objective.model.embed.weight.device), layout

    def whole(self) -> dict[str, Tensor]:
        """The parameters by name, gathered in every process; all must call this."""
        return {name: gathered(p.detach()) for name, p in self.parameters.items()}


def gathered(x: Tensor) -> Tensor:
    """The whole of a parameter."""
    if not isinstance(x, DTensor):
        return x
    # One dimension after the other, as torch would, which warns of it.
    for dim in range(x.device_mesh.ndim):
        x = x.redistribute(placements=[Replicate()] * (dim + 1) + [*x.placements[dim + 1 :]])
    return x.to_local()


def _settled(parameter: nn.Parameter) -> Tensor:
    """The gradient of ``parameter`` placed as that is: summed where each process has a share."""
    grad = parameter.grad
    assert grad is not None
    if isinstance(parameter, DTensor) and isinstance(grad, DTensor):
        grad = parameter.grad = grad.redistribute(placements=parameter.placements)
    return grad


def _own(grad: Tensor) -> Tensor:
    """This process's part of a gradient."""
    return grad.to_local() if isinstance(grad, DTensor) else grad


def _shards(grad: Tensor) -> int:
    """In how many parts a gradient lies on different processes."""
    if not isinstance(grad, DTensor):
        return 1
    placements = enumerate(grad.placements)
    sizes = (grad.device_mesh.size(i) for i, kind in placements if not kind.is_replicate())
    return math.prod(sizes)
