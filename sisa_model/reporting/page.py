"""HTML pages that stand alone: styles, scripts and figures inside, nothing from a network."""

import io
from typing import Any, NamedTuple

import jinja2
import matplotlib.pyplot as plt
from markupsafe import Markup

# Escapes what it is given, texts of corpora and models among it; Markup is what is HTML already.
_TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("sisa_model.reporting"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


class HtmlTable(NamedTuple):
    """A table: its title ("" for none), the columns' titles and the cells, row by row."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]


def render(template: str, **values: Any) -> str:
    """The HTML of ``reporting/templates/TEMPLATE`` filled with ``values``, which are escaped."""
    return _TEMPLATES.get_template(template).render(**values)


def svg(figure: Any) -> Markup:
    """A matplotlib ``figure``, which is closed, as an SVG element with text that is text."""
    buffer = io.StringIO()
    with plt.rc_context({"svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    plt.close(figure)
    drawn = buffer.getvalue()
    return Markup(drawn[drawn.index("<svg") :])  # without the XML's own head


def swatch(color: str, ls: str, lw: float) -> Markup:
    """A short line in a curve's style, for a table that is its legend."""
    dashes = {"-": "", ":": "1 2", "-.": "5 2 1 2"}[ls]
    line = (
        '<svg width="28" height="8" role="img"><line x1="0" x2="28" y1="4" y2="4" stroke="{}" '
        'stroke-width="{}" stroke-dasharray="{}"/></svg>'
    )
    return Markup(line).format(color, 2 * lw, dashes)
