"""The linear recurrence under Mamba-2 and Mamba-3, by chunks: quadratic inside a chunk, a carried
state between chunks.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64


def decayed_scan(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """What the state before t's own term answers: ``y_t = q_t . exp(log_decay_t) h_{t-1}``, and the
    state that is left.

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
        where Mamba-2 and Mamba-3 differ.
    """
    B, L, H, P = v.shape
    G = q.shape[2]
    R = H // G
    chunk = min(chunk, L)
    count = -(-L // chunk)

    def cut(x: Tensor) -> Tensor:
        """[B, L, heads, channels] -> [B, count, heads, chunk, channels], the last chunk filled up
        with zeros.
        """
        return (
            F.pad(x, (0, 0, 0, 0, 0, count * chunk - L))
            .unflatten(1, (count, chunk))
            .transpose(2, 3)
        )

    q, k = cut(q), cut(k)
    v = cut(v).unflatten(2, (G, R))
    # The differences of the running sum are what counts: in fp64 they keep the bits that fp32 would
    # lose far from the start.
    g = (
        cut(log_decay[..., None].double())
        .flatten(3)
        .transpose(1, 2)
        .flatten(2)
        .cumsum(2)
        .view(B, G, R, count, chunk)
        .movedim(3, 1)
    )
    end = g[..., -1:]
    before = F.pad(end[:, :-1], (0, 0, 0, 0, 0, 0, 1, 0))

    def decay(exponent: Tensor) -> Tensor:
        return exponent.to(v.dtype).exp()

    past = torch.ones(chunk, chunk, dtype=torch.bool, device=v.device).tril(-1)
    weight = decay((g[..., :, None] - g[..., None, :]).masked_fill(~past, -torch.inf))
    scores = q @ k.transpose(-1, -2)
    y = (scores[:, :, :, None] * weight) @ v

    # The heads of a group side by side: one product with the group's keys, one with its queries.
    def beside(x: Tensor) -> Tensor:
        return x.transpose(-3, -2).flatten(-2)

    added = k.transpose(-1, -2) @ beside(v * decay(end - g)[..., None])
    carry = decay(end - before).repeat_interleave(P, -1).flatten(3)[..., None, :]
    state, states = beside(state.unflatten(1, (G, R))), []
    for c in range(count):
        states.append(state)
        state = state * carry[:, c] + added[:, c]
    carried = (q @ torch.stack(states, 1)).unflatten(-1, (R, P)).transpose(3, 4)
    y = y + carried * decay(g - before)[..., None]
    state = state.unflatten(-1, (R, P)).transpose(2, 3).flatten(1, 2)
    return y.flatten(2, 3).transpose(2, 3).flatten(1, 2)[:, :L], state
