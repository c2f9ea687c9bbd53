"""forgetting_attention (FoX, ALiBi): exact at any length and decay, linear memory, checked."""

import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import sisa_kernels as sk
from sisa_kernels import forgetting, step
from sisa_kernels.paths import dense
from sisa_kernels.testing import forgetting_problem, in_fp64, relative, value_and_grads, worst_row
from tests.support import ROOT

LENGTHS = (1, 63, 257, 1000)
NAMES = ("q", "k", "v", "log_forget")


def check_exact(inputs, dy, function=sk.forgetting_attention, **kwargs):
    """The bounds of SISA's exact mode in fp32, on y, its worst row and every gradient."""
    y, grads = value_and_grads(function, inputs, dy, **kwargs)
    y_ref, grads_ref = value_and_grads(
        sk.reference.forgetting_attention, in_fp64(inputs), dy.double(), **kwargs
    )
    assert relative(y, y_ref) <= 5e-6
    assert worst_row(y, y_ref) <= 1e-4
    errors = {name: relative(grads[name], grads_ref[name]) for name in NAMES}
    assert max(errors.values()) <= 2e-5, errors


def by_hand(q, k, v, log_forget):
    """The definition, one score at a time."""
    B, L, H, Dh = q.shape
    y = torch.zeros(B, L, H, v.shape[3], dtype=torch.float64)
    for n in range(B):
        for h in range(H):
            j_head = h * k.shape[2] // H
            for i in range(L):
                forgotten = [log_forget[n, j + 1 : i + 1, h].sum() for j in range(i + 1)]
                scores = [
                    q[n, i, h] @ k[n, j, j_head] / math.sqrt(Dh) + forgotten[j]
                    for j in range(i + 1)
                ]
                y[n, i, h] = torch.stack(scores).softmax(0) @ v[n, : i + 1, j_head]
    return y


def test_oracle_is_the_definition_and_its_gradient_is_right():
    inputs, _ = forgetting_problem(B=2, L=17, H=4, G=2, Dh=4, Dv=5, decay=0.0, dtype=torch.float64)
    expected = by_hand(**in_fp64(inputs))
    torch.testing.assert_close(
        sk.reference.forgetting_attention(**inputs), expected, rtol=1e-12, atol=1e-12
    )
    small, _ = forgetting_problem(L=7, H=2, G=1, Dh=4, Dv=3, decay=0.0, dtype=torch.float64)
    tables = tuple(torch.rand(2, 7, 2, dtype=torch.float64))
    documents = torch.tensor([0, 3, 7], dtype=torch.int32)

    def function(*args):
        return sk.reference.forgetting_attention(*args, rotary=tables, cu_seqlens=documents)

    assert torch.autograd.gradcheck(function, tuple(small.values()))


@pytest.mark.parametrize("decay", [-6.0, -4.0, -1.0, 1.0, 4.0])
@pytest.mark.parametrize("L", LENGTHS)
def test_exact(L, decay):
    check_exact(*forgetting_problem(L=L, decay=decay))


@pytest.mark.slow
@pytest.mark.parametrize("decay", [-6.0, -1.0, 1.0])
def test_exact_at_length(decay):
    check_exact(*forgetting_problem(L=6144, H=1, decay=decay))


@pytest.mark.parametrize("decay", [-4.0, 1.0])
def test_grouped_heads_rotary_documents_and_value_width(decay):
    inputs, dy = forgetting_problem(L=257, H=6, G=2, Dh=32, Dv=80, decay=decay)
    angle = torch.rand(257, 16) * 6
    check_exact(
        inputs,
        dy,
        rotary=(angle.cos(), angle.sin()),
        cu_seqlens=torch.tensor([0, 1, 64, 200, 257], dtype=torch.int32),
    )


def test_strided_inputs():
    inputs, dy = forgetting_problem(B=2, L=63, H=2, decay=0.0)
    packed = torch.cat([inputs[name].detach().flatten(2) for name in ("q", "k", "v")], -1)
    strided = {
        name: x.unflatten(-1, (2, -1)) for name, x in zip(("q", "k", "v"), packed.split(128, -1))
    }
    strided["log_forget"] = inputs["log_forget"].detach().mT.contiguous().mT
    assert not any(x.is_contiguous() for x in strided.values())
    plain = value_and_grads(sk.forgetting_attention, inputs, dy)
    torch.testing.assert_close(
        value_and_grads(sk.forgetting_attention, strided, dy), plain, rtol=0, atol=0
    )


# Channels apart; the length innermost, which a pad would keep.
@pytest.mark.parametrize("order", [(0, 1, 3, 2), (0, 2, 3, 1)])
@pytest.mark.parametrize("Dv", [64, 65, 80])  # narrower than keys and bias, as wide, wider
def test_inputs_whose_channels_lie_apart(Dv, order):
    inputs, dy = forgetting_problem(L=65, Dv=Dv)
    back = [order.index(axis) for axis in range(4)]
    wide = (*list(inputs.values())[:3], dy)
    *wide, dy_apart = (x.detach().permute(order).contiguous().permute(back) for x in wide)
    apart = dict(zip(NAMES, (*wide, inputs["log_forget"])))
    expected = value_and_grads(sk.forgetting_attention, inputs, dy)
    torch.testing.assert_close(
        value_and_grads(sk.forgetting_attention, apart, dy_apart), expected, rtol=0, atol=0
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_good_as_its_inputs(dtype):
    """Within twice the rounding of the oracle's own result and gradients to the dtype."""
    inputs, dy = forgetting_problem(L=257, decay=-1.0, dtype=dtype)
    y, grads = value_and_grads(sk.forgetting_attention, inputs, dy)
    y_ref, grads_ref = value_and_grads(
        sk.reference.forgetting_attention, in_fp64(inputs), dy.double()
    )
    assert y.dtype == dtype
    assert relative(y, y_ref) <= 2 * relative(y_ref.to(dtype), y_ref)
    for name in NAMES:
        assert grads[name].dtype == inputs[name].dtype
        rounding = relative(grads_ref[name].to(grads[name].dtype), grads_ref[name])
        assert relative(grads[name], grads_ref[name]) <= 2 * rounding + 1e-5, name


def test_autocast_does_not_reach_inside():
    inputs, dy = forgetting_problem(L=257, decay=-1.0)
    plain = value_and_grads(sk.forgetting_attention, inputs, dy)
    with torch.autocast("cpu", torch.bfloat16):
        inside = value_and_grads(sk.forgetting_attention, inputs, dy)
    torch.testing.assert_close(inside, plain, rtol=0, atol=0)


@pytest.mark.parametrize("decay", [-3.0, 6.0])
def test_fp64_and_its_gradcheck(decay):
    inputs, _ = forgetting_problem(L=12, H=2, G=1, Dh=4, Dv=6, decay=decay, dtype=torch.float64)
    expected = sk.reference.forgetting_attention(**inputs)
    torch.testing.assert_close(sk.forgetting_attention(**inputs), expected, rtol=1e-11, atol=1e-11)
    assert torch.autograd.gradcheck(
        sk.forgetting_attention, tuple(inputs.values()), nondet_tol=1e-12
    )


@pytest.mark.parametrize("decay", [-4.0, 1.0])
def test_devices_without_a_flash_kernel(monkeypatch, decay):
    """The dense scores of other devices, on the CPU, 100 queries at a time."""
    monkeypatch.setattr(dense, "has_flash", lambda device: False)
    monkeypatch.setattr(dense, "ROWS", 100)
    check_exact(*forgetting_problem(B=2, L=257, H=4, G=2, decay=decay))


def test_one_token_may_wipe_out_everything_before_it():
    inputs, dy = forgetting_problem(L=300, decay=-5.0)
    log_forget = inputs["log_forget"].detach().clone()
    log_forget[:, 150] = -1e30
    log_forget[:, 200:203] = -500.0
    log_forget[:, 250] = -torch.inf
    inputs = {**inputs, "log_forget": log_forget}
    check_exact(inputs, dy)
    alone = {name: x[:, 250:] for name, x in inputs.items()}
    after = sk.forgetting_attention(**inputs)[:, 250:]
    assert relative(after, sk.forgetting_attention(**alone).double()) <= 5e-6


@pytest.mark.parametrize("decay", [-5.0, 1.0])
def test_later_tokens_do_not_change_earlier_outputs(decay):
    inputs, _ = forgetting_problem(L=600, decay=decay)
    changed, _ = forgetting_problem(L=600, decay=decay, seed=1)
    cut = 400
    mixed = {name: torch.cat((x[:, :cut], changed[name][:, cut:]), 1) for name, x in inputs.items()}
    mixed["log_forget"][:, cut:] *= 20
    before, after = (sk.forgetting_attention(**x)[:, :cut] for x in (inputs, mixed))
    assert worst_row(after, before.double()) <= 5e-6


def test_memory_is_linear_in_length():
    """Peak extra memory of forward and backward at L = 4096, 2 heads, in a process of its own.

    One matrix of scores would take 134 MB.
    """
    script = """
import resource
import sisa_kernels as sk
from sisa_kernels.testing import forgetting_problem
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
sk.forgetting_attention(**forgetting_problem(L=64)[0]).sum().backward()
inputs, _ = forgetting_problem(L=4096, decay=0.0)
before = peak()
sk.forgetting_attention(**inputs).sum().backward()
print((peak() - before) / 1024)
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 100


@pytest.mark.parametrize("G", [4, 2])
def test_the_gpu_form_is_the_operator(monkeypatch, G):
    """What half precision runs on a GPU, here in fp32 on the CPU and in three calls."""
    monkeypatch.setattr(forgetting, "HALF_CHUNK", 100)
    check_exact(
        *forgetting_problem(B=2, L=257, H=4, G=G, Dh=32, Dv=48, decay=-4.0),
        function=forgetting.half_document,
    )


@pytest.mark.parametrize("decay", [-5.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_gpu_form_holds_the_bias_in_half_precision(dtype, decay):
    """Against rounding alone: twice for y, four times for q, k and v.

    At decay 1, g falls by 1,300 to a bias of 5 bf16 digits."""
    inputs, dy = forgetting_problem(L=1000, H=2, Dh=32, decay=decay, dtype=dtype)
    y, grads = value_and_grads(forgetting.half_document, inputs, dy)
    y_ref, grads_ref = value_and_grads(
        sk.reference.forgetting_attention, in_fp64(inputs), dy.double()
    )
    assert relative(y, y_ref) <= 2 * relative(y_ref.to(dtype), y_ref)
    for name in ("q", "k", "v"):
        rounding = relative(grads_ref[name].to(dtype), grads_ref[name])
        assert relative(grads[name], grads_ref[name]) <= 4 * rounding, name
    if decay == -5.0:
        assert relative(grads["log_forget"], grads_ref["log_forget"]) <= (
            0.03 if dtype == torch.bfloat16 else 0.004
        )


def test_alibi_is_the_published_bias():
    halves = sk.alibi_slopes(8)
    assert halves.tolist() == [2.0**-n for n in range(1, 9)]
    assert torch.equal(sk.alibi_slopes(4), halves[1::2])
    # Heads between powers of two: those of 8, then the first, third ... of 16.
    assert torch.equal(sk.alibi_slopes(12), torch.cat((halves, sk.alibi_slopes(16)[:8:2])))
    with pytest.raises(ValueError, match="heads must be at least 1, got 0"):
        sk.alibi_slopes(0)
    try:
        torch.set_default_dtype(torch.bfloat16)
        assert sk.alibi_slopes(8).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)

    inputs, _ = forgetting_problem(L=300, H=12, Dh=16)
    q, k, v = (inputs[name].transpose(1, 2) for name in ("q", "k", "v"))
    place = torch.arange(300.0)
    bias = -sk.alibi_slopes(12)[:, None, None] * (place[:, None] - place)
    mask = bias.masked_fill(place[:, None] < place, -torch.inf)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
    y = sk.forgetting_attention(
        inputs["q"], inputs["k"], inputs["v"], -sk.alibi_slopes(12).expand(1, 300, 12)
    )
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def walk(inputs, sizes, lengths=None):
    """(y, the cache) of a sequence in pieces of the given sizes, the rest token by token."""
    L = inputs["q"].shape[1]
    cache, sizes = sk.TokenCache(len(inputs["q"])), [*sizes, *[1] * (L - sum(sizes))]
    pieces = [
        dict(zip(inputs, piece))
        for piece in zip(*(x.detach().split(sizes, 1) for x in inputs.values()))
    ]
    y = [
        sk.forgetting_decode(**piece, cache=cache, lengths=None if n else lengths)
        for n, piece in enumerate(pieces)
    ]
    return torch.cat(y, 1), cache


# A half-life of 140 tokens, of 2, of half a token; 300 tokens behind others are more than one piece
# of scores.
@pytest.mark.parametrize("decay", [-5.3, -0.9, 1.0])
@pytest.mark.parametrize("sizes", [[1], [390], [40, 1, 300, 30, 1]], ids=str)
def test_pieces_over_a_cache_are_the_whole(sizes, decay):
    inputs, _ = forgetting_problem(B=2, L=400, H=6, G=2, Dh=16, Dv=24, decay=decay)
    inputs["log_forget"] = inputs["log_forget"].detach().clone()
    # Forgets all before, in every kind of piece.
    inputs["log_forget"][0, [30, 100, 395], 1] = -torch.inf
    y, cache = walk(inputs, sizes)
    expected = sk.reference.forgetting_attention(**in_fp64(inputs))
    assert relative(y, expected) <= 1e-6
    assert worst_row(y, expected) <= 1e-5
    assert {name: x.dtype for name, x in cache.buffers.items()} == {
        "k": torch.float32,
        "v": torch.float32,
        "g": torch.float64,
    }
    double = {name: x.detach().double() for name, x in inputs.items()}
    assert relative(walk(double, sizes)[0], expected) <= 1e-12


def test_rows_of_unequal_beginnings_go_on_from_their_last_token():
    inputs, _ = forgetting_problem(B=3, L=60, H=4, G=2, Dh=16, decay=-2.0)
    lengths = [1, 50, 23]
    y, cache = walk(inputs, [50, 4], lengths)
    assert cache.lengths == [11, 60, 33]
    for row, n in enumerate(lengths):
        real = [*range(n), *range(50, 60)]
        expected = sk.reference.forgetting_attention(
            **{name: x.detach().double()[row : row + 1, real] for name, x in inputs.items()}
        )
        assert relative(y[row : row + 1, real], expected) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_over_a_cache_is_as_good_as_its_inputs(dtype):
    inputs, _ = forgetting_problem(B=2, L=100, decay=-1.0, dtype=dtype)
    expected = sk.reference.forgetting_attention(**in_fp64(inputs))
    with torch.autocast("cpu", dtype):
        y, _ = walk(inputs, [40, 30])
    assert y.dtype == dtype
    assert relative(y, expected) <= 1.1 * relative(expected.to(dtype), expected)


@torch.no_grad()
def test_bad_uses_of_a_cache_are_named():
    inputs = {name: x.detach() for name, x in forgetting_problem(B=2, L=5)[0].items()}
    _, cache = walk(inputs, [5])
    before = {name: x.clone() for name, x in cache.buffers.items()}
    one = {name: x[:, :1] for name, x in inputs.items()}
    for message, change in [
        ("cache must be a sisa_kernels.TokenCache, got dict", {"cache": {}}),
        ("k must have the cache's batch of 2, got 1", {name: x[:1] for name, x in one.items()}),
        (
            "k must be torch.float32 on cpu as in the cache, got torch.float64",
            {name: x.double() for name, x in one.items()},
        ),
        ("lengths is for the first tokens of an empty cache", {"lengths": [1, 1]}),
        ("log_forget must be <= 0 everywhere", {"log_forget": one["log_forget"].abs()}),
    ]:
        with pytest.raises((ValueError, TypeError), match=message.replace("(", r"\(")):
            sk.forgetting_decode(**{**one, "cache": cache, **change})
    with torch.enable_grad():
        for name, x in one.items():
            with pytest.raises(ValueError, match=f"{name} requires grad"):
                sk.forgetting_decode(**{**one, name: x.clone().requires_grad_()}, cache=cache)
    assert cache.lengths == [5, 5]
    assert all(torch.equal(x, before[name]) for name, x in cache.buffers.items())


@torch.no_grad()
def test_an_error_on_the_way_leaves_the_cache(monkeypatch):
    inputs, _ = forgetting_problem(L=20)
    head, tail = (
        {name: x.detach()[:, piece] for name, x in inputs.items()}
        for piece in (slice(10), slice(10, 20))
    )
    cache = sk.TokenCache(1)
    sk.forgetting_decode(**head, cache=cache)
    with monkeypatch.context() as broken:
        for name in ("_attend", "_attend_compiled"):
            broken.setattr(step, name, lambda *_: (_ for _ in ()).throw(MemoryError()))
        with pytest.raises(MemoryError):
            sk.forgetting_decode(**tail, cache=cache)
    whole = sk.reference.forgetting_attention(**in_fp64(inputs))[:, 10:]
    assert relative(sk.forgetting_decode(**tail, cache=cache), whole) <= 1e-6


@torch.no_grad()
def test_tokens_that_would_corrupt_a_cache_are_named():
    cache, x = sk.TokenCache(2), torch.ones(2, 3, 1, 4)
    for message, new in [
        ("a cache needs at least one tensor of new tokens, got none", {}),
        ("v must have 3 tokens like k, got 2", {"k": x, "v": x[:, :2]}),
    ]:
        with pytest.raises(ValueError, match=message):
            cache.append(**new)
    cache.append(k=x, v=x)
    for new in ({"k": x}, {"k": x, "v": x, "w": x}):
        with pytest.raises(ValueError, match=r"^[vw]: the cache holds k, v, got k"):
            cache.append(**new)
    with pytest.raises(ValueError, match="g: the cache holds k, v, got k, v, g"):
        sk.forgetting_decode(q=x, k=x, v=x, log_forget=-x[..., 0], cache=cache)
    assert cache.lengths == [3, 3]


def test_op_is_registered_and_compiles():
    inputs, dy = forgetting_problem(L=63, H=4, G=2, decay=0.0)
    torch.library.opcheck(forgetting.forgetting, (*inputs.values(), None))
    torch._dynamo.reset()
    plain = value_and_grads(sk.forgetting_attention, inputs, dy)
    compiled = value_and_grads(torch.compile(sk.forgetting_attention, fullgraph=True), inputs, dy)
    torch.testing.assert_close(compiled, plain, rtol=1e-5, atol=1e-6)
    y = sk.forgetting_attention(**inputs)
    (dq,) = torch.autograd.grad(y.sum(), inputs["q"], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        dq.sum().backward()


BAD = {
    "q must be [batch, length, heads, channels]": {"q": torch.zeros(3, 4)},
    "the number of key heads must divide": {"k": torch.zeros(1, 63, 3, 64)},
    "k must have shape [1, 63, 4, 64], got [1, 62, 4, 64]": {"k": torch.zeros(1, 62, 4, 64)},
    "v must have shape [1, 63, 4, 16], got [1, 63, 2, 16]": {"v": torch.zeros(1, 63, 2, 16)},
    "log_forget must have shape [1, 63, 4], got [1, 63, 2]": {"log_forget": torch.zeros(1, 63, 2)},
    "log_forget must be torch.float32, got torch.bfloat16": {
        "log_forget": torch.zeros(1, 63, 4, dtype=torch.bfloat16)
    },
    "log_forget must be <= 0 everywhere (log of a forget gate in (0, 1]), got a maximum of 0.1": {
        "log_forget": torch.full((1, 63, 4), 0.1)
    },
    "rotary must be a pair (cos, sin) or None, got Tensor": {"rotary": torch.zeros(63, 32)},
    "cu_seqlens must rise from 0 to at most the length 63": {
        "cu_seqlens": torch.tensor([0, 64], dtype=torch.int32)
    },
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message):
    inputs, _ = forgetting_problem(L=63, H=4)
    with pytest.raises((ValueError, TypeError)) as error:
        sk.forgetting_attention(**{**inputs, **BAD[message]})
    assert message in str(error.value)
