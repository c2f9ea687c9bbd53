"""Builds sisa_kernels/libsisa.so, the compiled kernels; without it the package works in plain
PyTorch, slower.

The library is bound to torch's stable ABI and to no Python: one file serves every torch from
TORCH_TARGET on and every Python. csrc/cpu is compiled once for each instruction set in ISAS, of
which the library chooses at run time. Only torch's headers are needed: those of the environment's
own torch where it has one, else of the torch that the isolated build installs.

SISA_BUILD_CUDA: "auto" (default: where there are an nvcc and a torch with CUDA), "1" (an error
where there is no nvcc or it fails; neither a GPU nor a torch with CUDA is needed) or "0", whether
to build the CUDA kernels.
NVCC: the compiler, in place of CUDA_HOME/bin/nvcc or the one on PATH. TORCH_CUDA_ARCH_LIST: the
architectures to build for, in place of CUDA_ARCHS. CXX, CXXFLAGS, LDFLAGS: as ever."""

import importlib.util
import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
CSRC = Path("csrc")
LIBRARY = "sisa_kernels/libsisa.so"

# The oldest torch that the library runs beside, and the one that an isolated build takes at most.
TORCH_TARGET = (2, 11)
TORCH_TESTED = "2.13.0"

FLAGS = ["-std=c++20", "-O3", "-g0", "-fPIC", "-fvisibility=hidden"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw"]
ISAS = {"portable": []}
if platform.machine() in ("x86_64", "AMD64"):
    ISAS |= {"avx2": AVX2, "avx512": AVX512, "avx512_bf16": [*AVX512, "-mavx512bf16"]}
# PTX of the last, for the driver to compile on GPUs that came later.
CUDA_ARCHS = "8.0;8.6;8.9;9.0;10.0;12.0+PTX"


class CannotBuild(Exception):
    """Why a part of the library is not built here."""


def say(*lines: str) -> None:
    """pip shows the build's standard error when the build fails or under -v."""
    print("\n".join(("", "*" * 100, *lines, "*" * 100, "")), file=sys.stderr, flush=True)


# ---- Torch's headers, compilers ----------------------------------------------------------------


def torch_folder() -> Path | None:
    """The folder of a torch whose headers serve; None where there is none.

    An isolated build does not see the environment's packages, but where they lie."""
    spec = importlib.util.find_spec("torch")
    places = [] if spec is None or spec.origin is None else [Path(spec.origin).parent]
    places.append(Path(sysconfig.get_path("purelib"), "torch"))
    return next((place for place in places if torch_version(place) >= TORCH_TARGET), None)


def torch_version(folder: Path) -> tuple[int, ...]:
    """Of the headers in torch's folder; () where there are none."""
    header = folder / "include/torch/headeronly/version.h"
    if not header.is_file() or not (folder / "lib").is_dir():
        return ()
    text = header.read_text()
    parts = (re.search(rf"TORCH_VERSION_{x} (\d+)", text) for x in ("MAJOR", "MINOR", "PATCH"))
    return tuple(int(part[1]) for part in parts if part)


def find_nvcc() -> str | None:
    if "NVCC" in os.environ:
        return os.environ["NVCC"]
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return shutil.which("nvcc", path=f"{home}/bin" if home else None)


def run(command: list[str]) -> None:
    """Run a compiler; CannotBuild with what it said where it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise CannotBuild(f"{command[0]} cannot be run: {error}") from error
    if done.returncode:
        raise CannotBuild(f"{shlex.join(command)}\n{done.stdout}{done.stderr}")


# ---- The library -------------------------------------------------------------------------------


class Library:
    """The commands that make the library, its objects in a scratch folder."""

    def __init__(self, torch: Path, scratch: Path, nvcc: str | None):
        self.torch = torch
        self.scratch = scratch
        self.nvcc = nvcc
        self.cxx = shlex.split(os.environ.get("CXX", "c++"))
        self.extra = shlex.split(os.environ.get("CXXFLAGS", ""))
        self.archs = os.environ.get("TORCH_CUDA_ARCH_LIST", CUDA_ARCHS) if nvcc else ""

    def objects(self) -> list[str]:
        """Compile all sources, as many at a time as there are cores."""
        jobs = [(x, "once", self._torch_flags()) for x in CSRC.glob("torch/*.cpp")]
        jobs += [(x, "once", []) for x in CSRC.glob("*.cpp")]
        for isa, flags in ISAS.items():
            jobs += [(x, isa, [f"-DSISA_ISA={isa}", *flags]) for x in CSRC.glob("cpu/*.cpp")]
        commands = []
        for source, label, flags in jobs:
            command = [*self.cxx, *FLAGS, *flags, *self.extra, "-c", str(source)]
            commands.append((command, self.scratch / f"{source.stem}_{label}.o"))
        for source in CSRC.glob("cuda/*.cu") if self.nvcc else ():
            commands.append((self._nvcc_command(source), self.scratch / f"{source.stem}_cuda.o"))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda job: run([*job[0], "-o", str(job[1])]), commands))
        return [str(path) for _, path in commands]

    def link(self, objects: list[str], target: Path) -> None:
        # nvcc brings the CUDA runtime, linked in: the library needs none beside it.
        cxx = [self.nvcc, *self._host_compiler()] if self.nvcc else self.cxx
        flags = ["-shared", *objects, f"-L{self.torch / 'lib'}", "-ltorch_cpu", "-o", str(target)]
        own = [*self.extra, *shlex.split(os.environ.get("LDFLAGS", ""))]
        run(
            [*cxx, *flags, *(f"-Xcompiler={x}" for x in own)] if self.nvcc else [*cxx, *flags, *own]
        )

    def _torch_flags(self) -> list[str]:
        target = (TORCH_TARGET[0] << 56) | (TORCH_TARGET[1] << 48)
        sources = runpy.run_path(str(ROOT / "sisa_kernels/_sources.py"))["digest"](CSRC)
        record = {
            "SOURCES": sources,
            "TORCH": ".".join(map(str, torch_version(self.torch))),
            "FLAGS": " ".join([*FLAGS, *self.extra]),
            "CUDA_ARCHS": self.archs.replace(";", " "),
        }
        defines = [f'-DSISA_{name}="{value}"' for name, value in record.items()]
        cuda = ["-DSISA_WITH_CUDA"] if self.nvcc else []
        headers = ["-isystem", str(self.torch / "include")]
        return [f"-DTORCH_TARGET_VERSION={target:#x}", *headers, *defines, *cuda]

    def _nvcc_command(self, source: Path) -> list[str]:
        archs = []
        for arch in self.archs.replace(";", " ").split():
            number = arch.removesuffix("+PTX").replace(".", "")
            archs.append(f"-gencode=arch=compute_{number},code=sm_{number}")
            if arch.endswith("+PTX"):
                archs.append(f"-gencode=arch=compute_{number},code=compute_{number}")
        flags = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Xcompiler=-fPIC"]
        hidden = "-Xcompiler=-fvisibility=hidden"
        return [str(self.nvcc), *self._host_compiler(), *flags, hidden, *archs, "-c", str(source)]

    def _host_compiler(self) -> list[str]:
        return ["-ccbin", self.cxx[0]] if "CXX" in os.environ else []


def build_library(target: Path) -> None:
    """Build the library with the CUDA kernels or without; CannotBuild where it cannot be."""
    wanted = os.environ.get("SISA_BUILD_CUDA") or "auto"
    if wanted not in ("auto", "0", "1"):
        sys.exit(f"SISA_BUILD_CUDA must be auto, 1 or 0, got {wanted!r}")
    if sys.platform == "win32":
        raise CannotBuild("it is not built on Windows")
    torch = torch_folder()
    if torch is None:
        raise CannotBuild(
            f"no torch >= {'.'.join(map(str, TORCH_TARGET))} with headers is installed"
        )
    with_cuda = Path(torch, "lib/libtorch_cuda.so").exists()
    nvcc = find_nvcc() if wanted == "1" or (wanted == "auto" and with_cuda) else None
    if nvcc is None and wanted != "0" and (wanted == "1" or with_cuda):
        missing = "nvcc is not found: install the CUDA toolkit and set CUDA_HOME or NVCC"
        if wanted == "1":
            raise CannotBuild(missing)
        say(f"sisa: no CUDA kernels, since {missing}")
    with tempfile.TemporaryDirectory() as scratch:
        try:
            library = Library(torch, Path(scratch), nvcc)
            library.link(library.objects(), target)
        except CannotBuild as error:
            if nvcc is None or wanted == "1":
                raise
            say(
                "sisa: the CUDA kernels did not build, the library is built without them:",
                str(error),
            )
            library = Library(torch, Path(scratch), None)
            library.link(library.objects(), target)


class BuildLibrary(build_ext):
    """Makes the library, or in its place a file that says why there is none."""

    def get_ext_filename(self, name: str) -> str:  # without a Python's tag
        return f"{name.replace('.', os.sep)}.so"

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).absolute()
        target.parent.mkdir(parents=True, exist_ok=True)
        reason = self._reason()
        for stale in (target, reason):
            stale.unlink(missing_ok=True)
        try:
            build_library(target)
        except CannotBuild as error:
            if os.environ.get("SISA_BUILD_CUDA") == "1":
                sys.exit(f"SISA_BUILD_CUDA=1: {error}")
            say(f"sisa: no compiled kernels, the package will run in plain PyTorch: {error}")
            reason.write_text(str(error))
            ext.optional = True  # setuptools does not miss its file

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        in_source = Path(LIBRARY).with_suffix(".txt")
        in_source.unlink(missing_ok=True)
        if self._reason().exists():
            shutil.copy(self._reason(), in_source)
            Path(LIBRARY).unlink(missing_ok=True)

    def get_outputs(self) -> list[str]:
        return [*super().get_outputs(), *([str(self._reason())] if self._reason().exists() else [])]

    def _reason(self) -> Path:
        """The file in the library's place that _extension.py shows where it was not built."""
        return Path(self.build_lib, LIBRARY).with_suffix(".txt")


class Wheel(bdist_wheel):
    """Of a library that no Python is bound to."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def headers_to_install() -> list[str]:
    """What an isolated build needs beside setuptools: a torch, if the environment has none."""
    if torch_folder() is not None or sys.platform == "win32":
        return []
    return [f"torch>={'.'.join(map(str, TORCH_TARGET))},<={TORCH_TESTED}"]


if __name__ == "__main__":
    sources = [str(x) for x in CSRC.rglob("*") if x.suffix in (".cpp", ".cu")]
    setup(
        ext_modules=[Extension("sisa_kernels.libsisa", sorted(sources))],
        cmdclass={"build_ext": BuildLibrary, "bdist_wheel": Wheel},
        setup_requires=headers_to_install(),
    )
