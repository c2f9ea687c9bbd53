"""FoX and ALiBi: the published score, initial gates, lengths beyond training, learning."""

import math

import pytest
import torch
import torch.nn.functional as F

import sisa_kernels as sk
import sisa_model as sm
from sisa_model.models.context import Context
from tests.support.models import tokens

RIVALS = ["fox-tiny", "alibi-tiny"]


def tiny(preset, **overrides):
    torch.manual_seed(0)
    return sm.build(preset, **{"n_layers": 1, "d_model": 48, "n_heads": 3, **overrides})


@pytest.mark.parametrize("n_kv_heads", [3, 1])
@pytest.mark.parametrize("preset", RIVALS)
def test_the_layer_is_the_published_score(preset, n_kv_heads):
    """Softmax over q.k / sqrt(E) plus a dense bias: sums of log gates, or slope times distance."""
    attn = tiny(preset, n_kv_heads=n_kv_heads).double().layers[0].attn
    if preset == "fox-tiny":
        torch.nn.init.normal_(attn.forget_bias)
    x = torch.randn(2, 30, 48, dtype=torch.float64)
    w = {name: getattr(attn.proj, name).weight for name in attn.proj.sizes}
    q, k, v = (
        (x @ w[name].T).unflatten(-1, (-1, 16)).transpose(1, 2) for name in ("W_Q", "W_K", "W_V")
    )
    k, v = (part.repeat_interleave(3 // n_kv_heads, 1) for part in (k, v))
    if preset == "fox-tiny":
        log_gate = torch.sigmoid(x @ w["W_F"].T + attn.forget_bias).log().mT
        bias = torch.stack(
            [F.pad(log_gate[..., j + 1 :].cumsum(-1), (j + 1, 0)) for j in range(30)], -1
        )
    else:
        place = torch.arange(30.0)
        bias = -torch.tensor([2.0**-4, 2.0**-8, 2.0**-2])[:, None, None] * (place[:, None] - place)
    score = (q @ k.mT / math.sqrt(16) + bias).masked_fill(
        torch.ones(30, 30).triu(1).bool(), -torch.inf
    )
    expected = attn.W_O((score.softmax(-1) @ v).transpose(1, 2).flatten(2))
    # Gates are fp32.
    torch.testing.assert_close(attn(x, Context(None)), expected, rtol=1e-5, atol=1e-7)


def test_gates_begin_at_a_half_and_their_bias_counts(monkeypatch):
    seen = []

    def spy(q, k, v, log_forget, **kwargs):
        seen.append(log_forget)
        return real(q, k, v, log_forget, **kwargs)

    real = sk.forgetting_attention
    monkeypatch.setattr(sk, "forgetting_attention", spy)
    model = tiny("fox-tiny", init_std=1e-6)
    before = model(tokens())
    assert seen[0].dtype == torch.float32
    torch.testing.assert_close(seen[0], torch.full((2, 40, 3), math.log(0.5)), rtol=1e-4, atol=1e-4)
    torch.nn.init.constant_(model.layers[0].attn.forget_bias, 5.0)
    assert not torch.equal(model(tokens()), before)


@pytest.mark.parametrize("preset", RIVALS)
def test_lengths_beyond_training(tmp_path, preset):
    """A saved model takes longer sequences, whose beginning gives what it gave before."""
    model = tiny(preset, max_seq_len=64)
    sm.save(model, tmp_path)
    longer, ids = sm.load(tmp_path, max_seq_len=600), tokens(1, 600)
    with pytest.raises(ValueError, match="1 to 64"):
        model(ids)
    logits = longer(ids)
    assert logits.isfinite().all()
    torch.testing.assert_close(logits[:, :64], model(ids[:, :64]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("preset", RIVALS)
def test_order_is_seen_without_rope(preset):
    """Two tokens exchanged change the last token's logits, as without a bias they would not."""
    model, ids = tiny(preset), tokens(1, 10)
    exchanged = ids.clone()
    exchanged[0, [2, 6]] = ids[0, [6, 2]]
    assert (model(ids)[0, -1] - model(exchanged)[0, -1]).abs().max() > 1e-3


@pytest.mark.parametrize("preset", RIVALS)
def test_every_parameter_learns(preset):
    """Ten steps lower a batch's loss, also under bf16 autocast; each parameter has a gradient."""
    model, ids = tiny(preset), tokens(4, 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(10):
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(ids[:, :-1]).float().flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.any() for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.2
