"""sisa::attention's products of bf16, which ``torch.set_float32_matmul_precision("medium")`` allows
on a CPU that has them: against fp64 and, on the same inputs, PyTorch's own bf16 attention."""

import contextlib
import math

import pytest
import torch
import torch.nn.functional as F

import sisa_kernels as sk
from sisa_kernels.rotation import rotate
from sisa_kernels.testing import in_fp64, oracle, relative, value_and_grads, worst_row
from tests.support.attention import (
    KINDS,
    Call,
    Recorder,
    Results,
    call_of,
    exactly,
    fresh_memory_is_nan,
    needs_extension,
    queries,
    same_bits,
    tables,
    threads,
)
from tests.support.augment import rotary_tables
from tests.support.problems import problem


def here() -> bool:
    try:
        return "isa=avx512_bf16\n" in torch.ops.sisa.build_info()
    except (AttributeError, RuntimeError):
        return False


pytestmark = needs_extension
needs_products = pytest.mark.skipif(not here(), reason="this CPU has no products of bf16")
LENGTHS = (1, 63, 65, 257)
Y, WORST_ROW, GRADIENT = 5e-3, 5e-2, 8e-3  # relative; rows of few channels may be small sums
SUMS = 2e-2  # of log_decay, theta and lam, whose gradients are sums that cancel
BOUNDS = (0, 0, 1, 1, 3, 64, 64, 64, 128, 130, 195, 195)


@pytest.fixture(autouse=True)
def results_are_poisoned():
    with fresh_memory_is_nan():
        yield


@contextlib.contextmanager
def precision(name):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def normal(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def in_bf16(kind, **options):
    """A call of operands in bf16, and dy of numbers that bf16 has, as it comes from a y of bf16."""
    call = call_of(kind, **options)
    rounded = [None if x is None else x.bfloat16() for x in call[:5]]
    call = Call(*rounded, *call[5:])
    B, L, H, _ = call.q.shape
    return call, normal(B, L, H, call.v.shape[3]).bfloat16().float()


def by_pairs(call, dy=None, dlse=None):
    """run, with products of bf16."""
    y, lse = torch.ops.sisa.attention(*call, True)
    if dy is None:
        return Results(y, lse, {})
    grads = torch.ops.sisa.attention_backward(dy, dlse, y, lse, *call, call.wanted, True)
    return Results(y, lse, dict(zip(call.names, grads)))


def bound(name):
    return SUMS if name in ("log_decay", "theta", "lam") else GRADIENT


def check(found, right):
    attended = right.lse.isfinite()
    assert torch.equal(found.lse.isneginf(), ~attended)
    rows = attended.transpose(1, 2)
    assert not found.y[~rows].any()
    assert relative(found.y, right.y) <= Y
    assert worst_row(found.y[rows], right.y[rows]) <= WORST_ROW
    assert (found.lse[attended].double() - right.lse[attended]).abs().max() <= 3e-2
    for name, grad in found.grads.items():
        if name == "lam":
            assert (grad - right.grads[name]).norm() <= SUMS * right.lam_sizes.norm()
        else:
            assert relative(grad, right.grads[name]) <= bound(name), name


# ---- The error -----------------------------------------------------------------------------------


@needs_products
@pytest.mark.parametrize("widths", [(64, 16, 64), (33, 6, 5), (16, 2, 80)], ids=str)
@pytest.mark.parametrize("L", LENGTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_error_is_of_bf16(kind, L, widths):
    for decay in (-5.0, 1.0):
        options = tables(L, widths[0]) if widths[0] % 2 == 0 else {}
        call, dy = in_bf16(kind, L=L, H=4, G=2, widths=widths, decay=decay, **options)
        check(by_pairs(call, dy), exactly(call, dy))


@needs_products
@pytest.mark.parametrize("kind", KINDS)
def test_the_error_at_length(kind):
    call, dy = in_bf16(kind, L=2100, H=1, widths=(64, 32, 64), decay=-7.0)
    check(by_pairs(call, dy), exactly(call, dy))


@needs_products
@pytest.mark.parametrize("L", LENGTHS)
def test_no_worse_than_pytorch(L):
    """Than its attention in bf16 after RoPE made in fp32."""
    inputs, dy = problem(B=2, L=L, H=4, G=2, Dh=64, dtype=torch.bfloat16)
    cos, sin = rotary = tuple(rotary_tables(L, 64))

    def by_pytorch(q, k, v):
        q, k = (rotate(x.float(), cos[:, None], sin[:, None]).bfloat16() for x in (q, k))
        heads = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True).transpose(
            1, 2
        )

    plain = {name: inputs[name] for name in "qkv"}
    right = value_and_grads(
        lambda q, k, v: sk.causal_attention(q, k, v, rotary=rotary, backend="sdpa"),
        in_fp64(plain),
        dy.double(),
    )
    allowed = value_and_grads(by_pytorch, plain, dy)
    with precision("medium"):
        found = value_and_grads(
            lambda q, k, v: sk.causal_attention(q, k, v, rotary=rotary, backend="native"), plain, dy
        )
    assert relative(found[0], right[0]) <= 1.1 * relative(allowed[0], right[0])
    for name in plain:
        most = 1.1 * relative(allowed[1][name], right[1][name])
        assert relative(found[1][name], right[1][name]) <= most, name


@needs_products
@pytest.mark.parametrize("G", [1, 2, 6])
def test_documents_grouped_heads_rotary_and_value_width(G):
    inputs, dy = problem(L=257, H=6, G=G, Dh=32, Ds=16, Dv=80, decay=-2.0, dtype=torch.bfloat16)
    options = {
        "rotary": tuple(rotary_tables(257, 32)),
        "cu_seqlens": torch.tensor([0, 1, 64, 65, 200, 257], dtype=torch.int32),
    }
    right = oracle(inputs, dy, **options)
    with precision("medium"):
        found = value_and_grads(sk.sisa_attention, inputs, dy, backend="native", **options)
    assert found[0].dtype == torch.bfloat16
    assert relative(found[0], right[0]) <= Y
    for name, grad in found[1].items():
        assert relative(grad, right[1][name]) <= bound(name), name


@needs_products
@pytest.mark.parametrize("kind", KINDS)
def test_empty_documents_and_tokens_of_none(kind):
    call, dy = in_bf16(kind, B=2, L=230, H=4, G=2, bounds=torch.tensor(BOUNDS), **tables(230, 16))
    check(by_pairs(call, dy), exactly(call, dy))


@needs_products
@pytest.mark.parametrize("part", [(0, 1), (63, 1), (63, 2), (64, 64), (101, 36), (199, 1)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_queries_from_an_offset(kind, part):
    """Of which the first or last may be half a pair."""
    whole, dy = in_bf16(kind, H=4, G=2, **tables(200, 16))
    offset, count = part
    call, dy = queries(whole, offset, count), dy[:, offset : offset + count]
    dlse = normal(1, 4, count, seed=2)
    found = by_pairs(call, dy, dlse)
    check(found, exactly(call, dy, dlse))
    unseen = slice(offset + count, None)
    spoiled = {name: getattr(call, name).clone() for name in "kv"}
    for x in spoiled.values():
        x[:, unseen] = math.nan
    same_bits(by_pairs(call._replace(**spoiled), dy, dlse), found)


# ---- What stays in its place ---------------------------------------------------------------------


@needs_products
@pytest.mark.parametrize("token", [70, 127, 128, 199])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["q", "k", "v", "b", "c"])
def test_what_is_no_number_reaches_no_earlier_row(name, bad, token):
    call, dy = in_bf16("importance", H=4, G=2)
    early = by_pairs(queries(call, 0, token), dy[:, :token])
    spoiled = getattr(call, name).clone()
    spoiled[:, token] = bad
    found = by_pairs(call._replace(**{name: spoiled}))
    assert torch.equal(found.y[:, :token], early.y)
    assert torch.equal(found.lse[:, :, :token], early.lse)
    assert not found.y[:, token].isfinite().all(), "its own row"
    if name in "qc":
        assert found.y[:, token + 1 :].isfinite().all(), "and no row after it"
    else:
        assert not found.y[:, token:].isfinite().flatten(2).all(2).any(), "and every row after it"


@needs_products
@pytest.mark.parametrize("name", ["q", "k", "v", "b", "c"])
def test_what_is_no_number_reaches_no_gradient_of_an_earlier_query(name):
    call, dy = in_bf16("importance", H=4, G=2)
    dy[:, 120:] = 0
    expected = by_pairs(call, dy).grads
    spoiled = getattr(call, name).clone()
    spoiled[:, 120] = math.nan
    found = by_pairs(call._replace(**{name: spoiled}), dy).grads
    for query in ("q", "c"):
        assert torch.equal(found[query][:, :120], expected[query][:, :120])


SHAPES = {
    "many heads": dict(L=200, B=2, H=3),
    "one head": dict(L=700, H=1),
    "one long head": dict(L=2200, H=1),
    "shared key heads": dict(L=300, H=6, G=2, bounds=torch.tensor(BOUNDS)),
}


@needs_products
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_bits_do_not_depend_on_threads(kind, shape):
    call, dy = in_bf16(kind, **SHAPES[shape])
    results = []
    for count in (1, 2, 3, 5):
        with threads(count):
            results.append(by_pairs(call, dy))
    for found in results[1:]:
        same_bits(found, results[0])


# ---- The switch ----------------------------------------------------------------------------------


def attend(inputs, dy):
    return value_and_grads(sk.sisa_attention, inputs, dy, backend="native")


def equal(x, y):
    return torch.equal(x[0], y[0]) and all(torch.equal(x[1][name], y[1][name]) for name in x[1])


@needs_products
def test_medium_is_the_switch():
    inputs, dy = problem(L=130, dtype=torch.bfloat16)
    default = attend(inputs, dy)
    with precision("high"):
        assert equal(attend(inputs, dy), default)
    with precision("medium"):
        found = attend(inputs, dy)
        y = sk.causal_attention(*(inputs[name] for name in "qkv"), backend="native")
    assert not torch.equal(found[0], default[0])
    assert not torch.equal(found[1]["q"], default[1]["q"])
    assert not torch.equal(
        y, sk.causal_attention(*(inputs[name] for name in "qkv"), backend="native")
    )
    assert equal(attend(inputs, dy), default), "and back"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_inputs_keep_their_bits(dtype):
    inputs, dy = problem(L=130, dtype=dtype)
    expected = attend(inputs, dy)
    with precision("medium"):
        assert equal(attend(inputs, dy), expected)


def test_the_backward_is_the_forwards():
    """Where the switch is turned between the two."""
    inputs, dy = problem(L=130, dtype=torch.bfloat16)
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    with precision("medium"):
        expected = attend(inputs, dy)
        y = sk.sisa_attention(**leaves, backend="native")
    grads = torch.autograd.grad(y, list(leaves.values()), dy)
    for name, grad in zip(leaves, grads):
        assert torch.equal(grad, expected[1][name]), name


def test_the_ops_are_told(monkeypatch):
    inputs, dy = problem(L=33, dtype=torch.bfloat16)
    for name in ("highest", "high", "medium"):
        with precision(name), Recorder() as recorder:
            attend(inputs, dy)
        forward, backward = (
            args for op, args in recorder.calls if op in ("attention", "attention_backward")
        )
        given = forward[12:] + backward[17:]  # a default is left out
        assert given == ((True, True) if name == "medium" else ())


def test_it_compiles():
    inputs, _ = problem(L=33, dtype=torch.bfloat16)
    torch._dynamo.reset()
    compiled = torch.compile(sk.sisa_attention, fullgraph=True, backend="eager")
    default = sk.sisa_attention(**inputs, backend="native")
    assert torch.equal(compiled(**inputs, backend="native"), default)
    with precision("medium"):
        expected = sk.sisa_attention(**inputs, backend="native")
        assert torch.equal(compiled(**inputs, backend="native"), expected)
