"""Mamba-2 and Mamba-3: scan and mixers against step-by-step fp64, names, the kernels."""

import dataclasses
import math
import sys

import pytest
import torch
import torch.nn.functional as F

import sisa_model as sm
from sisa_kernels import ops
from sisa_kernels.testing import relative, value_and_grads, worst_row
from sisa_model.models import mamba, mamba_kernels
from sisa_model.models.config import ModelConfig
from sisa_model.models.context import Context
from sisa_model.models.mamba import Mamba2, Mamba3
from sisa_model.models.mamba_kernels import Kernels
from sisa_model.models.scan import decayed_scan

MIXERS = {"mamba2": Mamba2, "mamba3": Mamba3}
LENGTHS = (1, 63, 257)


def mixer(family):
    """A mixer whose every parameter is random and of the size that training gives."""
    torch.manual_seed(0)
    sizes = {"d_model": 32, "n_heads": 2, "n_layers": 1, "vocab_size": 9, "max_seq_len": 9}
    module = MIXERS[family](ModelConfig(family=family, mamba_state=12, **sizes))
    module.reset_parameters()
    with torch.no_grad():
        for name, p in module.named_parameters():
            if p.ndim == 2:
                p.zero_()
            p += 0.3 * torch.randn_like(p)
            if name == "dt_bias":
                p += 2.0  # steps to 1 and beyond: decays from hardly any to all but complete
        if family == "mamba3":
            module.parts(module.in_proj.weight.T)[5].mul_(8.0)  # decay rates below their floor, too
    return module


def context(cu_seqlens=None):
    return Context((torch.empty(0), torch.empty(0)), cu_seqlens)


# ---- The oracles, in the package's own terms: a state, token by token, in fp64 -------------------


def ssd_steps(x, dt, A, B, C, *, chunk_size, D):
    """``mamba_chunk_scan_combined``: x [B, L, H, P], dt [B, L, H], A, D [H], B, C [B, L, 1, N]."""
    x, dt, A, B, C, D = (t.double() for t in (x, dt, A, B, C, D))
    h, out = x.new_zeros(*x.shape[:1], *x.shape[2:], B.shape[-1]), []
    for t in range(x.shape[1]):
        inflow = torch.einsum("bh,bhp,bn->bhpn", dt[:, t], x[:, t], B[:, t, 0])
        h = torch.exp(dt[:, t] * A)[..., None, None] * h + inflow
        out.append(torch.einsum("bhpn,bn->bhp", h, C[:, t, 0]) + D[:, None] * x[:, t])
    return torch.stack(out, 1)


def siso_steps(Q, K, V, ADT, DT, Trap, Q_bias, K_bias, Angles, *, D, Z, chunk_size):
    """``mamba3_siso_combined``.

    Q, K [B, L, 1, N]; V, Z [B, L, H, P]; the steps [B, H, L]; biases [H, N]; Angles [B, L, H, S].
    """
    Q, K, V, ADT, DT, Trap, Q_bias, K_bias, Angles, D, Z = (
        t.double() for t in (Q, K, V, ADT, DT, Trap, Q_bias, K_bias, Angles, D, Z)
    )
    h = V.new_zeros(*V.shape[:1], *V.shape[2:], Q.shape[-1])
    theta, before, out = Angles.new_zeros(Angles[:, 0].shape), torch.zeros_like(h), []
    for t in range(V.shape[1]):
        step = DT[:, :, t, None]
        theta = theta + math.pi * torch.tanh(Angles[:, t]) * step
        turn = torch.polar(torch.ones_like(theta), theta)

        def rotated(x, turn=turn):
            pairs = torch.view_as_complex(
                x[..., : 2 * turn.shape[-1]].unflatten(-1, (-1, 2)).contiguous()
            )
            return torch.cat(
                (torch.view_as_real(pairs * turn).flatten(-2), x[..., 2 * turn.shape[-1] :]), -1
            )

        now = V[:, t, :, :, None] * rotated(K[:, t] + K_bias)[:, :, None, :]
        lam, alpha = torch.sigmoid(Trap[:, :, t, None]), torch.exp(ADT[:, :, t, None])
        h = (
            alpha[..., None] * h
            + ((1 - lam) * step * alpha)[..., None] * before
            + (lam * step)[..., None] * now
        )
        before = now
        y = (h * rotated(Q[:, t] + Q_bias)[:, :, None, :]).sum(-1) + D[:, None] * V[:, t]
        out.append(y * F.silu(Z[:, t]))
    return torch.stack(out, 1)


def rms(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def mamba2_oracle(u, in_proj, dt_bias, A_log, D, conv, conv_bias, norm, out_proj):
    E, H = out_proj.shape[1], len(D)
    N = (len(conv) - E) // 2
    z, xBC, dt = (u @ in_proj.T).split([E, E + 2 * N, H], -1)
    taps = F.pad(xBC, (0, 0, 3, 0))
    xBC = F.silu(sum(taps[:, j : j + u.shape[1]] * conv[:, 0, j] for j in range(4)) + conv_bias)
    x, B, C = xBC.split([E, N, N], -1)
    heads = (H, E // H)
    dt = F.softplus(dt + dt_bias)
    y = ssd_steps(
        x.unflatten(-1, heads), dt, -A_log.exp(), B[:, :, None], C[:, :, None], chunk_size=1, D=D
    ).flatten(2)
    return rms(y * F.silu(z), norm) @ out_proj.T


def mamba3_oracle(u, in_proj, dt_bias, B_bias, C_bias, D, B_norm, C_norm, out_proj):
    E, (H, _, N) = out_proj.shape[1], B_bias.shape
    z, x, B, C, dt, A, trap, angle = (u @ in_proj.T).split([E, E, N, N, H, H, H, N // 4], -1)
    dt, A = F.softplus(dt + dt_bias), torch.minimum(-F.softplus(A), torch.tensor(-1e-4))
    B, C = rms(B, B_norm)[:, :, None], rms(C, C_norm)[:, :, None]
    steps = (t.transpose(1, 2) for t in (A * dt, dt, trap))
    angles = angle[:, :, None].expand(-1, -1, H, -1)
    V, Z = (t.unflatten(-1, (H, E // H)) for t in (x, z))
    return (
        siso_steps(
            C, B, V, *steps, C_bias[:, 0], B_bias[:, 0], angles, D=D, Z=Z, chunk_size=1
        ).flatten(2)
        @ out_proj.T
    )


ORACLES = {"mamba2": mamba2_oracle, "mamba3": mamba3_oracle}
ORDER = {
    "mamba2": (
        "in_proj.weight",
        "dt_bias",
        "A_log",
        "D",
        "conv1d.weight",
        "conv1d.bias",
        "norm.weight",
        "out_proj.weight",
    ),
    "mamba3": (
        "in_proj.weight",
        "dt_bias",
        "B_bias",
        "C_bias",
        "D",
        "B_norm.weight",
        "C_norm.weight",
        "out_proj.weight",
    ),
}


def with_gradients(family, module, u, dy):
    """(y, gradients by name) of the mixer, and of its oracle, from the same weights and input."""
    parameters = {name: dict(module.named_parameters())[name] for name in ORDER[family]}

    def ours(u, **weights):
        return torch.func.functional_call(module, weights, (u, context()))

    def oracle(u, **weights):
        return ORACLES[family](u, *weights.values())

    inputs = {"u": u, **parameters}
    return value_and_grads(ours, inputs, dy), value_and_grads(
        oracle, {n: x.detach().double() for n, x in inputs.items()}, dy.double()
    )


def scan_steps(q, k, v, log_decay, h):
    q, k = (t.repeat_interleave(v.shape[2] // t.shape[2], 2) for t in (q, k))
    out = []
    for t in range(v.shape[1]):
        h = log_decay[:, t].exp()[..., None, None] * h
        out.append((q[:, t, :, None] @ h)[:, :, 0])
        h = h + k[:, t, :, :, None] * v[:, t, :, None]
    return torch.stack(out, 1), h


@pytest.mark.parametrize("strength", [0.01, 1.0, 60.0])
@pytest.mark.parametrize(
    ("L", "chunk", "groups"),
    [(2, 64, 4), (63, 1, 1), (63, 64, 2), (257, 16, 1), (257, 64, 4), (257, 300, 2)],
)
def test_the_scan_is_the_recurrence(L, chunk, groups, strength):
    """fp32 against fp64, with gradients; decays from 0.99 to e^-60, where sums grow to 15,000."""
    generator = torch.Generator().manual_seed(L)
    shapes = {
        "q": (2, L, groups, 6),
        "k": (2, L, groups, 6),
        "v": (2, L, 4, 5),
        "log_decay": (2, L, 4),
        "h": (2, 4, 6, 5),
    }
    inputs = {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}
    inputs["log_decay"] = -strength * inputs["log_decay"].abs()
    dy = torch.randn(2, L * 20 + 120, generator=generator)

    def chunked(h, **kwargs):
        return torch.cat([x.flatten(1) for x in decayed_scan(**kwargs, state=h, chunk=chunk)], 1)

    def stepped(**kwargs):
        return torch.cat([x.flatten(1) for x in scan_steps(**kwargs)], 1)

    y, grads = value_and_grads(chunked, inputs, dy)
    expected, expected_grads = value_and_grads(
        stepped, {n: x.double() for n, x in inputs.items()}, dy.double()
    )
    for part in (slice(L * 20), slice(L * 20, None)):
        assert relative(y[:, part], expected[:, part]) < 1e-6
    for name, grad in grads.items():
        assert grad.isfinite().all()
        assert relative(grad, expected_grads[name]) < 1e-6, name


@pytest.mark.parametrize("family", MIXERS)
@pytest.mark.parametrize("L", LENGTHS)
def test_a_mixer_is_its_recurrence(family, L, monkeypatch):
    module = mixer(family)
    u, dy = torch.randn(2, L, 32), torch.randn(2, L, 32)
    (y, grads), (expected, expected_grads) = with_gradients(family, module, u, dy)
    assert relative(y, expected) < 3e-6
    assert worst_row(y, expected) < 1e-5
    for name, grad in grads.items():
        assert relative(grad, expected_grads[name]) < 2e-5, name
    monkeypatch.setattr(mamba, "decayed_scan", lambda *args: decayed_scan(*args, chunk=7))
    assert relative(module(u, context()), expected) < 3e-6, "whatever the chunk"


@pytest.mark.parametrize("family", MIXERS)
def test_memory_is_linear_in_the_length(family):
    """What a mixer keeps for its backward, each storage once."""
    module = mixer(family)

    def kept(L):
        storages = {}

        def keep(x):
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            y = module(torch.randn(1, L, 32), context())
        assert y.requires_grad
        return sum(storage.nbytes() for storage in storages.values())

    assert kept(1024) < 2.02 * kept(512)


@pytest.mark.parametrize("family", MIXERS)
def test_the_state_begins_anew_at_each_document(family):
    model, ids = sm.build(f"{family}-tiny"), torch.randint(257, (1, 90))
    packed = model(ids, torch.tensor([0, 1, 3, 70, 90], dtype=torch.int32))
    apart = torch.cat([model(document) for document in ids.split([1, 2, 67, 20], 1)], 1)
    torch.testing.assert_close(packed, apart, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(packed, model(ids), atol=1e-3)


def in_double(module):
    """The mixer with every parameter in fp64."""
    module.double()
    for name in module.fp32:
        getattr(module, name).data = getattr(module, name).double()
    return module


def continued(module, u, sizes, lengths=None):
    """The mixer's y of u in pieces over a cache, the last pieces of one token; and the cache."""
    cache = module.make_cache(len(u))
    first, *rest = u.split([*sizes, *[1] * (u.shape[1] - sum(sizes))], 1)
    beginning = dataclasses.replace(context(), lengths=lengths)
    return torch.cat(
        [module(first, beginning, cache), *(module(piece, context(), cache) for piece in rest)], 1
    ), cache


@pytest.mark.parametrize("sizes", [[1], [70, 1, 2, 66], [2, 65]], ids=str)
@pytest.mark.parametrize("family", MIXERS)
@torch.no_grad()
def test_pieces_over_a_cache_are_the_whole(family, sizes):
    module, u = mixer(family), torch.randn(2, 150, 32)
    expected = ORACLES[family](
        u.double(), *(dict(module.named_parameters())[name].double() for name in ORDER[family])
    )
    y, cache = continued(module, u, sizes)
    assert relative(y, expected) < 3e-6
    assert worst_row(y, expected) < 1e-5
    module, u = in_double(module), u.double()
    y, cache = continued(module, u, sizes)
    assert relative(y, module(u, context())) < 1e-13
    assert cache.state["h"].dtype == torch.float64


@pytest.mark.parametrize("family", MIXERS)
@torch.no_grad()
def test_rows_of_unequal_beginnings_go_on_from_their_last_token(family):
    """Whatever stands behind it; rows shorter than the convolution and longer than a chunk."""
    module, u, lengths = (
        in_double(mixer(family)),
        5 * torch.randn(5, 100, 32, dtype=torch.float64),
        [1, 2, 3, 70, 80],
    )
    y, cache = continued(module, u, [80, 5], lengths)
    for row, n in enumerate(lengths):
        real = [*range(n), *range(80, 100)]
        alone, single = continued(module, u[row : row + 1, real], [n])
        assert relative(y[row, real], alone[0]) < 1e-13
        for name, state in single.state.items():
            assert relative(cache.state[name][row], state[0]) < 1e-13, name


@pytest.mark.parametrize("family", MIXERS)
@torch.no_grad()
def test_the_state_does_not_grow(family):
    module = mixer(family)
    sizes = [
        {
            name: (t.numel(), t.untyped_storage().nbytes())
            for name, t in continued(module, torch.randn(3, L, 32), [n])[1].state.items()
        }
        for L, n in ((1, 1), (90, 80), (300, 300))
    ]
    expected = {
        "mamba2": {"xBC": 3 * 88, "h": 4 * 12 * 16},
        "mamba3": {"phase": 4 * 3, "h": 4 * 12 * 16, "k": 4 * 12, "x": 4 * 16},
    }
    for size in sizes:
        assert size == {
            name: (3 * n, 3 * n * (8 if name == "phase" else 4))
            for name, n in expected[family].items()
        }


@pytest.mark.parametrize("family", MIXERS)
@torch.no_grad()
def test_a_cache_is_for_the_same_rows(family):
    module, u = mixer(family), torch.randn(2, 5, 32)
    _, cache = continued(module, u, [4])
    before = dict(cache.state)
    for held in (cache, module.make_cache(2)):
        with pytest.raises(ValueError, match="x must have the cache's batch of 2, got 1"):
            module(u[:1], context(), held)
    with pytest.raises(
        ValueError,
        match=r"a state in torch\.float32 on cpu as in the cache, got torch\.float64 on cpu",
    ):
        module.double()(u.double(), context(), cache)
    assert all(cache.state[name] is t for name, t in before.items())
    with pytest.raises(ValueError, match="batch must be at least 1, got 0"):
        module.make_cache(0)


@pytest.mark.parametrize("family", MIXERS)
def test_autocast_rounds_the_projections_alone(family):
    """What the projection gives is rounded once, 2^-9; between the projections nothing is."""
    module, u = mixer(family), torch.randn(2, 100, 32)
    exact, seen = module(u, context()), {}
    module.out_proj.register_forward_pre_hook(lambda _, args: seen.update(y=args[0]))
    with torch.autocast("cpu", torch.bfloat16):
        projected = module.in_proj(u)
        module(u, context())
    between = module.mix(projected)
    assert torch.equal(seen["y"], between.bfloat16())
    assert between.dtype == torch.float32
    assert relative(module.out_proj(between).detach(), exact.detach().double()) < 0.05


@pytest.mark.parametrize("family", MIXERS)
def test_what_must_stay_fp32_does(family):
    model = sm.build(f"{family}-tiny")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    model.bfloat16()
    fp32 = {n.rpartition(".")[2] for n, p in model.named_parameters() if p.dtype == torch.float32}
    assert (
        fp32
        == {"mamba2": {"dt_bias", "A_log", "D"}, "mamba3": {"dt_bias", "B_bias", "C_bias", "D"}}[
            family
        ]
    )
    assert all(
        torch.equal(p, before[n]) for n, p in model.named_parameters() if p.dtype == torch.float32
    )
    logits = model(torch.randint(257, (2, 40)))
    assert logits.dtype == torch.bfloat16
    assert logits.isfinite().all()


@pytest.mark.parametrize("family", MIXERS)
def test_initial_values_are_the_packages(family):
    torch.manual_seed(0)
    module = sm.build(f"{family}-50m", n_layers=1, vocab_size=257).layers[0].mixer
    step = F.softplus(module.dt_bias)
    assert 1e-3 <= step.min() < 3e-3
    assert 0.03 < step.max() <= 0.1
    assert torch.equal(module.D, torch.ones(16))
    assert module.in_proj.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert module.out_proj.weight.std().item() == pytest.approx(0.02, rel=0.02)
    if family == "mamba2":
        rate = module.A_log.exp()
        assert 1 <= rate.min() < 4
        assert 12 < rate.max() <= 16
        assert 0.49 < module.conv1d.weight.abs().max() <= 0.5
        assert 0.45 < module.conv1d.bias.abs().max() <= 0.5
    else:
        assert torch.equal(module.B_bias, torch.ones(16, 1, 64))
        assert torch.equal(module.C_bias, torch.ones(16, 1, 64))


# ---- The package ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", MIXERS)
def test_names_and_shapes_are_the_packages(family):
    if isinstance(found := mamba_kernels.load_kernels(), str):
        pytest.skip(found)
    try:
        package = mamba_kernels._import(f"mamba_ssm.modules.{family}")
    except ImportError as error:
        pytest.skip(f"mamba-ssm is there, but not its module: {error}")
    options = {"use_mem_eff_path": False} if family == "mamba2" else {}
    theirs = getattr(package, family.capitalize())(768, d_state=64, headdim=64, **options)
    ours = sm.build(f"{family}-152m", n_layers=1, vocab_size=9).layers[0].mixer
    expected = {name: tuple(t.shape) for name, t in theirs.state_dict().items()}
    assert {name: tuple(t.shape) for name, t in ours.state_dict().items()} == expected
    ours.load_state_dict(theirs.state_dict())
    undecayed = {
        name for name, p in theirs.named_parameters() if getattr(p, "_no_weight_decay", False)
    }
    assert set(ours.no_weight_decay) == undecayed


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A mamba-ssm without Mamba-1's CUDA extension: write(module, source) fills it in."""
    theirs = {
        name: sys.modules.pop(name)
        for name in list(sys.modules)
        if name.partition(".")[0] == "mamba_ssm"
    }
    monkeypatch.syspath_prepend(tmp_path)

    def write(module, source):
        path = tmp_path.joinpath("mamba_ssm", *module.split("."))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".py").write_text(source)

    write("__init__", "import selective_scan_cuda_is_not_here")
    write("ops.triton.ssd_combined", "def mamba_chunk_scan_combined(): return 2")
    yield write
    for name in [name for name in sys.modules if name.partition(".")[0] == "mamba_ssm"]:
        del sys.modules[name]
    sys.modules.update(theirs)


def test_the_kernels_load_without_the_packages_extension(package):
    package("ops.triton.mamba3.mamba3_siso_combined", "def mamba3_siso_combined(): return 3")
    found = mamba_kernels.load_kernels.__wrapped__()
    assert (found.mamba2(), found.mamba3()) == (2, 3)


def test_what_keeps_the_kernels_from_loading_is_said(package):
    package("ops.triton.mamba3.mamba3_siso_combined", "import triton_is_not_here")
    reason = mamba_kernels.load_kernels.__wrapped__()
    assert reason == (
        "mamba-ssm 2.3.2.post1 cannot be imported "
        "(ModuleNotFoundError: No module named 'triton_is_not_here')"
    )


@pytest.mark.parametrize("family", MIXERS)
def test_the_kernels_get_what_they_ask_for(family, monkeypatch):
    """The oracles stand in for the package's, with its names and layouts; bf16 as on a GPU."""
    called = []

    def kernel(*args, **kwargs):
        called.append(family)
        return steps(*args, **kwargs).to(torch.bfloat16)

    steps = ssd_steps if family == "mamba2" else siso_steps
    module, u = mixer(family).bfloat16(), torch.randn(1, 40, 32).bfloat16()
    documents = context(torch.tensor([0, 11, 40], dtype=torch.int32))
    plain = module(u, documents)
    monkeypatch.setattr(mamba, "kernels_for", lambda *_, **__: Kernels(kernel, kernel))
    assert relative(module(u, documents).detach(), plain.detach().double()) < 0.02, (
        "bf16 before and after the kernel"
    )
    assert called == [family] * 2


def test_a_fallback_on_cuda_says_why_once(monkeypatch):
    class OnCuda:
        device, dtype = torch.device("cuda"), torch.float32

    monkeypatch.setattr(torch.version, "hip", None)
    ops._said.clear()
    here = Kernels(ssd_steps, siso_steps)
    assert mamba_kernels.kernels_for(torch.empty(1)) is None, (
        "a CPU has no kernels to miss: nothing is said"
    )
    monkeypatch.setattr(
        mamba_kernels, "load_kernels", lambda: "mamba-ssm 2.3.2.post1 cannot be imported"
    )
    with pytest.warns(
        UserWarning, match="plain PyTorch on CUDA, slower: mamba-ssm 2.3.2.post1 cannot be imported"
    ):
        assert mamba_kernels.kernels_for(OnCuda()) is None
    assert mamba_kernels.kernels_for(OnCuda()) is None
    monkeypatch.setattr(mamba_kernels, "load_kernels", lambda: here)
    with pytest.warns(
        UserWarning, match=r"round to bf16, and this layer computes in torch.float32"
    ):
        assert mamba_kernels.kernels_for(OnCuda()) is None
    OnCuda.dtype = torch.bfloat16
    assert mamba_kernels.kernels_for(OnCuda(), (64, 32)) is here
    with pytest.warns(UserWarning, match="powers of two from 16, and this layer has 48"):
        assert mamba_kernels.kernels_for(OnCuda(), (48, 32)) is None


@pytest.mark.gpu
@pytest.mark.parametrize("family", MIXERS)
def test_the_packages_kernels_agree_with_plain_pytorch(family, monkeypatch):
    """bf16 kernels against fp32 from the same bf16 projections.

    Their own rounding of q, k and states: about 3e-3 of y; gradients pass both it and its backward.
    """
    if isinstance(found := mamba_kernels.load_kernels(), str):
        pytest.skip(found)
    torch.manual_seed(0)
    module = sm.build(f"{family}-50m", n_layers=1, vocab_size=9).layers[0].mixer.cuda().bfloat16()
    u, dy = torch.randn(2, 257, 512), torch.randn(2, 257, 512)
    inputs = {"u": u.cuda().bfloat16(), **dict(module.named_parameters())}

    def run(u, **weights):
        return torch.func.functional_call(module, weights, (u, context()))

    y, grads = value_and_grads(run, inputs, dy.cuda().bfloat16())
    monkeypatch.setattr(mamba, "kernels_for", lambda *_, **__: None)
    expected, expected_grads = value_and_grads(run, inputs, dy.cuda().bfloat16())
    assert relative(y, expected.double()) < 1e-2
    for name, grad in grads.items():
        assert relative(grad, expected_grads[name].double()) < 3e-2, name
