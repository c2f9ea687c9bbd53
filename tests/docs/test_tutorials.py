"""The tutorials run as they are written."""

import importlib.util

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
