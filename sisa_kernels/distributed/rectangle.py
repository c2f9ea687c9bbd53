"""Attention of some queries over some keys, all of which each sees, on stock kernels.

They return the log-sum-exp of the scores, and their backward takes that of a softmax over more
keys: it is then these keys' share. On a CPU, and in half precision on a GPU, these are flash
kernels; elsewhere scores are dense, ``ROWS`` queries at a time."""

import torch
from torch import Tensor

from sisa_kernels.paths.chunked import attend, attend_backward, padded
from sisa_kernels.paths.dense import ROWS, has_flash
from sisa_kernels.scans import to_key_heads, to_query_heads, work_dtype

HALF = (torch.bfloat16, torch.float16)
MOST_CHANNELS = 256  # of a GPU's flash kernels, which take multiples of 8

_flash = torch.ops.aten._scaled_dot_product_flash_attention
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_backward


def operand_dtype(x: Tensor) -> torch.dtype:
    """Of what the products are made: half precision on a GPU, else fp32 or fp64."""
    return x.dtype if x.device.type == "cuda" and x.dtype in HALF else work_dtype(x)


def _runs_flash(q: Tensor, width: int) -> bool:
    """Whether a GPU's flash kernel takes operands of this width."""
    return q.device.type == "cuda" and q.dtype in HALF and width <= MOST_CHANNELS


def _width(q: Tensor, v: Tensor) -> int:
    """The one width that the kernels take."""
    width = max(q.shape[3], v.shape[3])
    return width if q.device.type == "cpu" else -(-width // 8) * 8


def rectangle(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(out [B, Lq, H, Dv], log-sum-exp [B, H, Lq]), in fp32 or fp64.

    q [B, Lq, H, W], k [B, Lk, G, W], v [B, Lk, G, Dv], of :func:`operand_dtype`."""
    Dv = v.shape[3]
    width = _width(q, v)
    q, k, v = (padded(x, width) for x in (q, k, v))
    if _runs_flash(q, width):
        heads = q.shape[2]
        q, k, v = (to_query_heads(x, heads).transpose(1, 2) for x in (q, k, v))
        out, lse, *_ = _flash(q, k, v, 0.0, False, False, scale=scale)
        return out.transpose(1, 2)[..., :Dv].float(), lse
    rows = max(1, q.shape[1] if has_flash(q.device) else ROWS)
    parts = [attend(part, k, v, False, scale) for part in q.split(rows, 1)]
    out = torch.cat([part[0] for part in parts], 1)
    return out[..., :Dv], torch.cat([part[1] for part in parts], 2)


def rectangle_backward(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of :func:`rectangle`, in fp32 or fp64, given dL/dout, out and log-sum-exp.

    The last two may be of a softmax over more keys."""
    W = q.shape[3]
    Dv = v.shape[3]
    width = _width(q, v)
    dout, out = (padded(x.to(q.dtype), width) for x in (dout, out))
    q, k, v = (padded(x, width) for x in (q, k, v))
    if _runs_flash(q, width):
        dq, dk, dv = _by_flash(q, k, v, dout, out, lse.float().contiguous(), scale)
    else:
        rows = max(1, q.shape[1] if has_flash(q.device) else ROWS)
        cut = zip(*(x.split(rows, 1) for x in (q, dout, out)), lse.split(rows, 2))
        parts = [attend_backward(x, k, v, False, dx, y, sums, scale) for x, dx, y, sums in cut]
        dq = torch.cat([part[0] for part in parts], 1)
        dk, dv = (torch.stack([part[n] for part in parts]).sum(0) for n in (1, 2))
    return dq[..., :W], dk[..., :W], dv[..., :Dv]


def _by_flash(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Of a GPU's flash kernel; key heads are repeated for it, and their gradients summed."""
    H, G = q.shape[2], k.shape[2]
    sizes = q.shape[1], k.shape[1]
    dout, q, k, v, out = (to_query_heads(x, H).transpose(1, 2) for x in (dout, q, k, v, out))
    unused = torch.zeros((), dtype=torch.int64, device=q.device)  # the state of dropout
    dq, dk, dv = _flash_backward(
        dout, q, k, v, out, lse, None, None, *sizes, 0.0, False, unused, unused, scale=scale
    )
    dq, dk, dv = (x.transpose(1, 2).float() for x in (dq, dk, dv))
    return dq, to_key_heads(dk, G), to_key_heads(dv, G)
