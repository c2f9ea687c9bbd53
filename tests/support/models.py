"""Models and tokens for tests, and what every model is held to."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import sisa_model as sm

MATRIX_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")


class Products(TorchDispatchMode):
    """Matrix products that run within it."""

    def __init__(self) -> None:
        super().__init__()
        self.pitches: list[tuple[str, list[int]]] = []
        """Of each its shapes in words, and by how many bytes the rows of what it reads and writes
        lie apart."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in MATRIX_PRODUCTS:
            matrices = [x for x in (*args, result) if isinstance(x, torch.Tensor) and x.ndim > 1]
            about = " ".join(str(list(x.shape)) for x in matrices)
            self.pitches.append((about, [_pitch(x) for x in matrices]))
        return result

    def odd(self, multiple: int) -> list[str]:
        """Those with rows that begin at no multiple of so many bytes."""
        return [about for about, found in self.pitches if any(x % multiple for x in found)]


def _pitch(x: torch.Tensor) -> int:
    """Bytes from row to row, or from column to column, whichever do not lie side by side."""
    return max(x.stride()[-2:]) * x.element_size()


def tokens(B=2, L=40, vocab=257, seed=1):
    """Random token ids [B, L]."""
    return torch.randint(vocab, (B, L), generator=torch.Generator().manual_seed(seed))


def tiny(preset="sisa-tiny-ds16", seed=0, **overrides):
    """The model of a preset, its weights drawn from ``seed``."""
    torch.manual_seed(seed)
    return sm.build(preset, **overrides)


def check_refused(preset, overrides, message):
    """A model of ``preset`` cannot be built with ``overrides``, and the error says ``message``."""
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the message is checked below
        sm.build(preset, **overrides)
    assert message in str(error.value)


def check_compiles(model, ids):
    """torch.compile(fullgraph=True) gives the eager loss and gradients."""
    torch._dynamo.reset()
    results = []
    for forward in (model, torch.compile(model, fullgraph=True)):
        model.zero_grad()
        loss = forward(ids).logsumexp(-1).mean()
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    torch.testing.assert_close(results[0], results[1], rtol=1e-3, atol=1e-5)
