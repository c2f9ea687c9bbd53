"""Messages as a terminal shows them: tables of Markdown drawn as tables, as wide as it is."""

import io
import itertools
import logging

from rich.console import Console
from rich.table import Table
from rich.text import Text


class Drawn(logging.Formatter):
    """Bare messages, with :func:`fitted` tables in ``width`` columns."""

    def __init__(self, width: int):
        super().__init__("%(message)s")
        self.width = width

    def format(self, record: logging.LogRecord) -> str:
        return fitted(super().format(record), self.width)


def fitted(text: str, width: int) -> str:
    """``text`` with its Markdown tables as columns that fit ``width``; all else as it is."""
    parts: list[str] = []
    for is_table, group in itertools.groupby(text.split("\n"), lambda line: line.startswith("|")):
        lines = [*group]
        parts += [_drawn(lines, width)] if is_table else lines
    return "\n".join(parts)


def _drawn(lines: list[str], width: int) -> str:
    """A table of Markdown: cells that are too wide are broken between words."""
    titles, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(Text(titles[0]), no_wrap=True, min_width=max(len(row[0]) for row in rows))
    for title in titles[1:]:
        table.add_column(Text(title), justify="right", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    console = Console(file=io.StringIO(), width=width, color_system=None)
    with console.capture() as captured:
        console.print(table)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())
