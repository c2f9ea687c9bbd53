"""What runs after the backward kernels: the gradients of b, c, decay, phase and lambda.

Two launches beside RoPE's and <dy, y>'s: epilogue_kernels.py."""

import torch
import triton
from torch import Tensor

from sisa_kernels.triton import prologue_kernels
from sisa_kernels.triton.epilogue_kernels import (
    products_kernel,
    reverse_sums_kernel,
    row_products_kernel,
)
from sisa_kernels.triton.prologue import (
    Importance,
    block_of,
    launch,
    pairs_of_program,
    rows_of_program,
)


def row_products(dy: Tensor, y: Tensor) -> Tensor:
    """<dy, y> of each row of both [B, L, H, Dv] in fp32, [B, H, L]."""
    B, L, H, Dv = y.shape
    out = y.new_empty(B, H, L, dtype=torch.float32)
    block = block_of(Dv)
    rows = rows_of_program(Dv)
    programs = B * triton.cdiv(L, rows) * H
    strides = *dy.stride(), *y.stride()
    launch(row_products_kernel, programs, dy, y, out, *strides, L, H, Dv, block, rows)
    return out


def importance_gradients(
    dc: Tensor, db: Tensor, d_diagonal: Tensor, x: Importance, last: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients for b, c, log_decay, theta and lam.

    Args:
        dc, db: those of the rotated operands, fp32, contiguous, without the pairs i = j.
        d_diagonal: dL/ds_ii [B, H, L].
        last: the end of each token's document [L], where the reverse running sums of dL/dg and
            dL/dPhi begin anew; None: one document.
    """
    assert x.phase is not None
    B, L, G, Ds = x.b.shape
    H = x.c.shape[2]
    C = Ds // 2
    new = dc.new_empty
    dlog_decay, dtheta, dlam = new(B, L, G), new(B, L, G, C), new(H)
    db_out, dc_out = x.b.new_empty(x.b.shape), x.c.new_empty(x.c.shape)
    chunk = prologue_kernels.CHUNK
    chunks = triton.cdiv(L, chunk)
    block = pairs_of_program(C)
    terms = B * chunks * triton.cdiv(C, block)
    sums = new(B, G, chunks, 2), new(B, G, chunks, 2, C), new(H, terms, 2)
    sizes = L, G, H // G, C, block, chunk, last is not None
    launch(
        products_kernel,
        B * chunks * G,
        x.b,
        x.c,
        x.fraction,
        x.phase,
        x.lam,
        dc,
        db,
        d_diagonal,
        last,
        dc_out,
        db_out,
        dlog_decay,
        dtheta,
        *sums,
        *sizes,
    )
    launch(
        reverse_sums_kernel,
        B * chunks * G,
        dlog_decay,
        dtheta,
        *sums,
        last,
        dlam,
        terms,
        *sizes,
    )
    return db_out, dc_out, dlog_decay, dtheta, dlam
