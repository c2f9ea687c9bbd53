"""The package as others get it: what an import brings along, its version and types, and that sdist
and wheel build and install.
"""

import importlib
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import sisa_kernels as sk
from sisa_model.cli import main
from tests.support import ROOT

# Dependencies of sisa_model and of the tests, and what is slow in torch: operators alone need none
# of them.
FOREIGN = {
    "sisa_model",
    "matplotlib",
    "safetensors",
    "tokenizers",
    "transformers",
    "tyro",
    "pytest",
    "torch._inductor",
}

CUDA_FAILS = "#ifdef SISA_WITH_CUDA\n#error cuda_runtime.h: No such file or directory\n#endif\n"
EMPTY_MODULE = """#include <Python.h>
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C"};
PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module); }
"""


def python(*arguments, **options):
    """The standard output of a Python process; its standard error where it fails."""
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_operators_import_no_more_than_they_need():
    loaded = set(python("-c", "import sys, sisa_kernels; print(*sys.modules)", cwd=ROOT).split())
    assert "sisa_kernels.attention" in loaded
    assert not FOREIGN & loaded


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"sisa {sk.__version__}\n"
    assert re.fullmatch(r"\d+\.\d+\.\d+", sk.__version__)  # a semantic version


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_every_command(shell, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--tyro-print-completion", shell])
    assert not stopped.value.code
    script = capsys.readouterr().out
    assert all(
        command in script for command in ("train", "compare", "generate", "info", "bench-report")
    )


def build(kind: str, source: Path, out: Path) -> Path:
    """What setuptools makes of a source folder, as pip asks for it: the sdist or the wheel."""
    code = f"import sys, setuptools.build_meta as b; b.build_{kind}(sys.argv[1])"
    env = {**os.environ, "SISA_BUILD_CUDA": "0", "PYTHONPATH": ""}
    python("-c", code, str(out), cwd=source, env=env)
    (made,) = out.iterdir()
    return made


def test_a_cuda_toolkit_that_cannot_build_leaves_the_extension_of_the_cpu(tmp_path):
    """An nvcc without its headers, say: setup.py builds stand-ins for the sources, with the toolkit
    and then without.
    """
    sources = {
        "sisa.cpp": CUDA_FAILS + EMPTY_MODULE,
        "cpu/augment.cpp": "",
        "cpu/decode.cpp": "",
        "cuda/augment.cu": "",
    }
    for name, text in sources.items():
        (tmp_path / "csrc" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "csrc" / name).write_text(text)
    (tmp_path / "sisa_kernels").mkdir()
    nvcc = tmp_path / "toolkit" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\nexit 1\n")
    nvcc.chmod(0o755)
    (tmp_path / "setup.py").write_text(
        f"import torch.utils.cpp_extension as c; c.torch.version.cuda, c.CUDA_HOME = '13.0', {str(nvcc.parent.parent)!r}\n"
        + (ROOT / "setup.py").read_text()
    )
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    env = {name: value for name, value in os.environ.items() if name != "SISA_BUILD_CUDA"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (
        "sisa: the CUDA kernels did not build, the extension is built without them: " in done.stderr
    )
    assert "did not build, the package will run in plain PyTorch" not in done.stderr
    assert [path.name.partition(".")[0] for path in (tmp_path / "sisa_kernels").glob("*.so")] == [
        "_C"
    ]
    demanded = subprocess.run(
        command, cwd=tmp_path, env={**env, "SISA_BUILD_CUDA": "1"}, capture_output=True, text=True
    )
    assert demanded.returncode


@pytest.mark.slow
def test_sdist_and_wheel_build_and_install(tmp_path):
    """From a copy of what git tracks: sdist, from it the wheel, from that an installation that runs
    with its extension.
    """
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("needs a git checkout, to know what belongs to the source")
    source, sdists, wheels, site = (
        tmp_path / name for name in ("source", "sdists", "wheels", "site")
    )
    for name in tracked.stdout.splitlines():
        if (ROOT / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    for folder in (sdists, wheels):
        folder.mkdir()
    sdist = build("sdist", source, sdists)
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
        archive.extractall(tmp_path / "unpacked")
    wanted = [
        name
        for name in tracked.stdout.splitlines()
        if name.startswith(("csrc/", "sisa_kernels/", "sisa_model/"))
    ]
    assert {*wanted, "setup.py", "pyproject.toml", "README.md", "LICENSE"} <= names
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    wheel = build("wheel", unpacked, wheels)
    with zipfile.ZipFile(wheel) as archive:
        files = archive.namelist()
    assert {"sisa_kernels/py.typed", "sisa_model/py.typed"} <= set(files)
    assert any(re.fullmatch(r"sisa_kernels/_C\..*so", name) for name in files)
    assert {name.partition("/")[0].partition("-")[0] for name in files} == {
        "sisa",
        "sisa_kernels",
        "sisa_model",
    }
    python("-m", "pip", "install", "--no-deps", "--no-index", "--target", str(site), str(wheel))
    env = {**os.environ, "PYTHONPATH": str(site)}
    shown = python(
        "-c",
        "import sisa_kernels as sk; print(sk.__file__, sk.backends()['extension'])",
        cwd=tmp_path,
        env=env,
    )
    assert shown.split() == [str(site / "sisa_kernels" / "__init__.py"), "available"]
    command = "import sys; from sisa_model.cli import main; sys.exit(main(['--version']))"
    assert python("-c", command, cwd=tmp_path, env=env) == f"sisa {sk.__version__}\n"
    refused = subprocess.run(
        [sys.executable, "-c", command.replace("--version", "bench-report")],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
    )
    assert refused.returncode == 1
    assert "bench-report needs a checkout of the repository" in refused.stderr


def test_type_information_is_shipped():
    for name in ("sisa_kernels", "sisa_model"):
        folder = Path(importlib.import_module(name).__file__).parent
        assert (folder / "py.typed").is_file()
