"""What runs before the attention kernels: RoPE, and the importance operands with decay and phase.

Three launches beside RoPE's, that of the horizon included: prologue_kernels.py, horizon.py."""

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from sisa_kernels.inputs import Rotary, ScoreInputs
from sisa_kernels.triton import prologue_kernels
from sisa_kernels.triton.prologue_kernels import (
    PAIRS,
    documents_kernel,
    fold_kernel,
    rotary_kernel,
    sums_kernel,
)

LOG2E = 1 / math.log(2)
TOKENS = 1024  # of a program that has one number a token


class Importance(NamedTuple):
    """The kernels' importance operands, and what belongs to them.

    The decay between two tokens is 2^(level_i - level_j) times the fractions of g that are in c and
    b. Levels are integers, so that each kernel may take out a power of two of its own, a tile's,
    without rounding: all kernels see the same operands."""

    b: Tensor
    """[B, L, G, Ds], ``R(Phi) b 2^-fraction``, rounded once."""
    c: Tensor
    """[B, L, H, Ds], ``R(Phi) c 2^fraction``, rounded once."""
    near_b: Tensor
    """b times 2^(its key tile's last level - its own), in (0, 1]."""
    near_c: Tensor | None
    """c times 2^(its own level - its query tile's first); for the backward only."""
    level: Tensor
    """[B, G, L] int32: g, the cumulative log2-decay, to the nearest integer."""
    fraction: Tensor
    """[B, G, L] fp32, what is left of g, in [-1/2, 1/2]."""
    lam: Tensor
    """[H] fp32."""
    square_b: Tensor
    """[B, G, L] fp32, the squared norm of each row of b as given."""
    square_c: Tensor
    """[B, H, L] fp32."""
    phase: Tensor | None
    """[B, L, G, Ds / 2] int32, in 2^-32 turns; for the backward only."""


def launch(kernel: Any, programs: int, *args: Any, **options: Any) -> None:
    """Run a kernel of one axis of programs on the device of its first argument."""
    with torch.cuda.device_of(args[0]):  # Triton launches on the current device
        kernel[(programs,)](*args, **options)


def block_of(width: int) -> int:
    """The power of two that a kernel takes for ``width`` channels."""
    return triton.next_power_of_2(width)


def pairs_of_program(pairs: int) -> int:
    """Channel pairs that a program takes at a time, of ``pairs`` a row.

    Half as many where rows do not begin at 16 bytes: each number is at an address of its own then,
    and the addresses of PAIRS fill the registers."""
    return min(PAIRS if pairs % 4 == 0 else PAIRS // 2, block_of(pairs))


def rows_of_program(width: int) -> int:
    """Tokens of a program that goes row by row, of ``width`` channels."""
    return min(128, 4096 // block_of(width))


def rotate_qk(q: Tensor, k: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor]:
    """q [B, L, H, Dh] and k [B, L, G, Dh] with RoPE, where given, in their dtype."""
    if rotary is None:
        return q, k
    turned = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    return _turn(q, k, rotary, *turned, inverse=False)


def unrotate(dq: Tensor, dk: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """dL/dq and dL/dk before RoPE, in place of those given, which are contiguous."""
    return _turn(dq, dk, (cos, sin), dq, dk, inverse=True)


def _turn(
    q: Tensor, k: Tensor, rotary: Rotary, q_out: Tensor, k_out: Tensor, *, inverse: bool
) -> tuple[Tensor, Tensor]:
    B, L, H, Dh = q.shape
    G = k.shape[2]
    block = block_of(Dh // 2)
    rows = rows_of_program(2 * block)
    programs = B * triton.cdiv(L, rows) * (H + G)
    strides = (stride for x in (q, k, *rotary) for stride in x.stride())
    sizes = L, H, G, Dh // 2, block, rows
    launch(rotary_kernel, programs, q, k, *rotary, q_out, k_out, *strides, *sizes, inverse)
    return q_out, k_out


def documents(cu_seqlens: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Each token's document of those between the bounds: its first token and its end, [L] int32.

    Nothing waits for the bounds: the call may be captured in a CUDA graph. What is past the last
    bound is one more document."""
    bounds = cu_seqlens.contiguous()
    first, last = (bounds.new_empty(length, dtype=torch.int32) for _ in range(2))
    programs = triton.cdiv(length, TOKENS)
    launch(documents_kernel, programs, bounds, first, last, bounds.shape[0], length, TOKENS)
    return first, last


def prologue(
    x: ScoreInputs, keys: int, queries: int | None = None
) -> tuple[Tensor, Tensor, Importance]:
    """q and k with RoPE, where given, and the importance operands.

    Args:
        keys: of a tile in the kernel that walks key tiles, at most CHUNK.
        queries: of a tile in the one that walks query tiles; None: there is no backward.
    """
    return *rotate_qk(x.q, x.k, x.rotary), folded(x, keys, queries)


def folded(x: ScoreInputs, keys: int, queries: int | None = None) -> Importance:
    """The importance operands alone; arguments as of :func:`prologue`."""
    B, L, G, Ds = x.b.shape
    H = x.c.shape[2]
    C = Ds // 2
    new = x.b.new_empty
    found = _empty(x, backward=queries is not None)
    chunk = prologue_kernels.CHUNK
    chunks = triton.cdiv(L, chunk)
    sums = new(B, G, chunks, dtype=torch.int64), new(B, G, chunks, C, dtype=torch.int64)
    # Triton is told what divides by 16, which 4 numbers of fp32, 16 bytes, need not.
    *rows, step = x.theta.stride()
    unit = 1 if any(stride % 4 for stride in rows) else 4
    steps = *x.log_decay.stride(), *(stride // unit for stride in rows), step
    block = pairs_of_program(C)
    programs = B * chunks * G
    sizes = C, block, chunk, unit
    launch(sums_kernel, programs, x.log_decay, x.theta, *sums, *steps, L, G, *sizes)
    launch(
        fold_kernel,
        programs,
        x.log_decay,
        x.theta,
        x.b,
        x.c,
        x.lam,
        *sums,
        *found,
        *steps,
        *x.b.stride(),
        *x.c.stride(),
        x.lam.stride(0),
        L,
        G,
        H // G,
        *sizes,
        keys,
        queries or keys,
        queries is not None,
    )
    return found


def _empty(x: ScoreInputs, *, backward: bool) -> Importance:
    """The importance operands, not yet written."""
    B, L, G, Ds = x.b.shape
    H = x.c.shape[2]
    new = x.b.new_empty
    return Importance(
        b=new(B, L, G, Ds),
        c=new(B, L, H, Ds),
        near_b=new(B, L, G, Ds),
        near_c=new(B, L, H, Ds) if backward else None,
        level=new(B, G, L, dtype=torch.int32),
        fraction=new(B, G, L, dtype=torch.float32),
        lam=new(H, dtype=torch.float32),
        square_b=new(B, G, L, dtype=torch.float32),
        square_c=new(B, H, L, dtype=torch.float32),
        phase=new(B, L, G, Ds // 2, dtype=torch.int32) if backward else None,
    )
