"""Fixtures for every test: fresh memory is poisoned, threads are two; texts to train on."""

import os
import sys

import pytest
import torch
import torch.utils._device

from tests.support import ROOT

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported
# `with torch.device(...)` knows its allocators by identity from the first use on: look once before
# they are replaced below.
torch.utils._device._device_constructors()
PACKAGES = tuple(str(ROOT / name) for name in ("sisa_kernels", "sisa_model"))


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Fill what the packages allocate with NaN: an element nobody writes is no result."""

    def poison(function):
        def allocate(*args, **kwargs):
            x = function(*args, **kwargs)
            caller = sys._getframe(1).f_code.co_filename
            if caller.startswith(PACKAGES) and x.is_floating_point() and x.device.type != "meta":
                x.fill_(torch.nan)
            return x

        return allocate

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))


@pytest.fixture(autouse=True, scope="session")
def products_of_the_interpreter():
    """Let Triton's interpreter multiply as PyTorch does, whose error a kernel's is held to: numpy's
    rounding depends on the processor, and is up to 5 times worse.
    """
    try:
        from triton.runtime import interpreter
    except ImportError:
        yield
        return

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        product = torch.from_numpy(a.data).float() @ torch.from_numpy(b.data).float()
        return interpreter.TensorHandle(product.numpy() + d.data, d.dtype.scalar)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
        yield


@pytest.fixture(autouse=True)
def two_threads():
    torch.set_num_threads(2)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A folder of sixty short texts, enough for files to be held out."""
    folder = tmp_path_factory.mktemp("corpus")
    for n in range(60):
        (folder / f"{n}.txt").write_text(
            f"{n} " + "the quick brown fox jumps over the lazy dog; " * (10 + n % 7)
        )
    return folder


@pytest.fixture
def text(tmp_path):
    """A text file of two thousand short sentences."""
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{n} green bottles on the wall; " for n in range(2000)))
    return path
