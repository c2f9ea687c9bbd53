"""The Triton kernels, interpreted where there is no GPU: odd shapes, the horizon, plain."""

import contextlib
import dataclasses
import json
import math
import os
import statistics
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import BaseTorchDispatchMode

import sisa_kernels as sk
from sisa_kernels import attention, ops, selfcheck
from sisa_kernels.inputs import SisaInputs
from sisa_kernels.rotation import rotate
from sisa_kernels.testing import (
    gradient_errors,
    in_fp64,
    oracle,
    relative,
    value_and_grads,
    worst_row,
)
from sisa_kernels.triton import tiles
from sisa_kernels.triton.tiles import Tile, Tiles
from tests.support import ROOT, same_dtype
from tests.support.attention import Call, exactly
from tests.support.problems import problem
from tests.support.prologue import first_and_last, horizon_bounds

ta = pytest.importorskip("sisa_kernels.triton.op", reason="needs the package triton")
prologue_kernels = pytest.importorskip(
    "sisa_kernels.triton.prologue_kernels", reason="needs the package triton"
)
tune = pytest.importorskip("sisa_kernels.triton.tune", reason="needs the package triton")

# The interpreter runs on the CPU; a GPU runs the kernels themselves.
DEVICE = torch.device("cpu" if ta.INTERPRETED else "cuda")
SMALL = Tiles(Tile(64, 32, 4, 2), Tile(32, 64, 4, 2), Tile(32, 64, 4, 2))


HALVES = [torch.float16, torch.bfloat16]
DTYPES = [
    torch.float32,
    torch.bfloat16,
    pytest.param(torch.float16, marks=pytest.mark.slow),
]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles so small that 257 tokens make several, one taller than wide and another wider.

    The kernels around take them all at a time, as the interpreter likes it."""
    monkeypatch.setattr(ta, "choose_tiles", lambda *_: SMALL)
    monkeypatch.setattr(prologue_kernels, "CHUNK", 512)


@pytest.fixture(autouse=True)
def bf16_is_taken(monkeypatch):
    """By the interpreter as tests/support/interpreter.py mends it."""
    monkeypatch.setattr(ta, "INTERPRETED_DTYPES", ta.DTYPES)


def on_device(inputs, dy):
    leaves = {name: x.detach().to(DEVICE).requires_grad_() for name, x in inputs.items()}
    return leaves, dy.to(DEVICE)


def check(inputs, dy, function=sk.sisa_attention, **kwargs):
    """It errs as PyTorch does in the same dtype, :func:`same_dtype.check`."""
    inputs, dy = on_device(inputs, dy)
    kernel = {**kwargs, "backend": "triton"} if function is sk.sisa_attention else kwargs
    found = value_and_grads(function, inputs, dy, **kernel)
    kwargs = {name: x for name, x in kwargs.items() if name != "horizon"}
    same_dtype.check(found, oracle(inputs, dy, **kwargs), inputs, dy, **kwargs)


@pytest.mark.parametrize("decay", [-6.0, -3.0, 1.0])
@pytest.mark.parametrize("L", [1, 63, 257])
def test_exact(L, decay):
    check(*problem(L=L, decay=decay))


@pytest.mark.slow
@pytest.mark.parametrize("decay", [-5.0, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_at_length_1000(dtype, decay):
    check(*problem(L=1000, decay=decay, dtype=dtype))


@pytest.mark.parametrize("decay", [-7.0, 1.0])
@pytest.mark.parametrize(
    ("dtype", "L"),
    [
        *((dtype, L) for dtype in HALVES for L in (1, 63)),
        (torch.bfloat16, 257),
        pytest.param(torch.float16, 257, marks=pytest.mark.slow),
    ],
)
def test_exact_in_half_precision(dtype, L, decay):
    check(*problem(L=L, decay=decay, dtype=dtype))


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "decay"), [(torch.float16, -3.0), (torch.bfloat16, 1.0)])
def test_the_gradient_for_lambda_over_many_heads(dtype, decay):
    """One number a head: only over many of them is its error more than chance."""
    inputs, dy = on_device(*problem(L=100, H=48, Dh=16, decay=decay, dtype=dtype))
    _, right = oracle(inputs, dy)
    errors = [
        gradient_errors(value_and_grads(function, inputs, dy)[1], right, inputs)["lam"]
        for function in (ta.exact_attention, same_dtype.attention)
    ]
    assert errors[0] <= 1.2 * errors[1]


def change_of_lam(inputs, dy, y):
    """What rounding the exact y to dy's dtype does to lam's gradient, [H].

    It shifts the <dy, y> of a backward that takes it from the y that was saved, so as a gradient of
    each token's lse would."""
    call = Call(**{name: x.detach() for name, x in inputs.items()})
    rounding = ((y.to(dy.dtype).double() - y) * dy.double()).sum(3).transpose(1, 2)
    return exactly(call, torch.zeros_like(dy), rounding).grads["lam"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALVES)
def test_a_large_lambda(dtype):
    """One key takes all, and a rounding decides which: only a median over seeds is no chance."""
    found, allowed = [], []
    for seed in range(8):
        inputs, dy = on_device(*problem(L=100, Dh=16, decay=-3.0, lam=30.0, dtype=dtype, seed=seed))
        y_ref, right = oracle(inputs, dy)
        for function, errors in (
            (ta.exact_attention, found),
            (same_dtype.attention, allowed),
        ):
            y, grads = value_and_grads(function, inputs, dy)
            of_y = {"y": relative(y, y_ref), "worst row": worst_row(y, y_ref)}
            errors.append(of_y | gradient_errors(grads, right, inputs))
        shifted = {**right, "lam": right["lam"] + change_of_lam(inputs, dy, y_ref)}
        of_rounding = gradient_errors(shifted, right, inputs)["lam"]
        allowed[-1]["lam"] = max(allowed[-1]["lam"], of_rounding)
    medians = {
        name: tuple(statistics.median(x[name] for x in errors) for errors in (found, allowed))
        for name in found[0]
    }
    assert not {name: pair for name, pair in medians.items() if not pair[0] <= 2 * pair[1]}


@pytest.mark.gpu
@pytest.mark.parametrize("decay", [-5.0, 1.0])
@pytest.mark.parametrize("Ds", [16, 32, 64, 128])
@pytest.mark.parametrize("L", [1, 63, 257, 1000, 2048])
def test_exact_in_bf16_with_the_tiles_of_the_table(L, Ds, decay, monkeypatch):
    monkeypatch.setattr(ta, "choose_tiles", tiles.choose_tiles)
    check(*problem(L=L, Ds=Ds, decay=decay, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    ("Dh", "Ds", "Dv"), [(16, 32, 128), (128, 64, 16), (24, 6, 72), (32, 128, 64)]
)
@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)]
)
def test_widths(dtype, Dh, Ds, Dv):
    check(*problem(L=130, H=1, Dh=Dh, Ds=Ds, Dv=Dv, decay=-2.0, dtype=dtype))


@pytest.mark.parametrize("decay", [-4.0, pytest.param(1.0, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_grouped_heads_rotary_documents_and_value_width(dtype, decay):
    inputs, dy = problem(L=257, H=6, G=2, Dh=32, Ds=16, Dv=80, decay=decay, dtype=dtype)
    angle = torch.rand(257, 16, device=DEVICE) * 6
    bounds = torch.tensor([0, 1, 64, 70, 200, 257], dtype=torch.int32, device=DEVICE)
    check(inputs, dy, rotary=(angle.cos(), angle.sin()), cu_seqlens=bounds)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tile_whose_own_range_no_float_holds(dtype):
    """Tokens that forget all before them among tokens that forget nothing: g keeps its digits."""
    inputs, dy = problem(L=257, decay=-6.0, dtype=dtype)
    log_decay = inputs["log_decay"].detach().clone()
    log_decay[:, 3::7] = -math.inf
    log_decay[:, 5::7] = -300.0
    check({**inputs, "log_decay": log_decay.requires_grad_()}, dy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batch_and_strided_inputs(dtype):
    inputs, dy = on_device(*problem(B=2, L=63, H=2, decay=0.0, dtype=dtype))
    packed = torch.cat([inputs[name].detach().flatten(2) for name in ("q", "k", "v", "b", "c")], -1)
    views = dict(zip(("q", "k", "v", "b", "c"), packed.split([128, 128, 128, 32, 32], -1)))
    strided = {
        name: views[name].unflatten(-1, (2, -1)) if name in views else x
        for name, x in inputs.items()
    }
    strided["log_decay"] = inputs["log_decay"].detach().mT.contiguous().mT
    strided["v"] = strided["v"].detach().transpose(2, 3).contiguous().transpose(2, 3)
    assert not strided["q"].is_contiguous()
    y, grads = value_and_grads(sk.sisa_attention, inputs, dy, backend="triton")
    with copied("v"):
        y_strided, grads_strided = value_and_grads(sk.sisa_attention, strided, dy, backend="triton")
    torch.testing.assert_close(y_strided, y, rtol=0, atol=0)
    torch.testing.assert_close(grads_strided, grads, rtol=0, atol=0)
    check(inputs, dy)


@contextlib.contextmanager
def copied(name):
    """What is copied before the kernels read it is said, once for forward and backward."""
    ops._said.clear()
    with pytest.warns(UserWarning, match=f"the Triton kernels copy {name}, whose strides") as said:
        yield
    assert len(said) == 1


@pytest.mark.parametrize("odd", ["token", "address"])
def test_rows_that_begin_at_odd_addresses_are_copied(odd):
    """Of them Triton would load single numbers, and not ahead of their use."""
    inputs, dy = on_device(*problem(L=63, Dh=16, dtype=torch.bfloat16))
    y, grads = value_and_grads(sk.sisa_attention, inputs, dy, backend="triton")
    wide = inputs["v"].new_zeros(63 * 49 + 8)
    first, stride = {"token": (0, 49), "address": (1, 48)}[odd]
    v = wide[first:].as_strided(inputs["v"].shape, (63 * 49, stride, 16, 1))
    v.copy_(inputs["v"].detach())
    with copied("v"):
        found = value_and_grads(sk.sisa_attention, {**inputs, "v": v}, dy, backend="triton")
    torch.testing.assert_close(found, (y, grads), rtol=0, atol=0)


def test_one_lambda_shared_by_all_heads():
    """As the model shares it: expanded, with a stride of 0."""
    inputs, _ = on_device(*problem(L=63, H=4))
    shared = {**inputs, "lam": inputs["lam"][:1].detach().expand(4)}
    y = sk.sisa_attention(**shared, backend="triton")
    assert torch.equal(
        y, sk.sisa_attention(**{**inputs, "lam": shared["lam"].contiguous()}, backend="triton")
    )


@pytest.mark.slow
def test_two_runs_give_the_same_bits():
    inputs, dy = on_device(*problem(L=257, H=4, G=2, decay=-2.0))
    torch.testing.assert_close(
        *(value_and_grads(sk.sisa_attention, inputs, dy, backend="triton") for _ in range(2)),
        rtol=0,
        atol=0,
    )


def test_addresses_past_32_bits():
    """A token stride that puts later tokens more than 2^32 bytes and 2^31 elements away."""
    L, width, stride = 600, 16, 2**23
    # Touched only where it is used.
    memory = torch.empty((L - 1) * stride + width, dtype=torch.float16, device=DEVICE)
    k = memory.as_strided((1, L, 1, width), (0, stride, width, 1))
    dense = torch.randn(1, L, 1, width, dtype=torch.float16, device=DEVICE)
    k.copy_(dense)
    q, v = (torch.randn(1, L, 1, width, dtype=torch.float16, device=DEVICE) for _ in range(2))
    assert torch.equal(ta.causal_attention(q, k, v), ta.causal_attention(q, dense, v))


# ---- The horizon ---------------------------------------------------------------------------------


def importance(q, k, v, b, c, log_decay, theta, lam):
    """lam exp(g_i - g_j) (R(Phi_i) c_i).(R(Phi_j) b_j) in fp64, [B, H, L, L]; 0 for j > i."""
    g, phase = log_decay.cumsum(1), theta.cumsum(1)
    b, c = (rotate(x, phase.cos(), phase.sin()).transpose(1, 2) for x in (b, c))
    g = g.transpose(1, 2)
    L = g.shape[2]
    above = ~torch.ones(L, L, dtype=torch.bool, device=g.device).tril()
    exponent = (g[..., :, None] - g[..., None, :]).masked_fill(above, -math.inf)
    return lam[:, None, None] * exponent.exp() * (c @ b.mT)


def skipped(starts, ends, tile, L):
    """The pairs [B, H, L, L] that the query kernels (``starts``) and the key kernel leave out."""
    token = torch.arange(L, device=DEVICE)
    by_query = token[None, None, None] < starts.repeat_interleave(tile.m, 2)[:, :, :L, None]
    by_key = token[None, None, :, None] >= ends.repeat_interleave(tile.n, 2)[:, :, None, :L]
    # Key tiles wholly before the query tile.
    behind = token // tile.n * tile.n + tile.n <= token[:, None] // tile.m * tile.m
    return by_query & behind, by_key & behind


@pytest.mark.parametrize("tile", [Tile(64, 32, 4, 2, 32), Tile(32, 64, 4, 2, 32)])
@pytest.mark.parametrize("decay", [-2.0, 0.0])
def test_no_product_past_the_horizon_exceeds_the_bound(tile, decay):
    """Whatever is left out is at most the tolerance, and no pair of tiles is made in vain.

    No pair whose bound, recomputed densely, lies below it (up to the monotone rule: all tiles
    beyond must lie below it too)."""
    inputs, _ = on_device(*problem(B=2, L=500, H=2, decay=decay))
    exact = in_fp64(inputs)
    tolerance = 1e-3
    _, _, x = ta.prologue(SisaInputs(**inputs).scores(), 32)
    starts, ends, _ = ta.horizons(x, tolerance, starts=tile, ends=tile)
    size = importance(**exact).abs()
    for left_out in skipped(starts, ends, tile, 500):
        assert left_out.any()
        assert size[left_out].max() <= tolerance * (1 + 1e-5)
    need, reach = horizon_bounds(SisaInputs(**inputs), tile, tolerance)
    past = reach[..., None, :] <= need[..., :, None]
    g = exact["log_decay"].cumsum(1).transpose(1, 2)
    for i, j in ((3, 0), (4, 1), (5, 3)):
        rows, cols = slice(i * tile.m, (i + 1) * tile.m), slice(j * tile.n, (j + 1) * tile.n)
        bound = exact["lam"] * (g[..., rows][..., 0] - g[..., cols][..., -1]).exp()
        bound *= exact["c"].norm(dim=-1)[:, rows].amax(1)
        bound *= exact["b"].norm(dim=-1)[:, cols].amax(1)
        at_the_edge = ((bound / tolerance - 1).abs() < 1e-5).any()
        assert at_the_edge or torch.equal(past[:, :, i, j], bound <= tolerance)
    by_query, by_key = first_and_last(past, tile)
    assert torch.equal(starts, by_query)
    assert torch.equal(ends, by_key)


@pytest.mark.parametrize(("factor", "left_out"), [(1 - 1e-3, True), (1 + 1e-3, False)])
def test_the_bound_is_tight(factor, left_out):
    """Aligned unit operands, lambda 1, no decay: each product is 1, and the horizon turns there."""
    inputs, _ = on_device(*problem(L=256, H=1, Ds=16))
    ones = torch.zeros_like(inputs["b"]).index_fill(3, torch.tensor([0], device=DEVICE), 1.0)
    tolerance = 1 / factor
    still = {name: torch.zeros_like(inputs[name]) for name in ("log_decay", "theta")}
    aligned = {**inputs, **still, "b": ones, "c": ones, "lam": torch.ones_like(inputs["lam"])}
    _, _, x = ta.prologue(SisaInputs(**aligned).scores(), 64)
    tile = Tile(64, 64, 4, 2)
    starts, ends, _ = ta.horizons(x, tolerance, starts=tile, ends=tile)
    own = torch.arange(4, device=DEVICE).expand_as(starts) * 64
    assert torch.equal(starts, own if left_out else 0 * own)
    assert torch.equal(ends, own if left_out else 0 * own + 256)


def test_products_past_the_horizon_are_not_made_and_no_others():
    """With a wide tolerance the result is Eq. 2 without exactly the pairs before the starts."""
    inputs, dy = on_device(*problem(L=257, H=2, decay=-3.0))
    exact = in_fp64(inputs)
    tolerance = 2.0
    _, _, x = ta.prologue(SisaInputs(**inputs).scores(), 32)
    starts = ta.horizons(x, tolerance, starts=SMALL.forward).starts
    left_out, _ = skipped(starts, starts.new_zeros(1, 2, 9), SMALL.forward, 257)
    assert 0.1 < left_out.double().mean() < 0.5
    score = torch.einsum("bihd,bjhd->bhij", exact["q"], exact["k"]) / 8
    score += importance(**exact).masked_fill(left_out, 0.0)
    above = torch.ones(257, 257, dtype=torch.bool, device=DEVICE).triu(1)
    weight = score.masked_fill(above, -math.inf).softmax(-1)
    expected = torch.einsum("bhij,bjhd->bihd", weight, exact["v"])
    y, grads = value_and_grads(ta.exact_attention, inputs, dy, horizon=tolerance)
    assert relative(y, expected) <= 1e-6
    _, full = value_and_grads(ta.exact_attention, inputs, dy, horizon=None)
    changes = {name: relative(grads[name], full[name].double()) for name in ("b", "c", "log_decay")}
    assert all(1e-4 < change < 0.5 for change in changes.values()), changes
    check(inputs, dy, function=ta.exact_attention, horizon=None)


@pytest.mark.parametrize("small", ["b", "c", "lam"])
def test_small_operands_keep_their_gradients_past_the_horizon(small):
    """Where b or c is 0, as a model may begin, or lambda tiny, gradients come from far away too."""
    inputs, dy = problem(L=257, H=2, decay=-4.0)
    size = 1e-9 if small == "lam" else 0.0
    check({**inputs, small: (size * inputs[small].detach()).requires_grad_()}, dy)


# ---- Plain attention -----------------------------------------------------------------------------


@pytest.mark.parametrize("documents", [None, [0, 40, 257]])
def test_without_the_importance_term_it_is_plain_attention(documents):
    inputs, dy = on_device(*problem(L=257, H=4, G=2, Dv=32))
    leaves = {name: inputs[name] for name in ("q", "k", "v")}
    bounds = (
        None if documents is None else torch.tensor(documents, dtype=torch.int32, device=DEVICE)
    )
    y, grads = value_and_grads(ta.causal_attention, leaves, dy, cu_seqlens=bounds)

    token = torch.arange(257, device=DEVICE)
    document = token >= (0 if documents is None else 40)
    mask = (document[:, None] == document) & (token[:, None] >= token)

    def stock(q, k, v):
        heads = (x.transpose(1, 2) for x in (q, k, v))
        y = F.scaled_dot_product_attention(*heads, attn_mask=mask, enable_gqa=True)
        return y.transpose(1, 2)

    y_ref, grads_ref = value_and_grads(stock, in_fp64(leaves), dy.double())
    assert relative(y, y_ref) <= 1e-6
    assert max(relative(grads[name], grads_ref[name]) for name in leaves) <= 2e-6
    # An importance term that weighs almost nothing gives the same.
    faint = sk.sisa_attention(
        **{**inputs, "lam": torch.full_like(inputs["lam"], 1e-12)},
        backend="triton",
        cu_seqlens=bounds,
    )
    assert relative(faint, y_ref) <= 1e-6


# ---- The operator --------------------------------------------------------------------------------


def test_opcheck():
    inputs, dy = on_device(*problem(L=33, H=2, Dh=16, Ds=4))
    tensors = list(inputs.values())
    torch.library.opcheck(ta.triton_exact, (*tensors, None, None, None, 2.0**-24))
    torch.library.opcheck(ta.triton_exact, (*tensors[:3], *[None] * 8, None))
    y, lse = ta.triton_exact(*tensors, None, None, None, None)
    torch.library.opcheck(
        ta.triton_exact_backward,
        (dy, y.detach(), lse, *(x.detach() for x in tensors), None, None, None, None),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_compiles_in_one_graph():
    inputs, dy = on_device(*problem(L=63, Dh=16))

    def scaled(**kwargs):
        return 2 * sk.sisa_attention(**kwargs, backend="triton")

    y, grads = value_and_grads(scaled, inputs, dy)
    y_compiled, grads_compiled = value_and_grads(torch.compile(scaled, fullgraph=True), inputs, dy)
    torch.testing.assert_close(y_compiled, y, rtol=0, atol=0)
    torch.testing.assert_close(grads_compiled, grads, rtol=0, atol=0)


@pytest.mark.gpu
def test_captured_in_a_cuda_graph():
    inputs, dy = on_device(*problem(L=257, dtype=torch.bfloat16))
    for _ in range(3):
        expected = value_and_grads(sk.sisa_attention, inputs, dy, backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = value_and_grads(sk.sisa_attention, inputs, dy, backend="triton")
    graph.replay()
    torch.testing.assert_close(result, expected, rtol=0, atol=0)


def test_a_second_derivative_is_refused():
    inputs, _ = on_device(*problem(L=33, Dh=16))
    y = sk.sisa_attention(**inputs, backend="triton")
    (dq,) = torch.autograd.grad(y.sum(), inputs["q"], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        dq.sum().backward()


def test_forward_mode_is_refused():
    inputs, _ = on_device(*problem(L=9, H=1, Dh=16))
    q, k, v = (inputs[name].detach() for name in ("q", "k", "v"))
    for attend in (
        lambda q: ta.causal_attention(q, k, v),
        lambda q: ta.exact_attention(**{**inputs, "q": q}),
    ):
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            torch.func.jvp(attend, (q,), (q,))


def test_operands_it_does_not_take_are_named():
    inputs, _ = on_device(*problem(L=9, H=1))
    with pytest.raises(
        ValueError,
        match=r"backend 'triton' cannot run here: its kernels take .* not torch.float64",
    ):
        sk.sisa_attention(**in_fp64(inputs), backend="triton")
    wide, _ = on_device(*problem(L=9, H=1, Dh=136, Ds=130))
    with pytest.raises(
        ValueError, match="its kernels take widths up to 128, not Dh = 136, Dv = 136, Ds = 130"
    ):
        sk.sisa_attention(**wide, backend="triton")
    with pytest.raises(
        ValueError,
        match="the Triton path cannot run: its kernels take widths up to 128, not Dh = 136",
    ):
        ta.causal_attention(wide["q"], wide["k"], wide["v"])
    for horizon in (0.0, -1.0, math.nan, "far", 1):
        with pytest.raises(ValueError, match='horizon must be "auto", None or a float > 0'):
            ta.exact_attention(**inputs, horizon=horizon)
    q, k, v = (inputs[name].detach() for name in ("q", "k", "v"))
    with pytest.raises(ValueError, match=r"k must have shape \[1, 9, 1, 64\], got \[1, 8, 1, 64\]"):
        ta.causal_attention(q, k[:, :8], v)
    with pytest.raises(TypeError, match=r"q must be a torch.Tensor, got list"):
        ta.causal_attention([q], k, v)
    with pytest.raises(TypeError, match=r"v must be torch.float32, got torch.float16"):
        ta.causal_attention(q, k, v.half())


@pytest.mark.skipif(not ta.INTERPRETED, reason="about the interpreter's own limit")
def test_bf16_is_refused_by_the_interpreter_as_it_comes(monkeypatch):
    monkeypatch.setattr(ta, "INTERPRETED_DTYPES", ta.DTYPES[:2])
    inputs, _ = problem(L=9, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"in the interpreter, not torch.bfloat16"):
        sk.sisa_attention(**inputs, backend="triton")


def test_without_the_interpreter_a_cpu_says_what_it_lacks():
    code = "import sisa_kernels as sk, json; print(json.dumps(sk.backends()['triton']))"
    env = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == (
        "available" if torch.cuda.is_available() else "needs a CUDA device"
    )


# ---- The check of a first use --------------------------------------------------------------------


@pytest.fixture
def preferred(monkeypatch):
    """ "auto" prefers the Triton path here too, and nothing has been checked or said yet."""
    monkeypatch.setattr(attention, "_preferred", lambda mode, device: "triton")
    monkeypatch.delenv("SISA_BACKEND", raising=False)
    selfcheck._verdicts.clear()
    ops._said.clear()
    yield
    selfcheck._verdicts.clear()


def test_a_right_kernel_passes_its_first_use(preferred):
    inputs, _ = on_device(*problem(L=33, Dh=16))
    with torch.no_grad():
        assert torch.equal(
            sk.sisa_attention(**inputs), sk.sisa_attention(**inputs, backend="triton")
        )


def test_a_broken_kernel_is_out_for_the_process_and_said_once(preferred, monkeypatch):
    """One gradient is broken on purpose: "auto" says by how much, and runs the stock path."""
    inputs, _ = on_device(*problem(L=33, Dh=16))
    gradients = ta.importance_gradients
    monkeypatch.setattr(
        ta, "importance_gradients", lambda *args: tuple(1.01 * x for x in gradients(*args))
    )
    expected = sk.sisa_attention(**inputs, backend="chunked")
    with pytest.warns(
        UserWarning,
        match=r"runs the 'chunked' path .* wrong against the oracle, .* of b by 1.0e-02, c by",
    ):
        assert torch.equal(sk.sisa_attention(**inputs), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(sk.sisa_attention(**inputs), expected)
        with BaseTorchDispatchMode():
            assert torch.equal(sk.sisa_attention(**inputs), expected)
    torch.testing.assert_close(torch.compile(sk.sisa_attention, fullgraph=True)(**inputs), expected)


def test_what_the_kernels_do_not_take_is_said_when_compiling_too(preferred):
    inputs, _ = on_device(*problem(L=33, Dh=130))
    with pytest.warns(
        UserWarning, match=r"runs the 'chunked' path .* widths up to 128, not Dh = 130"
    ):
        y = torch.compile(sk.sisa_attention, fullgraph=True)(**inputs)
    torch.testing.assert_close(y, sk.sisa_attention(**inputs, backend="chunked"))


def test_a_kernel_that_fails_is_out_and_said(preferred, monkeypatch):
    inputs, _ = on_device(*problem(L=33, Dh=16))

    def out_of_resources(*_):
        raise RuntimeError("out of resources")

    monkeypatch.setattr(ta, "choose_tiles", out_of_resources)
    with pytest.warns(
        UserWarning, match=r"in place of 'triton': it fails on \w+: RuntimeError: out of resources"
    ):
        assert torch.equal(
            sk.sisa_attention(**inputs), sk.sisa_attention(**inputs, backend="chunked")
        )


# ---- Tiles ---------------------------------------------------------------------------------------


def resources(*arguments, kernels=("forward", "query", "key")):
    """The report of tools/resources.py, which compiles for GPUs that are not there."""
    command = [sys.executable, "tools/resources.py", "--kernels", *kernels, *arguments]
    env = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()[2:]


@pytest.mark.slow
def test_compiled_ahead_of_time_nothing_spills_and_hopper_runs_wgmma():
    """Loads are 16 bytes wide, but of a v of an odd stride: that is why the wrapper copies it."""
    rows = [row.split() for row in resources("--arch", "90", "--d-states", "16")]
    assert [row[-1] for row in rows] == ["wgmma"] * 7
    assert [row[-2] for row in rows[:-1]] == ["0"] * 6
    assert int(rows[-1][-2]) > 32


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["80", "90", "100"])
def test_compiled_ahead_of_time_at_the_other_widths(arch):
    widths = "--widths", "16", "128", "--d-states", "0", "16", "128", "--variants", "packed+gqa"
    assert len(resources("--arch", arch, *widths)) == 2 * 3 * 3 + 1


@pytest.mark.slow
def test_compiled_ahead_of_time_the_kernels_around():
    """No number is loaded alone, nothing spills that is not in the table."""
    kernels = "sums", "fold", "refold", "horizon", "horizons", "products", "reverse"
    widths = "--d-states", "16", "128", "--arch", "90"
    assert len(resources(*widths, kernels=kernels)) == 2 * 2 * 7 + 7
    assert len(resources("--arch", "90", kernels=("documents", "rotary", "delta"))) == 3


@pytest.mark.parametrize(
    ("capability", "rows"),
    [
        ((8, 0), tiles.AMPERE),
        ((8, 9), tiles.ADA),
        ((12, 0), tiles.CONSUMER),
        ((9, 0), tiles.HOPPER),
        ((10, 3), tiles.BLACKWELL),
    ],
)
def test_a_problem_takes_the_first_row_it_fits_in(capability, rows):
    for width, state in ((16, 0), (16, 16), (64, 64), (64, 128), (128, 0), (128, 128)):
        fitting = [row for w, s, row in rows if w >= width and s >= state]
        assert tiles.table_tiles(capability, torch.bfloat16, width, state) == fitting[0]
    assert all(
        tile.stages == 1
        for _, _, row in tiles.BLACKWELL
        for tile in (row.forward, row.query, row.key)
    )


@pytest.mark.parametrize("shape", [(48, 64, 32), (64, 0, 16), (32, 16, 32), (16, 64, 32)])
def test_a_tile_that_the_kernels_would_misread_is_refused(shape):
    m, n, diagonal = shape
    with pytest.raises(
        ValueError,
        match=r"a tile's m, n and diagonal must be powers of two from 16, diagonal at most",
    ):
        Tile(m, n, 4, 1, diagonal)


def test_what_the_table_lacks_runs_safely_and_says_so(monkeypatch):
    assert tiles.table_tiles((9, 0), torch.float32, 64, 16) == tiles.SAFE[0][2]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "an old one")
    with pytest.warns(UserWarning, match=r"no tiles for an old one \(sm_75\): safe, slow ones run"):
        assert (
            tiles.choose_tiles(torch.device("cuda", 77), torch.float16, 64, 16) == tiles.SAFE[0][2]
        )


@pytest.fixture
def tuning(monkeypatch, tmp_path):
    """Autotuning on its own cache: what would be timed is recorded, taller query tiles are faster.

    Two tiles are no good."""
    wrong, failing = Tile(32, 16, 4, 1, 16), Tile(16, 32, 4, 1, 16)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tiles, "_tuned", None)
    monkeypatch.setattr(ta, "choose_tiles", tiles.choose_tiles)
    monkeypatch.setattr(tune, "CHECK_LENGTH", 40)
    monkeypatch.setattr(
        tune, "candidates", lambda kernel: [wrong, failing, Tile(64, 32, 4, 1), Tile(32, 64, 4, 1)]
    )
    timed = []

    def current():
        return next(iter(tiles.tuned_tiles().values()), tiles.SAFE[0][2])

    def attention(**inputs):
        if failing in (current().forward, current().query, current().key):
            raise RuntimeError("out of resources")
        y = ta.exact_attention(**inputs)
        return 1.1 * y if wrong in (current().forward, current().query, current().key) else y

    def timer(call):
        timed.append(current())
        return 1000.0 - current().forward.m - current().query.m - current().key.m

    monkeypatch.setattr(tune, "exact_attention", attention)
    options = {"dtype": torch.float32, "device": DEVICE, "timer": timer}
    return (
        timed,
        (wrong, failing),
        lambda **other: tune.autotune(1, 64, 2, 16, 16, **{**options, **other}),
    )


@pytest.mark.slow
def test_autotuning_keeps_the_fastest_and_times_nothing_that_is_wrong(tuning, caplog, monkeypatch):
    timed, bad, autotune = tuning
    best = autotune()
    assert [best.forward.m, best.query.m, best.key.m] == [64, 64, 64]
    assert timed[0] == tiles.SAFE[0][2]
    assert not [tile for x in timed for tile in (x.forward, x.query, x.key) if tile in bad]
    said = caplog.text
    assert "not timed, relative errors" in said
    assert "not timed, RuntimeError" in said
    monkeypatch.setattr(tiles, "_tuned", None)  # as a new process would
    assert tiles.choose_tiles(DEVICE, torch.float32, 16, 16) == best
    assert tiles.choose_tiles(DEVICE, torch.float32, 16, 32) == tiles.SAFE[0][2]


def test_autotuning_does_not_start_from_tiles_that_are_wrong(tuning, monkeypatch):
    """NaN included, which no comparison of the largest error would see."""
    _, _, autotune = tuning
    gradients = ta.importance_gradients
    monkeypatch.setattr(
        ta, "importance_gradients", lambda *args: tuple(torch.nan * x for x in gradients(*args))
    )
    with pytest.raises(RuntimeError, match="the tiles in use give wrong results"):
        autotune()
    assert not tiles.cache_path().exists()


def test_autotuning_that_is_broken_off_leaves_no_trace(tuning, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    _, _, autotune = tuning
    monkeypatch.setattr(tune, "candidates", interrupted)
    with pytest.raises(KeyboardInterrupt):
        autotune()
    assert tiles.tuned_tiles() == {}

    def untimed(_):
        raise RuntimeError("no timer")

    monkeypatch.setattr(tune, "candidates", lambda kernel: [])
    with pytest.raises(RuntimeError, match="no tiles could be timed"):
        autotune(timer=untimed)
    assert tiles.tuned_tiles() == {}
    assert not tiles.cache_path().exists()


def test_what_another_process_has_tuned_is_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tiles, "_tuned", {})  # read before the other process wrote
    found = tiles.SAFE[0][2]
    tiles.cache_path().parent.mkdir()
    tiles.cache_path().write_text(json.dumps({"theirs": dataclasses.asdict(found)}))
    tiles.save_tuned("ours", found)
    assert json.loads(tiles.cache_path().read_text()).keys() == {"theirs", "ours"}


def test_an_unreadable_cache_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tiles, "_tuned", None)
    tiles.cache_path().parent.mkdir()
    tiles.cache_path().write_text('{"a": {"forward": 3}}')
    with pytest.warns(UserWarning, match="cannot read its tuned tiles"):
        assert tiles.tuned_tiles() == {}
