"""Builds, proves and measures the project on a machine with a GPU (``python bench/gpu.py``; needs
no network, installs nothing).

Each section runs in a process of its own, within its minutes, and appends rows to
``<out>/<section>.csv`` as they come, so that a run that is cut off keeps what it has. What a path's
check or test refuses gets a row with the reason and no number, and so does whatever raises. The
last thing printed is one table.

Times are milliseconds of the GPU between two events around a call: the 20th, 50th and 80th
percentile of rounds in which all variants of a problem take turns, each warm, its gradients dropped
after the call, dL/dy made beforehand, the L2 cache overwritten. ``fwd`` is the forward of a
training step. A ratio is to the fastest baseline of the same rounds; what is a baseline stands in
cases.py, a path and its check in paths.py."""

import argparse
import gc
import multiprocessing
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(
    0, str(Path(__file__).resolve().parent.parent)
)  # a bare checkout works: where there is no network nothing can be installed

from bench.cases import CUDA, GROUPS, Setting
from bench.paths import problem, reason
from bench.roofline import DEVICES
from bench.rows import RESULTS, ROOT, now, provenance
from bench.timing import Run, gpu_milliseconds, measure

# tune takes minutes a shape: on request
DEFAULT_SECTIONS = (
    "build",
    "tests",
    "stock",
    "attention",
    "prologue",
    "augment",
    "layer",
    "decode",
    "model",
)
BUILD = {"extension": ["setup.py", "build_ext", "--inplace"], "self-check": ["-m", "sisa_kernels"]}
FAILURES = ("wrong", "failed", "died")  # how a status begins that makes the command fail
TABLE_LIMIT = 11_800  # characters
NOTES = 12  # lines of reasons in the table
CELL = {"ms_p50": 3, "ratio": 3, "over_bound": 2}  # significant digits in the table


# ---- Sections ------------------------------------------------------------------------------------


def build(run: Run) -> None:
    """The compiled extension, for the torch that is there, and the package's own report."""
    for name, arguments in BUILD.items():
        command, env = [sys.executable, *arguments], {**os.environ, "PYTHONPATH": str(ROOT)}
        pipe, limit = subprocess.PIPE, 60 * run.minutes
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=env,
            stdout=pipe,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=limit,
        )
        print(done.stdout[-8000:], flush=True)
        lines = done.stdout.strip().splitlines() or ["it printed nothing"]
        extension = next(
            (line for line in lines if line.startswith("extension:")), "extension: available"
        )
        if done.returncode:
            run.add("build", name, f"failed: {lines[-1]}")
        else:
            run.add(
                "build",
                name,
                "ok" if extension == "extension: available" else f"failed: {extension}",
            )


def files_with_gpu_tests() -> list[str]:
    """The files with tests marked ``gpu``: all of their tests run on the GPU where there is one."""
    marked = re.compile(r"^@pytest\.mark\.gpu", re.MULTILINE)
    return [
        str(path)
        for path in sorted((ROOT / "tests").glob("test_*.py"))
        if marked.search(path.read_text())
    ]


class Recorder:
    """A pytest plugin: a row for each test as it ends, those marked ``gpu`` first, and no further
    test past the deadline.
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
        self.run.add(
            "tests",
            report.nodeid,
            "ok" if report.outcome == "passed" else f"{report.outcome}: {said}",
        )


def tests(run: Run) -> None:
    """The tests of the files that have GPU tests, the slow ones left out."""
    os.environ["PYTHONPATH"] = str(ROOT)  # for tests that start processes
    options = [
        "-q",
        "--no-header",
        "--tb=short",
        "-p",
        "no:cacheprovider",
        "-m",
        "not slow",
        f"--rootdir={ROOT}",
    ]
    code = pytest.main(
        [*options, "-c", str(ROOT / "pyproject.toml"), *files_with_gpu_tests()],
        plugins=[Recorder(run)],
    )
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        run.add(
            "tests",
            "pytest",
            f"cut off: {code!r}" if time.monotonic() > run.deadline else f"failed: {code!r}",
        )


def timed(name: str) -> Callable[[Run], None]:
    """The section that measures the groups of cases.py one after the other while there is time for
    another.
    """

    def section(run: Run) -> None:
        groups, took = GROUPS[name](run.setting), 0.0
        for n, group in enumerate(groups):
            begin = time.monotonic()
            if begin + took > run.deadline:
                left = f"{len(groups) - n} of {len(groups)} problems not measured, from {group[0].shape} on"
                run.add(
                    name,
                    "rest",
                    f"cut off after {run.minutes:g} minutes: {left} (--lengths, --state-widths choose)",
                )
                return
            measure(run, group)
            problem.cache_clear()
            gc.collect()
            torch.cuda.empty_cache()
            took = time.monotonic() - begin
            print(f"{name} {n + 1}/{len(groups)}: {group[0].shape}, {took:.0f} s", flush=True)

    return section


SECTIONS: dict[str, Callable[[Run], None]] = {
    "build": build,
    "tests": tests,
    **{name: timed(name) for name in GROUPS},
}


def run_section(name: str, run: Run) -> None:
    run.deadline = time.monotonic() + 60 * run.minutes
    try:
        SECTIONS[name](run)
    except Exception as error:
        run.add(name, "section", f"died: {reason(error)}")
        raise


def run_apart(name: str, run: Run) -> None:
    """Run a section in a process of its own: it loads the extension as built, and what it breaks on
    the GPU goes with it.
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
        yield from (f"  python {' '.join(arguments)}" for arguments in BUILD.values())
    elif name == "tests":
        yield from (
            f"  pytest -m 'not slow' {Path(path).relative_to(ROOT)}"
            for path in files_with_gpu_tests()
        )
    else:
        for group in GROUPS[name](run.setting):
            for shape, passes in dict.fromkeys((case.shape, case.passes) for case in group):
                cases = [case for case in group if (case.shape, case.passes) == (shape, passes)]
                bounds = (
                    f"{case.path} {case.bound:.3f}" if case.bound else case.path for case in cases
                )
                yield f"  {shape} {passes}: {', '.join(bounds)}"


def cell(row: dict[str, str]) -> str:
    """p50 in ms, ratio to the baseline, multiple of the bound; without them why there is no number."""
    if row["status"] != "ok":
        return "wrong" if row["status"].startswith("wrong") else "none"
    return " ".join(f"{float(row[name]):.{digits}g}" for name, digits in CELL.items() if row[name])


def table(rows: list[dict[str, str]]) -> str:
    """What has no number and why, then every section's numbers, a line a problem; at most
    TABLE_LIMIT characters.
    """
    lines: list[str] = []
    notes: dict[tuple[str, str, str], list[str]] = {}
    for op in dict.fromkeys(row["op"] for row in rows):
        mine = [row for row in rows if row["op"] == op]
        problems: dict[tuple[str, str], dict[str, str]] = {
            (row["shape"], row["pass"]): {} for row in mine if row["shape"]
        }
        for row in mine:
            if row["status"] != "ok":
                notes.setdefault((op, row["path"], row["status"]), []).append(row["shape"])
            if row["shape"]:
                problems[row["shape"], row["pass"]][row["path"]] = cell(row)
        paths = list(dict.fromkeys(row["path"] for row in mine if row["shape"]))
        if not paths:
            lines.append(f"{op}: {sum(row['status'] == 'ok' for row in mine)} of {len(mine)} ok")
            continue
        lines.append(f"{op}: ms, over the fastest baseline, over the bound")
        labels = [f"{shape} {passes}" for shape, passes in problems]
        left, width = (
            max(map(len, labels)),
            1 + max(len(text) for cells in problems.values() for text in (*cells, *cells.values())),
        )
        lines.append(" " * left + "".join(f"{path:>{width}}" for path in paths))
        for label, cells in zip(labels, problems.values()):
            lines.append(
                f"{label:{left}}" + "".join(f"{cells.get(path, ''):>{width}}" for path in paths)
            )
    reasons = [
        f"{op} {path}{f' ({len(shapes)}x, first {shapes[0]})' if shapes[0] else ''}: {status}"[:150]
        for (op, path, status), shapes in notes.items()
    ]
    if len(reasons) > NOTES:
        reasons[NOTES:] = [f"... and {len(reasons) - NOTES} more reasons"]
    text = "\n".join(line.rstrip() for line in [*reasons, *lines])
    return (
        text
        if len(text) < TABLE_LIMIT
        else f"{text[: TABLE_LIMIT - 60]}\n... cut here: the rest is in the CSV files"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=DEFAULT_SECTIONS)
    parser.add_argument("--minutes", type=float, default=8, help="of each section")
    parser.add_argument(
        "--lengths",
        type=int,
        nargs="+",
        default=[],
        help="of the sequences; default: each section's own",
    )
    parser.add_argument("--state-widths", type=int, nargs="+", default=Setting.state_widths)
    parser.add_argument("--tokens", type=int, default=Setting.tokens, help="of a batch")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV files")
    parser.add_argument(
        "--device",
        choices=DEVICES,
        help="data sheet of the bounds; default: the GPU's own, H200 in a dry run",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print what would be built, tested and timed, and stop",
    )
    args = parser.parse_args(arguments)
    setting = Setting(
        lengths=tuple(args.lengths), state_widths=tuple(args.state_widths), tokens=args.tokens
    )
    name = args.device or "H200"
    if not args.dry_run:
        if not torch.cuda.is_available():
            print(
                f"bench/gpu.py needs a CUDA GPU; torch {torch.__version__} finds none (--dry-run needs none)",
                file=sys.stderr,
            )
            return 2
        name = args.device or next(
            (name for name in DEVICES if name in torch.cuda.get_device_name()), ""
        )
    run = Run(
        replace(setting, datasheet=DEVICES.get(name)), args.out, args.minutes, gpu_milliseconds
    )
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


if __name__ == "__main__":
    sys.exit(main())
