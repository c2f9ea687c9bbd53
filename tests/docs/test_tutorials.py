"""The tutorials and the notebook run as they are written."""

import importlib.util
import json

import pytest
import torch

from tests.support import ROOT
from tests.support.pages import run_page

TUTORIALS = ROOT / "docs" / "tutorials"
SLOW = ("own-data", "llama", "compare", "paper")
NEEDS = {"llama": "transformers"}


NAMES = sorted(page.stem for page in TUTORIALS.glob("*.md"))


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=[pytest.mark.slow] if x in SLOW else []) for x in NAMES]
)
def test_a_tutorial_runs(name, tmp_path, monkeypatch):
    needed = NEEDS.get(name)
    if needed and importlib.util.find_spec(needed) is None:
        pytest.skip(f"needs {needed}")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    run_page(TUTORIALS / f"{name}.md")


@pytest.mark.slow
def test_the_notebook_runs(monkeypatch):
    """Its cells of code, in one namespace; it asserts that the importance term is of use."""
    monkeypatch.setenv("MPLBACKEND", "Agg")
    notebook = ROOT / "examples" / "importance.ipynb"
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    scope: dict = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{notebook}:{cell['id']}", "exec"), scope)
    assert scope["without"] > scope["with_term"]
