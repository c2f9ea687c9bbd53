"""Calls of sisa::attention: their oracle in fp64, the bounds they are held to, random calls."""

import contextlib
import itertools
import math
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from sisa_kernels import _extension, ops, reference, selfcheck
from sisa_kernels.rotation import rotate
from sisa_kernels.testing import gradient_errors, oracle, relative, worst_row
from tests.support.augment import laid_out, rotary_tables

FP32 = torch.float32
HALVES = (torch.bfloat16, torch.float16)
KINDS = ("importance", "forget", "none")
NIGHTLY = os.environ.get("SISA_NIGHTLY") == "1"
Y, WORST_ROW, GRADIENT, LAM = 1e-6, 1e-5, 5e-6, 2e-6  # relative, of fp32 against fp64

needs_extension = pytest.mark.skipif(
    not _extension.LOADED, reason=f"the library is {_extension.STATE}"
)


# ---- What tests of a path run in -----------------------------------------------------------------


@contextlib.contextmanager
def fresh_memory_is_nan() -> Iterator[None]:
    """Fill what ``new_empty`` gives with NaN, where C++ calls it too."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def first_use(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing has been checked or said yet, and what is then leaves no trace."""
    with monkeypatch.context() as patch:
        patch.delenv("SISA_BACKEND", raising=False)
        patch.setattr(selfcheck, "_verdicts", {})
        patch.setattr(ops, "_said", set())
        yield


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """PyTorch's threads are ``count``."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Recorder(TorchDispatchMode):
    """The ops of ours that run within it, each with its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "sisa":
            self.calls.append((func._schema.name.removeprefix("sisa::"), args))
        return func(*args, **(kwargs or {}))

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.calls]


# ---- Bounds --------------------------------------------------------------------------------------


def check_bounds(found, right, errors=None) -> None:
    """y, its worst row and every gradient; ``errors``: the gradients', where measured otherwise."""
    y, grads = found
    y_ref, grads_ref = right
    assert relative(y, y_ref) <= Y
    assert worst_row(y, y_ref) <= WORST_ROW
    errors = errors or {name: relative(x, grads_ref[name]) for name, x in grads.items()}
    for name, error in errors.items():
        assert error <= (LAM if name == "lam" else GRADIENT), (name, errors)


def check_sisa(found, right, inputs) -> None:
    """:func:`check_bounds` of SISA attention, lam's gradient by its own measure."""
    check_bounds(found, right, gradient_errors(found[1], right[1], inputs))


def lam_error(found: Tensor, inputs: dict[str, Tensor], dy: Tensor, **options) -> float:
    """Of lam's gradient against the sum of its parts' sizes, also where lam is 0."""
    c, lam = inputs["c"].detach().double(), inputs["lam"].detach().double()
    scaled = {**inputs, "c": lam[:, None] * c, "lam": torch.ones_like(lam)}
    parts = (oracle(scaled, dy, **options)[1]["c"] * c).sum(3)
    error = (found.double() - parts.sum((0, 1))).norm() / parts.abs().sum((0, 1)).norm()
    return error.nan_to_num(math.inf).item()


def check_half(found, right, inputs) -> None:
    """Within twice the rounding of the oracle's own result and gradients to the dtype."""
    y, grads = found
    y_ref, grads_ref = right
    dtype = inputs["q"].dtype
    assert y.dtype == dtype
    assert relative(y, y_ref) <= 2 * relative(y_ref.to(dtype), y_ref)
    assert worst_row(y, y_ref) <= 2 * worst_row(y_ref.to(dtype), y_ref)
    for name, grad in grads.items():
        assert grad.dtype == inputs[name].dtype
        rounding = relative(grads_ref[name].to(grad.dtype), grads_ref[name])
        assert relative(grad, grads_ref[name]) <= 2 * rounding + 1e-5, name


def no_worse_than(allowed, found, right, multiple: float) -> None:
    """y and every gradient err by at most a multiple of what another implementation does.

    lam's is a few sums that nearly cancel, whose errors are luck: it is not compared."""
    assert relative(found[0], right[0]) <= multiple * relative(allowed[0], right[0])
    for name, grad in found[1].items():
        assert grad.isfinite().all(), name
        if name == "lam":
            continue
        bound = multiple * relative(allowed[1][name], right[1][name])
        assert relative(grad, right[1][name]) <= bound, name


# ---- Calls of the op -----------------------------------------------------------------------------


class Call(NamedTuple):
    """Arguments of sisa::attention."""

    q: Tensor
    k: Tensor
    v: Tensor
    b: Tensor | None = None
    c: Tensor | None = None
    log_decay: Tensor | None = None
    theta: Tensor | None = None
    lam: Tensor | None = None
    cos: Tensor | None = None
    sin: Tensor | None = None
    bounds: Tensor | None = None
    offset: int = 0

    @property
    def wanted(self) -> list[bool]:
        """Every gradient there is."""
        return [x is not None for x in self[:8]]

    @property
    def names(self) -> list[str]:
        """Of what has a gradient."""
        return [name for name, x in zip(self._fields[:8], self) if x is not None]

    def map(self, change: Callable[[Tensor], Tensor]) -> "Call":
        """Every tensor but the bounds changed."""
        changed = (None if x is None else change(x) for x in self[:10])
        return Call(*changed, *self[10:])


class Results(NamedTuple):
    y: Tensor
    lse: Tensor
    grads: dict[str, Tensor]
    lam_sizes: Tensor | None = None  # of each head's gradient, which is a sum over tokens


def call_of(
    kind="importance", L=200, B=1, H=2, G=None, widths=(16, 8, 16), decay=-3.0, seed=0, **options
) -> Call:
    """A random call of widths (Dh, Ds, Dv), with lam of every head its own; options: of Call."""
    (Dh, Ds, Dv), G = widths, G or H
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    q, k, v = normal(B, L, H, Dh), normal(B, L, G, Dh), normal(B, L, G, Dv)
    if kind == "none":
        return Call(q, k, v, **options)
    log_decay = -F.softplus(0.5 * normal(B, L, G if kind == "importance" else H) + decay)
    if kind == "forget":
        return Call(q, k, v, log_decay=log_decay, **options)
    b, c, theta = normal(B, L, G, Ds), normal(B, L, H, Ds), 0.3 * normal(B, L, G, Ds // 2)
    lam = F.softplus(0.3 * normal(H) - 1)
    return Call(q, k, v, b, c, log_decay, theta, lam, **options)


def tables(L: int, Dh: int) -> dict[str, Tensor]:
    """RoPE's, as options of a call."""
    return dict(zip(("cos", "sin"), rotary_tables(L, Dh)))


def queries(call: Call, offset: int, count: int) -> Call:
    """The call of ``count`` queries from ``offset`` on, over the same keys."""
    rows = slice(offset, offset + count)
    c = None if call.c is None else call.c[:, rows]
    return call._replace(q=call.q[:, rows], c=c, offset=offset)


def run(call: Call, dy: Tensor | None = None, dlse: Tensor | None = None) -> Results:
    """By the op and its backward, called directly; dy of fp32."""
    y, lse = torch.ops.sisa.attention(*call)
    if dy is None:
        return Results(y, lse, {})
    grads = torch.ops.sisa.attention_backward(dy, dlse, y, lse, *call, call.wanted)
    return Results(y, lse, dict(zip(call.names, grads)))


def exactly(call: Call, dy: Tensor, dlse: Tensor | None = None) -> Results:
    """By Eq. 2 in fp64, or FoX's, or plain attention; and autograd."""
    call = call.map(lambda x: x.detach().double())
    leaves = [x.requires_grad_() for x in call[:8] if x is not None]
    weighed = call
    if call.lam is not None:  # lam a token, whose gradient is that of lam in parts
        parts = call.lam.detach().expand(call.c.shape[:3]).clone().requires_grad_()
        leaves[-1] = parts
        weighed = call._replace(c=parts[..., None] * call.c, lam=torch.ones_like(call.lam))
    y, lse = _attention(weighed)
    outputs, grads = [y], [dy.double()]
    if dlse is not None:
        outputs, grads = [y, lse], [dy.double(), dlse.double()]
    if y.requires_grad:
        found = torch.autograd.grad(outputs, leaves, grads, materialize_grads=True)
    else:  # no query has a document
        found = [torch.zeros_like(x) for x in leaves]
    named = dict(zip(call.names, found))
    sizes = None
    if call.lam is not None:
        sizes = named["lam"].abs().sum((0, 1))
        named["lam"] = named["lam"].sum((0, 1))
    return Results(y.detach(), lse.detach(), named, sizes)


def _attention(call: Call) -> tuple[Tensor, Tensor]:
    L, (B, count, H, _) = call.k.shape[1], call.q.shape
    rest = L - call.offset - count
    q, c = (
        None if x is None else F.pad(x, (0, 0, 0, 0, call.offset, rest)) for x in (call.q, call.c)
    )
    k = call.k
    if call.cos is not None:
        q, k = (rotate(x, call.cos[:, None], call.sin[:, None]) for x in (q, k))
    bounds = [0, L] if call.bounds is None else call.bounds.tolist()
    whole = call._replace(q=q, c=c, k=k)
    pieces = [_document(whole, slice(*ends)) for ends in itertools.pairwise(bounds)]
    left = L - bounds[-1]
    pieces.append((q.new_zeros(B, left, H, call.v.shape[3]), q.new_full((B, H, left), -math.inf)))
    y, lse = torch.cat([y for y, _ in pieces], 1), torch.cat([lse for _, lse in pieces], 2)
    rows = slice(call.offset, call.offset + count)
    return y[:, rows], lse[:, :, rows]


def _document(call: Call, tokens: slice) -> tuple[Tensor, Tensor]:
    q, k, v, b, c, log_decay, theta = (None if x is None else x[:, tokens] for x in call[:7])
    B, L, H, _ = q.shape
    G = k.shape[2]
    if b is None:
        none = q.new_zeros(B, L, H, 2)
        no_decay = none[:, :, :G, 0]
        score, _ = reference.scores(
            q, k, none[:, :, :G], none, no_decay, no_decay[..., None], q.new_zeros(H)
        )
        if log_decay is not None:
            g = log_decay.clamp(min=reference.LOWEST_LOG).cumsum(1).transpose(1, 2)
            score = score + g[..., None] - g[..., None, :]
    else:
        score = sum(reference.scores(q, k, b, c, log_decay, theta, call.lam))
    y = torch.einsum("bhij,bjhd->bihd", score.softmax(-1), v.repeat_interleave(H // G, 2))
    return y, score.logsumexp(-1)


def check_results(found: Results, right: Results) -> None:
    """The bounds of fp32 on a call's results, rows of no document (whose lse is -inf) exactly."""
    attended = right.lse.isfinite()
    assert torch.equal(found.lse.isneginf(), ~attended)
    rows = attended.transpose(1, 2)
    assert not found.y[~rows].any()
    lse, lse_ref = found.lse[attended], right.lse[attended]
    assert ((lse.double() - lse_ref).abs() <= 2e-6 * (1 + lse_ref.abs())).all()
    grads = {name: x for name, x in found.grads.items() if name != "lam"}
    if attended.any():
        check_bounds((found.y[rows], grads), (right.y[rows], right.grads))
    else:
        assert not any(x.any() for x in found.grads.values())
    if "lam" in found.grads:
        error = (found.grads["lam"].double() - right.grads["lam"]).norm()
        assert error <= LAM * right.lam_sizes.norm()


def same_bits(found: Results, expected: Results) -> None:
    """Every result that both have is the same."""
    assert torch.equal(found.y, expected.y)
    assert torch.equal(found.lse, expected.lse)
    for name, grad in found.grads.items():
        assert torch.equal(grad, expected.grads[name]), name


# ---- Long sequences ------------------------------------------------------------------------------


def by_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    b: Tensor,
    c: Tensor,
    log_decay: Tensor,
    theta: Tensor,
    lam: Tensor,
    rows: int = 256,
) -> Tensor:
    """Eq. 2 as in reference.py, ``rows`` queries at a time: memory of rows x L, gradients too.

    One key head for each query head; y [B, L, H, Dv] in fp64 for operands of fp64."""
    g, phase = log_decay.cumsum(1), theta.cumsum(1)
    b, c = (rotate(x, phase.cos(), phase.sin()) for x in (b, c))
    pieces = []
    for start in range(0, q.shape[1], rows):
        end = min(start + rows, q.shape[1])
        early = (x[:, :end] for x in (k, v, b, g))
        late = (x[:, start:end] for x in (q, c, g))
        pieces.append(checkpoint(_block, *early, *late, lam, use_reentrant=False))
    return torch.cat(pieces, 1)


def _block(
    k: Tensor,
    v: Tensor,
    b: Tensor,
    g: Tensor,
    q: Tensor,
    c: Tensor,
    g_q: Tensor,
    lam: Tensor,
) -> Tensor:
    later = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).triu(k.shape[1] - q.shape[1] + 1)
    gap = (g_q[:, :, None] - g[:, None]).permute(0, 3, 1, 2).masked_fill(later, -math.inf)
    importance = lam[:, None, None] * gap.exp() * torch.einsum("bihd,bjhd->bhij", c, b)
    content = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(q.shape[3])
    weight = (content.masked_fill(later, -math.inf) + importance).softmax(-1)
    return torch.einsum("bhij,bjhd->bihd", weight, v)


# ---- Random calls --------------------------------------------------------------------------------

INTEGERS = (torch.int32, torch.int64)


def widths(most: int) -> st.SearchStrategy[int]:
    """Of heads, mostly small."""
    return st.one_of(st.integers(1, most), st.sampled_from((most, 64, 128, 256)))


@st.composite
def calls(draw: st.DrawFn) -> tuple[Call, Tensor, Tensor | None, list[bool]]:
    """A call of either op: of the forward, dy, dlse or None, and which gradients are wanted."""
    kind, dtype = draw(st.sampled_from(KINDS)), draw(st.sampled_from((FP32, *HALVES)))
    B, L, G = draw(st.integers(1, 2)), draw(st.integers(1, 200)), draw(st.integers(1, 2))
    Dh, Dv, Ds = draw(widths(70)), draw(widths(70)), 2 * draw(st.integers(1, 20))
    shape = dict(B=B, L=L, G=G, H=G * draw(st.integers(1, 3)), widths=(Dh, Ds, Dv))
    call = call_of(kind, **shape, seed=draw(st.integers(0, 2**31)))
    wide = [None if x is None else x.to(dtype) for x in call[:5]]
    call = Call(*wide, *call[5:])
    if call.log_decay is not None:
        call = call._replace(log_decay=_decays(draw, call.log_decay))
    if kind == "importance":
        step, lam = 10.0 ** draw(st.integers(-2, 2)), draw(st.sampled_from((0.0, 1.0, 3.0)))
        call = call._replace(theta=call.theta * step, lam=call.lam * lam)
    if Dh % 2 == 0 and draw(st.booleans()):
        call = call._replace(**tables(L, Dh))
    if draw(st.booleans()):
        bounds = [0, *sorted(draw(st.lists(st.integers(0, L), min_size=1, max_size=6)))]
        call = call._replace(bounds=torch.tensor(bounds, dtype=draw(st.sampled_from(INTEGERS))))
    offset = draw(st.integers(0, L - 1)) if draw(st.booleans()) else 0
    count = draw(st.integers(1, L - offset)) if draw(st.booleans()) else L - offset
    call = queries(call, offset, count).map(lambda x: laid_out(draw, x))
    generator = torch.Generator().manual_seed(1)
    dy = torch.randn(B, count, shape["H"], Dv, generator=generator)
    dy = dy[:, :1].expand_as(dy) if draw(st.booleans()) else laid_out(draw, dy)
    dlse = torch.randn(B, shape["H"], count, generator=generator) if draw(st.booleans()) else None
    wanted = [is_there and draw(st.integers(0, 3)) > 0 for is_there in call.wanted]
    return call, dy, dlse, wanted


def _decays(draw: st.DrawFn, like: Tensor) -> Tensor:
    """From nearly none to far past every exponent, some tokens forgetting all before them."""
    decay = like * 10.0 ** draw(st.integers(-3, 3))
    for token in draw(st.lists(st.integers(0, like.shape[1] - 1), max_size=3)):
        decay[:, token] = draw(st.sampled_from((-math.inf, -1e3, 0.0)))
    return decay


def check_call(call: Call, dy: Tensor, dlse: Tensor | None, wanted: list[bool]) -> None:
    """A random call's results, by the bounds of fp32 as far as its numbers allow.

    Scores of size s are off by s 2^-24; a row may nearly vanish, and so may gradients, where every
    token sees itself alone: then ``sum(dy * v)``, of size sqrt(Dv), cancels."""
    names = [name for name, is_wanted in zip(Call._fields, wanted) if is_wanted]
    y, lse = torch.ops.sisa.attention(*call)
    grads = torch.ops.sisa.attention_backward(dy, dlse, y, lse, *call, wanted)
    assert all(x.is_contiguous() for x in (y, lse, *grads))
    found = Results(y, lse, dict(zip(names, grads, strict=True)))
    right = exactly(call, dy, dlse)
    attended = right.lse.isfinite()
    assert torch.equal(lse.isneginf(), ~attended)
    lse, lse_ref = lse[attended], right.lse[attended]
    assert ((lse.double() - lse_ref).abs() <= 2e-6 * (1 + lse_ref.abs())).all()
    rows = attended.transpose(1, 2)
    assert not y[~rows].any()
    stretch = max([1.0, *(lse_ref.abs() / 8).tolist()])
    error, typical = (y[rows] - right.y[rows]).norm(dim=-1), right.y[rows].square().mean().sqrt()
    assert (error <= stretch * WORST_ROW * typical * math.sqrt(y.shape[3])).all()
    assert relative(y[rows], right.y[rows]) <= stretch * Y
    for name, grad in found.grads.items():
        exact = right.grads[name]
        assert grad.dtype == getattr(call, name).dtype
        size = right.lam_sizes.norm() * LAM / GRADIENT if name == "lam" else exact.norm()
        rounding = 0.0 if grad.dtype == FP32 else 1.5 * (exact.to(grad.dtype) - exact).norm()
        parts = call.c if name == "lam" else grad
        floor = 3e-7 * math.sqrt(y.shape[3] * parts.numel())
        assert (grad - exact).norm() <= stretch * (GRADIENT * size + floor) + rounding, name


def any_call(test: Callable) -> Callable:
    """``test(drawn=(call, dy, dlse, wanted))`` of 60 random calls, or a night's."""
    random = settings(
        max_examples=2000 if NIGHTLY else 60,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    return random(given(drawn=calls())(test))
