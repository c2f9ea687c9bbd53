"""The benches on a CPU: what `pytest bench` measures and refuses, its rows, the accuracy rows, and
the figures made of them.
"""

import csv
import json
import os
import subprocess
import sys
from dataclasses import replace
from itertools import count

import pytest
import torch

from tests.support import ROOT

pytest.importorskip("sisa_kernels.triton.op", reason="needs the package triton")
from bench import accuracy, authors, cases, paths, rows, timing
from bench import figures as report
from bench.cases import Setting, attention_case
from bench.cases_cpu import SECTIONS
from bench.paths import ATTENTION_ON_CPU, failure
from bench.roofline import Shape
from sisa_model.cli import main

CPU = torch.device("cpu")
LAYERS = ("transformer", "sisa", "authors", "fox", "alibi", "mamba2", "mamba3")
TINY = Setting(CPU, torch.float32, (64,), (16,), tokens=1, heads=1, head_width=16)
SHAPE = Shape(1, 64, 1, 16, 16, 16)


def case(path, passes="fwd+bwd", **options):
    return attention_case("attention", path, SHAPE, "1x64x1 16+16/16", passes, TINY, **options)


# ---- Measuring -----------------------------------------------------------------------------------


def test_pytest_bench_measures_every_section_and_appends_its_rows(tmp_path):
    env = {
        **os.environ,
        "SISA_BENCH_QUICK": "1",
        "SISA_BENCH_OUT": str(tmp_path),
        "SISA_COMMIT": "abc",
        "PYTHONPATH": str(ROOT),
    }
    # Inductor takes half a minute for a case
    chosen = "not compiled and not flex and not bfloat16 and not 1x128x1"
    command = [
        "-m",
        "pytest",
        "-q",
        "bench",
        "-p",
        "no:cacheprovider",
        "-k",
        chosen,
        f"--benchmark-json={tmp_path / 'b.json'}",
    ]
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert {path.stem for path in tmp_path.glob("*.csv")} == {*SECTIONS} - {"flex"}
    attention = rows.read(tmp_path / "attention.csv")
    assert [(row["path"], row["pass"]) for row in attention] == [
        (path.name, passes) for passes in ("fwd", "fwd+bwd") for path in ATTENTION_ON_CPU
    ]
    layers = {row["path"]: row for row in rows.read(tmp_path / "layer.csv")}
    assert list(layers) == [
        f"{name}-tiny{'-ds16' if name in ('sisa', 'authors') else ''}" for name in LAYERS
    ]
    assert [row["path"] for row in rows.read(tmp_path / "decode.csv")] == [
        name for name in layers if "authors" not in name
    ]
    for row in [*attention, *layers.values()]:
        assert row["status"] == "ok"
        assert float(row["ms_p20"]) <= float(row["ms_p50"]) <= float(row["ms_p80"])
        assert (
            float(row["peak_mib"]) > 0 or row["op"] == "attention"
        )  # whose operands are smaller than a tenth of a MiB
        assert (row["commit"], row["torch"], row["rounds"]) == ("abc", torch.__version__, "2")
    # What pytest-benchmark tells is what was timed in turns.
    for told in json.loads((tmp_path / "b.json").read_text())["benchmarks"]:
        assert 1e3 * told["stats"]["median"] == pytest.approx(
            float(told["extra_info"]["ms_p50"]), abs=1e-4
        )
        assert told["group"].startswith(told["extra_info"]["op"])


def wrong_by_a_tenth_of_a_percent(x, rotary):
    return 1.001 * paths.exact_on_stock(x, rotary)


def test_a_wrong_path_gets_a_reason_and_no_number(tmp_path):
    broken = case(replace(paths.EXACT_ON_CPU, name="broken", call=wrong_by_a_tenth_of_a_percent))
    right = case(paths.STOCK[1], baseline=True)
    run = timing.Run(TINY, tmp_path, 1.0, lambda calls: [[1.0, 2.0, 3.0] for _ in calls])
    found = timing.measure(run, [broken, right])
    row, series = found[broken]
    assert row["status"].startswith("wrong: y is off by ")
    assert not series
    assert row["ms_p50"] == row["ratio"] == row["peak_mib"] == ""
    assert found[right][0]["ms_p50"] == "2.0000"


@pytest.mark.parametrize("path", ATTENTION_ON_CPU, ids=lambda path: path.name)
def test_every_path_passes_its_check(path):
    assert failure(path, (16, 16, 16), torch.float32, CPU, True) is None


def test_the_ratio_is_of_medians_and_its_spread_of_rounds(tmp_path):
    """A machine that is ten times as slow in one round slows both: the spread of the rounds' ratios
    stays at nought.
    """
    base, mine = case(paths.STOCK[1], baseline=True), case(paths.EXACT_ON_CPU)
    slow = [1.0, 1.0, 10.0, 1.0, 1.0]
    run = timing.Run(TINY, tmp_path, 1.0, lambda calls: [slow, [2 * ms for ms in slow]])
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
    assert [len(series) for series in timing.cpu_milliseconds(calls, seconds=40.0, least=2)] == [
        8,
        8,
    ]  # 5 seconds a round
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
    with pytest.raises(ValueError, match="has other columns than this bench writes"):
        rows.append(path, rows.COLUMNS, {"op": "attention"})
    assert path.read_text() == "op,ms\nattention,1\n"


def test_where_a_row_comes_from(monkeypatch):
    monkeypatch.setattr(
        rows,
        "output_of",
        lambda *command: {"rev-parse": "1234567", "diff": "bench/rows.py"}[command[1]],
    )
    where = rows.provenance(CPU)
    assert where["commit"] == "1234567+"  # code differs from the commit
    assert where["threads"] == str(torch.get_num_threads())
    assert where["device"]
    assert where["driver"] == ""
    monkeypatch.setattr(
        rows, "output_of", lambda *command: {"rev-parse": "1234567", "diff": "unknown"}[command[1]]
    )
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
    accuracy.main(["--lengths", "128", "--half-lives", "100", "0.5", "--out", str(tmp_path)])
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
    assert found["one call", "0.5", "float32"]["status"].startswith(
        "ValueError: backend 'flash' is one call"
    )
    assert found["clamped", "0.5", "float32"]["mode"] == "clamped"
    assert (
        accuracy.main(
            ["--lengths", "64", "--half-lives", "1", "--state-width", "32", "--out", str(tmp_path)]
        )
        is None
    )
    assert len(rows.read(tmp_path / "accuracy.csv")) == len(found) + 2 * len(accuracy.PATHS)


# ---- The figures ---------------------------------------------------------------------------------


def fake_row(op, path, shape, ms, **values):
    where = {
        "device": "A CPU",
        "threads": "2",
        "torch": "2",
        "commit": "abc",
        "date": "2026-01-01T00:00:00",
    }
    times = {
        "ms_p50": ms,
        "baseline": "flash",
        "ratio": ms,
        "ratio_p20": 0.9 * ms,
        "ratio_p80": 1.1 * ms,
        "peak_mib": 10 * ms,
    }
    return (
        where
        | {
            "op": op,
            "path": path,
            "shape": shape,
            "dtype": "float32",
            "pass": "fwd+bwd",
            "status": "ok",
        }
        | times
        | values
    )


@pytest.fixture
def results(tmp_path):
    folder = tmp_path / "results"
    shape = "1x2048x12 64+16/64"
    made = [
        fake_row("augment", path, shape, ms)
        for path, ms in (("extension", 0.2), ("compiled", 0.7), ("chain", 1.0))
    ]
    made += [
        fake_row("attention", path, shape, ms) for path, ms in (("sisa", 1.2), ("eager+sdpa", 5.0))
    ]
    made += [
        fake_row("layer", preset, "1x2048", 1.1)
        for preset in ("transformer-152m", "sisa-152m-ds16", "authors-152m-ds16")
    ]
    made += [
        fake_row("decode", preset, "1x512", 1.0)
        for preset in ("transformer-152m", "sisa-152m-ds16")
    ]
    made += [
        fake_row("model", preset, "8x128 eager", 1.1)
        for preset in ("transformer-tiny", "sisa-tiny-ds16")
    ]
    for length in (256, 512, 1024):
        made += [
            fake_row("growth", path, f"1x{length}x4 64+16/64", length / 1e3)
            for path in ("flash", "sisa")
        ]
    made += [
        fake_row("growth", "sisa", f"{B}x512x{H} 64+{ds}/64", 1.0)
        for B, H, ds in ((2, 4, 16), (1, 8, 16), (1, 4, 32))
    ]
    for row in made:
        rows.append(folder / f"{row['op']}.csv", rows.COLUMNS, row)
    accuracy.main(["--lengths", "64", "128", "--half-lives", "100", "1", "--out", str(folder)])
    return folder


def test_every_figure_is_drawn_from_the_rows(results, tmp_path, capsys):
    out = tmp_path / "docs"
    assert report.main(["--results", str(results), "--out", str(out)]) == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "accuracy.png",
        "growth.png",
        "speed.png",
    ]
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    for name in ("attention", "growth"):
        with open(results / f"{name}.csv", newline="") as file:
            last = list(csv.DictReader(file))[-1]
        rows.append(
            results / f"{name}.csv",
            rows.COLUMNS,
            last | {"ratio": "2.5", "ratio_p20": "2.4", "ratio_p80": "2.6", "ms_p50": "9"},
        )
    assert report.main(["--results", str(results), "--out", str(out)]) == 0
    changed = {path.name for path in out.iterdir() if path.read_bytes() != before[path.name]}
    assert changed == {"speed.png", "growth.png"}


def test_only_the_figures_asked_for_are_drawn(results, tmp_path):
    (results / "growth.csv").unlink()
    flags = ["bench-report", "--results", str(results), "--out", str(tmp_path / "docs"), "--only"]
    assert main([*flags, "speed", "accuracy"]) == 0
    assert sorted(path.name for path in (tmp_path / "docs").iterdir()) == [
        "accuracy.png",
        "speed.png",
    ]
    assert main([*flags, "growth"]) == 1


def test_the_newest_row_of_one_device_counts():
    mine = fake_row("layer", "sisa-152m-ds16", "1x512", 2.0)
    older, other, refused = (
        mine | {"ratio": 9.0},
        mine | {"device": "A GPU"},
        mine | {"status": "wrong: y", "shape": "1x1"},
    )
    assert report.newest([older, other, mine, refused], None) == [mine]
    assert report.newest([older, other, mine, refused], "GPU") == [other]
    assert report.newest([refused], None) == report.newest([], None) == []
    assert (
        report.newest([mine, mine | {"status": "wrong: y is off"}], None) == []
    )  # its last number is no longer one


def test_a_figure_without_rows_names_its_command(tmp_path, capfd):
    assert (
        main(
            [
                "bench-report",
                "--results",
                str(tmp_path),
                "--out",
                str(tmp_path / "docs"),
                "--device",
                "H200",
            ]
        )
        == 1
    )
    told = capfd.readouterr().err
    assert "growth.png is not drawn: no rows of H200" in told
    assert "`pytest bench -k growth` measures them" in told
    assert "sisa: error: not every figure could be drawn" in told
    assert not (tmp_path / "docs").exists()
