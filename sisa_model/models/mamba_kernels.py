"""The mamba-ssm package's Triton kernels, where they can run; on CUDA, why not, said once.

They need an NVIDIA GPU, bf16, and mamba-ssm 2.3.2.post1 with triton, einops and packaging. Its CUDA
extension, Mamba-1's, is not needed: ``MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE pip install
--no-deps --no-build-isolation mamba-ssm==2.3.2.post1`` installs the Python part alone."""

import functools
import importlib
import importlib.util
import sys
import types
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from sisa_kernels.ops import say_once


class Kernels(NamedTuple):
    """The entry points that the mixers call."""

    mamba2: Callable[..., Tensor]
    """``mamba_chunk_scan_combined``"""
    mamba3: Callable[..., Tensor]
    """``mamba3_siso_combined``"""


def kernels_for(x: Tensor, powers_of_two: tuple[int, ...] = ()) -> Kernels | None:
    """The package's kernels for a layer that computes as ``x`` does; None for plain PyTorch.

    On CUDA None comes with one warning. ``powers_of_two`` are the widths that the kernels load in
    blocks, at least 16 each."""
    if x.device.type != "cuda":
        return None
    odd = [width for width in powers_of_two if width < 16 or width & (width - 1)]
    found = load_kernels()
    if isinstance(found, str):
        reason = found
    elif torch.version.hip is not None:
        reason = "the package's kernels are for NVIDIA GPUs"
    elif x.dtype != torch.bfloat16:
        reason = f"the package's kernels round to bf16, and this layer computes in {x.dtype}"
    elif odd:
        reason = (
            "the package's kernels take head and state widths that are powers of two from 16, "
            f"and this layer has {odd[0]}"
        )
    else:
        return found
    say_once(f"Mamba layers run in plain PyTorch on CUDA, slower: {reason}")
    return None


@functools.cache
def load_kernels() -> Kernels | str:
    """The package's kernels, or why they cannot be had."""
    try:
        mamba2 = _import("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined
        mamba3 = _import("mamba_ssm.ops.triton.mamba3.mamba3_siso_combined").mamba3_siso_combined
    except Exception as error:  # an installation that does not fit raises many kinds
        return f"mamba-ssm 2.3.2.post1 cannot be imported ({type(error).__name__}: {error})"
    # Neither traces whole: triton.set_allocator breaks the graph inside Mamba-3's
    # autograd.Function.
    return Kernels(torch.compiler.disable(mamba2), torch.compiler.disable(mamba3))


def _import(name: str) -> types.ModuleType:
    """A module of the package; without its __init__ where Mamba-1's extension is missing."""
    try:
        return importlib.import_module(name)
    except ImportError:
        package, _, _ = name.partition(".")
        spec = None if package in sys.modules else importlib.util.find_spec(package)
        if spec is None:
            raise
        bare = types.ModuleType(package)
        bare.__path__ = list(spec.submodule_search_locations or ())
        sys.modules[package] = bare
        return importlib.import_module(name)
