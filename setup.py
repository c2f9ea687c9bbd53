"""Builds the compiled extension sisa_kernels._C; without it the package works in plain PyTorch,
slower.

SISA_BUILD_CUDA: "auto" (default: where there are nvcc and a torch with CUDA), "1" (an error where
not) or "0", whether to build the CUDA kernels; no GPU is needed. TORCH_CUDA_ARCH_LIST: the
architectures to build them for, in place of CUDA_ARCHS.
SISA_CPU_ISA: "avx512", "avx2" or "default", the vector instructions to build for; without it, the
building machine's best."""

import glob
import os
import shutil
import sys

from setuptools import Extension, setup

ISA_FLAGS = {
    "avx512": ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mavx2", "-mfma", "-mf16c"],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "default": [],
}
# PTX of the last, for the driver to compile on GPUs that came later.
CUDA_ARCHS = "8.0;8.6;8.9;9.0;10.0;12.0+PTX"


def say(*lines: str) -> None:
    """pip shows the build's standard error when the build fails or under -v."""
    print("\n".join(("", "*" * 100, *lines, "*" * 100, "")), file=sys.stderr, flush=True)


def builds_cuda(wanted: str) -> bool:
    """Whether to build the CUDA kernels; an error where they are wanted and cannot be."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME  # None in a CPU-only torch

    missing = []
    if torch.version.cuda is None:
        missing.append(
            f"torch {torch.__version__} is for CPUs only, it has no CUDA runtime to link: "
            "install a torch with CUDA"
        )
    if not shutil.which("nvcc", path=f"{CUDA_HOME}/bin" if CUDA_HOME else None):
        missing.append("nvcc is not found: install the CUDA toolkit and set CUDA_HOME or PATH")
    if missing and wanted == "1":
        sys.exit("SISA_BUILD_CUDA=1: " + "; ".join(missing))
    if len(missing) == 1 and wanted == "auto":  # with both missing, nobody expects CUDA
        say(f"sisa: no CUDA kernels, since {missing[0]}")
    return wanted != "0" and not missing


def vector_instructions() -> str:
    """The key of ISA_FLAGS to build for."""
    import torch

    isa = os.environ.get("SISA_CPU_ISA", torch.backends.cpu.get_cpu_capability()).lower()
    if isa in ISA_FLAGS:
        return isa
    if "SISA_CPU_ISA" in os.environ:
        sys.exit(f"SISA_CPU_ISA must be one of {', '.join(ISA_FLAGS)}, got {isa!r}")
    return "default"


def module(cuda: bool) -> Extension:
    """The extension, with the CUDA kernels or without."""
    import torch
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    isa = vector_instructions()
    flags = ["-O3", "-g0", "-std=c++20", "-fopenmp", "-fvisibility=hidden", *ISA_FLAGS[isa]]
    if isa != "default":
        flags += [f"-DCPU_CAPABILITY={isa.upper()}", f"-DCPU_CAPABILITY_{isa.upper()}"]
    archs = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHS) if cuda else ""
    record = {
        "TORCH": torch.__version__,
        "VECTOR": isa.upper(),
        "FLAGS": " ".join(flags),
        "CUDA_ARCHS": archs.replace(";", " "),
    }
    defines = [f'-DSISA_{name}="{value}"' for name, value in record.items()]
    sources = glob.glob("csrc/*.cpp") + glob.glob("csrc/cpu/*.cpp")
    headers = glob.glob("csrc/**/*.h", recursive=True) + glob.glob("csrc/**/*.cuh", recursive=True)
    if cuda:
        sources += glob.glob("csrc/cuda/*.cu")
        defines.append("-DSISA_WITH_CUDA")
    return (CUDAExtension if cuda else CppExtension)(
        "sisa_kernels._C",
        sorted(sources),
        depends=headers,
        extra_compile_args={"cxx": [*flags, *defines], "nvcc": ["-O3", "-std=c++20"]},
        extra_link_args=["-fopenmp"],
    )


def optional_build(wanted: str) -> type:
    """The build command: without the CUDA kernels, or without the extension, where those fail."""
    from torch.utils.cpp_extension import BuildExtension

    class OptionalBuild(BuildExtension):
        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:
                (built,) = self.extensions
                if wanted == "1":
                    raise
                if any(source.endswith(".cu") for source in built.sources):
                    say(
                        "sisa: the CUDA kernels did not build, the extension is built without "
                        f"them: {error}",
                        "To see why: SISA_BUILD_CUDA=1 python setup.py build_ext --inplace; to "
                        "build them for fewer GPUs: TORCH_CUDA_ARCH_LIST",
                    )
                    vars(built).update(vars(module(cuda=False)))
                    self.build_extensions()
                else:
                    say(
                        "sisa: the extension did not build, the package will run in plain "
                        f"PyTorch: {error}",
                        "To see why: python setup.py build_ext --inplace",
                    )
                    built.optional = True  # setuptools does not miss its file

    return OptionalBuild


def extension() -> dict:
    """The arguments of setup() that build the extension; none where it cannot be built."""
    wanted = os.environ.get("SISA_BUILD_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        sys.exit(f"SISA_BUILD_CUDA must be auto, 1 or 0, got {wanted!r}")
    try:
        import torch.utils.cpp_extension  # noqa: F401
    except ImportError as error:
        if wanted == "1":
            sys.exit(f"SISA_BUILD_CUDA=1: torch cannot be imported in the build: {error}")
        say(f"sisa: no compiled extension, since torch cannot be imported in the build: {error}")
        return {}
    ext_modules = [module(builds_cuda(wanted))]
    return {"ext_modules": ext_modules, "cmdclass": {"build_ext": optional_build(wanted)}}


setup(**extension())
