"""How the benches measure: cases checked, warmed and timed in turns."""

import contextlib
import math
import re
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.profiler import ProfilerActivity, profile

from bench.cases import Case, Setting
from bench.paths import reason
from bench.rows import COLUMNS, append, now, read

WARM_CALLS = 3
WARM_SECONDS = 5.0  # past which a long call is warm after the first
Calls = list[Callable[[], object]]
T = TypeVar("T")


COMPILE_SHARE = 1 / 3  # of a whole run, at most


@dataclass
class Budget:
    """Seconds of a whole run by a clock that its processes share, and what was compiled in it."""

    seconds: float = math.inf
    begin: float = field(default_factory=time.monotonic)
    compiled: float = 0.0  # seconds in building, checks and first calls
    kernels: set[str] = field(default_factory=lambda: {""})  # those that are compiled

    def until(self, share: float) -> float:
        """The moment at which this share of the whole is over."""
        return self.begin + share * self.seconds

    def may_start(self, kernels: str) -> bool:
        """Whether a case may be begun: its kernels are known, or there is time to compile them."""
        return kernels in self.kernels or self.compiled < COMPILE_SHARE * self.seconds

    @contextlib.contextmanager
    def compiling(self, kernels: str) -> Iterator[None]:
        """Counts what runs in it as compiling, after which the kernels are known."""
        begin = time.monotonic()
        try:
            yield
        finally:
            self.compiled += time.monotonic() - begin
            self.kernels.add(kernels)


@dataclass
class Run:
    """What the sections share."""

    setting: Setting
    out: Path  # folder of the rows
    timer: Callable[[Calls], list[list[float]]]  # milliseconds of each round of each call
    provenance: dict[str, str] = field(default_factory=dict)
    budget: Budget = field(default_factory=Budget)
    deadline: float = math.inf  # of what runs now, by time.monotonic()

    def add(self, op: str, path: str, status: str, **values: Any) -> dict[str, str]:
        """Append a row to the section's file; the columns that are not given stay empty."""
        row = self.provenance | {"op": op, "path": path, "status": status, "date": now()} | values
        return append(self.out / f"{op}.csv", COLUMNS, row)

    def add_case(self, case: Case, status: str, **values: Any) -> dict[str, str]:
        """Append a case's row."""
        values |= {"mode": case.mode, "shape": case.shape, "pass": case.passes}
        dtype = str(self.setting.dtype)[6:]
        return self.add(case.op, case.path, status, dtype=dtype, **values)

    def rows(self, op: str, since: str = "") -> list[dict[str, str]]:
        """The rows of a section from a date on."""
        return [row for row in read(self.out / f"{op}.csv") if row["date"] >= since]

    def failed_tests(self) -> list[str]:
        """The tests whose newest outcome at this commit, on this device, is a failure."""
        here = {key: self.provenance.get(key, "") for key in ("commit", "device", "torch")}
        mine = [row for row in self.rows("tests") if row.items() >= here.items()]
        newest = {row["path"]: row["status"] for row in mine}
        return [test for test, status in newest.items() if status.startswith("failed")]


# ---- Timing --------------------------------------------------------------------------------------


def gpu_milliseconds(calls: Calls, seconds: float = 3.0) -> list[list[float]]:
    """Milliseconds on the GPU of each call in 10 to 50 rounds, as many as fit ``seconds``."""
    # 256 MiB, several times any L2 cache.
    flush = torch.empty(1 << 28, dtype=torch.int8, device="cuda")

    def one_round() -> list[float]:
        events = []
        for call in calls:
            start = torch.cuda.Event(enable_timing=True)
            end = torch.cuda.Event(enable_timing=True)
            flush.zero_()
            # About 2 ms, in which the host gets ahead: its launches are not what is measured.
            torch.cuda._sleep(4_000_000)
            start.record()
            call()
            end.record()
            events.append((start, end))
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in events]

    return _rounds(one_round, seconds, least=10)


def cpu_milliseconds(calls: Calls, seconds: float = 20.0, least: int = 5) -> list[list[float]]:
    """Wall-clock milliseconds of each call in ``least`` to 50 rounds, as fit ``seconds``."""

    def one_round() -> list[float]:
        took = []
        for call in calls:
            start = time.perf_counter()
            call()
            took.append(1e3 * (time.perf_counter() - start))
        return took

    return _rounds(one_round, seconds, least)


def _rounds(one_round: Callable[[], list[float]], seconds: float, least: int) -> list[list[float]]:
    """The series of each call; all take turns in every round.

    One round before them only says how long a round is."""
    begin = time.monotonic()
    one_round()
    fitting = int(seconds / (time.monotonic() - begin))
    rounds = [one_round() for _ in range(max(least, min(50, fitting)))]
    return [list(series) for series in zip(*rounds)]


def peak_mib(call: Callable[[], object], device: torch.device) -> str:
    """The most memory that a call holds beyond what was held before, in MiB."""
    peak = gpu_peak(call) if device.type == "cuda" else cpu_peak(call)
    return f"{peak / 2**20:.1f}"


def gpu_peak(call: Callable[[], object]) -> int:
    """Bytes, by PyTorch's allocator."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()  # an error of the kernels shows here at the latest
    return torch.cuda.max_memory_allocated() - before


def cpu_peak(call: Callable[[], object]) -> int:
    """Bytes, by the profiler's records of what is allocated and freed."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        call()
    live = peak = 0
    for event in sorted(trace.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


def attempt(function: Callable[[], T]) -> tuple[T | None, str]:
    """(Its result, "") or, where it raises, (None, why).

    What it warns of is printed, such as tiles that no table has."""
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
    begin = time.monotonic()
    for _ in range(WARM_CALLS):
        call()
        if time.monotonic() - begin > WARM_SECONDS:
            break
    return call, peak_mib(call, device)


# A case's row, and its milliseconds in each round (none: the row's status says why).
Measured = tuple[dict[str, str], list[float]]


def measure(run: Run, cases: Sequence[Case]) -> dict[Case, Measured]:
    """Check every case, time those that may be timed, in turns, and append a row for each."""
    measured: dict[Case, Measured] = {}

    def refuse(case: Case, why: str) -> None:
        measured[case] = run.add_case(case, why), []

    failed_tests = run.failed_tests()
    allowed = []
    for case in cases:
        if not run.budget.may_start(case.kernels):
            refuse(case, "not started: a third of the run was spent compiling")
            continue
        with run.budget.compiling(case.kernels):
            why = refusal(case, failed_tests)
        if why:
            refuse(case, why)
        else:
            allowed.append(case)
    # The checks' sizes are forgotten: compiled for these alone, as a training run has them.
    torch._dynamo.reset()
    ready = {}
    for case in allowed:
        with run.budget.compiling(case.kernels):
            prepared, why = attempt(partial(warm, case, run.setting.device))
        if prepared is None:
            refuse(case, why)
        else:
            ready[case] = prepared
    if not ready:
        return measured
    series, why = attempt(lambda: run.timer([call for call, _ in ready.values()]))
    if series is None:
        for case in ready:
            refuse(case, why)
        return measured
    times = dict(zip(ready, series))
    for case, ms in times.items():
        baseline = fastest_baseline(times, case.passes)
        values = timing_columns(case, ms) | ratio_columns(ms, baseline, times)
        row = run.add_case(case, "ok", peak_mib=ready[case][1], **values)
        measured[case] = row, list(ms)
    return measured


def refusal(case: Case, failed_tests: Sequence[str]) -> str:
    """Why a case must not be timed: a failed test or check of it; empty: it may be."""
    proofs = [test for test in failed_tests if case.proofs and re.search(case.proofs, test)]
    if proofs:
        return f"refused, its test failed: {proofs[0]}"
    wrong, raised = attempt(case.check)
    return wrong or raised


def fastest_baseline(times: dict[Case, list[float]], passes: str) -> Case | None:
    """What the cases of the same passes are measured against; None: no baseline was timed."""
    found = [case for case in times if case.baseline and case.passes == passes]
    return min(found, key=lambda case: statistics.median(times[case]), default=None)


def timing_columns(case: Case, ms: Sequence[float]) -> dict[str, Any]:
    """Times of a case, over its bound, and its work a second."""
    p20, p50, p80 = percentiles(ms)
    values: dict[str, Any] = {
        "rounds": len(ms),
        "ms_p20": f"{p20:.4f}",
        "ms_p50": f"{p50:.4f}",
        "ms_p80": f"{p80:.4f}",
        "rate": f"{case.work.amount / (1e-3 * p50):.4g}",
        "unit": case.work.unit,
        "formula": case.work.formula,
    }
    if case.bound:
        values["over_bound"] = f"{p50 / case.bound:.2f}"
    return values


def ratio_columns(
    ms: Sequence[float], baseline: Case | None, times: dict[Case, list[float]]
) -> dict[str, str]:
    """A case's times over the baseline's in the same rounds."""
    if baseline is None:
        return {}
    low, _, high = percentiles([mine / its for mine, its in zip(ms, times[baseline])])
    return {
        "baseline": baseline.path,
        "ratio": f"{percentiles(ms)[1] / statistics.median(times[baseline]):.3f}",
        "ratio_p20": f"{low:.3f}",
        "ratio_p80": f"{high:.3f}",
    }


def percentiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The 20th, 50th and 80th."""
    deciles = statistics.quantiles(values, n=10, method="inclusive")
    return deciles[1], deciles[4], deciles[7]
