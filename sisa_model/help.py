"""What ``sisa --help`` and ``sisa COMMAND --help`` show, as lines for a terminal of any width."""

import inspect
import re
import textwrap
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from sisa_model.utils.flags import Flag

WIDEST = 100  # longer lines are hard to read
INDENT = 28  # of what a flag means
MANY = 20  # flags that are shown by what they are about
GROUPS = {
    "Model": ("preset", "init_from", "mode", "backend"),
    "Data": (
        *("data", "val_data", "text_field", "format", "skip_bad", "tokenizer", "documents"),
        *("task", "mix"),
    ),
    "Training": (
        *("recipe", "steps", "batch_size", "micro_batch_size", "seq_len", "seed"),
        *("lr", "schedule", "warmup_steps", "decay_steps", "lambda_lr_scale"),
        *("weight_decay", "beta1", "beta2", "clip", "skip_bad_batches"),
    ),
    "Run": (
        *("out", "config", "resume", "stop_at", "val_every", "val_blocks", "save_every", "keep"),
        *("keep_best", "sample_tokens", "log"),
    ),
    "Machine": ("device", "precision", "parallel", "activation_checkpointing", "compile"),
}
OTHERS = "Flags"
MODEL = "Fields of the preset's model, to change"
Defaults = Mapping[tuple[str, ...], object]


def show(lines: Iterator[Text]) -> None:
    """Print ``lines`` on the standard output, in colours on a terminal that has them."""
    console = Console(highlight=False)
    for line in lines:
        console.print(line, soft_wrap=True)


def width() -> int:
    """Columns that a help text may fill."""
    return min(Console().width, WIDEST)


def overview(abouts: Mapping[str, str]) -> Iterator[Text]:
    """The commands, a line each."""
    yield _heading("usage: ", "sisa COMMAND [ARGUMENTS]")
    yield Text("\nExact SISA attention: train, compare and sample its models.\n")
    column = max(map(len, abouts))
    for name, about in abouts.items():
        yield Text.assemble("  ", (f"{name:{column}}", "bold"), f"  {about}")
    yield Text(
        "\n`sisa COMMAND --help` explains a command, with examples; --config FILE.toml holds its"
        "\nflags. `sisa --version` prints the version, `sisa --tyro-print-completion SHELL` what"
        "\ncompletes commands in bash, zsh or fish."
    )


def command_help(
    name: str, config: type, flags: list[Flag], defaults: Defaults, examples: tuple[str, ...]
) -> Iterator[Text]:
    """A command: its usage, what it does, every flag with what it means, examples.

    ``defaults``: by a flag's path, what its default None stands for."""
    yield _heading("usage: ", f"sisa {name} {_usage(flags)}")
    for paragraph in inspect.cleandoc(config.__doc__ or "").split("\n\n"):
        yield Text("\n" + textwrap.fill(" ".join(paragraph.split()), width()))
    for title, members in _grouped(flags).items():
        yield _heading(f"\n{title}")
        for flag in members:
            yield from _entry(flag, defaults)
    yield _heading("\nExamples")
    for example in examples:
        yield Text(f"  {example}")


def _usage(flags: list[Flag]) -> str:
    words = []
    for flag in flags:
        several = " ..." if typing.get_origin(flag.hint) is tuple else ""
        if flag.positional:
            words.append(f"{flag.name}{several}" if flag.required else f"[{flag.name}{several}]")
        elif flag.required:
            words.append(f"{flag.name} {flag.takes}")
    return " ".join([*words, "[FLAGS]"])


def _grouped(flags: list[Flag]) -> dict[str, list[Flag]]:
    """The flags by headings; of a command with few, under one."""
    few = len(flags) < MANY
    headings = {field: title for title, fields in GROUPS.items() for field in fields}
    order = {field: place for place, field in enumerate(headings)}
    found: dict[str, list[Flag]] = {}
    for title in ("Arguments", OTHERS, *GROUPS):
        found[title] = []
    for flag in sorted(flags, key=lambda flag: order.get(flag.path[0], len(order)) * (not few)):
        if flag.positional:
            title = "Arguments"
        elif len(flag.path) > 1:
            title = MODEL
        else:
            title = OTHERS if few else headings.get(flag.path[0], OTHERS)
        found.setdefault(title, []).append(flag)
    return {title: members for title, members in found.items() if members}


def _entry(flag: Flag, defaults: Defaults) -> Iterator[Text]:
    """A flag, and beside it, or below a long one, what it means."""
    value = defaults.get(flag.path, flag.default)
    name = flag.name
    if value is True:
        *table, last = name.removeprefix("--").split(".")
        name = "--" + ".".join([*table, f"[no-]{last}"])
    meaning = " ".join([flag.about, *_choices(flag), *_default(flag, value, flag.path in defaults)])
    body = textwrap.wrap(meaning, width() - INDENT, break_on_hyphens=False)
    head = Text.assemble("  ", (name, "cyan"), f" {flag.takes}".rstrip())
    if len(head) > INDENT - 2:
        yield head
    else:
        head.pad_right(INDENT - len(head))
        yield head + Text(body.pop(0))
    for line in body:
        yield Text(" " * INDENT + line)


def _choices(flag: Flag) -> list[str]:
    """What may be given, if what the flag means does not say it."""
    told = re.findall(r"[\w-]+", flag.about)
    if set(map(str, flag.choices)) <= set(told):
        return []
    return [f"One of {', '.join(map(str, flag.choices))}."]


def _default(flag: Flag, value: Any, of_the_preset: bool) -> list[str]:
    if flag.required:
        return ["Required."]
    if value is None or isinstance(value, bool) or value in ((), ""):
        return []
    if of_the_preset and len(flag.path) == 1:
        return [f"Default: {_written(value)}, the preset's."]
    return [] if "Default:" in flag.about else [f"Default: {_written(value)}."]


def _written(value: Any) -> str:
    """A value as one writes it after its flag."""
    if isinstance(value, tuple):
        return " ".join(map(_written, value))
    return str(value) if isinstance(value, (str, Path, int)) else f"{value:g}"


def _heading(*words: str) -> Text:
    return Text.assemble((words[0], "bold"), *words[1:])
