"""The package as others get it: what an import brings along, its version, and that sdist and wheel
build and install.
"""

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

# What is slow to import, or comes with the commands and the tests: neither the operators nor the
# models need it. The operators do not need SLOW_FOR_OPERATORS either.
SLOW = {"matplotlib", "tokenizers", "transformers", "tyro", "pytest", "torch._inductor"}
SLOW_FOR_OPERATORS = {"sisa_model", "safetensors"}

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


@pytest.mark.parametrize(
    ("package", "absent"),
    [("sisa_kernels", SLOW | SLOW_FOR_OPERATORS), ("sisa_model", SLOW)],
)
def test_an_import_brings_no_more_than_it_needs(package, absent):
    loaded = set(python("-c", f"import sys, {package}; print(*sys.modules)", cwd=ROOT).split())
    assert "sisa_kernels.attention" in loaded
    assert not absent & loaded


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
    assert all(command in script for command in ("train", "compare", "study", "generate", "info"))


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
    pretend = (
        "import torch.utils.cpp_extension as c\n"
        f"c.torch.version.cuda, c.CUDA_HOME = '13.0', {str(nvcc.parent.parent)!r}\n"
    )
    (tmp_path / "setup.py").write_text(pretend + (ROOT / "setup.py").read_text())
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    env = {name: value for name, value in os.environ.items() if name != "SISA_BUILD_CUDA"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "the CUDA kernels did not build" in done.stderr
    assert "the extension did not build" not in done.stderr
    built = [path.name.partition(".")[0] for path in (tmp_path / "sisa_kernels").glob("*.so")]
    assert built == ["_C"]
    demanded = subprocess.run(
        command, cwd=tmp_path, env={**env, "SISA_BUILD_CUDA": "1"}, capture_output=True, text=True
    )
    assert demanded.returncode


@pytest.fixture(scope="module")
def tracked():
    """What git tracks of this checkout, the paths as strings."""
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("needs a git checkout, to know what belongs to the source")
    return [name for name in done.stdout.splitlines() if (ROOT / name).exists()]


@pytest.mark.slow
def test_sdist_and_wheel_build_and_install(tmp_path, tracked):
    """From a copy of what git tracks: sdist, from it the wheel, from that an installation that runs
    with its extension.
    """
    for name in tracked:
        copy = tmp_path / "source" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes((ROOT / name).read_bytes())
    for folder in ("sdists", "wheels"):
        (tmp_path / folder).mkdir()

    sdist = build("sdist", tmp_path / "source", tmp_path / "sdists")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
        archive.extractall(tmp_path / "unpacked")
    packaged = {name for name in tracked if name.startswith(("sisa_kernels/", "sisa_model/"))}
    sources = {name for name in tracked if name.startswith("csrc/")}
    assert packaged | sources | {"setup.py", "pyproject.toml", "README.md", "LICENSE"} <= names

    (unpacked,) = (tmp_path / "unpacked").iterdir()
    wheel = build("wheel", unpacked, tmp_path / "wheels")
    with zipfile.ZipFile(wheel) as archive:
        files = {name for name in archive.namelist() if ".dist-info/" not in name}
    (extension,) = files - packaged
    assert re.fullmatch(r"sisa_kernels/_C\..*so", extension)
    assert packaged <= files
    assert {"sisa_kernels/py.typed", "sisa_model/py.typed"} <= files

    site = str(tmp_path / "site")
    python("-m", "pip", "install", "--no-deps", "--no-index", "--target", site, str(wheel))
    env = {**os.environ, "PYTHONPATH": site}
    code = "import sisa_kernels as sk; print(sk.__file__, sk.backends()['extension'])"
    shown = python("-c", code, cwd=tmp_path, env=env)
    assert shown.split() == [str(Path(site, "sisa_kernels", "__init__.py")), "available"]
    version = python("-m", "sisa_model", "--version", cwd=tmp_path, env=env)
    assert version == f"sisa {sk.__version__}\n"
