"""Attention without an importance term, plain and with a forget gate, on one engine with SISA's."""

import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import sisa_kernels as sk
from sisa_kernels import selfcheck
from sisa_kernels.paths import native
from sisa_kernels.testing import (
    forgetting_problem,
    in_fp64,
    relative,
    value_and_grads,
    worst_row,
)
from tests.support import ROOT
from tests.support.attention import (
    HALVES,
    Recorder,
    check_bounds,
    check_half,
    first_use,
    fresh_memory_is_nan,
    needs_extension,
    no_worse_than,
    threads,
)
from tests.support.augment import rotary_tables

LENGTHS = (1, 63, 64, 65, 257, 1000)
GATES = (-7.0, -5.0, -3.0, -1.0, 1.0, 4.0)
BACKENDS = [pytest.param("native", marks=needs_extension), "sdpa"]
DOCUMENTS = torch.tensor([0, 1, 64, 65, 200, 257], dtype=torch.int32)


@pytest.fixture(autouse=True)
def results_are_poisoned():
    with fresh_memory_is_nan():
        yield


def plain_problem(**shape):
    """Of causal_attention: that of forgetting_attention without its gates."""
    inputs, dy = forgetting_problem(**shape)
    del inputs["log_forget"]
    return inputs, dy


def exactly(inputs, dy, **options):
    """By the oracle, with gates that forget nothing where there are none."""

    def attend(q, k, v, log_forget=None, **options):
        gates = torch.zeros(q.shape[:3], dtype=q.dtype) if log_forget is None else log_forget
        return sk.reference.forgetting_attention(q, k, v, gates, **options)

    return value_and_grads(attend, in_fp64(inputs), dy.double(), **options)


def check_exact(function, inputs, dy, backend, **options):
    found = value_and_grads(function, inputs, dy, backend=backend, **options)
    right = exactly(inputs, dy, **options)
    if backend == "native":
        check_bounds(found, right)
    assert relative(found[0], right[0]) <= 5e-6
    assert worst_row(found[0], right[0]) <= 1e-4
    errors = {name: relative(grad, right[1][name]) for name, grad in found[1].items()}
    assert max(errors.values()) <= 2e-5, errors


# ---- causal_attention ----------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("L", LENGTHS)
def test_plain_is_exact(L, backend):
    check_exact(sk.causal_attention, *plain_problem(L=L), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("Dh", "Dv"), [(8, 8), (5, 33), (33, 5), (64, 80), (80, 64), (128, 31), (256, 256)]
)
def test_plain_is_exact_at_every_head_width(Dh, Dv, backend):
    check_exact(sk.causal_attention, *plain_problem(B=2, L=150, Dh=Dh, Dv=Dv), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("G", [1, 2, 6])
def test_plain_with_grouped_heads_rotary_and_documents(G, backend):
    inputs, dy = plain_problem(L=257, H=6, G=G, Dh=32, Dv=32)
    rotary = tuple(rotary_tables(257, 32))
    check_exact(sk.causal_attention, inputs, dy, backend, rotary=rotary, cu_seqlens=DOCUMENTS)
    check_exact(sk.causal_attention, inputs, dy, backend, rotary=rotary)
    check_exact(sk.causal_attention, inputs, dy, backend, cu_seqlens=DOCUMENTS)


@needs_extension
@pytest.mark.slow
@pytest.mark.parametrize("L", [2048, 6144])
def test_exact_at_length(L):
    inputs, dy = forgetting_problem(L=L, H=1, decay=-5.0)
    check_exact(sk.forgetting_attention, inputs, dy, "native")
    del inputs["log_forget"]
    check_exact(sk.causal_attention, inputs, dy, "native")


@pytest.mark.parametrize("backend", BACKENDS)
def test_plain_in_fp64(backend):
    inputs, dy = plain_problem(L=100, H=4, G=2, Dh=16, dtype=torch.float64)
    rotary = tuple(rotary_tables(100, 16))
    if backend == "native":
        with pytest.raises(ValueError, match="cannot run here: it computes in fp32, not in fp64"):
            sk.causal_attention(**inputs, backend="native")
        return
    for options in ({}, {"rotary": tuple(table.double() for table in rotary)}, {"rotary": rotary}):
        found = value_and_grads(sk.causal_attention, inputs, dy, backend=backend, **options)
        torch.testing.assert_close(found, exactly(inputs, dy, **options), rtol=1e-9, atol=1e-9)


@needs_extension
@pytest.mark.parametrize("dtype", HALVES)
def test_plain_in_half_precision_is_as_good_as_its_inputs(dtype):
    inputs, dy = plain_problem(L=257, H=4, G=2, dtype=dtype)
    options = {"rotary": tuple(rotary_tables(257, 64)), "cu_seqlens": DOCUMENTS}
    found = value_and_grads(sk.causal_attention, inputs, dy, backend="native", **options)
    right = exactly(inputs, dy, **options)
    check_half(found, right, inputs)
    stock = value_and_grads(sk.causal_attention, inputs, dy, backend="sdpa", **options)
    assert stock[0].dtype == dtype
    assert relative(found[0], right[0]) < relative(stock[0], right[0]), "better than PyTorch's"
    assert relative(stock[0], right[0]) <= 1e-2


@needs_extension
@pytest.mark.parametrize("factor", [1.0, 30.0, 300.0])
def test_large_scores_stay_finite_and_as_good_as_pytorch(factor):
    inputs, dy = plain_problem(B=4, L=400)
    inputs["q"] = factor * inputs["q"].detach()

    def by_pytorch(q, k, v):
        heads = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2)

    found = value_and_grads(sk.causal_attention, inputs, dy, backend="native")
    assert found[0].isfinite().all()
    right = exactly(inputs, dy)
    no_worse_than(value_and_grads(by_pytorch, inputs, dy), found, right, 2.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_does_not_reach_inside(backend):
    inputs, dy = forgetting_problem(L=130, Dh=16)
    calls = [(sk.forgetting_attention, "native" if backend == "native" else "chunked")]
    if backend == "native":  # PyTorch's own follows autocast, as in any Transformer
        calls.append((sk.causal_attention, "native"))
    for function, name in calls:
        given = dict(inputs)
        if function is sk.causal_attention:
            del given["log_forget"]
        plain = value_and_grads(function, given, dy, backend=name)
        with torch.autocast("cpu", torch.bfloat16):
            inside = value_and_grads(function, given, dy, backend=name)
        torch.testing.assert_close(inside, plain, rtol=0, atol=0)


# ---- forgetting_attention ------------------------------------------------------------------------

FORGETTING = [pytest.param("native", marks=needs_extension), "chunked"]


@pytest.mark.parametrize("backend", FORGETTING)
@pytest.mark.parametrize("decay", GATES)
@pytest.mark.parametrize("L", LENGTHS)
def test_forgetting_is_exact(L, decay, backend):
    check_exact(sk.forgetting_attention, *forgetting_problem(L=L, decay=decay), backend)


@pytest.mark.parametrize("backend", FORGETTING)
@pytest.mark.parametrize("decay", [-5.0, 1.0])
@pytest.mark.parametrize("G", [1, 2, 6])
def test_forgetting_with_grouped_heads_rotary_and_documents(G, decay, backend):
    """Every query head has gates of its own, also where heads share a key head."""
    inputs, dy = forgetting_problem(L=257, H=6, G=G, Dh=32, Dv=80, decay=decay)
    options = {"rotary": tuple(rotary_tables(257, 32)), "cu_seqlens": DOCUMENTS}
    check_exact(sk.forgetting_attention, inputs, dy, backend, **options)


@pytest.mark.parametrize("backend", FORGETTING)
def test_a_token_may_forget_all_before_it(backend):
    inputs, dy = forgetting_problem(L=300, decay=-5.0)
    gates = inputs["log_forget"].detach().clone()
    for token in (0, 63, 64, 65, 150, 191):
        gates[:, token] = -torch.inf
    gates[:, 127:130, 0] = -torch.inf
    gates[:, 100, 1] = -1e3
    gates[:, 200:203] = -500.0
    gates[:, 280:] = 0.0
    check_exact(sk.forgetting_attention, {**inputs, "log_forget": gates}, dy, backend)


@needs_extension
def test_what_is_forgotten_may_still_outweigh_the_rest():
    """Tiles are left out by their scores, not by their gates alone."""
    inputs, dy = forgetting_problem(B=2, L=400, decay=0.0)
    early, late = inputs["k"].detach().clone(), inputs["q"].detach().clone()
    early[:, 3] = early[:, 70] = 8.0
    late[:, 150:] += torch.linspace(0.1, 6.0, 250)[:, None, None]
    inputs = {**inputs, "k": early, "q": late}
    found = value_and_grads(sk.forgetting_attention, inputs, dy, backend="native")
    right = exactly(inputs, dy)
    stock = value_and_grads(sk.forgetting_attention, inputs, dy, backend="chunked")
    assert found[0].isfinite().all()
    no_worse_than(stock, found, right, 2.0)


@needs_extension
@pytest.mark.parametrize("decay", [-5.0, 1.0])
@pytest.mark.parametrize("dtype", HALVES)
def test_forgetting_in_half_precision_is_as_good_as_its_inputs(dtype, decay):
    inputs, dy = forgetting_problem(L=257, H=4, G=2, decay=decay, dtype=dtype)
    found = value_and_grads(sk.forgetting_attention, inputs, dy, backend="native")
    check_half(found, exactly(inputs, dy), inputs)


@needs_extension
def test_alibi():
    inputs, _ = forgetting_problem(L=300, H=12, Dh=16)
    q, k, v, _ = inputs.values()
    gates = (-sk.alibi_slopes(12)).expand(1, 300, 12)
    assert gates.stride() == (0, 0, 1)
    y = sk.forgetting_attention(q, k, v, gates, backend="native")
    expected = sk.reference.forgetting_attention(q, k, v, gates.contiguous())
    assert relative(y, expected.double()) <= 1e-6


def test_gates_that_forget_nothing_are_plain_attention():
    inputs, _ = forgetting_problem(L=200, H=4, G=2)
    q, k, v, gates = inputs.values()
    y = sk.forgetting_attention(q, k, v, torch.zeros_like(gates))
    assert relative(y, sk.causal_attention(q, k, v).double()) <= 1e-6
    assert relative(y, sk.causal_attention(q, k, v, backend="sdpa").double()) <= 1e-6


# ---- Both ----------------------------------------------------------------------------------------


def call_both(given):
    """(function, inputs) of either operator."""
    plain = {name: x for name, x in given.items() if name != "log_forget"}
    return (sk.causal_attention, plain), (sk.forgetting_attention, given)


@needs_extension
def test_strided_and_expanded_inputs():
    inputs, dy = forgetting_problem(B=2, L=130, H=4, G=2, Dh=16)

    def apart(x):
        x = x.detach()
        return x.transpose(1, -1).contiguous().transpose(1, -1)

    strided = {name: apart(x) for name, x in inputs.items()}
    expanded = {**strided, "v": inputs["v"].detach()[:, :1].expand_as(inputs["v"])}
    contiguous = {name: x.contiguous() for name, x in expanded.items()}
    one = dy[:1, :1, :1, :1].expand_as(dy)
    for given, as_given, plain, as_plain in (
        (strided, apart(dy), inputs, dy),
        (expanded, one, contiguous, one.contiguous()),
    ):
        for (function, a), (_, b) in zip(call_both(given), call_both(plain)):
            found = value_and_grads(function, a, as_given, backend="native")
            expected = value_and_grads(function, b, as_plain, backend="native")
            torch.testing.assert_close(found, expected, rtol=0, atol=0)


@needs_extension
def test_bits_do_not_depend_on_threads():
    inputs, dy = forgetting_problem(L=700, H=1)
    for function, given in call_both(inputs):
        results = []
        for count in (1, 2, 3):
            with threads(count):
                results.append(value_and_grads(function, given, dy, backend="native"))
        for other in results[1:]:
            torch.testing.assert_close(other, results[0], rtol=0, atol=0)


@needs_extension
def test_what_is_no_number_reaches_no_earlier_row():
    inputs, _ = forgetting_problem(L=150, H=2, Dh=16)
    for name in ("q", "k", "v"):
        for bad in (math.nan, math.inf):
            spoiled = inputs[name].detach().clone()
            spoiled[:, 100] = bad
            for function, given in call_both({**inputs, name: spoiled}):
                clean = {**given, name: inputs[name]}
                y, expected = (function(**x, backend="native") for x in (given, clean))
                assert torch.equal(y[:, :100], expected[:, :100])
                assert not y[:, 100].isfinite().any()


@needs_extension
def test_gradients_of_some_inputs_are_those_of_all():
    inputs, dy = forgetting_problem(L=100, H=4, G=2, Dh=16)
    for function, given in call_both(inputs):
        _, expected = value_and_grads(function, given, dy, backend="native")
        for name in given:
            some = {other: x.detach().requires_grad_(other == name) for other, x in given.items()}
            function(**some, backend="native").backward(dy)
            assert torch.equal(some.pop(name).grad, expected[name])
            assert all(x.grad is None for x in some.values())


@needs_extension
def test_differentiable_once_and_not_forward():
    inputs, _ = forgetting_problem(L=9, Dh=16)
    for function, given in call_both(inputs):
        y = function(**given, backend="native")
        (dq,) = torch.autograd.grad(y.sum(), given["q"], create_graph=True)
        with pytest.raises(RuntimeError, match="differentiable once"):
            dq.sum().backward()
        rest = {name: x.detach() for name, x in given.items() if name != "q"}
        q = given["q"].detach()
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            torch.func.jvp(lambda q: function(q=q, **rest), (q,), (q,))  # noqa: B023


@needs_extension
@pytest.mark.parametrize("which", [0, 1], ids=["causal", "forgetting"])
def test_compile_fullgraph(which):
    torch._dynamo.reset()
    compiled = {}
    for L in (70, 100, 257):
        inputs, dy = forgetting_problem(L=L, H=4, G=2, Dh=16)
        function, given = call_both(inputs)[which]
        if not compiled:
            compiled[which] = torch.compile(function, fullgraph=True, dynamic=True)
        options = {
            "rotary": tuple(rotary_tables(L, 16)),
            "cu_seqlens": torch.tensor([0, 30, L], dtype=torch.int32),
        }
        found = value_and_grads(compiled[which], given, dy, **options)
        expected = value_and_grads(function, given, dy, backend="native", **options)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@needs_extension
@pytest.mark.slow
def test_memory_is_linear_in_length():
    """Peak extra memory of both at L = 8192, 2 heads; one matrix of scores would take 268 MB."""
    script = """
import resource
import sisa_kernels as sk
from sisa_kernels.testing import forgetting_problem
def attend(L):
    inputs, _ = forgetting_problem(L=L, decay=0.0)
    before = peak()
    sk.forgetting_attention(**inputs, backend="native").sum().backward()
    del inputs["log_forget"]
    sk.causal_attention(**inputs, backend="native").sum().backward()
    return peak() - before
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
attend(64)
print(attend(8192) / 1024)
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 150


# ---- The choice of the path ----------------------------------------------------------------------

STOCK = {sk.causal_attention: "sdpa", sk.forgetting_attention: "chunked"}


@needs_extension
def test_native_is_what_auto_runs(monkeypatch):
    inputs, _ = forgetting_problem(L=65, Dh=16)
    with first_use(monkeypatch):
        for function, given in call_both(inputs):
            y = function(**given)
            assert torch.equal(y, function(**given, backend="native"))
            with Recorder() as recorder:
                function(**given)
            assert recorder.names == ["attention"]
            with Recorder() as recorder:
                function(**given, backend=STOCK[function])
            assert "attention" not in recorder.names


@needs_extension
def test_each_is_checked_once_on_its_first_use(monkeypatch):
    found = []
    compare = selfcheck.compare
    monkeypatch.setattr(selfcheck, "compare", lambda *x: found.append(x[1:]) or compare(*x))
    inputs, _ = forgetting_problem(L=65, Dh=16, Dv=24)
    with first_use(monkeypatch):
        for function, given in call_both(inputs) * 2:
            function(**given)
    assert found == [(torch.device("cpu"), torch.float32, "Dh 16, Dv 24")] * 2


@needs_extension
@pytest.mark.parametrize("which", [0, 1], ids=["causal", "forgetting"])
def test_by_name_it_runs_or_says_why_not(which):
    for shape, why in (
        ({"Dh": 300}, "at most 256 channels, got 300"),
        ({"Dv": 257}, "at most 256 channels, got 257"),
        ({"dtype": torch.float64}, "in fp32, not in fp64"),
    ):
        inputs, _ = forgetting_problem(L=9, **shape)
        function, given = call_both(inputs)[which]
        with pytest.raises(ValueError, match=f"backend 'native' cannot run here: .*{why}"):
            function(**given, backend="native")
        stock = STOCK[function]
        with pytest.raises(
            ValueError, match=f"backend must be one of auto, native, {stock}, got 'fast'"
        ):
            function(**given, backend="fast")


@needs_extension
@pytest.mark.parametrize("which", [0, 1], ids=["causal", "forgetting"])
def test_what_it_does_not_take_is_said_once_and_runs_stock(which, monkeypatch):
    inputs, _ = forgetting_problem(L=33, Dh=300)
    function, given = call_both(inputs)[which]
    expected = function(**given, backend=STOCK[function])
    said = rf"attention on cpu runs the '{STOCK[function]}' path in place of 'native': .*got 300"
    with first_use(monkeypatch):
        with pytest.warns(UserWarning, match=said) as told:
            assert torch.equal(function(**given), expected)
        assert len(told) == 1
        assert torch.equal(function(**given), expected), "a warning would be an error"
        wide = {name: x.detach().double() for name, x in given.items()}
        function(**wide)  # in silence


def crooked(*args):
    y, lse = torch.ops.sisa.attention(*args)
    return 1.01 * y, lse


@needs_extension
@pytest.mark.parametrize("which", [0, 1], ids=["causal", "forgetting"])
def test_a_path_found_wrong_is_out_for_the_process_and_said_once(which, monkeypatch):
    inputs, _ = forgetting_problem(L=33, Dh=16)
    function, given = call_both(inputs)[which]
    expected = function(**given, backend=STOCK[function])
    said = rf"runs the '{STOCK[function]}' path in place of 'native': .* of y by 1.0e-02"
    with first_use(monkeypatch):
        monkeypatch.setattr(native, "attention_op", crooked)
        with pytest.warns(UserWarning, match=said) as told:
            assert torch.equal(function(**given), expected)
        assert len(told) == 1
        assert torch.equal(function(**given), expected), "a warning would be an error"


BAD = {
    "q must be [batch, length, heads, channels]": {"q": torch.zeros(3, 4)},
    "the number of key heads must divide": {"k": torch.zeros(1, 63, 3, 64)},
    "k must have shape [1, 63, 4, 64], got [1, 62, 4, 64]": {"k": torch.zeros(1, 62, 4, 64)},
    "v must have shape [1, 63, 4, 16], got [1, 63, 2, 16]": {"v": torch.zeros(1, 63, 2, 16)},
    "k must be torch.float32, got torch.bfloat16": {"k": torch.zeros(1, 63, 4, 64).bfloat16()},
    "rotary must be a pair (cos, sin) or None, got Tensor": {"rotary": torch.zeros(63, 32)},
    "rotary[0] (cos) must not require grad": {
        "rotary": (torch.zeros(63, 32, requires_grad=True), torch.zeros(63, 32))
    },
    "cu_seqlens must rise from 0 to at most the length 63": {
        "cu_seqlens": torch.tensor([0, 64], dtype=torch.int32)
    },
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message):
    inputs, _ = plain_problem(L=63, H=4)
    with pytest.raises((ValueError, TypeError)) as error:
        sk.causal_attention(**{**inputs, **BAD[message]})
    assert message in str(error.value)
