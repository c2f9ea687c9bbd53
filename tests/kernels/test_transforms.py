"""torch.func on every operator, against loops, finite differences and the oracle."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import sisa_kernels as sk
import sisa_model as sm
from sisa_kernels import selfcheck
from sisa_kernels.testing import forgetting_problem
from tests.support.attention import first_use, needs_extension
from tests.support.problems import problem

SAMPLES = 3
DOCUMENTS = torch.tensor([0, 3, 3, 9])


class Operator(NamedTuple):
    """A function of named tensors, and its inputs."""

    function: Callable[..., Tensor]
    inputs: dict[str, Tensor]


def operators(**shape) -> dict[str, Operator]:
    """Every operator with a gradient, on every path of the CPU."""
    shape = {"L": 11, "H": 4, "G": 2, "Dh": 6, "Ds": 4, "Dv": 10, **shape}
    inputs = {name: x.detach() for name, x in problem(**shape)[0].items()}
    shape.pop("Ds")
    gated = {name: x.detach() for name, x in forgetting_problem(**shape)[0].items()}
    plain = {name: gated[name] for name in ("q", "k", "v")}
    no_values = {name: x for name, x in inputs.items() if name != "v"}

    def attention(**options):
        return Operator(functools.partial(sk.sisa_attention, **options), inputs)

    def augmented(**x):
        q_aug, k_aug = sk.augment_qk(**x)
        return torch.einsum("blhw,blgw->blhg", q_aug, k_aug)

    def other(function, given, **options):
        return Operator(functools.partial(function, **options), given)

    packed = {"cu_seqlens": DOCUMENTS}
    return {
        "native": attention(backend="native"),
        "native-packed": attention(backend="native", **packed),
        "chunked": attention(backend="chunked"),
        "chunked-packed": attention(backend="chunked", **packed),
        "clamped": attention(mode="clamped"),
        "clamped-packed": attention(mode="clamped", **packed),
        "reference": attention(backend="reference"),
        "augment": Operator(augmented, no_values),
        "forgetting-native": other(sk.forgetting_attention, gated, backend="native"),
        "forgetting-chunked": other(sk.forgetting_attention, gated, backend="chunked", **packed),
        "causal-native": other(sk.causal_attention, plain, backend="native", **packed),
    }


NAMES = [
    pytest.param(name, marks=needs_extension if "native" in name else ()) for name in operators()
]


def loss(operator: Operator, given: dict[str, Tensor]) -> Tensor:
    y = operator.function(**given)
    weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    return (y * weight).sum()


def by_autograd(operator: Operator, given: dict[str, Tensor]) -> dict[str, Tensor]:
    leaves = {name: x.clone().requires_grad_() for name, x in given.items()}
    grads = torch.autograd.grad(loss(operator, leaves), list(leaves.values()))
    return dict(zip(leaves, grads))


def samples(operator: Operator) -> dict[str, Tensor]:
    """Inputs with a first dimension of samples, each with values of its own."""
    scale = torch.linspace(0.5, 1.0, SAMPLES)
    return {name: x * scale.view(-1, *[1] * x.ndim) for name, x in operator.inputs.items()}


def close(found, expected) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", NAMES)
def test_grad_and_vjp(name):
    operator = operators()[name]
    expected = by_autograd(operator, operator.inputs)
    close(torch.func.grad(lambda x: loss(operator, x))(operator.inputs), expected)
    value, pullback = torch.func.vjp(lambda x: loss(operator, x), operator.inputs)
    close(value, loss(operator, operator.inputs))
    close(pullback(torch.ones(()))[0], expected)


@pytest.mark.parametrize("name", NAMES)
def test_vmap_over_everything_and_each_input(name):
    operator = operators()[name]
    every = samples(operator)
    one_by_one = [operator.function(**{n: x[i] for n, x in every.items()}) for i in range(SAMPLES)]
    close(torch.vmap(lambda x: operator.function(**x))(every), torch.stack(one_by_one))
    for batched in every:
        given = {**operator.inputs, batched: every[batched].movedim(0, -1)}
        dims = {n: -1 if n == batched else None for n in given}
        found = torch.vmap(lambda x: operator.function(**x), in_dims=(dims,))(given)
        expected = [
            operator.function(**{**operator.inputs, batched: every[batched][i]})
            for i in range(SAMPLES)
        ]
        close(found, torch.stack(expected))


@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_each_sample(name):
    """lam, which all samples share, has a gradient for each, too."""
    operator = operators()[name]
    given = {n: operator.inputs[n] if n == "lam" else x for n, x in samples(operator).items()}
    dims = {n: None if n == "lam" else 0 for n in given}
    found = torch.vmap(torch.func.grad(lambda x: loss(operator, x)), in_dims=(dims,))(given)
    for i in range(SAMPLES):
        sample = {n: x if dims[n] is None else x[i] for n, x in given.items()}
        close({n: x[i] for n, x in found.items()}, by_autograd(operator, sample))
    total = torch.func.grad(
        lambda x: torch.vmap(lambda x: loss(operator, x), in_dims=(dims,))(x).sum()
    )(given)
    close(total, {n: x.sum(0) if dims[n] is None else x for n, x in found.items()})


def test_gradients_of_each_sample_by_triton():
    """One call for all samples: in the interpreter it takes seconds."""
    pytest.importorskip("triton")
    operator = operators(L=9, H=2, G=1)["native"]
    triton = operator._replace(function=functools.partial(sk.sisa_attention, backend="triton"))
    given = {n: operator.inputs[n] if n == "lam" else x for n, x in samples(operator).items()}
    dims = {n: None if n == "lam" else 0 for n in given}
    found = torch.vmap(torch.func.grad(lambda x: loss(triton, x)), in_dims=(dims,))(given)
    for i in range(SAMPLES):
        sample = {n: x if dims[n] is None else x[i] for n, x in given.items()}
        by_reference = triton._replace(function=sk.reference.sisa_attention)
        close({n: x[i] for n, x in found.items()}, by_autograd(by_reference, sample))


@pytest.mark.parametrize("name", ["chunked", "chunked-packed", "clamped-packed", "augment"])
def test_jacobian_by_finite_differences(name):
    operator = operators(L=9, H=2, G=1, Dh=2, Ds=2, Dv=2, dtype=torch.float64)[name]
    step = 1e-6
    for n in ("q", "log_decay", "theta", "lam"):

        def function(x, n=n):
            return operator.function(**{**operator.inputs, n: x}).flatten()

        x = operator.inputs[n]
        found = torch.func.jacrev(function)(x).flatten(1)
        for column in range(0, x.numel(), max(1, x.numel() // 3)):
            change = torch.zeros_like(x).view(-1)
            change[column] = step
            change = change.view(x.shape)
            expected = (function(x + change) - function(x - change)) / (2 * step)
            torch.testing.assert_close(found[:, column], expected, rtol=1e-6, atol=1e-8)


@needs_extension
def test_jacobian_of_the_compiled_kernel():
    operator = operators(L=5, H=2, G=1)["native"]
    exact = {name: x.double() for name, x in operator.inputs.items()}

    def function(x, backend, inputs):
        return sk.sisa_attention(**{**inputs, "b": x}, backend=backend)

    found = torch.func.jacrev(function)(operator.inputs["b"], "native", operator.inputs)
    expected = torch.func.jacrev(function)(exact["b"], "reference", exact)
    close(found.double(), expected)


@pytest.mark.parametrize("name", [name for name in NAMES if "packed" in name.values[0]])
def test_samples_may_differ_in_their_documents(name):
    operator = operators()[name]
    bounds = torch.tensor([[0, 3, 3, 9], [0, 0, 11, 11], [0, 1, 2, 3]])
    options = {k: v for k, v in operator.function.keywords.items() if k != "cu_seqlens"}

    def attend(bounds):
        return operator.function.func(**operator.inputs, **options, cu_seqlens=bounds)

    close(torch.vmap(attend)(bounds), torch.stack([attend(one) for one in bounds]))


@pytest.mark.parametrize("name", NAMES)
def test_wrong_values_are_found_within_a_transform(name):
    operator = operators()[name]
    every = samples(operator)
    for wrong in {"log_decay", "log_forget", "lam"} & every.keys():
        spoiled = {**every, wrong: -every[wrong]}
        with pytest.raises(ValueError, match=f"{wrong} must be"):
            torch.vmap(lambda x: operator.function(**x))(spoiled)


@pytest.mark.parametrize("name", [n for n in NAMES if n.values != ("reference",)])
def test_forward_mode_and_second_derivatives_are_refused(name):
    operator = operators()[name]
    q = operator.inputs["q"]

    def function(q):
        return loss(operator, {**operator.inputs, "q": q})

    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(function, (q,), (q,))
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jacfwd(function)(q)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.func.grad(lambda q: torch.func.grad(function)(q).sum())(q)


@needs_extension
@pytest.mark.parametrize("name", ["native", "clamped", "augment", "forgetting-native"])
def test_as_the_first_call_of_a_process(name, monkeypatch):
    """What is checked on a first use is checked outside of the transforms, and found right."""
    operator = operators()[name]
    expected = by_autograd(operator, operator.inputs)
    function = operator.function
    if name in ("native", "forgetting-native"):  # a path by name is not checked
        operator = operator._replace(function=functools.partial(function.func, backend="auto"))
    with first_use(monkeypatch):
        one = {n: x[None] for n, x in operator.inputs.items()}
        found = torch.vmap(torch.func.grad(lambda x: loss(operator, x)))(one)
        close({n: x[0] for n, x in found.items()}, expected)
        assert selfcheck._verdicts
        assert not any(selfcheck._verdicts.values())


def test_decoding_of_each_sample():
    """Prompt, one token, several."""
    for function, kind, name in (
        (sk.sisa_decode, sk.SisaCache, "reference"),
        (sk.forgetting_decode, sk.TokenCache, "forgetting-chunked"),
    ):
        every = samples(operators()[name])

        def decode(x, function=function, kind=kind):
            cache = kind(1)
            pieces = [
                function(**{n: t if n == "lam" else t[:, rows] for n, t in x.items()}, cache=cache)
                for rows in (slice(0, 6), slice(6, 7), slice(7, 11))
            ]
            return torch.cat(pieces, 1)

        expected = [decode({n: x[i] for n, x in every.items()}) for i in range(SAMPLES)]
        close(torch.vmap(decode)(every), torch.stack(expected))


@pytest.mark.parametrize("preset", ["sisa-tiny-ds16", "transformer-tiny", "fox-tiny", "alibi-tiny"])
def test_per_sample_gradients_of_a_model(preset):
    torch.manual_seed(0)
    model = sm.build(preset, n_layers=2, vocab_size=50, d_model=32, n_heads=2)
    ids = torch.randint(0, 50, (SAMPLES, 12))
    weights = {name: x.detach() for name, x in model.named_parameters()}

    def loss(weights, ids):
        logits = torch.func.functional_call(model, weights, (ids[None, :-1],))
        return torch.nn.functional.cross_entropy(logits[0], ids[1:])

    found = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, ids)
    for i in range(SAMPLES):
        model.zero_grad()
        loss(dict(model.named_parameters()), ids[i]).backward()
        for name, x in model.named_parameters():
            torch.testing.assert_close(found[name][i], x.grad, rtol=1e-3, atol=1e-5, msg=name)
