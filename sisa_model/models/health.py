"""How SISA's layers stand on a batch: lambda, half-lives, the range of g, what is clamped."""

import functools
import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sisa_kernels import SequenceLayout
from sisa_kernels.reference import scores
from sisa_kernels.rotation import CLAMP, rotate
from sisa_model.models.context import Context
from sisa_model.models.sisa import SisaAttention


@dataclass
class Health:
    """A layer's importance term on a batch: a value a head, averaged over the sequences."""

    layer: int
    """Which of the model's layers, from 0; a hybrid's others have no health."""
    lam: list[float]
    """lambda of each head."""
    half_life: list[float]
    """Tokens until the importance of a key halves, ln 2 / mean(-log_decay), of each key head."""
    g_range: list[float]
    """Largest range of g over the sequences, of each key head."""
    clamped: float
    """Share of positions whose exponent "clamped" mode would clamp (0 in "exact" mode, which clamps
    nothing).
    """

    @classmethod
    def of_parts(cls, parts: "Sequence[Health]") -> "Health":
        """A layer's health from that of equal parts of its heads, in their order."""

        def joined(values: Iterable[list[float]]) -> list[float]:
            return list(itertools.chain.from_iterable(values))

        return cls(
            layer=parts[0].layer,
            lam=joined(part.lam for part in parts),
            half_life=joined(part.half_life for part in parts),
            g_range=joined(part.g_range for part in parts),
            clamped=statistics.fmean(part.clamped for part in parts),
        )


def half_life(log_decay: Tensor) -> Tensor:
    """Tokens until a key's importance halves, ln 2 / mean(-log_decay): [B, L, G] -> fp64 [G].

    Where nothing decays it is 6.9e11."""
    return math.log(2) / -log_decay.double().mean((0, 1)).clamp(max=-1e-12)


@torch.no_grad()
def visit_layers(
    model: Any,
    input_ids: Tensor,
    visit: Callable[[int, SisaAttention, Tensor, Context], None],
    **split: Any,
) -> None:
    """Run ``model`` on ``input_ids`` [B, L] and call ``visit`` at each SISA layer, in order.

    It gets the layer's number among all of the model's, the attention, its normed input and
    context. ``split``: group and layout, as the model takes them."""
    hooks = []
    for number, layer in enumerate(model.layers):

        def call(attn: Any, args: tuple[Any, ...], number: int = number) -> None:
            x, context = args[:2]
            visit(number, attn, x, context)

        found = [module for module in layer.modules() if isinstance(module, SisaAttention)]
        hooks += [attn.register_forward_pre_hook(call) for attn in found]
    try:
        if hooks:
            model.hidden(input_ids, **split)
    finally:
        for hook in hooks:
            hook.remove()


def health(
    model: Any,
    input_ids: Tensor,
    group: dist.ProcessGroup | None = None,
    layout: SequenceLayout | None = None,
) -> list[Health]:
    """The :class:`Health` of each SISA layer on ``input_ids`` [B, L]; empty where there is none.

    With ``group`` and ``layout`` of the whole sequence of which the ids are this process's part."""
    found: list[Health] = []

    def measure(layer: int, attn: SisaAttention, x: Tensor, context: Context) -> None:
        log_decay = _whole(attn.operands(x).log_decay, group, layout)
        g = log_decay.double().cumsum(1)
        clamped = 0.0
        if attn.mode == "clamped":
            middle = (g[:, :1] + g[:, -1:]) / 2
            clamped = ((g - middle).abs() > CLAMP).double().mean().item()
        found.append(
            Health(
                layer=layer,
                lam=attn.lam().tolist(),
                half_life=half_life(log_decay).tolist(),
                g_range=(g[:, 0] - g[:, -1]).amax(0).tolist(),
                clamped=clamped,
            )
        )

    visit_layers(model, input_ids, measure, group=group, layout=layout)
    return found


def _whole(x: Tensor, group: dist.ProcessGroup | None, layout: SequenceLayout | None) -> Tensor:
    """x [B, L, G] of all tokens, of which this process has its own."""
    if group is None or layout is None:
        return x
    whole = x.new_zeros(len(x), layout.length, x.shape[2])
    whole[:, layout.positions(group.rank(), x.device)] = x
    dist.all_reduce(whole, group=group)
    return whole


def sequence_scores(
    attn: SisaAttention, x: Tensor, context: Context
) -> Iterator[tuple[Tensor, Tensor]]:
    """The terms of Eq. 2 of each sequence of a layer's input ``x`` [B, L, D]: fp64 [1, H, L, L].

    One sequence at a time: its dense scores are what takes the memory. They are as
    :func:`sisa_kernels.reference.scores` returns them."""
    inputs = attn.operands(x)
    cos, sin = (table.double()[:, None] for table in context.rotary)
    q, k = (rotate(tokens.double(), cos, sin) for tokens in (inputs.q, inputs.k))
    operands = (q, k, inputs.b, inputs.c, inputs.log_decay, inputs.theta)
    of_one: Any = functools.partial(scores, lam=inputs.lam, mode=attn.mode)
    for sequence in zip(*(operand.split(1) for operand in operands)):
        yield of_one(*sequence)
