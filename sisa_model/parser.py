"""What a command line says: the flags of a command over those of its --config file, by tyro."""

import contextlib
import difflib
import io
import re
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypedDict, Union

import tyro

from sisa_model.runs.toml import read_settings
from sisa_model.utils.flags import Flag, flags_of

# What flags were called before, and are still understood as; "" for a value without a flag.
FORMER_FLAGS = {
    "train": {"--tasks": "--mix"},
    "study": {"--tasks": "--mix"},
    "info": {"--preset": ""},
}
CONFIG = Flag(("config",), Path, "TOML file of flags; those given here win over it.", None, False)


class UsageError(Exception):
    """What a command line says that it cannot, in one line."""


def read_command_line(name: str, config: type, args: list[str]) -> Any:
    """The settings of the command ``name``, a ``config``: its --config file's, flags over them.

    Raises UsageError for the flags, FileNotFoundError or ValueError for the file."""
    given = given_flags(name, config, args)
    missing = [
        flag.name for flag in flags_of(config) if flag.required and flag.path[0] not in given
    ]
    if missing:
        raise UsageError(f"{name} needs {', '.join(missing)} (sisa {name} --help explains it)")
    return config(**given)


def given_flags(name: str, config: type, args: list[str]) -> dict[str, Any]:
    """The fields of ``config`` that ``args`` or their --config file set; raises as above."""
    args = [part for arg in args for part in _renamed(arg, FORMER_FLAGS.get(name, {}))]
    flags = [CONFIG, *flags_of(config)]
    _refuse_unknown(name, args, flags)
    file = _config_file(args)
    from_file = {} if file is None else read_settings(file, config)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            given = tyro.cli(_record(config), prog=f"sisa {name}", args=args, default=from_file)
    except SystemExit:
        raise UsageError(_in_our_words(name, _paragraph(said.getvalue()), args, flags)) from None
    given.pop("config", None)
    return given


def completion(configs: Mapping[str, type], args: list[str]) -> str:
    """The script that ``--tyro-print-completion SHELL``, the ``args``, asks for."""
    commands: Any = Union[  # noqa: UP007 - of as many as there are
        tuple(
            Annotated[_record(config), tyro.conf.subcommand(name)]
            for name, config in configs.items()
        )
    ]
    script = io.StringIO()
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(script):
        tyro.cli(commands, prog="sisa", args=args)
    return script.getvalue()


def nearest(word: str, known: Iterable[str]) -> str:
    """What may have been meant, as the end of a message; "" if nothing is near."""
    found = difflib.get_close_matches(word, known, 1)
    return f"; did you mean {found[0]}?" if found else ""


def _record(config: type) -> Any:
    """``config`` for tyro: without defaults, so that it returns what is given and no more."""
    annotated: Any = Annotated  # of types that mypy does not know
    hints = typing.get_type_hints(config)
    fields: dict[str, Any] = {}
    for flag in [CONFIG, *flags_of(config)]:
        name = flag.path[0]
        if len(flag.path) > 1:
            fields[name] = hints[name]
            continue
        fields[name] = annotated[flag.hint, tyro.conf.arg(help=flag.about)]
        if flag.positional:
            fields[name] = annotated[fields[name], tyro.conf.Positional]
    return TypedDict(config.__name__, fields, total=False)  # type: ignore[operator]


def _refuse_unknown(name: str, args: list[str], flags: list[Flag]) -> None:
    """Raise UsageError for a flag that is none, with the one that is like it."""
    known = {flag.name for flag in flags if not flag.positional}
    for flag in flags:
        if flag.hint is bool:
            known.add("--" + ".".join((*flag.path[:-1], f"no-{flag.path[-1]}")).replace("_", "-"))
    for arg in args:
        given = arg.partition("=")[0]
        if given.startswith("--") and given.replace("_", "-") not in known:
            meant = nearest(given, sorted(known))
            raise UsageError(f"{given} is no flag of `sisa {name}`{meant}")


def _paragraph(said: str) -> str:
    """The first paragraph of the box, in Unicode or ASCII, that tyro draws about an error."""
    found = []
    for line in said.splitlines()[1:]:  # the first is a title
        text = line.strip(" \u2502|")
        if text.strip("\u2500-"):
            found.append(text)
        elif found:
            break
    return " ".join(found) or said.strip()


def _in_our_words(name: str, said: str, args: list[str], flags: list[Flag]) -> str:
    """What tyro says of a command line: the flag, what it takes, what was given."""
    if found := re.match(r"Unrecognized options: (.*)", said):
        return f"{found[1]}: no such argument of `sisa {name}`"
    if found := re.match(r"Missing value for argument '(\S+)'", said):
        return f"{found[1]} must be followed by a value"
    found = re.match(r"(?:Error parsing|invalid choice '.*' for argument) '?([\w.-]+)", said)
    flag = next((x for x in flags if found and x.name in (found[1], found[1].upper())), None)
    if flag is None:
        return said
    words = " ".join(args).replace("=", " ")
    given = re.search(rf"{flag.name}((?: (?!--)\S+)+)", words)
    allowed = f"one of {', '.join(flag.choices)}" if flag.choices else f"of the kind {flag.takes}"
    return f"{flag.name} must be {allowed}" + (f", got{given[1]}" if given else "")


def _renamed(arg: str, former: dict[str, str]) -> list[str]:
    """``arg``, which may be FLAG=VALUE, with the name that its flag has now."""
    flag, _, value = arg.partition("=")
    if flag not in former:
        return [arg]
    return [part for part in (former[flag], value) if part]


def _config_file(args: list[str]) -> Path | None:
    """The value of the last --config."""
    found = None
    for arg, following in zip(args, [*args[1:], None]):
        name, equals, value = arg.partition("=")
        if name == "--config" and (equals or following is not None):
            found = Path(value if equals else str(following))
    return found
