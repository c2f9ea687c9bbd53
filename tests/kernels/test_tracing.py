"""Operators and models where values are traced: torch.compile, make_fx, FakeTensorMode, export."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_map

import sisa_kernels as sk
import sisa_model as sm
from sisa_kernels.testing import forgetting_problem, value_and_grads
from tests.support.attention import needs_extension
from tests.support.problems import problem

L = 64
FAMILIES = {
    "sisa": "sisa-tiny-ds16",
    "transformer": "transformer-tiny",
    "fox": "fox-tiny",
    "alibi": "alibi-tiny",
    "mamba2": "mamba2-tiny",
    "mamba3": "mamba3-tiny",
}


class Traced(NamedTuple):
    function: Callable[..., Tensor]
    inputs: dict[str, Tensor]


def decode(function, kind, **x: Tensor) -> Tensor:
    """A prompt, one token, and several."""
    cache = kind(1)
    pieces = []
    with torch.no_grad():
        for rows in (slice(0, 40), slice(40, 41), slice(41, 50)):
            tokens = {name: t if name == "lam" else t[:, rows] for name, t in x.items()}
            pieces.append(function(**tokens, cache=cache))
    return torch.cat(pieces, 1)


def cases() -> dict[str, Traced]:
    """Every operator on every path of the CPU, with documents and without."""
    shape = {"L": L, "H": 4, "G": 2, "Dh": 8}
    inputs = {name: x.detach() for name, x in problem(Ds=4, **shape)[0].items()}
    gated = {name: x.detach() for name, x in forgetting_problem(**shape)[0].items()}
    plain = {name: gated[name] for name in ("q", "k", "v")}
    no_values = {name: x for name, x in inputs.items() if name != "v"}
    found = {
        "augment": Traced(sk.augment_qk, no_values),
        "decode": Traced(functools.partial(decode, sk.sisa_decode, sk.SisaCache), inputs),
        "forgetting decode": Traced(
            functools.partial(decode, sk.forgetting_decode, sk.TokenCache), gated
        ),
        "reference": Traced(functools.partial(sk.sisa_attention, backend="reference"), inputs),
    }
    bounds = {"cu_seqlens": torch.tensor([0, 10, 10, 50])}
    for function, given, options in (
        (sk.sisa_attention, inputs, {"backend": "auto"}),
        (sk.sisa_attention, inputs, {"backend": "chunked"}),
        (sk.sisa_attention, inputs, {"backend": "one_call"}),
        (sk.sisa_attention, inputs, {"mode": "clamped"}),
        (sk.forgetting_attention, gated, {"backend": "auto"}),
        (sk.forgetting_attention, gated, {"backend": "chunked"}),
        (sk.causal_attention, plain, {"backend": "auto"}),
        (sk.causal_attention, plain, {"backend": "sdpa"}),
    ):
        name = f"{function.__name__} {next(iter(options.values()))}"
        attend = functools.partial(function, **options)
        found[name] = Traced(attend, given)
        found[f"{name} packed"] = Traced(attend, {**given, **bounds})
    return found


def model_of(family: str) -> torch.nn.Module:
    torch.manual_seed(0)
    shape = {"n_layers": 1, "vocab_size": 100, "d_model": 64}
    return sm.build(FAMILIES[family], **shape).requires_grad_(False)


def check_traced(case: Traced) -> None:
    """Shapes by fake tensors; values by what make_fx makes, of any sizes too."""
    right = case.function(**case.inputs)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = case.function(**{name: mode.from_tensor(x) for name, x in case.inputs.items()})
    assert tree_map(lambda x: (x.shape, x.dtype), fake) == tree_map(
        lambda x: (x.shape, x.dtype), right
    )
    for mode in ("real", "symbolic"):
        traced = make_fx(
            lambda inputs: case.function(**inputs), tracing_mode=mode, _allow_non_fake_inputs=True
        )(case.inputs)
        torch.testing.assert_close(traced(case.inputs), right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", cases())
def test_operators_without_values(name):
    check_traced(cases()[name])


@pytest.mark.parametrize("family", FAMILIES)
def test_models_without_values(family):
    check_traced(Traced(model_of(family), {"input_ids": torch.randint(0, 100, (2, L))}))


PACKED = [name for name in cases() if "packed" in name and "one_call" not in name]


@pytest.mark.parametrize("name", PACKED)
def test_a_compiled_call_takes_any_number_of_documents(name):
    """More than Dynamo would compile anew for."""
    torch._dynamo.reset()
    case = cases()[name]
    compiled = torch.compile(case.function, fullgraph=True, backend="eager")
    for count in range(1, torch._dynamo.config.recompile_limit + 4):
        bounds = torch.tensor(sorted({0, *range(1, 4 * count, 4)}))
        inputs = {**case.inputs, "cu_seqlens": bounds}
        torch.testing.assert_close(
            compiled(**inputs), case.function(**inputs), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("mode", ["exact", "clamped"])
def test_compiled_with_shared_heads_of_any_length(mode):
    torch._dynamo.reset()
    compiled = torch.compile(sk.sisa_attention, fullgraph=True, dynamic=True, backend="aot_eager")
    for L, H, G in ((30, 4, 2), (41, 4, 2), (50, 6, 2), (50, 4, 4)):
        inputs, dy = problem(L=L, H=H, G=G, Dh=8, Ds=4)
        found = value_and_grads(compiled, inputs, dy, mode=mode)
        expected = value_and_grads(sk.sisa_attention, inputs, dy, mode=mode)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_compiled_gradients_of_each_sample():
    torch._dynamo.reset()
    inputs, dy = problem(L=20, H=2, Dh=8, Ds=4)
    inputs = {name: x.detach() for name, x in inputs.items()}

    def loss(q):
        return (sk.sisa_attention(**{**inputs, "q": q}) * dy).sum()

    each = torch.vmap(torch.func.grad(loss))
    q = torch.stack((inputs["q"], 0.5 * inputs["q"]))
    compiled = torch.compile(each, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q), each(q), rtol=1e-4, atol=1e-5)


SIZES = {0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("length", min=2, max=512)}


class Packed(torch.nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.options = options

    def forward(self, q, k, v, b, c, log_decay, theta, lam, bounds):
        return sk.sisa_attention(
            q, k, v, b, c, log_decay, theta, lam, cu_seqlens=bounds, **self.options
        )


@pytest.mark.parametrize("mode", ["exact", "clamped"])
def test_exported_operator_of_any_length_and_documents(mode):
    inputs = {name: x.detach() for name, x in problem(L=40, H=4, G=2, Dh=8, Ds=4)[0].items()}
    bounds = torch.tensor([0, 7, 20])
    length = {1: SIZES[1]}
    sizes = (*[length] * 7, None, {0: torch.export.Dim("bounds", min=2, max=64)})
    program = torch.export.export(
        Packed(mode=mode), (*inputs.values(), bounds), dynamic_shapes=sizes
    ).module()
    other = {name: x.detach() for name, x in problem(L=55, H=4, G=2, Dh=8, Ds=4)[0].items()}
    bounds = torch.tensor([0, 7, 7, 20, 50])
    expected = sk.sisa_attention(**other, cu_seqlens=bounds, mode=mode)
    torch.testing.assert_close(program(*other.values(), bounds), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["sisa", "transformer", "fox", "alibi"])
def test_exported_model_of_any_batch_and_length(family):
    model = model_of(family)
    ids = torch.randint(0, 100, (2, 24))
    program = torch.export.export(model, (ids,), dynamic_shapes=(SIZES,)).module()
    for shape in ((3, 40), (1, 9)):
        ids = torch.randint(0, 100, shape)
        torch.testing.assert_close(program(ids), model(ids), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@needs_extension
def test_model_compiled_ahead_of_time(tmp_path):
    """AOTInductor's shared library, loaded and run at another batch and length."""
    model = model_of("sisa")
    program = torch.export.export(model, (torch.randint(0, 100, (2, 24)),), dynamic_shapes=(SIZES,))
    path = torch._inductor.aoti_compile_and_package(
        program, package_path=str(tmp_path / "model.pt2")
    )
    run = torch._inductor.aoti_load_package(path)
    ids = torch.randint(0, 100, (3, 40))
    torch.testing.assert_close(run(ids), model(ids), rtol=1e-4, atol=1e-4)
