"""The compiled library (csrc/): loaded where it can be, otherwise why not is said once."""

import os
import warnings
from pathlib import Path

import torch

from sisa_kernels import _sources

FOLDER = Path(__file__).parent
LIBRARY = FOLDER / "libsisa.so"
CSRC = FOLDER.parent / "csrc"  # in a checkout
ISAS = ("default", "avx2", "avx512", "avx512_bf16")  # each contains the ones before


def rebuild() -> str:
    """The command that builds the library for this installation."""
    if CSRC.is_dir():
        return f"pip install -e {FOLDER.parent}"
    return "pip install --force-reinstall --no-deps --no-cache-dir sisa-attention"


def _asked_isa() -> str | None:
    """SISA_CPU_ISA, None where it is not set; ValueError where it names no instruction set."""
    asked = os.environ.get("SISA_CPU_ISA") or None
    if asked is not None and asked not in ISAS:
        raise ValueError(f"SISA_CPU_ISA must be one of {', '.join(ISAS)}, got {asked!r}")
    return asked


def _parse(record: str) -> dict[str, str]:
    return dict(line.split("=", 1) for line in record.splitlines() if "=" in line)


def _is_of_these_sources() -> bool:
    """Whether the library is of the checkout's sources; read without running its code."""
    if not CSRC.is_dir():
        return True
    record = LIBRARY.read_bytes().partition(b"sisa build record\n")[2].partition(b"\0")[0]
    return _parse(record.decode()).get("sources") == _sources.digest(CSRC)


def _why_not_built() -> str:
    reason = LIBRARY.with_suffix(".txt")  # which setup.py leaves in its place
    if not reason.exists():
        return "not built"
    text = reason.read_text().strip()
    return f"not built: {text[:500]}{'' if len(text) <= 500 else f' ... (all of it: {reason})'}"


def _of_another_copy() -> str | None:
    """The library that this process has loaded from another copy of the package, or None."""
    own = str(LIBRARY.resolve())
    loaded = (path for path in torch.ops.loaded_libraries if Path(path).name == LIBRARY.name)
    return next((path for path in loaded if path != own), None)


def _load() -> tuple[str, dict[str, str]]:
    """Load the library: ("available" or why not, its build record)."""
    if os.environ.get("SISA_EXTENSION") == "0":
        return "switched off by SISA_EXTENSION=0", {}
    other = _of_another_copy()
    if other is not None:
        return f"not loaded beside that of another copy, {other}, in one process", {}
    if not LIBRARY.exists():
        return _why_not_built(), {}
    if not _is_of_these_sources():
        return "built from other sources than those in csrc", {}
    asked = _asked_isa()
    try:
        torch.ops.load_library(LIBRARY)
        record = _parse(torch.ops.sisa.build_info())
    except (OSError, RuntimeError) as error:
        return f"cannot be loaded beside torch {torch.__version__}: {error}", {}
    if asked is not None and record["isa"] != asked:
        raise ValueError(f"SISA_CPU_ISA={asked}: this CPU runs {record['isa']} at most")
    return "available", record


STATE, RECORD = _load()
LOADED = STATE == "available"

if not LOADED and os.environ.get("SISA_EXTENSION") != "0":
    warnings.warn(
        f"sisa_kernels runs in plain PyTorch, slower: its compiled library is {STATE}. "
        f"To build it: {rebuild()}; to silence this: SISA_EXTENSION=0",
        RuntimeWarning,
        stacklevel=2,
    )


def build_info() -> str:
    """One line a fact of the build, and the instruction set chosen; empty where not loaded."""
    return "\n".join(f"{name:10} {value or 'none'}" for name, value in RECORD.items())


def has_kernels(device_type: str) -> bool:
    """Whether the library has kernels for such devices ("cpu", "cuda")."""
    return LOADED and (
        device_type == "cpu" or (device_type == "cuda" and RECORD["cuda_archs"] != "")
    )
