"""The command line itself: what it lists, where messages go, former spellings of flags."""

import logging

import pytest

import sisa_model as sm
from sisa_model.cli import COMMANDS, main
from sisa_model.runs.config import TrainConfig


def shown(capsys, *args):
    assert main([*args]) == 0
    return capsys.readouterr().out


def test_help_names_every_command_in_a_few_lines(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(f"• {name} " in text for name in COMMANDS)
    assert "--config FILE.toml" in text
    assert len(text.splitlines()) < 50


def test_help_of_train_has_the_models_fields_and_choices(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = capsys.readouterr().out
    for flag in ("--config FILE.toml", "--model.n-layers INT", "--mode {None,exact,clamped}"):
        assert flag in text
    assert "Number of layers." in text


def test_a_choice_is_refused_by_name(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--precision", "fp8"])
    assert "--precision" in capsys.readouterr().err


def test_info_lists_presets_and_says_what_one_costs(capsys):
    listed = shown(capsys, "info").splitlines()
    assert [line.split()[0] for line in listed[2:]] == sm.presets()
    one = shown(capsys, "info", "sisa-tiny-ds16")
    fields = dict(line.split(maxsplit=1) for line in one.splitlines() if len(line.split()) == 2)
    count = sm.count_parameters(sm.build("sisa-tiny-ds16"))
    assert (fields["d_state"], fields["parameters"]) == ("16", f"{count:,}")
    assert "FLOPs a token" in one
    assert "activations of a sequence" in one


def test_former_spellings_are_understood(capsys, monkeypatch):
    now = shown(capsys, "info", "fox-tiny")
    for former in (["--preset", "fox-tiny"], ["--preset=fox-tiny"]):
        assert shown(capsys, "info", *former) == now
    seen = []
    monkeypatch.setitem(COMMANDS, "train", COMMANDS["train"]._replace(run=seen.append))
    assert main(["train", "--tasks", "needle"]) == 0
    assert main(["train", "--tasks=needle"]) == 0
    assert seen == [TrainConfig(mix=("needle",))] * 2


def test_messages_go_to_stdout_and_warnings_to_stderr(capsys, monkeypatch):
    def run(_):
        log = logging.getLogger("sisa_model.somewhere")
        log.info("a message")
        log.warning("a warning")
        return "a product"

    monkeypatch.setitem(COMMANDS, "train", COMMANDS["train"]._replace(run=run))
    for _ in range(2):  # the second command does not repeat what the first says
        assert main(["train"]) == 0
        told = capsys.readouterr()
        assert (told.out, told.err) == ("a message\na product\n", "sisa: a warning\n")
