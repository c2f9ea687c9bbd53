"""sisa_decode: pieces of a sequence over a cache are the whole, at any decay; bad input."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import sisa_kernels as sk
from sisa_kernels import _extension, step
from sisa_kernels.inputs import SisaInputs
from sisa_kernels.paths.augment import augment
from sisa_kernels.rotation import CLAMP
from sisa_kernels.step import decode_eager
from sisa_kernels.testing import NAMES, in_fp64, relative, worst_row
from tests.support.augment import laid_out
from tests.support.problems import problem

COMPILED = _extension.has_kernels("cpu")


@pytest.fixture(params=["compiled", "eager"])
def path(request, monkeypatch):
    """Both implementations of the one-token step."""
    if request.param == "eager":
        monkeypatch.setattr(step, "decode", decode_eager)
    elif not COMPILED:
        pytest.skip(f"the library is {_extension.STATE}")
    return request.param


def tables(L, Dh, seed=0):
    angle = torch.rand(L, Dh // 2, generator=torch.Generator().manual_seed(seed)) * 6
    return angle.cos(), angle.sin()


@torch.no_grad()
def walk(inputs, sizes, rotary=None, cache=None):
    """y of the whole sequence, in pieces of the given sizes; the rest token by token."""
    inputs = {name: x.detach() for name, x in inputs.items()}
    lam, L = inputs.pop("lam"), inputs["q"].shape[1]
    cache, out, at = cache or sk.SisaCache(inputs["q"].shape[0]), [], 0
    for size in [*sizes, *[1] * (L - sum(sizes))]:
        piece = {name: x[:, at : at + size] for name, x in inputs.items()}
        angles = None if rotary is None else tuple(table[at : at + size] for table in rotary)
        out.append(sk.sisa_decode(**piece, lam=lam, cache=cache, rotary=angles))
        at += size
    return torch.cat(out, 1)


# A half-life of 140 tokens, of 2, of half a token, and each head its own.
DECAYS = (-5.3, -0.9, 1.0)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("sizes", [[1], [90], [40, 1, 1, 30]], ids=str)
def test_pieces_are_the_whole(path, sizes, decay):
    inputs, _ = problem(B=2, L=100, H=4, G=2, Dh=32, Ds=16, Dv=48, decay=decay)
    rotary = tables(100, 32)
    y_ref = sk.reference.sisa_attention(**in_fp64(inputs), rotary=rotary)
    y = walk(inputs, sizes, rotary)
    assert relative(y, y_ref) <= 1e-6
    assert worst_row(y, y_ref) <= 1e-5


@pytest.mark.parametrize(
    ("Dh", "Ds", "Dv"),
    [(7, 2, 5), (64, 16, 64), (64, 128, 64), (40, 34, 17), (128, 32, 200), (3, 6, 1)],
)
@pytest.mark.parametrize(("H", "G"), [(3, 3), (6, 1)])
def test_any_width(path, H, G, Dh, Ds, Dv):
    inputs, _ = problem(B=2, L=70, H=H, G=G, Dh=Dh, Ds=Ds, Dv=Dv, decay=-3.0)
    y = walk(inputs, [60])
    assert relative(y[:, 60:], sk.reference.sisa_attention(**in_fp64(inputs))[:, 60:]) <= 1e-6


@pytest.mark.skipif(not COMPILED, reason=f"the library is {_extension.STATE}")
@pytest.mark.parametrize("decay", [-5.0, 1.0])
@pytest.mark.parametrize("size", [1, 2, 7, 63, 257])
@pytest.mark.parametrize("held", [0, 1, 1000])
def test_several_tokens_over_a_cache_are_those_of_the_whole(held, size, decay):
    """And so a prompt in pieces is the prompt in one; rows of other lengths are those alone."""
    L = held + size
    inputs, _ = problem(L=L, H=4, G=2, Dh=16, Ds=8, Dv=24, decay=decay)
    rotary = tables(L, 16)
    sizes = [n for n in (held, size) if n]
    y = walk(inputs, sizes, rotary)[:, held:]
    y_ref = sk.reference.sisa_attention(**in_fp64(inputs), rotary=rotary)[:, held:]
    assert relative(y, y_ref) <= 1e-6
    assert worst_row(y, y_ref) <= 1e-5


@pytest.mark.skipif(not COMPILED, reason=f"the library is {_extension.STATE}")
def test_several_tokens_run_on_the_compiled_kernels(monkeypatch):
    def dense(*_):
        raise AssertionError("all scores at once")

    monkeypatch.setattr(step, "_attend", dense)
    inputs, _ = problem(B=2, L=60, H=4, G=2, Dh=16, Ds=8)
    y = walk(inputs, [20, 30, 3, 7])
    assert worst_row(y, sk.reference.sisa_attention(**in_fp64(inputs))) <= 1e-5


def packed_arguments(dtype=torch.float32, lengths=(5, 3)):
    """Those of step_arguments as a layer's projections, and theirs with the gates made."""
    q, k, v, b, c, _, theta, _, *rest = step_arguments(dtype, lengths=lengths)
    raw_lam = torch.randn(4)
    alpha, bias = torch.randn(2, 1, 2).to(dtype), torch.tensor([-5.0, 25.0])
    theta = theta.to(dtype)
    packed = torch.cat([x.flatten(2) for x in (q, k, v, b, c, alpha, theta)], -1)
    log_decay = -F.softplus(alpha.float() + bias)
    made = [q, k, v, b, c, log_decay, theta.float(), F.softplus(raw_lam), *rest]
    return [packed, bias, raw_lam, *rest], made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("compiled", [True, False])
def test_a_packed_projection_is_its_parts(compiled, dtype):
    if compiled and not COMPILED:
        pytest.skip(f"the library is {_extension.STATE}")
    packed, made = packed_arguments(dtype)
    made[10:16] = [x.clone() for x in packed[5:11]]
    op = torch.ops.sisa.decode_packed if compiled else step.decode_packed_eager
    tolerance = {"rtol": 2e-2, "atol": 2e-2}
    if dtype == torch.float32:
        tolerance = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(op(*packed), decode_eager(*made), **tolerance)
    torch.testing.assert_close(packed[5:11], made[10:16], **tolerance)


@pytest.mark.parametrize("compiled", [True, False])
def test_a_packed_projection_has_the_channels_of_whole_heads(compiled):
    if compiled and not COMPILED:
        pytest.skip(f"the library is {_extension.STATE}")
    packed, _ = packed_arguments()
    packed[0] = packed[0][..., :-1].contiguous()
    op = torch.ops.sisa.decode_packed if compiled else step.decode_packed_eager
    with pytest.raises((ValueError, RuntimeError), match="packed must have the channels of q, k"):
        op(*packed)


@pytest.mark.skipif(not COMPILED, reason=f"the library is {_extension.STATE}")
@pytest.mark.parametrize("forgets", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lengths", [(5, 3), (700, 511)])
def test_steps_without_importance(forgets, dtype, lengths):
    """FoX's and plain attention's, compiled and eager, on both sides of a split's 512 slots."""
    capacity = max(lengths) + 2
    q, k, v, *_ = step_arguments(dtype)
    caches = [torch.randn(2, 2, capacity, width).to(dtype) for width in (16, 12)]
    log_decay = g = None
    if forgets:
        log_decay = -torch.rand(2, 1, 4)
        g = -torch.rand(2, 4, capacity, dtype=torch.float64).cumsum(-1)
    cos, sin = (table[:, None] for table in tables(2, 16))
    found, right = [], []
    for op, out in ((torch.ops.sisa.decode, found), (decode_eager, right)):
        held = [None if x is None else x.clone() for x in (*caches, None, g, None, None)]
        arguments = (q, k, v, None, None, log_decay, None, None, cos, sin, *held)
        out += [op(*arguments, list(lengths)), *held]
    tolerance = {"rtol": 2e-2, "atol": 2e-2}
    if dtype == torch.float32:
        tolerance = {"rtol": 1e-5, "atol": 1e-6}
    for x, y in zip(found, right):
        if x is not None:
            torch.testing.assert_close(x, y, **tolerance)


@pytest.mark.skipif(not COMPILED, reason=f"the library is {_extension.STATE}")
def test_importance_past_the_horizon_is_not_read():
    """It cannot change a score there; where b's reach lets it, it is."""
    arguments = step_arguments(capacity=1100, lengths=(1030, 1030))
    arguments[13] = -torch.arange(1100, dtype=torch.float64).expand(2, 2, -1).contiguous() / 20
    near, far = ([x.clone() if 10 <= n < 16 else x for n, x in enumerate(arguments)] for _ in "ab")
    near[12][:, :, :512] = math.nan  # g falls by 26 and more from these on
    assert torch.ops.sisa.decode(*near).isfinite().all()
    far[12][:, :, :512] = math.nan
    far[15] *= 1e10
    assert not torch.ops.sisa.decode(*far).isfinite().any()


@pytest.mark.parametrize("compiled", [True, False])
def test_a_state_that_is_no_number_is_never_past_the_horizon(compiled):
    if compiled and not COMPILED:
        pytest.skip(f"the library is {_extension.STATE}")
    op = torch.ops.sisa.decode if compiled else decode_eager
    arguments = step_arguments(lengths=(5, 3))
    op(*[x * math.nan if n == 3 else x for n, x in enumerate(arguments)])
    assert arguments[15].isnan().all()
    op(*arguments[:16], [6, 4])
    assert arguments[15].isnan().all()


def half_lives(L, **kwargs):
    """4 heads that forget half within 2 to 10,000 tokens, evenly spaced in the logarithm."""
    inputs, _ = problem(L=L, H=4, **kwargs)
    rates = math.log(2) / torch.logspace(math.log10(2), 4, 4)
    return {**inputs, "log_decay": -rates.expand(1, L, 4).contiguous()}


def check_walk(L, prompt):
    """A prompt, then token by token to L, each against the oracle."""
    inputs, rotary = half_lives(L, Dh=16, Ds=8), tables(L, 16)
    y = walk(inputs, [prompt], rotary)
    # Head by head, since the oracle holds all its scores.
    heads = [
        {
            name: x[h : h + 1] if name == "lam" else x[:, :, h : h + 1]
            for name, x in in_fp64(inputs).items()
        }
        for h in range(4)
    ]
    y_ref = torch.cat([sk.reference.sisa_attention(**head, rotary=rotary) for head in heads], 2)
    assert worst_row(y, y_ref) <= 1e-5
    return inputs, y, y_ref


def test_a_thousand_tokens(path):
    check_walk(1000, 64)


@pytest.mark.slow
def test_8192_tokens(path):
    check_walk(8192, 512)


def fixed_offset_walk(inputs, prompt, clamp):
    """Augmented keys (Proposition 1) cached once, for ever about the middle of the prompt."""
    inputs = {name: x.detach() for name, x in inputs.items()}
    g = inputs["log_decay"].double().cumsum(1)
    offset = (g[:, :1] + g[:, prompt - 1 : prompt]) / 2
    x = (g - offset).clamp(-clamp, clamp).float()[..., None]
    still = {**inputs, "log_decay": torch.zeros_like(inputs["log_decay"])}
    operands = SisaInputs(**still, rotary=tables(g.shape[1], 16)).scores()
    q_aug, k_aug = augment(operands, [0], math.inf, 24, torch.float32)
    q_aug, k_aug = q_aug.clone(), k_aug.clone()
    q_aug[..., 16:] *= x.exp()
    k_aug[..., 16:] *= x.neg().exp()
    v = F.pad(inputs["v"], (0, 8))
    q_aug, k_aug, v = (t.transpose(1, 2) for t in (q_aug, k_aug, v))
    y = F.scaled_dot_product_attention(q_aug, k_aug, v, is_causal=True, scale=0.25)
    return y.transpose(1, 2)[..., :16]


def test_a_fixed_offset_overflows_or_clamps_where_this_cache_is_right():
    inputs, y, y_ref = check_walk(500, 64)
    assert not fixed_offset_walk(inputs, 64, math.inf).isfinite().all()
    clamped = fixed_offset_walk(inputs, 64, CLAMP)
    assert worst_row(clamped[:, :32], y_ref[:, :32]) <= 1e-5, "right while the clamp does not bind"
    assert 0.3 < relative(clamped[:, 300:, 0], y_ref[:, 300:, 0]) < math.inf
    assert relative(y[:, 300:, 0], y_ref[:, 300:, 0]) <= 1e-6


def test_strong_decay_for_long_keeps_the_digits_of_g(path):
    """At g = -1e6 fp32 would be off by 0.06; the phase has gone around thousands of times."""
    inputs, _ = problem(L=60, H=2, Dh=16, Ds=8, decay=-4.0)
    cache = sk.SisaCache(1)
    walk({name: x if name == "lam" else x[:, :30] for name, x in inputs.items()}, [30], cache=cache)
    cache.buffers["g"][:, :, :30] -= 1e6
    cache.phase += 2 * math.pi * 5000
    y = walk(
        {name: x if name == "lam" else x[:, 30:] for name, x in inputs.items()}, [], cache=cache
    )
    assert cache.buffers["g"][0, 0, 59] < -1e6
    assert cache.phase.abs().max() <= math.pi + 1e-9
    assert worst_row(y, sk.reference.sisa_attention(**in_fp64(inputs))[:, 30:]) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_good_as_its_inputs(path, dtype):
    """Within four times the rounding of the oracle's result: k, v and b are rounded when cached."""
    inputs, _ = problem(B=2, L=150, H=4, G=2, decay=-4.0, dtype=dtype)
    rotary = tables(150, 64)
    y = walk(inputs, [100], rotary)
    y_ref = sk.reference.sisa_attention(**in_fp64(inputs), rotary=rotary)
    assert y.dtype == dtype
    assert relative(y, y_ref) <= 4 * relative(y_ref.to(dtype), y_ref)
    with torch.autocast("cpu", dtype):
        assert torch.equal(walk(inputs, [100], rotary), y)


def test_fp64():
    inputs, _ = problem(B=2, L=40, H=4, G=2, Dh=8, Ds=4, decay=-1.0, dtype=torch.float64)
    torch.testing.assert_close(
        walk(inputs, [10, 5]), sk.reference.sisa_attention(**inputs), rtol=1e-12, atol=1e-12
    )


def test_rows_of_unequal_length_go_on_as_they_would_alone(path):
    inputs, _ = problem(B=3, L=100, H=4, G=2, Dh=16, Ds=8, decay=-2.0)
    inputs = {name: x.detach() for name, x in inputs.items()}
    lengths, rotary, cache = [30, 1, 64], tables(100, 16), sk.SisaCache(3)
    lam = inputs.pop("lam")
    with torch.no_grad():
        first = {name: x[:, :64] for name, x in inputs.items()}
        prompt = sk.sisa_decode(
            **first, lam=lam, cache=cache, rotary=tuple(t[:64] for t in rotary), lengths=lengths
        )
        out = []
        for t, size in ((0, 1), (1, 1), (2, 3), (5, 1)):
            at = torch.tensor(lengths)[:, None] + t + torch.arange(size)
            piece = {name: x[torch.arange(3)[:, None], at] for name, x in inputs.items()}
            out.append(
                sk.sisa_decode(
                    **piece, lam=lam, cache=cache, rotary=tuple(table[at] for table in rotary)
                )
            )
    assert cache.lengths == [36, 7, 70]
    y_ref = sk.reference.sisa_attention(**in_fp64({**inputs, "lam": lam}), rotary=rotary)
    for row, n in enumerate(lengths):
        assert worst_row(prompt[row, :n], y_ref[row, :n]) <= 1e-5
        assert worst_row(torch.cat(out, 1)[row], y_ref[row, n : n + 6]) <= 1e-5


def test_a_cropped_cache_goes_on_as_if_the_tokens_had_not_come(path):
    inputs, _ = problem(B=2, L=40, H=4, G=2, Dh=16, Ds=8, Dv=16, decay=-1.0)
    cache = sk.SisaCache(2)
    cache.keep_phases()
    y = walk(inputs, [20], cache=cache)
    for count in (1, 15, 39):
        cache.crop(count)
        rest = {name: x if name == "lam" else x[:, -count:] for name, x in inputs.items()}
        again = walk(rest, [count], cache=cache)
        assert cache.lengths == [40, 40]
        assert relative(again, y[:, -count:]) <= 1e-6
    for count in (-1, 40):
        with pytest.raises(ValueError, match=f"count must be from 0 to 39, .* got {count}"):
            cache.crop(count)
    with pytest.raises(ValueError, match="phases are kept from the first token on"):
        cache.keep_phases()
    with pytest.raises(ValueError, match=r"if keep_phases\(\) was called at first"):
        sk.SisaCache(2).crop(1)


def test_one_token_may_wipe_out_everything_before_it(path):
    inputs, _ = problem(L=60, Dh=16, Ds=8)
    log_decay = inputs["log_decay"].detach().clone()
    log_decay[:, 40] = -math.inf
    log_decay[:, 50:52] = -500.0
    inputs = {**inputs, "log_decay": log_decay}
    assert worst_row(walk(inputs, [10]), sk.reference.sisa_attention(**in_fp64(inputs))) <= 1e-5


def test_old_entries_are_not_rewritten_and_growth_keeps_them(path):
    inputs, _ = problem(L=200, Dh=16, Ds=8)
    cache = sk.SisaCache(1)
    walk({name: x if name == "lam" else x[:, :20] for name, x in inputs.items()}, [10], cache=cache)
    before = {name: x.clone() for name, x in cache.buffers.items()}
    rest = {name: x.detach()[:, 20:] for name, x in inputs.items() if name != "lam"}
    with torch.no_grad():
        for t in range(180):
            piece = {name: x[:, t : t + 1] for name, x in rest.items()}
            sk.sisa_decode(**piece, lam=inputs["lam"].detach(), cache=cache)
    assert all(
        torch.equal(cache.buffers[name][:, :, :20], x[:, :, :20]) for name, x in before.items()
    )
    assert 200 <= cache.buffers["k"].shape[2] <= 300
    assert cache.buffers["g"].dtype == torch.float64


def test_strided_operands(path):
    inputs, _ = problem(B=2, L=30, H=2, Dh=16, Ds=8)
    strided = {
        name: x if name == "lam" else x.detach().mT.contiguous().mT for name, x in inputs.items()
    }
    assert torch.equal(walk(strided, [20]), walk(inputs, [20]))


def step_arguments(dtype=torch.float32, capacity=9, lengths=(5, 3)):
    inputs, _ = problem(B=2, L=1, H=4, G=2, Dh=16, Ds=8, Dv=12, dtype=dtype)
    inputs = [x.detach() for x in inputs.values()]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    caches = [torch.randn(2, 2, capacity, width).to(dtype) for width in (16, 12, 8)]
    g = -torch.rand(2, 2, capacity, dtype=torch.float64).cumsum(-1)
    rotary = [table[:, None].to(wide) for table in tables(2, 16)]
    state = [
        torch.randn(2, 2, 4, dtype=torch.float64),
        torch.full((2, 2), 9.0, dtype=torch.float64),
    ]
    return [*inputs, *rotary, *caches, g, *state, list(lengths)]


@pytest.mark.parametrize(
    ("op", "dtype"),
    [
        (torch.ops.sisa.decode.default, torch.float32),
        (torch.ops.sisa.decode_eager.default, torch.float64),
    ],
    ids=str,
)
def test_opcheck(op, dtype):
    torch.library.opcheck(op, tuple(step_arguments(dtype)))


def test_opcheck_packed():
    torch.library.opcheck(torch.ops.sisa.decode_packed.default, tuple(packed_arguments()[0]))


@pytest.mark.skipif(not COMPILED, reason=f"the library is {_extension.STATE}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("lengths", [(5, 3), (8, 8), (1, 7)])
def test_compiled_step_changes_what_the_eager_one_does(dtype, lengths):
    compiled, eager = step_arguments(dtype, lengths=lengths), step_arguments(dtype, lengths=lengths)
    eager[10:16] = [x.clone() for x in compiled[10:16]]
    y, y_eager = torch.ops.sisa.decode(*compiled), decode_eager(*eager)
    tolerance = {"rtol": 2e-2, "atol": 2e-2}
    if dtype == torch.float32:
        tolerance = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(y, y_eager, **tolerance)
    torch.testing.assert_close(compiled[10:16], eager[10:16], **tolerance)


@st.composite
def calls(draw):
    """Random arguments of the op, lengths on both sides of a split's 512 slots."""
    B, G = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    H = G * draw(st.integers(1, 3))
    Dh, Dv = draw(st.integers(1, 70)), draw(st.integers(1, 70))
    Ds = 2 * draw(st.integers(1, 20))
    dtype = draw(st.sampled_from((torch.float32, torch.bfloat16, torch.float16)))
    length = st.sampled_from((1, 2, 15, 16, 17, 100, 510, 511, 512, 1024))
    lengths = [draw(length) for _ in range(B)]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    decay = 10.0 ** draw(st.integers(-4, 3))
    shapes = ((H, Dh), (G, Dh), (G, Dv), (G, Ds), (H, Ds))
    inputs = [normal(B, 1, heads, width).to(dtype) for heads, width in shapes]
    inputs += [-decay * normal(B, 1, G).abs(), 100 * normal(B, 1, G, Ds // 2)]
    inputs.append(0.05 + normal(H).abs())
    rotary = []
    if Dh % 2 == 0 and draw(st.booleans()):
        rotary = [normal(draw(st.sampled_from((1, B))), 1, Dh // 2) for _ in range(2)]
    capacity = max(lengths) + draw(st.integers(1, 20))
    caches = [normal(B, G, capacity, width).to(dtype) for width in (Dh, Dv, Ds)]
    caches.append(-decay * normal(B, G, capacity).abs().double().cumsum(-1))
    phase = normal(B, G, Ds // 2).double()
    views = [laid_out(draw, x) for x in (*inputs, *rotary)]
    reach = caches[2].double().norm(dim=-1).amax(-1)
    return [*views, *[None] * (2 - len(rotary)), *caches, phase, reach, lengths]


def with_rest(args, value):
    """The arguments with copies of the caches, whose slots past a row's length hold ``value``."""
    args = [x.clone() if 10 <= n < 16 else x for n, x in enumerate(args)]
    for cache in args[10:14]:
        for row, length in zip(cache, args[16]):
            row[:, length:] = value
    return args


@pytest.mark.skipif(not COMPILED, reason=f"the library is {_extension.STATE}")
@settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(calls())
def test_any_call_matches_fp64_and_reads_no_slot_past_the_length(args):
    compiled, eager = with_rest(args, math.nan), with_rest(args, 0.0)
    exact = [x.double() if isinstance(x, torch.Tensor) else x for x in with_rest(args, 0.0)]
    found, plain, right = (
        op(*x)
        for op, x in (
            (torch.ops.sisa.decode, compiled),
            (decode_eager, eager),
            (decode_eager, exact),
        )
    )
    for x, y, z in zip((found, *compiled[10:14]), (plain, *eager[10:14]), (right, *exact[10:14])):
        x = x if x is found else torch.where(x.isnan(), y, x)
        error, allowed = ((each.double() - z).abs().max() for each in (x, y))
        assert error <= 3 * allowed + 2e-6 * (1 + z.abs().max())
    for cache in compiled[10:14]:
        for row, length in zip(cache, args[16]):
            assert row[:, length].isfinite().all()
            assert row[:, length + 1 :].isnan().all(), "nor writes one"
    one_thread = with_rest(args, math.nan)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert torch.equal(torch.ops.sisa.decode(*one_thread), found), (
            "the same bits for any number of threads"
        )
    finally:
        torch.set_num_threads(threads)


# The compiled step's own checks can raise but RuntimeError; those of sisa_decode come before them.
both_steps = pytest.mark.parametrize(
    ("op", "wrong_shape", "wrong_type"),
    [
        (torch.ops.sisa.decode, *[RuntimeError if COMPILED else (ValueError, TypeError)] * 2),
        (decode_eager, ValueError, TypeError),
    ],
    ids=["op", "eager"],
)
ARGUMENTS = (*NAMES, "cos", "sin", "k_cache", "v_cache", "b_cache", "g_cache", "phase")


@pytest.mark.parametrize("name", ARGUMENTS)
@both_steps
def test_the_op_names_a_wrong_operand(op, wrong_shape, wrong_type, name):
    place = ARGUMENTS.index(name)
    args = step_arguments()
    args[place] = args[place][..., :-1]
    differs = {"q": "k", "v": "v_cache"}.get(name, name)  # of a free width: what it must fit
    with pytest.raises(wrong_shape, match=f"^{differs} must"):
        op(*args)
    args = step_arguments()
    args[place] = args[place].int()
    with pytest.raises(wrong_type, match=f"^{name} must be"):
        op(*args)


@both_steps
@pytest.mark.parametrize("lengths", [(5,), (0, 3), (9, 3), (-1, 3)])
def test_the_op_refuses_lengths_outside_the_cache(op, wrong_shape, wrong_type, lengths):
    with pytest.raises(
        wrong_shape, match="lengths must be 2 integers from 1 to the capacity 9 less 1"
    ):
        op(*step_arguments(lengths=lengths))


def arguments(T=1, B=2, **kwargs):
    inputs, _ = problem(B=B, L=T, H=2, Dh=16, Ds=8, **kwargs)
    return {name: x.detach() for name, x in inputs.items()}


@pytest.mark.parametrize(
    ("held", "change", "error", "message"),
    [
        (0, {"cache": {}}, TypeError, "cache must be a sisa_kernels.SisaCache, got dict"),
        (0, {"cache": sk.SisaCache(3)}, ValueError, "k must have the cache's batch of 3, got 2"),
        (
            5,
            arguments(dtype=torch.bfloat16),
            ValueError,
            "k must be torch.float32 on cpu as in the cache, got torch.bfloat16",
        ),
        (
            5,
            arguments(Dv=20),
            ValueError,
            r"v must be \[heads, channels\] \[2, 16\] as in the cache, got \[2, 20\]",
        ),
        (
            5,
            {"lengths": [1, 1]},
            ValueError,
            r"lengths is for the first tokens of an empty cache, this one holds \[5, 5\]",
        ),
        (0, {"lengths": [1]}, ValueError, r"lengths must be 2 integers from 1 to 1, got \[1\]"),
        (
            0,
            {"lengths": [0, 1]},
            ValueError,
            r"lengths must be 2 integers from 1 to 1, got \[0, 1\]",
        ),
        (
            5,
            {"rotary": torch.ones(2)},
            TypeError,
            r"rotary must be a pair \(cos, sin\) or None, got Tensor",
        ),
        (
            5,
            {"rotary": (torch.ones(2, 8), torch.ones(1, 8))},
            ValueError,
            r"rotary\[0\] \(cos\) must have shape \[1, 8\]",
        ),
        (
            5,
            {"rotary": (torch.ones(3, 1, 8),) * 2},
            ValueError,
            r"rotary\[0\] \(cos\) must have shape \[2, 1, 8\]",
        ),
        (
            5,
            {"rotary": (torch.ones(1, 8, requires_grad=True),) * 2},
            ValueError,
            r"rotary\[0\] \(cos\) must not require grad",
        ),
        (
            5,
            {"backend": "fast"},
            ValueError,
            "backend must be one of auto, .* got 'fast'",
        ),
        (5, {"log_decay": torch.ones(2, 1, 2)}, ValueError, "log_decay must be <= 0 everywhere"),
        (
            5,
            {"lam": torch.ones(2, requires_grad=True)},
            ValueError,
            "lam requires grad, but a cache is for inference",
        ),
        (
            5,
            {"v": torch.ones(2, 1, 2, 16, requires_grad=True)},
            ValueError,
            "v requires grad, but a cache is for inference",
        ),
    ],
)
def test_bad_input_is_named_and_leaves_the_cache(held, change, error, message):
    cache = sk.SisaCache(2)
    if held:
        sk.sisa_decode(**arguments(held), cache=cache)
    before = {name: x.clone() for name, x in cache.buffers.items()}
    with pytest.raises(error, match=message):
        sk.sisa_decode(**{**arguments(), "cache": cache, **change})
    assert cache.lengths == [held] * 2
    assert all(torch.equal(cache.buffers[name], x) for name, x in before.items())


def test_an_error_on_the_way_leaves_the_cache(monkeypatch):
    inputs, _ = problem(L=20, theta=1.0)
    whole = sk.reference.sisa_attention(**in_fp64(inputs))[:, 10:]
    head, tail = (
        {n: x.detach()[:, piece] if n != "lam" else x.detach() for n, x in inputs.items()}
        for piece in (slice(10), slice(10, 20))
    )
    cache = sk.SisaCache(1)
    sk.sisa_decode(**head, cache=cache)
    with monkeypatch.context() as broken:
        for name in ("_attend", "_attend_compiled"):
            broken.setattr(step, name, lambda *_: (_ for _ in ()).throw(MemoryError()))
        with pytest.raises(MemoryError):
            sk.sisa_decode(**tail, cache=cache)
    assert relative(sk.sisa_decode(**tail, cache=cache), whole) <= 5e-6


def test_one_channel_a_head():
    inputs, _ = problem(L=20, Dh=1, Ds=2, Dv=1)
    y_ref = sk.reference.sisa_attention(**in_fp64(inputs))
    assert relative(sk.sisa_attention(**inputs), y_ref) <= 5e-6


def test_a_cache_has_rows():
    with pytest.raises(ValueError, match="batch must be at least 1, got 0"):
        sk.SisaCache(0)
