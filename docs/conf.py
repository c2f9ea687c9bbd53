"""Sphinx: `sphinx-build -W -b html docs docs/_build`. Formulas become MathML as the pages are made,
so that a reader's browser fetches nothing."""

import contextlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from sisa_kernels.version import __version__

ROOT = Path(__file__).resolve().parent.parent
HELP_WIDTH = "88"  # columns

project = "sisa"
version = release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = f"sisa {version}"
html_static_path = ["_static"]
html_css_files = ["sisa.css"]
html_math_renderer = "mathml"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
# A reference must lead somewhere; other projects' names have no pages here.
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!sisa_).*")]


def formula(node: nodes.Node, display: str) -> tuple[str, str]:
    r"""A formula as MathML, and the label that its \tag gives it."""
    tag = re.search(r"\\tag\{(.*?)\}", node.astext())
    latex = node.astext().replace(tag[0], "") if tag else node.astext()
    return convert(latex, display=display), tag[1] if tag else ""


def inline_math(translator: nodes.NodeVisitor, node: nodes.Node) -> None:
    """Write a formula within a line."""
    translator.body.append(formula(node, "inline")[0])
    raise nodes.SkipNode


def display_math(translator: nodes.NodeVisitor, node: nodes.Node) -> None:
    """Write a formula of its own, which scrolls where it is wider than the page."""
    mathml, label = formula(node, "block")
    note = f'<span class="label">({label})</span>' if label else ""
    translator.body.append(f'<div class="formula">{mathml}{note}</div>\n')
    raise nodes.SkipNode


def help_of(words: list[str]) -> str:
    """What a command prints for --help; one other than `sisa` in a process of its own."""
    if words[0] != "sisa":
        command = [sys.executable, *words[1:], "--help"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        return done.stdout
    from sisa_model.cli import main

    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        main([*words[1:], "--help"])
    return re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue())


class HelpOf(SphinxDirective):
    """``{help-of} sisa train``: the text of its --help."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        text = help_of(self.arguments[0].split())
        if not text.strip():
            raise self.error(f"{self.arguments[0]} --help printed nothing")
        return [nodes.literal_block(text, text, language="text")]


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    os.environ["COLUMNS"] = HELP_WIDTH
    app.add_html_math_renderer("mathml", (inline_math, None), (display_math, None))
    app.add_directive("help-of", HelpOf)
