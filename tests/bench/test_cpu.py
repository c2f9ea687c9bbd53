"""The benches on a CPU: what they measure and refuse, their rows and figures."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import count

import pytest
import torch

from tests.support import ROOT

pytest.importorskip("sisa_kernels.triton.op", reason="needs the package triton")
from bench import accuracy, authors, cases, figures, paths, rows, timing
from bench.__main__ import COMMANDS
from bench.cases import Setting, attention_case
from bench.cases_cpu import SECTIONS
from bench.paths import ATTENTION_ON_CPU, failure
from bench.roofline import Shape

CPU = torch.device("cpu")
MODELS = ("transformer-152m", "sisa-152m-ds16", "authors-152m-ds16")
FAMILIES = ("transformer", "sisa", "authors", "fox", "alibi", "mamba2", "mamba3")
LAYERS = [f"{family}-tiny{'-ds16' if family in ('sisa', 'authors') else ''}" for family in FAMILIES]
LAYERS.insert(0, "stock-transformer-tiny")
TINY = Setting(CPU, torch.float32, (64,), (16,), tokens=1, heads=1, head_dim=16)
SHAPE = Shape(1, 64, 1, 16, 16, 16)


def case(path, passes="fwd+bwd", **options):
    return attention_case("attention", path, SHAPE, passes, TINY, **options)


# ---- Measuring -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_measures_every_section_and_appends_its_rows(tmp_path):
    env = os.environ | {
        "SISA_BENCH_QUICK": "1",
        "SISA_BENCH_OUT": str(tmp_path),
        "SISA_COMMIT": "abc",
    }
    # Inductor takes half a minute for a case.
    chosen = "not compiled and not flex and not bfloat16 and not 1x128x1"
    flags = ["-q", "-p", "no:cacheprovider", "-k", chosen, "--benchmark-json", tmp_path / "b.json"]
    command = [sys.executable, "-m", "bench", "cpu", *flags]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert {path.stem for path in tmp_path.glob("*.csv")} == {*SECTIONS} - {"flex"}
    attention = rows.read(tmp_path / "attention.csv")
    assert [(row["path"], row["pass"]) for row in attention] == [
        (path.name, passes) for passes in ("fwd", "fwd+bwd") for path in ATTENTION_ON_CPU
    ]
    layers = {row["path"]: row for row in rows.read(tmp_path / "layer.csv")}
    assert list(layers) == LAYERS
    decoders = [row["path"] for row in rows.read(tmp_path / "decode.csv")]
    assert decoders == [name for name in LAYERS if "authors" not in name]
    for row in [*attention, *layers.values()]:
        assert row["status"] == "ok"
        assert float(row["ms_p20"]) <= float(row["ms_p50"]) <= float(row["ms_p80"])
        # Of attention the operands are smaller than a tenth of a MiB.
        assert float(row["peak_mib"]) > 0 or row["op"] == "attention"
        assert (row["commit"], row["torch"], row["rounds"]) == ("abc", torch.__version__, "2")
    # What pytest-benchmark tells is what was timed in turns.
    for told in json.loads((tmp_path / "b.json").read_text())["benchmarks"]:
        row = told["extra_info"]
        assert 1e3 * told["stats"]["median"] == pytest.approx(float(row["ms_p50"]), abs=1e-4)
        assert told["group"].startswith(row["op"])


@pytest.mark.slow
def test_the_commands_run_from_a_bare_checkout(tmp_path):
    """Nothing installed and no PYTHONPATH: the folder it runs in comes first."""
    for name in ("bench", "sisa_kernels", "sisa_model", "tests"):
        shutil.copytree(
            ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "*.pyc")
        )
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def bench(*arguments):
        command = [sys.executable, "-m", "bench", *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert set(re.findall(r"^  (\w+)  ", bench("--help"), re.MULTILINE)) >= set(COMMANDS)
    plan = bench("gpu", "--dry-run", "--sections", "tests", "attention")
    assert f"rows are appended to {tmp_path}" in plan
    assert "tests/kernels/test_triton.py" in plan
    assert "share of importance products" in bench("roofline", "--lengths", "1024")


def wrong_by_a_tenth_of_a_percent(x):
    return 1.001 * paths.EXACT_ON_CPU.call(x)


def test_a_wrong_path_gets_a_reason_and_no_number(tmp_path):
    broken = case(replace(paths.EXACT_ON_CPU, name="broken", call=wrong_by_a_tenth_of_a_percent))
    right = case(paths.STOCK[1], baseline=True)
    run = timing.Run(TINY, tmp_path, lambda calls: [[1.0, 2.0, 3.0] for _ in calls])
    found = timing.measure(run, [broken, right])
    row, series = found[broken]
    assert row["status"].startswith("wrong: y is off by ")
    assert not series
    assert row["ms_p50"] == row["ratio"] == row["peak_mib"] == ""
    assert found[right][0]["ms_p50"] == "2.0000"


@pytest.mark.parametrize("path", ATTENTION_ON_CPU, ids=lambda path: path.name)
def test_every_path_passes_its_check(path):
    assert failure(path, (16, 16, 16), torch.float32, CPU, True) is None


def test_without_transformers_the_llama_is_left_out_with_a_reason(monkeypatch, tmp_path):
    steps = cases.step_groups(replace(TINY, models=("transformer-tiny",)))[0]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    run = timing.Run(TINY, tmp_path, lambda calls: [[1.0, 2.0, 3.0] for _ in calls])
    found = {case.path: row for case, (row, _) in timing.measure(run, steps).items()}
    assert found["llama-tiny"]["status"] == "skipped: transformers is not installed"
    assert found["transformer-tiny"]["status"] == "ok"
    assert found["transformer-tiny"]["ratio"] == ""


def test_the_ratio_is_of_medians_and_its_spread_of_rounds(tmp_path):
    """A machine ten times as slow in one round slows both: the ratios' spread stays at nought."""
    base, mine = case(paths.STOCK[1], baseline=True), case(paths.EXACT_ON_CPU)
    slow = [1.0, 1.0, 10.0, 1.0, 1.0]
    run = timing.Run(TINY, tmp_path, lambda calls: [slow, [2 * ms for ms in slow]])
    row, series = timing.measure(run, [base, mine])[mine]
    assert series == [2.0, 2.0, 20.0, 2.0, 2.0]
    assert [row[column] for column in rows.RATIOS] == ["flash", "2.000", "2.000", "2.000"]


def test_calls_take_turns_for_the_seconds_or_the_rounds(monkeypatch):
    clock, order = count(), []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(next(clock)))
    monkeypatch.setattr(timing.time, "monotonic", lambda: float(next(clock)))
    calls = [lambda: order.append("a"), lambda: order.append("b")]
    assert timing.cpu_milliseconds(calls, seconds=0.0, least=2) == [[1000.0] * 2] * 2
    assert order == ["a", "b"] * 3
    series = timing.cpu_milliseconds(calls, seconds=40.0, least=2)  # 5 seconds a round
    assert [len(times) for times in series] == [8, 8]
    assert len(timing.cpu_milliseconds(calls, seconds=1e6)[0]) == 50


def test_peak_memory_is_what_a_call_holds():
    def call():
        x = torch.ones(1 << 20)  # 4 MiB
        y = x + 1
        del x
        return y + 1

    assert float(timing.peak_mib(call, CPU)) == pytest.approx(8.0, abs=0.1)


def test_a_file_with_other_columns_is_left_alone(tmp_path):
    path = tmp_path / "attention.csv"
    path.write_text("op,ms\nattention,1\n")
    with pytest.raises(ValueError, match="has other columns"):
        rows.append(path, rows.COLUMNS, {"op": "attention"})
    assert path.read_text() == "op,ms\nattention,1\n"


def test_where_a_row_comes_from(monkeypatch):
    git = {"rev-parse": "1234567", "diff": "bench/rows.py"}
    monkeypatch.delenv("SISA_COMMIT", raising=False)
    monkeypatch.setattr(rows, "output_of", lambda *command: git[command[1]])
    where = rows.provenance(CPU)
    assert where["commit"] == "1234567+"  # code differs from the commit
    assert where["threads"] == str(torch.get_num_threads())
    assert where["device"]
    assert where["driver"] == ""
    git["diff"] = "unknown"
    assert rows.provenance(CPU)["commit"] == "1234567"
    assert rows.version("no-such-package") == "none"


def test_a_wrong_layer_or_step_is_named(monkeypatch):
    for gate, preset, what in (
        (cases.layer_failure, "fox-tiny", "y"),
        (cases.decode_failure, "sisa-tiny-ds16", "the next token"),
    ):
        assert gate.__wrapped__(preset, TINY) is None
        monkeypatch.setattr(cases, "LAYER_LIMIT", 1e-12)
        assert gate.__wrapped__(preset, TINY).startswith(f"wrong: {what} is off by ")
        monkeypatch.setattr(cases, "LAYER_LIMIT", 1e-5)


# ---- The authors' formulation --------------------------------------------------------------------


def test_the_authors_model_is_ours_with_another_attention():
    """Within the clamp's range both are Eq. 2."""
    ids, logits = torch.arange(60)[None], []
    for name in ("sisa-tiny-ds16", "authors-tiny-ds16"):
        torch.manual_seed(0)
        logits.append(authors.build(name)(ids))
    assert not torch.equal(*logits)
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)


# ---- Accuracy ------------------------------------------------------------------------------------


def test_accuracy_shows_the_clamp_fail_and_the_exact_path_hold(tmp_path, capsys):
    chosen = ["--lengths", "128", "--half-lives", "100", "0.5", "--out", str(tmp_path)]
    assert accuracy.main(chosen) == 0
    found = {
        (row["path"], row["half_life"], row["dtype"]): row
        for row in rows.read(tmp_path / "accuracy.csv")
    }
    assert len(found) == 2 * 2 * len(accuracy.PATHS)
    assert float(found["as published", "0.5", "float32"]["error"]) > 0.3
    assert float(found["as published", "100", "float32"]["error"]) < 1e-6
    for life in ("100", "0.5"):
        assert float(found["sisa", life, "float32"]["error"]) < 1e-6
        assert float(found["sisa", life, "float32"]["gradient"]) < 1e-5
    assert found["without the clamp", "0.5", "float32"]["status"] == "not finite"
    assert found["one call", "0.5", "float32"]["status"].startswith("ValueError: backend")
    assert found["clamped", "0.5", "float32"]["mode"] == "clamped"
    others = ["--lengths", "64", "--half-lives", "1", "--d-state", "32", "--out", str(tmp_path)]
    assert accuracy.main(others) == 0
    assert len(rows.read(tmp_path / "accuracy.csv")) == len(found) + 2 * len(accuracy.PATHS)


# ---- The figures ---------------------------------------------------------------------------------


def fake_row(op, path, shape, ms, **values):
    return {
        "device": "A CPU",
        "threads": "2",
        "torch": "2",
        "commit": "abc",
        "date": "2026-01-01T00:00:00",
        "op": op,
        "path": path,
        "shape": shape,
        "dtype": "float32",
        "pass": "fwd+bwd",
        "status": "ok",
        "ms_p50": ms,
        "baseline": "flash",
        "ratio": ms,
        "ratio_p20": 0.9 * ms,
        "ratio_p80": 1.1 * ms,
        "peak_mib": 10 * ms,
    } | values


@pytest.fixture
def results(tmp_path):
    folder = tmp_path / "results"
    shape = "1x2048x12 64+16/64"
    times = [
        ("augment", shape, {"extension": 0.2, "compiled": 0.7, "chain": 1.0}),
        ("attention", shape, {"sisa": 1.2, "eager+sdpa": 5.0}),
        ("layer", "1x2048", dict.fromkeys(MODELS, 1.1)),
        ("decode", "1x512", dict.fromkeys(MODELS[:2], 1.0)),
        ("model", "8x128 eager", {"transformer-tiny": 1.1, "sisa-tiny-ds16": 1.1}),
        *(
            ("growth", f"1x{length}x4 64+16/64", dict.fromkeys(("flash", "sisa"), length / 1e3))
            for length in (256, 512, 1024)
        ),
        *(
            ("growth", f"{B}x512x{H} 64+{ds}/64", {"sisa": 1.0})
            for B, H, ds in ((2, 4, 16), (1, 8, 16), (1, 4, 32))
        ),
    ]
    made = [fake_row(op, path, where, ms) for op, where, of in times for path, ms in of.items()]
    for row in made:
        rows.append(folder / f"{row['op']}.csv", rows.COLUMNS, row)
    accuracy.main(["--lengths", "64", "128", "--half-lives", "100", "1", "--out", str(folder)])
    shutil.copy(ROOT / "bench" / "results" / "clamp.csv", folder)
    return folder


def test_every_figure_is_drawn_from_the_rows(results, tmp_path, capsys):
    out = tmp_path / "docs"
    assert figures.main(["--results", str(results), "--out", str(out)]) == 0
    names = {path.name for path in out.iterdir()}
    assert names == {"accuracy.png", "clamp.png", "growth.png", "speed.png"}
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    again = {"ratio": "2.5", "ratio_p20": "2.4", "ratio_p80": "2.6", "ms_p50": "9"}
    for name in ("attention", "growth"):
        path = results / f"{name}.csv"
        rows.append(path, rows.COLUMNS, rows.read(path)[-1] | again)
    assert figures.main(["--results", str(results), "--out", str(out)]) == 0
    changed = {path.name for path in out.iterdir() if path.read_bytes() != before[path.name]}
    assert changed == {"speed.png", "growth.png"}


def test_only_the_figures_asked_for_are_drawn(results, tmp_path):
    (results / "growth.csv").unlink()
    flags = ["--results", str(results), "--out", str(tmp_path / "docs"), "--only"]
    assert figures.main([*flags, "speed", "accuracy"]) == 0
    names = {path.name for path in (tmp_path / "docs").iterdir()}
    assert names == {"accuracy.png", "speed.png"}
    assert figures.main([*flags, "growth"]) == 1


def test_the_newest_row_of_one_device_counts():
    mine = fake_row("layer", "sisa-152m-ds16", "1x512", 2.0)
    older = mine | {"ratio": 9.0}
    other = mine | {"device": "A GPU"}
    refused = mine | {"status": "wrong: y", "shape": "1x1"}
    assert figures.newest([older, other, mine, refused]) == [mine]
    assert figures.newest([older, other, mine, refused], "GPU") == [other]
    assert figures.newest([refused]) == figures.newest([]) == []
    # Its last number is no longer one.
    assert figures.newest([mine, mine | {"status": "wrong: y is off"}]) == []


def test_a_figure_without_rows_names_its_command(tmp_path, capsys):
    out = tmp_path / "docs"
    flags = ["--results", str(tmp_path), "--out", str(out), "--device", "H200"]
    assert figures.main(flags) == 1
    told = capsys.readouterr().err
    assert "growth.png is not drawn: no rows of H200" in told
    assert "`python -m bench cpu -k growth` measures them" in told
    assert not out.exists()
