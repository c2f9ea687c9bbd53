"""Many processes, launched by torchrun: what they agree on, and how they share a step's gradients
(DDP, FSDP2).
"""

import contextlib
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

from sisa_model.models.linear import Fp32Parameters
from sisa_model.training.loss import Objective

TIMEOUT = timedelta(
    minutes=5
)  # a process that dies closes its connections, which is seen at once; this is for one that hangs
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
        """What ``function`` returns in the main process, in every process; or its exception, raised
        in every process.
        """
        if self.size == 1:
            return function()
        outcome: list[Any] = [None, None]
        if self.main:
            try:
                outcome[0] = function()
            except Exception as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, device=torch.device("cpu"))
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def share(self, count: int) -> tuple[range, int]:
        """Which of ``count`` rows are this process's, and how many rows short of the largest share
        they are.
        """
        most = -(-count // self.size)
        mine = range(count)[self.rank * most : (self.rank + 1) * most]
        return mine, most - len(mine)


@contextlib.contextmanager
def world() -> Iterator[World]:
    """The world that torchrun describes in the environment (gloo for CPU tensors, NCCL for CUDA's),
    or this process alone.
    """
    size, rank, local_rank = (
        int(os.environ.get(name, alone))
        for name, alone in (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0))
    )
    if size == 1:
        yield World()
        return
    begun = dist.is_initialized()
    if not begun:
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(local_rank % torch.cuda.device_count())
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=TIMEOUT)
    yield World(rank, size, local_rank)
    if (
        not begun
    ):  # after an error the others may be gone: exiting without a farewell is what ends them
        dist.destroy_process_group()


def replicated(model: nn.Module) -> list[nn.Parameter]:
    """What FSDP leaves whole and fp32: what a module declares so, and every vector but a norm's
    weight (biases of decays, say).
    """
    declared = {
        id(getattr(m, name))
        for m in model.modules()
        if isinstance(m, Fp32Parameters)
        for name in m.fp32
    }
    norms = {id(m.weight) for m in model.modules() if isinstance(m, nn.RMSNorm)}
    return [
        p for p in model.parameters() if id(p) in declared or (p.ndim < 2 and id(p) not in norms)
    ]


class Parallel:
    """A model's objective on the processes of ``world``: "ddp" (whole copies), "fsdp" (sharded
    layer by layer), "single".

    Args:
        objective: on its device, with the same weights in every process. FSDP shards its model in
            place.
        kind: one of the three.
        bf16: FSDP gathers weights in bf16 and reduces gradients in fp32; sharded weights stay fp32.

    ``parameters`` are the leaves that the optimizer steps, by name. FSDP neither shards nor casts
    those of :func:`replicated`."""

    def __init__(self, objective: Objective, world: World, kind: str, bf16: bool):
        self.objective, self.world, self.kind = objective, world, kind
        self._call: nn.Module = objective
        self._replicated: list[nn.Parameter] = []
        model = objective.model
        if kind == "ddp":
            self._call = DistributedDataParallel(objective, gradient_as_bucket_view=True)
        elif kind == "fsdp":
            self._replicated = replicated(model)
            dtypes: dict[str, Any] = (
                {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32} if bf16 else {}
            )
            settings: dict[str, Any] = {
                "mesh": init_device_mesh(model.embed.weight.device.type, (world.size,)),
                "mp_policy": MixedPrecisionPolicy(cast_forward_inputs=False, **dtypes),
                "ignored_params": set(self._replicated),
            }
            for layer in model.layers:
                fully_shard(layer, **settings)
            # The embedding is used again by the loss, after hidden() has returned: the root stays
            # gathered until the backward.
            fully_shard(model, reshard_after_forward=False, **settings)
            register_fsdp_forward_method(model, "hidden")
        self.parameters = dict(model.named_parameters())

    def backward(
        self, inputs: Tensor, targets: Tensor, cu_seqlens: Tensor | None, weight: float, last: bool
    ) -> Tensor:
        """Add the gradients of ``weight`` x this process's sum of losses, and return that sum;
        shared when ``last`` is true.
        """
        model = self.objective.model
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(last)
        quiet = isinstance(self._call, DistributedDataParallel) and not last
        with self._call.no_sync() if quiet else contextlib.nullcontext():  # type: ignore[operator]
            loss = self._call(inputs, targets, cu_seqlens)
            (
                loss * (weight * self.world.size)
            ).backward()  # both average over processes; the sum is wanted
        return loss.detach()

    def clip(self, limit: float) -> float:
        """Scale the step's gradients down to norm ``limit`` if theirs is larger; returns the norm
        before.
        """
        if self.kind != "fsdp":
            return torch.nn.utils.clip_grad_norm_(self.parameters.values(), limit).item()
        replicated = [p.grad for p in self._replicated if p.grad is not None]
        for grad in replicated:
            dist.all_reduce(grad)
            grad /= self.world.size
        shards = [
            p.grad.to_local() for p in self.parameters.values() if isinstance(p.grad, DTensor)
        ]
        mine = torch.nn.utils.get_total_norm(shards).item() ** 2
        norm = (
            self.world.sum([mine])[0] + torch.nn.utils.get_total_norm(replicated).item() ** 2
        ) ** 0.5
        torch._foreach_mul_([*shards, *replicated], min(1.0, limit / (norm + 1e-6)))
        return norm

    def whole(self) -> dict[str, Tensor]:
        """The parameters by name, gathered in every process; all must call this."""
        return {
            name: p.full_tensor() if isinstance(p, DTensor) else p.detach()
            for name, p in self.parameters.items()
        }
