"""Forms of exact attention on stock kernels, beside Triton's: what they serve, flags, the choice.

Stock kernels are the CPU's, Triton's are interpreted where there is no GPU."""

import copy
import dataclasses
import functools
import math
import pickle
import warnings
from typing import NamedTuple

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import sisa_kernels as sk
from sisa_kernels.inputs import SisaInputs
from sisa_kernels.paths import choice, one_call, stock
from sisa_kernels.testing import (
    NAMES,
    ValueAndGrads,
    in_fp64,
    oracle,
    problem,
    relative,
    value_and_grads,
)
from sisa_kernels.triton import tiles
from sisa_kernels.triton.tiles import Tile, Tiles
from sisa_model.models.sisa import SisaAttention
from tests.support import same_dtype
from tests.support.attention import Call, check_sisa, exactly, first_use
from tests.support.augment import rotary_tables

forms = pytest.importorskip("sisa_kernels.paths.forms", reason="needs the package triton")
exact = pytest.importorskip("sisa_kernels.triton.op", reason="needs the package triton")
prologue_kernels = pytest.importorskip(
    "sisa_kernels.triton.prologue_kernels", reason="needs the package triton"
)

DEVICE = torch.device("cpu" if exact.INTERPRETED else "cuda")
# Small enough that 130 tokens make several, one taller than wide and others wider.
SMALL = Tiles(Tile(64, 32, 4, 2), Tile(32, 64, 4, 2), Tile(32, 64, 4, 2))
LARGE = Tiles(*[Tile(128, 128, 4, 2, 64)] * 3)  # for the interpreter's sake, at length 1,000
FAST, SLOW = 1.0, 1 / 256  # of a decay of about 2 bits a token
SERVED = {"far_and_band": FAST, "wide": SLOW}
OTHER = {"far_and_band": SLOW, "wide": 30 * FAST}  # past fp32's range, too


@pytest.fixture(autouse=True)
def small_tiles_and_bf16(monkeypatch):
    """Several tiles, and bf16 as tests/support/interpreter.py mends it."""
    monkeypatch.setattr(exact, "choose_tiles", lambda *_: SMALL)
    monkeypatch.setattr(prologue_kernels, "CHUNK", 512)  # for the interpreter's sake
    monkeypatch.setattr(exact, "INTERPRETED_DTYPES", exact.DTYPES)


def mixed(form, L, *, decay=1.0, serve=(True, False), dtype=torch.float32, **shape):
    """A problem with a key head each that ``form`` serves or does not, RoPE's tables, and dy."""
    x, dy = problem(L=L, G=len(serve), decay=decay, dtype=dtype, device=DEVICE, **shape)
    steps = [SERVED[form] if served else OTHER[form] for served in serve]
    log_decay = x.log_decay.detach() * torch.tensor(steps, device=DEVICE)
    angle = 6 * torch.rand(L, x.q.shape[3] // 2, generator=torch.Generator().manual_seed(0))
    rotary = tuple(table.to(DEVICE) for table in (angle.cos(), angle.sin()))
    return x._replace(log_decay=log_decay.requires_grad_(), rotary=rotary), dy


def in_form(form, window=None):
    """Attention in a form."""

    def attend(**inputs):
        return forms.attend(SisaInputs(**inputs), form, window)

    return attend


class Solved(NamedTuple):
    """What a form makes of a problem."""

    found: ValueAndGrads
    lse: torch.Tensor  # [B, H, L], natural logarithm
    needed: torch.Tensor


def solve(form, inputs, dy, window=None):
    op, results = forms.form_op, []

    def form_op(*x):
        results.append(op(*x))
        return results[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forms, "form_op", form_op)
        found = value_and_grads(in_form(form, window), inputs, dy, rotary=inputs.rotary)
    [(_, lse, needed)] = results
    return Solved(found, lse * forms.LN2, needed)


def check(form, L, *, window=None, **kwargs):
    """The form errs as PyTorch in the same dtype, and flagged heads have the exact kernels' bits.

    Of heads that it serves and heads that it does not."""
    inputs, dy = mixed(form, L, **kwargs)
    solved = solve(form, inputs, dy, window)
    check_errors(solved, inputs, dy)
    flagged = choice.flags(solved.needed, form, window or 0, L, dy.dtype).bool()
    assert flagged.any() == (False in kwargs.get("serve", (True, False)))
    assert not flagged.all()
    kernels = value_and_grads(exact.exact_attention, inputs, dy, rotary=inputs.rotary)
    same_as_exact(solved.found, kernels, flagged)


def check_errors(solved, inputs, dy, names=NAMES):
    """y, its rows, lse and every gradient of ``names`` err as PyTorch's in the same dtype."""
    right = oracle(inputs, dy, rotary=inputs.rotary)
    same_dtype.check(solved.found, right, inputs, dy, names, rotary=inputs.rotary)
    tensors = {name: x.detach() for name, x in zip(NAMES, inputs.tensors())}
    tables = dict(zip(("cos", "sin"), inputs.rotary or ()))
    lse = exactly(Call(**tensors, **tables), dy).lse
    same = [x for name, x in tensors.items() if name != "v"]
    allowed = same_dtype.scores(*same, inputs.rotary).logsumexp(-1)
    factor, floor = (3, 4e-7) if dy.dtype == torch.float32 else (2, 1e-4)
    assert relative(solved.lse, lse) <= factor * relative(allowed, lse) + floor
    if dy.dtype == torch.float32:
        check_sisa(solved.found, right, inputs)


def same_as_exact(found, kernels, flagged):
    """The heads that a form cannot serve have the exact kernels' bits, y and every gradient."""
    heads = found[0].shape[2] // flagged.shape[1]
    for i, g in flagged.nonzero().tolist():
        queries = slice(g * heads, (g + 1) * heads)
        assert torch.equal(found[0][i, :, queries], kernels[0][i, :, queries])
        for name in NAMES:
            ours, theirs = found[1][name], kernels[1][name]
            if name == "lam":  # a sum over sequences
                assert flagged.shape[0] > 1 or torch.equal(ours[queries], theirs[queries])
                continue
            rows = queries if name in ("q", "c") else slice(g, g + 1)
            assert torch.equal(ours[i, :, rows], theirs[i, :, rows]), name


# ---- Far and band --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("L", "window", "dtype"),
    [
        (63, 16, torch.bfloat16),
        (100, 40, torch.float32),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (257, 64, torch.bfloat16),
                (257, 64, torch.float16),
                (1000, 256, torch.float32),
                (1000, 256, torch.bfloat16),
                (257, 256, torch.float32),
            )
        ),
    ],
)
def test_far_and_band(L, window, dtype, monkeypatch):
    if L == 1000:
        monkeypatch.setattr(exact, "choose_tiles", lambda *_: LARGE)
    check("far_and_band", L, window=window, dtype=dtype, Dh=32)


def test_far_and_band_of_shared_key_heads_and_narrow_values():
    check("far_and_band", 70, window=30, H=4, Dh=16, Dv=24, Ds=6)


@pytest.mark.slow
def test_far_and_band_of_a_batch():
    check("far_and_band", 130, window=40, H=6, serve=(True, False, True), B=2, Dh=32)


@pytest.mark.slow
@pytest.mark.parametrize("decay", [-1.0, 4.0])
def test_far_and_band_at_other_decays(decay):
    """At +4 a token leaves 2^-6 of what was before it; at -1 the horizon is at 57 tokens."""
    check("far_and_band", 257, window=96, decay=decay, Dh=32)


@pytest.mark.parametrize("window", [200, 37, 1])
def test_any_window_is_exact(window):
    """Also narrower than a tile, and one that no tile divides."""
    inputs, dy = mixed("far_and_band", 70, decay=30.0, serve=(True,), H=1, Dh=16)
    found = value_and_grads(in_form("far_and_band", window), inputs, dy, rotary=inputs.rotary)
    check_sisa(found, oracle(inputs, dy, rotary=inputs.rotary), inputs)


# ---- Wide ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("L", "dtype"),
    [
        (70, torch.bfloat16),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in ((257, torch.float32), (257, torch.bfloat16), (257, torch.float16))
        ),
    ],
)
def test_wide(L, dtype):
    check("wide", L, dtype=dtype, Dh=32, serve=(True, True))


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)]
)
def test_wide_up_to_the_range_that_it_takes(dtype, monkeypatch):
    """g falls evenly by 199 in base 2, in 200 tokens for 12,800: operands of up to 2^100.

    Of so short a memory dL/dlog_decay is not right to the dtype."""
    monkeypatch.setattr(choice, "WIDE_HALF_LIFE", 1)
    inputs, dy = problem(L=200, H=1, Dh=32, dtype=dtype, device=DEVICE)
    inputs = inputs._replace(log_decay=torch.full_like(inputs.log_decay, -math.log(2)))
    solved = solve("wide", inputs, dy)
    assert solved.needed.select(2, 1).tolist() == [[199]]
    check_errors(solved, inputs, dy, [name for name in NAMES if name != "log_decay"])


@pytest.mark.parametrize(
    ("dtype", "L"),
    [
        (torch.bfloat16, 257),
        pytest.param(torch.bfloat16, 1000, marks=pytest.mark.slow),
        pytest.param(torch.float16, 257, marks=pytest.mark.slow),
        pytest.param(torch.float32, 257, marks=pytest.mark.slow),
    ],
)
def test_wide_down_to_the_half_life_that_it_takes(dtype, L, monkeypatch):
    """The shorter the memory, the more of its gradients of log_decay is lost in rounding."""
    if L == 1000:
        monkeypatch.setattr(exact, "choose_tiles", lambda *_: LARGE)
    inputs, dy = problem(L=L, H=4, Dh=32, lam=None, dtype=dtype, device=DEVICE)
    steps = inputs.log_decay.detach()
    steps = steps * (L // 64 * math.log(2)) / -steps.sum(1, keepdim=True)
    solved = solve("wide", inputs._replace(log_decay=steps), dy)
    assert not choice.flags(solved.needed, "wide", 0, L, dtype).any()
    check_errors(solved, inputs._replace(log_decay=steps), dy)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_wide_has_a_gradient_for_a_lambda_of_zero(dtype):
    """Its operands are then 0 in fp16, and so small in bf16 that their squares are."""
    inputs, dy = problem(L=63, decay=-7.0, lam=0.0, Dh=16, Ds=6, dtype=dtype, device=DEVICE)
    solved = solve("wide", inputs, dy)
    assert not choice.flags(solved.needed, "wide", 0, 63, dtype).any()
    check_errors(solved, inputs, dy)
    assert solved.found[1]["lam"].all()


def test_heads_that_no_exponent_holds_are_overwritten():
    """Their augmented operands are infinite or no numbers; the other heads' are not touched."""
    inputs, dy = mixed("wide", 70, H=4, Dh=16, dtype=torch.float16)
    log_decay = inputs.log_decay.detach().clone()
    log_decay[:, 3::7, 1] = -math.inf
    inputs = inputs._replace(log_decay=log_decay.requires_grad_())
    found = value_and_grads(in_form("wide"), inputs, dy, rotary=inputs.rotary)
    kernels = value_and_grads(exact.exact_attention, inputs, dy, rotary=inputs.rotary)
    same_as_exact(found, kernels, torch.tensor([[False, True]]))
    right = oracle(inputs, dy, rotary=inputs.rotary)
    assert relative(found[0], right[0]) <= 2 * relative(kernels[0], right[0])


# ---- Both ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["far_and_band", "wide"])
@pytest.mark.parametrize("decay", [-7.0, 5.0])
@pytest.mark.parametrize(
    ("L", "dtype"),
    [
        (1, torch.bfloat16),
        (63, torch.bfloat16),
        pytest.param(257, torch.bfloat16, marks=pytest.mark.slow),
        *(
            pytest.param(L, dtype, marks=pytest.mark.slow)
            for L in (1, 63, 257)
            for dtype in (torch.float16, torch.float32)
        ),
    ],
)
def test_lengths_and_decays_at_their_ends(form, decay, L, dtype):
    """Memories of 760 tokens and of a seventh of one, query heads that share key heads."""
    shape = {"L": L, "H": 4, "G": 2, "Dh": 16, "Ds": 8, "decay": decay}
    inputs, dy = problem(**shape, lam=None, dtype=dtype, device=DEVICE)
    inputs = inputs._replace(rotary=[table.to(DEVICE) for table in rotary_tables(L, 16)])
    solved = solve(form, inputs, dy)
    served = not choice.flags(solved.needed, form, choice.window_of(L), L, dtype).any()
    assert served == (L == 1 or (form == "wide") == (decay == -7.0))
    check_errors(solved, inputs, dy)


# ---- What a head needs ---------------------------------------------------------------------------


@pytest.mark.parametrize("tolerance", [1e-3, 2.0**-24])
def test_the_reach_is_that_of_the_bound_by_the_heads_largest_norms(tolerance):
    """No pair so far apart passes it, not by its own norms either, and one a token nearer does."""
    inputs, _ = problem(B=2, L=100, H=4, G=2, decay=0.0, lam=None, device=DEVICE)
    x = exact.prologue(inputs.scores(), 32)[2]
    found = exact.forward_horizon(x, SMALL, tolerance, reach=True).reach
    exactly = in_fp64(inputs)
    g = exactly["log_decay"].cumsum(1).transpose(1, 2).repeat_interleave(2, 1)
    size_b = exactly["b"].norm(dim=3).amax(1).clamp(min=1).repeat_interleave(2, 1)
    size = exactly["c"].norm(dim=3).amax(1).clamp(min=1) * exactly["lam"].clamp(min=1) * size_b
    bound = (g[..., :, None] - g[..., None, :]).exp() * size[..., None, None]
    token = torch.arange(100, device=DEVICE)
    distance = (token[:, None] - token).clamp(min=-1)
    least, most = (
        (distance * (bound > tolerance * factor)).amax((2, 3)).int() + 1
        for factor in (1.001, 0.999)
    )
    assert (least <= found).all()
    assert (found <= most).all()
    assert found.unique().numel() > 1


def test_a_head_that_forgets_nothing_reaches_back_to_the_start():
    inputs, _ = problem(L=40, H=1, device=DEVICE)
    inputs = inputs._replace(log_decay=torch.zeros_like(inputs.log_decay))
    _, needed = forms.attend_and_needs(inputs, "exact")
    assert needed.tolist() == [[[40, 0]]]


# ---- Stock kernels -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capability", "dtype", "name"),
    [
        ((9, 0), torch.bfloat16, "cudnn"),
        ((8, 0), torch.bfloat16, "flash"),
        ((12, 0), torch.float16, "flash"),
        ((9, 0), torch.float32, "efficient"),
    ],
)
def test_a_gpus_kernels_are_called_as_their_schemas_say(capability, dtype, name, monkeypatch):
    """On tensors without values: shapes and dtypes of what comes back, padded and of shared heads.

    That their numbers are right is what a form's first use checks on a GPU."""
    of_cpu = stock._call

    def call(q, k, v):
        cuda = torch.device("cuda")
        return dataclasses.replace(of_cpu(q, k, v), device=cuda, capability=capability)

    monkeypatch.setattr(stock, "_call", call)
    q, k, v = (
        torch.empty(2, 101, heads, width, dtype=dtype, device="meta")
        for heads, width in ((4, 70), (2, 70), (2, 60))
    )
    assert stock.choose(stock._call(q, k, v))[0] == name
    y, lse = stock.forward(q, k, v, 0.1)
    assert (y.shape, y.dtype) == ((2, 101, 4, 60), dtype)
    assert (lse.shape, lse.dtype) == ((2, 4, 101), torch.float32)
    grads = stock.backward(y, y, lse, q, k, v, 0.1)
    assert [(x.shape, x.dtype) for x in grads] == [(x.shape, dtype) for x in (q, k, v)]
    assert all(x.is_contiguous() for x in (y, lse, *grads))


def test_where_no_stock_kernel_runs_it_is_said():
    old = one_call.Call(torch.device("cuda"), (6, 0), torch.float64, 100, 64, 64)
    with pytest.raises(ValueError, match="no stock kernel takes the call: cpu needs a CPU; cudnn"):
        stock.choose(old)


# ---- The operator --------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["far_and_band", pytest.param("wide", marks=pytest.mark.slow)])
def test_opcheck(form):
    inputs, dy = problem(L=33, H=2, G=1, Dh=16, Ds=4, decay=3.0, device=DEVICE)
    rest = (None, None, 2.0**-24, form, 16)
    torch.library.opcheck(forms.form_op, (*inputs.tensors(), *rest))
    results = (x.detach() for x in forms.form_op(*inputs.tensors(), *rest))
    operands = (x.detach() for x in inputs.tensors())
    torch.library.opcheck(
        forms.form_backward,
        (dy, *results, *operands, *rest),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize(
    "backend",
    [
        "adaptive",
        *(pytest.param(form, marks=pytest.mark.slow) for form in ("far_and_band", "wide")),
    ],
)
def test_compiles_in_one_graph(backend):
    inputs, dy = mixed("far_and_band", 40, Dh=16)

    def attend(**kwargs):
        return 2 * sk.sisa_attention(**kwargs, backend=backend)

    y = value_and_grads(attend, inputs, dy)
    compiled = value_and_grads(torch.compile(attend, fullgraph=True), inputs, dy)
    torch.testing.assert_close(compiled, y, rtol=0, atol=0)


class Waits(TorchDispatchMode):
    """The ops within it that would wait for a device."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        if name.rpartition("::")[2] in ("_local_scalar_dense", "nonzero", "is_nonzero", "equal"):
            self.seen.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("form", ["far_and_band", "wide"])
def test_no_step_of_a_form_waits_for_the_device(form):
    inputs, dy = problem(L=33, H=2, G=1, Dh=16, Ds=4, decay=3.0, device=DEVICE)
    call = (*(x.detach() for x in inputs.tensors()), None, None, 2.0**-24, form, 16)
    with Waits() as waits:
        results = forms.form_eager(*call)
        forms.form_backward_eager(dy, *results, *call)
    assert not waits.seen


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["far_and_band", "wide"])
def test_captured_in_a_cuda_graph(form):
    inputs, dy = mixed(form, 300, dtype=torch.bfloat16)
    for _ in range(3):
        expected = value_and_grads(sk.sisa_attention, inputs, dy, backend=form)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = value_and_grads(sk.sisa_attention, inputs, dy, backend=form)
    graph.replay()
    torch.testing.assert_close(result, expected, rtol=2e-2, atol=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["far_and_band", "wide"])
@pytest.mark.parametrize("name", ["cudnn", "flash", "efficient"])
def test_every_stock_kernel_on_the_gpu(form, name, monkeypatch):
    """Each given y and the log-sum-exp of more keys than its own; skipped where it is not legal."""
    monkeypatch.setattr(exact, "choose_tiles", tiles.choose_tiles)
    monkeypatch.setattr(stock, "KERNELS", {name: stock.KERNELS[name]})
    inputs, _ = mixed(form, 300, dtype=torch.bfloat16)
    try:
        stock.choose(stock._call(inputs.q, inputs.k, inputs.v))
    except ValueError as error:
        pytest.skip(str(error))
    check(form, 300, window=64, dtype=torch.bfloat16, H=4)
    check(form, 1000, window=256, dtype=torch.bfloat16)


def test_under_vmap_samples_are_heads():
    inputs, _ = mixed("far_and_band", 40, Dh=16)
    tensors = [x.detach() for x in inputs.tensors()]
    both = [torch.stack((x, x.flip(1))) if x.ndim > 1 else torch.stack((x, 2 * x)) for x in tensors]

    def attend(*x):
        return forms.attend(SisaInputs(*x), "far_and_band", 16)

    found = torch.func.vmap(attend)(*both)
    one_by_one = torch.stack([attend(*(x[n] for x in both)) for n in range(2)])
    torch.testing.assert_close(found, one_by_one, rtol=1e-5, atol=1e-6)


def test_what_a_form_does_not_take_is_named():
    inputs, _ = problem(L=9, H=1, Dh=16, device=DEVICE)
    bounds = torch.tensor([0, 4, 9], dtype=torch.int32, device=DEVICE)
    with pytest.raises(
        ValueError, match=r"backend 'wide' cannot run here: it takes one document a row"
    ):
        sk.sisa_attention(**inputs._replace(cu_seqlens=bounds)._asdict(), backend="wide")
    with pytest.raises(
        ValueError, match="'far_and_band' cannot run here: it computes mode 'exact'"
    ):
        sk.sisa_attention(**inputs._asdict(), mode="clamped", backend="far_and_band")
    with pytest.raises(ValueError, match="'adaptive' cannot run here: its kernels take"):
        sk.sisa_attention(**in_fp64(inputs), backend="adaptive")


# ---- The choice ----------------------------------------------------------------------------------


def needed_by(*heads):
    """What one sequence's key heads need: (window, range) of each."""
    return torch.tensor([heads], dtype=torch.int32)


@pytest.mark.parametrize(
    ("heads", "layer", "form"),
    [
        (((100, 500),), (4096, 16), "far_and_band"),
        (((256, 500),), (16384, 128), "far_and_band"),
        (((100, 500),), (2048, 16), "exact"),  # so short that most of it is the band
        (((257, 64),), (4096, 16), "wide"),
        (((257, 65),), (4096, 16), "exact"),  # so short a memory that its gradients would be off
        (((257, 200),), (16384, 16), "wide"),
        (((257, 201),), (16384, 16), "exact"),  # past the exponents of bf16
        (((900, 20),), (2048, 32), "exact"),  # so wide that it costs more than it saves
        (((100, 500),) * 14 + ((900, 500),) * 2, (4096, 16), "far_and_band"),
        (((100, 500),) * 13 + ((900, 500),) * 3, (4096, 16), "exact"),
    ],
)
def test_the_choice_is_the_first_row_that_suits_and_serves(heads, layer, form):
    assert choice.candidates(needed_by(*heads), choice.Layer(*layer, torch.bfloat16))[0] == form


@pytest.fixture
def unchecked(monkeypatch):
    """No form has been used or checked yet; small problems count as long ones."""
    monkeypatch.setattr(choice, "window_of", lambda length: 4)
    monkeypatch.setattr(forms, "window_of", lambda length: 16)
    with first_use(monkeypatch):
        yield


def test_a_layer_follows_its_heads_a_call_behind(unchecked, monkeypatch):
    monkeypatch.setattr(forms, "fault", lambda form, inputs: None)
    backend = sk.Adaptive()
    seen = []
    for step in (1.0, 1.0, 1e-4, 1e-4):
        inputs, _ = problem(L=70, H=1, Dh=16, decay=30.0, device=DEVICE)
        inputs = inputs._replace(log_decay=step * inputs.log_decay.detach())
        with torch.no_grad():
            y = sk.sisa_attention(**inputs._asdict(), backend=backend)
        assert relative(y, oracle(inputs, torch.zeros_like(y))[0]) <= 1e-6
        seen.append(backend.form)
    assert seen == ["exact", "far_and_band", "far_and_band", "wide"]
    assert copy.deepcopy(backend).form == pickle.loads(pickle.dumps(backend)).form == "exact"


def test_a_form_that_is_wrong_is_left_out_and_said_once(unchecked, monkeypatch):
    backward = stock.backward
    monkeypatch.setattr(stock, "backward", lambda *x: tuple(1.1 * grad for grad in backward(*x)))
    monkeypatch.setattr(forms, "problem", functools.partial(problem, L=70))
    backend = sk.Adaptive()
    inputs, _ = problem(L=70, H=1, Dh=16, decay=30.0, device=DEVICE)
    sk.sisa_attention(**inputs._asdict(), backend=backend)
    with pytest.warns(UserWarning, match="leaves the form 'far_and_band' out: .* wrong"):
        sk.sisa_attention(**inputs._asdict(), backend=backend)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sk.sisa_attention(**inputs._asdict(), backend=backend)
    assert backend.form == "exact"


def test_packed_documents_take_the_exact_kernels():
    inputs, _ = problem(L=20, H=1, Dh=16, device=DEVICE)
    bounds = torch.tensor([0, 4, 17], dtype=torch.int32, device=DEVICE)
    packed = inputs._replace(cu_seqlens=bounds)._asdict()
    found, expected = (
        sk.sisa_attention(**packed, backend=backend) for backend in ("adaptive", "triton")
    )
    assert torch.equal(found, expected)


def test_a_layer_has_a_choice_of_its_own():
    first, second = (SisaAttention.of(32, 2, 6, backend="adaptive").to(DEVICE) for _ in range(2))
    assert isinstance(first.backend, sk.Adaptive)
    assert first.backend is not second.backend
    x = torch.randn(1, 20, 32, device=DEVICE)
    found = first(x)
    first.backend = "triton"
    assert torch.equal(found, first(x))
    assert copy.deepcopy(second).backend is not second.backend
