"""Processes launched by torchrun: what they agree on, how they share gradients (DDP, FSDP2)."""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from sisa_model.models.language_model import LanguageModel
from sisa_model.runs.config import Sharing
from sisa_model.training.loss import Objective

# For a process that hangs: one that dies closes its connections, which is seen at once.
TIMEOUT = timedelta(minutes=5)
T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """The processes of a run, and this one's place among them."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def main(self) -> bool:
        """True in the one process that prints and writes."""
        return self.rank == 0

    def sum(self, values: Sequence[float | Tensor]) -> list[float]:
        """Each value summed over the processes, which all call this with as many values."""
        found = torch.tensor([float(x) for x in values], dtype=torch.float64)
        if self.size > 1:
            dist.all_reduce(found)
        return found.tolist()

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
        most = -(-count // self.size)
        mine = range(count)[self.rank * most : (self.rank + 1) * most]
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


def shard(model: LanguageModel, size: int, whole: list[nn.Parameter], bf16: bool) -> None:
    """Let FSDP share ``model``, but for the parameters ``whole``, among ``size`` processes.

    With ``bf16`` the layers' matrices are gathered as autocast would cast them. The embedding is
    gathered in fp32: its rows are the residual stream's first term."""
    fp32 = MixedPrecisionPolicy(cast_forward_inputs=False, reduce_dtype=torch.float32)
    half = dataclasses.replace(fp32, param_dtype=torch.bfloat16)
    settings: dict[str, Any] = {
        "mesh": init_device_mesh(model.embed.weight.device.type, (size,)),
        "ignored_params": set(whole),
    }
    for layer in model.layers:
        fully_shard(layer, mp_policy=half if bf16 else fp32, **settings)
    # The embedding is used again by the loss, after hidden() has returned: the root stays gathered
    # until the backward.
    fully_shard(model, reshard_after_forward=False, mp_policy=fp32, **settings)
    register_fsdp_forward_method(model, "hidden")


class Parallel:
    """A model's objective on the processes of ``world``.

    "ddp": whole copies; "fsdp": sharded layer by layer; "single": what one process has.

    Args:
        objective: on its device, with the same weights in every process. FSDP shards its model in
            place.
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
        self._replicated: list[nn.Parameter] = []
        if self.kind == "ddp":
            self._call = DistributedDataParallel(objective, gradient_as_bucket_view=True)
        elif self.kind == "fsdp":
            self._replicated = replicated(objective.model)
            shard(objective.model, world.size, self._replicated, bf16)
        self.parameters = dict(objective.model.named_parameters())

    def backward(
        self, inputs: Tensor, targets: Tensor, cu_seqlens: Tensor | None, weight: float, last: bool
    ) -> Tensor:
        """Add the gradients of ``weight`` x this process's sum of losses, and return that sum.

        The processes share what has been added when ``last`` is true."""
        model = self.objective.model
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(last)
        quiet = isinstance(self._call, DistributedDataParallel) and not last
        with self._call.no_sync() if quiet else contextlib.nullcontext():  # type: ignore[operator]
            loss = self._call(inputs, targets, cu_seqlens)
            # Both average over processes, where the sum is wanted.
            weighted = loss * (weight * self.world.size)
            weighted.backward()
        return loss.detach()

    def clip(self, limit: float) -> Tensor:
        """Scale the gradients down to norm ``limit`` if theirs is larger; their norm before.

        A scalar on their device, for which nothing has waited."""
        if self.kind != "fsdp":
            return torch.nn.utils.clip_grad_norm_(self.parameters.values(), limit)
        whole = [p.grad for p in self._replicated if p.grad is not None]
        self._average(whole)
        grads = [p.grad for p in self.parameters.values()]
        shards = [grad.to_local() for grad in grads if isinstance(grad, DTensor)]
        squares = torch.nn.utils.get_total_norm(shards).double().square()
        dist.all_reduce(squares)
        norm = (squares + torch.nn.utils.get_total_norm(whole).double().square()).sqrt()
        scale = (limit / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_([*shards, *whole], scale.float())
        return norm

    def _average(self, grads: list[Tensor]) -> None:
        """Average fp32 ``grads`` over the processes, all in one reduction."""
        summed = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(summed)
        parts = summed.div_(self.world.size).split([grad.numel() for grad in grads])
        torch._foreach_copy_(grads, [part.view_as(grad) for part, grad in zip(parts, grads)])

    def whole(self) -> dict[str, Tensor]:
        """The parameters by name, gathered in every process; all must call this."""
        return {
            name: p.full_tensor() if isinstance(p, DTensor) else p.detach()
            for name, p in self.parameters.items()
        }
