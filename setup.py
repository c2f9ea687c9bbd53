"""Builds the compiled extension sisa_kernels._C; without it the package works in plain PyTorch, slower.

SISA_BUILD_CUDA: "auto" (default), "1" or "0", whether to build CUDA kernels. This version has none: "1" is an error.
SISA_CPU_ISA: "avx512", "avx2" or "default", the vector instructions to build for; without it, the building machine's best.
"""

import os
import sys

from setuptools import setup

ISA_FLAGS = {
    "avx512": ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mavx2", "-mfma", "-mf16c"],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "default": [],
}


def say(*lines: str) -> None:
    """pip shows the build's standard error when the build fails or under -v."""
    print("\n".join(("", "*" * 100, *lines, "*" * 100, "")), file=sys.stderr, flush=True)


def extension() -> dict:
    """The arguments of setup() that build the extension; none where it cannot be built."""
    cuda = os.environ.get("SISA_BUILD_CUDA", "auto")
    if cuda not in ("auto", "0", "1"):
        sys.exit(f"SISA_BUILD_CUDA must be auto, 1 or 0, got {cuda!r}")
    if cuda == "1":
        sys.exit("SISA_BUILD_CUDA=1: this version has no CUDA kernels; leave it at auto or 0")
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        say(f"sisa: no compiled extension, since torch cannot be imported in the build: {error}")
        return {}

    isa = os.environ.get("SISA_CPU_ISA", torch.backends.cpu.get_cpu_capability()).lower()
    if isa not in ISA_FLAGS:
        if "SISA_CPU_ISA" in os.environ:
            sys.exit(f"SISA_CPU_ISA must be one of {', '.join(ISA_FLAGS)}, got {isa!r}")
        isa = "default"
    flags = ["-O3", "-g0", "-fopenmp", "-fvisibility=hidden", *ISA_FLAGS[isa]]
    if isa != "default":
        flags += [f"-DCPU_CAPABILITY={isa.upper()}", f"-DCPU_CAPABILITY_{isa.upper()}"]
    record = {"SISA_TORCH": torch.__version__, "SISA_VECTOR": isa.upper(), "SISA_FLAGS": " ".join(flags)}

    class OptionalBuild(BuildExtension):
        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:
                say(
                    f"sisa: the extension did not build, the package will run in plain PyTorch: {error}",
                    "To see why: python setup.py build_ext --inplace",
                )

    module = CppExtension(
        "sisa_kernels._C",
        ["csrc/sisa.cpp", "csrc/cpu/augment.cpp"],
        depends=["csrc/sisa.h", "csrc/augment_math.h", "csrc/cpu/vector.h"],
        extra_compile_args=[*flags, *(f'-D{name}="{value}"' for name, value in record.items())],
        extra_link_args=["-fopenmp"],
        optional=True,
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": OptionalBuild}}


setup(**extension())
