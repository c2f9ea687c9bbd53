"""Code in the pages of the documentation: the blocks of a page, and running them in order."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from sisa_model.cli import main


class Block(NamedTuple):
    """A fenced block of a page."""

    language: str
    code: str
    line: int
    """Of the page, at which the code begins; the first is 1."""


def blocks(page: Path) -> Iterator[Block]:
    """The fenced blocks of a Markdown page that name a language."""
    text = page.read_text(encoding="utf-8")
    for match in re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield Block(match[1], match[2], text.count("\n", 0, match.start()) + 2)


def run_page(page: Path) -> None:
    """Run a page's blocks of Python, in one namespace, and its lines of `sisa`, as they come.

    AssertionError for a command that fails; a traceback of Python names the page's line."""
    scope: dict = {"__name__": page.stem}
    for block in blocks(page):
        if block.language == "python":
            padded = "\n" * (block.line - 1) + block.code
            exec(compile(padded, str(page), "exec"), scope)
        elif block.language == "sh":
            for line in block.code.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words[:1] == ["sisa"]:
                    assert main(words[1:]) == 0, f"{page}:{block.line}: {line}"
