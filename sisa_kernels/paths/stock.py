"""Plain causal attention by stock kernels below autograd, for what is only a part of a softmax.

The forward leaves its log-sum-exp. Given y and the log-sum-exp of a softmax over more keys, the
backward of a flash kernel is these keys' share of its gradients: a weight is ``exp(s_ij - lse_i)``
and dL/ds_ij that times ``<dy_i, v_j> - <dy_i, y_i>``, whatever else is in the sum. Kernels are
called by name, so that nothing chooses another: the first of :data:`one_call.TABLE` that is legal
and can be called so. Always causal and square, never with a mask."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sisa_kernels.inputs import is_grouped
from sisa_kernels.paths import one_call
from sisa_kernels.paths.chunked import padded
from sisa_kernels.scans import to_key_heads, to_query_heads

Operands = tuple[Tensor, Tensor, Tensor]
aten = torch.ops.aten


@dataclass(frozen=True)
class Kernel:
    """A stock kernel's two ops on [B, heads, L, width]; lse [B, H, L] fp32, natural logarithm."""

    forward: Callable[[Operands, float], tuple[Tensor, Tensor]]
    """((q, k, v), scale) -> (y, lse)."""
    backward: Callable[[Tensor, Operands, Tensor, Tensor, float], Operands]
    """(dy, (q, k, v), y, lse, scale) -> (dq, dk, dv)."""
    shares_heads: bool = True
    """Whether query heads may share key heads."""


def _no_seed(x: Tensor) -> Tensor:
    """What a backward takes for the state of dropout, of which there is none."""
    return x.new_empty((), dtype=torch.int64)


def _cpu(x: Operands, scale: float) -> tuple[Tensor, Tensor]:
    return aten._scaled_dot_product_flash_attention_for_cpu(*x, 0.0, True, scale=scale)


def _cpu_backward(dy: Tensor, x: Operands, y: Tensor, lse: Tensor, scale: float) -> Operands:
    backward = aten._scaled_dot_product_flash_attention_for_cpu_backward
    return backward(dy, *x, y, lse, 0.0, True, scale=scale)


def _flash(x: Operands, scale: float) -> tuple[Tensor, Tensor]:
    return aten._scaled_dot_product_flash_attention(*x, 0.0, True, scale=scale)[:2]


def _flash_backward(dy: Tensor, x: Operands, y: Tensor, lse: Tensor, scale: float) -> Operands:
    L = y.shape[2]
    seeds = _no_seed(dy), _no_seed(dy)
    backward = aten._scaled_dot_product_flash_attention_backward
    return backward(dy, *x, y, lse, None, None, L, L, 0.0, True, *seeds, scale=scale)


def _cudnn(x: Operands, scale: float) -> tuple[Tensor, Tensor]:
    y, lse = aten._scaled_dot_product_cudnn_attention(*x, None, True, 0.0, True, scale=scale)[:2]
    return y, lse.flatten(2)


def _cudnn_backward(dy: Tensor, x: Operands, y: Tensor, lse: Tensor, scale: float) -> Operands:
    L = y.shape[2]
    rest = (_no_seed(dy), _no_seed(dy), None, None, None, L, L, 0.0, True)
    backward = aten._scaled_dot_product_cudnn_attention_backward
    return backward(dy, *x, y, lse.unsqueeze(3), *rest, scale=scale)


def _efficient(x: Operands, scale: float) -> tuple[Tensor, Tensor]:
    y, lse, *_ = aten._scaled_dot_product_efficient_attention(
        *x, None, True, 0.0, True, scale=scale
    )
    return y, lse.narrow(2, 0, y.shape[2])


def _efficient_backward(dy: Tensor, x: Operands, y: Tensor, lse: Tensor, scale: float) -> Operands:
    lse = F.pad(lse, (0, -lse.shape[2] % 32), value=math.inf)  # as its forward leaves them
    seeds = _no_seed(dy), _no_seed(dy)
    wanted = [True, True, True, False]
    backward = aten._scaled_dot_product_efficient_attention_backward
    return backward(dy, *x, None, y, lse, *seeds, 0.0, wanted, True, scale=scale)[:3]


KERNELS = {
    "cpu": Kernel(_cpu, _cpu_backward),
    "cudnn": Kernel(_cudnn, _cudnn_backward),
    "flash": Kernel(_flash, _flash_backward),
    "efficient": Kernel(_efficient, _efficient_backward, shares_heads=False),
}


def _call(q: Tensor, k: Tensor, v: Tensor) -> one_call.Call:
    return one_call.Call(
        device=q.device,
        capability=one_call.capability(q.device),
        dtype=q.dtype,
        length=q.shape[1],
        width=q.shape[3],
        value_width=v.shape[3],
        grouped=is_grouped(q.shape[2], k.shape[2]),
        deterministic=torch.are_deterministic_algorithms_enabled()
        and not torch.is_deterministic_algorithms_warn_only_enabled(),
    )


def choose(call: one_call.Call) -> tuple[str, one_call.Widths]:
    """The kernel for a call, and the widths that it needs; ValueError where there is none."""
    refusals = []
    for row in one_call.TABLE:
        if row.name not in KERNELS:
            continue
        widths = row.legal(call)
        if not isinstance(widths, str):
            return row.name, widths
        refusals.append(f"{row.name} {widths}")
    raise ValueError(f"no stock kernel takes the call: {'; '.join(refusals)}")


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Causal attention of q [B, L, H, W], k [B, L, G, W] and v [B, L, G, Dv].

    Returns y [B, L, H, Dv] in q's dtype and the log-sum-exp [B, H, L] fp32, both contiguous."""
    name, widths = choose(_call(q, k, v))
    y, lse = KERNELS[name].forward(_operands(name, widths, q, k, v), scale)
    return _narrow(y.transpose(1, 2), v.shape[3]), lse.contiguous()


def backward(
    dy: Tensor, y: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float
) -> Operands:
    """(dq, dk, dv) of :func:`forward`, in its layouts and contiguous.

    y and lse may come from a softmax over more keys: then it is these keys' share."""
    name, widths = choose(_call(q, k, v))
    x = _operands(name, widths, q, k, v)
    dy, y = (_wide(t, widths[1]).transpose(1, 2) for t in (dy, y))
    dq, dk, dv = (
        t.transpose(1, 2) for t in KERNELS[name].backward(dy, x, y, lse.contiguous(), scale)
    )
    if dk.shape[2] != k.shape[2]:
        dk, dv = (to_key_heads(t.float(), k.shape[2]).to(t.dtype) for t in (dk, dv))
    return _narrow(dq, q.shape[3]), _narrow(dk, k.shape[3]), _narrow(dv, v.shape[3])


def _operands(
    name: str, widths: one_call.Widths, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As the kernel takes them, [B, heads, L, width]."""
    width, value_width = widths
    q, k, v = _wide(q, width), _wide(k, width), _wide(v, value_width)
    if not KERNELS[name].shares_heads:
        k, v = (to_query_heads(t, q.shape[2]) for t in (k, v))
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def _narrow(x: Tensor, width: int) -> Tensor:
    """The first ``width`` channels of x, contiguous."""
    return x.narrow(3, 0, width).contiguous()


def _wide(x: Tensor, width: int) -> Tensor:
    """x, padded with zeros where it is narrower."""
    return x if x.shape[3] == width else padded(x, width)
