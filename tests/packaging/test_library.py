"""The compiled library: what it is bound to, which instructions run, and how it is built or not."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sisa_kernels import _extension
from tests.support import ROOT

needs_library = pytest.mark.skipif(
    not _extension.LOADED, reason=f"the library is {_extension.STATE}"
)
needs_compiler = pytest.mark.skipif(not shutil.which("c++"), reason="there is no C++ compiler")

STATE = "import sisa_kernels as sk; print(sk.backends()['extension'])"
ERROR = """
import sisa_kernels as sk
from sisa_kernels import _extension
from sisa_kernels.testing import oracle, problem, relative_errors, value_and_grads
inputs, dy = problem(L=300, decay=-3.0)
errors = relative_errors(value_and_grads(sk.sisa_attention, inputs, dy), oracle(inputs, dy))
print(_extension.RECORD["isa"], max(errors.values()))
"""


def run(code, cwd=ROOT, **environment):
    """What a Python process prints, warnings and all, and its exit status."""
    command = [sys.executable, "-W", "always", "-c", code]
    env = {**os.environ, **environment}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    return done.stdout + done.stderr, done.returncode


@needs_library
@pytest.mark.skipif(not shutil.which("objdump"), reason="binutils are not installed")
def test_it_is_bound_to_the_stable_interface_and_every_instruction_is_in_its_namespace():
    command = [sys.executable, str(ROOT / "tools" / "check_library.py")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_library
@pytest.mark.parametrize(
    "isa",  # the best one is what all other tests run on
    [pytest.param(x, marks=pytest.mark.slow if "512" in x else ()) for x in _extension.ISAS],
)
def test_every_instruction_set_is_right(isa):
    """Each that this CPU runs; of one that it lacks, which it runs at most."""
    best = run("from sisa_kernels import _extension; print(_extension.RECORD['isa'])")[0].strip()
    said, status = run(ERROR, SISA_CPU_ISA=isa)
    if _extension.ISAS.index(isa) > _extension.ISAS.index(best):
        assert status
        assert f"SISA_CPU_ISA={isa}: this CPU runs {best} at most" in said
        return
    ran, error = said.split()
    assert ran == isa
    assert float(error) < 1e-5


def test_an_unknown_instruction_set_is_refused():
    if not _extension.LOADED:
        pytest.skip(f"the library is {_extension.STATE}")
    said, status = run(STATE, SISA_CPU_ISA="sse9")
    assert status
    assert "SISA_CPU_ISA must be one of default, avx2, avx512, avx512_bf16, got 'sse9'" in said


def test_switched_off_it_is_silent():
    assert run(STATE, SISA_EXTENSION="0") == ("switched off by SISA_EXTENSION=0\n", 0)


def copied_package(folder):
    """The operators' package and the sources of its library, as in a checkout."""
    for name in ("sisa_kernels", "csrc"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@needs_library
def test_of_other_sources_it_is_not_loaded_and_that_is_said_once(tmp_path):
    folder = copied_package(tmp_path / "check out")
    assert run(STATE, cwd=folder, PYTHONPATH=str(folder)) == ("available\n", 0)
    with (folder / "csrc" / "sisa.h").open("a") as header:
        header.write("// newer\n")
    said, status = run(STATE, cwd=folder, PYTHONPATH=str(folder))
    assert status == 0
    assert said.count("built from other sources than those in csrc. To build it: pip install") == 1


@needs_library
def test_where_it_cannot_be_loaded_the_advice_fits_the_installation(tmp_path):
    folder = copied_package(tmp_path)
    shutil.rmtree(folder / "csrc")
    (folder / "sisa_kernels" / "libsisa.so").write_bytes(b"not a library")
    said, status = run(STATE, cwd=folder, PYTHONPATH=str(folder))
    assert status == 0
    assert "cannot be loaded beside torch" in said
    assert "pip install --force-reinstall --no-deps --no-cache-dir sisa-attention" in said


# ---- setup.py ------------------------------------------------------------------------------------


@pytest.fixture
def setup(monkeypatch, tmp_path):
    """setup.py as a module, in a folder of stand-ins for the sources."""
    for name, text in {
        "torch/ops.cpp": "extern const char record[]; const char record[] = SISA_SOURCES;\n",
        "dispatch.cpp": "int everywhere() { return 0; }\n",
        "cpu/kernels.cpp": "namespace sisa::SISA_ISA { int kernel() { return 0; } }\n",
        "cuda/kernels.cu": "int on_cuda() { return 0; }\n",
    }.items():
        path = tmp_path / "csrc" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.chdir(tmp_path)
    for name in ("SISA_BUILD_CUDA", "NVCC", "CUDA_HOME", "CUDA_PATH", "CXX", "CXXFLAGS"):
        monkeypatch.delenv(name, raising=False)
    spec = importlib.util.spec_from_file_location("sisa_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def toolkit(folder, script):
    nvcc = folder / "tool kit" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(f"#!/bin/sh\n{script}\n")
    nvcc.chmod(0o755)
    return nvcc


def torch_with_cuda(folder, torch):
    """The headers and libraries of a torch, and one more library by which it seems to have CUDA."""
    (folder / "torch" / "lib").mkdir(parents=True)
    (folder / "torch" / "include").symlink_to(torch / "include")
    for path in (torch / "lib").iterdir():
        (folder / "torch" / "lib" / path.name).symlink_to(path)
    (folder / "torch" / "lib" / "libtorch_cuda.so").touch()
    return folder / "torch"


@needs_compiler
def test_a_cuda_toolkit_that_cannot_build_leaves_the_library_of_the_cpu(
    setup, monkeypatch, tmp_path, capsys
):
    """An nvcc without its headers, say: what it says is shown; demanded, it is an error."""
    nvcc = toolkit(tmp_path, "echo 'no cuda_runtime.h' >&2; exit 1")
    monkeypatch.setenv("CUDA_HOME", str(nvcc.parent.parent))
    torch = torch_with_cuda(tmp_path, setup.torch_folder())
    monkeypatch.setattr(setup, "torch_folder", lambda: torch)
    setup.build_library(tmp_path / "lib.so")
    assert "no cuda_runtime.h" in capsys.readouterr().err
    assert (tmp_path / "lib.so").exists()
    monkeypatch.setenv("SISA_BUILD_CUDA", "1")
    with pytest.raises(setup.CannotBuild, match=r"no cuda_runtime\.h"):
        setup.build_library(tmp_path / "lib.so")


def test_cuda_demanded_without_a_compiler_for_it(setup, monkeypatch, tmp_path):
    monkeypatch.setenv("SISA_BUILD_CUDA", "1")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        setup.CannotBuild, match="install the CUDA toolkit and set CUDA_HOME or NVC"
    ):
        setup.build_library(tmp_path / "lib.so")


@needs_compiler
@pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc is not found")
def test_nvcc_through_a_script_beside_a_torch_without_cuda(setup, monkeypatch, tmp_path):
    nvcc = toolkit(tmp_path, f'exec {shutil.which("nvcc")} "$@"')
    monkeypatch.setenv("NVCC", str(nvcc))
    monkeypatch.setenv("SISA_BUILD_CUDA", "1")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0+PTX")
    setup.build_library(tmp_path / "lib.so")
    assert b"on_cuda" in (tmp_path / "lib.so").read_bytes()


def test_a_value_of_sisa_build_cuda_that_means_nothing(setup, monkeypatch, tmp_path):
    monkeypatch.setenv("SISA_BUILD_CUDA", "yes")
    with pytest.raises(SystemExit, match="SISA_BUILD_CUDA must be auto, 1 or 0, got 'yes'"):
        setup.build_library(tmp_path / "lib.so")


def test_the_environments_own_torch_serves_an_isolated_build(setup, monkeypatch, tmp_path):
    """Which cannot import it; a torch that is too old, or none, is asked for."""
    own = setup.torch_folder()
    monkeypatch.setattr(setup.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(setup.sysconfig, "get_path", lambda name: str(own.parent))
    assert setup.torch_folder() == own
    assert setup.headers_to_install() == []
    monkeypatch.setattr(setup.sysconfig, "get_path", lambda name: str(tmp_path))
    assert setup.torch_folder() is None
    assert setup.headers_to_install() == [f"torch>=2.11,<={setup.TORCH_TESTED}"]
    header = tmp_path / "torch" / "include" / "torch" / "headeronly" / "version.h"
    header.parent.mkdir(parents=True)
    (tmp_path / "torch" / "lib").mkdir()
    header.write_text("#define TORCH_VERSION_MAJOR 2\n#define TORCH_VERSION_MINOR 10\n")
    assert setup.torch_folder() is None


def test_the_tested_torch_is_the_one_of_the_constraints(setup):
    assert f"torch=={setup.TORCH_TESTED}\n" in (ROOT / "constraints.txt").read_text()


@pytest.mark.slow
@needs_compiler
def test_without_a_compiler_the_package_is_built_and_says_why_it_has_no_library(tmp_path):
    for name in ("sisa_kernels", "csrc", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    (tmp_path / "sisa_model").mkdir()
    for stale in (tmp_path / "sisa_kernels").glob("libsisa.*"):
        stale.unlink()
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    env = {**os.environ, "CXX": str(Path("no", "compiler")), "SISA_BUILD_CUDA": "0"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    said, status = run(STATE, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert status == 0
    assert "not built: no/compiler cannot be run" in said
