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
    code = (
        f"import sys, torch, {package} as package\n"
        "with torch.device('meta'):\n"
        "    names = [getattr(package, name) for name in package.__all__]\n"
        "print(*sys.modules)"
    )
    loaded = set(python("-c", code, cwd=ROOT).split())
    assert "sisa_kernels.attention" in loaded
    assert not absent & loaded


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"sisa {sk.__version__}\n"
    assert re.fullmatch(r"\d+\.\d+\.\d+", sk.__version__)  # a semantic version
    assert f"\nversion: {sk.__version__}\n" in (ROOT / "CITATION.cff").read_text()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_every_command(shell, capsys):
    assert main(["--tyro-print-completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(command in script for command in ("train", "compare", "study", "generate", "info"))


def build(kind: str, source: Path, out: Path) -> Path:
    """What setuptools makes of a source folder, as pip asks for it: the sdist or the wheel."""
    code = f"import sys, setuptools.build_meta as b; b.build_{kind}(sys.argv[1])"
    env = {**os.environ, "SISA_BUILD_CUDA": "0", "PYTHONPATH": ""}
    python("-c", code, str(out), cwd=source, env=env)
    (made,) = out.iterdir()
    return made


@pytest.fixture(scope="module")
def tracked():
    """What git tracks of this checkout, the paths as strings."""
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("needs a git checkout, to know what belongs to the source")
    return [name for name in done.stdout.splitlines() if (ROOT / name).exists()]


@pytest.mark.slow
def test_sdist_and_wheel_build_and_install(tmp_path, tracked):
    """From a copy of what git tracks, in a folder with a space in its name: the sdist, which has
    all of it; from that the wheel; from that an installation that runs its library.
    """
    source = tmp_path / "a folder"
    for name in tracked:
        copy = source / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes((ROOT / name).read_bytes())
    for folder in ("sdists", "wheels"):
        (tmp_path / folder).mkdir()

    sdist = build("sdist", source, tmp_path / "sdists")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
        archive.extractall(tmp_path / "unpacked")
    packaged = {name for name in tracked if name.startswith(("sisa_kernels/", "sisa_model/"))}
    assert set(tracked) <= names

    (unpacked,) = (tmp_path / "unpacked").iterdir()
    wheel = build("wheel", unpacked, tmp_path / "wheels")
    with zipfile.ZipFile(wheel) as archive:
        files = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert re.fullmatch(r"sisa_attention-[\d.]+-py3-none-\w+\.whl", wheel.name)
    assert files - packaged == {"sisa_kernels/libsisa.so"}
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
