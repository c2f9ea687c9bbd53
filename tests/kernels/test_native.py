"""sisa_attention in one compiled kernel on a CPU, and its op sisa::attention, against fp64."""

import itertools
import math
import multiprocessing
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import sisa_kernels as sk
from sisa_kernels import _extension, selfcheck
from sisa_kernels.inputs import NAMES, SisaInputs
from sisa_kernels.paths import native
from sisa_kernels.testing import (
    in_fp64,
    oracle,
    relative,
    value_and_grads,
    worst_row,
)
from tests.support import ROOT
from tests.support.attention import (
    GRADIENT,
    HALVES,
    INTEGERS,
    KINDS,
    LAM,
    Call,
    Recorder,
    any_call,
    by_blocks,
    call_of,
    check_bounds,
    check_call,
    check_half,
    check_results,
    check_sisa,
    exactly,
    first_use,
    fresh_memory_is_nan,
    lam_error,
    needs_extension,
    no_worse_than,
    queries,
    run,
    same_bits,
    tables,
    threads,
)
from tests.support.augment import COMPILED, EAGER, augment_call, rotary_tables
from tests.support.augment import run as augment
from tests.support.problems import problem

pytestmark = needs_extension
DECAYS = (-7.0, -5.0, -3.0, -1.0, 1.0, 4.0, 8.0)
LENGTHS = (1, 63, 64, 65, 257, 1000)
# Tiles are of 64 tokens: documents of none, of one, that end with a tile and beside it.
BOUNDS = (0, 0, 1, 1, 3, 64, 64, 64, 128, 130, 195, 195)


@pytest.fixture(autouse=True)
def results_are_poisoned():
    with fresh_memory_is_nan():
        yield


def check_exact(inputs, dy, **options):
    found = value_and_grads(sk.sisa_attention, inputs, dy, backend="native", **options)
    check_sisa(found, oracle(inputs, dy, **options), inputs)


def normal(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_gradients(call):
    """The call, and what its gradients begin with: dy, dlse."""
    B, L, H, _ = call.q.shape
    return call, normal(B, L, H, call.v.shape[3]), normal(B, H, L, seed=2)


# ---- Eq. 2 ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("L", LENGTHS)
def test_exact(L, decay):
    check_exact(*problem(L=L, decay=decay))


@pytest.mark.parametrize("decay", [-7.0, -2.0, 4.0])
@pytest.mark.parametrize("Ds", [2, 16, 32, 64, 128])
def test_exact_at_every_importance_width(Ds, decay):
    check_exact(*problem(L=300, Ds=Ds, decay=decay))


@pytest.mark.parametrize("decay", [-5.0, 2.0])
@pytest.mark.parametrize(
    ("Dh", "Dv"),
    [(8, 8), (5, 33), (33, 5), (64, 80), (80, 64), (96, 128), (128, 31), (255, 8), (256, 256)],
)
def test_exact_at_every_head_width(Dh, Dv, decay):
    check_exact(*problem(L=150, Dh=Dh, Dv=Dv, Ds=6, decay=decay))


AT_LENGTH = [
    *itertools.product([2048], DECAYS, [2, 16, 128]),
    *itertools.product([6144], [-7.0, -3.0, 1.0, 8.0], [2, 64]),
]


@pytest.mark.parametrize("kind", KINDS)
def test_exact_where_key_tiles_are_dealt_out(kind):
    """From 2,048 tokens on the backward sums queries' gradients apart, then together."""
    call, dy, dlse = with_gradients(call_of(kind, L=2100, H=1, decay=-5.0))
    check_results(run(call, dy, dlse), exactly(call, dy, dlse))


@pytest.mark.slow
@pytest.mark.parametrize(("L", "decay", "Ds"), AT_LENGTH)
def test_exact_at_length(L, decay, Ds):
    check_exact(*problem(L=L, decay=decay, Ds=Ds, H=2 if L == 2048 else 1))


def test_the_oracle_by_blocks_is_the_oracle():
    inputs, dy = problem(B=2, L=150, Dh=8, Ds=4, decay=-2.0)
    found = value_and_grads(by_blocks, in_fp64(inputs), dy.double(), rows=64)
    torch.testing.assert_close(found, oracle(inputs, dy), rtol=1e-10, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize(("L", "decay"), [(12288, -7.0), (32768, -2.0)])
def test_exact_past_what_the_dense_oracle_holds(L, decay):
    inputs, dy = problem(L=L, H=1, decay=decay)
    found = value_and_grads(sk.sisa_attention, inputs, dy, backend="native")
    check_sisa(found, value_and_grads(by_blocks, in_fp64(inputs), dy.double()), inputs)


@pytest.mark.parametrize("decay", [-6.0, -2.0, 2.0])
@pytest.mark.parametrize("G", [1, 2, 6])
def test_grouped_heads_rotary_documents_and_value_width(G, decay):
    inputs, dy = problem(L=257, H=6, G=G, Dh=32, Ds=16, Dv=80, decay=decay)
    options = {
        "rotary": tuple(rotary_tables(257, 32)),
        "cu_seqlens": torch.tensor([0, 1, 64, 65, 200, 257], dtype=torch.int32),
    }
    check_exact(inputs, dy, **options)


@pytest.mark.parametrize("decay", [-5.0, 1.0])
def test_a_token_may_forget_nearly_or_quite_all_before_it(decay):
    inputs, dy = problem(L=300, decay=decay)
    log_decay = inputs["log_decay"].detach().clone()
    for token in (0, 63, 64, 65, 150, 191):
        log_decay[:, token] = -torch.inf
    log_decay[:, 127:130] = -torch.inf
    log_decay[:, [30, 100, 256], 0] = -1e3
    log_decay[:, 200:203] = -500.0
    log_decay[:, 280:] = 0.0
    check_exact({**inputs, "log_decay": log_decay}, dy)
    log_decay[:] = -torch.inf
    check_exact({**inputs, "log_decay": log_decay}, dy)
    log_decay[:] = -1e30
    check_exact({**inputs, "log_decay": log_decay}, dy)


@pytest.mark.parametrize(
    ("bits", "left_out"), [(14, False), (18, False), (23.5, False), (26, True)]
)
def test_products_are_left_out_where_they_reach_2_to_the_minus_24_of_a_score(bits, left_out):
    """Scores of the second tile with the first are 2^-bits, all else is 0 or 1."""
    unit = torch.tensor([1.0, 0.0]).expand(1, 128, 1, 2)
    log_decay = torch.zeros(1, 128, 1)
    log_decay[:, 64] = -bits * math.log(2)
    zero, v, theta = torch.zeros(1, 128, 1, 4), normal(1, 128, 1, 4), torch.zeros(1, 128, 1, 1)
    call = Call(zero, zero, v, unit, unit, log_decay, theta, torch.ones(1))
    dy = normal(1, 128, 1, 4, seed=2)
    dy[:, :64] = 0
    found, right = run(call, dy), exactly(call, dy)
    check_bounds((found.y, {}), (right.y, {}))
    early, exact = found.grads["b"][:, :64], right.grads["b"][:, :64]
    if left_out:
        assert not early.any()
    else:
        assert relative(early / exact.norm(), exact / exact.norm()) <= GRADIENT


@pytest.mark.parametrize("small", ["b", "c", "lam"])
def test_small_operands_keep_their_gradients(small):
    """Products past the horizon are left out as if norms and lam were 1 at least."""
    inputs, dy = problem(L=400, H=4, G=2, decay=-2.0)
    for factor in (1e-3, 1e-6):
        check_exact({**inputs, small: factor * inputs[small].detach()}, dy)


def test_large_steps_of_phase_keep_their_digits():
    inputs, dy = problem(L=1000, decay=-6.0, theta=50.0)
    check_exact(inputs, dy)


@pytest.mark.parametrize("kind", KINDS)
def test_the_log_sum_exp_and_its_gradient(kind):
    for options in ({}, {"H": 4, "G": 2, **tables(200, 16)}):
        call, dy, dlse = with_gradients(call_of(kind, B=2, **options))
        check_results(run(call, dy, dlse), exactly(call, dy, dlse))
        check_results(run(call, torch.zeros_like(dy), dlse), exactly(call, 0 * dy, dlse))
        leaves = call.map(lambda x: x.clone().requires_grad_())
        given = [x for x in leaves[:8] if x is not None]
        grads = torch.autograd.grad(torch.ops.sisa.attention(*leaves)[1], given, dlse)
        expected = run(call, torch.zeros_like(dy), dlse).grads
        assert all(torch.equal(*pair) for pair in zip(grads, expected.values(), strict=True))


def test_the_log_sum_exp_is_that_of_the_reference_scores():
    call = call_of(H=4, G=2)
    content, importance = sk.reference.scores(*call[:2], *call[3:8])
    expected = (content + importance).logsumexp(-1)
    assert relative(run(call).lse, expected) <= 1e-6


# ---- Documents and queries that are a part -------------------------------------------------------


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("kind", KINDS)
def test_empty_documents_and_tokens_of_none(kind, dtype):
    for B, L, bounds in ((1, 230, BOUNDS), (2, 195, BOUNDS), (2, 70, (0, 0, 0)), (1, 70, (0, 1))):
        call = call_of(kind, B=B, L=L, H=4, G=2, **tables(L, 16))
        call, dy, dlse = with_gradients(call._replace(bounds=torch.tensor(bounds, dtype=dtype)))
        found = run(call, dy, dlse)
        check_results(found, exactly(call, dy, dlse))
        last = bounds[-1]
        assert not found.y[:, last:].any()
        assert found.lse[:, :, last:].isneginf().all()
        for name in set(found.grads) - {"lam"}:
            assert not found.grads[name][:, last:].any(), name


@pytest.mark.parametrize("kind", KINDS)
def test_documents_are_calls_of_their_own(kind):
    call = call_of(kind, L=230, H=4, G=2, **tables(230, 16), bounds=torch.tensor(BOUNDS))
    whole = run(call)
    for lo, hi in itertools.pairwise(BOUNDS):
        tokens = slice(lo, hi)
        if lo < hi:
            tensors = (None if x is None else x[:, tokens] for x in call[:7])
            alone = run(Call(*tensors, call.lam, *(x[tokens] for x in call[8:10])))
            assert relative(whole.y[:, tokens], alone.y.double()) <= 1e-6
            assert relative(whole.lse[:, :, tokens], alone.lse.double()) <= 1e-6


PARTS = [(0, 1), (0, 70), (63, 1), (63, 2), (64, 64), (100, 37), (128, 72), (199, 1)]


@pytest.mark.parametrize("part", PARTS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_queries_from_an_offset_are_a_slice_of_the_whole(kind, part):
    offset, count = part
    rows = slice(offset, offset + count)
    documents = torch.tensor([0, 0, 10, 63, 63, 120, 180])
    for bounds in (None, documents):
        whole = call_of(kind, B=2, H=4, G=2, **tables(200, 16), bounds=bounds)
        call, dy, dlse = with_gradients(queries(whole, offset, count))
        found = run(call, dy, dlse)
        check_results(found, exactly(call, dy, dlse))
        y, lse = run(whole)[:2]
        torch.testing.assert_close(found.y, y[:, rows], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.lse, lse[:, :, rows], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_parts_add_up_to_those_of_the_whole(kind):
    call, dy, dlse = with_gradients(call_of(kind, H=4, G=2))
    right = exactly(call, dy, dlse).grads
    by_query = {"q": [], "c": []}
    total = {}
    for lo, hi in itertools.pairwise((0, 1, 64, 100, 199, 200)):
        part = queries(call, lo, hi - lo)
        for name, grad in run(part, dy[:, lo:hi], dlse[:, :, lo:hi]).grads.items():
            if name in by_query:
                by_query[name].append(grad)
            else:
                total[name] = total.get(name, 0) + grad
    total |= {name: torch.cat(parts, 1) for name, parts in by_query.items() if parts}
    assert set(total) == set(right)
    assert max(relative(total[name], right[name]) for name in right) <= GRADIENT


# ---- Strides -------------------------------------------------------------------------------------


def laid_apart(x, order):
    """The same values, its axes in memory in another order."""
    return x.permute(order).contiguous().permute([order.index(axis) for axis in range(x.ndim)])


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("kind", KINDS)
def test_any_strides(kind, dtype):
    plain, dy, dlse = with_gradients(call_of(kind, B=2, H=4, G=2, **tables(200, 16)))
    wide = [None if x is None else x.to(dtype) for x in plain[:5]]
    plain = Call(*wide, *plain[5:])
    expected = run(plain, dy, dlse)
    for last in (1, 3):  # the token innermost; heads before tokens
        order = {4: [0, 3, 2, 1] if last == 1 else [2, 0, 1, 3], 3: [0, 2, 1], 2: [1, 0], 1: [0]}
        strided = plain.map(lambda x: laid_apart(x, order[x.ndim]))  # noqa: B023
        if kind == "importance":
            strided = strided._replace(lam=torch.stack((plain.lam, plain.lam), 1)[:, 0])
        given = laid_apart(dy, order[4]), laid_apart(dlse, order[3])
        same_bits(run(strided, *given), expected)
        assert all(x.is_contiguous() for x in run(strided, *given).grads.values())
    packed = torch.cat([plain.q.flatten(2), plain.k.flatten(2), plain.v.flatten(2)], 2)
    q, k, v = packed.split([64, 32, 32], 2)
    views = plain._replace(
        q=q.unflatten(2, (4, 16)), k=k.unflatten(2, (2, 16)), v=v.unflatten(2, (2, 16))
    )
    same_bits(run(views, dy, dlse), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_expanded_operands(kind):
    call, dy, dlse = with_gradients(call_of(kind, B=2, H=4, G=2))
    one = {
        "q": call.q[:1].expand_as(call.q),
        "k": call.k[:, :1].expand_as(call.k),
        "v": call.v[..., :1].expand_as(call.v),
    }
    if kind == "importance":
        one["b"] = call.b[:, :, :1].expand_as(call.b)
        one["c"] = call.c[:1, :1, :1].expand_as(call.c)
        one["theta"] = call.theta[:1, :1, :1, :1].expand_as(call.theta)
        one["lam"] = call.lam[:1].expand_as(call.lam)
    if kind != "none":
        one["log_decay"] = call.log_decay[:1, :1, :1].expand_as(call.log_decay)
    expanded = call._replace(**one)
    plain = expanded.map(torch.clone)
    same_bits(run(expanded, dy, dlse), run(plain.map(torch.Tensor.contiguous), dy, dlse))
    ones = dy[:1, :1, :1, :1].expand_as(dy), dlse[:1, :1, :1].expand_as(dlse)
    same_bits(run(call, *ones), run(call, *(x.contiguous() for x in ones)))


def test_the_gradient_of_a_sum_whose_dy_is_one_number():
    inputs, dy = problem(L=130, Dh=16)
    y, grads = value_and_grads(sk.sisa_attention, inputs, torch.ones_like(dy), backend="native")
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    total = sk.sisa_attention(**leaves, backend="native").sum()
    total.backward()
    assert all(torch.equal(leaves[name].grad, grad) for name, grad in grads.items())
    check_exact(inputs, torch.ones_like(dy))
    assert torch.equal(total.detach(), y.sum())


def test_strided_inputs_through_the_operator():
    inputs, dy = problem(B=2, L=63, H=2, decay=0.0)
    expected = value_and_grads(sk.sisa_attention, inputs, dy, backend="native")
    apart = {name: laid_apart(x.detach(), list(range(x.ndim))[::-1]) for name, x in inputs.items()}
    found = value_and_grads(
        sk.sisa_attention, apart, laid_apart(dy, [3, 0, 2, 1]), backend="native"
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


# ---- lam = 0 -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "backend"),
    [("exact", "native"), ("exact", "chunked"), ("exact", "one_call"), ("clamped", "one_call")],
)
@pytest.mark.parametrize("G", [4, 2])
@pytest.mark.parametrize("lam", [(0.0, 0.4, 0.0, 0.2), (0.0, 0.0, 0.0, 0.0)], ids=str)
def test_lam_may_be_0(lam, G, mode, backend):
    inputs, dy = problem(L=200, H=4, G=G, Dh=32, decay=-4.0)
    inputs["lam"] = torch.tensor(lam)
    found = value_and_grads(sk.sisa_attention, inputs, dy, mode=mode, backend=backend)
    right = oracle(inputs, dy, mode=mode)
    errors = {name: relative(found[1][name], right[1][name]) for name in NAMES}
    errors["lam"] = lam_error(found[1]["lam"], inputs, dy, mode=mode)
    assert right[1]["lam"].abs().min() > 1e-2
    if backend == "native":
        check_bounds(found, right, errors)
    assert relative(found[0], right[0]) <= 5e-6
    assert worst_row(found[0], right[0]) <= 1e-4
    for name, error in errors.items():
        assert error <= (LAM if name == "lam" else 2e-5), (name, errors)


def test_lam_0_is_plain_attention():
    inputs, _ = problem(L=200, H=4, G=2)
    inputs["lam"] = torch.zeros(4)
    q, k, v = (inputs[name] for name in "qkv")
    y = sk.sisa_attention(**inputs, backend="native")
    assert relative(y, sk.causal_attention(q, k, v, backend="sdpa").double()) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("implementation", [COMPILED, EAGER], ids=["compiled", "eager"])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)], ids=["G=H", "G<H"])
def test_the_augmentation_at_lam_0(heads, implementation, dtype):
    call = augment_call(heads=heads, dtype=dtype, length=100)
    zero = torch.zeros_like(call.inputs[6])
    call = call._replace(inputs=[*call.inputs[:6], zero])
    right = augment(EAGER, call.double(), torch.float64)
    found = augment(implementation, call, dtype)
    rounding = torch.finfo(dtype).eps
    assert right["dlam"].isfinite().all()
    for name, exact in right.items():
        assert relative(found[name], exact) <= 4 * rounding, name


@pytest.mark.parametrize("dtype", HALVES)
def test_lam_may_be_0_in_half_precision(dtype):
    inputs, dy = problem(L=200, H=4, G=2, decay=-4.0, dtype=dtype)
    inputs["lam"] = torch.tensor([0.0, 0.4, 0.0, 0.2])
    found = value_and_grads(sk.sisa_attention, inputs, dy, backend="native")
    check_half(found, oracle(inputs, dy), inputs)


# ---- Large and bad numbers -----------------------------------------------------------------------


def test_large_scores_stay_finite_and_as_good_as_pytorch():
    inputs, dy = problem(B=4, L=400, decay=-4.0)
    inputs["q"] = 300 * inputs["q"].detach()
    right = oracle(inputs, dy)
    found = value_and_grads(sk.sisa_attention, inputs, dy, backend="native")

    def by_pytorch(q, k, v, **scores):
        _, importance = sk.reference.scores(q, k, **scores)
        later = torch.ones(400, 400, dtype=torch.bool).triu(1)
        mask = importance.to(q.dtype).masked_fill(later, -math.inf)
        heads = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(*heads, attn_mask=mask).transpose(1, 2)

    assert found[0].isfinite().all()
    no_worse_than(value_and_grads(by_pytorch, inputs, dy), found, right, 2.0)
    assert lam_error(found[1]["lam"], inputs, dy) <= relative(
        found[1]["log_decay"], right[1]["log_decay"]
    )


def same_bits_before(token, found, expected):
    """Of y, lse and every gradient of earlier tokens, and lam's."""

    def early(results):
        grads = {name: x[:, :token] if x.ndim > 1 else x for name, x in results.grads.items()}
        return results._replace(grads=grads)

    same_bits(early(found), early(expected))


BAD = [("importance", name) for name in "qkvbc"]
BAD += [(kind, name) for kind in ("forget", "none") for name in "qkv"]


@pytest.mark.parametrize("decay", [-3.0, 3.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("kind", "name"), BAD)
def test_what_is_no_number_reaches_no_earlier_row(kind, name, bad, decay):
    """Nor the gradients of a loss over earlier rows, where these are the queries of the call."""
    clean, dy, _ = with_gradients(call_of(kind, L=200, H=4, G=2, decay=decay))
    for token in (70, 127, 128, 199):
        early = run(queries(clean, 0, token), dy[:, :token])
        spoiled = getattr(clean, name).clone()
        spoiled[:, token] = bad
        call = clean._replace(**{name: spoiled})
        found = run(call)
        assert torch.equal(found.y[:, :token], early.y)
        assert torch.equal(found.lse[:, :, :token], early.lse)
        assert not found.y[:, token].isfinite().all(), "its own row"
        if name in "qc":
            assert found.y[:, token + 1 :].isfinite().all(), "and no row after it"
        elif math.isnan(bad):  # also past the horizon, as 0 times NaN is
            assert found.y[:, token:].isnan().all(), "and every row after it"
        same_bits_before(token, run(queries(call, 0, token), dy[:, :token]), early)


@pytest.mark.parametrize("decay", [-3.0, 3.0])
@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_that_is_no_number_is_not_lost(kind, decay):
    """It reaches all that its row sees, however little the row weighs it, and nothing else."""
    call, dy, dlse = with_gradients(call_of(kind, L=300, decay=decay))
    expected = run(call, dy, dlse).grads
    dy[:, 150] = math.nan
    grads = run(call, dy, dlse).grads
    for name in ("k", "v"):
        assert grads[name][:, :151].isnan().all()
        assert torch.equal(grads[name][:, 151:], expected[name][:, 151:])
    others = torch.arange(300) != 150
    for name in {"q", "c"} & set(grads):
        assert grads[name][:, 150].isnan().all()
        assert torch.equal(grads[name][:, others], expected[name][:, others])


@pytest.mark.parametrize("name", ["q", "k", "v", "b", "c"])
def test_what_is_no_number_reaches_no_gradient_of_an_earlier_query(name):
    """Of a loss over earlier rows: later ones pass their zeros times NaN to the keys they see."""
    call, dy, dlse = with_gradients(call_of(L=200, H=4, G=2))
    for x in (dy, dlse.mT):
        x[:, 120:] = 0
    expected = run(call, dy, dlse).grads
    spoiled = getattr(call, name).clone()
    spoiled[:, 120] = math.nan
    found = run(call._replace(**{name: spoiled}), dy, dlse).grads
    for query in ("q", "c"):
        assert torch.equal(found[query][:, :120], expected[query][:, :120])


@pytest.mark.parametrize("name", ["log_decay", "theta"])
def test_steps_that_are_no_number_reach_no_earlier_row(name):
    for kind in ("importance", "forget") if name == "log_decay" else ("importance",):
        call = call_of(kind)
        call, dy, dlse = with_gradients(call)
        given = dy[:, :100], dlse[:, :, :100]
        early = run(queries(call, 0, 100), *given)
        spoiled = getattr(call, name).clone()
        spoiled[:, 100] = math.nan
        call = call._replace(**{name: spoiled})
        found = run(call)
        same_bits_before(100, run(queries(call, 0, 100), *given), early)
        assert torch.equal(found.y[:, :100], early.y)
        assert found.y[:, 100:].isnan().all()


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_number_stays_in_its_document(kind):
    bounds = torch.tensor([0, 70, 70, 140, 180])
    call, dy, dlse = with_gradients(call_of(kind, bounds=bounds, H=4, G=2))
    expected = run(call, dy, dlse)
    inside = torch.zeros(200, dtype=torch.bool)
    inside[70:140] = True
    inside[180:] = True  # of no document

    def spoil(x):
        return x if x.ndim == 1 else x.masked_fill(inside.view(-1, *[1] * (x.ndim - 2)), math.nan)

    found = run(call.map(spoil), dy, dlse)
    assert torch.equal(found.y[:, ~inside], expected.y[:, ~inside])
    assert found.y[:, 70:140].isnan().all()
    assert not found.y[:, 180:].any()
    for name in set(found.grads) - {"lam"}:
        assert torch.equal(found.grads[name][:, ~inside], expected.grads[name][:, ~inside]), name
        assert not found.grads[name][:, 180:].any(), name


# ---- The same bits -------------------------------------------------------------------------------

SHAPES = {
    "many heads": dict(L=200, B=2, H=3),
    "one head": dict(L=700, H=1),
    "one long head": dict(L=2200, H=1),
    "shared key heads": dict(L=300, H=6, G=2, bounds=torch.tensor(BOUNDS)),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_bits_do_not_depend_on_threads(kind, shape):
    call, dy, dlse = with_gradients(call_of(kind, **SHAPES[shape]))
    results = []
    for count in (1, 2, 3, 5, 1):
        with threads(count):
            results.append(run(call, dy, dlse))
    for other in results[1:]:
        same_bits(other, results[0])


@pytest.mark.parametrize("kind", KINDS)
def test_bits_of_a_row_of_a_batch_are_those_of_the_row_alone(kind):
    call, dy, dlse = with_gradients(call_of(kind, B=3, L=300, H=4, G=2))
    whole = run(call, dy, dlse)
    for n in range(3):
        one = slice(n, n + 1)
        row = Call(*(x if x is None or x.ndim == 1 else x[one] for x in call[:8]))
        found = run(row, dy[one], dlse[one])
        assert torch.equal(found.y, whole.y[one])
        assert torch.equal(found.lse, whole.lse[one])
        for name in set(found.grads) - {"lam"}:
            assert torch.equal(found.grads[name], whole.grads[name][one]), name


def test_memory_that_a_call_leaves_reaches_no_other():
    """A thread keeps its scratch: full of NaN, and of what longer and wider calls put there."""
    small = [
        call_of(kind, L=L, H=2, G=1, widths=(13, 6, 9)) for kind in KINDS for L in (1, 65, 150)
    ]
    small = [with_gradients(call) for call in small]
    clean = [run(*each) for each in small]
    for kind in KINDS:
        call, dy, dlse = with_gradients(call_of(kind, L=400, H=2, widths=(96, 40, 80)))
        run(call.map(lambda x: torch.full_like(x, math.nan)), dy, dlse)
        for each, expected in zip(small, clean):
            same_bits(run(*each), expected)


def test_fresh_results_are_filled_in_the_library_too():
    """That :func:`results_are_poisoned` reaches what C++ allocates."""
    call, dy, _ = with_gradients(call_of())
    y, lse = torch.ops.sisa.attention(*call)
    with torch.autograd.profiler.profile() as profile:
        torch.ops.sisa.attention_backward(dy, None, y, lse, *call, call.wanted)
    names = [event.name for event in profile.function_events]
    assert names.count("aten::new_empty") == names.count("aten::fill_") == 8


# ---- What is not wanted --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_that_nobody_wants_are_not_returned(kind):
    call, dy, dlse = with_gradients(call_of(kind, L=150, H=4, G=2))
    expected = run(call, dy, dlse)
    given = range(len(call.names))
    subsets = [[n] for n in given] + [[m for m in given if m != n] for n in given] + [[]]
    for subset in subsets:
        names = [call.names[n] for n in subset]
        wanted = [name in names for name in Call._fields[:8]]
        grads = torch.ops.sisa.attention_backward(dy, dlse, expected.y, expected.lse, *call, wanted)
        for name, grad in zip(names, grads, strict=True):
            assert torch.equal(grad, expected.grads[name]), (name, names)


@pytest.mark.parametrize("names", [[name] for name in NAMES] + [["q", "k"], ["v", "lam"]], ids=str)
def test_gradients_of_some_inputs_are_those_of_all(names):
    inputs, dy = problem(L=100, H=4, G=2, Dh=16)
    _, expected = value_and_grads(sk.sisa_attention, inputs, dy, backend="native")
    some = {name: x.detach().requires_grad_(name in names) for name, x in inputs.items()}
    y = sk.sisa_attention(**some, backend="native")
    with Recorder() as recorder:
        y.backward(dy)
    ((name, arguments),) = recorder.calls
    assert name == "attention_backward"
    assert arguments[-1] == [name in names for name in NAMES]
    for name, x in some.items():
        assert x.grad is None if name not in names else torch.equal(x.grad, expected[name])


def test_no_gradient_at_all():
    inputs, _ = problem(L=65)
    y = sk.sisa_attention(**inputs, backend="native")
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            found = sk.sisa_attention(**inputs, backend="native")
        assert not found.requires_grad
        assert torch.equal(found, y)


# ---- Half precision, autocast --------------------------------------------------------------------


@pytest.mark.parametrize("decay", [-6.0, -2.0, 4.0])
@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_is_as_good_as_its_inputs(dtype, decay):
    inputs, dy = problem(L=257, H=4, G=2, decay=decay, dtype=dtype)
    options = {"rotary": tuple(rotary_tables(257, 64))}
    found = value_and_grads(sk.sisa_attention, inputs, dy, backend="native", **options)
    check_half(found, oracle(inputs, dy, **options), inputs)


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_is_fp32_inside(dtype):
    """The bits of fp32 operands of the same values, rounded at the end."""
    inputs, dy = problem(L=130, decay=-2.0, dtype=dtype)
    wide = {name: x.detach().float() for name, x in inputs.items()}
    y, grads = value_and_grads(sk.sisa_attention, inputs, dy, backend="native")
    y_wide, grads_wide = value_and_grads(sk.sisa_attention, wide, dy.float(), backend="native")
    assert torch.equal(y, y_wide.to(dtype))
    for name, grad in grads.items():
        assert torch.equal(grad, grads_wide[name].to(grad.dtype)), name


def test_autocast_does_not_reach_inside():
    inputs, dy = problem(L=257, decay=-4.0)
    plain = value_and_grads(sk.sisa_attention, inputs, dy, backend="native")
    with torch.autocast("cpu", torch.bfloat16):
        inside = value_and_grads(sk.sisa_attention, inputs, dy, backend="native")
    torch.testing.assert_close(inside, plain, rtol=0, atol=0)


# ---- Memory, processes ---------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("decay", [-5.0, 0.0])
def test_memory_is_linear_in_length(decay):
    """Peak extra memory of forward and backward at L = 8192, 2 heads, in a process of its own.

    One matrix of scores would take 268 MB; inputs and gradients take 32 MB."""
    script = f"""
import resource
import torch
import sisa_kernels as sk
from sisa_kernels.testing import problem
torch.set_num_threads(2)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
attend = lambda inputs: sk.sisa_attention(**inputs._asdict(), backend="native").sum().backward()
attend(problem(L=64)[0])
inputs, _ = problem(L=8192, decay={decay})
before = peak()
attend(inputs)
print((peak() - before) / 1024)
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 150


def in_a_child(connection, call, dy):
    torch.set_num_threads(1)  # OpenMP's threads do not outlive a fork, as PyTorch's own ops show
    connection.send([x.tolist() for x in (*run(call, dy).grads.values(), run(call).y)])


def test_a_forked_process_gives_the_same_bits():
    call, dy, _ = with_gradients(call_of(L=600))
    with threads(2):
        expected = run(call, dy)
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=in_a_child, args=(there, call, dy))
    child.start()
    try:
        assert here.poll(60), "it hangs"
        assert here.recv() == [x.tolist() for x in (*expected.grads.values(), expected.y)]
    finally:
        child.kill()
        child.join()
    same_bits(run(call, dy), expected)


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["default", "avx2", "avx512"])
def test_every_instruction_set_holds_the_bounds(isa):
    have = _extension.RECORD["isa"]
    if _extension.ISAS.index(isa) >= _extension.ISAS.index(have):
        pytest.skip(f"this is {have}")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    chosen = ["-k", "test_exact or test_any or documents or offset or bits or number or half"]
    done = subprocess.run(
        [*command, *chosen],
        cwd=ROOT,
        env={**os.environ, "SISA_CPU_ISA": isa},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]


# ---- The operator --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind):
    options = {**tables(9, 8), "bounds": torch.tensor([0, 4, 4, 8])}
    call = call_of(kind, L=9, H=4, G=2, widths=(8, 4, 6), **options)
    call, dy, dlse = with_gradients(queries(call, 2, 7))
    leaves = [None if x is None else x.clone().requires_grad_() for x in call[:8]]
    torch.library.opcheck(torch.ops.sisa.attention, (*leaves, *call[8:]))
    y, lse = torch.ops.sisa.attention(*call)
    backward = torch.ops.sisa.attention_backward
    torch.library.opcheck(backward, (dy, dlse, y, lse, *call, call.wanted))
    some = [n == 2 for n in range(8)]
    torch.library.opcheck(backward, (dy, None, y, lse, *call, some))


def test_compile_fullgraph():
    torch._dynamo.reset()
    compiled = torch.compile(sk.sisa_attention, fullgraph=True, dynamic=True)
    for L in (70, 100, 257):
        inputs, dy = problem(L=L, H=4, G=2, Dh=16)
        options = {
            "rotary": tuple(rotary_tables(L, 16)),
            "cu_seqlens": torch.tensor([0, 30, L], dtype=torch.int32),
        }
        found = value_and_grads(compiled, inputs, dy, backend="native", **options)
        expected = value_and_grads(sk.sisa_attention, inputs, dy, backend="native", **options)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_compile_fullgraph_within_a_model(monkeypatch):
    """ "auto", between products that inductor compiles, in bf16."""
    torch._dynamo.reset()

    def block(q, **rest):
        return 2 * sk.sisa_attention(q=3 * q, **rest).square()

    with first_use(monkeypatch):
        inputs, _ = problem(L=90, dtype=torch.bfloat16)
        y = block(**inputs)
        compiled = torch.compile(block, fullgraph=True)(**inputs)
        torch.testing.assert_close(compiled, y)


def test_a_second_derivative_is_refused():
    inputs, _ = problem(L=33, Dh=16)
    y = sk.sisa_attention(**inputs, backend="native")
    (dq,) = torch.autograd.grad(y.sum(), inputs["q"], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        dq.sum().backward()


def test_forward_mode_is_refused():
    inputs = {name: x.detach() for name, x in problem(L=9, H=1, Dh=16)[0].items()}

    def attend(q):
        return sk.sisa_attention(**{**inputs, "q": q}, backend="native")

    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(attend, (inputs["q"],), (inputs["q"],))


def test_both_results_have_gradients_and_either_alone():
    call, dy, dlse = with_gradients(call_of(L=70))
    leaves = call.map(lambda x: x.clone().requires_grad_())
    y, lse = torch.ops.sisa.attention(*leaves)
    zero = torch.zeros_like(dy)
    for outputs, grads, given in (
        ((y, lse), (dy, dlse), (dy, dlse)),
        ((y,), (dy,), (dy, None)),
        ((lse,), (dlse,), (zero, dlse)),
    ):
        found = torch.autograd.grad(outputs, leaves[:8], grads, retain_graph=True)
        expected = run(call, *given).grads
        assert all(torch.equal(*pair) for pair in zip(found, expected.values(), strict=True))


@any_call
def test_any_call_matches_fp64(drawn):
    with fresh_memory_is_nan():
        check_call(*drawn)


# ---- Wrong calls ---------------------------------------------------------------------------------

X = torch.zeros
WRONG = {
    "q must be [batch, length, heads, channels]": {"q": X(9, 16)},
    "q must have 1 to 256 channels": {"q": X(1, 9, 4, 257), "k": X(1, 9, 2, 257)},
    "q must have no size of 0": {"q": X(1, 0, 4, 16)},
    "q must be Float, BFloat16 or Half": {"q": X(1, 9, 4, 16, dtype=torch.float64)},
    "k must be [batch, length, heads, channels]": {"k": X(9, 16)},
    "k must have shape [1, 9, 2, 16], got [1, 9, 2, 8]": {"k": X(1, 9, 2, 8)},
    "k must have shape [1, 9, 2, 16], got [2, 9, 2, 16]": {"k": X(2, 9, 2, 16)},
    "k must be BFloat16": {"q": X(1, 9, 4, 16, dtype=torch.bfloat16)},
    "the heads of k must divide those of q": {"k": X(1, 9, 3, 16)},
    "v must have 1 to 256 channels": {"v": X(1, 9, 2, 257)},
    "v must have shape [1, 9, 2, 16], got [1, 8, 2, 16]": {"v": X(1, 8, 2, 16)},
    "b must have an even number of channels": {"b": X(1, 9, 2, 7)},
    "b must have 1 to 256 channels": {"b": X(1, 9, 2, 258)},
    "b must have shape [1, 9, 2, 8]": {"b": X(1, 9, 4, 8)},
    "b must be Float": {"b": X(1, 9, 2, 8, dtype=torch.float16)},
    "c must have shape [1, 9, 4, 8]": {"c": X(1, 9, 2, 8)},
    "log_decay must have shape [1, 9, 2]": {"log_decay": X(1, 9, 4)},
    "log_decay must be Float": {"log_decay": X(1, 9, 2, dtype=torch.bfloat16)},
    "theta must have shape [1, 9, 2, 4]": {"theta": X(1, 9, 2, 8)},
    "lam must have shape [4]": {"lam": X(2)},
    "lam must be Float": {"lam": X(4, dtype=torch.float64)},
    "b, c, log_decay, theta and lam must be given together": {"c": None},
    "cos must have shape [9, 8]": {"cos": X(9, 16), "sin": X(9, 8)},
    "sin must have shape [9, 8]": {"cos": X(9, 8), "sin": X(8, 8)},
    "sin must be Float": {"cos": X(9, 8), "sin": X(9, 8, dtype=torch.float64)},
    "cos and sin must be given together": {"cos": X(9, 8)},
    "offset must be from 0 to 0, got 1": {"offset": 1},
    "offset must be from 0 to 0, got -1": {"offset": -1},
    "offset must be from 0 to": {"q": X(1, 10, 4, 16)},
    "bounds must rise from 0 to at most 9, got [0, 5, 4, 9]": {
        "bounds": torch.tensor([0, 5, 4, 9])
    },
    "bounds must rise from 0 to at most 9, got [1, 9]": {"bounds": torch.tensor([1, 9])},
    "bounds must rise from 0 to at most 9, got [0, 10]": {"bounds": torch.tensor([0, 10])},
    "bounds must be [documents + 1]": {"bounds": torch.tensor([0])},
    "bounds must be [documents + 1], contiguous": {"bounds": torch.zeros(2, 2).long()},
    "bounds must be Int or Long": {"bounds": X(2)},
}


@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_call_raises(message):
    call = call_of(L=9, H=4, G=2)._replace(**WRONG[message])
    with pytest.raises(RuntimeError) as error:
        torch.ops.sisa.attention(*call)
    assert message in str(error.value)
    y, lse = X(1, 9, 4, 16), X(1, 4, 9)
    with pytest.raises(RuntimeError) as error:
        torch.ops.sisa.attention_backward(y, None, y, lse, *call, [True] * 8)
    assert message in str(error.value)


def test_rotary_tables_need_an_even_width():
    call = call_of(L=9, widths=(5, 8, 16), cos=X(9, 2), sin=X(9, 2))
    with pytest.raises(RuntimeError, match="cos and sin need an even head width"):
        torch.ops.sisa.attention(*call)


WRONG_GRADIENTS = {
    "dy must have shape [1, 9, 4, 16]": {"dy": X(1, 9, 2, 16)},
    "dy must be Float": {"dy": X(1, 9, 4, 16, dtype=torch.bfloat16)},
    "dlse must have shape [1, 4, 9]": {"dlse": X(1, 9, 4)},
    "y must have shape [1, 9, 4, 16]": {"y": X(1, 9, 4, 8)},
    "lse must have shape [1, 4, 9]": {"lse": X(1, 9, 4)},
    "lse must be contiguous": {"lse": X(1, 9, 4).mT},
    "wanted must be 8 booleans, got 3": {"wanted": [True] * 3},
}


@pytest.mark.parametrize("message", WRONG_GRADIENTS)
def test_wrong_gradients_raise(message):
    call = call_of(L=9, H=4, G=2)
    right = {
        "dy": X(1, 9, 4, 16),
        "dlse": None,
        "y": X(1, 9, 4, 16),
        "lse": X(1, 4, 9),
        "wanted": [True] * 8,
    }
    dy, dlse, y, lse, wanted = {**right, **WRONG_GRADIENTS[message]}.values()
    with pytest.raises(RuntimeError) as error:
        torch.ops.sisa.attention_backward(dy, dlse, y, lse, *call, wanted)
    assert message in str(error.value)


def test_a_gradient_of_what_is_not_given_is_refused():
    call = call_of("none", L=9)
    y, lse = torch.ops.sisa.attention(*call)
    with pytest.raises(RuntimeError, match="wanted must not name an operand that is not given"):
        torch.ops.sisa.attention_backward(y, None, y, lse, *call, [True] * 8)


# ---- The choice of the path ----------------------------------------------------------------------


def test_it_is_what_auto_runs(monkeypatch):
    with first_use(monkeypatch):
        for dtype in (torch.float32, *HALVES):
            inputs, _ = problem(L=65, Dh=16, dtype=dtype)
            y = sk.sisa_attention(**inputs)
            assert torch.equal(y, sk.sisa_attention(**inputs, backend="native"))
            with Recorder() as recorder:
                sk.sisa_attention(**inputs)
            assert recorder.names == ["attention"]
    assert sk.backends()["native"] == "available"


def test_it_is_checked_once_on_its_first_use(monkeypatch):
    found = []
    compare = selfcheck._compare
    monkeypatch.setattr(selfcheck, "_compare", lambda *x: found.append(x[0]) or compare(*x))
    with first_use(monkeypatch):
        inputs, _ = problem(L=65, Dh=16, Ds=6)
        for _ in range(2):
            sk.sisa_attention(**inputs)
        sk.sisa_attention(**problem(L=80, Dh=16, Ds=6)[0])
    assert [use[:1] + use[3:6] for use in found] == [("native", 16, 6, 16)]


BY_NAME = {
    "it computes in fp32, not in fp64": lambda: (problem(L=9, dtype=torch.float64)[0], {}),
    "it computes mode 'exact' only": lambda: (problem(L=9)[0], {"mode": "clamped"}),
    "at most 256 channels, got 300": lambda: (problem(L=9, Dh=300)[0], {}),
    "at most 256 channels, got 258": lambda: (problem(L=9, Ds=258)[0], {}),
    "at most 256 channels, got 257": lambda: (problem(L=9, Dv=257)[0], {}),
}


@pytest.mark.parametrize("why", BY_NAME)
def test_by_name_it_runs_or_says_why_not(why, monkeypatch):
    inputs, options = BY_NAME[why]()
    with pytest.raises(ValueError, match=rf"backend 'native' cannot run here: .*{why}"):
        sk.sisa_attention(**inputs, backend="native", **options)
    monkeypatch.setenv("SISA_BACKEND", "native")
    with pytest.raises(ValueError, match=f"SISA_BACKEND 'native' cannot run here: .*{why}"):
        sk.sisa_attention(**inputs, backend="chunked", **options)


def test_what_it_does_not_take_is_said_once_and_runs_chunked(monkeypatch, recwarn):
    inputs, _ = problem(L=33, Dh=300)
    expected = sk.sisa_attention(**inputs, backend="chunked")
    with first_use(monkeypatch):
        with pytest.warns(
            UserWarning, match=r"runs the 'chunked' path in place of 'native': .*got 300"
        ) as told:
            assert torch.equal(sk.sisa_attention(**inputs), expected)
        assert len(told) == 1
        assert torch.equal(sk.sisa_attention(**inputs), expected), "a warning would be an error"
        torch._dynamo.reset()
        compiled = torch.compile(sk.sisa_attention, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(**inputs), expected)


def test_fp64_runs_chunked_in_silence(monkeypatch):
    inputs, _ = problem(L=33, dtype=torch.float64)
    with first_use(monkeypatch), Recorder() as recorder:
        y = sk.sisa_attention(**inputs)
    assert "attention" not in recorder.names
    assert torch.equal(y, sk.sisa_attention(**inputs, backend="chunked"))


def crooked(*args):
    y, lse = torch.ops.sisa.attention(*args)
    return 1.01 * y, lse


def fails(*args):
    raise RuntimeError("illegal instruction\nand more")


@pytest.mark.parametrize(
    ("broken", "why"),
    [
        (crooked, r"on a small problem \(Dh 16, Ds 6, Dv 16, .* relative error of y by 1.0e-02"),
        (fails, r"it fails on cpu: RuntimeError: illegal instruction"),
    ],
    ids=["crooked", "fails"],
)
def test_a_path_found_wrong_is_out_for_the_process_and_said_once(monkeypatch, broken, why):
    inputs, _ = problem(L=33, Dh=16, Ds=6)
    expected = sk.sisa_attention(**inputs, backend="chunked")
    with first_use(monkeypatch):
        monkeypatch.setattr(native, "attention_op", broken)
        with pytest.warns(
            UserWarning, match=rf"'chunked' path in place of 'native': {why}"
        ) as told:
            assert torch.equal(sk.sisa_attention(**inputs), expected)
        assert len(told) == 1
        assert torch.equal(sk.sisa_attention(**inputs), expected), "a warning would be an error"
        with Recorder() as recorder:
            assert torch.equal(sk.sisa_attention(**inputs), expected)
        assert "attention" not in recorder.names
        torch._dynamo.reset()
        compiled = torch.compile(sk.sisa_attention, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(**inputs), expected)


def test_a_verdict_that_is_known_holds(monkeypatch):
    inputs, _ = problem(L=33, Dh=16, Ds=6)
    with first_use(monkeypatch):
        key = ("native", "cpu", "torch.float32", 16, 6, 16, "exact", False, True)
        sk.sisa_attention(**inputs)
        assert list(selfcheck._verdicts) == [key]
        monkeypatch.setitem(selfcheck._verdicts, key, "it was seen to be wrong")
        with pytest.warns(UserWarning, match="in place of 'native': it was seen to be wrong"):
            sk.sisa_attention(**inputs)


def test_the_record_of_inputs_is_unpacked_in_order():
    """native.attend beside the op, where operands of one shape could be confused."""
    call = call_of(L=70, H=2, widths=(8, 8, 8))
    record = SisaInputs(*call[:8], rotary=tuple(rotary_tables(70, 8)))
    y = native.attend(record)
    assert torch.equal(y, run(call._replace(**tables(70, 8))).y)
