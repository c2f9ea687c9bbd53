"""The compiled extension: loaded where it fits this torch and this CPU, otherwise said once."""

import importlib.util
import os
import warnings
from pathlib import Path

import torch

REBUILD = "pip install -v --no-build-isolation -e . (in the source folder)"
ISAS = ("DEFAULT", "AVX2", "AVX512")  # each contains the ones before


def _read_record(path: Path) -> dict[str, str]:
    """The build record in the extension's file (csrc/sisa.cpp), read without running its code."""
    start = path.read_bytes().partition(b"sisa build record\n")[2]
    return dict(line.split("=", 1) for line in start.partition(b"\0")[0].decode().splitlines())


def _load() -> tuple[str, dict[str, str]]:
    """Load the extension: ("available" or why not, its build record)."""
    if os.environ.get("SISA_EXTENSION") == "0":
        return "switched off by SISA_EXTENSION=0", {}
    spec = importlib.util.find_spec(f"{__package__}._C")
    if spec is None or spec.origin is None:
        return "not built", {}
    record = _read_record(Path(spec.origin))
    cpu = torch.backends.cpu.get_cpu_capability()
    if record.get("torch") != torch.__version__:
        return f"built for torch {record.get('torch')}, this is torch {torch.__version__}", record
    if record["vector"] not in ISAS[: ISAS.index(cpu) + 1 if cpu in ISAS else 1]:
        return f"built for {record['vector']}, this CPU runs {cpu}", record
    try:
        importlib.import_module(f"{__package__}._C")
    except ImportError as error:
        return f"cannot be loaded: {error}", record
    return "available", record


STATE, RECORD = _load()
LOADED = STATE == "available"

if not LOADED and os.environ.get("SISA_EXTENSION") != "0":
    warnings.warn(
        "sisa_kernels runs in plain PyTorch, slower: its compiled extension is "
        f"{STATE}. To build it: {REBUILD}; to silence this: SISA_EXTENSION=0",
        RuntimeWarning,
        stacklevel=2,
    )


def build_info() -> str:
    """One line a fact of the build (torch, vector width, compiler ...); empty where not built."""
    return "\n".join(f"{name:10} {value or 'none'}" for name, value in RECORD.items())
