"""The authors' recipe: schedule, AdamW, first weights, precision, against their formulas."""

import json
import math
import re
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

import sisa_model as sm
from sisa_model.models.context import rotary_tables
from sisa_model.models.language_model import LanguageModel
from sisa_model.models.mamba import MambaMixer
from sisa_model.models.presets import preset_config
from sisa_model.runs.config import TrainConfig, resolve
from sisa_model.runs.folder import resumed
from sisa_model.runs.log import read_rows
from sisa_model.training.optimizer import learning_rate, make_optimizer
from sisa_model.training.trainer import train
from tests.support.models import tiny, tokens

SMALL = {
    "steps": 6,
    "seq_len": 64,
    "batch_size": 4,
    "micro_batch_size": 2,
    "warmup_steps": 2,
    "val_every": 6,
    "val_blocks": 4,
    "sample_tokens": 0,
}


def weights(folder):
    return load_file(folder / "final" / "model.safetensors")


# ---- What the recipe says ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "mode", "micro", "warmup"),
    [
        ("sisa-152m-ds16", "clamped", 2, 500),
        ("transformer-50m", "exact", 4, 500),
        ("sisa-152m-ds32-lambda0", "exact", 2, 500),
        ("mamba3-152m", "exact", 2, 500),
        ("hybrid-sisa-152m", "clamped", 2, 500),
        ("hybrid-transformer-152m", "exact", 2, 500),
        ("sisa-369m-ds64", "clamped", 4, 2000),
    ],
)
def test_the_recipe_of_each_scale(preset, mode, micro, warmup):
    c = resolve(TrainConfig(preset=preset, recipe="paper"))
    assert (c.precision, c.mode, c.micro_batch_size) == ("bf16-pure", mode, micro)
    assert (c.steps, c.batch_size * c.seq_len, c.warmup_steps) == (9536, 524_288, warmup)
    assert (c.beta1, c.beta2, c.weight_decay, c.clip) == (0.9, 0.95, 0.1, 1.0)
    config = c.model_config(50277)
    assert (config.weights, config.mode) == ("bf16", mode)
    ours = resolve(TrainConfig(preset=preset))
    assert (ours.recipe, ours.precision, ours.mode) == ("ours", "auto", "exact")
    assert ours.model_config(50277).weights == "fp32"


def test_flags_that_are_given_win_over_the_recipe():
    own = {"precision": "fp32", "mode": "exact", "micro_batch_size": 8, "warmup_steps": 100}
    c = resolve(TrainConfig(preset="sisa-369m-ds32", recipe="paper", **own))
    assert {name: getattr(c, name) for name in own} == own
    assert c.recipe == "paper"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipe": "theirs"}, "recipe must be ours or paper, got 'theirs'"),
        (
            {"precision": "bf16-pure", "parallel": "fsdp"},
            "parallel must be ddp or auto with precision bf16-pure, got 'fsdp'",
        ),
        ({"precision": "bf16_pure"}, "precision must be one of auto, fp32, bf16, bf16-pure"),
    ],
)
def test_what_cannot_be_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        resolve(TrainConfig(**changes))


# ---- Schedule and optimizer ----------------------------------------------------------------------


def authors_optimizer(model, lr, steps, warmup):
    """AdamW and LambdaLR by their documentation, with the authors' groups and factor."""
    named = dict(model.named_parameters())
    lambdas = [p for name, p in named.items() if name.endswith("lambda_raw")]
    rest = [p for name, p in named.items() if not name.endswith("lambda_raw")]
    groups = [{"params": rest, "lr": lr, "weight_decay": 0.1}]
    if lambdas:
        groups.append({"params": lambdas, "lr": lr / 10, "weight_decay": 0.0})
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))

    def factor(step):
        if step < warmup:
            return step / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


@pytest.mark.parametrize("preset", ["sisa-tiny-ds16", "mamba2-tiny", "mamba3-tiny"])
def test_steps_have_the_authors_bits(preset):
    """The same gradients: after each step, warm-up and cosine, every parameter bit for bit."""
    config = resolve(TrainConfig(preset=preset, recipe="paper", steps=8, warmup_steps=3, lr=1e-2))
    ours, theirs = (tiny(preset, weights="bf16") for _ in range(2))
    optimizer = make_optimizer(ours, config)
    reference, scheduler = authors_optimizer(theirs, 1e-2, 8, 3)
    begun = {name: p.clone() for name, p in ours.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    for step in range(8):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config) * group["lr_scale"]
        for one, other in zip(ours.parameters(), theirs.parameters()):
            one.grad = torch.randn(one.shape, generator=generator).to(one.dtype)
            other.grad = one.grad.clone()
        optimizer.step()
        reference.step()
        scheduler.step()
        for (name, one), other in zip(ours.named_parameters(), theirs.parameters()):
            assert torch.equal(one, other), (step, name)
            assert step > 0 or torch.equal(one, begun[name]), "the first rate is 0"
    moved = [name for name, p in ours.named_parameters() if not torch.equal(p, begun[name])]
    assert "embed.weight" in moved


def test_the_first_rate_of_ours_is_a_steps_worth():
    for recipe, expected in (("paper", [0.0, 0.5, 1.0]), ("ours", [0.25, 0.75, 1.0])):
        c = resolve(TrainConfig(recipe=recipe, steps=100, warmup_steps=4, lr=1.0))
        assert [learning_rate(step, c) for step in (0, 2, 4)] == expected


@pytest.mark.parametrize("preset", ["mamba2-tiny", "mamba3-tiny", "hybrid-sisa-tiny"])
def test_mambas_steps_and_rates_decay_in_the_recipe_alone(preset):
    model = tiny(preset)
    own = {
        id(getattr(module, name))
        for module in model.modules()
        if isinstance(module, MambaMixer)
        for name in module.no_weight_decay
    }
    for recipe, decay in (("ours", 0.0), ("paper", 0.1)):
        optimizer = make_optimizer(model, resolve(TrainConfig(preset=preset, recipe=recipe)))
        found = {
            id(p): group["weight_decay"]
            for group in optimizer.param_groups
            for p in group["params"]
        }
        assert len(found) == len(list(model.parameters()))
        assert {found[key] for key in own} == {decay}


# ---- Pure bf16 -----------------------------------------------------------------------------------


def test_the_decays_bias_does_not_move_in_bf16():
    """-5 +- the rate of the paper rounds to -5 in bf16, and 1 - rate to 1; in fp32 both move."""
    for name, moves in (("bf16-pure", False), ("fp32", True)):
        config = resolve(TrainConfig(recipe="paper", precision=name, steps=8, warmup_steps=1))
        model = tiny(weights=config.model_config(257).weights)
        optimizer = make_optimizer(model, config)
        for _ in range(2):
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            for group in optimizer.param_groups:
                group["lr"] = 6e-4
            optimizer.step()
        bias = model.layers[0].attn.decay_bias
        gain = model.layers[0].attn_norm.weight
        assert bool((bias != -5).any()) is moves
        assert bool((gain != 1).any()) is moves
        assert (model.layers[0].attn.lambda_raw != -1).all(), "lambda_raw is fp32"


def authors_logits(model, ids):
    """The authors' layers from the model's weights, clamped: Proposition 1 under autograd.

    In bf16 under autocast where the weights are bf16, else in fp32."""
    H, E = model.config.n_heads, model.config.head_dim
    dtype = model.embed.weight.dtype
    rates = 1.0 / 10000 ** (torch.arange(0, E, 2).float() / E)
    angles = torch.outer(torch.arange(ids.shape[1]).float(), rates)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)

    def turn(x, cos, sin):
        even, odd = x[..., 0::2], x[..., 1::2]
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)

    def norm(x, gain):
        scale = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
        return (x.float() * scale * gain.float()).to(x.dtype)

    def heads(x):
        return x.unflatten(-1, (H, -1)).transpose(1, 2)

    def attend(attn, x):
        w = {name: getattr(attn.proj, name).weight for name in attn.proj.sizes}
        q, k, v, b, c = (heads(F.linear(x, w[f"W_{name}"])) for name in ("Q", "K", "V", "B", "C"))
        logits = F.linear(x, w["W_alpha"], attn.decay_bias)
        g = -F.softplus(logits.float()).transpose(1, 2).cumsum(2)
        phase = heads(F.linear(x, w["W_theta"])).float().cumsum(2)
        middle = (g.amax(2, keepdim=True) + g.amin(2, keepdim=True)) / 2
        exponent = (g - middle).clamp(-11, 11)[..., None]
        c = turn(c.float() * exponent.exp(), phase.cos(), phase.sin()).to(dtype)
        b = turn(b.float() * (-exponent).exp(), phase.cos(), phase.sin()).to(dtype)
        s = (E**0.25 * F.softplus(attn.lambda_raw.float()).sqrt())[:, None, None]
        q, k = turn(q, cos, sin), turn(k, cos, sin)
        q, k = (torch.cat((t, u), -1).to(dtype) for t, u in ((q, s * c), (k, s * b)))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=E**-0.5)
        return F.linear(y.transpose(1, 2).flatten(2), attn.W_O.weight)

    def swiglu(ffn, x):
        gate, up = (F.linear(x, getattr(ffn.w_in, name).weight) for name in ("w_gate", "w_up"))
        return F.linear(F.silu(gate) * up, ffn.w_down.weight)

    x = model.embed.weight[ids]
    for layer in model.layers:
        x = x + attend(layer.attn, norm(x, layer.attn_norm.weight))
        x = x + swiglu(layer.ffn, norm(x, layer.ffn_norm.weight))
    return F.linear(norm(x, model.final_norm.weight), model.embed.weight)


def logits_and_grads(forward, model, ids):
    """The logits ``forward(model, ids)`` and the gradients of their cross entropy, in fp64."""
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=model.config.weights == "bf16"):
        found = forward(model, ids)
    F.cross_entropy(found[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()).backward()
    grads = {name: p.grad.double() for name, p in model.named_parameters()}
    return {"logits": found.detach().double(), **grads}


@pytest.mark.parametrize("half_life", [100, 4])
def test_a_model_in_bf16_is_the_authors(half_life):
    """Logits and gradients as near their formulas in fp32 as their own in bf16, clamp or not.

    Squared errors of a kind of parameter are summed over layers and models: b_a has few numbers."""
    ours, theirs, size = Counter(), Counter(), Counter()
    for seed in range(4):
        model = tiny(seed=seed, weights="bf16", mode="clamped")
        with torch.no_grad():
            for layer in model.layers:
                layer.attn.decay_bias.fill_(math.log(math.expm1(math.log(2) / half_life)))
        wide = tiny(mode="clamped")
        wide.load_state_dict(model.state_dict())
        ids = tokens(B=2, L=200, seed=seed)
        right = logits_and_grads(authors_logits, wide, ids)
        rounded = logits_and_grads(authors_logits, model, ids)
        found = logits_and_grads(LanguageModel.__call__, model, ids)
        for name, value in right.items():
            kind = re.sub(r"\d+", "", name)
            ours[kind] += (found[name] - value).square().sum().item()
            theirs[kind] += (rounded[name] - value).square().sum().item()
            size[kind] += value.square().sum().item()
    for kind in size:
        error, bound = (math.sqrt(x[kind] / size[kind]) for x in (ours, theirs))
        assert error <= 2 * bound, (kind, error, bound)


def test_rope_tables_are_bf16s():
    """The authors' tables, angles and all in fp32: at most one bf16 step away, and seldom."""
    model, seen = tiny(weights="bf16"), []
    model.layers[0].attn.register_forward_pre_hook(lambda _, args: seen.append(args[1].rotary))
    model(tokens(L=512))
    E = model.config.head_dim
    angles = torch.outer(
        torch.arange(512).float(), 1.0 / 10000 ** (torch.arange(0, E, 2).float() / E)
    )
    for ours, theirs in zip(seen[0], (angles.cos(), angles.sin())):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, ours.bfloat16().float())
        assert (ours - theirs.bfloat16().float()).abs().max() <= 2**-8
        assert (ours != theirs.bfloat16().float()).double().mean() < 0.01
    plain = rotary_tables(512, E, torch.device("cpu"))
    assert not torch.equal(plain[0], seen[0][0])


def test_pure_bf16_is_saved_resumed_and_loaded(corpus, tmp_path):
    pure = {**SMALL, "recipe": "paper"}
    straight = train(TrainConfig(data=(corpus,), out=tmp_path / "a", **pure)).folder
    stopped = TrainConfig(data=(corpus,), out=tmp_path / "b", stop_at=3, **pure)
    assert not train(stopped).finished
    assert resumed(TrainConfig(out=tmp_path / "b", resume=True)).recipe == "paper"
    train(TrainConfig(out=tmp_path / "b", resume=True))
    first, second = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(torch.equal(first[name], second[name]) for name in first)
    dtypes = {name: x.dtype for name, x in first.items()}
    fp32 = [name for name, dtype in dtypes.items() if dtype == torch.float32]
    assert fp32 == ["layers.0.attn.lambda_raw", "layers.1.attn.lambda_raw"]
    assert set(dtypes.values()) == {torch.float32, torch.bfloat16}

    record = json.loads((straight / "run.json").read_text())
    known = {name: record["train"][name] for name in ("recipe", "precision", "mode")}
    assert known == {"recipe": "paper", "precision": "bf16-pure", "mode": "clamped"}
    assert record["model"]["weights"] == "bf16"
    assert read_rows(straight / "train.jsonl")[0]["lr"] == 0
    for folder in (straight / "final", straight / "checkpoints" / "step-00000006"):
        loaded = sm.load(folder)
        assert {name: p.dtype for name, p in loaded.named_parameters()} == dtypes
        assert all(torch.equal(loaded.state_dict()[name], x) for name, x in first.items())
    sm.save(loaded, tmp_path / "saved")
    assert {name: x.dtype for name, x in sm.load(tmp_path / "saved").state_dict().items()} == dtypes
    assert sm.load(straight / "final", weights="fp32").embed.weight.dtype == torch.float32


@pytest.mark.parametrize("preset", ["sisa-tiny-ds16", "hybrid-sisa-tiny"])
def test_a_hybrids_lambda_stays(corpus, tmp_path, preset):
    """In a hybrid the authors left lambda_raw in bf16, where its steps round to nothing."""
    folder = train(
        TrainConfig(data=(corpus,), out=tmp_path / "run", preset=preset, recipe="paper", **SMALL)
    ).folder
    raw = [x for name, x in weights(folder).items() if name.endswith("lambda_raw")]
    frozen = preset.startswith("hybrid")
    assert {x.dtype for x in raw} == {torch.bfloat16 if frozen else torch.float32}
    assert all(bool((x == -1).all()) is frozen for x in raw)


# ---- First weights -------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["mamba2-tiny", "mamba3-tiny"])
def test_mambas_matrices_begin_as_the_packages(preset):
    """As nn.Linear draws them, whose values mamba-ssm keeps."""
    mixer = tiny(preset).layers[0].mixer
    torch.manual_seed(3)
    mixer.draw_matrices()
    torch.manual_seed(3)
    for projection in (mixer.in_proj, mixer.out_proj):
        own = nn.Linear(projection.in_features, projection.out_features, bias=False)
        torch.testing.assert_close(projection.weight, own.weight, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("preset", "changed"), [("mamba2-tiny", True), ("hybrid-transformer-tiny", False)]
)
def test_the_recipe_draws_a_mambas_own_first_weights(corpus, tmp_path, preset, changed):
    """Not a hybrid's, all of whose matrices the authors drew with std 0.02."""
    shared = {**SMALL, "steps": 1, "warmup_steps": 1, "precision": "fp32", "mode": "exact"}
    run = TrainConfig(data=(corpus,), out=tmp_path / "run", preset=preset, recipe="paper", **shared)
    found = weights(train(run).folder)["layers.0.mixer.in_proj.weight"]
    width = preset_config(preset).d_model
    std = width**-0.5 / math.sqrt(3) if changed else preset_config(preset).init_std
    assert found.std().item() == pytest.approx(std, rel=0.02)
    assert (found.abs().max() <= width**-0.5).item() is changed
