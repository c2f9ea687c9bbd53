"""Exact attention on stock kernels for the heads that allow it, ours for the others.

What heads learn leaves most of the work to plain attention, which stock kernels do fastest:

- "far_and_band", for short memories. Past ``window`` tokens the importance product is below the
  horizon, so the keys j <= i - window are plain attention: one causal call on q[window:],
  k[:L - window] and v[:L - window], a square problem without a mask. Our kernels take the band,
  the last ``window`` keys of each query, and continue the far part's softmax; in the backward they
  add to its gradients.
- "wide", for long memories. While a head's range of g fits the exponents of the dtype, the decay
  can be in the operands, ``[q ; sqrt(Dh) lam 2^(g_i - m) c]`` and ``[k ; 2^(m - g_j) b]``: one
  causal call of width Dh + Ds. Its gradients of log_decay are right to the dtype where memories are
  long alone: :data:`choice.WIDE_HALF_LIFE`.
- "exact": our kernels alone.

Which heads a form cannot serve is a flag a sequence and key head, on the device: nothing waits for
it. Our kernels run always, but their programs return at once unless the head is flagged, and what
they write is y, the log-sum-exp and every gradient of these heads."""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sisa_kernels import selfcheck
from sisa_kernels.inputs import SisaInputs, is_grouped, takes_flat
from sisa_kernels.ops import no_second_derivative, register
from sisa_kernels.paths import stock
from sisa_kernels.paths.choice import Form, flags, window_of
from sisa_kernels.testing import ValueAndGrads, oracle, problem, value_and_grads
from sisa_kernels.triton import op as exact
from sisa_kernels.triton.epilogue import row_products
from sisa_kernels.triton.horizon import Horizon
from sisa_kernels.triton.prologue import LOG2E, Importance
from sisa_kernels.triton.wide import augmented, split_gradients

LN2 = 1 / LOG2E


class Problem(NamedTuple):
    """What forward and backward of a form share."""

    q: Tensor
    """With RoPE, as k."""
    k: Tensor
    v: Tensor
    x: Importance
    launch: Any
    """Of our kernels on all heads."""


def _problem(inputs: SisaInputs, backward: bool) -> Problem:
    tiles = exact._tiles(inputs.q, inputs.v, inputs.b)
    keys, queries = (tiles.query.n, tiles.key.m) if backward else (tiles.forward.n, None)
    q, k, x = exact._prepared(inputs, keys, queries)
    assert x is not None
    v = exact._readable(inputs.v, "v")
    return Problem(q, k, v, x, exact._Launcher(q, k, v, x, None, tiles))


def needs(x: Importance, reach: Tensor) -> Tensor:
    """What each key head needs, [B, G, 2] int32: a window in tokens, and the range of its g.

    The window is the largest ``reach`` [B, H] of its query heads; the range is in base 2."""
    reach = reach.unflatten(1, (x.level.shape[1], -1)).amax(2)
    return torch.stack((reach, x.level[..., 0] - x.level[..., -1]), 2).int()


# ---- Far and band --------------------------------------------------------------------------------


def _far(p: Problem, window: int) -> tuple[Tensor, Tensor, Tensor]:
    """The queries and keys of the far part."""
    rows = p.q.shape[1] - window
    return p.q.narrow(1, window, rows), p.k.narrow(1, 0, rows), p.v.narrow(1, 0, rows)


def _far_and_band(p: Problem, past: Horizon, window: int, flagged: Tensor) -> tuple[Tensor, Tensor]:
    far = exact.Far(*stock.forward(*_far(p, window), p.q.shape[3] ** -0.5))
    y, lse = _results(p)
    exact.run_forward(p.launch.only(flagged, 0, window), p.x, past, y, lse, far)
    return y, lse


def _far_and_band_backward(
    p: Problem, y: Tensor, saved: exact.Saved, past: Horizon, window: int, flagged: Tensor
) -> exact.RawGradients:
    rows = y.shape[1] - window
    dy, y = (t.narrow(1, window, rows) for t in (saved.dy, y))
    lse = saved.lse.narrow(2, window, rows) * LN2
    grads = stock.backward(dy, y, lse, *_far(p, window), p.q.shape[3] ** -0.5)
    far = exact.Far(None, None, *grads)
    raw = exact.empty_gradients(p.q, p.k, p.v, p.x)
    exact.run_backward(p.launch.only(flagged, 0, window), p.x, past, saved, raw, far)
    return raw


# ---- Wide ----------------------------------------------------------------------------------------


def _wide(p: Problem) -> tuple[Tensor, Tensor]:
    q_aug, k_aug = augmented(p.q, p.k, p.x)
    y, lse = stock.forward(q_aug, k_aug, p.v, p.q.shape[3] ** -0.5)
    return y, lse * LOG2E


def _wide_backward(p: Problem, y: Tensor, saved: exact.Saved) -> exact.RawGradients:
    Dh = p.q.shape[3]
    q_aug, k_aug = augmented(p.q, p.k, p.x)
    dq_aug, dk_aug, dv = stock.backward(saved.dy, y, saved.lse * LN2, q_aug, k_aug, p.v, Dh**-0.5)
    dq, dk, dc, db = split_gradients(dq_aug, dk_aug, p.x, Dh)
    # The pairs i = j are in dc and db.
    return exact.RawGradients(dq, dk, dv, dc, db, torch.zeros_like(saved.lse))


# ---- The ops -------------------------------------------------------------------------------------


def _results(p: Problem) -> tuple[Tensor, Tensor]:
    B, L, H, _ = p.q.shape
    lse = p.q.new_empty(B, H, L, dtype=torch.float32)
    return p.q.new_empty(B, L, H, p.v.shape[3]), lse


@takes_flat
def form_eager(
    inputs: SisaInputs, horizon: float, form: str, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    """y [B, L, H, Dv], log2 of each softmax's sum [B, H, L], and :func:`needs` [B, G, 2].

    ``window`` < L is of the form "far_and_band"."""
    p = _problem(inputs, False)
    past = exact.forward_horizon(p.x, p.launch.tiles, horizon, reach=True)
    assert past.reach is not None
    needed = needs(p.x, past.reach)
    if form == "exact":
        y, lse = _results(p)
        exact.run_forward(p.launch, p.x, past, y, lse)
        return y, lse, needed
    flagged = flags(needed, form, window, p.q.shape[1], p.q.dtype)
    if form == "far_and_band":
        y, lse = _far_and_band(p, past, window, flagged)
    else:
        y, lse = _wide(p)
    exact.run_forward(p.launch.only(flagged, 1), p.x, past, y, lse)
    return y, lse, needed


def _form_fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    B, L, H, _ = q.shape
    lse = q.new_empty(B, H, L, dtype=torch.float32)
    needed = q.new_empty(B, k.shape[2], 2, dtype=torch.int32)
    return q.new_empty(B, L, H, v.shape[3]), lse, needed


@takes_flat
def form_backward_eager(
    dy: Tensor,
    y: Tensor,
    lse: Tensor,
    needed: Tensor,
    inputs: SisaInputs,
    horizon: float,
    form: str,
    window: int,
) -> list[Tensor]:
    """Gradients of q .. lam, from the forward's inputs and results alone."""
    p = _problem(inputs, True)
    dy = dy.contiguous()
    saved = exact.Saved(dy, lse, row_products(dy, y))
    past = exact.backward_horizon(p.x, p.launch.tiles, horizon)
    if form == "exact":
        raw = exact.empty_gradients(p.q, p.k, p.v, p.x)
        exact.run_backward(p.launch, p.x, past, saved, raw)
        return exact.finished(raw, p.x, inputs.rotary, None)
    flagged = flags(needed, form, window, p.q.shape[1], p.q.dtype)
    if form == "far_and_band":
        raw = _far_and_band_backward(p, y, saved, past, window, flagged)
    else:
        raw = _wide_backward(p, y, saved)
    exact.run_backward(p.launch.only(flagged, 1), p.x, past, saved, raw)
    return exact.finished(raw, p.x, inputs.rotary, None)


def _form_backward_fake(
    dy: Tensor, y: Tensor, lse: Tensor, needed: Tensor, *inputs: Any
) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in inputs[:8]]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.horizon, ctx.form, ctx.window = inputs
    ctx.save_for_backward(*output, *tensors)
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    grads = form_backward(dy, *saved, ctx.horizon, ctx.form, ctx.window)
    return *grads, None, None, None, None, None


form_op = register("form", form_eager, _form_fake, _backward, _save, results=("y", "lse", "needed"))
form_backward = register(
    "form_backward", form_backward_eager, _form_backward_fake, no_second_derivative
)


def attend(inputs: SisaInputs, form: Form, window: int | None = None) -> Tensor:
    """Exact SISA attention in a form, y [B, L, H, Dv]; operands are such that our kernels take.

    ``window``: the band's width, at least 1; None: :func:`window_of` the length. Where there is
    nothing past it our kernels run alone."""
    return attend_and_needs(inputs, form, window)[0]


def attend_and_needs(
    inputs: SisaInputs, form: Form, window: int | None = None
) -> tuple[Tensor, Tensor]:
    """As :func:`attend`, and :func:`needs` of the call."""
    length = inputs.q.shape[1]
    if window is None:
        window = window_of(length)
    if form == "far_and_band" and length <= window:
        form = "exact"
    horizon = exact.default_horizon(inputs.q.dtype)
    y, _, needed = form_op(*inputs.flat(), horizon, form, window)
    return y, needed


def fault(form: Form, inputs: SisaInputs) -> str | None:
    """What is known to be wrong with a form on operands of such dtypes and widths; None: nothing.

    It is asked on the form's first use, of a problem with heads that it serves and heads that it
    does not."""
    q, b, v = inputs.q, inputs.b, inputs.v
    grouped = is_grouped(q.shape[2], b.shape[2])
    widths = {"Dh": q.shape[3], "Ds": b.shape[3], "Dv": v.shape[3]}

    def solve() -> tuple[ValueAndGrads, ValueAndGrads]:
        shape = {"H": 4 if grouped else 2, "G": 2, **widths}
        x, dy = problem(**shape, decay=3.0, dtype=q.dtype, device=q.device)
        slower = torch.tensor([1.0, 1 / 512], device=q.device)  # from 4 bits a token
        x = x._replace(log_decay=x.log_decay.detach() * slower)
        found = value_and_grads(lambda **x: attend(SisaInputs(**x), form), x, dy)
        return found, oracle(x, dy)

    shape = ", ".join(f"{name} {width}" for name, width in widths.items())
    key: tuple[str | int | bool, ...] = (form, str(q.device), str(q.dtype), grouped)
    key = (*key, *widths.values())
    find = functools.partial(selfcheck.compare, solve, q.device, q.dtype, shape)
    return selfcheck.verdict(key, q.device, find)
