"""Tables in Markdown, and what stands in their cells."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np


def markdown(columns: Sequence[str], rows: Iterable[Iterable[object]]) -> str:
    """A table in Markdown: the columns' titles, then a line a row."""
    head, *body = (
        "|" + "".join(f" {cell}".rstrip() + " |" for cell in row) for row in (columns, *rows)
    )
    return "\n".join((head, "|---" * len(columns) + "|", *body)) + "\n"


def spread(
    values: Sequence[float], form: str, mean: Callable[[Sequence[float]], Any] = np.mean
) -> str:
    """The ``mean`` of ``values`` in the format ``form``; of several, also their range."""
    text = form.format(mean(values))
    if len(values) == 1:
        return text
    return f"{text} ({form.format(min(values))} to {form.format(max(values))})"
