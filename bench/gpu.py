"""Builds, proves and measures the project on a machine with a GPU, within its minutes.

It needs no network and installs nothing. The work is one plan, most valuable first (bench/plan.py;
``--dry-run`` prints it): the library is built, the GPU's tests run while kernels that are timed
later are compiled ahead, then problems are timed one by one, in a process that is replaced where
the GPU or a kernel breaks it. At most a third of the minutes goes into compiling: past it nothing
begins that needs new kernels. Rows are appended to ``<out>/<section>.csv`` as they come, so that a
run that is cut off keeps what it has. What a path's check or test refuses gets a row with the
reason and no number, and so does whatever raises or is not reached. The last thing printed is one
table.

Times are milliseconds of the GPU between two events around a call: the 20th, 50th and 80th
percentile of rounds in which all variants of a problem take turns, each warm, its gradients dropped
after the call, dL/dy made beforehand, the L2 cache overwritten. ``fwd`` is the forward of a
training step. A ratio is to the fastest baseline of the same rounds; what is a baseline stands in
cases.py, a path and its check in paths.py."""

import argparse
import contextlib
import gc
import logging
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
import torch._inductor.config

from bench.cases import CUDA, Setting
from bench.paths import problem, reason
from bench.plan import ON_REQUEST, PROCESS, SECTIONS, Step, estimates, missing_forms, plan
from bench.roofline import DEVICES
from bench.rows import PYTEST, ROOT, add_destination, now, provenance
from bench.timing import COMPILE_SHARE, Budget, Run, gpu_milliseconds, measure

BUILD = {"extension": ["setup.py", "build_ext", "--inplace"], "self-check": ["-m", "sisa_kernels"]}
DEFAULT_SECTIONS = tuple(name for name in SECTIONS if name not in ON_REQUEST)
FAILURES = ("wrong", "failed", "died")  # how a status begins that makes the command fail
CORES = os.cpu_count() or 1
TESTERS = max(1, min(4, CORES // 4))  # processes
COMPILERS = max(0, min(6, CORES // 2 - 2))
BROKEN = 70  # a tester's exit status: the GPU no longer serves its process
GRACE = 15.0  # seconds past its minutes in which a process ends by itself
HANGS = 60.0  # seconds past PATIENCE times its estimate: then a step hangs
PATIENCE = 4
NO_FORM = "bench/paths.py has no such path here"
TABLE_LIMIT = 11_800  # characters
NOTES = 12  # lines of reasons in the table
NOTE_LIMIT = 150  # characters of a reason
CELL = {"ms_p50": 3, "ratio": 3, "over_bound": 2}  # significant digits in the table

spawn = multiprocessing.get_context("spawn")


# ---- Build and tests -----------------------------------------------------------------------------


def build(run: Run) -> None:
    """The compiled extension, for the torch that is there, and the package's own report."""
    for name, arguments in BUILD.items():
        with run.budget.compiling(name):
            code, said = output_until(run.deadline, [sys.executable, *arguments])
        print(said[-8000:], flush=True)
        lines = said.strip().splitlines() or ["it printed nothing"]
        reports = [line for line in lines if line.startswith("extension:")]
        if code is None:
            run.add("build", name, "failed: cut off after its minutes")
        elif code:
            run.add("build", name, f"failed: {lines[-1]}")
        elif reports and reports[0] != "extension: available":
            run.add("build", name, f"failed: {reports[0]}")
        else:
            run.add("build", name, "ok")


def build_environment() -> dict[str, str]:
    """Builds for the GPU that is there alone, unless others are asked for."""
    own = {}
    if torch.cuda.is_available():
        own["TORCH_CUDA_ARCH_LIST"] = "{}.{}".format(*torch.cuda.get_device_capability())
    return {**own, **os.environ, "PYTHONPATH": str(ROOT)}


def output_until(deadline: float, command: Sequence[str]) -> tuple[int | None, str]:
    """A command's status and output; None: it and what it started were killed at the deadline."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=build_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=max(1.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return None, process.communicate()[0]
    return process.returncode, said


def files_with_gpu_tests() -> list[Path]:
    """The files with tests marked ``gpu``: all of their tests run on the GPU where there is one."""
    marked = re.compile(r"pytest\.mark\.gpu\b", re.MULTILINE)
    files = sorted((ROOT / "tests" / "kernels").rglob("test_*.py"))
    files += sorted((ROOT / "tests" / "models").rglob("test_*.py"))
    return [path for path in files if marked.search(path.read_text(encoding="utf-8"))]


def value_of(item: pytest.Item) -> tuple[bool, bool, bool]:
    """Sorts the most telling tests first: bf16, marked ``gpu``, of the Triton kernels."""
    values = item.callspec.params.values() if hasattr(item, "callspec") else ()
    half = torch.bfloat16 in values or "bf16" in item.nodeid
    marked = item.get_closest_marker("gpu") is not None
    return not half, not marked, "triton" not in item.nodeid


class Recorder:
    """A pytest plugin: a row for each test as it ends, the most telling first.

    Of every ``count`` tests it keeps the one at ``index``, and leaves those that have a row of this
    run. No further test starts past the deadline or when the GPU no longer serves."""

    def __init__(self, run: Run, since: str, index: int = 0, count: int = 1):
        self.run = run
        self.since = since
        self.index = index
        self.count = count
        self.broken = False

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        done = {row["path"] for row in self.run.rows("tests", self.since)}
        mine = sorted(items, key=value_of)[self.index :: self.count]
        items[:] = [item for item in mine if item.nodeid not in done]

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        if time.monotonic() > self.run.deadline:
            item.session.shouldstop = "the section's minutes are over"
        if self.broken:
            item.session.shouldstop = "the GPU no longer serves this process"

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        lines = report.longreprtext.strip().splitlines() or [""]
        said = next((line[1:].strip() for line in lines if line.startswith("E ")), lines[-1])
        status = "ok" if report.outcome == "passed" else f"{report.outcome}: {said}"
        self.run.add("tests", report.nodeid, status)
        self.broken = report.outcome == "failed" and not gpu_serves()


def gpu_serves() -> bool:
    """Whether this process can still use its GPU: an error of a kernel ends that for good."""
    if not torch.cuda.is_available():
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def run_tests(run: Run, since: str, index: int = 0, count: int = 1) -> None:
    """Every ``count``-th test of the files that have GPU tests, the slow ones left out."""
    os.environ["PYTHONPATH"] = str(ROOT)  # for tests that start processes
    options = ["-q", "--no-header", "--tb=short", "-p", "no:cacheprovider", "-m", "not slow"]
    files = [str(path) for path in files_with_gpu_tests()]
    recorder = Recorder(run, since, index, count)
    code = pytest.main([*options, *PYTEST, *files], plugins=[recorder])
    if recorder.broken:
        sys.exit(BROKEN)
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        verdict = "cut off" if time.monotonic() > run.deadline else "failed"
        run.add("tests", "pytest", f"{verdict}: {code!r}")


def tests(run: Run) -> None:
    """All of them, by several processes; one whose GPU a test broke is replaced."""
    since = now()

    def start(index: int) -> multiprocessing.process.BaseProcess:
        process = spawn.Process(target=run_tests, args=(run, since, index, TESTERS))
        process.start()
        return process

    testers = [start(index) for index in range(TESTERS)]
    while any(tester.is_alive() for tester in testers):
        time.sleep(0.2)
        over = time.monotonic() - run.deadline
        for index, tester in enumerate(testers):
            if over > GRACE:
                tester.kill()
            elif tester.exitcode == BROKEN and over < 0:
                testers[index] = start(index)
    for tester in testers:
        tester.join()
        if tester.exitcode and tester.exitcode < 0:
            cut = time.monotonic() > run.deadline + GRACE
            verdict = "cut off: killed" if cut else f"died: signal {-tester.exitcode}"
            run.add("tests", "process", verdict)


# ---- What is timed -------------------------------------------------------------------------------


def timed_steps(run: Run, sections: Sequence[str]) -> list[Step]:
    return [step for step in plan(run.setting, sections) if step.cases]


@contextlib.contextmanager
def compiled_ahead(run: Run, sections: Sequence[str], count: int) -> Iterator[None]:
    """Meanwhile ``count`` processes compile what is timed later, into the caches on disk."""
    compilers = [
        spawn.Process(target=compile_steps, args=(run, sections, index, count), daemon=True)
        for index in range(count)
    ]
    for process in compilers:
        process.start()
    try:
        yield
    finally:
        for process in compilers:
            process.kill()
            process.join()


def compile_steps(run: Run, sections: Sequence[str], index: int, count: int) -> None:
    """Check and call every case of each ``count``-th step once; what fails, fails again later."""
    torch._inductor.config.compile_threads = 2
    for step in timed_steps(run, sections)[index::count]:
        for case in step.cases:
            with contextlib.suppress(Exception):
                case.check()
                case.make()()
        free()


def free() -> None:
    """Give back the memory of a problem."""
    problem.cache_clear()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def refused_start(step: Step, budget: Budget) -> str:
    """Why a step must not begin at this moment; empty: it may."""
    moment = time.monotonic()
    if moment > budget.until(step.share) and not step.first:
        return "not started: the minutes of its block were over"
    left = budget.until(1) - moment
    needed = step.seconds(set(budget.kernels))
    if needed > left:
        return f"not started: about {needed:.0f} s, {max(left, 0):.0f} s were left"
    return ""


def run_step(step: Step, run: Run) -> None:
    """Measure a step's cases, where it may begin."""
    begin = time.monotonic()
    why = refused_start(step, run.budget)
    if why:
        run.add(step.section, "all", why, shape=step.cases[0].shape)
        return
    measure(run, step.cases)
    free()
    print(f"{step.title}, {time.monotonic() - begin:.0f} s", flush=True)


def work(run: Run, sections: Sequence[str], first: int, messages: Connection) -> None:
    """Run the timed steps from one on; after each the next one's number and the budget are sent.

    An error that ends the process for the GPU too gets a row."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    steps = timed_steps(run, sections)
    for number in range(first, len(steps)):
        step = steps[number]
        try:
            run_step(step, run)
        except Exception as error:
            run.add(step.section, "process", f"died: {reason(error)}", shape=step.cases[0].shape)
            raise
        messages.send((number + 1, run.budget))
        if not gpu_serves():
            return  # the next process begins with the next step


def run_timed(run: Run, sections: Sequence[str]) -> None:
    """All timed steps, by one process after the other.

    A process loads the extension as built, and what it breaks on the GPU goes with it."""
    steps = timed_steps(run, sections)
    number = 0
    while number < len(steps):
        if time.monotonic() + PROCESS > run.budget.until(1) and number:
            for step in steps[number:]:
                why = "not started: no time was left for another process"
                run.add(step.section, "all", why, shape=step.cases[0].shape)
            return
        number = run_process(run, sections, steps, number)


def run_process(run: Run, sections: Sequence[str], steps: Sequence[Step], number: int) -> int:
    """Steps from ``number`` on until all are done or the process ends; the next step's number."""
    mine, its = spawn.Pipe(duplex=False)
    process = spawn.Process(target=work, args=(run, sections, number, its))
    process.start()
    its.close()
    begun = number
    hangs = False
    while number < len(steps) and not hangs:
        hangs = not mine.poll(patience_with(steps[number], run.budget, number == begun))
        if hangs:
            process.kill()  # what it has sent stays in the pipe
        try:
            number, run.budget = mine.recv()
        except EOFError:
            break
    process.join(GRACE)
    process.kill()
    left_by_itself = process.exitcode == 0 and number > begun
    if number == len(steps) or left_by_itself:
        return number
    if hangs or process.exitcode != 1:  # of 1 the process itself has left a row
        step = steps[number]
        run.add(step.section, "process", end_of(process, run, hangs), shape=step.cases[0].shape)
    return number + 1


def patience_with(step: Step, budget: Budget, starts: bool) -> float:
    """Seconds after which a step hangs; it may be the first of a process that starts."""
    estimate = step.seconds(set(budget.kernels)) + (PROCESS if starts else 0.0)
    end = budget.until(1) + GRACE - time.monotonic()
    return max(0.0, min(HANGS + PATIENCE * estimate, end))


def end_of(process: multiprocessing.process.BaseProcess, run: Run, hangs: bool) -> str:
    """What to say of a process that did not do its steps."""
    if hangs and time.monotonic() > run.budget.until(1):
        return "cut off: the minutes were over"
    if hangs:
        return "died: it hung and was killed"
    code = process.exitcode or 0
    return f"died: signal {-code}" if code < 0 else f"died: exit status {code}"


ONCE: dict[str, Callable[[Run], None]] = {"build": build, "tests": tests}


def run_once(step: Step, run: Run) -> None:
    """A step that times nothing, until its block's share is over."""
    run.deadline = run.budget.until(step.share)
    try:
        ONCE[step.section](run)
    except Exception as error:
        run.add(step.section, "section", f"died: {reason(error)}")


def run_plan(run: Run, sections: Sequence[str]) -> Iterator[str]:
    """Everything, in order; what each part took, in words."""
    steps = plan(run.setting, sections)
    for step in steps:
        if step.cases:
            break
        begin = time.monotonic()
        with compiled_ahead(run, sections, COMPILERS if step.section == "tests" else 0):
            run_once(step, run)
        yield f"{step.block} {(time.monotonic() - begin) / 60:.1f}"
    begin = time.monotonic()
    if "forms" in sections:
        for name in missing_forms():
            run.add("forms", name, f"skipped: {NO_FORM}")
    run_timed(run, sections)
    yield f"timing {(time.monotonic() - begin) / 60:.1f}"
    allowed = COMPILE_SHARE * run.budget.seconds / 60
    yield f"compiling, in all of it, {run.budget.compiled / 60:.1f} of at most {allowed:.1f}"


# ---- What is printed -----------------------------------------------------------------------------


def planned(step: Step) -> Iterator[str]:
    """What a step would do, with the roofline's bound of every path and shape in ms."""
    if step.section == "build":
        for arguments in BUILD.values():
            yield f"  python {' '.join(arguments)}"
    if step.section == "tests":
        for path in files_with_gpu_tests():
            yield f"  pytest -m 'not slow' {path.relative_to(ROOT)}"
    problems: dict[tuple[str, str], list[str]] = {}
    for case in step.cases:
        bound = f"{case.path} {case.bound:.3f}" if case.bound else case.path
        problems.setdefault((case.shape, case.passes), []).append(bound)
    for (shape, passes), bounds in problems.items():
        yield f"  {shape} {passes}: {', '.join(bounds)}"


def dry_run(setting: Setting, sections: Sequence[str], minutes: float) -> Iterator[str]:
    """The plan's blocks, with the minutes that they are estimated to take, and where these end."""
    elapsed = 0.0
    block = ""
    for step, takes, until in estimates(plan(setting, sections), 60 * minutes):
        if step.block != block:
            yield f"\n{step.block} ({step.section}.csv): begun by minute {until:.1f}"
            block = step.block
        late = " (past the minutes)" if elapsed + takes > minutes else ""
        yield f"  minute {elapsed:.1f}, about {60 * takes:.0f} s{late}"
        yield from planned(step)
        elapsed += takes
    if "forms" in sections and missing_forms():
        yield f"\nskipped, {NO_FORM}: {', '.join(missing_forms())}"


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
    measured = [row for row in rows if row["pass"]]
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
    add("--minutes", type=float, default=8, help="of the whole run (default 8)")
    sections = "parts of the plan by their files of rows; default: all but tune"
    add("--sections", nargs="+", choices=SECTIONS, default=DEFAULT_SECTIONS, help=sections)
    lengths = "of the sequences; default: each part's own"
    add("--lengths", type=int, nargs="+", default=[], help=lengths)
    add("--d-states", type=int, nargs="+", default=Setting.d_states, help="the first goes first")
    add("--tokens", type=int, default=Setting.tokens, help="of a batch")
    add_destination(parser)
    device = "data sheet of the bounds; default: the GPU's own, H200 in a dry run"
    add("--device", choices=DEVICES, help=device)
    dry_run = "print the plan with its estimated minutes, and stop"
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
    parser = arguments_parser()
    args = parser.parse_args(arguments)
    if not args.minutes > 0:
        parser.error(f"--minutes must be > 0, got {args.minutes}")
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
    if args.dry_run:
        print(
            f"{args.minutes:g} minutes in all, at most a third of them compiling; "
            f"bounds of the {name}, in ms; rows are appended to {args.out}"
        )
        print("\n".join(dry_run(setting, args.sections, args.minutes)))
        return 0
    budget = Budget(60 * args.minutes)
    run = Run(setting, args.out, gpu_milliseconds, provenance(CUDA), budget)
    print(", ".join(f"{key} {value}" for key, value in run.provenance.items()), flush=True)
    start = now()
    took = list(run_plan(run, args.sections))
    rows = [row for name in SECTIONS if name in args.sections for row in run.rows(name, start)]
    print(f"minutes: {', '.join(took)}")
    print(table(rows))
    return int(any(row["status"].startswith(FAILURES) for row in rows))
