"""The pages as a reader sees them: no warning, whole without a network, at two widths."""

import importlib.util
import subprocess
import sys

import pytest

from tests.support import ROOT
from tests.support.browser import opened

PAGES = ("index", "tutorials/own-gpt", "benchmarks", "maths", "commands", "api")
# Elements that reach past the window and stand in no box that scrolls.
OUTSIDE = """() => [...document.querySelectorAll("article *")].filter(x => {
  if (x.getBoundingClientRect().right <= innerWidth + 1) return false;
  for (let y = x.parentElement; y; y = y.parentElement)
    if (["auto", "scroll", "hidden"].includes(getComputedStyle(y).overflowX)) return false;
  return true;
}).map(x => x.outerHTML.slice(0, 80))"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the pages, as CI builds them."""
    for package in ("sphinx", "myst_parser", "furo", "latex2mathml", "transformers"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}: the extras docs and hf")
    out = tmp_path_factory.mktemp("site")
    command = ["-m", "sphinx", "-W", "-q", "-b", "html", "docs", str(out)]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.mark.slow
def test_formulas_are_mathml(site):
    page = (site / "maths.html").read_text(encoding="utf-8")
    assert page.count("<math ") > 50
    assert "<script" not in page.partition("<article")[2].partition("</article>")[0]


@pytest.mark.slow
@pytest.mark.parametrize("width", [400, 1200])
def test_pages_are_whole_without_a_network(width, site):
    """``opened`` fails for a request to elsewhere and for a line on the console."""
    with opened(site / "index.html", width) as page:
        for name in PAGES:
            page.goto((site / f"{name}.html").as_uri())
            assert not page.evaluate(OUTSIDE), name
            assert page.evaluate("document.documentElement.scrollWidth") <= width, name
            assert page.evaluate("[...document.images].every(x => x.naturalWidth)"), name
