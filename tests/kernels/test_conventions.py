"""What operators share with PyTorch's own: autocast, layouts, dtypes, imports, environment."""

import contextlib
import os
import shutil
import subprocess
import sys

import pytest
import torch

import sisa_kernels as sk
import sisa_model as sm
from sisa_kernels import _extension, selfcheck
from sisa_kernels.inputs import SisaInputs
from sisa_kernels.ops import matmul
from sisa_kernels.paths import one_call
from sisa_kernels.testing import (
    forgetting_problem,
    in_fp64,
    relative,
    relative_errors,
    value_and_grads,
)
from sisa_model.models.linear import linear
from sisa_model.models.scan import decayed_scan
from sisa_model.training.loss import Objective, linear_cross_entropy
from tests.support import ROOT
from tests.support.attention import first_use, needs_extension
from tests.support.problems import problem

SHAPE = {"B": 2, "L": 12, "H": 4, "G": 2, "Dh": 16}
CAST = ("q", "k", "v", "b", "c")


def operators():
    """(function, inputs) of every operator."""
    inputs = {name: x.detach() for name, x in problem(Ds=4, **SHAPE)[0].items()}
    gated = {name: x.detach() for name, x in forgetting_problem(**SHAPE)[0].items()}

    def decode(**x):
        with torch.no_grad():
            return sk.sisa_decode(**x, cache=sk.SisaCache(2))

    def forgetting_decode(**x):
        with torch.no_grad():
            return sk.forgetting_decode(**x, cache=sk.TokenCache(2))

    return {
        "sisa": (sk.sisa_attention, inputs),
        "clamped": (lambda **x: sk.sisa_attention(**x, mode="clamped"), inputs),
        "augment": (sk.augment_qk, {n: x for n, x in inputs.items() if n != "v"}),
        "decode": (decode, inputs),
        "forgetting": (sk.forgetting_attention, gated),
        "forgetting decode": (forgetting_decode, gated),
        "causal": (sk.causal_attention, {n: gated[n] for n in ("q", "k", "v")}),
    }


@pytest.mark.parametrize("name", operators())
def test_mixed_dtypes_under_autocast_are_cast_as_sdpa_casts_them(name):
    """q .. c to autocast's dtype; log_decay, theta and lam stay fp32."""
    function, inputs = operators()[name]
    mixed = {**inputs, "k": inputs["k"].bfloat16()}
    with pytest.raises(TypeError, match=r"k must be torch.float32, got torch.bfloat16: k.to\("):
        function(**mixed)
    cast = {n: x.bfloat16() if n in CAST else x for n, x in inputs.items()}
    expected = function(**cast)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(function(**mixed), expected, rtol=0, atol=0)
        whole = function(**inputs)  # of one dtype: as it is
    torch.testing.assert_close(whole, function(**inputs), rtol=0, atol=0)
    narrow = next((n for n in ("log_decay", "log_forget") if n in inputs), None)
    if narrow is not None:
        said = rf"{narrow} must be torch.float32, got torch.bfloat16: {narrow}.to\(torch.float32\)"
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match=said):
            function(**{**inputs, narrow: inputs[narrow].bfloat16()})


def test_gradients_of_mixed_dtypes_keep_their_dtypes():
    inputs, dy = problem(Ds=4, **SHAPE)
    inputs["k"] = inputs["k"].detach().bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        _, grads = value_and_grads(sk.sisa_attention, inputs, dy.bfloat16())
    assert {n: x.dtype for n, x in grads.items()} == {n: x.dtype for n, x in inputs.items()}


def paths():
    """(function, inputs) of every path that has a gradient, of one dtype."""
    inputs = {name: x.detach() for name, x in problem(Ds=4, **SHAPE)[0].items()}
    gated = {name: x.detach() for name, x in forgetting_problem(**SHAPE)[0].items()}
    plain = {name: gated[name] for name in ("q", "k", "v")}

    def by(function, **options):
        return lambda **x: function(**x, **options)

    def row(name):
        kernel = next(kernel for kernel in one_call.TABLE if kernel.name == name)
        return lambda **x: one_call.one_call(SisaInputs(**x), "exact", kernel)

    def by_triton(**x):
        return pytest.importorskip("sisa_kernels.triton.op").causal_attention(**x)

    def augmented(v, **x):
        return torch.cat(sk.augment_qk(**x), 2)

    sisa = ["native", "chunked", "one_call", "triton", "reference"]
    return {
        **{f"sisa {name}": (by(sk.sisa_attention, backend=name), inputs) for name in sisa},
        **{f"one_call {name}": (row(name), inputs) for name in ("cpu", "math")},
        "clamped": (by(sk.sisa_attention, mode="clamped"), inputs),
        "augment": (augmented, inputs),
        "forgetting native": (by(sk.forgetting_attention, backend="native"), gated),
        "forgetting chunked": (by(sk.forgetting_attention, backend="chunked"), gated),
        "causal native": (by(sk.causal_attention, backend="native"), plain),
        "causal sdpa": (by(sk.causal_attention, backend="sdpa"), plain),
        "causal triton": (by_triton, plain),
    }


def gradients(leaves, forward, inside, autocast=True):
    """Those of ``forward()``, with autocast on in it; ``inside``: in the backward, too."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = forward()
    with torch.autocast("cpu", torch.bfloat16, enabled=inside):
        return torch.autograd.grad(y, leaves, torch.ones_like(y))


@pytest.mark.parametrize(
    ("name", "dense"),
    [*((name, False) for name in paths()), ("sisa chunked", True), ("forgetting chunked", True)],
)
def test_a_backward_inside_autocast_has_the_gradients_of_one_outside(monkeypatch, name, dense):
    """``dense``: as where stock flash attention takes not every width."""
    if "native" in name and not _extension.LOADED:
        pytest.skip("needs the library")
    if dense:
        monkeypatch.setattr("sisa_kernels.paths.dense.has_flash", lambda device: False)
    function, inputs = paths()[name]
    leaves = {n: x.clone().requires_grad_() for n, x in inputs.items()}
    wanted = [x for n, x in leaves.items() if (name, n) != ("augment", "v")]
    outside, inside = (
        gradients(wanted, lambda: function(**leaves), where) for where in (False, True)
    )
    assert all(torch.equal(*pair) for pair in zip(outside, inside))


FAMILIES = [
    "sisa-tiny-ds16",
    "transformer-tiny",
    "fox-tiny",
    "alibi-tiny",
    "mamba2-tiny",
    "mamba3-tiny",
]


@pytest.mark.parametrize("preset", FAMILIES)
def test_so_has_a_models_loss(preset):
    torch.manual_seed(0)
    model = sm.build(preset, n_layers=2, vocab_size=50)
    ids = torch.randint(0, 50, (2, 80))
    objective = Objective(model, contextlib.nullcontext())
    outside, inside = (
        gradients([*model.parameters()], lambda: objective(ids[:, :-1], ids[:, 1:]), where)
        for where in (False, True)
    )
    assert all(torch.equal(*pair) for pair in zip(outside, inside))


def test_so_have_products_and_layers_of_fp32():
    """Whose forward, too, was outside; PyTorch's own linear layers follow the autocast there."""
    torch.manual_seed(0)
    x = torch.randn(2, 70, 3, 20, requires_grad=True)
    log_decay = -torch.rand(2, 70, 3)
    weight = torch.randn(37, 20, requires_grad=True)
    functions = {
        "scan": lambda: decayed_scan(x, x, x, log_decay, torch.zeros(2, 3, 20, 20))[0],
        "linear": lambda: linear(x, weight),
        "loss": lambda: linear_cross_entropy(x, weight, torch.arange(420).view(2, 70, 3) % 37),
    }
    for name, function in functions.items():
        outside, inside = (
            gradients([x], function, where, autocast=False) for where in (False, True)
        )
        assert torch.equal(outside[0], inside[0]), name


def test_the_product_of_the_scans_is_twice_differentiable():
    a, b = (torch.randn(shape, dtype=torch.float64) for shape in ((2, 3, 4), (2, 4, 5)))
    assert torch.autograd.gradgradcheck(matmul, (a.requires_grad_(), b.requires_grad_()))
    vmapped = torch.func.vmap(torch.func.grad(lambda a, b: matmul(a, b).sum()))(a, b)
    torch.testing.assert_close(vmapped, b.sum(2)[:, None].expand_as(a))


@pytest.mark.parametrize("preset", FAMILIES)
def test_a_model_cast_to_bf16_runs_and_trains(preset):
    torch.manual_seed(0)
    model = sm.build(preset, n_layers=2, vocab_size=50)
    ids = torch.randint(0, 50, (2, 20))
    expected = model(ids)
    logits = model.bfloat16()(ids)
    assert logits.dtype == torch.bfloat16
    assert relative(logits, expected.double()) < 0.05
    logits.float().logsumexp(-1).sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in model.parameters())


def by_sdpa(x):
    return x.transpose(1, 2)


@pytest.mark.parametrize("name", operators())
def test_the_layout_of_sdpa_is_asked_about(name):
    """Where q, k, v .. are [batch, heads, length, channels] and the others are right."""
    function, inputs = operators()[name]
    wrong = {n: by_sdpa(x) if n in CAST else x for n, x in inputs.items()}
    asked = r"\[batch, heads, length, channels\], the layout of scaled_dot_product_attention\?"
    with pytest.raises(ValueError, match=asked):
        function(**wrong)
    with pytest.raises(ValueError, match=asked):
        function(**{**inputs, "k": by_sdpa(inputs["k"])})


def test_the_layout_of_sdpa_is_asked_about_by_tables_documents_and_counts(monkeypatch):
    asked = "the layout of scaled_dot_product_attention"
    q = torch.randn(1, 4, 40, 16)
    tables = torch.ones(40, 8), torch.zeros(40, 8)
    with pytest.raises(ValueError, match=asked):
        sk.causal_attention(q, q, q, rotary=tables)
    with pytest.raises(ValueError, match=asked):
        sk.causal_attention(q, q, q, cu_seqlens=torch.tensor([0, 12, 40]))
    many = torch.randn(1, 4, 300, 16)
    with first_use(monkeypatch), pytest.warns(UserWarning, match=f"4 tokens of 300 heads.*{asked}"):
        sk.forgetting_attention(many, many, many, torch.zeros(1, 4, 300))


@pytest.mark.parametrize(
    "options", [{"backend": "chunked"}, {"mode": "clamped"}, {"backend": "one_call"}]
)
def test_fp64_beside_fp32_decay_phases_and_lam(options):
    inputs, dy = problem(L=60, H=4, G=2, Dh=8, Ds=4, decay=-3.0, theta=2.0, dtype=torch.float64)
    narrow = {n: inputs[n].detach().float() for n in ("log_decay", "theta", "lam")}
    inputs = {**inputs, **narrow}
    found = value_and_grads(sk.sisa_attention, inputs, dy, **options)
    mode = {"mode": options.get("mode", "exact")}
    right = value_and_grads(sk.reference.sisa_attention, in_fp64(inputs), dy, **mode)
    errors = relative_errors(found, right)
    assert max(errors[n] for n in ("y", *CAST)) <= 1e-11, errors
    assert max(errors[n] for n in narrow) <= 2e-7, errors  # rounded to fp32


def test_the_self_check_agrees_in_fp64(monkeypatch):
    inputs, _ = problem(L=20, H=2, Dh=8, Ds=4, dtype=torch.float64)
    with first_use(monkeypatch):
        sk.sisa_attention(**inputs, backend="one_call")
        assert selfcheck._verdicts
        assert not any(selfcheck._verdicts.values())


def test_an_empty_variable_is_unset(monkeypatch):
    inputs, _ = problem(L=20, H=2, Dh=16)
    y = sk.sisa_attention(**inputs)
    monkeypatch.setenv("SISA_BACKEND", "")
    assert torch.equal(sk.sisa_attention(**inputs), y)
    with pytest.raises(ValueError, match="backend must be one of"):
        sk.sisa_attention(**inputs, backend="fast")
    names = ("SISA_BACKEND", "SISA_EXTENSION", "SISA_CPU_ISA")
    environment = {**os.environ, **dict.fromkeys(names, "")}
    script = "from sisa_kernels import _extension; print(_extension.STATE)"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == _extension.STATE


AGAIN = """
import gc, importlib, sys, warnings
warnings.simplefilter("error")
import torch
import sisa_kernels as sk
from sisa_kernels.testing import problem
inputs, dy = problem(L=20, H=2, Dh=16)
first = sk.sisa_attention(**inputs._asdict())
old = sk.sisa_attention
assert importlib.reload(sk) is sk
for name in [name for name in sys.modules if name.startswith("sisa_kernels")]:
    del sys.modules[name]
import sisa_kernels as again
gc.collect()
assert again.sisa_attention is not old
for function in (again.sisa_attention, old):
    y = function(**inputs._asdict())
    assert torch.equal(y, first)
    y.sum().backward()
torch.func.grad(lambda q: again.sisa_attention(**inputs._replace(q=q)._asdict()).sum())(
    inputs.q.detach())
assert again.backends() == sk.backends()
"""


def run(script: str, folder, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


@needs_extension
def test_a_second_import():
    done = run(AGAIN, ROOT)
    assert done.returncode == 0, done.stderr


BESIDE = """
import sys
import sisa_kernels
from sisa_kernels import _extension
assert _extension.LOADED
for name in [name for name in sys.modules if name.startswith("sisa_kernels")]:
    del sys.modules[name]
sys.path.insert(0, sys.argv[1])
import sisa_kernels as sk
from sisa_kernels import _extension
from sisa_kernels.testing import problem
assert _extension.LIBRARY.parent.parent.samefile(sys.argv[1])
sk.sisa_attention(**problem(L=20, H=2, Dh=16)[0]._asdict())
print(sk.backends()["extension"])
"""


@needs_extension
def test_the_library_of_another_checkout_is_not_taken_in_silence(tmp_path):
    shutil.copytree(
        ROOT / "sisa_kernels", tmp_path / "sisa_kernels", ignore=shutil.ignore_patterns("*.so")
    )
    done = run(BESIDE, ROOT, str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "not loaded beside that of another copy" in done.stdout
    assert "runs in plain PyTorch, slower" in done.stderr
