"""backend="one_call": the table of stock kernels, every row that runs here, and wrong kernels."""

import contextlib
import functools
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import sisa_kernels as sk
from sisa_kernels import selfcheck
from sisa_kernels.inputs import SisaInputs
from sisa_kernels.paths import one_call
from sisa_kernels.paths.one_call import Call, Kernel
from sisa_kernels.testing import in_fp64, oracle, relative, value_and_grads
from tests.support import ROOT
from tests.support.problems import problem

HOPPER, AMPERE, ADA, BLACKWELL, TURING = (9, 0), (8, 0), (8, 9), (10, 0), (7, 5)
CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


def call(capability=HOPPER, dtype=torch.bfloat16, width=80, value_width=64, **facts):
    return Call(CUDA, capability, dtype, facts.pop("length", 2048), width, value_width, **facts)


# What is asked -> the row that runs it and the widths it is padded to.
EXPECTED = [
    (call(), "cudnn", (80, 64)),
    (call(width=96), "cudnn", (96, 64)),
    (call(width=128, value_width=63), "cudnn", (128, 64)),
    (call(width=192), "cudnn", (192, 128)),
    (call(width=144, value_width=128), "cudnn", (192, 128)),
    (call(width=256), "flash", (256, 256)),
    (call(deterministic=True), "flash", (80, 80)),
    (call(length=1), "flash", (80, 80)),
    (call(BLACKWELL, width=66), "cudnn", (72, 64)),
    (call(BLACKWELL, width=192), "cudnn", (192, 128)),
    (call(AMPERE), "flash", (80, 80)),
    (call(AMPERE, width=256), "flash", (256, 256)),
    (call(ADA, width=192), "flash", (192, 192)),
    (call(ADA, width=256), "efficient", (256, 64)),
    (call(ADA, width=256, grad=False), "flash", (256, 256)),
    (call((12, 0), width=200), "efficient", (200, 64)),
    (call(width=320), "efficient", (320, 64)),
    (call(width=320, deterministic=True), "math", (320, 64)),
    (call(dtype=torch.float32, width=66, value_width=63), "efficient", (68, 64)),
    (call(dtype=torch.float64), "math", (80, 64)),
    (call(TURING, dtype=torch.float16), "efficient", (80, 64)),
    (replace(call(), device=CPU, capability=(0, 0)), "cpu", (80, 80)),
    (replace(call(value_width=100), device=CPU, capability=(0, 0)), "cpu", (100, 100)),
    (replace(call(), device=torch.device("meta"), capability=(0, 0)), "math", (80, 64)),
]


@pytest.mark.parametrize(
    ("asked", "name", "widths"), EXPECTED, ids=lambda x: x if isinstance(x, str) else None
)
def test_the_table(monkeypatch, asked, name, widths):
    monkeypatch.setattr(selfcheck, "possible", lambda device: False)
    monkeypatch.setattr(one_call, "_installed", lambda module: False)
    kernel, found = one_call.choose(asked, "clamped", 64, asked.dtype)
    assert (kernel.name, found) == (name, widths)
    assert len({row.name for row in one_call.TABLE}) == len(one_call.TABLE)
    assert all(len(row.reason) > 20 for row in one_call.TABLE)


def test_the_table_with_the_flash_attn_packages(monkeypatch):
    """4 where cuDNN cannot run, exact widths on Hopper; 2 in place of PyTorch's own copy."""
    monkeypatch.setattr(selfcheck, "possible", lambda device: False)
    monkeypatch.setattr(one_call, "_installed", lambda module: True)

    def chosen(asked):
        kernel, widths = one_call.choose(asked, "clamped", 64, asked.dtype)
        return kernel.name, widths

    assert chosen(call()) == ("cudnn", (80, 64))
    assert chosen(call(width=256)) == ("flash-attn-4", (256, 64))
    assert chosen(call(width=256, grouped=True)) == ("flash-attn-4", (256, 256))
    assert chosen(call(width=256, grouped=True, grad=False)) == ("flash-attn-4", (256, 64))
    assert chosen(call(BLACKWELL, width=200)) == ("flash-attn-2", (200, 200))
    assert chosen(call(deterministic=True)) == ("flash-attn-2", (80, 80))
    assert chosen(call(AMPERE)) == ("flash-attn-2", (80, 80))
    states = one_call.state(call(AMPERE))
    assert states["cudnn"] == "it needs compute capability 9.x or 10.x, this is 8.0"
    assert states["flash"] == "available"


@pytest.mark.parametrize("name", ["cpu", "math"])
@pytest.mark.parametrize("mode", ["exact", "clamped"])
def test_every_row_that_runs_here(name, mode):
    kernel = next(row for row in one_call.TABLE if row.name == name)
    inputs, dy = problem(L=257, H=4, G=2, Dh=32, Ds=16, Dv=80, decay=-4.0)

    def attend(**x):
        return one_call.one_call(SisaInputs(**x), mode, kernel)

    y, grads = value_and_grads(attend, inputs, dy)
    y_ref, grads_ref = oracle(inputs, dy, mode=mode)
    assert relative(y, y_ref) <= 5e-6
    assert max(relative(grads[name], grads_ref[name]) for name in grads) <= 2e-5


def test_a_row_that_is_not_legal_is_refused_before_any_work():
    kernel = next(row for row in one_call.TABLE if row.name == "cudnn")
    inputs, _ = problem(L=16)
    with pytest.raises(
        ValueError, match="kernel 'cudnn' of backend 'one_call' needs a CUDA device"
    ):
        one_call.one_call(SisaInputs(**inputs), "clamped", kernel)


def checked():
    """The kernels of this path of which a verdict is known."""
    return [path for path, *_ in selfcheck._verdicts if path != "augment"]


def wrong_by_a_hundredth(q, k, v, scale, deterministic):
    return 1.01 * one_call.TABLE[-1].attend(q, k, v, scale, deterministic)


def raises(q, k, v, scale, deterministic):
    raise RuntimeError("no kernel image")


def test_a_wrong_kernel_is_out_for_the_process_and_said_once(monkeypatch):
    rows = [
        Kernel(name, "broken for the test", lambda call: (100, 100), f)
        for name, f in (("crooked", wrong_by_a_hundredth), ("absent", raises))
    ]
    monkeypatch.setattr(one_call, "TABLE", (*rows, *one_call.TABLE))
    inputs, _ = problem(L=63, decay=-4.0)
    attend = functools.partial(sk.sisa_attention, mode="clamped")
    y_ref = sk.reference.sisa_attention(**in_fp64(inputs))
    with pytest.warns(UserWarning, match="backend 'one_call' leaves its kernel") as told:
        y = attend(**inputs)
    assert relative(y, y_ref) <= 5e-6
    said = [str(w.message) for w in told]
    assert len(said) == 2
    assert "'crooked' out and runs 'cpu': on a small problem (Dh 64, Ds 16, Dv 64, " in said[0]
    assert "relative error of y by 1.0e-02" in said[0]
    assert said[1].endswith("it fails on cpu: RuntimeError: no kernel image")
    assert torch.equal(attend(**inputs), y), "and not said again: a warning here would be an error"
    with Recorder() as recorder:
        assert torch.equal(attend(**inputs), y), "where no check may run, what is known still holds"
    assert recorder.names.count("aten::_scaled_dot_product_flash_attention_for_cpu") == 1
    compiled = torch.compile(attend, fullgraph=True)
    torch.testing.assert_close(compiled(**inputs), y)
    # Of widths for which nothing was checked: the first legal row, unchecked.
    other, _ = problem(L=63, Dh=32, decay=-4.0)
    assert relative(compiled(**other), sk.reference.sisa_attention(**in_fp64(other))) > 5e-3


@pytest.mark.parametrize(
    "context", [torch.inference_mode, torch.no_grad, lambda: torch.autocast("cpu", torch.bfloat16)]
)
def test_a_first_use_within(context):
    """The check makes gradients of its own: a right path passes (a warning would be an error)."""
    selfcheck._verdicts.clear()
    inputs, _ = problem(L=64, Dh=24)
    with context():
        y = sk.sisa_attention(**inputs, backend="one_call")
    assert checked() == ["cpu"]
    assert relative(y, sk.reference.sisa_attention(**in_fp64(inputs))) <= 5e-6


@pytest.mark.parametrize("backend", ["one_call", "chunked"])
@pytest.mark.parametrize(
    "context", [lambda: torch.device("meta"), lambda: default_dtype(torch.float64)]
)
def test_a_first_use_under_other_defaults(context, backend):
    """The default device and dtype are not the problem's (a warning here would be an error)."""
    selfcheck._verdicts.clear()
    inputs, _ = problem(L=64, Dh=24)
    y_ref = sk.reference.sisa_attention(**in_fp64(inputs))
    with context():
        y = sk.sisa_attention(**inputs, backend=backend)
    assert relative(y, y_ref) <= 5e-6


@contextlib.contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(torch.float32)


def test_a_first_use_under_an_activation_checkpoint():
    selfcheck._verdicts.clear()
    inputs, dy = problem(L=64, Dh=24)
    expected = value_and_grads(sk.reference.sisa_attention, inputs, dy)[1]
    attend = functools.partial(sk.sisa_attention, backend="one_call")
    y = checkpoint(attend, *inputs.values(), use_reentrant=False)
    assert checked() == ["cpu"]
    grads = torch.autograd.grad(y, list(inputs.values()), dy)
    assert max(relative(grad, right) for grad, right in zip(grads, expected.values())) <= 2e-5


def test_a_kernel_for_inference_alone_is_checked_without_its_backward(monkeypatch):
    def legal(call):
        return "has no backward" if call.grad else (80, 80)

    row = Kernel("forward", "for the test", legal, one_call.TABLE[0].attend)
    monkeypatch.setattr(one_call, "TABLE", (row, *one_call.TABLE))
    inputs, _ = problem(L=63)
    with torch.no_grad():  # a warning that it is left out would be an error
        sk.sisa_attention(**inputs, backend="one_call")
    asked = Call(CPU, (0, 0), torch.float32, 63, 80, 64, grad=False)
    assert one_call.choose(asked, "exact", 64, torch.float32)[0] is row


class Recorder(TorchDispatchMode):
    """Names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_a_check_is_no_part_of_an_observed_call():
    """Under a dispatch mode, a FLOP counter say, nothing is checked: it sees the call alone."""
    inputs, _ = problem(L=64, Dh=48)
    with Recorder() as recorder:
        sk.sisa_attention(**inputs, mode="clamped")
    assert recorder.names.count("aten::_scaled_dot_product_flash_attention_for_cpu") == 1
    assert recorder.names.count("sisa::augment") == 1


BROKEN = """
import warnings
import torch
import sisa_kernels as sk
from sisa_kernels.inputs import SisaInputs
from sisa_kernels.paths.augment import augment_eager
from sisa_kernels.testing import oracle, problem, relative_errors, value_and_grads
calls = []
def broken(*x):
    calls.append(1)
    q_aug, k_aug = augment_eager(*x)
    return q_aug, 1.001 * k_aug
warnings.simplefilter("ignore")
library = torch.library.Library("sisa", "FRAGMENT")
library.impl("augment", broken, "CPU", allow_override=True)
dtypes = torch.float32, torch.bfloat16
compiled = torch.compile(sk.sisa_attention, fullgraph=True)
small, _ = problem(L=63, decay=-4.0)
before = compiled(**small._asdict(), mode="clamped").detach()
assert calls == [1]
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    for dtype in dtypes:
        inputs, dy = problem(L=63, decay=-4.0, dtype=dtype)
        for mode in ("exact", "clamped"):
            found = value_and_grads(sk.sisa_attention, inputs, dy, mode=mode)
            errors = relative_errors(found, oracle(inputs, dy, mode=mode))
            limit = 5e-6 if dtype == torch.float32 else 1e-2
            assert max(errors.values()) <= 4 * limit, errors
assert calls == [1, 1], calls
right = sk.sisa_attention(**small._asdict(), mode="clamped").detach()
after = compiled(**small._asdict(), mode="clamped").detach()
assert (before - right).norm() > 1e-5 * right.norm()
torch.testing.assert_close(after, right)
print("\\n".join(str(w.message) for w in told if "augmentation" in str(w.message)))
"""


@pytest.mark.skipif(sk.backends()["extension"] != "available", reason="the extension is not built")
def test_a_wrong_augmentation_is_out_for_the_process_and_said_once():
    """Also for a call that was compiled before anything was known."""
    command = [sys.executable, "-c", BROKEN]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert len(said) == 1, said
    assert said[0].startswith(
        "the compiled augmentation is out on cpu, and plain PyTorch runs instead: off by 1.0e-03"
    )


@pytest.mark.parametrize("backend", ["auto", "chunked"])
def test_a_first_eager_use_compiles_nothing_anew(backend):
    """As a validation in eager mode beside a compiled training step."""
    selfcheck._verdicts.clear()
    inputs, _ = problem(L=64, Dh=24)
    compiled = torch.compile(functools.partial(sk.sisa_attention, backend=backend), fullgraph=True)
    compiled(**inputs)
    sk.sisa_attention(**inputs, backend=backend)
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled(**inputs)


def test_the_table_is_shown():
    shown = sk.backends(table=True)
    assert list(shown)[5:] == [f"flash/{row.name}" for row in one_call.TABLE]
    if not torch.cuda.is_available():
        assert shown["flash/cpu"] == "available"
        assert shown["flash/efficient"] == "it needs a CUDA device"


@pytest.mark.gpu
@pytest.mark.parametrize("grouped", [False, True], ids=["", "grouped"])
@pytest.mark.parametrize("Ds", [16, 32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_legal_row_on_the_gpu(dtype, Ds, grouped):
    """Each row against the oracle on its own; its CPU twins are the rows that run above."""
    device = torch.device("cuda", torch.cuda.current_device())
    asked = Call(device, one_call.capability(device), dtype, 257, 64 + Ds, 64, grouped)
    legal = [row for row in one_call.TABLE if not isinstance(row.legal(asked), str)]
    assert legal[-1].name == "math"
    faults = {row.name: one_call.kernel_fault(row, asked, "clamped", 64, dtype) for row in legal}
    assert not any(faults.values()), faults
