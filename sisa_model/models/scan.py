"""The recurrence under both Mambas by chunks: quadratic inside, a state carried between them."""

import torch
import torch.nn.functional as F
from torch import Tensor

from sisa_kernels.ops import matmul

CHUNK = 64


def decayed_scan(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """What the state before each token answers: ``y_t = q_t . exp(log_decay_t) h_{t-1}``.

    With h_{-1} = 0, ``y_t = sum_{s<t} exp(g_t - g_s) (q_t.k_s) v_s``, g the running sum of
    log_decay.

    Args:
        q, k: [B, L, G, N], each group's serving H / G consecutive heads; fp32 or fp64.
        v: [B, L, H, P].
        log_decay: [B, L, H] <= 0, the decay from t - 1 to t: ``h_t = exp(log_decay_t) h_{t-1} + k_t
            v_t^T``.
        state: h_{-1} [B, H, N, P], what the tokens before these left; zeros where there are none.
        chunk: tokens a chunk; memory grows as L * chunk. Changes the speed, not the result beyond
            rounding.

    Returns:
        y [B, L, H, P] and h_{L-1} [B, H, N, P]. A token's own term in y is left to the caller,
        where Mamba-2 and Mamba-3 differ."""
    L, H = v.shape[1:3]
    G = q.shape[2]
    chunk = min(chunk, L)
    q = _cut(q, chunk)  # [B, count, G, chunk, N]
    k = _cut(k, chunk)
    v = _cut(v, chunk).unflatten(2, (G, H // G))  # [B, count, G, R, chunk, P]
    g = _running_sum(log_decay, chunk).unflatten(2, (G, H // G))  # [B, count, G, R, chunk]
    end = g[..., -1:]
    within = _within_chunks(q, k, v, g)
    carried, state = _across_chunks(q, k, v, g, end, state.unflatten(1, (G, H // G)))
    y = (within + carried).flatten(2, 3)  # [B, count, H, chunk, P]
    y = y.transpose(2, 3).flatten(1, 2)  # [B, count * chunk, H, P]
    return y[:, :L], state.flatten(1, 2)


def _cut(x: Tensor, chunk: int) -> Tensor:
    """[B, L, heads, channels] -> [B, count, heads, chunk, channels], filled up with zeros."""
    missing = -x.shape[1] % chunk
    whole = F.pad(x, (0, 0, 0, 0, 0, missing))
    return whole.unflatten(1, (-1, chunk)).transpose(2, 3)


def _running_sum(log_decay: Tensor, chunk: int) -> Tensor:
    """The running sum of log_decay [B, L, H] as [B, count, H, chunk], in fp64.

    Its differences are what counts: fp32 would lose their bits far from the start."""
    chunks = _cut(log_decay[..., None].double(), chunk).squeeze(-1)  # [B, count, H, chunk]
    tokens = chunks.transpose(1, 2).flatten(2)  # [B, H, count * chunk]
    return tokens.cumsum(2).unflatten(2, (-1, chunk)).transpose(1, 2)


def _within_chunks(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """What each token reads of the earlier ones in its chunk, [B, count, G, R, chunk, P]."""
    chunk = g.shape[-1]
    past = torch.ones(chunk, chunk, dtype=torch.bool, device=v.device).tril(-1)
    decay_between = g[..., :, None] - g[..., None, :]
    weight = decay_between.masked_fill(~past, -torch.inf).to(v.dtype).exp()
    scores = matmul(q, k.mT)  # [B, count, G, chunk, chunk]
    return matmul(scores[:, :, :, None] * weight, v)


def _across_chunks(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, end: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """What each token reads of the chunks before its own, and the state behind the last.

    That is [B, count, G, R, chunk, P]; ``end`` is g at each chunk's end [..., 1], ``state`` [B, G,
    R, N, P]."""
    R, P = state.shape[2], state.shape[4]
    before = F.pad(end[:, :-1], (0, 0, 0, 0, 0, 0, 1, 0))  # that of the chunk before

    def decay(exponent: Tensor) -> Tensor:
        return exponent.to(v.dtype).exp()

    # A group's heads side by side: one product with the group's keys, one with its queries.
    def beside(x: Tensor) -> Tensor:
        return x.transpose(-3, -2).flatten(-2)

    added = matmul(k.mT, beside(v * decay(end - g)[..., None]))
    carry = decay(end - before).repeat_interleave(P, -1).flatten(3)[..., None, :]
    running = beside(state)  # [B, G, N, R * P]
    states = []
    for n in range(g.shape[1]):
        states.append(running)
        running = running * carry[:, n] + added[:, n]
    read = matmul(q, torch.stack(states, 1))  # [B, count, G, chunk, R * P]
    read = read.unflatten(-1, (R, P)).transpose(3, 4)
    last = running.unflatten(-1, (R, P)).transpose(2, 3)
    return read * decay(g - before)[..., None], last
