"""sisa watch: the page of runs, in a browser; what it says of them; nothing unescaped in it."""

import json
import re

import matplotlib.pyplot as plt
import pytest

from sisa_model.cli import main
from sisa_model.experiments import plot_runs as plot_module
from sisa_model.experiments import watch as watch_module
from sisa_model.experiments.plot_runs import panels, read_rows_of
from sisa_model.experiments.watch import run_state
from tests.support.browser import opened
from tests.support.runs import run_folder

EVIL = "<script>document.title = 'taken'</script><img src=x onerror=alert(1)> & \"done\""


def rows(steps):
    train = [
        {
            "step": step,
            "loss": 5.0 - step / 100,
            "lr": 1e-3,
            "grad_norm": 1.0,
            "tokens": 1000,
            "tokens_per_s": 100.0 + step % 3,
            "mfu": None,
            "peak_memory_mib": 64.0,
        }
        for step in range(1, steps + 1)
    ]
    val = [
        {
            "step": step,
            "loss": 5.5 - step / 100,
            "recall_accuracy": step / 100,
            "recall_chance": 0.1,
            "layers": [
                {"layer": 0, "lam": [0.31], "half_life": [90.0], "g_range": [2.0], "clamped": 0.0}
            ],
        }
        for step in range(0, steps + 1, 10)
    ]
    return train, val


@pytest.fixture
def folders(tmp_path):
    """A run that goes on, a finished one with a sample that is no friend, one without a step."""
    half = run_folder(tmp_path / "half", "sisa-tiny-ds16", *rows(60), steps=100)
    done = run_folder(tmp_path / "done <b>", "sisa-tiny-ds16", *rows(100), steps=100, seed=1)
    (done / "final").mkdir()
    (done / "sample.txt").write_text(EVIL)
    empty = run_folder(tmp_path / "empty", "transformer-tiny", [], [], steps=100)
    return [half, done, empty]


def cells(page):
    return [
        [cell.inner_text().strip() for cell in row.locator("td").all()]
        for row in page.locator("table").first.locator("tbody tr").all()
    ]


@pytest.mark.parametrize("width", [1200, 400])
def test_the_page_in_a_browser(folders, tmp_path, width):
    out = tmp_path / "pages" / "runs.html"
    assert main(["watch", *map(str, folders), "--out", str(out), "--once"]) == 0
    with opened(out, width) as page:
        assert page.title() == "half, done <b>, empty"
        half, done, empty = cells(page)
        # 40 steps of 1,000 tokens at 101 tokens/s
        speed = ["4.495", "4.900", "101", "6 min 36 s"]
        assert half == ["half", "sisa-tiny-ds16", "not finished", "60 of 100", *speed]
        assert done[:4] == ["done <b>", "sisa-tiny-ds16", "finished", "100 of 100"]
        assert done[-1] == ""
        assert empty == ["empty", "transformer-tiny", "not finished", "0 of 100", *[""] * 4]
        titles = page.locator(".panels").inner_text()
        for title in (
            "held-out loss",
            "learning rate",
            "tokens/s",
            "recall accuracy",
            "range of g",
        ):
            assert title in titles
        assert EVIL in page.locator("pre").nth(1).inner_text()
        assert page.locator("img").count() == 0
        assert "taken" not in page.title()


def test_it_is_one_file_that_looks_anew_while_runs_go_on(folders, tmp_path, monkeypatch):
    out = tmp_path / "runs.html"
    slept = []

    def sleep(seconds):
        slept.append(seconds)
        assert f"location.reload(), {1000 * seconds}" in out.read_text()
        (folders[len(slept) // 2 * 2] / "final").mkdir(exist_ok=True)

    monkeypatch.setattr(watch_module.time, "sleep", sleep)
    assert main(["watch", *map(str, folders), "--out", str(out), "--every", "3"]) == 0
    assert slept == [3.0, 3.0]
    text = out.read_text()
    assert "reload" not in text
    assert not re.search(r"""(src|href)\s*=|url\(\s*["']?https?:|@import""", text.split("<svg")[0])


def test_how_far_a_run_is(folders):
    state = run_state(folders[0], read_rows_of(folders[0], "half"))
    assert (state.step, state.steps, state.state) == (60, 100, "not finished")
    assert state.loss == pytest.approx(5.0 - sum(range(41, 61)) / 20 / 100)
    assert state.tokens_per_s == 101.0
    assert state.seconds_left == pytest.approx(40 * 1000 / 101)


def test_losses_of_unlike_tokens_are_told(folders, tmp_path, capsys, monkeypatch):
    """In what plot and watch print, on the page, and over the panels of losses."""
    monkeypatch.setattr(plot_module, "_draw", lambda *_: None)
    monkeypatch.setattr(watch_module, "_panels", lambda _: [])
    monkeypatch.setattr(watch_module, "health_figure", lambda *_: plt.figure())
    other = run_folder(tmp_path / "words", "sisa-tiny-ds16", *rows(60), steps=100)
    record = json.loads((other / "run.json").read_text())
    record["train"]["tokenizer"] = "words.json"
    (other / "run.json").write_text(json.dumps(record))
    told = "losses a token do not compare, as the runs' tokens differ: "
    told += "half (bytes), words (tokenizer words.json)"
    runs = [str(folders[0]), str(other)]
    page = tmp_path / "runs.html"
    for command in (["watch", *runs, "--once", "--out", str(page)], ["plot", *runs, "--out"]):
        given = [*command, str(tmp_path / "a.png")] if command[0] == "plot" else command
        assert main(given) == 0
        assert capsys.readouterr().err == f"sisa: {told}\n"
    assert told.replace("'", "&#39;") in page.read_text()
    titles = panels([read_rows_of(folder, folder.name) for folder in (folders[0], other)])
    assert "held-out loss, nats a token, of tokens that differ" in titles
    assert "training loss, nats a token, of tokens that differ" in titles
    assert main(["plot", *map(str, folders[:2]), "--out", str(tmp_path / "a.png")]) == 0
    assert capsys.readouterr().err == ""


def test_what_cannot_be_watched_is_named(folders, tmp_path, capsys):
    out = tmp_path / "x.html"
    assert main(["watch", str(tmp_path), "--out", str(out)]) == 1
    assert "is not a run folder" in capsys.readouterr().err
    assert main(["watch", str(folders[0]), "--out", str(out), "--every", "0"]) == 1
    assert "every must be above 0 seconds, got 0.0" in capsys.readouterr().err
    assert not out.exists()


def test_settings_are_shown(folders, tmp_path):
    out = tmp_path / "runs.html"
    assert main(["watch", str(folders[1]), "--out", str(out), "--once"]) == 0
    record = json.loads((folders[1] / "run.json").read_text())
    assert record["train"]["seed"] == 1
    assert "seed = 1" in out.read_text() or "&#34;seed&#34;: 1" in out.read_text()
