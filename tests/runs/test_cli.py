"""The command line itself: what it lists, where messages go, former spellings of flags."""

import dataclasses
import logging
import os
import shlex
import subprocess
import sys

import pytest

import sisa_kernels as sk
import sisa_model as sm
from sisa_model.cli import COMMANDS, main
from sisa_model.help import GROUPS
from sisa_model.models.presets import find_preset
from sisa_model.parser import read_command_line
from sisa_model.runs.config import TrainConfig
from sisa_model.terminal import fitted
from tests.support import ROOT
from tests.support.commands import run_instead


def shown(capsys, *args):
    assert main([*args]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("said", "set_"),
    [({}, "1000"), ({"OMP_WAIT_POLICY": "active"}, None), ({"GOMP_SPINCOUNT": "7"}, "7")],
)
def test_idle_threads_leave_the_cores_unless_told_otherwise(said, set_, monkeypatch, capsys):
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    shown(capsys, "--version")
    assert os.environ.get("GOMP_SPINCOUNT") == set_


def test_help_names_every_command_on_one_screen(capsys):
    text = shown(capsys, "--help")
    assert all(f"  {name:9} {command.about}" in text for name, command in COMMANDS.items())
    assert "--config FILE.toml" in text
    assert len(text.splitlines()) <= 25
    assert all(len(line) <= 88 for line in text.splitlines())
    assert shown(capsys) == text  # what a bare `sisa` shows


def test_help_of_train_has_the_models_fields_and_choices(capsys):
    text = shown(capsys, "train", "--help")
    for flag in (
        "--config PATH",
        "--model.n-layers INT",
        "One of auto, native",
        "Number of layers",
    ):
        assert flag in text
    headings = [line for line in text.splitlines() if line and line[0].isupper()]
    assert [x for x in headings if x in GROUPS] == list(GROUPS)
    assert all(len(line) <= 100 for line in text.splitlines())


def told(capsys, *args):
    """What a help text says of each flag, in one line."""
    entries = {}
    for line in shown(capsys, *args, "--help").splitlines():
        if line.startswith("  --"):
            name, *rest = line.split()
            entries[name] = " ".join(rest)
        elif line.startswith("    ") and entries:
            entries[name] += f" {line.strip()}"
    return entries


@pytest.mark.parametrize("preset", [None, "sisa-152m-ds16", "mamba2-50m"])
def test_help_of_train_shows_what_a_preset_takes(capsys, preset):
    known = find_preset(preset or TrainConfig.preset)
    entries = told(capsys, "train", *([] if preset is None else ["--preset", preset]))
    for field, value in dataclasses.asdict(known.training).items():
        assert f"Default: {value}, the preset's." in entries[f"--{field.replace('_', '-')}"]
    for field in ("d_model", "n_layers", "d_state", "d_ff"):
        value = getattr(known.model, field)
        assert f"Default: {value}." in entries[f"--model.{field.replace('_', '-')}"]


def test_help_shows_what_follows_from_other_flags(capsys):
    entries = told(capsys, "train", "--recipe", "paper", "--steps", "100", "--schedule", "wsd")
    assert "Default: clamped, the preset's." in entries["--mode"]
    assert "Default: 10, the preset's." in entries["--warmup-steps"]
    assert "Default: 10, the preset's." in entries["--decay-steps"]


def test_no_help_names_a_field_that_train_lacks():
    fields = {item.name for item in dataclasses.fields(TrainConfig)}
    assert {field for group in GROUPS.values() for field in group} <= fields | {"config"}


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_of_a_help_are_understood(name):
    config, _ = COMMANDS[name].load()
    for example in COMMANDS[name].examples:
        words = shlex.split(example.rpartition("sisa_model ")[2].removeprefix("sisa "))
        command, *args = words
        assert command == name
        assert isinstance(read_command_line(name, config, args), config)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("trian", "trian is none of its commands; did you mean train? (sisa --help lists them)"),
        ("train --stps 3", "--stps is no flag of `sisa train`; did you mean --steps?"),
        ("train --no-resme", "--no-resme is no flag of `sisa train`; did you mean --no-resume?"),
        ("train foo", "foo: no such argument of `sisa train`"),
        ("train --steps", "--steps must be followed by a value"),
        ("train --steps many", "--steps must be of the kind INT, got many"),
        ("train --mix chess go", "--mix must be one of needle, recall, got chess go"),
        (
            "train --precision=fp8",
            "--precision must be one of auto, fp32, bf16, bf16-pure, got fp8",
        ),
        ("convert --out x", "convert needs CHECKPOINT, --preset (sisa convert --help explains it)"),
        ("study chess", "STUDY must be one of paper, clamp"),
    ],
)
def test_a_wrong_command_line_is_told_in_one_line(capsys, args, message):
    assert main(args.split()) == 2
    told = capsys.readouterr()
    assert (told.out, told.err) == ("", f"sisa: error: {message}\n")


def test_no_torch_for_what_needs_none():
    """A command line answers at once: torch alone takes a second or more."""
    code = (
        "import sys; from sisa_model.cli import main; main(['--version']); main(['--help']); "
        "main(['trian']); print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.splitlines()[-1] == "False"
    assert done.stdout.startswith(f"sisa {sk.__version__}\n")


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
    run_instead(monkeypatch, "train", seen.append)
    assert main(["train", "--tasks", "needle"]) == 0
    assert main(["train", "--tasks=needle"]) == 0
    assert seen == [TrainConfig(mix=("needle",))] * 2


TABLE = """Before it
| model | accuracy at 129 to 256 | first step with >= 95 % |
|---|---|---|
| transformer-tiny | 49.9 % (48.0 to 51.2) | never |
| chance | 50.0 % | |
"""


def test_tables_fit_a_terminal_and_are_plain_elsewhere(capsys, monkeypatch):
    run_instead(monkeypatch, "train", lambda _: logging.getLogger("sisa_model.x").info(TABLE))
    assert main(["train"]) == 0
    assert capsys.readouterr().out == f"{TABLE}\n"
    for width in (46, 80):
        lines = fitted(TABLE, width).splitlines()
        assert max(map(len, lines)) <= width
        words = " ".join(TABLE.replace("|", " ").replace("---", "").split())
        assert sorted(" ".join(lines).split()) == sorted(words.split())
    assert [line.split()[0] for line in lines] == ["Before", "model", "transformer-tiny", "chance"]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "46")
    assert main(["train"]) == 0
    assert capsys.readouterr().out == f"{fitted(TABLE, 46)}\n"


def test_messages_go_to_stdout_and_warnings_to_stderr(capsys, monkeypatch):
    def run(_):
        log = logging.getLogger("sisa_model.somewhere")
        log.info("a message")
        log.warning("a warning")
        return "a product"

    run_instead(monkeypatch, "train", run)
    for _ in range(2):  # the second command does not repeat what the first says
        assert main(["train"]) == 0
        told = capsys.readouterr()
        assert (told.out, told.err) == ("a message\na product\n", "sisa: a warning\n")
