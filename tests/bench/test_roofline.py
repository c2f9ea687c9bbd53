"""The cost model of the attention paths: counts by hand or brute force, limits, errors."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.authors import eager_chain
from bench.roofline import (
    DEVICES,
    PATHS,
    Device,
    Shape,
    Stage,
    bound_ms,
    causal_scores,
    horizon_tokens,
    importance_share,
    main,
    stages,
)
from sisa_kernels.testing import problem
from sisa_model.models.context import rotary_tables

SHAPE = Shape(batch=2, length=1024, heads=12, head_dim=64, d_state=16, value_dim=64)
ROWS, SCORES = 2 * 1024 * 12, 2 * 12 * 1024 * 1025 // 2
H200 = DEVICES["H200"]


def macs(path, shape=SHAPE, **options):
    """MACs a score, by kernel."""
    scores = shape.batch * shape.heads * causal_scores(shape.length)
    return {
        stage.name: stage.flops / 2 / scores
        for stage in stages(path, shape, **options)
        if stage.flops
    }


@pytest.mark.parametrize(("d_state", "total"), [(16, 512), (32, 576), (64, 704), (128, 960)])
def test_macs_of_one_backward_kernel(d_state, total):
    shape = Shape(1, 256, 2, 64, d_state, 64)
    assert macs("plain", shape) == {"attention": 64 + 64, "dQ/dK/dV": 3 * 64 + 2 * 64}  # 448
    for path in ("augmented", "eager"):
        assert sum(macs(path, shape).values()) == total
    assert sum(macs("padded", shape).values()) == 7 * (64 + d_state)


def test_macs_of_the_exact_kernels():
    assert macs("exact") == {
        "attention": 64 + 64 + 16,
        "dK/dV": 2 * 64 + 2 * 64 + 2 * 16,
        "dQ": 2 * 64 + 64 + 2 * 16,
    }
    assert macs("exact", backward=False) == {"attention": 144}
    near = causal_scores(1024, horizon=100) / causal_scores(1024)
    assert sum(macs("exact", horizon=100).values()) == pytest.approx(
        9 * 64 + 5 * 16 * near, rel=1e-12
    )


def test_bytes_a_token_and_head():
    def per_row(path):
        return [stage.bytes / ROWS for stage in stages(path, SHAPE)]

    # 64 channels of bf16 are 128 bytes, 16 are 32; an fp32 vector is 4; 8 phases are 32.
    fused, fused_back = 4 * 128 + 4 * 32 + 36, 4 * 128 + 6 * 32 + 72
    assert per_row("plain") == [4 * 128, 4 * 128 + 4, 2 * 128 + 4, 7 * 128 + 8, 4 * 128]
    assert per_row("augmented") == [
        fused,
        4 * 128 + 2 * 32 + 4,
        2 * 128 + 4,
        7 * 128 + 4 * 32 + 8,
        fused_back,
    ]
    pad = 2 * 128 + 32
    assert per_row("padded") == [
        fused + pad,
        4 * 160 + 4,
        2 * 160 + 4,
        7 * 160 + 8,
        fused_back + pad,
    ]
    prologue = fused + 32 + 16 + 36  # b and the steps a second time, level, fraction, two norms
    read = 4 * 128 + 3 * 32 + 3 * 4  # q, k, v, dy, c, b, one lowered, level, log-sum-exp, delta
    dkdv, dq = read + 2 * 128 + 64, read + 128 + 64 + 4
    back = 4 * 128 + 4 * 32 + 2 * 64 + 8 + 32 + 3 * 36
    forward = 4 * 128 + 3 * 32 + 8
    assert per_row("exact") == [
        prologue,
        forward,
        2 * 128 + 4,
        prologue + 32 + 32,
        dkdv,
        dq,
        back,
    ]  # 16 channels of fp32 are 64


class Traffic(TorchDispatchMode):
    """Bytes of the tensors that ops read and write; views cost nothing."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        if not op.is_view:
            self.bytes += sum(
                x.nbytes for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)
            )
        return result


@pytest.mark.parametrize(("head_dim", "d_state"), [(64, 16), (32, 64)])
def test_eager_prologue_moves_what_the_chain_of_ops_moves(head_dim, d_state):
    L, H = 32, 64
    x, _ = problem(L=L, H=H, Dh=head_dim, Ds=d_state, dtype=torch.bfloat16)
    x = x._replace(rotary=rotary_tables(L, head_dim, torch.device("cpu")))
    inputs = x.scores().tensors()
    grads = [torch.ones(1, L, H, head_dim + d_state, dtype=torch.bfloat16) for _ in range(2)]
    with Traffic() as forward:
        results = eager_chain(x)
    with Traffic() as backward:
        torch.autograd.grad(results, inputs, grads)
    first, *_, last = stages("eager", Shape(1, L, H, head_dim, d_state, head_dim))
    # Within the rotary tables, which the model leaves out.
    assert first.bytes == pytest.approx(forward.bytes, rel=0.01)
    assert last.bytes == pytest.approx(backward.bytes, rel=0.01)


@pytest.mark.parametrize("tile", [(1, 1), (16, 8), (8, 16), (32, 32), (24, 10)])
@pytest.mark.parametrize("half_life", [0.01, 1.0, 3.3, 20.0, 1e6, math.inf])
def test_scores_against_a_count_over_blocks(half_life, tile):
    L, Ds, tolerance, lam = 150, 16, 2**-9, 1.7
    rows, columns = tile
    near = total = 0
    for start in range(0, L, rows):
        for first in range(0, min(start + rows, L), columns):
            end = first + columns - 1
            total += 1
            near += (
                end >= start
                or lam * math.exp(-math.log(2) * (start - end) / half_life) * Ds > tolerance
            )
    horizon = horizon_tokens(Ds, half_life, tolerance, lam)
    assert causal_scores(L, tile) == total * rows * columns
    assert causal_scores(L, tile, horizon) == near * rows * columns
    assert importance_share(L, horizon, tile) == near / total


def test_limits_of_the_horizon():
    assert causal_scores(1024) == 1024 * 1025 // 2
    assert causal_scores(1024, (128, 64)) == 128 * 64 * sum(range(2, 17, 2))
    assert horizon_tokens(16, 100) == pytest.approx(100 * math.log2(16 * 256))
    assert horizon_tokens(16, math.inf) == math.inf
    assert importance_share(1024, math.inf, (128, 64)) == 1
    assert horizon_tokens(16, 100, tolerance=17.0) == 0  # above Ds: never needed off the diagonal
    assert horizon_tokens(16, math.inf, tolerance=17.0) == 0
    assert importance_share(1024, 0.0, (64, 64)) == 16 / sum(range(17))
    assert importance_share(1024, horizon_tokens(16, 1e-3)) == 1024 / causal_scores(1024)


def test_monotony():
    shares = [
        [importance_share(L, horizon_tokens(16, h), (128, 64)) for L in (1024, 4096, 16384)]
        for h in (10, 100, 1000, 1e6)
    ]
    assert all(row == sorted(row, reverse=True) for row in shares)
    assert all(list(column) == sorted(column) for column in zip(*shares))

    def exact(length=2048, d_state=16, device=H200, **options):
        return bound_ms("exact", Shape(1, length, 12, 64, d_state, 64), device, **options)

    assert (
        exact(horizon=0.0)
        < exact(horizon=500)
        < exact()
        < exact(tile=(128, 64))
        < exact(d_state=32)
    )
    assert exact(1024) < exact(2048) < exact(4096)
    assert exact(backward=False) < exact()
    by_device = [exact(device=DEVICES[name]) for name in ("B200", "H200", "H100", "A100")]
    assert by_device == sorted(by_device)
    assert all(
        bound_ms("plain", SHAPE, H200) < bound_ms(path, SHAPE, H200)
        for path in PATHS
        if path != "plain"
    )
    assert (
        bound_ms("augmented", SHAPE, H200)
        < bound_ms("padded", SHAPE, H200)
        < bound_ms("eager", SHAPE, H200)
    )


def test_bound_is_the_larger_of_both_terms_summed_over_stages():
    device = Device(tflops=100, terabytes=2)
    assert Stage("", 10**12, 10**9).seconds(device) == 10**12 / 100e12
    assert Stage("", 10**9, 10**12).seconds(device) == 10**12 / 2e12
    prologue, attention = stages("plain", SHAPE, backward=False)
    assert attention.flops == 2 * 128 * SCORES
    memory, compute = prologue.bytes / H200.terabytes, attention.flops / H200.tflops
    assert compute > attention.bytes / H200.terabytes
    assert bound_ms("plain", SHAPE, H200, backward=False) == pytest.approx(
        1e-9 * (memory + compute), rel=1e-12
    )
    # Without a limit of one kind the other one is left.
    both = stages("exact", SHAPE)
    assert bound_ms("exact", SHAPE, Device(989, math.inf)) == pytest.approx(
        sum(s.flops for s in both) / 989e9, rel=1e-12
    )
    assert bound_ms("exact", SHAPE, Device(math.inf, 4.8)) == pytest.approx(
        sum(s.bytes for s in both) / 4.8e9, rel=1e-12
    )


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: Shape(1, 0, 12, 64, 16, 64), "length must be > 0, got 0"),
        (lambda: Shape(1, 8, 12, 64, 15, 64), "d_state must be even"),
        (lambda: Shape(1, 8, 12, 63, 16, 64), "head_dim must be even"),
        (lambda: Device(0, 4.8), "tflops"),
        (lambda: Device(989, math.nan), "terabytes"),
        (lambda: stages("flash", SHAPE), "path must be one of"),
        (lambda: stages("plain", SHAPE, horizon=100), "horizon must be inf on path plain"),
        (lambda: stages("exact", SHAPE, horizon=-1), "horizon must be >= 0"),
        (lambda: stages("exact", SHAPE, horizon=math.nan), "horizon must be >= 0"),
        (lambda: stages("exact", SHAPE, tile=(0, 64)), "tile_queries"),
        (lambda: stages("padded", Shape(1, 8, 12, 64, 16, 96)), "value_dim must be at most Dh"),
        (lambda: horizon_tokens(16, 0), "half_life"),
        (lambda: horizon_tokens(16, 100, 0), "tolerance"),
        (lambda: horizon_tokens(16, 100, lam=-1), "lam"),
    ],
)
def test_wrong_arguments_are_named(call, named):
    with pytest.raises(ValueError, match=f"^{named}"):
        call()


def test_command_line(capsys):
    def run(*arguments):
        assert main(["--tokens", "2048", "--d-states", "16", *arguments]) == 0

    run("--lengths", "1024", "--half-life", "10")
    out = capsys.readouterr().out
    row = next(row for row in out.splitlines() if row.startswith("  1024   16 |"))
    near = horizon_tokens(16, 10)
    for cell, path, options in zip(
        row.split("|")[1:], ("plain", "exact", "exact"), ({}, {}, {"horizon": near})
    ):
        kernels = stages(path, SHAPE, **options)
        forward, both = (
            1e-9 * sum(stage.flops for stage in part) for part in (kernels[:2], kernels)
        )
        ms = bound_ms(path, SHAPE, H200, **options)
        plain = bound_ms("plain", SHAPE, H200)
        megabytes = 1e-6 * sum(stage.bytes for stage in kernels)
        assert cell.split() == [
            f"{forward:.0f}",
            f"{both:.0f}",
            f"{megabytes:.0f}",
            f"{ms:.3f}",
            f"{ms / plain:.2f}",
        ]
    share = next(row for row in out.splitlines() if row.startswith("       10   16"))
    assert share.split()[-1] == f"{100 * importance_share(1024, near):.1f}"
    with pytest.raises(SystemExit):
        run("--lengths", "1000")
    assert "--tokens must be a multiple of every length" in capsys.readouterr().err
