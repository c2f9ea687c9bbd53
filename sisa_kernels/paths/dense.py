"""Exact attention by dense scores, a fixed number of queries at a time: no value is ever read.

It runs where no stock flash kernel takes every width and returns its log-sum-exp
(:func:`has_flash`): on GPUs, for what the Triton kernels do not take. A pair's decay is formed for
the pair, its exponent <= 0, so that neither the length nor the decay asks for other chunks; packed
documents are a mask. Nothing waits for the device."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sisa_kernels.inputs import spans
from sisa_kernels.scans import pair_products, to_key_heads, to_query_heads

ROWS = 512  # queries at a time: they and their keys bound the memory


def has_flash(device: torch.device) -> bool:
    """Whether stock flash attention here takes any width and dtype and returns its log-sum-exp."""
    return device.type == "cpu"


def apart(bounds: Tensor | None, length: int) -> list[tuple[slice, Tensor | None]]:
    """Rows that are attended to on their own, and the bounds of documents that are a mask in them.

    A document alone is the cheaper, but bounds on the device are not read for it."""
    if bounds is not None and bounds.device.type != "cpu":
        return [(slice(0, length), bounds)]
    return [(rows, None) for rows in spans(bounds, length)]


class Operands(NamedTuple):
    """What the scores ``q_i.k_j / sqrt(Dh) + w_ij`` are made of; all but g in the working dtype.

    With c and b (SISA) ``w_ij = exp(g_i - g_j) c_i.b_j``, without (FoX) ``w_ij = g_i - g_j``."""

    q: Tensor
    """[B, L, H, Dh], like k with its RoPE."""
    k: Tensor
    """[B, L, G, Dh]."""
    v: Tensor
    """[B, L, G, Dv]."""
    g: Tensor
    """The running sum of the log of the decay, fp64: [B, L, G] with c and b, else [B, L, H]."""
    c: Tensor | None = None
    """lam R(Phi) c, [B, L, H, Ds]."""
    b: Tensor | None = None
    """R(Phi) b, [B, L, G, Ds]."""
    bounds: Tensor | None = None
    """Of packed documents, [documents + 1], on the device."""


class Gradients(NamedTuple):
    """dL/d(each of :class:`Operands`), and of what g and the phase are running sums of."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    dlog: Tensor
    """fp64, shaped as g."""
    term: tuple[Tensor, ...] = ()
    """With c and b (dc, db, dtheta), the last [B, L, G, Ds / 2] fp64."""


class _Documents:
    """Each token's first visible key, and which tokens are past the last document."""

    def __init__(self, x: Operands):
        L = x.q.shape[1]
        token = torch.arange(L, device=x.q.device)
        bounds = token[:1] if x.bounds is None else x.bounds.long()
        self.token = token
        self.first = bounds[torch.searchsorted(bounds, token, right=True) - 1]
        self.past = None if x.bounds is None else token >= bounds[-1]

    def hidden(self, rows: slice) -> Tensor:
        """Which keys up to its end a chunk of queries does not see, [queries, keys]."""
        query, key = self.token[rows, None], self.token[: rows.stop]
        return (key > query) | (key < self.first[rows, None])

    def filled(self, x: Tensor, value: float) -> Tensor:
        """x [..., L] with ``value`` past the last document."""
        return x if self.past is None else x.masked_fill(self.past, value)


def products(q: Tensor, k: Tensor) -> Tensor:
    """``q_i.k_j`` of q [B, n, H, W] and k [B, m, G, W]: [B, G, H / G, n, m]."""
    return torch.einsum("bigrw,bjgw->bgrij", q.unflatten(2, (k.shape[2], -1)), k)


def softmax(score: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """(out [B, n, H, Dv], log-sum-exp [B, H, n]) of scores [B, G, H / G, n, m] over v."""
    out = torch.einsum("bgrij,bjgw->bigrw", score.softmax(-1), v)
    return out.flatten(2, 3), score.logsumexp(-1).flatten(1, 2)


def softmax_backward(
    score: Tensor, v: Tensor, dout: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    """(dL/dscore, dv) of :func:`softmax`; out and lse may be of more keys than these.

    The scores' memory is taken for it."""
    by_key_head = (v.shape[2], -1)
    weight = score.sub_(lse.unflatten(1, by_key_head)[..., None]).exp_()
    delta = (dout * out).sum(-1).transpose(1, 2).unflatten(1, by_key_head)[..., None]
    dv = torch.einsum("bgrij,bigrw->bjgw", weight, dout.unflatten(2, by_key_head))
    return weight.mul_(products(dout, v).sub_(delta)), dv


def products_backward(dscore: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """(dq, dk) of :func:`products`."""
    dq = torch.einsum("bgrij,bjgw->bigrw", dscore, k).flatten(2, 3)
    return dq, torch.einsum("bgrij,bigrw->bjgw", dscore, q.unflatten(2, (k.shape[2], -1)))


def _scores(x: Operands, documents: _Documents) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Of each chunk its rows, the scores of all keys up to its end, and ``exp(g_i - g_j)``.

    Both [B, G, H / G or 1, n, m]. Without c and b the latter is ``g_i - g_j``."""
    scale = x.q.shape[3] ** -0.5
    G = x.k.shape[2]
    g = x.g.transpose(1, 2)
    for start in range(0, g.shape[2], ROWS):
        rows = slice(start, min(start + ROWS, g.shape[2]))
        keys = slice(0, rows.stop)
        hidden = documents.hidden(rows)
        score = products(x.q[:, rows], x.k[:, keys]).mul_(scale)
        # A difference in fp64: far from the start g has few digits left in fp32.
        decay = (g[..., rows, None] - g[..., None, keys]).to(score.dtype)
        decay = decay.masked_fill_(hidden, -math.inf).unflatten(1, (G, -1))
        if x.c is None or x.b is None:
            score += decay
        else:
            score += products(x.c[:, rows], x.b[:, keys]).mul_(decay.exp_())
        # Not by adding: what a hidden key has may be no number.
        score.masked_fill_(hidden, -math.inf)
        yield rows, score, decay


def attend(x: Operands) -> tuple[Tensor, Tensor]:
    """(y [B, L, H, Dv], log-sum-exp [B, H, L]); past the last document 0 and -inf."""
    B, L, H, _ = x.q.shape
    documents = _Documents(x)
    finite = x.v.isfinite()
    v = torch.where(finite, x.v, 0)  # of a later token: a weight of 0 times NaN would be NaN
    y = x.q.new_empty(B, L, H, v.shape[3])
    lse = x.q.new_empty(B, H, L)
    for rows, score, _ in _scores(x, documents):
        y[:, rows], lse[..., rows] = softmax(score, v[:, : rows.stop])
    met = F.pad((~finite).cumsum(1), (0, 0, 0, 0, 1, 0))
    lacking = met[:, 1:] > met[:, documents.first]  # from the first such token of a document on
    y.masked_fill_(to_query_heads(lacking, H), math.nan)
    if documents.past is not None:
        y.masked_fill_(documents.past[:, None, None], 0)
    return y, documents.filled(lse, -math.inf)


def attend_backward(x: Operands, dy: Tensor, y: Tensor, lse: Tensor) -> Gradients:
    """The gradients of :func:`attend`; y and lse may come from a softmax over more keys.

    Then it is these keys' share. What a token's log-decay or phase step gets is the sum over the
    pairs i >= t > j, chunk by chunk of queries: over the keys before t, less that over the queries
    before t. It begins at the oldest keys, so that rounding errors stay where they were made."""
    scale = x.q.shape[3] ** -0.5
    G = x.k.shape[2]
    documents = _Documents(x)
    lse = documents.filled(lse, math.inf)  # weights of 0
    dq, dk, dv = (torch.zeros_like(t) for t in (x.q, x.k, x.v))
    dlog = torch.zeros_like(x.g)
    term: tuple[Tensor, ...] = ()
    if x.c is not None and x.b is not None:
        turned = x.g.new_zeros(*x.g.shape, x.b.shape[3] // 2)
        term = torch.zeros_like(x.c), torch.zeros_like(x.b), turned
    for rows, score, decay in _scores(x, documents):
        keys = slice(0, rows.stop)
        softmax_of = dy[:, rows], y[:, rows], lse[..., rows]
        dscore, dv_keys = softmax_backward(score, x.v[:, keys], *softmax_of)
        dv[:, keys] += dv_keys
        dq_rows, dk_keys = products_backward(dscore, x.q[:, rows], x.k[:, keys])
        dq[:, rows] = dq_rows * scale
        dk[:, keys] += dk_keys * scale
        first = documents.first[keys]
        if x.c is None or x.b is None:
            by_head = dscore.flatten(1, 2)
            of_rows, of_keys = (by_head.sum(n).transpose(1, 2).double() for n in (3, 2))
            dlog[:, keys] += _between(of_rows, of_keys, rows, first)
            continue
        dc, db, dtheta = term
        # The pairs i = j move neither; in the sums they would be most of it, and of its rounding.
        diagonal = dscore.mul_(decay).diagonal(rows.start, -2, -1)
        alone = diagonal.clone().permute(0, 3, 1, 2)[..., None]  # [B, n, G, H / G, 1]
        diagonal.zero_()
        c, b = x.c[:, rows], x.b[:, keys]
        dc_rows, db_keys = products_backward(dscore, c, b)
        of_rows, turned_rows = (to_key_heads(t, G) for t in pair_products(dc_rows, c))
        of_keys, turned_keys = pair_products(db_keys, b)
        dlog[:, keys] += _between(of_rows, of_keys, rows, first)
        dtheta[:, keys] += _between(turned_rows, -turned_keys, rows, first)
        dc[:, rows] = dc_rows + (alone * x.b[:, rows, :, None]).flatten(2, 3)
        db[:, keys] += db_keys
        db[:, rows] += (alone * c.unflatten(2, (G, -1))).sum(3)
    return Gradients(dq, dk, dv, dlog, term)


def _between(of_rows: Tensor, of_keys: Tensor, rows: slice, first: Tensor) -> Tensor:
    """For each token t the sum over pairs i >= t > j of a document, i among ``rows``.

    Given those over the pairs of each query [B, rows, ...] and of each key [B, keys, ...]."""
    before = of_keys.clone()
    before[:, rows] -= of_rows
    before = F.pad(before.cumsum(1), (0,) * 2 * (before.ndim - 2) + (1, 0))
    return before[:, :-1] - before[:, first]
