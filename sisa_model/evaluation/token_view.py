"""Which earlier tokens the importance term lifts or lowers: a page of HTML to choose them in."""

import base64
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from sisa_model.data.tokenizer import Encoder
from sisa_model.models.context import Context
from sisa_model.models.health import sequence_scores, visit_layers
from sisa_model.models.sisa import SisaAttention
from sisa_model.reporting.page import render
from sisa_model.utils.files import write_text

STEPS = 65_535  # of a number of 16 bits


class LayerView(NamedTuple):
    """A SISA layer on one sequence of L tokens; all fp64."""

    layer: int
    """Which of the model's layers, from 0."""
    content: Tensor
    """The first term of Eq. 2, q_i.k_j / sqrt(Dh), [H, L, L]; -inf above the diagonal."""
    importance: Tensor
    """The second, lambda exp(g_i - g_j) C_i.B_j, [H, L, L]."""
    g: Tensor
    """The running sum of the log decay, [H, L]."""


def view_layers(model: Any, input_ids: Tensor) -> list[LayerView]:
    """The :class:`LayerView` of every SISA layer of ``model`` on ``input_ids`` [1, L].

    Memory is O(layers H L^2)."""
    found: list[LayerView] = []

    def keep(layer: int, attn: SisaAttention, x: Tensor, context: Context) -> None:
        ((content, importance),) = sequence_scores(attn, x, context)
        g = attn.operands(x).log_decay[0].double().cumsum(0).T
        of_heads = g.repeat_interleave(attn.n_heads // attn.n_kv_heads, 0)
        found.append(LayerView(layer, content[0].cpu(), importance[0].cpu(), of_heads.cpu()))

    visit_layers(model, input_ids, keep)
    return found


def write_page(
    path: Path, about: str, ids: list[int], encoder: Encoder | None, layers: list[LayerView]
) -> None:
    """Write the page about ``ids``, the tokens of ``layers``.

    The terms are kept in 16 bits between the least and the greatest of a row; attention with and
    without the importance term is their softmax. ``encoder`` None: tokens are numbers."""
    texts = [str(i) if encoder is None else encoder.decode([i]) for i in ids]
    data = {
        "tokens": texts,
        "layers": [
            {
                "layer": view.layer,
                "heads": [
                    {
                        "content": _packed(content.numpy()),
                        "importance": _packed(importance.numpy()),
                        "g": [round(value, 4) for value in g.tolist()],
                    }
                    for content, importance, g in zip(view.content, view.importance, view.g)
                ],
            }
            for view in layers
        ],
    }
    write_text(
        path,
        render("tokens.html", title="Which tokens matter", about=about, data=data, steps=STEPS),
    )


def _packed(values: np.ndarray) -> dict[str, Any]:
    """Rows i of [L, L], each its first i + 1 values, as little-endian 16 bits in base64."""
    rows = [row[: i + 1] for i, row in enumerate(values)]
    low = np.array([row.min() for row in rows])
    span = np.array([row.max() for row in rows]) - low
    scale = np.where(span > 0, span, 1)
    steps = [np.rint((row - a) / b * STEPS) for row, a, b in zip(rows, low, scale)]
    packed = np.concatenate(steps).astype("<u2").tobytes()
    return {
        "low": [float(f"{value:.6g}") for value in low],
        "span": [float(f"{value:.6g}") for value in span],
        "steps": base64.b64encode(packed).decode(),
    }
