"""The machine a command runs on: its devices and versions."""

import contextlib
import functools
import platform
import subprocess
from pathlib import Path

import torch

import sisa_kernels as sk


def find_device(name: str, local_rank: int = 0) -> torch.device:
    """The device of a --device flag, for process ``local_rank`` of a machine.

    A GPU becomes the process's current one. Raises ValueError if this machine has no such
    device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{local_rank}"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device must be one this machine has, got {name!r}: {str(error).splitlines()[0]}"
        ) from error
    if device.type == "cuda":
        # Where Triton launches its kernels, wherever their tensors are.
        torch.cuda.set_device(device)
    return device


def versions() -> dict[str, str]:
    """What a run depends on, for its record."""
    here = Path(__file__).resolve().parent
    commit = "unknown"
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        git = functools.partial(
            subprocess.run, cwd=here, capture_output=True, text=True, check=True
        )
        top = git(["git", "rev-parse", "--show-toplevel"]).stdout.strip()
        if Path(top) == here.parents[1]:  # not somebody else's repository around site-packages
            commit = git(["git", "describe", "--always", "--dirty", "--abbrev=12"]).stdout.strip()
    return {
        "sisa": sk.__version__,
        "commit": commit,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": str(torch.get_num_threads()),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }
