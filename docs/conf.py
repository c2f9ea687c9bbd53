"""Sphinx: `sphinx-build -W -b html docs docs/_build`."""

from sisa_kernels.version import __version__

project = "sisa"
version = release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = f"sisa {version}"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
