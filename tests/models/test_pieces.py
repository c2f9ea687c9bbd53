"""Mamba's sequences cut over processes: values and gradients are those of one process."""

import pytest
import torch

import sisa_kernels as sk
from sisa_kernels.testing import relative
from sisa_model.models.config import ModelConfig
from sisa_model.models.context import Context
from sisa_model.models.mamba import Mamba2, Mamba3
from tests.support.ranks import spawned

LENGTH = 203
LAYOUTS = {
    "contiguous": sk.SequenceLayout.contiguous([50, 60, 43, 50]),
    "balanced": sk.SequenceLayout.balanced(LENGTH, 4),
    "shorter than the convolution": sk.SequenceLayout.contiguous([1, 2, 0, 200]),
}
DOCUMENTS = {"one": None, "packed": [0, 30, 31, 33, 104, 104, 160, 190]}


@pytest.fixture(scope="module")
def four():
    """Four ranks."""
    with spawned(4) as ranks:
        yield ranks


def mixer(kind):
    """A mixer in fp64 of random parameters, whose states live for many tokens."""
    torch.manual_seed(0)
    sizes = {"d_model": 32, "n_heads": 2, "n_layers": 1, "vocab_size": 9, "max_seq_len": 9}
    family = "mamba2" if kind is Mamba2 else "mamba3"
    module = kind(ModelConfig(family=family, mamba_state=12, **sizes))
    module.reset_parameters()
    with torch.no_grad():
        for p in module.parameters():
            if p.ndim == 2:
                p.zero_()
            p += 0.3 * torch.randn_like(p)
        module.dt_bias -= 2
    return module.double()


def run(module, x, dy, context):
    """y, and the gradients of x and of every parameter by name."""
    x = x.clone().requires_grad_()
    y = module(x, context)
    inputs = {"x": x} | dict(module.named_parameters())
    # Without a token no parameter counts.
    grads = torch.autograd.grad(y, list(inputs.values()), dy, materialize_grads=True)
    return y.detach(), dict(zip(inputs, grads))


def of_rank(rank, group, module, x, dy, layout, bounds):
    rotary = torch.empty(0), torch.empty(0)
    context = Context(rotary, bounds, group=group, layout=layout)
    return run(module, layout.shard(x, rank), layout.shard(dy, rank), context)


@pytest.mark.parametrize("kind", [Mamba2, Mamba3])
@pytest.mark.parametrize("documents", DOCUMENTS.values(), ids=DOCUMENTS.keys())
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_states_pass_from_piece_to_piece(four, kind, layout, documents):
    module = mixer(kind)
    x, dy = (torch.randn(1, LENGTH, 32, dtype=torch.float64) for _ in range(2))
    bounds = None if documents is None else torch.tensor(documents)
    whole = Context((torch.empty(0), torch.empty(0)), bounds)
    right_y, right = run(module, x, dy, whole)
    found = four.run(of_rank, module, x, dy, layout, bounds)
    assert relative(layout.unshard([y for y, _ in found]), right_y) < 1e-13
    for name, grad in right.items():
        parts = [grads[name] for _, grads in found]
        got = layout.unshard(parts) if name == "x" else torch.stack(parts).sum(0)
        # dt_bias, A_log and D are fp32 in any module.
        assert relative(got, grad.double()) < (1e-12 if grad.dtype == torch.float64 else 1e-6), name


@pytest.mark.parametrize("kind", [Mamba2, Mamba3])
def test_without_the_state_of_earlier_pieces_it_would_be_another(kind):
    """The problem above tells: what comes from over 40 tokens back is no rounding."""
    module = mixer(kind)
    x = torch.randn(1, LENGTH, 32, dtype=torch.float64)
    context = Context((torch.empty(0), torch.empty(0)))
    y = module(x, context)[:, 150:]
    assert relative(module(x[:, 110:], context)[:, 40:], y) > 1e-4
