"""How bench/gpu.py measures: cases checked, warmed and timed in turns, and the rows that come of it."""

import csv
import datetime
import os
import re
import statistics
import subprocess
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import triton
from gpu_cases import Case, Setting, reason

from sisa_kernels.tiles import tuned_tiles

ROOT = Path(__file__).resolve().parent.parent
TIMES = ("ms_p20", "ms_p50", "ms_p80", "ratio", "over_bound", "rate", "unit", "formula", "peak_mib")
WHERE = ("device", "driver", "cuda", "torch", "triton", "tiles", "commit", "date")
COLUMNS = ("op", "path", "mode", "dtype", "shape", "pass", *TIMES, "status", *WHERE)
WARM_CALLS = 3
Calls = list[Callable[[], object]]
T = TypeVar("T")


@dataclass
class Run:
    """What the sections share. ``timer`` takes the calls of a problem and gives the milliseconds of each round of each."""

    setting: Setting
    out: Path
    minutes: float  # of a section
    timer: Callable[[Calls], list[list[float]]]
    provenance: dict[str, str] = field(default_factory=dict)
    deadline: float = float("inf")  # of time.monotonic()

    def add(self, op: str, path: str, status: str, **values: Any) -> None:
        """Append a row to the section's file; those of ``COLUMNS`` that are not given stay empty."""
        row = dict.fromkeys(COLUMNS, "") | self.provenance | {"op": op, "path": path, "status": status, "date": now()} | values
        self.out.mkdir(parents=True, exist_ok=True)
        file_path = self.out / f"{op}.csv"
        new = not file_path.exists()
        with open(file_path, "a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            if new:
                writer.writeheader()
            writer.writerow(row)

    def rows(self, op: str, since: str = "") -> list[dict[str, str]]:
        """The rows of a section from a date on."""
        file_path = self.out / f"{op}.csv"
        if not file_path.exists():
            return []
        with open(file_path, newline="", encoding="utf-8") as file:
            return [row for row in csv.DictReader(file) if row["date"] >= since]

    def failed_tests(self) -> list[str]:
        """The tests whose newest outcome at this commit, on this device, is a failure."""
        keys = ("commit", "device", "torch")
        newest = {r["path"]: r["status"] for r in self.rows("tests") if all(r[k] == self.provenance.get(k, "") for k in keys)}
        return [test for test, status in newest.items() if status.startswith("failed")]


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def output_of(*command: str) -> str:
    """What a command prints, or "unknown" where it is absent or fails."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip() or "unknown"
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def provenance() -> dict[str, str]:
    return {
        "device": torch.cuda.get_device_name(),
        "driver": output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[0],
        "cuda": str(torch.version.cuda),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "tiles": "tuned" if tuned_tiles() else "table",
        "commit": os.environ.get("SISA_COMMIT") or output_of("git", "rev-parse", "--short", "HEAD"),
    }


# ---- Timing ---------------------------------------------------------------------------------------------------------------------


def gpu_milliseconds(calls: Calls, seconds: float = 3.0) -> list[list[float]]:
    """The milliseconds of each call on the GPU in each of 10 to 50 rounds, as many as fit in ``seconds``."""
    flush = torch.empty(1 << 28, dtype=torch.int8, device="cuda")  # 256 MiB, several times any L2 cache

    def one_round() -> list[float]:
        events = []
        for call in calls:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            torch.cuda._sleep(4_000_000)  # about 2 ms, in which the host gets ahead: its launches are not what is measured
            start.record()
            call()
            end.record()
            events.append((start, end))
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in events]

    begin = time.monotonic()
    one_round()
    rounds = int(seconds / (time.monotonic() - begin))
    return [list(series) for series in zip(*(one_round() for _ in range(max(10, min(50, rounds)))))]


def peak_mib(call: Callable[[], object], device: torch.device) -> str:
    """The most memory that a call holds beyond what was held before, in MiB; empty where there is no GPU to ask."""
    if device.type != "cuda":
        call()
        return ""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()  # an error of the kernels shows here at the latest
    return f"{(torch.cuda.max_memory_allocated() - before) / 2**20:.1f}"


def attempt(function: Callable[[], T]) -> tuple[T | None, str]:
    """(Its result, "") or, where it raises, (None, why); what it warns of is printed, such as tiles that no table has."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            result = function()
        except Exception as error:
            return None, reason(error, told)
    for warning in told:
        say_once(str(warning.message).partition("\n")[0])
    return result, ""


@cache
def say_once(line: str) -> None:
    print(f"warning: {line}", flush=True)


def warm(case: Case, device: torch.device) -> tuple[Callable[[], object], str]:
    """What is timed, compiled and warm, and its peak in MiB."""
    call = case.make()
    for _ in range(WARM_CALLS):
        call()
    return call, peak_mib(call, device)


def measure(run: Run, cases: list[Case]) -> None:
    """Check every case, time those that may be timed, in turns, and append a row for each."""
    tests, allowed, ready, series = run.failed_tests(), [], [], None

    def add(case: Case, status: str, **values: Any) -> None:
        fixed = {"mode": case.mode, "dtype": str(run.setting.dtype)[6:], "shape": case.shape, "pass": case.passes}
        run.add(case.op, case.path, status, **fixed, **values)

    for case in cases:
        guilty = next((test for test in tests if case.proofs and re.search(case.proofs, test)), None)
        wrong, raised = (f"refused, its test failed: {guilty}", "") if guilty else attempt(case.check)
        if wrong or raised:
            add(case, wrong or raised)
        else:
            allowed.append(case)
    torch._dynamo.reset()  # the checks' sizes are forgotten: compiled for these alone, as a training run has them
    for case in allowed:
        prepared, raised = attempt(partial(warm, case, run.setting.device))
        if prepared is None:
            add(case, raised)
        else:
            ready.append((case, *prepared))
    if ready:
        series, raised = attempt(lambda: run.timer([call for _, call, _ in ready]))
        if series is None:
            for case, _, _ in ready:
                add(case, raised)
    times = [[statistics.quantiles(ms, n=10, method="inclusive")[n] for n in (1, 4, 7)] for ms in series or []]
    fastest: dict[str, float] = {}
    for (case, _, _), (_, p50, _) in zip(ready, times):
        if case.baseline:
            fastest[case.passes] = min(p50, fastest.get(case.passes, p50))
    for (case, _, peak), (p20, p50, p80) in zip(ready, times):
        percentiles = {"ms_p20": f"{p20:.4f}", "ms_p50": f"{p50:.4f}", "ms_p80": f"{p80:.4f}"}
        ratio = f"{p50 / fastest[case.passes]:.3f}" if case.passes in fastest else ""
        bound = f"{p50 / case.bound:.2f}" if case.bound else ""
        rate = {"rate": f"{case.work / (1e-3 * p50):.1f}", "unit": case.unit, "formula": case.formula}
        add(case, "ok", **percentiles, ratio=ratio, over_bound=bound, **rate, peak_mib=peak)
