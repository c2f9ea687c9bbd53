"""One sequence over several ranks: values and gradients of the whole, bytes sent, refusals."""

import itertools

import pytest
import torch

import sisa_kernels as sk
from sisa_kernels.testing import gradient_errors, relative, relative_errors, worst_row
from tests.support import context_parallel as over_ranks
from tests.support.context_parallel import AS_DEFAULT, Options, solve, whole_problem
from tests.support.ranks import spawned

# Half-lives of 760, 103, 5.5, 0.5 and 0.14 tokens.
DECAYS = (-7, -5, -2, 1, 5)
STEP_BY_STEP = 0
LENGTH = 203  # divides by no number of ranks


@pytest.fixture(scope="module")
def four():
    """Four ranks."""
    with spawned(4) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def two():
    """Two ranks."""
    with spawned(2) as ranks:
        yield ranks


def layouts(length: int, ranks: int) -> dict[str, sk.SequenceLayout]:
    share = length // ranks
    sizes = [share] * (ranks - 1) + [length - share * (ranks - 1)]
    return {
        "balanced": sk.SequenceLayout.balanced(length, ranks),
        "contiguous": sk.SequenceLayout.contiguous(sizes),
    }


def check(ranks, whole, layout, options=AS_DEFAULT, y=1e-6, row=5e-6, gradient=3e-6):
    """The ranks' values and gradients are the oracle's, within rounding."""
    found, outcomes = solve(ranks, whole, layout, options)
    right = whole.oracle()
    errors = relative_errors(found, right)
    if whole.kind == "sisa":
        errors |= gradient_errors(found[1], right[1], whole.inputs)
    assert errors.pop("y") < y
    past = right[0].eq(0).all(-1)  # the last document
    assert found[0][past].eq(0).all()
    assert worst_row(found[0][~past], right[0][~past]) < row
    assert max(errors.values()) < gradient, errors
    return found, outcomes


# ---- Layouts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "ranks"), [(16, 2), (17, 2), (203, 4), (5, 4), (1, 3), (7, 1)])
def test_balanced_gives_every_token_to_one_rank(length, ranks):
    layout = sk.SequenceLayout.balanced(length, ranks)
    positions = [layout.positions(rank) for rank in range(ranks)]
    assert torch.equal(torch.cat(positions).sort().values, torch.arange(length))
    assert [len(x) for x in positions] == [layout.size(rank) for rank in range(ranks)]
    pieces = [b - a for a, b in itertools.pairwise(layout.borders)]
    assert max(pieces) - min(pieces) <= 1


def test_balanced_pairs_pieces_from_both_ends():
    layout = sk.SequenceLayout.balanced(16, 2)
    assert layout.positions(0).tolist() == [0, 1, 2, 3, 12, 13, 14, 15]
    assert layout.positions(1).tolist() == [4, 5, 6, 7, 8, 9, 10, 11]


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_unshard_inverts_shard(dim):
    layout = sk.SequenceLayout.balanced(13, 3)
    x = torch.arange(13 * 13).reshape(13, 13)
    parts = [layout.shard(x, rank, dim) for rank in range(3)]
    assert torch.equal(layout.unshard(parts, dim), x)
    assert torch.equal(parts[1], x.index_select(dim, layout.positions(1)))


def test_layouts_are_values():
    bounds = torch.tensor([0, 4, 9])
    one, other = (sk.SequenceLayout.contiguous([4, 6], bounds) for _ in range(2))
    assert one == other
    assert len({one, other}) == 1
    assert one != sk.SequenceLayout.contiguous([4, 6])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sk.SequenceLayout.balanced(0, 2), "length and ranks must be at least 1"),
        (lambda: sk.SequenceLayout.balanced(4, 0), "length and ranks must be at least 1"),
        (lambda: sk.SequenceLayout.contiguous([]), "sizes must be at least 0"),
        (lambda: sk.SequenceLayout.contiguous([3, -1]), "sizes must be at least 0"),
        (lambda: sk.SequenceLayout.balanced(4, 2, [0, 5]), "cu_seqlens must rise from 0 to at"),
        (lambda: sk.SequenceLayout.balanced(4, 2, [0, 3, 2]), "cu_seqlens must rise"),
        (lambda: sk.SequenceLayout.balanced(4, 2).shard(torch.zeros(1, 5), 0), "x must have the"),
        (lambda: sk.SequenceLayout.balanced(4, 2).shard(torch.zeros(1, 4), 2), "rank must be"),
        (lambda: sk.SequenceLayout.balanced(4, 2).unshard([torch.zeros(1, 4)]), "parts must have"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ---- Values and gradients ------------------------------------------------------------------------


@pytest.mark.parametrize("decay", DECAYS)
def test_sisa_at_every_decay(four, decay):
    """At -7 what goes through a piece is half of the gradient of log_decay; at -2 nothing."""
    whole = whole_problem("sisa", LENGTH, decay=decay)
    check(four, whole, sk.SequenceLayout.balanced(LENGTH, 4))


@pytest.mark.parametrize("decay", [-7, -2, 5])
def test_fox_at_every_decay(four, decay):
    whole = whole_problem("fox", LENGTH, decay=decay)
    check(four, whole, sk.SequenceLayout.balanced(LENGTH, 4))


@pytest.mark.parametrize("kind", ["sisa", "fox", "plain"])
@pytest.mark.parametrize("at_once", [STEP_BY_STEP, 2**30])
def test_contiguous_pieces_both_ways_of_sending(four, kind, at_once):
    whole = whole_problem(kind, LENGTH, decay=-5)
    layout = layouts(LENGTH, 4)["contiguous"]
    _, outcomes = check(four, whole, layout, Options(at_once=at_once))
    assert bool(sum(outcome.forward_bytes["steps"] for outcome in outcomes)) == (not at_once)


@pytest.mark.parametrize("kind", ["sisa", "fox", "plain"])
def test_two_ranks_with_shared_key_heads(two, kind):
    whole = whole_problem(kind, LENGTH, decay=-5, G=2, Dv=48, B=2)
    check(two, whole, sk.SequenceLayout.balanced(LENGTH, 2), Options(at_once=STEP_BY_STEP))


# Borders of pieces of 203 on 4 ranks: 25, 50, 76, 101, 126, 152, 177.
DOCUMENTS = {
    "within a piece": [0, 30, 40, 203],
    "on borders": [0, 25, 101, 203],
    "empty, and tokens past the last": [0, 60, 60, 130, 140],
    "every piece has a break": [0, 10, 33, 60, 90, 110, 140, 160, 190, 203],
}


@pytest.mark.parametrize("documents", DOCUMENTS.values(), ids=DOCUMENTS.keys())
@pytest.mark.parametrize("kind", ["sisa", "fox"])
def test_packed_documents(four, kind, documents):
    whole = whole_problem(kind, LENGTH, decay=-5, documents=documents, G=2)
    check(four, whole, sk.SequenceLayout.balanced(LENGTH, 4))


def test_the_layout_may_hold_the_documents(four):
    documents = DOCUMENTS["within a piece"]
    whole = whole_problem("sisa", LENGTH, decay=-5, documents=documents)
    right = whole.oracle()
    whole.cu_seqlens = None
    found, _ = solve(four, whole, sk.SequenceLayout.balanced(LENGTH, 4, documents))
    assert max(relative_errors(found, right).values()) < 3e-6


@pytest.mark.parametrize("kind", ["sisa", "fox", "plain"])
@pytest.mark.parametrize("sizes", [[0, 1, 40, 2], [3, 0, 0, 30]])
def test_uneven_pieces_also_of_no_token_and_of_one(four, kind, sizes):
    whole = whole_problem(kind, sum(sizes), decay=-5)
    check(four, whole, sk.SequenceLayout.contiguous(sizes))


def test_fewer_tokens_than_pieces(four):
    check(four, whole_problem("sisa", 3, decay=-5), sk.SequenceLayout.balanced(3, 4))


@pytest.mark.parametrize("kind", ["sisa", "fox"])
def test_a_token_that_forgets_all_before_it(four, kind):
    """A decay of 0 at borders and elsewhere: -inf minus -inf would be no number."""
    whole = whole_problem(kind, LENGTH, decay=-5)
    log = whole.inputs["log_decay" if kind == "sisa" else "log_forget"]
    log[:, [0, 25, 60, 101, 102, 202]] = -torch.inf
    check(four, whole, sk.SequenceLayout.balanced(LENGTH, 4))


@pytest.mark.parametrize("kind", ["sisa", "fox", "plain"])
def test_fp64_to_its_rounding(two, kind):
    whole = whole_problem(kind, 77, decay=-2, G=2, dtype=torch.float64)
    tight = {"y": 1e-14, "row": 1e-13, "gradient": 2e-14}
    check(two, whole, sk.SequenceLayout.balanced(77, 2), Options("auto"), **tight)


@pytest.mark.parametrize("kind", ["sisa", "fox", "plain"])
def test_bf16_to_the_rounding_of_its_operands(two, kind):
    whole = whole_problem(kind, LENGTH, decay=-4, G=2, dtype=torch.bfloat16)
    bounds = {"y": 4e-3, "row": 1.5e-2, "gradient": 6e-3}
    check(two, whole, sk.SequenceLayout.balanced(LENGTH, 2), **bounds)


@pytest.mark.parametrize(
    ("kind", "backend"),
    [
        ("sisa", "auto"),
        ("sisa", "chunked"),
        pytest.param("sisa", "triton", marks=pytest.mark.slow),
        ("fox", "chunked"),
        ("plain", "sdpa"),
    ],
)
def test_other_paths_within_a_piece(two, kind, backend):
    """Documents end before the sequence, and g falls by several chunks of stock kernels."""
    if backend == "triton":
        pytest.importorskip("triton")
    whole = whole_problem(kind, 131, decay=0, documents=[0, 20, 120])
    check(two, whole, sk.SequenceLayout.balanced(131, 2), Options(backend=backend))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sisa", "fox", "plain"])
@pytest.mark.parametrize("order", ["balanced", "contiguous"])
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("documents", [None, [0, 7, 300, 301, 640, 900]])
def test_every_case_at_length(four, two, kind, order, decay, documents):
    if kind == "plain" and decay != -5:
        pytest.skip("has no decay")
    length = 1013
    whole = whole_problem(kind, length, decay=decay, documents=documents, G=2)
    for ranks, at_once in itertools.product((two, four), (STEP_BY_STEP, 2**30)):
        layout = layouts(length, ranks.size)[order]
        check(ranks, whole, layout, Options(at_once=at_once), gradient=5e-6)


# ---- What is sent --------------------------------------------------------------------------------


def keys_seen_elsewhere(layout: sk.SequenceLayout, documents: list[int] | None) -> int:
    """Pairs of a token and another rank of which some query sees it, counted one by one."""
    length = layout.length
    bounds = torch.tensor(documents or [0, length])
    token = torch.arange(length)
    document = torch.searchsorted(bounds[1:].contiguous(), token, right=True)
    sees = (document[:, None] == document) & (token[:, None] >= token)
    sees &= (token < bounds[-1])[:, None]
    count = 0
    for rank in range(layout.ranks):
        own = layout.positions(rank)
        seen = sees[own].any(0)
        seen[own] = False
        count += int(seen.sum())
    return count


@pytest.mark.parametrize("documents", [None, [0, 40, 64, 200, 250]])
@pytest.mark.parametrize("order", ["balanced", "contiguous"])
@pytest.mark.parametrize("at_once", [STEP_BY_STEP, 2**30])
def test_bytes_are_those_of_the_formula(four, order, documents, at_once):
    G, Dh, Dv, Ds = 2, 32, 48, 16
    whole = whole_problem("sisa", 256, decay=-7, G=G, Dh=Dh, Dv=Dv, Ds=Ds, documents=documents)
    layout = layouts(256, 4)[order]
    _, outcomes = solve(four, whole, layout, Options(at_once=at_once))
    keys = keys_seen_elsewhere(layout, documents) * G * (Dh + Dv + Ds) * 4
    pieces = len(layout.owners)
    assert sum(x.forward_bytes["keys"] for x in outcomes) == keys
    assert sum(x.backward_bytes["keys"] for x in outcomes) == 2 * keys
    assert sum(x.forward_bytes["gather"] for x in outcomes) == pieces * 8 * G * (3 + Ds // 2)
    through = 8 * G * (1 + Ds // 2) * pieces
    assert {x.backward_bytes["reduce"] for x in outcomes} == {through}
    assert not any(x.backward_bytes["gather"] for x in outcomes)


def test_half_of_an_all_gather_contiguous_and_three_quarters_balanced(four):
    whole = whole_problem("plain", 256)
    everything = 3 * whole.inputs["k"].nbytes * 2
    for order, share in (("contiguous", 0.5), ("balanced", 0.75)):
        _, outcomes = solve(four, whole, layouts(256, 4)[order])
        assert sum(x.forward_bytes["keys"] for x in outcomes) == share * everything


def test_past_the_horizon_b_stays_at_home(four):
    """With half-lives of half a token only neighbours' pieces have an importance term."""
    whole = whole_problem("sisa", 256, decay=1)
    layout = layouts(256, 4)["contiguous"]
    near, outcomes = solve(four, whole, layout)
    far, everything = solve(four, whole, layout, Options(horizon=False))
    assert relative(near[0], far[0].double()) < 1e-7
    assert max(relative_errors(near, (far[0].double(), in_double(far[1]))).values()) < 2e-6
    token_of_b = 4 * 16 * 4
    saved = sum(a.forward_bytes["keys"] for a in everything)
    saved -= sum(a.forward_bytes["keys"] for a in outcomes)
    assert saved == 3 * 64 * token_of_b  # pieces 0 and 1 to 2 and 3: three pairs


def in_double(grads):
    return {name: x.double() for name, x in grads.items()}


# ---- Within autograd -----------------------------------------------------------------------------


def own_tokens(rank, whole, layout):
    return {n: x if n == "lam" else layout.shard(x, rank) for n, x in whole.inputs.items()}


def same_bits(rank, group, whole, layout, checkpointed):
    """Whether a second run has the bits of the first, and may run its forward in its backward."""
    dy = layout.shard(whole.dy, rank)

    def attend(*leaves):
        return sk.sisa_attention(*leaves, group=group, layout=layout)

    def again(*leaves):
        return torch.utils.checkpoint.checkpoint(attend, *leaves, use_reentrant=False)

    def run(function):
        leaves = [x.clone().requires_grad_() for x in own_tokens(rank, whole, layout).values()]
        y = function(*leaves)
        return y.detach(), *torch.autograd.grad(y, leaves, dy)

    return all(map(torch.equal, run(attend), run(again if checkpointed else attend)))


@pytest.mark.parametrize("checkpointed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_same_bits_again_also_under_checkpointing(two, checkpointed):
    whole = whole_problem("sisa", LENGTH, decay=-5)
    layout = sk.SequenceLayout.balanced(LENGTH, 2)
    assert all(two.run(same_bits, whole, layout, checkpointed))


def autocast_and_no_grad(rank, group, whole, layout):
    own = own_tokens(rank, whole, layout)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        return sk.sisa_attention(**own, group=group, layout=layout)


def test_fp32_under_autocast_stays_fp32(two):
    whole = whole_problem("sisa", LENGTH, decay=-5)
    whole.rotary = None
    layout = sk.SequenceLayout.balanced(LENGTH, 2)
    y = layout.unshard(two.run(autocast_and_no_grad, whole, layout))
    assert relative(y, whole.oracle()[0]) < 1e-6


@pytest.mark.slow
def test_a_compiled_call_breaks_its_graph_around_it(two):
    whole = whole_problem("sisa", 64, decay=-5)
    layout = sk.SequenceLayout.balanced(64, 2)
    assert two.run(compiled, whole, layout) == [True, True]


def compiled(rank, group, whole, layout):
    own = own_tokens(rank, whole, layout)

    def layer(**x):
        return 2 * sk.sisa_attention(**x, group=group, layout=layout)

    return torch.equal(torch.compile(layer, backend="eager")(**own), layer(**own))


# ---- Refusals ------------------------------------------------------------------------------------


def refusals(rank, group, cases):
    """The error that each case raises here, as its type and message."""
    found = []
    for kind, inputs, options in cases:
        options = {name: group if x == "the group" else x for name, x in options.items()}
        try:
            over_ranks.ATTEND[kind](**inputs, **options)
            found.append("nothing")
        except Exception as error:
            found.append(f"{type(error).__name__}: {error}")
    return found


def test_what_does_not_fit_is_refused(two):
    inputs = whole_problem("sisa", 8, decay=-5).inputs
    plain = {name: inputs[name] for name in "qkv"}
    right = sk.SequenceLayout.balanced(16, 2)
    both = {"group": "the group", "layout": right}
    short = torch.zeros(16, 16), torch.zeros(16, 16)
    cases = [
        (
            "sisa",
            inputs,
            {"layout": right},
            "group and layout must be given together, got no group",
        ),
        ("plain", plain, {"group": "the group"}, "got no layout"),
        ("plain", plain, {**both, "layout": [8, 8]}, "TypeError: layout must be a"),
        ("sisa", inputs, {**both, "layout": sk.SequenceLayout.balanced(24, 3)}, "as many ranks"),
        (
            "sisa",
            inputs,
            {**both, "layout": sk.SequenceLayout.balanced(18, 2)},
            "q must have the 9",
        ),
        ("sisa", inputs, {**both, "mode": "clamped"}, "mode must be 'exact', got 'clamped'"),
        ("sisa", inputs, {**both, "backend": "one_call"}, "backend must be one of auto, native"),
        ("sisa", inputs, {**both, "backend": "reference"}, "backend must be one of auto, native"),
        ("plain", plain, {**both, "rotary": short}, r"rotary[0] (cos) must have shape [8, 16]"),
        ("plain", plain, {**both, "cu_seqlens": torch.tensor([0, 20])}, "of the whole sequence"),
        (
            "plain",
            plain,
            {
                "group": "the group",
                "layout": sk.SequenceLayout.balanced(16, 2, [0, 9]),
                "cu_seqlens": torch.tensor([0, 8]),
            },
            "cu_seqlens must be the layout's, [0, 9], got [0, 8]",
        ),
    ]
    for found in two.run(refusals, [case[:3] for case in cases]):
        for error, (*_, message) in zip(found, cases):
            assert message in error
            assert error.startswith(("ValueError", "TypeError"))


def under_transform(rank, group, inputs, layout):
    def loss(q):
        return sk.sisa_attention(**{**inputs, "q": q}, group=group, layout=layout).sum()

    try:
        torch.func.grad(loss)(inputs["q"])
    except NotImplementedError as error:
        return str(error)
    return "nothing"


def test_torch_func_is_refused(two):
    inputs = whole_problem("sisa", 8, decay=-5).inputs
    found = two.run(under_transform, inputs, sk.SequenceLayout.balanced(16, 2))
    assert all("does not run under torch.func" in error for error in found)


def test_a_failing_rank_is_named(two):
    with pytest.raises(AssertionError, match="rank 1"):
        two.run(fail)


def fail(rank, group):
    if rank == 1:
        raise RuntimeError("as asked")
