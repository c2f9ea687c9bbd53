"""mode="clamped" is what its authors published, gradients too: through the middle of g's range."""

import pytest
import torch

import sisa_kernels as sk
from bench import accuracy
from sisa_kernels.inputs import SisaInputs
from sisa_kernels.testing import in_fp64, oracle, relative, value_and_grads
from tests.support import published
from tests.support.augment import errors
from tests.support.problems import problem

RANGES = (5.0, 30.0, 200.0)  # of g; the clamp binds from 22 on
FP64 = torch.float64


def spanning(span, L=129, still=0, dtype=torch.float32, **shape):
    """A problem whose g spans at least ``span`` in each head; ``still`` tokens at its ends tie."""
    inputs, dy = problem(L=L, Dh=16, Ds=8, decay=0.0, dtype=dtype, **shape)
    log_decay = inputs["log_decay"].detach().clone()
    log_decay[:, 1 : 1 + still] = 0
    log_decay[:, L - still :] = 0
    inputs["log_decay"] = log_decay * (span / -log_decay[:, 1:].sum(1).max())
    return inputs, dy


def as_published(inputs, dy):
    return value_and_grads(published.attention, in_fp64(inputs), dy.double())


def check(found, right, bound):
    """y and every gradient within ``bound``, its worst token within ten; or twice the rounding."""
    results, exact = ({"y": y} | grads for y, grads in (found, right))
    rounded = {name: exact[name].to(x.dtype) for name, x in results.items()}
    allowed = errors(rounded, exact)
    for name, (whole, worst) in errors(results, exact).items():
        assert whole <= bound + 2 * allowed[name][0], name
        assert worst <= 10 * bound + 2 * allowed[name][1], name


@pytest.mark.parametrize("still", [0, 30], ids=["", "ties"])
@pytest.mark.parametrize("span", RANGES)
def test_in_fp64(span, still):
    inputs, dy = spanning(span, still=still, dtype=FP64)
    right = as_published(inputs, dy)
    check(oracle(inputs, dy, mode="clamped"), right, 1e-13)
    check(value_and_grads(sk.sisa_attention, inputs, dy, mode="clamped"), right, 1e-13)


@pytest.mark.parametrize("still", [0, 30], ids=["", "ties"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("span", RANGES)
def test_on_stock_kernels(span, dtype, still):
    inputs, dy = spanning(span, still=still, dtype=dtype)
    found = value_and_grads(sk.sisa_attention, inputs, dy, mode="clamped")
    check(found, as_published(inputs, dy), 5e-6)


@pytest.mark.parametrize("span", RANGES)
def test_the_rival_of_the_benches(span):
    inputs, dy = spanning(span)
    _, attend = accuracy.PATHS["as published"]
    found = value_and_grads(lambda **x: attend(SisaInputs(**x)), inputs, dy)
    check(found, as_published(inputs, dy), 2e-5)


@pytest.mark.parametrize("span", RANGES)
def test_the_first_decay_moves_nothing(span):
    """It shifts all of g, and the middle with it."""
    inputs, dy = spanning(span, H=4, G=2)
    _, grads = value_and_grads(sk.sisa_attention, inputs, dy, mode="clamped")
    assert grads["log_decay"][:, 0].abs().max() <= 1e-6 * grads["log_decay"].abs().max()


def test_documents_have_middles_of_their_own():
    inputs, dy = spanning(200.0, dtype=FP64)
    bounds = [0, 1, 40, 129]
    documents = torch.tensor(bounds, dtype=torch.int32)

    def apart(**x):
        lam = x.pop("lam")
        pieces = zip(*(x[name].tensor_split(bounds[1:-1], 1) for name in x))
        return torch.cat(
            [published.attention(**dict(zip(x, piece)), lam=lam) for piece in pieces], 1
        )

    found = value_and_grads(sk.sisa_attention, inputs, dy, mode="clamped", cu_seqlens=documents)
    check(found, value_and_grads(apart, inputs, dy), 1e-13)


@pytest.mark.parametrize(("H", "G"), [(2, 2), (2, 1)])
def test_gradcheck_where_the_clamp_binds(H, G):
    inputs, _ = problem(L=5, H=H, G=G, Dh=2, Ds=2, Dv=2, decay=11.0, dtype=FP64)
    assert (inputs["log_decay"].sum(1) < -40).all()

    def function(*x):
        return sk.sisa_attention(*x, mode="clamped")

    assert torch.autograd.gradcheck(function, tuple(inputs.values()))


def test_compiled_gradients():
    inputs, dy = spanning(200.0, L=65)

    def attend(**x):
        return sk.sisa_attention(**x, mode="clamped")

    compiled = value_and_grads(
        torch.compile(attend, fullgraph=True, backend="aot_eager"), inputs, dy
    )
    check(compiled, as_published(inputs, dy), 5e-6)


def test_attention_on_augment_qk():
    """Its gradients by itself are those of the published operands."""
    inputs, _ = spanning(200.0, still=5)
    operands = {name: x for name, x in inputs.items() if name != "v"}
    width = inputs["q"].shape[3] + inputs["b"].shape[3]
    weights = torch.randn(
        2, *inputs["q"].shape[:3], width, generator=torch.Generator().manual_seed(2)
    )
    found = value_and_grads(lambda **x: torch.stack(sk.augment_qk(**x)), operands, weights)
    exact = value_and_grads(
        lambda **x: torch.stack(published.augmented(**x)), in_fp64(operands), weights.double()
    )
    for name, grad in found[1].items():
        assert relative(grad, exact[1][name]) <= 1e-6, name
