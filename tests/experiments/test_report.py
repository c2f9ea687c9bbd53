"""sisa report: every published value beside ours, over folders of `sisa train` and `eval`."""

import pytest

from sisa_model.cli import main
from sisa_model.experiments import published as paper
from sisa_model.experiments.report import by_other_protocols
from sisa_model.experiments.results import collect
from sisa_model.experiments.tables import TITLES, tables
from tests.support.browser import opened
from tests.support.runs import run_folder


def run_of(path, preset, evals=(), step=9536, rate=10.0, val=None, **settings):
    """A run folder without the training; ``rate`` is the median of its tokens/s."""
    train = [{"step": step - 2 + n, "tokens_per_s": x} for n, x in enumerate((rate, 0.0, 1e9))]
    return run_folder(
        path, preset, train, [{"step": step, "loss": 3.25, **(val or {})}], evals, **settings
    )


def row(task, accuracy, step=9536, protocol="paper", **more):
    return {"step": step, "task": task, "accuracy": accuracy, "protocol": protocol, **more}


def earlier(*rows):
    """Rows as a version wrote them whose protocol "paper" was not the authors' own."""
    return [{name: x for name, x in row.items() if name != "protocol"} for row in rows]


def found_tables(*folders, show_missing=True):
    """title -> {(row, column): cell}."""
    results = [collect(folder, folder.name) for folder in folders]
    return {
        t.title: {(label, c): str(x) for label, cells in t.rows for c, x in zip(t.columns, cells)}
        for t in tables(results, show_missing)
    }


@pytest.fixture
def study(tmp_path):
    """Two seeds of one model, a Transformer, a frozen lambda, an unfinished run, a tiny model."""
    return [
        run_of(
            tmp_path / "plain",
            "transformer-152m",
            [
                row("lambada", 0.2),
                row("lambada", 0.14, low=0.131, high=0.1499),
                row("lambada", 0.05, 1000),
                row("niah", 0.98, by_length={"512": 0.98}, low=0.97, high=0.99),
                row("niah_long", 0.7, by_length={"256": 1.0, "2048": 0.8}),
                row("lambada_openai (harness)", 0.141, protocol="harness"),
            ],
            rate=1000.0,
        ),
        run_of(
            tmp_path / "a",
            "sisa-152m-ds16",
            [row("lambada", 0.17), row("niah", 1.0), row("niah", 0.5, 2000)],
            rate=900.0,
        ),
        run_of(
            tmp_path / "b",
            "sisa-152m-ds16",
            [row("lambada", 0.182), row("niah", 0.9, dtype="bf16-pure")],
            rate=940.0,
            seed=1,
        ),
        run_of(
            tmp_path / "frozen",
            "sisa-152m-ds32",
            [row("lambada", 0.16)],
            rate=800.0,
            lambda_lr_scale=0.0,
        ),
        run_of(
            tmp_path / "begun",
            "sisa-152m-ds32",
            [row("lambada", 0.08, 1000), row("piqa (harness)", 0.6, 1000, "harness")],
            1200,
            rate=810.0,
        ),
        run_of(
            tmp_path / "369m", "sisa-369m-ds128", [row("lambada", 0.15), row("hellaswag", 0.27)]
        ),
        run_of(
            tmp_path / "tiny",
            "sisa-tiny-ds16",
            [row("niah", 0.3, 1000), *earlier(row("niah", 0.2, 1000, length=1024))],
            1000,
            val={"needle_accuracy": 0.55},
        ),
    ]


def test_runs_stand_beside_the_published_values(study):
    found = found_tables(*study)
    main_table = found["Main table, 152M"]
    assert main_table["transformer-152m", "LAMBADA"] == "14.0 [13.1, 15.0] / 13.9", (
        "of one step the last evaluation"
    )
    assert main_table["sisa-152m-ds16", "LAMBADA"] == "17.6 (17.0 to 18.2) / 17.3"
    assert main_table["sisa-152m-ds32-frozen", "LAMBADA"] == "16.0 / 16.1"
    assert main_table["sisa-152m-ds32", "LAMBADA"] == "8.0 at step 1,000 / 17.7"
    assert main_table["mamba3-152m", "ARC-Easy"] == "missing / 34.9"
    steps = found["NIAH by step, 152M"]
    assert steps["SISA, every d_s together", "9,536"] == "95.0 (90.0 to 100.0) / 100.0"
    assert steps["SISA, every d_s together", "2,000"] == "50.0 / 100.0"
    assert steps["Transformer", "1,000"] == "missing / 61.5"
    assert found["LAMBADA by step, 152M"]["Transformer", "1,000"] == "5.0 / 3.5"
    assert found["LAMBADA by step, 152M"]["SISA d_s 32", "1,000"] == "8.0 / 8.4", (
        "the frozen lambda is another model"
    )
    lengths = found["NIAH by length, 152M"]
    assert lengths["Transformer", "512"] == "98.0 [97.0, 99.0] / 100.0"
    assert (lengths["Transformer", "256"], lengths["Transformer", "2,048"]) == (
        "missing / 100.0",
        "missing / 82.0",
    ), "no protocol of the paper is known at other lengths"
    scaling = found["Scaling"]
    assert scaling["sisa-ds128", "LAMBADA 369M"] == "15.0 / 14.8"
    assert scaling["mamba3", "NIAH 50M"] == "missing / 63.5"
    assert scaling["sisa-ds16", "LAMBADA 369M"] == "missing / -"
    width = found["Width of the importance channel, d_s"]
    assert width["d_s 16", "LAMBADA 152M"] == main_table["sisa-152m-ds16", "LAMBADA"]
    assert width["d_s 128", "LAMBADA 369M"] == "15.0 / 14.8"
    speed = found["Training throughput, 152M (relative figures hold for runs on one machine)"]
    assert speed["sisa-152m-ds32", "tokens/s, median"] == "810 / 16,783"
    assert speed["sisa-152m-ds32", "relative to the Transformer"] == "0.81 / 0.61"
    assert speed["sisa-152m-ds16", "tokens/s, median"] == "920 (900 to 940) / -"
    assert speed["mamba2-152m", "relative to the Transformer"] == "missing / 0.39"
    assert speed["sisa-152m-ds32", "FLOPs a token by formula, relative"] == "1.03 / 1.07"
    assert found["Runs"]["begun", "step"] == "1,200 of 9,536"
    assert found["Runs"]["b", "seed"] == "1"
    assert found["Runs"]["b", "the paper's protocol in"] == "bf16-pure"
    assert found["Runs"]["tiny", "tokens"] == f"{1000 * 16 * 256:,}"
    assert {found["Runs"][name, "held-out loss, nats a token"] for name in ("plain", "tiny")} == {
        "3.250"
    }


@pytest.mark.parametrize(
    "rows",
    [
        [row("lambada_openai (harness)", 0.17, protocol="harness")],
        [row("hellaswag (harness)", 0.3, protocol="harness")],
        [row("lambada_openai", 0.17)],
        earlier(row("lambada (harness)", 0.17)),
        earlier(row("lambada", 0.17)),
        earlier(row("winogrande", 0.5)),
    ],
)
def test_only_the_papers_protocol_stands_beside_its_values(rows, tmp_path):
    run = run_of(tmp_path / "run", "sisa-152m-ds16", [*rows, row("niah", 1.0)])
    found = found_tables(run, show_missing=False)
    assert found["Main table, 152M"] == {("sisa-152m-ds16", "NIAH"): "100.0 / 100.0"}
    rest = found["What the paper has no figure of"]
    assert list(rest.values()) == [f"{100 * rows[0]['accuracy']:.1f}"]
    assert by_other_protocols(collect(run, "run"))


def test_what_only_other_protocols_measured_is_said_with_the_command(study, tmp_path, capsys):
    harness = row("lambada_openai (harness)", 0.17, protocol="harness")
    theirs = run_of(tmp_path / "theirs", "sisa-152m-ds16", [harness, row("niah", 1.0)])
    assert main(["report", str(theirs), *map(str, study), "--out", str(tmp_path / "out")]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("not by the paper's protocol: theirs; the paper's tables take it alone")
    assert main(["report", *map(str, study), "--out", str(tmp_path / "out")]) == 0
    assert "not by the paper's protocol" not in capsys.readouterr().out


def test_evaluations_of_earlier_versions_are_readable(tmp_path):
    """Under names of what they measured, beside no published value."""
    rows = earlier(
        row("lambada", 0.17),
        row("hellaswag", 0.3),
        row("niah", 0.9, length=512, by_length={"512": 0.9}),
        row("niah_long", 0.7, by_length={"256": 1.0, "2048": 0.4}, by_seed={"42": 0.7}),
        row("needle_grid", 0.5, lengths=[64, 128], depths=[0.0], by_depth_and_length=[[1.0, 0.0]]),
    )
    found = found_tables(run_of(tmp_path / "old", "sisa-152m-ds16", rows), show_missing=False)
    assert "Main table, 152M" not in found
    assert found["What the paper has no figure of"] == {
        ("sisa-152m-ds16", "lambada_openai"): "17.0",
        ("sisa-152m-ds16", "hellaswag, earlier rule"): "30.0",
        ("sisa-152m-ds16", "needle"): "90.0",
        ("sisa-152m-ds16", "needle_long"): "70.0",
        ("sisa-152m-ds16", "needle_grid"): "50.0",
    }
    assert found["needle_long by length (tokens)"] == {
        ("old", "256"): "100.0",
        ("old", "2,048"): "40.0",
    }
    assert found["needle_grid, old: depth by length in tokens"] == {
        ("0", "64"): "100",
        ("0", "128"): "0",
    }


def test_needles_by_length_and_depth(tmp_path):
    long = row(
        "niah_long",
        0.5,
        by_length={"256": 1.0, "2048": 0.0},
        count_by_length={"256": 40, "2048": 40},
        tokens_by_length={"256": [246, 246], "2048": [519, 1013]},
        by_depth={"0.0": 0.5, "0.4": 0.5},
        count_by_depth={"0.0": 40, "0.4": 40},
    )
    grid = row(
        "needle_grid",
        0.25,
        protocol="ours",
        by_length={"64": 0.5, "128": 0.0},
        by_depth={"0.0": 0.25},
        lengths=[64, 128],
        depths=[0.0],
        by_depth_and_length=[[0.5, 0.0]],
    )
    found = found_tables(run_of(tmp_path / "run", "sisa-tiny-ds16", [long, grid], step=9536))
    by_length = found["niah_long by length (tokens)"]
    at = " at step 9,536"  # a tiny run ends earlier
    assert by_length["run", "256 (really 246)"] == f"100.0 [91.2, 100.0]{at}"
    assert by_length["run", "2,048 (really 519 to 1,013)"] == f"0.0 [0.0, 8.8]{at}"
    by_depth = found["niah_long by depth (share of the filler before the needle)"]
    assert by_depth["run", "0.4"] == f"50.0 [35.2, 64.8]{at}"
    assert found["needle_grid by length (tokens)"]["run", "64"] == f"50.0{at}"
    assert found["needle_grid, run: depth by length in tokens"]["0", "64"] == "50"


def test_what_was_not_measured_is_left_out_unless_asked_for(study, tmp_path, capsys):
    found = found_tables(*study, show_missing=False)
    assert not any("missing" in cell for table in found.values() for cell in table.values())
    main_table = found["Main table, 152M"]
    assert {column for _, column in main_table} == {"LAMBADA", "NIAH"}
    assert {label for label, _ in main_table} == {
        "transformer-152m",
        "sisa-152m-ds16",
        "sisa-152m-ds32-frozen",
        "sisa-152m-ds32",
    }
    assert main_table["sisa-152m-ds32", "NIAH"] == "", "not measured, beside what was"
    assert main_table["transformer-152m", "LAMBADA"] == "14.0 [13.1, 15.0] / 13.9"
    speed = found["Training throughput, 152M (relative figures hold for runs on one machine)"]
    assert {label for label, _ in speed} == {
        "sisa-152m-ds32",
        "transformer-152m",
        "sisa-152m-ds16",
    } | {"sisa-152m-ds32-frozen"}, "a formula measures nothing"
    bare = found_tables(run_of(tmp_path / "bare", "sisa-tiny-ds16", step=3), show_missing=False)
    assert list(bare) == ["Runs"]
    for flags, missing in (([], False), (["--show-missing"], True)):
        assert main(["report", str(study[0]), "--out", str(tmp_path / "out"), *flags]) == 0
        text = (tmp_path / "out" / "report.md").read_text()
        assert ("missing / " in text) == missing
        assert ("--show-missing shows it" in text) != missing


def test_what_is_not_published_has_a_table_of_its_own(study):
    rest = found_tables(*study)["What the paper has no figure of"]
    shown = {key: text for key, text in rest.items() if text != "missing"}
    assert shown == {
        ("transformer-152m", "niah_long"): "70.0",
        ("transformer-152m", "lambada_openai (harness)"): "14.1",
        ("sisa-152m-ds32", "piqa (harness)"): "60.0 at step 1,000",
        ("sisa-369m-ds128", "HellaSwag"): "27.0",
        ("sisa-tiny-ds16", "needle"): "55.0",
        ("sisa-tiny-ds16", "NIAH"): "30.0",
        ("sisa-tiny-ds16", "needle at 1,024"): "20.0",
    }
    assert "What the paper has no figure of" not in found_tables(study[1]), "nothing to show"


def test_every_published_value_is_in_the_report(tmp_path, capsys):
    folder = run_of(tmp_path / "tiny", "sisa-tiny-ds16", step=3)
    found = found_tables(folder)

    def published(title, label, column):
        ours, value = found[title][label, column].split(" / ")
        assert ours == "missing" or column.startswith("FLOPs")
        return float(value.replace(",", ""))

    for model, tasks in paper.RESULTS.items():
        for task, value in tasks.items():
            scale = next(scale for scale in ("50m", "152m", "369m") if f"-{scale}" in model)
            if scale == "152m":
                assert published("Main table, 152M", model, TITLES[task]) == value
            if not model.endswith("frozen") and task in ("lambada", "niah"):
                assert (
                    published(
                        "Scaling", model.replace(f"-{scale}", ""), f"{TITLES[task]} {scale.upper()}"
                    )
                    == value
                )
    for task, curves in paper.BY_STEP.items():
        for curve in curves:
            label = curve.name if len(curve.presets) == 1 else f"{curve.name}, every d_s together"
            for step, value in curve.points.items():
                assert published(f"{TITLES[task]} by step, 152M", label, f"{step:,}") == value
    for curve in paper.NIAH_BY_LENGTH:
        label = curve.name if len(curve.presets) == 1 else f"{curve.name}, every d_s together"
        for length, value in curve.points.items():
            assert published("NIAH by length, 152M", label, f"{length:,}") == value
    speed = "Training throughput, 152M (relative figures hold for runs on one machine)"
    for model, value in paper.TOKENS_PER_S.items():
        assert published(speed, model, "tokens/s, median") == value
    assert (
        published(speed, "sisa-152m-ds32", "FLOPs a token by formula, relative")
        == paper.FLOPS_RATIO
    )

    flags = ["--show-missing", "--out", str(tmp_path / "new" / "report")]
    assert main(["report", str(folder), *flags]) == 0
    text = (tmp_path / "new" / "report" / "report.md").read_text()
    assert text in capsys.readouterr().out
    for title, cells in found.items():
        assert f"## {title}\n" in text
        for (label, _), cell in cells.items():
            assert any(
                line.startswith(f"| {label} |") and f"| {cell} |" in line
                for line in text.splitlines()
            )
    assert (tmp_path / "new" / "report" / "report.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_no_run_or_no_evaluation_is_named(tmp_path, capsys):
    good = run_of(tmp_path / "good", "sisa-tiny-ds16", step=3)
    (tmp_path / "empty").mkdir()
    bad = {
        "task": run_of(tmp_path / "task", "sisa-tiny-ds16", [{"step": 3, "accuracy": 0.5}]),
        "percent": run_of(tmp_path / "percent", "sisa-tiny-ds16", [row("lambada", 17.3)]),
    }
    out = tmp_path / "out"
    for arguments, message in (
        ([good, good], "runs must name at least one run folder, each once"),
        ([good, tmp_path / "empty"], "is not a run folder of sisa train: it has no run.json"),
        ([bad["task"]], "eval.jsonl must hold rows of step, task and accuracy"),
        ([bad["percent"]], "accuracy must be in [0, 1], got 17.3"),
    ):
        assert main(["report", *map(str, arguments), "--out", str(out)]) == 1
        assert message in capsys.readouterr().err
    assert not out.exists()


def test_the_page_has_the_reports_tables_and_the_runs_curves(study, tmp_path):
    out = tmp_path / "report"
    assert main(["report", *map(str, study), "--out", str(out)]) == 0
    assert not (out / "report.html").exists()
    assert main(["report", *map(str, study), "--out", str(out), "--html"]) == 0
    with opened(out / "report.html") as page:
        titles = page.locator("caption").all_inner_texts()
        expected = found_tables(*study)
        assert titles == list(expected)
        cells = page.locator("table").nth(1).locator("td").all_inner_texts()
        assert set(expected[titles[0]].values()) - {"missing"} <= set(cells)
        assert page.locator("h2", has_text="plain").count() == 1
