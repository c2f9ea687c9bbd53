"""Settings files: the flags of a command as TOML, read into its dataclass and written."""

import dataclasses
import json
import sys
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Union

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from sisa_model.utils.files import write_atomically
from sisa_model.utils.flags import is_hidden

PATH_BYTES = "surrogateescape"  # keeps the bytes of a path that is not UTF-8


def write_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Write ``settings`` by name as a file that :func:`read_settings` reads, atomically."""
    encoded = to_toml(settings).encode("utf-8", PATH_BYTES)
    write_atomically(path, lambda aside: aside.write_bytes(encoded))


def to_toml(settings: Mapping[str, Any]) -> str:
    """``settings`` by name as TOML; None and empty mappings are left out.

    Values are numbers, text, paths, sequences of these, and mappings of such as tables."""
    tables = {name: value for name, value in settings.items() if isinstance(value, Mapping)}
    lines = [
        f"{name} = {_literal(value)}"
        for name, value in settings.items()
        if value is not None and name not in tables
    ]
    for name, table in tables.items():
        if table:
            lines += ["", f"[{name}]", to_toml(table).rstrip("\n")]
    return "\n".join(lines) + "\n"


def _literal(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_literal, value))}]"
    if isinstance(value, float):
        return repr(value)  # "inf" and "nan" where JSON has other words
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text.replace("\x7f", "\\u007f")


def read_settings(path: Path, command: type) -> dict[str, Any]:
    """The fields of the dataclass ``command`` that the TOML file ``path`` sets.

    Keys are the flags' names, with - or _. Raises FileNotFoundError, or ValueError naming the file
    and the key that is unknown or of another type than its flag."""
    if not path.is_file():
        raise FileNotFoundError(f"config {path} does not exist")
    try:
        entries = tomllib.loads(path.read_text(encoding="utf-8", errors=PATH_BYTES))
    except ValueError as error:
        raise ValueError(f"config {path} is not TOML: {error}") from error
    hints = typing.get_type_hints(command, include_extras=True)
    flags = {item.name: hints[item.name] for item in dataclasses.fields(command)}
    return _table(entries, flags, f"config {path}: ")


def _table(entries: dict[str, Any], flags: dict[str, Any], where: str) -> dict[str, Any]:
    """``entries`` as values of the ``flags``, which are types by name."""
    known = {name: hint for name, hint in flags.items() if not is_hidden(hint)}
    found = {}
    for key, value in entries.items():
        name = key.replace("-", "_")
        if name not in known:
            names = ", ".join(name.replace("_", "-") for name in known)
            raise ValueError(f"{where}{key} is not among its flags: {names}")
        found[name] = _value(value, known[name], f"{where}{key}")
    return found


def _value(value: Any, hint: Any, where: str) -> Any:
    """``value`` as ``hint`` has it; ValueError that begins with ``where``."""
    origin = typing.get_origin(hint)
    choices = typing.get_args(hint)
    if origin is Annotated:
        return _value(value, choices[0], where)
    if typing.is_typeddict(hint):
        if isinstance(value, dict):
            return _table(value, typing.get_type_hints(hint, include_extras=True), f"{where}.")
        raise ValueError(f"{where} must be a table, got {value!r}")
    if origin in (Union, types.UnionType):
        (only,) = (choice for choice in choices if choice is not type(None))
        return _value(value, only, where)
    if origin is tuple:
        if isinstance(value, list):
            return tuple(_value(item, choices[0], where) for item in value)
        raise ValueError(f"{where} must be a list, got {value!r}")
    if origin is Literal:
        if value in choices:
            return value
        raise ValueError(f"{where} must be one of {', '.join(map(str, choices))}, got {value!r}")
    written: type = {Path: str}.get(hint, hint)
    if type(value) is written or (hint is float and type(value) is int):
        return hint(value)
    raise ValueError(f"{where} must be of type {written.__name__}, got {value!r}")
