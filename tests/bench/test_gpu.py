"""``python -m bench gpu`` without a GPU, on the interpreter and a fake timer."""

import csv
import itertools
import math
import os
import re
import signal
import sys
import time
import warnings
from dataclasses import replace

import pytest
import torch

from bench.roofline import DEVICES, Shape, bound_ms, horizon_tokens
from sisa_kernels.triton import tiles
from tests.support import ROOT

pytest.importorskip("sisa_kernels.triton.op", reason="needs the package triton")
from bench import cases, gpu, paths, plan, rows, timing
from bench.cases import GROUPS, Setting, attention_case
from bench.paths import ATTENTION, EXACT, failure
from bench.rows import COLUMNS
from bench.timing import Budget, Run, measure
from sisa_kernels.triton.horizon import horizon_starts
from sisa_kernels.triton.op import default_horizon
from sisa_kernels.triton.prologue import prologue

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the GPU is measured by the command itself"
)
CPU = torch.device("cpu")
SAFE = tiles.SAFE[0][2]
TINY = Setting(
    CPU,
    torch.float32,
    (64,),
    (16,),
    tokens=128,
    heads=1,
    head_dim=16,
    models=("transformer-tiny", "sisa-tiny-ds16"),
)
SHAPE = Shape(2, 64, 1, 16, 16, 16)
FLASH = paths.STOCK[1]
NAMES = [path.name for path in ATTENTION]


def fake_timer(calls):
    """Runs each call once; the first took 1 to 11 ms, the second 2 to 22 ..."""
    for call in calls:
        call()
    return [[float(n * k) for k in range(1, 12)] for n in range(1, len(calls) + 1)]


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "WARM_CALLS", 1)
    return Run(
        replace(TINY, datasheet=DEVICES["H200"]),
        tmp_path / "results",
        fake_timer,
        {"commit": "abc", "device": "none"},
        Budget(480.0),
    )


def case(path, passes="fwd+bwd", **options):
    return attention_case("attention", path, SHAPE, passes, TINY, **options)


# ---- The command ---------------------------------------------------------------------------------


def blocks_of(out):
    """The lines of a dry run by block."""
    found = {}
    for part in out.split("\n\n")[1:]:
        title, *lines = part.splitlines()
        if title.startswith("skipped"):
            continue
        found[title.partition(" (")[0]] = lines
    return found


def test_dry_run_lists_every_block_path_and_bound(capsys):
    assert gpu.main(["--dry-run", "--sections", *plan.SECTIONS]) == 0
    out = capsys.readouterr().out
    assert out.startswith("8 minutes in all, at most a third of them compiling; bounds of the H200")
    blocks = blocks_of(out)
    present = [block.name for block in plan.PLAN if block.name != "forms" or paths.STOCK_FORMS]
    assert list(blocks) == present
    assert "  python setup.py build_ext --inplace" in blocks["build"]
    assert "  python -m sisa_kernels" in blocks["build"]
    files = [line.split()[-1] for line in blocks["tests"] if "pytest" in line]
    assert {"test_augment_cuda.py", "test_mamba.py", "test_one_call.py", "test_triton.py"} <= {
        file.rpartition("/")[2] for file in files
    }
    assert all((ROOT / file).is_file() for file in files)
    augmented = "80/64 80/80 96/64 96/96 128/64 128/128 192/64 192/192 192/128"
    for widths in ("64/64", *augmented.split()):
        assert any(f"16x2048x12 {widths} fwd+bwd: cudnn " in line for line in blocks["stock"])
    for length, ds, passes in itertools.product(
        (1024, 2048, 4096, 8192, 16384, 32768), (16, 32, 64, 128), ("fwd", "fwd+bwd")
    ):
        label = f"  {32768 // length}x{length}x12 64+{ds}/64 {passes}: "
        lines = blocks["attention"] + blocks["widths"]
        mine = [line[len(label) :] for line in lines if line.startswith(label)]
        bounds = dict(part.rsplit(" ", 1) for line in mine for part in line.split(", "))
        assert set(bounds) == set(NAMES)
        shape, h200 = Shape(32768 // length, length, 12, 64, ds, 64), DEVICES["H200"]
        near = bound_ms(
            "exact", shape, h200, backward=passes != "fwd", horizon=horizon_tokens(ds, 100)
        )
        assert bounds["sisa"] == f"{near:.3f}"
        assert bounds["cudnn"] == f"{bound_ms('plain', shape, h200, backward=passes != 'fwd'):.3f}"
    assert any("copy" in line for line in blocks["prologue"])
    assert any("extension" in line for line in blocks["augment"])
    models = "transformer-152m, sisa-152m-ds16, mamba2-152m"
    assert f"  8x2048 eager step: {models}" in blocks["training"]
    assert f"  8x2048 compiled step: {models}" in blocks["compiled training"]
    assert f"  16x2048 fwd+bwd: {models}" in blocks["layers"]
    assert f"  1x8192 token: {models}" in blocks["decode"]
    assert sum("tuned" in line for line in blocks["tune"]) == 4


def test_options_change_what_is_done(capsys):
    def dry(*options):
        assert gpu.main(["--dry-run", "--sections", "attention", *options]) == 0
        return capsys.readouterr().out

    def shapes(*options):
        return [line for line in dry(*options).splitlines() if re.match(r"  \d+x\d+x", line)]

    default = dry()
    assert "sisa" in default
    assert "tune" not in gpu.DEFAULT_SECTIONS
    assert {line.split()[0] for line in shapes("--lengths", "512", "--tokens", "1024")} == {
        "2x512x12"
    }
    assert {line.split()[1] for line in shapes("--d-states", "32")} == {"64+32/64"}
    assert "3 minutes in all" in dry("--minutes", "3")
    assert "bounds of the A100" in dry("--device", "A100")
    assert dry("--device", "A100") != default
    assert "/elsewhere" in dry("--out", "/elsewhere")
    with pytest.raises(SystemExit):
        dry("--minutes", "0")
    assert "--minutes must be > 0" in capsys.readouterr().err


# ---- The plan ------------------------------------------------------------------------------------


def test_the_plan_begins_with_what_is_worth_most():
    steps = plan.plan(Setting(), gpu.DEFAULT_SECTIONS)
    order = list(dict.fromkeys(step.block for step in steps))
    assert order == [block.name for block in plan.PLAN if block.name in order]
    assert order[:3] == ["build", "tests", "attention"]
    assert [step.cases[0].shape for step in steps if step.block == "attention"] == [
        "16x2048x12 64+16/64",
        "16x2048x12 64+16/64 t=3",
        "2x16384x12 64+16/64",
        "2x16384x12 64+16/64 t=3",
    ]
    training = next(step for step in steps if step.block == "training")
    assert [one.path for one in training.cases] == [
        "transformer-152m",
        "sisa-152m-ds16",
        "mamba2-152m",
    ]
    at_work = order.index("training")
    assert at_work < order.index("widths") < order.index("stock")


def test_no_case_is_planned_twice_but_what_others_are_measured_against():
    steps = plan.plan(Setting(), plan.SECTIONS)
    cases = [plan.identity(one) for step in steps for one in step.cases if not one.baseline]
    assert len(cases) == len(set(cases))
    everything = {
        plan.identity(one) for groups in GROUPS.values() for g in groups(Setting()) for one in g
    }
    planned = {plan.identity(one) for step in steps for one in step.cases}
    assert everything <= planned


def test_shares_of_the_chosen_sections_make_up_the_whole():
    for sections in (plan.SECTIONS, ["attention"], ["tune"], ["build", "model"]):
        steps = plan.plan(Setting(), sections)
        shares = [step.share for step in steps]
        assert shares == sorted(shares)
        assert shares[-1] == pytest.approx(1)
    estimated = list(plan.estimates(plan.plan(Setting(), gpu.DEFAULT_SECTIONS), 480))
    # What is worth most fits the minutes, by the estimates, each block within its own.
    valuable = ("build", "tests", "attention", "forms", "prologue", "training")
    begin = 0.0
    for step, takes, until in estimated:
        if step.block in valuable:
            assert begin <= until
            begin += takes
    assert begin < 8


def test_a_form_that_is_missing_is_said(monkeypatch, capsys, run):
    monkeypatch.setattr(plan, "STOCK_FORMS", [])
    assert gpu.main(["--dry-run"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "skipped, bench/paths.py has no such path here: far_and_band, wide"
    assert gpu.missing_forms() == ["far_and_band", "wide"]
    monkeypatch.setattr(gpu, "run_timed", lambda *_: None)
    list(gpu.run_plan(run, ["forms"]))
    assert [(row["path"], row["status"]) for row in run.rows("forms")] == [
        (name, "skipped: bench/paths.py has no such path here") for name in paths.FORMS
    ]


def test_a_form_that_is_there_is_timed_beside_both(monkeypatch):
    monkeypatch.setattr(plan, "STOCK_FORMS", list(paths.FORMS.values()))
    s = Setting(datasheet=DEVICES["H200"])
    steps = plan.plan(s, ["forms"])
    names = ["sisa", "far_and_band", "wide", "cudnn", "flash"]
    assert [one.path for one in steps[0].cases] == names * 2
    assert len(steps) == 4
    exact, band, wide, stock, _ = (one.bound for one in steps[0].cases[5:])
    assert band == stock < wide < exact


# ---- The minutes ---------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is moved."""
    moment = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: moment[0])
    return moment


def test_unspent_minutes_are_the_next_ones(run, clock, monkeypatch):
    """Deadlines are cumulative; compiling stops at a third; what does not fit is not begun."""
    budget = Budget(480.0, begin=1000.0)
    build, tests = plan.plan(Setting(), gpu.DEFAULT_SECTIONS)[:2]
    seen = []
    monkeypatch.setitem(gpu.ONCE, "build", lambda run: seen.append(run.deadline))
    monkeypatch.setitem(gpu.ONCE, "tests", lambda run: seen.append(run.deadline))
    run = replace(run, budget=budget)
    gpu.run_once(build, run)
    clock[0] += 10  # the build was quick: the tests have all that is left of both
    gpu.run_once(tests, run)
    assert seen == [pytest.approx(1000 + 480 * step.share) for step in (build, tests)]


def test_a_step_that_is_late_or_long_is_not_begun(clock):
    step = plan.Step("attention", "attention", 0.5, (case(EXACT), case(FLASH, baseline=True)))
    budget = Budget(100.0, begin=1000.0)
    assert gpu.refused_start(step, budget) == ""
    clock[0] = 1051.0
    assert gpu.refused_start(step, budget) == "not started: the minutes of its block were over"
    assert gpu.refused_start(replace(step, first=True), budget) == ""
    late = replace(step, share=1.0)
    assert gpu.refused_start(late, budget) == ""
    clock[0] = 1090.0
    # Two cases' kernels at 5 s, two calls at 0.5 s and 4 s of timing.
    assert gpu.refused_start(late, budget) == "not started: about 15 s, 10 s were left"
    budget.kernels |= {one.kernels for one in step.cases}
    assert gpu.refused_start(late, budget) == ""


def test_past_a_third_nothing_begins_that_must_be_compiled(run, monkeypatch):
    clock = itertools.count(0, 40)  # every look at the clock is 40 s later
    budget = Budget(480.0, begin=0.0)
    cases = [case(FLASH, baseline=True), case(EXACT)]
    known = [replace(one, path="again") for one in cases[:1]]
    with monkeypatch.context() as patch:
        patch.setattr(time, "monotonic", lambda: next(clock))
        for _ in range(4):
            assert budget.may_start("new")
            with budget.compiling(cases[0].kernels):
                pass
    assert budget.compiled == 160
    assert not budget.may_start("new")
    assert budget.may_start("")
    measure(replace(run, budget=budget), cases + known)
    rows = {row["path"]: row["status"] for row in run.rows("attention")}
    assert rows == {
        "flash": "ok",
        "sisa": "not started: a third of the run was spent compiling",
        "again": "ok",
    }


def test_checks_and_first_calls_count_as_compiling(run):
    def slow(x):
        time.sleep(0.05)
        return FLASH.call(x)

    budget = Budget(480.0)
    measure(replace(run, budget=budget), [case(replace(FLASH, call=slow, name="slow"))])
    assert 0.1 < budget.compiled < 30
    assert budget.kernels == {"", "slow 16/16"}


def test_a_build_that_hangs_is_killed_with_its_children(run, monkeypatch, tmp_path):
    child = f"import time; time.sleep(1); open({str(tmp_path / 'late')!r}, 'w')"
    script = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    monkeypatch.setattr(gpu, "BUILD", {"extension": ["-c", script]})
    begin = time.monotonic()
    gpu.run_once(plan.Step("build", "build", 0.01), replace(run, budget=Budget(10.0)))
    assert time.monotonic() - begin < 5
    assert [row["status"] for row in run.rows("build")] == ["failed: cut off after its minutes"]
    time.sleep(1)
    assert not (tmp_path / "late").exists()


def fake_steps(run, sections):
    """Five steps, of which the second ends its process and the fourth hangs."""
    base = case(FLASH, baseline=True)
    return [
        plan.Step(f"step {n}", "attention", 1.0, (replace(base, shape=f"step {n}"),))
        for n in range(5)
    ]


def fake_step(step, run):
    """A row, or what a broken GPU does to a process."""
    if step.block == "step 1":
        os.kill(os.getpid(), signal.SIGKILL)
    if step.block == "step 3":
        time.sleep(600)
    run.add("attention", "flash", "ok", shape=step.block)
    run.budget.compiled += 1.0


def fake_work(run, sections, first, messages):
    """In a process: what it imports anew is replaced there."""
    gpu.timed_steps = fake_steps
    gpu.run_step = fake_step
    gpu.work(run, sections, first, messages)


@pytest.mark.slow
def test_a_process_that_dies_or_hangs_costs_one_step(run, monkeypatch):
    """The rows of before stay, though it was killed, and the next process goes on."""
    monkeypatch.setattr(gpu, "timed_steps", fake_steps)
    monkeypatch.setattr(gpu, "work", fake_work)
    monkeypatch.setattr(gpu, "PATIENCE", 1)
    monkeypatch.setattr(gpu, "HANGS", 3.0)
    monkeypatch.setattr(gpu, "PROCESS", 60.0)  # on a machine that does much else
    monkeypatch.setattr(plan, "TIMING", 0.0)
    monkeypatch.setattr(plan, "COMPILE_ATTENTION", 0.0)
    gpu.run_timed(run, ["attention"])
    assert [(row["shape"], row["status"]) for row in run.rows("attention")] == [
        ("step 0", "ok"),
        ("step 1", "died: signal 9"),
        ("step 2", "ok"),
        ("step 3", "died: it hung and was killed"),
        ("step 4", "ok"),
    ]
    assert run.budget.compiled == 3.0


def test_an_unknown_section_is_named(capsys):
    with pytest.raises(SystemExit) as stopped:
        gpu.main(["--sections", "atention"])
    assert stopped.value.code == 2
    assert "invalid choice: 'atention' (choose from" in capsys.readouterr().err


def test_without_a_gpu_it_says_so(capsys, tmp_path):
    assert gpu.main(["--out", str(tmp_path / "none")]) == 2
    assert "needs a CUDA GPU" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


# ---- The checks ----------------------------------------------------------------------------------


def wrong_value(x):
    return 1.001 * paths.exact(x)


def wrong_gradient(x):
    y = FLASH.call(x)
    return y + 0.01 * (y - y.detach())


def not_a_number(x):
    return FLASH.call(x) * torch.where(x.q > 9, 1.0, math.nan)


@pytest.mark.parametrize(
    ("path", "call", "name"),
    [(EXACT, wrong_value, "y"), (FLASH, wrong_gradient, "dq"), (FLASH, not_a_number, "y")],
)
def test_a_broken_path_prints_no_number(run, path, call, name):
    measure(run, [case(replace(path, name="broken", call=call)), case(FLASH, baseline=True)])
    row, other = run.rows("attention")
    assert row["status"].startswith(f"wrong: {name} is off by ")
    assert row["ms_p50"] == row["rate"] == row["ratio"] == ""
    assert other["status"] == "ok"
    assert other["ms_p50"] == "6.0000"
    assert f"attention broken (1x, first 2x64x1 16+16/16): {row['status']}" in gpu.table(
        [row, other]
    )


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(
    "path", [p for p in ATTENTION if p.name not in ("cudnn", "efficient")], ids=lambda p: p.name
)
def test_the_paths_as_they_are_pass(path, half):
    """In bf16 where not interpreted; fp16 has no room for the augmented operands' exponents."""
    dtype = torch.bfloat16 if path.name in ("flash", "flash table", "eager+sdpa") else torch.float16
    assert failure(path, (16, 16, 16), dtype if half else torch.float32, CPU, True) is None


def test_the_check_reaches_past_the_horizon():
    """With no product before it: the horizon is a path that must not go unchecked."""
    shape = Shape(1, 257, 2, 16, 16, 16)
    x, _ = paths.problem(shape, torch.float32, CPU, paths.CHECK_HALF_LIFE)
    _, _, importance = prologue(x.scores(), 32)
    for dtype in (torch.bfloat16, torch.float32):
        tolerance = default_horizon(dtype)
        starts = horizon_starts(importance, SAFE.forward, tolerance)
        assert starts.max() > 0


def test_what_raises_becomes_a_row(run):
    def late(x):
        if x.q.shape[1] != paths.CHECK_LENGTH:
            raise RuntimeError("CUDA error: out of memory\nand a second line")
        return FLASH.call(x)

    def never(x):
        raise ValueError("no such kernel")

    broken = [replace(FLASH, name="late", call=late), replace(FLASH, name="never", call=never)]
    measure(run, [case(path) for path in (*broken, FLASH)])
    rows = {row["path"]: row for row in run.rows("attention")}
    assert rows["late"]["status"] == "RuntimeError: CUDA error: out of memory"
    assert rows["never"]["status"] == "ValueError: no such kernel"
    assert rows["flash"]["status"] == "ok"

    def broken_timer(calls):
        raise RuntimeError("the clock has stopped")

    measure(replace(run, timer=broken_timer), [case(FLASH)])
    assert run.rows("attention")[-1]["status"] == "RuntimeError: the clock has stopped"


def test_a_refusal_of_sdpa_gives_its_reason():
    class Told:
        def __init__(self, message):
            self.message = UserWarning(message)

    refused = RuntimeError("No available kernel. Aborting execution.")
    nothing_here = RuntimeError("No viable backend for scaled_dot_product_attention was found.")
    lines = (
        "Flash attention kernel not used because: (Triggered at z)",
        "CuDNN attention has been runtime disabled. (Triggered internally at x.cpp:1.)",
        "d_v must equal d_qk (Triggered at y)",
    )
    told = [Told(line) for line in lines]
    assert paths.reason(refused, told) == "d_v must equal d_qk"
    assert paths.reason(nothing_here, told) == "d_v must equal d_qk"
    assert paths.reason(RuntimeError("another"), told) == "RuntimeError: another"
    assert paths.reason(refused) == "RuntimeError: No available kernel. Aborting execution."


def test_a_path_whose_test_failed_is_not_timed(run):
    test = (
        "tests/kernels/test_triton.py::test_exact_in_bf16_with_the_tiles_of_the_table[257-{}--5.0]"
    )
    proofs = {path.name: path.proofs for path in ATTENTION if path.name in ("sisa", "our plain")}
    gated = [case(replace(FLASH, name=name, proofs=tests)) for name, tests in proofs.items()]

    def statuses():
        measure(run, gated)
        return [row["status"] for row in run.rows("attention")[-2:]]

    run.add("tests", test.format(128), "failed: E assert 1 < 0")  # of another state width
    assert statuses() == ["ok", "ok"]
    run.add("tests", test.format(16), "failed: E assert 1 < 0")
    assert statuses() == [f"refused, its test failed: {test.format(16)}", "ok"]
    run.provenance["commit"] = "def"  # not of this code
    assert statuses() == ["ok", "ok"]
    run.provenance["commit"] = "abc"
    run.add("tests", test.format(16), "ok")
    assert statuses() == ["ok", "ok"]


def test_the_tests_that_gate_a_path_exist():
    source = "\n".join(path.read_text() for path in gpu.files_with_gpu_tests())
    names = re.findall(r"^def (test\w+)", source, re.MULTILINE)
    for path in ATTENTION:
        for pattern in path.proofs.split("|") if path.proofs else []:
            assert any(pattern.partition(".*")[0] in name for name in names), pattern


def test_the_timer_takes_turns(monkeypatch):
    """10 to 50 rounds, each call's own time, the cache overwritten before each.

    The clock advances by the call."""
    clock, order = [0.0], []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = clock[0]

        def elapsed_time(self, end):
            return end.at - self.at

    def call(name, ms):
        order.append(name)
        clock[0] += ms

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda _: call("flushed", 100))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: torch.zeros(1))
    calls = [lambda: call("a", 1.0), lambda: call("b", 2.0)]
    assert timing.gpu_milliseconds(calls, seconds=0.0) == [[1.0] * 10, [2.0] * 10]
    assert order == ["flushed", "a", "flushed", "b"] * 11
    assert [len(series) for series in timing.gpu_milliseconds(calls, seconds=1e3)] == [50, 50]


# ---- Sections and rows ---------------------------------------------------------------------------


def run_section(section, run):
    """All groups of a section, without the plan."""
    for group in GROUPS[section](run.setting):
        measure(run, group)


@pytest.mark.slow
def test_the_attention_section_end_to_end(run):
    run_section("attention", run)
    rows = run.rows("attention")
    assert [(row["path"], row["pass"]) for row in rows if row["status"] == "ok"] == [
        (path, passes)
        for passes in ("fwd", "fwd+bwd")
        for path in NAMES
        if path not in ("cudnn", "efficient")
    ]
    refused = {row["path"] for row in rows if row["status"] != "ok"}
    assert refused == {"cudnn", "efficient"}  # the CPU has neither
    assert {row["mode"] for row in rows if row["path"] == "flash"} == {"plain, RoPE eager"}
    row = next(row for row in rows if (row["path"], row["pass"]) == ("sisa", "fwd+bwd"))
    order = [(r["path"], r["pass"]) for r in rows if r["status"] == "ok"]
    took, baseline = (6.0 * (1 + order.index((name, "fwd+bwd"))) for name in ("sisa", "flash"))
    assert float(row["ms_p20"]) == took / 2
    assert float(row["ms_p50"]) == took
    assert float(row["ms_p80"]) == took * 1.5
    assert float(row["ratio"]) == pytest.approx(took / baseline, abs=1e-3)
    bound = bound_ms("exact", SHAPE, DEVICES["H200"], horizon=horizon_tokens(16, 100))
    assert float(row["over_bound"]) == pytest.approx(took / bound, abs=1e-2)
    # All 64 tokens lie within the horizon: W = Dh + Ds = 32; FLOPs of B H L (L + 1) (4 W + 3 Dv).
    assert float(row["rate"]) == pytest.approx(
        1e-12 * 2 * 1 * 64 * 65 * (4 * 32 + 3 * 16) / (1e-3 * took), abs=0.1
    )
    assert (row["unit"], row["formula"]) == (
        "TFLOP/s",
        "BHL(L+1)(4W+3Dv); W=Dh+Ds*share within horizon",
    )
    assert (row["mode"], row["dtype"], row["shape"]) == ("exact", "float32", "2x64x1 16+16/16")
    assert row["commit"] == "abc"


@pytest.mark.parametrize("section", ["stock", "prologue", "augment", "layer", "decode", "model"])
def test_the_other_sections(run, section, monkeypatch):
    monkeypatch.delitem(cases.AUGMENTATIONS, "compiled")  # Inductor takes half a minute
    groups = GROUPS[section](run.setting)
    # The model's second group takes Inductor a minute.
    monkeypatch.setitem(GROUPS, section, lambda _: groups[:1])
    run_section(section, run)
    rows = run.rows(section)
    assert {row["path"] for row in rows if row["status"] == "ok"} == {
        "stock": {"flash"},
        "prologue": {"kernels", "copy"},
        "augment": {"extension", "chain", "copy"},
    }.get(section, {"transformer-tiny", "sisa-tiny-ds16"})
    assert all(float(row["rate"]) > 0 for row in rows if row["status"] == "ok")
    baselines = [row for row in rows if row["path"] in ("copy", "transformer-tiny")]
    assert all(float(row["ratio"]) == 1 for row in baselines)


def test_a_wrong_prologue_is_not_timed(run, monkeypatch):
    def wrong(*args):
        q, k, x = prologue(*args)
        return q, k, x._replace(fraction=x.fraction + 1e-5 * (x.level + x.fraction))

    monkeypatch.setattr(cases, "prologue", wrong)
    run_section("prologue", run)
    assert [row["status"][:20] for row in run.rows("prologue") if row["path"] == "kernels"] == [
        "wrong: g is off by 1"
    ] * 2


@pytest.mark.slow
def test_tuned_tiles_are_timed_beside_those_in_use(run, monkeypatch, capsys):
    used, tuned = [], replace(SAFE, forward=tiles.Tile(64, 32, 4, 1))
    monkeypatch.setattr(tiles, "_tuned", {})
    monkeypatch.setattr(cases, "autotune", lambda *shape, **_: tuned)

    def timer(calls):
        for call in calls:
            call()
            used.append(*tiles.tuned_tiles().values())
        return fake_timer(calls)

    run_section("tune", replace(run, timer=timer))
    assert used == [SAFE, tuned]
    assert [(row["path"], float(row["ratio"])) for row in run.rows("tune")] == [
        ("in use", 1),
        ("tuned", 2),
    ]
    assert str(tuned) in capsys.readouterr().out


def test_what_is_not_reached_has_a_row_each(run, capsys):
    """And the table one line of reasons for all of them."""
    run = replace(run, budget=Budget(480.0, begin=time.monotonic() - 481))
    steps = plan.plan(run.setting, ["attention", "model"])
    for step in steps:
        gpu.run_step(step, run)
    rows = run.rows("attention")
    assert len(rows) == sum(step.section == "attention" for step in steps)
    statuses = [row["status"] for row in rows]
    assert re.fullmatch(r"not started: about \d+ s, 0 s were left", statuses[0])
    assert statuses[1] == "not started: the minutes of its block were over"
    assert f"attention all (1x, first {rows[1]['shape']}): {statuses[1]}" in gpu.table(rows)


def test_what_a_path_warns_of_is_printed(run, capsys):
    def loud(x):
        warnings.warn("no tiles for this GPU: safe, slow ones run", stacklevel=2)
        return FLASH.call(x)

    measure(run, [case(replace(FLASH, call=loud))])
    assert run.rows("attention")[0]["status"] == "ok"
    assert (
        capsys.readouterr().out.count("warning: no tiles for this GPU: safe, slow ones run\n") == 1
    )


def test_rows_are_appended_under_one_header(run):
    run.add("stock", "flash", "ok", ms_p50="1.0")
    replace(run).add("stock", "cudnn", "none, why", ms_p50="2.0")
    with open(run.out / "stock.csv", newline="") as file:
        lines = list(csv.reader(file))
    assert tuple(lines[0]) == COLUMNS
    assert [dict(zip(COLUMNS, line))["status"] for line in lines[1:]] == ["ok", "none, why"]
    assert [len(line) for line in lines] == [len(COLUMNS)] * 3
    assert [row["path"] for row in run.rows("stock", "9")] == []
    with pytest.raises(ValueError, match="speed"):
        run.add("stock", "flash", "ok", speed="1.0")


def test_tests_are_recorded_one_by_one(run, tmp_path, monkeypatch):
    file = tmp_path / "test_of_the_recorder.py"
    file.write_text(
        "import pytest\n"
        "def test_bad():\n    assert 1 + 1 == 3\n"
        "@pytest.mark.skip(reason='no')\ndef test_left(): pass\n"
        "@pytest.mark.slow\ndef test_slow(): pass\n"
        "@pytest.mark.gpu\ndef test_first(): pass\n"
    )
    monkeypatch.setattr(gpu, "files_with_gpu_tests", lambda: [str(file)])
    monkeypatch.setenv("PYTHONPATH", "")
    gpu.run_tests(run, "")
    rows = [(row["path"].rpartition("::")[2], row["status"]) for row in run.rows("tests")]
    assert [name for name, _ in rows] == ["test_first", "test_bad", "test_left"]
    assert rows[0][1] == "ok"
    assert rows[1][1] == "failed: assert (1 + 1) == 3"
    assert rows[2][1].startswith("skipped: ")
    assert run.failed_tests() == [run.rows("tests")[1]["path"]]


def test_a_build_that_fails_says_so(run, monkeypatch, capsys):
    broken = ["-c", "raise SystemExit('no compiler')"]
    unusable = ["-c", "print('extension: not built')"]
    monkeypatch.setattr(gpu, "BUILD", {"broken": broken, "unusable": unusable})
    gpu.run_once(plan.Step("build", "build", 1.0), run)
    assert [row["status"] for row in run.rows("build")] == [
        "failed: no compiler",
        "failed: extension: not built",
    ]


def test_a_part_that_dies_leaves_a_row(run, monkeypatch):
    monkeypatch.setitem(gpu.ONCE, "tests", lambda run: {}["unknown"])
    gpu.run_once(plan.Step("tests", "tests", 1.0), run)
    (row,) = run.rows("tests")
    assert row["status"] == "died: KeyError: 'unknown'"


def test_a_whole_run_ends_with_its_table_and_its_verdict(monkeypatch, capsys, tmp_path):
    outcome, seen = ["ok"], []

    def run_timed(run, sections):
        for name in sections:
            seen.append((name, run.setting.datasheet, run.budget.seconds))
            run.add(name, "path", outcome[0], shape="1x2x3", ms_p50="1.5", **{"pass": "fwd"})

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(gpu, "run_timed", run_timed)
    command = ["--out", str(tmp_path), "--minutes", "3", "--sections", "model", "stock"]
    assert gpu.main(command) == 0
    assert seen == [("model", DEVICES["H100"], 180), ("stock", DEVICES["H100"], 180)]
    first, *_, minutes, legend, _, _, _, last = capsys.readouterr().out.splitlines()
    assert first.startswith("device NVIDIA H100 80GB HBM3, threads ")
    assert minutes.startswith("minutes: timing 0.0, compiling, in all of it, 0.0 of at most 1.0")
    assert legend == gpu.LEGEND
    assert last.split() == ["1x2x3", "fwd", "1.5"]
    for outcome[0], code in (
        ("RuntimeError: refused", 0),
        ("wrong: y is off", 1),
        ("failed: no compiler", 1),
        ("died: signal 9", 1),
    ):
        assert gpu.main([*command, "--device", "A100"]) == code
        assert f"stock path (1x, first 1x2x3): {outcome[0]}" in capsys.readouterr().out
    assert seen[-1] == ("stock", DEVICES["A100"], 180)


def test_the_table_of_a_full_run_stays_small():
    row = dict.fromkeys(COLUMNS, "") | {
        "status": "ok",
        "ms_p50": "0.5123",
        "ratio": "12.345",
        "over_bound": "12.34",
    }
    rows = [row | {"op": "tests", "path": str(n)} for n in range(200)]
    for step in plan.plan(Setting(), gpu.DEFAULT_SECTIONS):
        for one in step.cases:
            rows.append(
                row | {"op": one.op, "path": one.path, "shape": one.shape, "pass": one.passes}
            )
    text = gpu.table(rows)
    assert len(text) < gpu.TABLE_LIMIT
    assert "tests: 200 of 200 ok" in text
    assert "0.512 12.3 12" in text.splitlines()[-1]
    reasons = [row | {"op": "build", "path": str(n), "status": "x" * 150} for n in range(99)]
    assert len(gpu.table(rows + reasons)) < gpu.TABLE_LIMIT


def test_what_a_row_records(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setenv("SISA_COMMIT", "1234567")
    record = rows.provenance(cases.CUDA)
    assert record["commit"] == "1234567"
    assert record["torch"] == torch.__version__
    assert set(record) < set(COLUMNS)
    monkeypatch.delenv("SISA_COMMIT")
    monkeypatch.setenv("PATH", "")
    assert (
        rows.provenance(cases.CUDA)["commit"] == rows.provenance(cases.CUDA)["driver"] == "unknown"
    )
    assert rows.output_of(sys.executable, "-c", "print('a')") == "a"
