"""Progress without a terminal: plain lines, few of them, the last one always."""

import logging
import sys

import pytest

from sisa_model.utils import progress as module
from sisa_model.utils.progress import Progress, duration


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_lines_at_a_bounded_rate_and_the_last(clock, caplog):
    caplog.set_level(logging.INFO)
    with Progress("step", 1000, 900) as progress:
        for n in range(50):
            clock[0] += 1.0
            progress.advance(facts={"loss": f"{n}.5"})
    assert caplog.messages == [
        "step 901 of 1,000, loss 0.5, 1 min 39 s left",
        "step 931 of 1,000, loss 30.5, 1 min 09 s left",
        "step 950 of 1,000, loss 49.5, 50 s left",
    ]


def test_of_an_unknown_total_and_told_once(clock, caplog):
    caplog.set_level(logging.INFO)
    with Progress("tokens", None, 1000) as progress:
        progress.advance(234)
    assert caplog.messages == ["tokens 1,234"]


def test_a_terminal_has_a_bar_and_no_lines(caplog, monkeypatch, capsys):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Progress("step", 3) as progress:
        progress.advance(3, {"loss": "2.5"})
    assert caplog.messages == []
    assert "3/3" in capsys.readouterr().err


def test_quiet_is_quiet(caplog, capsys):
    caplog.set_level(logging.INFO)
    with Progress("step", 3, quiet=True) as progress:
        progress.advance(3)
    assert caplog.messages == []
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("seconds", "text"), [(4.6, "5 s"), (61, "1 min 01 s"), (3600 * 30 + 59, "30 h 00 min")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text
