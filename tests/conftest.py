"""Fixtures for every test: fresh memory is poisoned, threads are two; texts to train on."""

import importlib.util
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
def interpreter_computes_as_a_gpu():
    """Triton's interpreter multiplies as PyTorch does, and takes bf16 (tests/support)."""
    if importlib.util.find_spec("triton") is None:
        yield
        return
    from tests.support import interpreter

    with pytest.MonkeyPatch.context() as patch:
        interpreter.patch(patch)
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
