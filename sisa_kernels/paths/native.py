"""Exact attention on a CPU in one compiled kernel (csrc/cpu/attention_*.cpp).

Tile by tile, ``q.k`` and what the score has beside it: SISA's importance term, the additive
``g_i - g_j`` of FoX and ALiBi, or nothing. No augmented operand is made, and every exponent that is
evaluated is <= 0, so that it is exact at any length and decay. Past the horizon, where the
importance term can change no logit by more than 2^-24, its product is left out. One op,
``sisa::attention``, whose backward makes only the gradients that are asked for."""

import functools
from typing import Any

import torch
from torch import Tensor

from sisa_kernels import _extension, reference, selfcheck
from sisa_kernels.inputs import Operands, Rotary, SisaInputs, takes_flat
from sisa_kernels.ops import no_second_derivative, register, say_once
from sisa_kernels.testing import (
    ValueAndGrads,
    forgetting_problem,
    in_fp64,
    value_and_grads,
)

MAX_WIDTH = 256  # of a head's queries, values and states: csrc/torch/attention.cpp
OPERANDS = 8  # q, k, v, b, c, log_decay, theta, lam: those that have a gradient


def refusal(device: torch.device, dtype: torch.dtype, *widths: int) -> str | None:
    """Why the kernel does not take such operands, or None."""
    if device.type not in ("cpu", "meta"):
        return "it runs on a CPU"
    if not _extension.LOADED:
        return f"the compiled library is {_extension.STATE}"
    if dtype == torch.float64:
        return "it computes in fp32, not in fp64"
    if max(widths) > MAX_WIDTH:
        return f"it takes heads of at most {MAX_WIDTH} channels, got {max(widths)}"
    return None


def is_first_choice(q: Tensor) -> bool:
    """Whether "auto" runs the kernel where nothing speaks against it.

    Not in fp64, nor without the library, which is said when it is missed."""
    return q.device.type in ("cpu", "meta") and _extension.LOADED and q.dtype != torch.float64


@takes_flat
def _attention(
    x: Operands,
    bounds: Tensor | None,
    offset: int,
    bf16_products: bool = False,
) -> tuple[Tensor, Tensor]:
    """y [B, Lq, H, Dv] and the scores' log-sum-exp [B, H, Lq], both fp32.

    A y rounded to half precision would put its rounding into the gradient of every score.

    Query i is token ``offset + i`` of the L tokens of k, v, b, log_decay and theta; tables [L,
    Dh/2]. With b, c, theta and lam it is SISA; with log_decay [B, L, H] alone FoX. ``bounds``
    [documents + 1] int32 or int64 rise from 0 to at most L, not strictly: a document may be empty,
    and tokens past the last bound have y 0 and lse -inf.

    ``bf16_products``: products' operands may be rounded to bf16, which a CPU with AVX-512 BF16 then
    does, in the backward, too; sums, softmax and decay stay fp32."""
    raise NotImplementedError("sisa::attention needs the compiled library, on a CPU")


def _attention_fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    B, L, H, _Dh = q.shape
    y = q.new_empty(B, L, H, v.shape[3], dtype=torch.float32)
    return y, q.new_empty(B, H, L, dtype=torch.float32)


@takes_flat
def _attention_backward(
    dy: Tensor,
    dlse: Tensor | None,
    y: Tensor,
    lse: Tensor,
    x: Operands,
    bounds: Tensor | None,
    offset: int,
    wanted: list[bool],
    bf16_products: bool = False,
) -> list[Tensor]:
    """The gradients of those of q .. lam that are ``wanted``, one after another."""
    raise NotImplementedError("sisa::attention_backward needs the compiled library, on a CPU")


def _attention_backward_fake(*arguments: Any) -> list[Tensor]:
    operands = arguments[4 : 4 + OPERANDS]
    return [x.new_empty(x.shape) for x, one in zip(operands, arguments[16]) if one]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.offset, ctx.bf16_products = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output, *tensors)


def _backward(ctx: Any, dy: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:OPERANDS])
    if dy is None:
        dy = torch.zeros_like(saved[0])
    op = torch.ops.sisa.attention_backward
    grads = iter(op(dy, dlse, *saved, ctx.offset, wanted, ctx.bf16_products))
    found = [next(grads) if one else None for one in wanted]
    return *found, None, None, None, None, None


attention_op = register("attention", _attention, _attention_fake, _backward, _save)
register("attention_backward", _attention_backward, _attention_backward_fake, no_second_derivative)


def _precision() -> str:
    return torch.get_float32_matmul_precision()


# Dynamo does not trace it. torch.compiler.assume_constant_result would load Dynamo here, in 4 s.
_precision._dynamo_marked_constant = True  # type: ignore[attr-defined]


def bf16_products(q: Tensor) -> bool:
    """Whether torch.set_float32_matmul_precision lets products inside be of bf16, as the inputs."""
    return q.dtype == torch.bfloat16 and _precision() == "medium"


def attend(inputs: SisaInputs) -> Tensor:
    """SISA: y [B, L, H, Dv] for operands that :func:`refusal` does not speak against."""
    q = inputs.q
    return attention_op(*inputs.flat(), inputs.cu_seqlens, 0, bf16_products(q))[0].to(q.dtype)


def attend_plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rotary: Rotary | None,
    cu_seqlens: Tensor | None,
    log_forget: Tensor | None = None,
) -> Tensor:
    """Causal softmax attention, y [B, L, H, Dv]; with log_forget [B, L, H] FoX's and ALiBi's."""
    cos, sin = rotary or (None, None)
    given = q, k, v, None, None, log_forget, None, None, cos, sin, cu_seqlens
    return attention_op(*given, 0, bf16_products(q))[0].to(q.dtype)


def plain_fault(q: Tensor, v: Tensor, forgets: bool) -> str | None:
    """What is known to be wrong with :func:`attend_plain` on such operands, or None.

    Found once, on first use (:mod:`sisa_kernels.selfcheck`); ``forgets``: with log_forget."""
    Dh = q.shape[3]
    Dv = v.shape[3]
    key = ("native", "forget" if forgets else "plain", str(q.dtype), Dh, Dv)
    find = functools.partial(_plain_fault, q.device, q.dtype, Dh, Dv, forgets)
    return selfcheck.verdict(key, q.device, find)


def _plain_fault(
    device: torch.device, dtype: torch.dtype, Dh: int, Dv: int, forgets: bool
) -> str | None:
    def attend(q: Tensor, k: Tensor, v: Tensor, log_forget: Tensor | None = None) -> Tensor:
        return attend_plain(q, k, v, None, None, log_forget)

    def solve() -> tuple[ValueAndGrads, ValueAndGrads]:
        inputs, dy = forgetting_problem(H=2, Dh=Dh, Dv=Dv, decay=selfcheck.DECAY, dtype=dtype)
        right = in_fp64(inputs)
        if not forgets:
            del inputs["log_forget"]
            right["log_forget"].zero_()
        found = value_and_grads(attend, inputs, dy)
        return found, value_and_grads(reference.forgetting_attention, right, dy.double())

    return selfcheck.compare(solve, device, dtype, f"Dh {Dh}, Dv {Dv}")


def choose_plain(
    backend: str, stock: str, q: Tensor, v: Tensor, what: str, *, forgets: bool = False
) -> bool:
    """Whether :func:`attend_plain` runs; else the path ``stock`` does, for ``what``.

    ``backend``: "auto", "native" or ``stock``. Raises ValueError for another, or for a "native"
    that cannot run."""
    if backend not in ("auto", "native", stock):
        raise ValueError(f"backend must be one of auto, native, {stock}, got {backend!r}")
    if backend == stock:
        return False
    why = refusal(q.device, q.dtype, q.shape[3], v.shape[3])
    if backend == "native":
        if why is not None:
            raise ValueError(f"backend 'native' cannot run here: {why}")
        return True
    if not is_first_choice(q):
        return False
    why = why or plain_fault(q, v, forgets)
    if why is None:
        return True
    say_once(f"{what} on {q.device.type} runs the {stock!r} path in place of 'native': {why}")
    return False
