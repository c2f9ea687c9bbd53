"""How the benches measure: cases checked, warmed and timed in turns."""

import re
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
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


@dataclass
class Run:
    """What the sections share. ``timer`` takes the calls of a problem and gives the milliseconds of
    each round of each.
    """

    setting: Setting
    out: Path
    minutes: float  # of a section
    timer: Callable[[Calls], list[list[float]]]
    provenance: dict[str, str] = field(default_factory=dict)
    deadline: float = float("inf")  # of time.monotonic()

    def add(self, op: str, path: str, status: str, **values: Any) -> dict[str, str]:
        """Append a row to the section's file; those of ``COLUMNS`` that are not given stay empty."""
        row = self.provenance | {"op": op, "path": path, "status": status, "date": now()} | values
        return append(self.out / f"{op}.csv", COLUMNS, row)

    def rows(self, op: str, since: str = "") -> list[dict[str, str]]:
        """The rows of a section from a date on."""
        return [row for row in read(self.out / f"{op}.csv") if row["date"] >= since]

    def failed_tests(self) -> list[str]:
        """The tests whose newest outcome at this commit, on this device, is a failure."""
        keys = ("commit", "device", "torch")
        newest = {
            r["path"]: r["status"]
            for r in self.rows("tests")
            if all(r[k] == self.provenance.get(k, "") for k in keys)
        }
        return [test for test, status in newest.items() if status.startswith("failed")]


# ---- Timing --------------------------------------------------------------------------------------


def gpu_milliseconds(calls: Calls, seconds: float = 3.0) -> list[list[float]]:
    """The milliseconds of each call on the GPU in each of 10 to 50 rounds, as many as fit in
    ``seconds``.
    """
    flush = torch.empty(
        1 << 28, dtype=torch.int8, device="cuda"
    )  # 256 MiB, several times any L2 cache

    def one_round() -> list[float]:
        events = []
        for call in calls:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            torch.cuda._sleep(
                4_000_000
            )  # about 2 ms, in which the host gets ahead: its launches are not what is measured
            start.record()
            call()
            end.record()
            events.append((start, end))
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in events]

    return _rounds(one_round, seconds, least=10)


def cpu_milliseconds(calls: Calls, seconds: float = 20.0, least: int = 5) -> list[list[float]]:
    """The wall-clock milliseconds of each call in each of ``least`` to 50 rounds, as many as fit in
    ``seconds``.
    """

    def one_round() -> list[float]:
        took = []
        for call in calls:
            start = time.perf_counter()
            call()
            took.append(1e3 * (time.perf_counter() - start))
        return took

    return _rounds(one_round, seconds, least)


def _rounds(one_round: Callable[[], list[float]], seconds: float, least: int) -> list[list[float]]:
    """The series of each call after one round that only says how long a round is; all take turns in
    every round.
    """
    begin = time.monotonic()
    one_round()
    rounds = int(seconds / (time.monotonic() - begin))
    return [
        list(series) for series in zip(*(one_round() for _ in range(max(least, min(50, rounds)))))
    ]


def peak_mib(call: Callable[[], object], device: torch.device) -> str:
    """The most memory that a call holds beyond what was held before, in MiB; on a CPU from the
    profiler's records.
    """
    if device.type != "cuda":
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
            call()
        live = peak = 0
        for event in sorted(trace.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
            if event.name() == "[memory]":
                live += event.nbytes()
                peak = max(peak, live)
        return f"{peak / 2**20:.1f}"
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()  # an error of the kernels shows here at the latest
    return f"{(torch.cuda.max_memory_allocated() - before) / 2**20:.1f}"


def attempt(function: Callable[[], T]) -> tuple[T | None, str]:
    """(Its result, "") or, where it raises, (None, why); what it warns of is printed, such as tiles
    that no table has.
    """
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
    call, begin = case.make(), time.monotonic()
    for _ in range(WARM_CALLS):
        call()
        if time.monotonic() - begin > WARM_SECONDS:
            break
    return call, peak_mib(call, device)


Measured = tuple[
    dict[str, str], list[float]
]  # a case's row, and its milliseconds in each round (none: the row's status says why)


def measure(run: Run, cases: Sequence[Case]) -> dict[Case, Measured]:
    """Check every case, time those that may be timed, in turns, and append a row for each."""
    tests, allowed, ready, series = run.failed_tests(), [], [], None
    measured: dict[Case, Measured] = {}

    def add(case: Case, status: str, ms: Sequence[float] = (), **values: Any) -> None:
        fixed = {
            "mode": case.mode,
            "dtype": str(run.setting.dtype)[6:],
            "shape": case.shape,
            "pass": case.passes,
        }
        measured[case] = run.add(case.op, case.path, status, **fixed, **values), list(ms)

    for case in cases:
        guilty = next(
            (test for test in tests if case.proofs and re.search(case.proofs, test)), None
        )
        wrong, raised = (
            (f"refused, its test failed: {guilty}", "") if guilty else attempt(case.check)
        )
        if wrong or raised:
            add(case, wrong or raised)
        else:
            allowed.append(case)
    # the checks' sizes are forgotten: compiled for these alone, as a training run has them
    torch._dynamo.reset()
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
    fastest: dict[str, tuple[str, list[float]]] = {}
    for (case, _, _), ms in zip(ready, series or []):
        if case.baseline and not (
            case.passes in fastest
            and statistics.median(fastest[case.passes][1]) <= statistics.median(ms)
        ):
            fastest[case.passes] = case.path, ms
    for (case, _, peak), ms in zip(ready, series or []):
        p20, p50, p80 = percentiles(ms)
        values = {
            "rounds": len(ms),
            "ms_p20": f"{p20:.4f}",
            "ms_p50": f"{p50:.4f}",
            "ms_p80": f"{p80:.4f}",
            "peak_mib": peak,
        }
        if case.passes in fastest:
            name, base = fastest[case.passes]
            low, _, high = percentiles([mine / its for mine, its in zip(ms, base)])
            ratio = p50 / statistics.median(base)
            values |= {
                "baseline": name,
                "ratio": f"{ratio:.3f}",
                "ratio_p20": f"{low:.3f}",
                "ratio_p80": f"{high:.3f}",
            }
        if case.bound:
            values["over_bound"] = f"{p50 / case.bound:.2f}"
        if case.work:
            values |= {
                "rate": f"{case.work / (1e-3 * p50):.4g}",
                "unit": case.unit,
                "formula": case.formula,
            }
        add(case, "ok", ms, **values)
    return measured


def percentiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The 20th, 50th and 80th."""
    deciles = statistics.quantiles(values, n=10, method="inclusive")
    return deciles[1], deciles[4], deciles[7]
