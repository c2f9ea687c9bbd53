"""A headless browser for pages of HTML, where the machine has one."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@contextlib.contextmanager
def opened(path: Path, width: int = 1200) -> Iterator[Any]:
    """The page at ``path`` in a browser without a network; fails for what its console complains of.

    Skips the test where there is no browser or no playwright."""
    playwright = pytest.importorskip("playwright.sync_api")
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    if executable is None:
        pytest.skip(f"needs a browser: one of {', '.join(BROWSERS)}")
    complaints: list[str] = []
    with playwright.sync_playwright() as engine:
        browser = engine.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda x: x.url.startswith("file:") or complaints.append(x.url))
        page.goto(path.absolute().as_uri())
        yield page
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        browser.close()
    assert not complaints
