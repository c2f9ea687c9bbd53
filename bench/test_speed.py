"""What ``python -m bench cpu`` runs: a test is one case, its row goes to <section>.csv.

The cases of a problem are checked against the fp64 oracle and then timed in turns, in the first of
their tests; one that fails its check has no number, and its test fails. pytest-benchmark's own loop
times one function at a time, and what else runs on the machine would slow one and spare the other:
it is given the rounds that were timed in turns through a clock that replays them."""

import functools
import os
from dataclasses import replace
from pathlib import Path

import pytest

from bench.cases import Case
from bench.cases_cpu import CPU, QUICK, SECTIONS, Group
from bench.paths import problem
from bench.rows import OUT, provenance
from bench.timing import Measured, Run, cpu_milliseconds, measure


class Clock:
    """A timer for pytest-benchmark that goes by recorded milliseconds."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.series: list[float] = []

    def read(self) -> float:
        return self.seconds

    def pass_a_round(self) -> None:
        self.seconds += 1e-3 * self.series.pop(0)


def parameters():
    for section, groups in SECTIONS.items():
        for group in groups():
            for case in group.cases:
                clock = Clock()
                dtype = str(group.setting.dtype)[6:]
                name = f"{section} {dtype} {case.shape} {case.passes}"
                mark = pytest.mark.benchmark(group=name, timer=clock.read)
                test = f"{name} {case.path}".replace(" ", "-")
                yield pytest.param(group, case, clock, marks=mark, id=test)


@pytest.fixture(scope="session")
def results(tmp_path_factory) -> Path:
    folder = os.environ.get("SISA_BENCH_OUT")
    if folder:
        return Path(folder)
    return tmp_path_factory.mktemp("results") if QUICK else OUT


@functools.cache
def measured(group: Group, folder: Path) -> dict[Case, Measured]:
    """The rows and times of a group's cases, which take turns."""
    seconds, least = (0.0, 2) if QUICK else (group.seconds, group.least)
    timer = functools.partial(cpu_milliseconds, seconds=seconds, least=least)
    found = measure(Run(group.setting, folder, timer, provenance(CPU)), group.cases)
    problem.cache_clear()
    return found


@pytest.mark.parametrize(("group", "case", "clock"), list(parameters()))
def test_speed(group, case, clock, benchmark, results, request, capsys):
    params = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    chosen = tuple(one["case"] for one in params if one.get("group") is group)
    row, series = measured(replace(group, cases=chosen), results)[case]
    if row["status"].startswith("skipped"):
        pytest.skip(row["status"])
    if not series:
        pytest.fail(row["status"], pytrace=False)
    # The last for the call that pytest-benchmark makes after its rounds.
    clock.series = [*series, 0.0]
    benchmark.extra_info.update(row)
    benchmark.pedantic(clock.pass_a_round, rounds=len(series))
    ratio = "no baseline chosen"
    if row["ratio"]:
        ratio = f"ratio {row['ratio']} ({row['ratio_p20']} to {row['ratio_p80']})"
    took = f"{float(row['ms_p50']):.2f} ms"
    with capsys.disabled():
        print(f"\n{request.node.callspec.id}: {took}, {ratio}, peak {row['peak_mib']} MiB")
