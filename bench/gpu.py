"""Builds, proves and measures the project on a machine with a GPU; needs no network.

It installs nothing. Each section runs in a process of its own, within its minutes, and appends rows
to ``<out>/<section>.csv`` as they come, so that a run that is cut off keeps what it has. What a
path's check or test refuses gets a row with the reason and no number, and so does whatever raises.
The last thing printed is one table.

Times are milliseconds of the GPU between two events around a call: the 20th, 50th and 80th
percentile of rounds in which all variants of a problem take turns, each warm, its gradients dropped
after the call, dL/dy made beforehand, the L2 cache overwritten. ``fwd`` is the forward of a
training step. A ratio is to the fastest baseline of the same rounds; what is a baseline stands in
cases.py, a path and its check in paths.py."""

import argparse
import gc
import logging
import multiprocessing
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch

from bench.cases import CUDA, GROUPS, Setting
from bench.paths import problem, reason
from bench.roofline import DEVICES
from bench.rows import PYTEST, ROOT, add_destination, now, provenance
from bench.timing import Run, gpu_milliseconds, measure

BUILD = {"extension": ["setup.py", "build_ext", "--inplace"], "self-check": ["-m", "sisa_kernels"]}
TIMED_BY_DEFAULT = ("stock", "attention", "prologue", "augment", "layer", "decode", "model")
DEFAULT_SECTIONS = ("build", "tests", *TIMED_BY_DEFAULT)  # tune takes minutes a shape: on request
FAILURES = ("wrong", "failed", "died")  # how a status begins that makes the command fail
TABLE_LIMIT = 11_800  # characters
NOTES = 12  # lines of reasons in the table
NOTE_LIMIT = 150  # characters of a reason
CELL = {"ms_p50": 3, "ratio": 3, "over_bound": 2}  # significant digits in the table


# ---- Sections ------------------------------------------------------------------------------------


def build(run: Run) -> None:
    """The compiled extension, for the torch that is there, and the package's own report."""
    for name, arguments in BUILD.items():
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60 * run.minutes,
        )
        print(done.stdout[-8000:], flush=True)
        lines = done.stdout.strip().splitlines() or ["it printed nothing"]
        reports = [line for line in lines if line.startswith("extension:")]
        if done.returncode:
            run.add("build", name, f"failed: {lines[-1]}")
        elif reports and reports[0] != "extension: available":
            run.add("build", name, f"failed: {reports[0]}")
        else:
            run.add("build", name, "ok")


def files_with_gpu_tests() -> list[Path]:
    """The files with tests marked ``gpu``: all of their tests run on the GPU where there is one."""
    marked = re.compile(r"^@pytest\.mark\.gpu", re.MULTILINE)
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [path for path in files if marked.search(path.read_text(encoding="utf-8"))]


class Recorder:
    """A pytest plugin: a row for each test as it ends, those marked ``gpu`` first.

    No further test starts past the deadline.
    """

    def __init__(self, run: Run):
        self.run = run

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items.sort(key=lambda item: item.get_closest_marker("gpu") is None)

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        if time.monotonic() > self.run.deadline:
            item.session.shouldstop = "the section's minutes are over"

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        lines = report.longreprtext.strip().splitlines() or [""]
        said = next((line[1:].strip() for line in lines if line.startswith("E ")), lines[-1])
        status = "ok" if report.outcome == "passed" else f"{report.outcome}: {said}"
        self.run.add("tests", report.nodeid, status)


def tests(run: Run) -> None:
    """The tests of the files that have GPU tests, the slow ones left out."""
    os.environ["PYTHONPATH"] = str(ROOT)  # for tests that start processes
    options = ["-q", "--no-header", "--tb=short", "-p", "no:cacheprovider", "-m", "not slow"]
    files = [str(path) for path in files_with_gpu_tests()]
    code = pytest.main([*options, *PYTEST, *files], plugins=[Recorder(run)])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        verdict = "cut off" if time.monotonic() > run.deadline else "failed"
        run.add("tests", "pytest", f"{verdict}: {code!r}")


def timed(name: str) -> Callable[[Run], None]:
    """The section that measures the groups of cases.py while there is time for another."""

    def section(run: Run) -> None:
        groups = GROUPS[name](run.setting)
        took = 0.0
        for n, group in enumerate(groups):
            begin = time.monotonic()
            shape = group[0].shape
            if begin + took > run.deadline:
                left = f"{len(groups) - n} of {len(groups)} problems not measured, from {shape} on"
                after = f"cut off after {run.minutes:g} minutes"
                run.add(name, "rest", f"{after}: {left} (--lengths, --d-states choose)")
                return
            measure(run, group)
            problem.cache_clear()
            gc.collect()
            torch.cuda.empty_cache()
            took = time.monotonic() - begin
            print(f"{name} {n + 1}/{len(groups)}: {shape}, {took:.0f} s", flush=True)

    return section


SECTIONS: dict[str, Callable[[Run], None]] = {
    "build": build,
    "tests": tests,
    **{name: timed(name) for name in GROUPS},
}


def run_section(name: str, run: Run) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    run.deadline = time.monotonic() + 60 * run.minutes
    try:
        SECTIONS[name](run)
    except Exception as error:
        run.add(name, "section", f"died: {reason(error)}")
        raise


def run_apart(name: str, run: Run) -> None:
    """Run a section in a process of its own.

    It loads the extension as built, and what it breaks on the GPU goes with it.
    """
    process = multiprocessing.get_context("spawn").Process(target=run_section, args=(name, run))
    process.start()
    process.join(60 * run.minutes + 20)  # a section that keeps its minutes ends by itself
    if process.is_alive():
        process.kill()
        process.join()
        run.add(name, "section", f"cut off: killed after {run.minutes:g} minutes")
    elif process.exitcode and process.exitcode < 0:
        run.add(name, "section", f"died: signal {-process.exitcode}")


# ---- What is printed -----------------------------------------------------------------------------


def plan(name: str, run: Run) -> Iterator[str]:
    """What a section would do, with the roofline's bound of every path and shape in ms."""
    yield f"{name}: at most {run.minutes:g} minutes"
    if name == "build":
        for arguments in BUILD.values():
            yield f"  python {' '.join(arguments)}"
        return
    if name == "tests":
        for path in files_with_gpu_tests():
            yield f"  pytest -m 'not slow' {path.relative_to(ROOT)}"
        return
    for group in GROUPS[name](run.setting):
        problems: dict[tuple[str, str], list[str]] = {}
        for case in group:
            bound = f"{case.path} {case.bound:.3f}" if case.bound else case.path
            problems.setdefault((case.shape, case.passes), []).append(bound)
        for (shape, passes), bounds in problems.items():
            yield f"  {shape} {passes}: {', '.join(bounds)}"


def cell(row: dict[str, str]) -> str:
    """p50 in ms, ratio to the baseline, multiple of the bound; why, where there is no number."""
    if row["status"] != "ok":
        return "wrong" if row["status"].startswith("wrong") else "none"
    return " ".join(f"{float(row[name]):.{digits}g}" for name, digits in CELL.items() if row[name])


def notes(rows: Sequence[dict[str, str]]) -> list[str]:
    """Why there are no numbers: a line a reason, at most ``NOTES``."""
    shapes: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        if row["status"] != "ok":
            key = (row["op"], row["path"], row["status"])
            shapes.setdefault(key, []).append(row["shape"])
    lines = []
    for (op, path, status), where in shapes.items():
        times = f" ({len(where)}x, first {where[0]})" if where[0] else ""
        lines.append(f"{op} {path}{times}: {status}"[:NOTE_LIMIT])
    if len(lines) > NOTES:
        lines[NOTES:] = [f"... and {len(lines) - NOTES} more reasons"]
    return lines


def numbers(op: str, rows: Sequence[dict[str, str]]) -> list[str]:
    """A section's numbers, a line a problem and a column a path; of the others, how many are ok."""
    measured = [row for row in rows if row["shape"]]
    if not measured:
        return [f"{op}: {sum(row['status'] == 'ok' for row in rows)} of {len(rows)} ok"]
    paths = list(dict.fromkeys(row["path"] for row in measured))
    problems: dict[str, dict[str, str]] = {}
    for row in measured:
        problems.setdefault(f"{row['shape']} {row['pass']}", {})[row["path"]] = cell(row)
    texts = [text for cells in problems.values() for text in (*cells, *cells.values())]
    left = max(map(len, problems))
    width = 1 + max(map(len, texts))
    lines = [
        f"{op}: ms, over the fastest baseline, over the bound",
        " " * left + "".join(f"{path:>{width}}" for path in paths),
    ]
    for label, cells in problems.items():
        lines.append(f"{label:{left}}" + "".join(f"{cells.get(p, ''):>{width}}" for p in paths))
    return lines


def table(rows: Sequence[dict[str, str]]) -> str:
    """What has no number and why, then every section's numbers, within ``TABLE_LIMIT``."""
    lines = notes(rows)
    for op in dict.fromkeys(row["op"] for row in rows):
        lines += numbers(op, [row for row in rows if row["op"] == op])
    text = "\n".join(line.rstrip() for line in lines)
    if len(text) < TABLE_LIMIT:
        return text
    return f"{text[: TABLE_LIMIT - 60]}\n... cut here: the rest is in the CSV files"


# ---- The command ---------------------------------------------------------------------------------


def arguments_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--sections", nargs="+", choices=SECTIONS, default=DEFAULT_SECTIONS)
    add("--minutes", type=float, default=8, help="of each section")
    lengths = "of the sequences; default: each section's own"
    add("--lengths", type=int, nargs="+", default=[], help=lengths)
    add("--d-states", type=int, nargs="+", default=Setting.d_states)
    add("--tokens", type=int, default=Setting.tokens, help="of a batch")
    add_destination(parser)
    device = "data sheet of the bounds; default: the GPU's own, H200 in a dry run"
    add("--device", choices=DEVICES, help=device)
    dry_run = "print what would be built, tested and timed, and stop"
    add("--dry-run", action="store_true", help=dry_run)
    return parser


def data_sheet_name(args: argparse.Namespace) -> str:
    """Of the bounds; empty: none is known of this GPU."""
    if args.device:
        return args.device
    if args.dry_run:
        return "H200"
    return next((name for name in DEVICES if name in torch.cuda.get_device_name()), "")


def main(arguments: list[str] | None = None) -> int:
    args = arguments_parser().parse_args(arguments)
    if not (args.dry_run or torch.cuda.is_available()):
        print(
            f"python -m bench gpu needs a CUDA GPU; torch {torch.__version__} finds none "
            "(--dry-run needs none)",
            file=sys.stderr,
        )
        return 2
    name = data_sheet_name(args)
    setting = Setting(
        lengths=tuple(args.lengths),
        d_states=tuple(args.d_states),
        tokens=args.tokens,
        datasheet=DEVICES.get(name),
    )
    run = Run(setting, args.out, args.minutes, gpu_milliseconds)
    if args.dry_run:
        print(f"bounds of the {name}, in ms; rows are appended to {args.out}")
        print("\n\n".join("\n".join(plan(section, run)) for section in args.sections))
        return 0
    run.provenance = provenance(CUDA)
    print(", ".join(f"{key} {value}" for key, value in run.provenance.items()), flush=True)
    start = now()
    for section in args.sections:
        run_apart(section, run)
    rows = [row for section in args.sections for row in run.rows(section, start)]
    print(table(rows))
    return int(any(row["status"].startswith(FAILURES) for row in rows))
