"""Attention over ranks in tests: problems of whole sequences, what a rank runs, bytes it sends."""

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

import sisa_kernels as sk
from sisa_kernels import _extension, reference
from sisa_kernels.distributed import exchange, terms
from sisa_kernels.testing import (
    ValueAndGrads,
    forgetting_problem,
    in_fp64,
    named,
    problem,
    value_and_grads,
)
from tests.support.ranks import Ranks

Kind = Literal["sisa", "fox", "plain"]
ATTEND: dict[str, Callable[..., Tensor]] = {
    "sisa": sk.sisa_attention,
    "fox": sk.forgetting_attention,
    "plain": sk.causal_attention,
}


@dataclasses.dataclass
class Problem:
    """Attention of a whole sequence."""

    kind: Kind
    inputs: dict[str, Tensor]
    dy: Tensor
    rotary: tuple[Tensor, Tensor] | None = None
    cu_seqlens: Tensor | None = None

    def oracle(self) -> ValueAndGrads:
        """y and the gradients in fp64."""
        inputs = in_fp64(self.inputs)
        attend = reference.sisa_attention
        if self.kind != "sisa":
            attend = reference.forgetting_attention
        if self.kind == "plain":
            inputs["log_forget"] = torch.zeros(inputs["q"].shape[:3], dtype=torch.float64)
        options = {"rotary": self.rotary, "cu_seqlens": self.cu_seqlens}
        return value_and_grads(attend, inputs, self.dy.double(), **options)


def whole_problem(
    kind: Kind, length: int, *, documents: list[int] | None = None, **sizes: Any
) -> Problem:
    """A random problem, with RoPE but for FoX, four heads of width 32 unless ``sizes`` says."""
    sizes = {"H": 4, "Dh": 32, **sizes}
    if kind == "sisa":
        sizes = {"lam": None, **sizes}
        found, dy = problem(L=length, **sizes)
        inputs = named(found)
    else:
        inputs, dy = forgetting_problem(L=length, **sizes)
    inputs = {name: x.detach() for name, x in inputs.items()}
    if kind == "plain":
        del inputs["log_forget"]
    angles = torch.arange(length)[:, None] * torch.logspace(0, -3, sizes["Dh"] // 2)
    rotary = None if kind == "fox" else (angles.cos(), angles.sin())
    bounds = None if documents is None else torch.tensor(documents)
    return Problem(kind, inputs, dy, rotary, bounds)


class Options(NamedTuple):
    """How the ranks run a problem."""

    backend: str = "native" if _extension.LOADED else "auto"
    """By name, which no process checks on first use."""
    at_once: int = exchange.AT_ONCE
    """Bytes up to which keys go to all at once."""
    horizon: bool = True
    grad: bool = True


AS_DEFAULT = Options()


class Outcome(NamedTuple):
    """Of one rank."""

    y: Tensor
    grads: dict[str, Tensor]
    forward_bytes: Counter[str]
    backward_bytes: Counter[str]


def attend(
    rank: int, group: dist.ProcessGroup, whole: Problem, layout: sk.SequenceLayout, options: Options
) -> Outcome:
    """A rank's part of a problem: y and gradients of its tokens, and the bytes it sent."""
    own = {
        name: (x if name == "lam" else layout.shard(x, rank)).clone().requires_grad_(options.grad)
        for name, x in whole.inputs.items()
    }
    rotary = whole.rotary and tuple(x[layout.positions(rank)] for x in whole.rotary)
    with _settings(options), counted() as forward_bytes:
        y = ATTEND[whole.kind](
            **own,
            rotary=rotary,
            cu_seqlens=whole.cu_seqlens,
            backend=options.backend,
            group=group,
            layout=layout,
        )
    if not options.grad:
        return Outcome(y, {}, forward_bytes, Counter())
    with _settings(options), counted() as backward_bytes:
        grads = torch.autograd.grad(y, list(own.values()), layout.shard(whole.dy, rank))
    return Outcome(y.detach(), dict(zip(own, grads)), forward_bytes, backward_bytes)


def solve(
    ranks: Ranks, whole: Problem, layout: sk.SequenceLayout, options: Options = AS_DEFAULT
) -> tuple[ValueAndGrads, list[Outcome]]:
    """y and gradients of the whole sequence by all ranks, and what each of them found."""
    found = ranks.run(attend, whole, layout, options)
    y = layout.unshard([outcome.y for outcome in found])
    grads = {}
    for name in found[0].grads:
        parts = [outcome.grads[name] for outcome in found]
        grads[name] = torch.stack(parts).sum(0) if name == "lam" else layout.unshard(parts)
    return (y, grads), found


@contextlib.contextmanager
def _settings(options: Options) -> Iterator[None]:
    before = exchange.AT_ONCE, terms.default_horizon
    exchange.AT_ONCE = options.at_once
    if not options.horizon:
        terms.default_horizon = lambda dtype: 1e-300
    try:
        yield
    finally:
        exchange.AT_ONCE, terms.default_horizon = before


@contextlib.contextmanager
def counted() -> Iterator[Counter[str]]:
    """Bytes that this rank sends meanwhile: "keys", "gather" (to each), "reduce"; and "steps"."""
    count: Counter[str] = Counter()
    names = ("batch_isend_irecv", "all_to_all_single", "all_gather", "all_reduce")
    real = {name: getattr(dist, name) for name in names}

    def steps(operations: list[dist.P2POp]) -> Any:
        count["steps"] += 1
        count["keys"] += sum(x.tensor.nbytes for x in operations if x.op is dist.isend)
        return real["batch_isend_irecv"](operations)

    def at_once(found: Tensor, sent: Tensor, *rest: Any, **more: Any) -> Any:
        count["keys"] += sent.nbytes
        return real["all_to_all_single"](found, sent, *rest, **more)

    def gather(found: list[Tensor], sent: Tensor, **more: Any) -> Any:
        count["gather"] += sent.nbytes
        return real["all_gather"](found, sent, **more)

    def reduce(x: Tensor, **more: Any) -> Any:
        count["reduce"] += x.nbytes
        return real["all_reduce"](x, **more)

    for name, counting in zip(names, (steps, at_once, gather, reduce)):
        setattr(dist, name, counting)
    try:
        yield count
    finally:
        for name, function in real.items():
            setattr(dist, name, function)
