"""Floor under the time of each attention path: FLOPs and bytes by shape, against a device's peak
(``python bench/roofline.py``).

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
and of the few scalars a block."""

import argparse
import math
from dataclasses import astuple, dataclass
from functools import cache
from typing import NamedTuple

from sisa_model.models.flops import PEAK_TFLOPS

BF16, FP32 = 2, 4
LAM = 0.3133  # at initialisation: softplus(-1)
TOLERANCE = 2.0**-8  # of a logit: the kernels' own in bf16 (triton_attention.default_horizon)
PATHS = ("plain", "augmented", "padded", "eager", "exact")


def check_positive(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name} must be > 0, got {value}")


@dataclass(frozen=True)
class Device:
    tflops: float  # dense bf16 matrix products, 1e12 FLOP/s
    terabytes: float  # memory bandwidth, 1e12 bytes/s

    def __post_init__(self) -> None:
        check_positive(tflops=self.tflops, terabytes=self.terabytes)


# NVIDIA's data sheets: A100 80GB SXM, H100 SXM, H200 SXM, HGX B200 (a GPU of it).
TERABYTES = {"A100": 2.04, "H100": 3.35, "H200": 4.8, "B200": 8.0}
DEVICES = {name: Device(PEAK_TFLOPS[name], terabytes) for name, terabytes in TERABYTES.items()}


@dataclass(frozen=True)
class Shape:
    """B, L, H, Dh, Ds, Dv; ``plain`` has no use for the state width."""

    batch: int
    length: int
    heads: int
    head_width: int
    state_width: int
    value_width: int

    def __post_init__(self) -> None:
        check_positive(**vars(self))
        for name in ("head_width", "state_width"):
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
    state_width: int, half_life: float, tolerance: float = TOLERANCE, lam: float = LAM
) -> float:
    """Distance in tokens from which on no importance product is made: half_life log2(max(lam, 1) Ds
    / tolerance).

    A block pair needs none where lam exp(g_start(I) - g_end(J)) max|c_I| max|b_J| <= tolerance, lam
    taken as at least 1 (see triton_attention._bounds). Here each norm is sqrt(Ds), that of channels
    of unit variance, and g falls by ln 2 each half_life."""
    check_positive(state_width=state_width, half_life=half_life, tolerance=tolerance, lam=lam)
    largest = max(lam, 1) * state_width / tolerance
    return half_life * math.log2(largest) if largest > 1 else 0.0


@cache
def causal_scores(length: int, tile: tuple[int, int] = (1, 1), horizon: float = math.inf) -> int:
    """Scores of a head in whole blocks of ``tile`` = (queries, keys): length (length + 1) / 2 for
    tile (1, 1).

    With a ``horizon`` in tokens, those that get an importance product: the key block reaches into
    the query block, or its last token lies less than horizon tokens before the query block's first.
    """
    rows, columns = tile
    check_positive(length=length, tile_queries=rows, tile_keys=columns)
    if not horizon >= 0:
        raise ValueError(f"horizon must be >= 0, got {horizon}")
    reach = max(
        0, math.ceil(min(horizon, length)) - 1
    )  # the largest whole distance below the horizon
    blocks = 0
    for start in range(0, length, rows):
        last = min(start + rows, length) - 1
        blocks += last // columns - max(0, (start - reach) // columns) + 1
    return blocks * rows * columns


def importance_share(length: int, horizon: float, tile: tuple[int, int] = (1, 1)) -> float:
    """Share of the causal block pairs that get an importance product, in (0, 1]."""
    return causal_scores(length, tile, horizon) / causal_scores(length, tile)


def stages(
    path: str,
    shape: Shape,
    *,
    backward: bool = True,
    horizon: float = math.inf,
    tile: tuple[int, int] = (1, 1),
) -> list[Stage]:
    """The path's kernels with their FLOPs and compulsory bytes: every tensor read or written once a
    kernel.

    ``horizon`` in tokens is for ``exact`` alone. ``tile`` (queries, keys) counts scores in whole
    blocks; (1, 1) counts the causal ones, which is the floor."""
    if path not in PATHS:
        raise ValueError(f"path must be one of {', '.join(PATHS)}, got {path!r}")
    if path != "exact" and horizon != math.inf:
        raise ValueError(
            f"horizon must be inf on path {path}, which makes every importance product, got {horizon}"
        )
    B, L, H, Dh, Ds, Dv = astuple(shape)
    if path == "padded" and Dv > Dh + Ds:
        raise ValueError(
            f"value_width must be at most Dh + Ds = {Dh + Ds} on path padded, got {Dv}"
        )
    rows, scores, near = (
        B * L * H,
        B * H * causal_scores(L, tile),
        B * H * causal_scores(L, tile, horizon),
    )

    # Forward: q, k, b, c, log_decay, theta in; queries and keys of width Dh + Ds out. Backward: the
    # gradients of those and b, c, log_decay, theta in; six gradients out.
    fused = BF16 * 4 * (Dh + Ds) + FP32 * (1 + Ds // 2)
    fused_back = BF16 * (4 * (Dh + Ds) + 2 * Ds) + FP32 * 2 * (1 + Ds // 2)
    pad = BF16 * (Dv + Dh + Ds)
    prologue, prologue_back = {
        "plain": (BF16 * 4 * Dh, BF16 * 4 * Dh),
        "augmented": (fused, fused_back),
        "padded": (fused + pad, fused_back + pad),  # v padded; dy padded
        # Tensors read and written by the ops of authors.eager_chain and of its autograd on bf16
        # inputs, summed.
        "eager": (112 * Dh + 164 * Ds + 80, 136 * Dh + 350 * Ds + 152),
        # Out with the operands: two halves of g, norms of b and c. Back: dc, db, dL/ds_ii and the
        # phases' tables in fp32.
        "exact": (fused + FP32 * 4, BF16 * 4 * (Dh + Ds) + FP32 * (2 + Ds // 2 + 3 * Ds)),
    }[path]
    qk, v = Dh if path == "plain" else Dh + Ds, Dh + Ds if path == "padded" else Dv

    # Forward: q, k, v in; y and the log-sum-exp out. delta: y and dy in, their product's row sums
    # out.
    forward = BF16 * 2 * (qk + v) + FP32
    delta = Stage("delta", 0, rows * (BF16 * 2 * v + FP32))
    if path == "exact":
        macs = (Dh + Dv) * scores + Ds * near
        dkdv = 2 * ((Dh + Dv) * scores + Ds * near)  # S, dP, dV, dK
        dq = (2 * Dh + Dv) * scores + 2 * Ds * near  # S, dP, dQ
        # q, k, v, dy, two halves of g, log-sum-exp and delta in, both times; the importance
        # gradients out in fp32.
        common = BF16 * 2 * (qk + v) + 4 * FP32
        kernels = [
            Stage(
                "prologue again", 0, rows * (prologue + FP32 * Ds)
            ),  # recomputed, not saved; now with the phases' tables
            Stage("dK/dV", 2 * dkdv, rows * (common + BF16 * (Dh + v) + FP32 * Ds)),
            Stage("dQ", 2 * dq, rows * (common + BF16 * Dh + FP32 * (Ds + 1))),
        ]
        forward += 2 * FP32  # the halves of g
    else:
        macs = (qk + v) * scores
        # q, k, v, dy, log-sum-exp and delta in; dq, dk, dv out.
        kernels = [
            Stage(
                "dQ/dK/dV",
                2 * (3 * qk + 2 * v) * scores,
                rows * (BF16 * (4 * qk + 3 * v) + 2 * FP32),
            )
        ]
    result = [Stage("prologue", 0, rows * prologue), Stage("attention", 2 * macs, rows * forward)]
    return (
        [*result, delta, *kernels, Stage("prologue backward", 0, rows * prologue_back)]
        if backward
        else result
    )


def bound_ms(path: str, shape: Shape, device: Device, **options) -> float:
    """Least milliseconds of the path on the device; ``options`` are those of :func:`stages`."""
    return 1e3 * sum(stage.seconds(device) for stage in stages(path, shape, **options))


def line(shape: Shape, device: Device, horizon: float, tile: tuple[int, int]) -> str:
    """A row of the first table: plain, exact, exact within the horizon in full, of the others the
    bound over plain's.
    """
    yardstick, row = bound_ms("plain", shape, device, tile=tile), []
    for path, options in (("plain", {}), ("exact", {}), ("exact", {"horizon": horizon})):
        forward, both = (
            stages(path, shape, backward=backward, tile=tile, **options)
            for backward in (False, True)
        )
        gflop = (1e-9 * sum(stage.flops for stage in kernels) for kernels in (forward, both))
        megabytes, ms = (
            1e-6 * sum(stage.bytes for stage in both),
            bound_ms(path, shape, device, tile=tile, **options),
        )
        row.append(
            "{:6.0f} {:6.0f} {:6.0f} {:7.3f} {:5.2f}".format(*gflop, megabytes, ms, ms / yardstick)
        )
    rest = (
        bound_ms(path, shape, device, tile=tile) / yardstick
        for path in ("augmented", "padded", "eager")
    )
    return " | ".join(
        [f"{shape.length:6} {shape.state_width:4}", *row, "{:9.2f} {:6.2f} {:6.2f}".format(*rest)]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=DEVICES, default="H200")
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--head-width", type=int, default=64, help="of q, k and v")
    parser.add_argument(
        "--tokens", type=int, default=32768, help="of a batch: a multiple of every length"
    )
    parser.add_argument("--state-widths", type=int, nargs="+", default=[16, 32, 64, 128])
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384, 32768]
    )
    parser.add_argument(
        "--half-life",
        type=float,
        default=100,
        help="tokens in which the decay halves (first table)",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=TOLERANCE,
        help="largest importance term left out of a logit",
    )
    parser.add_argument(
        "--tile",
        type=int,
        nargs=2,
        default=[1, 1],
        help="queries and keys of a block; 1 1: causal scores alone",
    )
    args = parser.parse_args()
    if any(length < 1 or args.tokens < length or args.tokens % length for length in args.lengths):
        parser.error(
            f"--tokens must be a multiple of every length, got {args.tokens} and {args.lengths}"
        )
    device, tile, width = DEVICES[args.device], tuple(args.tile), args.head_width
    print(
        f"{args.device}: {device.tflops} TFLOP/s, {device.terabytes} TB/s; {args.tokens} tokens, {args.heads} heads of {width}"
    )
    print(
        f"half-life {args.half_life:g}, tolerance {args.tolerance:.3g}; scores in blocks of {tile[0]} x {tile[1]}"
    )
    print(
        "fwd: GFLOP of the forward; then GFLOP, MB and the bound in ms of forward + backward; x: that bound over plain's"
    )
    part = f"{'fwd':>6} {'GFLOP':>6} {'MB':>6} {'ms':>7} {'x':>5}"
    print(
        f"{'':11} | {'plain':^34} | {'exact':^34} | {'exact within the horizon':^34} | augmented padded  eager"
    )
    print(f"{'L':>6} {'Ds':>4} | {part} | {part} | {part} | {'x':>9} {'x':>6} {'x':>6}")
    for length in args.lengths:
        for state_width in args.state_widths:
            shape = Shape(args.tokens // length, length, args.heads, width, state_width, width)
            print(
                line(
                    shape, device, horizon_tokens(state_width, args.half_life, args.tolerance), tile
                )
            )

    print(
        f"\nshare of importance products made, in %\n{'half-life':>9} {'Ds':>4} {'horizon':>8} | L",
        end="",
    )
    print(*(f"{length:>6}" for length in args.lengths))
    for half_life in (10, 100, 1000, math.inf):
        for state_width in args.state_widths:
            near = horizon_tokens(state_width, half_life, args.tolerance)
            shares = (
                f"{100 * importance_share(length, near, tile):6.1f}" for length in args.lengths
            )
            print(f"{half_life:9g} {state_width:4} {near:8.0f} |  ", *shares)


if __name__ == "__main__":
    main()
