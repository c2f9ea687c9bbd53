"""A command's dataclass as flags: what each is called, takes and means, and where none is given."""

import ast
import dataclasses
import functools
import inspect
import itertools
import textwrap
import types
import typing
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union

import tyro

# What a flag of each type takes, in the words of a help text.
KINDS: dict[Any, str] = {int: "INT", float: "NUMBER", str: "TEXT", Path: "PATH"}


class Flag(NamedTuple):
    """One flag of a command, or a value that is given without one."""

    path: tuple[str, ...]
    """Its field, and of a table's entry the table's before it."""
    hint: Any
    """The type of its value, without None: int, float, str, bool, Path, a Literal, a tuple."""
    about: str
    default: Any
    """Where none is given; dataclasses.MISSING where one must be."""
    positional: bool

    @property
    def name(self) -> str:
        """How it is written: --model.n-layers, or RUN for a value without a flag."""
        if self.positional:
            return self.path[-1].replace("_", "-").upper()
        return "--" + ".".join(self.path).replace("_", "-")

    @property
    def takes(self) -> str:
        """What follows it in a help text; nothing for a switch and for a value without a flag."""
        if self.positional or self.hint is bool:
            return ""
        if typing.get_origin(self.hint) is tuple:
            return f"{_kind(typing.get_args(self.hint)[0])} ..."
        return _kind(self.hint)

    @property
    def choices(self) -> tuple[str, ...]:
        """All values that there are, if it has only some."""
        hint = self.hint
        if typing.get_origin(hint) is tuple:
            hint = typing.get_args(hint)[0]
        return typing.get_args(hint) if typing.get_origin(hint) is Literal else ()

    @property
    def required(self) -> bool:
        """Whether a value must be given."""
        return self.default is dataclasses.MISSING


def _kind(hint: Any) -> str:
    return "CHOICE" if typing.get_origin(hint) is Literal else KINDS[hint]


def flags_of(command: type) -> list[Flag]:
    """The flags of the dataclass ``command``, a table's entries after all others."""
    docs = field_docs(command)
    hints = typing.get_type_hints(command, include_extras=True)
    flags, entries = [], []
    for item in dataclasses.fields(command):
        hint = hints[item.name]
        if is_hidden(hint):
            continue
        if typing.is_typeddict(hint):
            entries += _entries(item.name, hint)
            continue
        positional = tyro.conf.Positional in getattr(hint, "__metadata__", ())
        about = docs.get(item.name, "")
        flags.append(Flag((item.name,), bare(hint), about, _default(item), positional))
    return flags + entries


def _entries(name: str, table: Any) -> list[Flag]:
    """Those of a table, which explain themselves by tyro's ``arg``."""
    return [
        Flag((name, entry), bare(hint), str(hint.__metadata__[0].help), None, False)
        for entry, hint in typing.get_type_hints(table, include_extras=True).items()
    ]


def _default(item: "dataclasses.Field[Any]") -> Any:
    if item.default_factory is not dataclasses.MISSING:
        return item.default_factory()
    return item.default


def is_hidden(hint: Any) -> bool:
    """Whether a field is no flag: tyro's Suppress."""
    return tyro.conf.Suppress in getattr(hint, "__metadata__", ())


def bare(hint: Any) -> Any:
    """A field's type without annotations and None."""
    origin = typing.get_origin(hint)
    if origin is Annotated:
        return bare(typing.get_args(hint)[0])
    if origin in (Union, types.UnionType):
        (only,) = (x for x in typing.get_args(hint) if x is not type(None))
        return bare(only)
    return hint


@functools.cache
def field_docs(record: type) -> dict[str, str]:
    """The docstrings under a dataclass's fields and its bases', by field, each as one line."""
    found = {}
    for base in reversed(record.__mro__[:-1]):
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(definition, ast.ClassDef)
        for item, below in itertools.pairwise(definition.body):
            if not isinstance(item, ast.AnnAssign) or not isinstance(below, ast.Expr):
                continue
            assert isinstance(item.target, ast.Name)
            assert isinstance(below.value, ast.Constant)
            found[item.target.id] = " ".join(str(below.value.value).split())
    return found
