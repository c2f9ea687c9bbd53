"""Commands of ``sisa`` whose work a test does in their place."""

from sisa_model.commands import COMMANDS


def run_instead(monkeypatch, name, run):
    """Let ``sisa NAME`` call ``run`` with its settings."""
    config, _ = COMMANDS[name].load()
    monkeypatch.setitem(COMMANDS, name, COMMANDS[name]._replace(load=lambda: (config, run)))
