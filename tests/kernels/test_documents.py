"""Packed documents on every path: padded bounds, and what is no number in a later token."""

import itertools
import math
from typing import NamedTuple

import pytest
import torch

import sisa_kernels as sk
import sisa_model as sm
from sisa_kernels.paths import dense
from sisa_kernels.testing import forgetting_problem, value_and_grads
from tests.support.attention import needs_extension
from tests.support.augment import rotary_tables
from tests.support.problems import problem

L = 40
# Empty documents first, in the middle and last; one token; tokens past the last bound.
BOUNDS = ([0, 0, 1, 17, 17, 17, 33, 33], [0, 40, 40], [0, 12], [0, 1])


class Path(NamedTuple):
    """A function on a path of it, and the oracle's options."""

    function: object
    options: dict
    exact: dict


def sisa(mode="exact", **options) -> Path:
    return Path(sk.sisa_attention, {"mode": mode, **options}, {"mode": mode})


PATHS = {
    "native": sisa(backend="native"),
    "chunked": sisa(backend="chunked"),
    "chunked-dense": sisa(backend="chunked"),
    "chunked-masked": sisa(backend="chunked"),
    "one_call": sisa(backend="one_call"),
    "clamped": sisa(mode="clamped"),
    "reference": sisa(backend="reference"),
    "triton": sisa(backend="triton"),
    "forgetting-native": Path(sk.forgetting_attention, {"backend": "native"}, {}),
    "forgetting-chunked": Path(sk.forgetting_attention, {"backend": "chunked"}, {}),
    "forgetting-dense": Path(sk.forgetting_attention, {"backend": "chunked"}, {}),
    "forgetting-masked": Path(sk.forgetting_attention, {"backend": "chunked"}, {}),
    "causal-native": Path(sk.causal_attention, {"backend": "native"}, {}),
    "causal-sdpa": Path(sk.causal_attention, {"backend": "sdpa"}, {}),
}
AS_ON_A_GPU = ("dense", "masked")  # without stock flash; documents that are a mask
NAMES = [pytest.param(n, marks=needs_extension if "native" in n else ()) for n in PATHS]


@pytest.fixture(autouse=True)
def as_on_a_gpu(request, monkeypatch):
    """For the paths that say so, what the chunked paths do there, on the CPU; 16 rows at a time."""
    how = request.node.callspec.params.get("name", "").rpartition("-")[2]
    if how in AS_ON_A_GPU:
        monkeypatch.setattr(dense, "has_flash", lambda device: False)
        monkeypatch.setattr(dense, "ROWS", 16)
    if how == "masked":
        monkeypatch.setattr(dense, "apart", lambda bounds, length: [(slice(0, length), bounds)])


def inputs_of(path: Path):
    if path.function is sk.sisa_attention:
        return problem(L=L, H=4, G=2, Dh=16, Ds=4, Dv=16, decay=-2.0)
    inputs, dy = forgetting_problem(L=L, H=4, G=2, Dh=16, decay=-2.0)
    if path.function is sk.causal_attention:
        del inputs["log_forget"]
    return inputs, dy


def oracle_of(path: Path, inputs, dy, rotary):
    """In fp64, of one document."""
    if path.function is sk.sisa_attention:
        return value_and_grads(sk.reference.sisa_attention, inputs, dy, rotary=rotary, **path.exact)
    gates = (
        {}
        if "log_forget" in inputs
        else {"log_forget": torch.zeros(inputs["q"].shape[:3]).double()}
    )
    y, grads = value_and_grads(
        sk.reference.forgetting_attention, {**inputs, **gates}, dy, rotary=rotary
    )
    return y, {name: grads[name] for name in inputs}


def apart(path: Path, inputs, dy, rotary, bounds):
    """Each document by the oracle on its own, and zeros past the last."""
    exact = {name: x.detach().double() for name, x in inputs.items()}
    y = torch.zeros(dy.shape, dtype=torch.float64)
    grads = {name: torch.zeros_like(x) for name, x in exact.items()}
    for start, end in itertools.pairwise(bounds):
        if start == end:
            continue
        rows = slice(start, end)
        own = {name: x if name == "lam" else x[:, rows] for name, x in exact.items()}
        tables = tuple(table[rows] for table in rotary)
        y[:, rows], found = oracle_of(path, own, dy[:, rows].double(), tables)
        for name, grad in found.items():
            if name == "lam":
                grads[name] += grad
            else:
                grads[name][:, rows] = grad
    return y, grads


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_bounds_padded_to_a_static_shape(name, bounds, dtype):
    path = PATHS[name]
    if name == "triton" and not (dtype == torch.int64 and len(bounds) == 8):
        pytest.skip("the interpreter takes seconds: one case")
    inputs, dy = inputs_of(path)
    rotary = rotary_tables(L, 16)
    options = {"rotary": tuple(rotary), "cu_seqlens": torch.tensor(bounds, dtype=dtype)}
    y, grads = value_and_grads(path.function, inputs, dy, **options, **path.options)
    y_ref, grads_ref = apart(path, inputs, dy, rotary, bounds)
    torch.testing.assert_close(y.double(), y_ref, rtol=1e-4, atol=2e-5)
    assert not y[:, bounds[-1] :].any()
    for n, grad in grads.items():
        torch.testing.assert_close(grad.double(), grads_ref[n], rtol=1e-4, atol=2e-5, msg=n)
        assert n == "lam" or not grad[:, bounds[-1] :].any(), n


@pytest.mark.parametrize("name", [name for name in NAMES if name.values != ("triton",)])
def test_without_a_token_in_any_document(name):
    path = PATHS[name]
    inputs, dy = inputs_of(path)
    bounds = torch.tensor([0, 0, 0])
    y, grads = value_and_grads(path.function, inputs, dy, cu_seqlens=bounds, **path.options)
    assert not y.any()
    assert not any(grad.any() for grad in grads.values())


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", [name for name in NAMES if name.values != ("triton",)])
def test_what_is_no_number_reaches_no_earlier_row(name, packed):
    path = PATHS[name]
    inputs, _ = inputs_of(path)
    inputs = {n: x.detach() for n, x in inputs.items()}
    options = dict(path.options)
    if packed:
        options["cu_seqlens"] = torch.tensor([0, 5, 30, 38])
    clean = path.function(**inputs, **options)
    spoilable = {"q", "k", "v", "b", "c", "theta"} & inputs.keys()
    if packed and name == "chunked-masked":
        spoilable -= {"theta"}  # whose running sum is one over all documents
    for n in spoilable:
        for bad in (math.nan, math.inf, -math.inf):
            spoiled = inputs[n].clone()
            spoiled[:, 20] = bad
            y = path.function(**{**inputs, n: spoiled}, **options)
            torch.testing.assert_close(y[:, :20], clean[:, :20], rtol=1e-6, atol=1e-6, msg=n)
            assert not y[:, 20].isfinite().any()
            if packed:
                torch.testing.assert_close(y[:, 30:], clean[:, 30:], rtol=1e-6, atol=1e-6, msg=n)


@pytest.mark.parametrize(
    "preset", ["sisa-tiny-ds16", "transformer-tiny", "fox-tiny", "alibi-tiny", "mamba2-tiny"]
)
def test_models_take_padded_bounds(preset):
    torch.manual_seed(0)
    model = sm.build(preset, n_layers=2, vocab_size=50)
    ids = torch.randint(0, 50, (1, L))
    bounds = [0, 0, 17, 17, 30, 30]
    found = model(ids, torch.tensor(bounds))
    assert torch.equal(model(ids, bounds), found)
    for rows in (slice(0, 17), slice(17, 30)):
        torch.testing.assert_close(found[:, rows], model(ids[:, rows]), rtol=1e-4, atol=1e-4)
    found[:, :30].sum().backward()
    grads = [x.grad.clone() for x in model.parameters()]
    model.zero_grad()
    sum(model(ids[:, rows]).sum() for rows in (slice(0, 17), slice(17, 30))).backward()
    for grad, x in zip(grads, model.parameters()):
        torch.testing.assert_close(grad, x.grad, rtol=1e-3, atol=1e-4)
