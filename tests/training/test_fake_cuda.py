"""Training steps on a CUDA device that does nothing: no wait for it, products of aligned rows."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support import ROOT

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
    pytest.mark.skipif(
        torch.backends.cuda.is_built(), reason="PyTorch has CUDA devices of its own"
    ),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What the worker says of each of its cases."""
    library = tmp_path_factory.mktemp("device") / "no_device.so"
    home = Path(torch.__file__).parent
    command = ["g++", "-std=c++20", "-O0", "-fPIC", "-shared", f"-I{home / 'include'}"]
    command += [str(ROOT / "tests" / "cuda_host" / "no_device.cpp"), "-o", str(library)]
    command += [f"-L{home / 'lib'}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{home / 'lib'}"]
    subprocess.run(command, check=True)
    environment = {**os.environ, "LD_PRELOAD": str(library), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.training.fake_cuda_worker"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def test_no_step_waits_for_the_device(found):
    """Steps of every family, packed and not; the code around Triton's kernels; dense scores."""
    steps = [row for row in found if not row["case"].startswith("read")]
    assert len(steps) == 33
    assert {row["case"]: row["wait"] for row in steps if row["wait"]} == {}


def test_a_wait_would_have_been_seen(found):
    reads = [row for row in found if row["case"].startswith("read")]
    assert len(reads) == 5
    assert all(row["wait"] for row in reads)


def test_rows_of_every_product_of_a_layer_and_the_loss_are_aligned(found):
    """To 16 bytes; three products a matrix: four matrices, a Mamba's two, and the output's."""
    sizes = ("50m", "152m", "369m")
    layers = [row for row in found if any(size in row["case"] for size in sizes)]
    assert len(layers) == 7
    for row in layers:
        assert row["products"] == (9 if "mamba" in row["case"] else 15), row
        assert not row["odd"], row
