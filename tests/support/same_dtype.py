"""Eq. 2 in PyTorch in the operands' dtype, as a user would write it: the measure of an error."""

import math

import torch
from torch import Tensor

import sisa_kernels as sk
from sisa_kernels.inputs import Rotary
from sisa_kernels.rotation import rotate
from sisa_kernels.testing import NAMES, gradient_errors, relative, value_and_grads, worst_row


def scores(q, k, b, c, log_decay, theta, lam, rotary: Rotary | None = None) -> Tensor:
    """Those of one document, products in the operands' dtype, [B, H, L, L] fp32."""
    L, H = q.shape[1:3]
    dtype = q.dtype
    if rotary is not None:
        q, k = (rotate(x.float(), *(table[:, None] for table in rotary)).to(dtype) for x in (q, k))
    g = log_decay.double().clamp(min=-1e3).cumsum(1)
    phase = theta.double().cumsum(1).remainder(2 * math.pi).float()
    b = rotate(b.float(), phase.cos(), phase.sin()).to(dtype)
    k, b, g, phase = (x.repeat_interleave(H // x.shape[2], 2) for x in (k, b, g, phase))
    c = rotate(c.float(), phase.cos(), phase.sin()).to(dtype)
    causal = torch.ones(L, L, dtype=torch.bool, device=q.device).tril()
    g = g.transpose(1, 2)
    decay = (g[..., :, None] - g[..., None, :]).masked_fill(~causal, -math.inf).exp().float()
    q, k, b, c = (x.transpose(1, 2) for x in (q, k, b, c))
    content = (q @ k.mT).float() / math.sqrt(q.shape[3])
    score = content + lam[:, None, None] * decay * (c @ b.mT).float()
    return score.masked_fill(~causal, -math.inf)


def attention(
    q, k, v, b, c, log_decay, theta, lam, rotary: Rotary | None = None, cu_seqlens=None
) -> Tensor:
    """y [B, L, H, Dv], its weights rounded to the dtype."""
    if cu_seqlens is not None:
        pieces = [x.split(cu_seqlens.diff().tolist(), 1) for x in (q, k, v, b, c, log_decay, theta)]
        tables = (
            zip(*(x.split(cu_seqlens.diff().tolist()) for x in rotary))
            if rotary
            else [None] * len(pieces[0])
        )
        return torch.cat(
            [attention(*piece, lam, rotary=table) for piece, table in zip(zip(*pieces), tables)], 1
        )
    weight = scores(q, k, b, c, log_decay, theta, lam, rotary).softmax(-1).to(q.dtype)
    v = v.repeat_interleave(q.shape[2] // v.shape[2], 2)
    return (weight @ v.transpose(1, 2)).transpose(1, 2)


def check(found, right, inputs, dy: Tensor, names=NAMES, **options) -> None:
    """y, its rows and every gradient of ``names`` within a small multiple of PyTorch's errors.

    Of the larger error of the dense formula and the stock path: 3 times in fp32, 2 in fp16 and
    bf16, plus a few units in the last place."""
    y, grads = found
    y_ref, grads_ref = right
    stock = value_and_grads(sk.sisa_attention, inputs, dy, **options, backend="chunked")
    baselines = [value_and_grads(attention, inputs, dy, **options), stock]
    factor, floor = (3, 4e-7) if dy.dtype == torch.float32 else (2, 1e-4)
    assert relative(y, y_ref) <= factor * max(relative(x, y_ref) for x, _ in baselines) + floor
    assert (
        worst_row(y, y_ref) <= factor * max(worst_row(x, y_ref) for x, _ in baselines) + 10 * floor
    )

    errors = gradient_errors(grads, grads_ref, inputs)
    allowed = [gradient_errors(x, grads_ref, inputs) for _, x in baselines]
    limits = {name: factor * max(x[name] for x in allowed) for name in names}
    # lambda's is one number a head. Of a few, the ratio to another's error is chance (over many:
    # test_the_gradient_for_lambda_over_many_heads): within one rounding of all its terms, then.
    limits["lam"] = max(limits["lam"], torch.finfo(dy.dtype).eps / 2)
    # One token alone has no gradient but v's: what is left is the rounding of dp - delta, and
    # relative() takes it as it is.
    slack = (2 if dy.shape[1] > 1 else 20) * floor
    assert not {
        name: (errors[name], limits[name])
        for name in names
        if not errors[name] <= limits[name] + slack
    }
