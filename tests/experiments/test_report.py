"""sisa report: every published value beside ours, over folders of `sisa train` and `eval`."""

import pytest

from sisa_model.cli import main
from sisa_model.experiments import published as paper
from sisa_model.experiments.report import TITLES, collect, tables
from tests.support.runs import run_folder


def run_of(path, preset, evals=(), step=9536, rate=10.0, val=None, **settings):
    """A run folder without the training; ``rate`` is the median of its tokens/s."""
    train = [{"step": step - 2 + n, "tokens_per_s": x} for n, x in enumerate((rate, 0.0, 1e9))]
    return run_folder(
        path, preset, train, [{"step": step, "loss": 3.25, **(val or {})}], evals, **settings
    )


def row(task, accuracy, step=9536, **more):
    return {"step": step, "task": task, "accuracy": accuracy, **more}


def found_tables(*folders):
    """title -> {(row, column): cell}."""
    results = [collect(folder, folder.name) for folder in folders]
    return {
        t.title: {(label, c): str(x) for label, cells in t.rows for c, x in zip(t.columns, cells)}
        for t in tables(results)
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
                row("lambada (harness)", 0.141),
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
            [row("lambada", 0.182), row("niah", 0.9, length=512)],
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
            [row("lambada", 0.08, 1000), row("piqa", 0.6, 1000)],
            1200,
            rate=810.0,
        ),
        run_of(
            tmp_path / "369m", "sisa-369m-ds128", [row("lambada", 0.15), row("hellaswag", 0.27)]
        ),
        run_of(
            tmp_path / "tiny",
            "sisa-tiny-ds16",
            [row("niah", 0.3, 1000), row("niah", 0.2, 1000, length=1024)],
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
    assert (lengths["Transformer", "256"], lengths["Transformer", "512"]) == (
        "100.0 / 100.0",
        "98.0 [97.0, 99.0] / 100.0",
    )
    assert (lengths["Transformer", "2,048"], lengths["Transformer", "3,072"]) == (
        "80.0 / 82.0",
        "missing / 0.0",
    )
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
    assert found["Runs"]["tiny", "tokens"] == f"{1000 * 16 * 256:,}"
    assert {found["Runs"][name, "held-out loss, nats a token"] for name in ("plain", "tiny")} == {
        "3.250"
    }


def test_what_only_the_harness_measured_is_said_with_the_command(study, tmp_path, capsys):
    theirs = run_of(
        tmp_path / "theirs", "sisa-152m-ds16", [row("lambada (harness)", 0.17), row("niah", 1.0)]
    )
    assert main(["report", str(theirs), *map(str, study), "--out", str(tmp_path / "out")]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("only protocol harness: theirs; the paper's tables take protocol paper")
    assert main(["report", *map(str, study), "--out", str(tmp_path / "out")]) == 0
    assert "only protocol harness" not in capsys.readouterr().out


def test_what_is_not_published_has_a_table_of_its_own(study):
    rest = found_tables(*study)["What the paper has no figure of"]
    shown = {key: text for key, text in rest.items() if text != "missing"}
    assert shown == {
        ("transformer-152m", "niah_long"): "70.0",
        ("transformer-152m", "lambada (harness)"): "14.1",
        ("sisa-152m-ds32", "piqa"): "60.0 at step 1,000",
        ("sisa-369m-ds128", "HellaSwag"): "27.0",
        ("sisa-tiny-ds16", "needle"): "55.0",
        ("sisa-tiny-ds16", "NIAH"): "30.0",
        ("sisa-tiny-ds16", "NIAH at 1,024"): "20.0",
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

    assert main(["report", str(folder), "--out", str(tmp_path / "new" / "report")]) == 0
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
        ([], "runs must name at least one run folder, each once"),
        ([good, good], "runs must name at least one run folder, each once"),
        ([good, tmp_path / "empty"], "is not a run folder of sisa train: it has no run.json"),
        ([bad["task"]], "eval.jsonl must hold rows of step, task and accuracy"),
        ([bad["percent"]], "accuracy must be in [0, 1], got 17.3"),
    ):
        assert main(["report", *map(str, arguments), "--out", str(out)]) == 1
        assert message in capsys.readouterr().err
    assert not out.exists()
