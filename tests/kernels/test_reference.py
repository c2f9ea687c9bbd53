"""The oracle: its gradient by finite differences, and Eq. 2 by a loop of no shared code."""

import math

import pytest
import torch

import sisa_kernels as sk
from tests.support.problems import problem


def by_hand(q, k, v, b, c, log_decay, theta, lam, clamped):
    """Eq. 2, one score at a time, with complex numbers for the rotations."""
    B, L, H, Dh = q.shape
    y = torch.zeros(B, L, H, v.shape[3], dtype=torch.float64)
    for n in range(B):
        for h in range(H):
            j_head = h * k.shape[2] // H
            g = log_decay[n, :, j_head].cumsum(0)
            phase = theta[n, :, j_head].cumsum(0)
            turn = torch.polar(torch.ones_like(phase), phase)
            cc = torch.view_as_complex(c[n, :, h].reshape(L, -1, 2)) * turn
            bb = torch.view_as_complex(b[n, :, j_head].reshape(L, -1, 2)) * turn
            if clamped:
                g = (g - (g.max() + g.min()) / 2).clamp(-11, 11)
            for i in range(L):
                scores = [
                    q[n, i, h] @ k[n, j, j_head] / math.sqrt(Dh)
                    + lam[h] * torch.exp(g[i] - g[j]) * (cc[i].conj() * bb[j]).real.sum()
                    for j in range(i + 1)
                ]
                y[n, i, h] = torch.stack(scores).softmax(0) @ v[n, : i + 1, j_head]
    return y


@pytest.mark.parametrize("mode", ["exact", "clamped"])
@pytest.mark.parametrize("decay", [-5.0, 2.0])
def test_oracle_is_equation_2(mode, decay):
    inputs, _ = problem(B=2, L=33, H=4, G=2, Dh=4, Ds=6, Dv=5, decay=decay, dtype=torch.float64)
    inputs = {name: x.detach() for name, x in inputs.items()}
    expected = by_hand(**inputs, clamped=mode == "clamped")
    torch.testing.assert_close(
        sk.reference.sisa_attention(**inputs, mode=mode), expected, rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize(("mode", "decay"), [("exact", 0.0), ("clamped", 0.0), ("clamped", 9.0)])
def test_oracle_gradcheck(mode, decay):
    """At +9, g falls by more than 40: the clamp binds."""
    inputs, _ = problem(L=6, H=2, G=1, Dh=4, Ds=4, Dv=3, decay=decay, dtype=torch.float64)
    cos, sin = torch.rand(2, 6, 2, dtype=torch.float64)

    def function(*args):
        return sk.reference.sisa_attention(*args, rotary=(cos, sin), mode=mode)

    assert torch.autograd.gradcheck(function, tuple(inputs.values()))


def test_oracle_restarts_at_documents():
    inputs, _ = problem(L=30, decay=-1.0, dtype=torch.float64)
    inputs = {name: x.detach() for name, x in inputs.items()}
    packed = sk.reference.sisa_attention(
        **inputs, cu_seqlens=torch.tensor([0, 11, 12, 30], dtype=torch.int32)
    )
    for lo, hi in ((0, 11), (11, 12), (12, 30)):
        alone = {name: x if name == "lam" else x[:, lo:hi] for name, x in inputs.items()}
        torch.testing.assert_close(
            packed[:, lo:hi], sk.reference.sisa_attention(**alone), rtol=0, atol=1e-14
        )
