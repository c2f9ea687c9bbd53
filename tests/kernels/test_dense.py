"""Dense scores, as chunked paths take them where no stock flash kernel serves, on the CPU."""

import pytest
import torch

import sisa_kernels as sk
from sisa_kernels.distributed.local import Chunked
from sisa_kernels.forgetting import StockPieces
from sisa_kernels.inputs import Operands
from sisa_kernels.paths import dense
from sisa_kernels.testing import forgetting_problem
from tests.support.problems import problem

BOUNDS = torch.tensor([0, 30, 30, 90], dtype=torch.int32)


def rank_operands(kind):
    """One rank's operands in fp64, and what attends within its pieces."""
    shape = {"L": 100, "H": 4, "G": 2, "Dh": 16, "decay": 0.0, "dtype": torch.float64}
    if kind == "sisa":
        inputs, dy = problem(**shape, Ds=8)
    else:
        inputs, dy = forgetting_problem(**shape)
        inputs["log_decay"] = inputs.pop("log_forget")
    if kind == "plain":
        del inputs["log_decay"]
    x = Operands(**{name: t.detach() for name, t in inputs.items()})
    return x, dy, (Chunked if kind == "sisa" else StockPieces)(BOUNDS, 100)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", ["sisa", "fox", "plain"])
def test_a_ranks_share_of_a_wider_softmax_is_the_flash_kernels(monkeypatch, kind, masked):
    """Its log-sum-exp is of the scores themselves, its gradients are those of these keys alone."""
    x, dy, pieces = rank_operands(kind)
    generator = torch.Generator().manual_seed(0)

    def noise(like):
        return torch.randn(like.shape, generator=generator, dtype=like.dtype)

    own = pieces.forward(x)
    merged = own[0] + noise(own[0]), torch.logaddexp(own[1], noise(own[1]))
    wanted = pieces.backward(x, dy, own, merged)
    monkeypatch.setattr(dense, "has_flash", lambda device: False)
    monkeypatch.setattr(dense, "ROWS", 32)
    if masked:
        monkeypatch.setattr(dense, "apart", lambda bounds, length: [(slice(0, length), bounds)])
    torch.testing.assert_close(pieces.forward(x), own, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(pieces.backward(x, dy, own, merged), wanted, rtol=1e-11, atol=1e-11)


def test_no_weight_of_the_term_has_its_gradient(monkeypatch):
    """At lam = 0 nothing is divided by it."""
    found = []
    for flash in (True, False):
        monkeypatch.setattr(dense, "has_flash", lambda device, flash=flash: flash)
        inputs, dy = problem(L=50, lam=0.0, dtype=torch.float64)
        y = sk.sisa_attention(**inputs, backend="chunked")
        found.append(torch.autograd.grad(y, list(inputs.values()), dy))
    wanted, dense_found = found
    torch.testing.assert_close(dense_found, wanted, rtol=1e-10, atol=1e-10)
    assert dense_found[-1].all()
