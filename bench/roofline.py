"""Floor under the time of each attention path: FLOPs and bytes by shape, against a device's peak.

A stage takes at least max(flops / peak, bytes / bandwidth) and the stages of a path (prologue,
forward, backward kernels) run one after the other. Peaks are the vendor's: measured ceilings are
lower, so a bound is a floor and no forecast; only tensors that stay in the L2 cache (small shapes)
can undercut it. Paths (bf16 operands, fp32 vectors, a key head for each query head):

- ``plain``: RoPE in one kernel, then causal attention of widths Dh (q, k) and Dv (v); the
  yardstick.
- ``augmented``: q_aug and k_aug written by one prologue, then one plain call of widths Dh + Ds and
  Dv.
- ``padded``: the same with v padded to Dh + Ds, as stock flash kernels that know one width need it.
- ``eager``: the prologue as the op-by-op fp32 chain of authors.py, then the call of ``augmented``.
- ``exact``: q.k and the importance product as two products a score (Triton), the second only within
  the horizon; no atomics, so that dK/dV and dQ are two kernels which both recompute the scores and
  dP. Of MACs a score that is 5 Dh + 4 Dv against the 4 Dh + 3 Dv of ``plain``: 9/7 of it at Dh = Dv
  before the first importance product, and what no horizon wins back.

FLOPs are those of matrix products, 2 a MAC. Not counted: element-wise work (softmax, rotations, the
decay factor of the importance term and its share of the backward), the bytes of the rotary tables
and of the few scalars a block.

The last table, of instructions.py, takes the kernels as they were compiled. All of it is on
paper."""

import argparse
import math
from dataclasses import astuple, dataclass
from functools import cache
from typing import NamedTuple

from sisa_model.models.flops import PEAK_TFLOPS

BF16, FP32 = 2, 4
LAM = 0.3133  # at initialisation: softplus(-1)
TOLERANCE = 2.0**-8  # of a logit: the kernels' own in bf16 (sisa_kernels.triton.op)
PATHS = ("plain", "augmented", "padded", "eager", "exact")


def check_positive(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name} must be > 0, got {value}")


@dataclass(frozen=True)
class Device:
    tflops: float  # dense bf16 matrix products, 1e12 FLOP/s
    terabytes: float  # memory bandwidth, 1e12 bytes/s
    arch: int = 0  # its compute capability, times ten
    multiprocessors: int = 0

    def __post_init__(self) -> None:
        check_positive(tflops=self.tflops, terabytes=self.terabytes)


# NVIDIA's data sheets: A100 80GB SXM, H100 SXM, H200 SXM, HGX B200 (a GPU of it).
SHEETS = {
    "A100": (2.04, 80, 108),
    "H100": (3.35, 90, 132),
    "H200": (4.8, 90, 132),
    "B200": (8.0, 100, 148),
}
DEVICES = {name: Device(PEAK_TFLOPS[name], *sheet) for name, sheet in SHEETS.items()}


@dataclass(frozen=True)
class Shape:
    """B, L, H, Dh, Ds, Dv; ``plain`` has no use for the state width."""

    batch: int
    length: int
    heads: int
    head_dim: int
    d_state: int
    value_dim: int

    def __post_init__(self) -> None:
        check_positive(**vars(self))
        for name in ("head_dim", "d_state"):
            if getattr(self, name) % 2:
                raise ValueError(
                    f"{name} must be even (rotated in pairs), got {getattr(self, name)}"
                )


class Stage(NamedTuple):
    name: str
    flops: int
    bytes: int

    def seconds(self, device: Device) -> float:
        return max(self.flops / (1e12 * device.tflops), self.bytes / (1e12 * device.terabytes))


def horizon_tokens(
    d_state: int, half_life: float, tolerance: float = TOLERANCE, lam: float = LAM
) -> float:
    """The distance in tokens from which on no importance product is made.

    ``half_life log2(max(lam, 1) Ds / tolerance)``. A block pair needs none where lam exp(g_start(I)
    - g_end(J)) max|c_I| max|b_J| <= tolerance, lam taken as at least 1 (see
    sisa_kernels/triton/horizon.py). Here each norm is sqrt(Ds), that of channels of unit variance,
    and g falls by ln 2 each half_life."""
    check_positive(d_state=d_state, half_life=half_life, tolerance=tolerance, lam=lam)
    largest = max(lam, 1) * d_state / tolerance
    return half_life * math.log2(largest) if largest > 1 else 0.0


@cache
def causal_scores(length: int, tile: tuple[int, int] = (1, 1), horizon: float = math.inf) -> int:
    """Scores of a head in whole blocks of ``tile`` = (queries, keys).

    For tile (1, 1) length (length + 1) / 2. With a ``horizon`` in tokens, those that get an
    importance product: the key block reaches into the query block, or its last token lies less than
    horizon tokens before the query block's first.
    """
    rows, columns = tile
    check_positive(length=length, tile_queries=rows, tile_keys=columns)
    if not horizon >= 0:
        raise ValueError(f"horizon must be >= 0, got {horizon}")
    # The largest whole distance below the horizon.
    reach = max(0, math.ceil(min(horizon, length)) - 1)
    blocks = 0
    for start in range(0, length, rows):
        last = min(start + rows, length) - 1
        blocks += last // columns - max(0, (start - reach) // columns) + 1
    return blocks * rows * columns


def importance_share(length: int, horizon: float, tile: tuple[int, int] = (1, 1)) -> float:
    """Share of the causal block pairs that get an importance product, in (0, 1]."""
    return causal_scores(length, tile, horizon) / causal_scores(length, tile)


def prologue_bytes(path: str, shape: Shape) -> tuple[int, int]:
    """Bytes a token and head that the prologue and its backward move.

    Forward: q, k, b, c, log_decay, theta in; queries and keys of width Dh + Ds out. Backward: the
    gradients of those and b, c, log_decay, theta in; six gradients out.
    """
    _, _, _, Dh, Ds, Dv = astuple(shape)
    fused = BF16 * 4 * (Dh + Ds) + FP32 * (1 + Ds // 2)
    fused_back = BF16 * (4 * (Dh + Ds) + 2 * Ds) + FP32 * 2 * (1 + Ds // 2)
    if path == "plain":
        return BF16 * 4 * Dh, BF16 * 4 * Dh
    if path == "augmented":
        return fused, fused_back
    if path == "padded":  # v padded; dy padded
        pad = BF16 * (Dv + Dh + Ds)
        return fused + pad, fused_back + pad
    if path == "eager":
        # Tensors that the ops of authors.eager_chain and of its autograd read and write, summed.
        return 112 * Dh + 164 * Ds + 80, 136 * Dh + 350 * Ds + 152
    # Out with the operands of "exact": b lowered to its tiles, g in fp64 and its level, norms of b
    # and c. Back: dc, db, dL/ds_ii, g, its level and the phases' tables in fp32.
    return (
        fused + BF16 * Ds + FP32 * 5,
        BF16 * 4 * (Dh + Ds) + FP32 * (5 + Ds // 2 + 3 * Ds),
    )


def two_product_kernels(
    shape: Shape, tile: tuple[int, int], horizon: float, prologue: int
) -> tuple[Stage, list[Stage]]:
    """The forward kernel of ``exact`` and those of its backward."""
    B, L, H, Dh, Ds, Dv = astuple(shape)
    rows = B * L * H
    scores = B * H * causal_scores(L, tile)
    within = B * H * causal_scores(L, tile, horizon)
    # q, k, v, c, b, lowered b and levels in; y and the log-sum-exp out. In the backward q, k, v,
    # dy, c, b, one of them lowered, levels, log-sum-exp and delta in, both times; the importance
    # gradients out in fp32.
    operands = BF16 * (2 * (Dh + Ds + Dv) + Ds)
    macs = (Dh + Dv) * scores + Ds * within
    forward = Stage("attention", 2 * macs, rows * (operands + 2 * FP32))
    dkdv_macs = 2 * macs  # S, dP, dV, dK
    dq_macs = (2 * Dh + Dv) * scores + 2 * Ds * within  # S, dP, dQ
    common = operands + 3 * FP32
    # The prologue is recomputed, not saved; with the phases' tables and c lowered to its tiles.
    again = Stage("prologue again", 0, rows * (prologue + FP32 * Ds + BF16 * Ds))
    dkdv = Stage("dK/dV", 2 * dkdv_macs, rows * (common + BF16 * (Dh + Dv) + FP32 * Ds))
    dq = Stage("dQ", 2 * dq_macs, rows * (common + BF16 * Dh + FP32 * (Ds + 1)))
    return forward, [again, dkdv, dq]


def one_product_kernels(
    shape: Shape, tile: tuple[int, int], qk: int, v: int
) -> tuple[Stage, list[Stage]]:
    """The forward kernel of plain attention of widths ``qk`` and ``v``, and its backward's one."""
    rows = shape.batch * shape.length * shape.heads
    scores = shape.batch * shape.heads * causal_scores(shape.length, tile)
    # q, k, v in; y and the log-sum-exp out.
    forward = Stage("attention", 2 * (qk + v) * scores, rows * (BF16 * 2 * (qk + v) + FP32))
    # q, k, v, dy, log-sum-exp and delta in; dq, dk, dv out.
    moved = BF16 * (4 * qk + 3 * v) + 2 * FP32
    return forward, [Stage("dQ/dK/dV", 2 * (3 * qk + 2 * v) * scores, rows * moved)]


def stages(
    path: str,
    shape: Shape,
    *,
    backward: bool = True,
    horizon: float = math.inf,
    tile: tuple[int, int] = (1, 1),
) -> list[Stage]:
    """The path's kernels with their FLOPs and compulsory bytes.

    Every tensor is read or written once a kernel. ``horizon`` in tokens is for ``exact`` alone.
    ``tile`` (queries, keys) counts scores in whole blocks; (1, 1) counts the causal ones, which is
    the floor."""
    if path not in PATHS:
        raise ValueError(f"path must be one of {', '.join(PATHS)}, got {path!r}")
    if path != "exact" and horizon != math.inf:
        raise ValueError(
            f"horizon must be inf on path {path}, which makes every importance product, "
            f"got {horizon}"
        )
    B, L, H, Dh, Ds, Dv = astuple(shape)
    if path == "padded" and Dv > Dh + Ds:
        raise ValueError(f"value_dim must be at most Dh + Ds = {Dh + Ds} on path padded, got {Dv}")
    before, after = prologue_bytes(path, shape)
    qk = Dh if path == "plain" else Dh + Ds
    v = Dh + Ds if path == "padded" else Dv
    if path == "exact":
        forward, kernels = two_product_kernels(shape, tile, horizon, before)
    else:
        forward, kernels = one_product_kernels(shape, tile, qk, v)
    rows = B * L * H
    prologue = Stage("prologue", 0, rows * before)
    if not backward:
        return [prologue, forward]
    # y and dy in, their product's row sums out.
    delta = Stage("delta", 0, rows * (BF16 * 2 * v + FP32))
    return [prologue, forward, delta, *kernels, Stage("prologue backward", 0, rows * after)]


def bound_ms(path: str, shape: Shape, device: Device, **options) -> float:
    """Least milliseconds of the path on the device; ``options`` are those of :func:`stages`."""
    return 1e3 * sum(stage.seconds(device) for stage in stages(path, shape, **options))


def bounds_row(shape: Shape, device: Device, horizon: float, tile: tuple[int, int]) -> str:
    """A row of the first table: plain, exact, exact within the horizon; the others over plain."""
    yardstick = bound_ms("plain", shape, device, tile=tile)
    parts = [f"{shape.length:6} {shape.d_state:4}"]
    for path, reach in (("plain", math.inf), ("exact", math.inf), ("exact", horizon)):
        forward = stages(path, shape, backward=False, horizon=reach, tile=tile)
        both = stages(path, shape, horizon=reach, tile=tile)
        gflop = [1e-9 * sum(stage.flops for stage in kernels) for kernels in (forward, both)]
        megabytes = 1e-6 * sum(stage.bytes for stage in both)
        ms = bound_ms(path, shape, device, horizon=reach, tile=tile)
        parts.append(
            f"{gflop[0]:6.0f} {gflop[1]:6.0f} {megabytes:6.0f} {ms:7.3f} {ms / yardstick:5.2f}"
        )
    ratios = {
        path: bound_ms(path, shape, device, tile=tile) / yardstick
        for path in ("augmented", "padded", "eager")
    }
    parts.append("{augmented:9.2f} {padded:6.2f} {eager:6.2f}".format(**ratios))
    return " | ".join(parts)


def print_bounds(args: argparse.Namespace) -> None:
    """The first table: FLOPs, bytes and bounds by length and d_s."""
    device = DEVICES[args.device]
    tile = tuple(args.tile)
    print(
        f"{args.device}: {device.tflops} TFLOP/s, {device.terabytes} TB/s; {args.tokens} tokens, "
        f"{args.heads} heads of {args.head_dim}"
    )
    print(
        f"half-life {args.half_life:g}, tolerance {args.tolerance:.3g}; "
        f"scores in blocks of {tile[0]} x {tile[1]}"
    )
    print(
        "fwd: GFLOP of the forward; then GFLOP, MB and the bound in ms of forward + backward; "
        "x: that bound over plain's"
    )
    columns = f"{'fwd':>6} {'GFLOP':>6} {'MB':>6} {'ms':>7} {'x':>5}"
    others = f"{'x':>9} {'x':>6} {'x':>6}"
    titles = f"{'plain':^34} | {'exact':^34} | {'exact within the horizon':^34}"
    print(f"{'':11} | {titles} | augmented padded  eager")
    print(f"{'L':>6} {'Ds':>4} | {columns} | {columns} | {columns} | {others}")
    for length in args.lengths:
        for d_state in args.d_states:
            batch = args.tokens // length
            shape = Shape(batch, length, args.heads, args.head_dim, d_state, args.head_dim)
            horizon = horizon_tokens(d_state, args.half_life, args.tolerance)
            print(bounds_row(shape, device, horizon, tile))


def print_shares(args: argparse.Namespace) -> None:
    """The second table: share of importance products made, by half-life, d_s and length."""
    tile = tuple(args.tile)
    lengths = " ".join(f"{length:>6}" for length in args.lengths)
    print("\nshare of importance products made, in %")
    print(f"{'half-life':>9} {'Ds':>4} {'horizon':>8} | L {lengths}")
    for half_life in (10, 100, 1000, math.inf):
        for d_state in args.d_states:
            horizon = horizon_tokens(d_state, half_life, args.tolerance)
            shares = [100 * importance_share(length, horizon, tile) for length in args.lengths]
            cells = " ".join(f"{share:6.1f}" for share in shares)
            print(f"{half_life:9g} {d_state:4} {horizon:8.0f} |   {cells}")


def print_compiled(args: argparse.Namespace) -> None:
    """The third table: the kernels as compiled, at two half-lives and the one that is asked for."""
    from bench import instructions  # which takes its bytes from here

    shape = Shape(1, args.tokens, args.heads, args.head_dim, 2, args.head_dim)
    half_lives = sorted({3.0, 20.0, args.half_life})
    print("\nas compiled, on paper")
    try:
        for line in instructions.lines(
            args.lengths, args.d_states, shape, DEVICES[args.device], half_lives, args.tolerance
        ):
            print(line)
    except ValueError as error:
        print(f"none: {error}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench roofline",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--device", choices=DEVICES, default="H200")
    add("--heads", type=int, default=12)
    add("--head-dim", type=int, default=64, help="of q, k and v")
    add("--tokens", type=int, default=32768, help="of a batch: a multiple of every length")
    add("--d-states", type=int, nargs="+", default=[16, 32, 64, 128])
    add("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384, 32768])
    add("--half-life", type=float, default=100, help="tokens in which the decay halves (bounds)")
    tolerance = "largest importance term left out of a logit"
    add("--tolerance", type=float, default=TOLERANCE, help=tolerance)
    tile = "queries and keys of a block; 1 1: causal scores alone"
    add("--tile", type=int, nargs=2, default=[1, 1], help=tile)
    args = parser.parse_args(arguments)
    if any(length < 1 or args.tokens < length or args.tokens % length for length in args.lengths):
        parser.error(
            f"--tokens must be a multiple of every length, got {args.tokens} and {args.lengths}"
        )
    print_bounds(args)
    print_shares(args)
    print_compiled(args)
    return 0
