"""What the pages say of the code is so: commands, environment variables, messages, links."""

import ast
import re
from pathlib import Path

import pytest

from sisa_model.cli import COMMANDS
from tests.support import ROOT
from tests.support.pages import blocks

DOCS = ROOT / "docs"
SOURCES = [ROOT / "setup.py"]
SOURCES += [
    path
    for folder in ("sisa_kernels", "sisa_model", "bench", "tests", "tools")
    for path in sorted((ROOT / folder).rglob("*.py"))
]
# Read for reasons that concern nobody who runs this.
NOT_OURS = {"PATH", "PYTHONPATH"}
READ = re.compile(
    r"""environ(?:\.get\(|\.pop\(|\[)["']([A-Z_]+)["']|["']([A-Z_]+)["'] in os\.environ"""
)
WRITTEN = {"TOKENIZERS_PARALLELISM", "COLUMNS"}  # set for others, not read


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def read_variables() -> set[str]:
    """The environment variables that the Python code reads."""
    found = {a or b for path in SOURCES for a, b in READ.findall(path.read_text(encoding="utf-8"))}
    return found - NOT_OURS - WRITTEN


def test_every_environment_variable_is_on_its_page():
    page = text_of("docs/environment.md")
    assert len(read_variables()) > 15
    assert not [name for name in sorted(read_variables()) if f"`{name}`" not in page]


def test_the_page_names_no_variable_that_nobody_reads():
    named = set(re.findall(r"`(SISA_[A-Z_]+)`", text_of("docs/environment.md")))
    assert named <= read_variables()


def test_every_command_is_on_its_page():
    page = text_of("docs/commands.md")
    assert re.findall(r"\{help-of\} sisa (\w+)", page) == list(COMMANDS)


def messages() -> str:
    """Every string of the packages, one a line, with "..." for what is filled in."""
    found = []
    for path in SOURCES:
        if path.is_relative_to(ROOT / "tests"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            if isinstance(node, ast.JoinedStr):
                parts = (x.value if isinstance(x, ast.Constant) else "..." for x in node.values)
                found.append("".join(map(str, parts)))
    return "\n".join(found)


def test_the_messages_that_are_explained_are_given():
    cells = re.findall(r"^\| ([^|]*`[^|]*) \|", text_of("docs/errors.md"), re.MULTILINE)
    quoted = [message for cell in cells for message in re.findall(r"`([^`]+)`", cell)]
    fragments = {part for x in quoted for part in re.split(r"\.{3,}", x) if len(part) > 14}
    assert len(fragments) > 20
    known = messages()
    assert not [part for part in sorted(fragments) if part not in known]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and MyST make them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", title.lower()) for title in titles)
    return {title.replace(" ", "-") for title in plain}


def pages() -> list[Path]:
    return [*ROOT.glob("*.md"), *DOCS.rglob("*.md")]


@pytest.mark.parametrize("page", pages(), ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    links = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", text))
    for link in links:
        if re.match(r"https?:|mailto:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if page == DOCS / "changelog.md":
            continue
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_readme_keeps_to_two_screens_and_its_two_commands():
    readme = text_of("README.md")
    assert readme.count("\n") <= 140
    for command in ("-e . && sisa train", '-e ".[test]" && pytest'):
        assert f"\npip install -c constraints.txt {command}\n" in readme


def test_the_quick_start_runs():
    scope: dict = {}
    for block in blocks(DOCS / "quickstart.md"):
        if block.language == "python":
            exec(block.code, scope)
    assert scope["y"].shape == (2, 1000, 8, 64)
    assert scope["lam"].grad.isfinite().all()
