"""Models and tokens for tests, and what every model is held to."""

import pytest
import torch

import sisa_model as sm


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
