"""What tests share: problems and their oracles, run folders, checks of models."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).parent.parent.parent


def tokens(B=2, L=40, vocab=257, seed=1):
    """Random token ids [B, L]."""
    return torch.randint(vocab, (B, L), generator=torch.Generator().manual_seed(seed))


def run_folder(path, preset, train, val, evals=(), **settings):
    """A run folder as `sisa train` leaves one, of these rows, without the training."""
    from sisa_model.runs.config import TrainConfig, resolve

    path.mkdir(parents=True)
    config = resolve(TrainConfig(preset=preset, **settings))
    record = {
        "train": dataclasses.asdict(config),
        "corpus": {"sha256": ""},
        "versions": {"commit": "0123456789ab"},
    }
    (path / "run.json").write_text(json.dumps(record, default=str))
    for name, rows in (("train", train), ("val", val), ("eval", evals)):
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


NAMES = ("q", "k", "v", "b", "c", "log_decay", "theta", "lam")


def problem(
    B=1,
    L=257,
    H=2,
    G=None,
    Dh=64,
    Ds=16,
    Dv=None,
    decay=-5.0,
    theta=0.3,
    dtype=torch.float32,
    seed=0,
):
    """Random inputs of sisa_attention by name, and dL/dy; log_decay = -softplus(decay + noise)."""
    G, Dv = G or H, Dv or Dh
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    narrow = torch.float64 if dtype == torch.float64 else torch.float32
    inputs = {
        "q": normal(B, L, H, Dh).to(dtype),
        "k": normal(B, L, G, Dh).to(dtype),
        "v": normal(B, L, G, Dv).to(dtype),
        "b": normal(B, L, G, Ds).to(dtype),
        "c": normal(B, L, H, Ds).to(dtype),
        "log_decay": -F.softplus(0.5 * normal(B, L, G) + decay).to(narrow),
        "theta": theta * normal(B, L, G, Ds // 2).to(narrow),
        "lam": F.softplus(0.3 * normal(H) - 1).to(narrow),
    }
    return {name: x.requires_grad_() for name, x in inputs.items()}, normal(B, L, H, Dv).to(dtype)


def value_and_grads(function, inputs, dy, **kwargs):
    """y and the gradients by name of sum(y * dy) for every input, from fresh leaves."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    y = function(**leaves, **kwargs)
    grads = torch.autograd.grad(y, list(leaves.values()), dy)
    return y.detach(), dict(zip(leaves, grads))


def in_fp64(inputs):
    return {name: x.detach().double() for name, x in inputs.items()}


def relative(x, oracle):
    """|x - oracle| / |oracle| over the whole tensor; absolute where the oracle vanishes."""
    scale = oracle.norm().item()
    return (x.double() - oracle).norm().item() / (scale if scale > 1e-12 else 1.0)


def worst_row(x, oracle):
    """The largest relative error of a row (last axis) of x."""
    return ((x.double() - oracle).norm(dim=-1) / oracle.norm(dim=-1)).max().item()


def gradient_errors(grads, grads_ref, inputs):
    """The relative error of each gradient by name.

    lam's is one number a head, a sum over all tokens that may nearly cancel: it is measured against
    the sum of their sizes."""
    errors = {name: relative(grads[name], grads_ref[name]) for name in grads}
    sizes = (grads_ref["c"] * inputs["c"].detach().double()).sum(3).abs().sum((0, 1)) / inputs[
        "lam"
    ].detach()
    if sizes.any():
        errors["lam"] = ((grads["lam"].double() - grads_ref["lam"]).norm() / sizes.norm()).item()
    return errors


def check_refused(preset, overrides, message):
    """A model of ``preset`` cannot be built with ``overrides``, and the error says ``message``."""
    import sisa_model as sm

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
