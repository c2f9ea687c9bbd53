"""The rows that the benches append to CSV files, and where a row comes from."""

import argparse
import csv
import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sisa_kernels.triton.tiles import tuned_tiles

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"  # the repository's rows, of which its figures are drawn
OUT = ROOT / "bench" / "out"  # everybody's own, which git ignores
PYTEST = ("-c", str(ROOT / "pyproject.toml"), f"--rootdir={ROOT}")  # from whatever folder
# Of a time to the baseline's: of the medians; percentiles of the rounds' own ratios.
RATIOS = ("baseline", "ratio", "ratio_p20", "ratio_p80")
RATES = ("over_bound", "rate", "unit", "formula", "peak_mib")
TIMES = ("rounds", "ms_p20", "ms_p50", "ms_p80", *RATIOS, *RATES)
WHERE = ("device", "threads", "driver", "cuda", "torch", "triton", "tiles", "commit", "date")
COLUMNS = ("op", "path", "mode", "dtype", "shape", "pass", *TIMES, "status", *WHERE)
CODE = ("csrc", "sisa_kernels", "sisa_model", "bench/*.py")  # what a row's numbers depend on


def add_destination(parser: argparse.ArgumentParser) -> None:
    """Add --out, the folder of the rows, and --keep, which is --out bench/results."""
    add = parser.add_argument
    add("--out", type=Path, default=OUT, metavar="FOLDER", help="of the rows; default: bench/out")
    keep = "append the rows to those that the repository has, in bench/results"
    add("--keep", dest="out", action="store_const", const=RESULTS, help=keep)


def append(path: Path, columns: Sequence[str], values: dict[str, Any]) -> dict[str, str]:
    """Append a row to a CSV file, made with its header where absent; ValueError: other columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+", newline="", encoding="utf-8") as file:
        file.seek(0)
        header = next(csv.reader(file), None)
        if header not in (None, list(columns)):
            raise ValueError(
                f"{path} has other columns than this bench writes: "
                "keep it elsewhere, or choose another folder"
            )
        writer = csv.DictWriter(file, columns)
        if header is None:
            writer.writeheader()
        row = dict.fromkeys(columns, "") | values
        writer.writerow(row)
    return row


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file, oldest first; none where it is absent."""
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def output_of(*command: str) -> str:
    """What a command prints, or "unknown" where it is absent, fails or prints nothing."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip() or "unknown"


def cpu_name() -> str:
    """The processor's model."""
    try:
        info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        info = ""
    named = re.search(r"^model name\s*: (.+)$", info, re.MULTILINE)
    return named[1] if named else platform.processor() or platform.machine()


def version(package: str) -> str:
    """The version of an installed package, or "none"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def commit_of_the_code() -> str:
    """SISA_COMMIT, or HEAD, which ends in "+" where code differs from it."""
    given = os.environ.get("SISA_COMMIT", "")
    if given:
        return given
    commit = output_of("git", "rev-parse", "--short", "HEAD")
    changed = output_of("git", "diff", "--name-only", "HEAD", "--", *CODE)
    return commit if changed == "unknown" else f"{commit}+"


def driver_version() -> str:
    """The NVIDIA driver's."""
    query = ("--query-gpu=driver_version", "--format=csv,noheader")
    return output_of("nvidia-smi", *query).partition("\n")[0]


def provenance(device: torch.device) -> dict[str, str]:
    """Where a row comes from: the columns of ``WHERE`` but for the date."""
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name() if on_gpu else cpu_name(),
        "threads": str(torch.get_num_threads()),
        "driver": driver_version() if on_gpu else "",
        "cuda": str(torch.version.cuda),
        "torch": torch.__version__,
        "triton": version("triton"),
        "tiles": "tuned" if tuned_tiles() else "table",
        "commit": commit_of_the_code(),
    }
