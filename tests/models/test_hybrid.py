"""Mamba models and hybrids: sizes, order of layers, documents, weight decay, training."""

import pytest
import torch
import torch.nn.functional as F

import sisa_model as sm
from sisa_model.models.hybrid import HeadMix
from sisa_model.models.layers import Layer
from sisa_model.models.mamba import Mamba2, Mamba3, MambaBlock
from sisa_model.models.sisa import SisaAttention
from sisa_model.models.softmax import TransformerAttention
from sisa_model.runs.config import TrainConfig, resolve
from sisa_model.training.optimizer import make_optimizer
from sisa_model.training.trainer import train
from tests.support.models import check_compiles, check_refused, tokens

COUNTS = {
    "mamba2-tiny": 147_920,
    "mamba2-50m": 48_897_440,
    "mamba2-152m": 152_271_160,
    "mamba2-369m": 368_482_528,
    "mamba3-tiny": 147_744,
    "mamba3-50m": 49_176_768,
    "mamba3-152m": 149_878_944,
    "mamba3-369m": 365_526_016,
    "hybrid-transformer-tiny": 147_880,
    "hybrid-transformer-152m": 149_695_904,
    "hybrid-sisa-tiny": 147_884,
    "hybrid-sisa-152m": 149_696_000,
    "hybrid-block-tiny": 147_880,
    "hybrid-block-152m": 151_880_096,
    "hybrid-head-tiny": 147_868,
    "hybrid-head-152m": 151_886_256,
}
TINY = [name for name in COUNTS if name.endswith("-tiny")]


def build(preset, seed=0, **overrides):
    torch.manual_seed(seed)
    return sm.build(preset, **overrides)


def on_meta(preset, **overrides):
    with torch.device("meta"):
        return sm.build(preset, **overrides)


@pytest.mark.parametrize("preset", COUNTS)
def test_parameter_counts(preset):
    assert sm.count_parameters(on_meta(preset)) == COUNTS[preset]


@pytest.mark.parametrize("scale", ["tiny", "152m"])
def test_what_the_paper_argues_against_is_as_large_as_the_transformer(scale):
    """As nearly as an integer SwiGLU width allows: one more or less is never closer."""
    target = sm.count_parameters(on_meta(f"transformer-{scale}"))
    for name in ("block", "head"):
        model = on_meta(f"hybrid-{name}-{scale}")
        unit = 3 * model.config.d_model * sum(isinstance(layer, Layer) for layer in model.layers)
        assert abs(sm.count_parameters(model) - target) <= unit / 2


@pytest.mark.parametrize("family", ["mamba2", "mamba3"])
def test_a_tiny_mamba_is_as_large_as_the_transformer(family):
    """Of all layer counts and multiples of 4 state channels, at the Transformer's head width."""
    target = sm.count_parameters(on_meta("transformer-tiny"))
    best = abs(COUNTS[f"{family}-tiny"] - target)
    for n_layers in (3, 4, 5):  # parameters are linear in the state size: two sizes give all
        least, second = (
            sm.count_parameters(on_meta(f"{family}-tiny", n_layers=n_layers, mamba_state=n))
            for n in (4, 8)
        )
        assert all(abs(least + k * (second - least) - target) >= best for k in range(32))


@pytest.mark.parametrize(
    ("preset", "mixers"),
    [
        ("mamba2-152m", [Mamba2] * 31),
        ("mamba3-152m", [Mamba3] * 30),
        ("hybrid-transformer-152m", [Mamba2] * 20 + [TransformerAttention] * 4),
        ("hybrid-sisa-152m", [Mamba2] * 20 + [SisaAttention] * 4),
        ("hybrid-block-152m", [Mamba2, Mamba2, Mamba2, TransformerAttention, Mamba2, Mamba2] * 4),
        ("hybrid-head-152m", [HeadMix] * 12),
    ],
)
def test_layers_stand_in_their_order(preset, mixers):
    model = on_meta(preset)
    assert [
        type(layer.mixer if isinstance(layer, MambaBlock) else layer.attn) for layer in model.layers
    ] == mixers
    assert all(
        layer.ffn.w_down.in_features == model.config.d_ff
        for layer in model.layers
        if isinstance(layer, Layer)
    )
    if preset == "hybrid-sisa-152m":
        assert (model.config.d_state, model.config.d_ff) == (32, 2748)


def test_mixed_heads_are_the_mean_of_both_kinds_normed():
    mix, attention = (
        build("hybrid-head-tiny").layers[0].attn,
        build("transformer-tiny").layers[0].attn,
    )
    attention.proj.load_state_dict(mix.attn.proj.state_dict())
    torch.nn.init.normal_(mix.norm.weight)
    x, context = torch.randn(2, 40, 64), None

    def keep(module, args):
        nonlocal context
        context = args[1]

    model = build("hybrid-head-tiny")
    model.layers[0].attn.register_forward_pre_hook(keep)
    model(tokens())
    attention.W_O = torch.nn.Identity()
    y = F.rms_norm(attention(x, context), (64,), mix.norm.weight, 1e-6)
    torch.testing.assert_close(
        mix(x, context), (y / 2 + mix.ssd(x, context) / 2) @ mix.W_O.weight.T
    )
    torch.nn.init.zeros_(mix.norm.weight)
    torch.testing.assert_close(mix(x, context), mix.ssd(x, context) / 2 @ mix.W_O.weight.T)


@pytest.mark.parametrize("preset", TINY)
def test_causal_and_documents_apart(preset):
    model, ids = build(preset), tokens(1, 80)
    whole, changed = model(ids), ids.clone()
    changed[:, 50:] = (changed[:, 50:] + 1) % 257
    torch.testing.assert_close(model(changed)[:, :50], whole[:, :50], rtol=1e-4, atol=1e-5)
    packed = model(ids, torch.tensor([0, 2, 33, 80], dtype=torch.int32))
    apart = torch.cat([model(document) for document in ids.split([2, 31, 47], 1)], 1)
    torch.testing.assert_close(packed, apart, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(packed, whole, atol=1e-2)


@pytest.mark.parametrize(
    ("preset", "field", "value"),
    [
        ("mamba2-tiny", "mamba_state", 16),
        ("mamba3-tiny", "mamba_state", 16),
        ("hybrid-head-tiny", "mamba_state", 16),
        ("hybrid-transformer-tiny", "mamba_state", 16),
        ("hybrid-transformer-tiny", "pattern", "mam"),
        ("hybrid-head-tiny", "pattern", "ma"),
        ("mamba2-tiny", "n_heads", 4),
        ("mamba3-tiny", "n_heads", 4),
        ("mamba3-tiny", "init_std", 0.2),
        ("mamba2-tiny", "n_layers", 3),
        ("hybrid-sisa-tiny", "d_state", 16),
        ("hybrid-head-tiny", "n_kv_heads", 1),
    ],
)
def test_changing_a_field_changes_the_result(preset, field, value):
    assert not torch.equal(build(preset)(tokens()), build(preset, **{field: value})(tokens()))


@pytest.mark.parametrize(
    ("preset", "overrides", "message"),
    [
        (
            "mamba2-tiny",
            {"d_ff": 100},
            "d_ff must be left at 0 for a mamba2, which has no attention and no SwiGLU, got 100",
        ),
        (
            "mamba2-tiny",
            {"d_ff_transformer": 256},
            "d_ff_transformer must be left at 0 for a mamba2",
        ),
        ("mamba3-tiny", {"n_kv_heads": 2}, "n_kv_heads must be left at 0 for a mamba3"),
        ("mamba3-tiny", {"d_state": 16}, "d_state must be left at 0 for a mamba3"),
        ("mamba3-tiny", {"mode": "clamped"}, "mode must be left at 'exact' for a mamba3"),
        ("mamba3-tiny", {"backend": "sdpa"}, "backend must be left at 'auto' for a mamba3"),
        ("mamba2-tiny", {"decay": False}, "decay must be left at True for a mamba2"),
        ("mamba2-tiny", {"pattern": "ma"}, "pattern must be left at '' for a mamba2"),
        (
            "mamba2-tiny",
            {"mamba_state": 0},
            "mamba_state must be a multiple of 1, at least 1, got 0",
        ),
        (
            "mamba3-tiny",
            {"mamba_state": 18},
            "mamba_state must be a multiple of 4, at least 4, got 18",
        ),
        ("mamba2-tiny", {"n_heads": 3}, "n_heads must be a divisor of d_model = 64, got 3"),
        ("mamba2-tiny", {"d_conv": 4}, "d_conv is not a field of the model"),
        (
            "transformer-tiny",
            {"mamba_state": 16},
            "mamba_state must be left at 0 for a transformer without pattern",
        ),
        ("transformer-tiny", {"d_ff_transformer": 0}, "d_ff_transformer must be at least 1, got 0"),
        (
            "hybrid-sisa-tiny",
            {"mamba_state": 0},
            "mamba_state must be at least 1 with pattern 'mma', got 0",
        ),
        (
            "hybrid-sisa-tiny",
            {"pattern": "mmm"},
            "pattern must be empty, 'h', or made of both m and a, got 'mmm'",
        ),
        (
            "hybrid-sisa-tiny",
            {"pattern": "mah"},
            "pattern must be empty, 'h', or made of both m and a, got 'mah'",
        ),
        (
            "hybrid-sisa-tiny",
            {"n_layers": 4},
            "n_layers must be a multiple of the length of pattern 'mma', got 4",
        ),
        ("hybrid-transformer-tiny", {"d_state": 16}, "d_state must be left at 0 for a transformer"),
        (
            "hybrid-head-tiny",
            {"mamba_state": 4000},
            "d_ff must be at least 1 (what is beside it in a layer exceeds",
        ),
    ],
)
def test_bad_configurations_are_named(preset, overrides, message):
    check_refused(preset, overrides, message)


@pytest.mark.parametrize("preset", TINY)
def test_no_weight_decay_where_the_package_has_none(preset):
    model = sm.build(preset)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = make_optimizer(model, resolve(TrainConfig(preset=preset))).param_groups
    found = [names[id(p)] for group in groups for p in group["params"]]
    assert sorted(found) == sorted(names.values())
    free = {
        names[id(p)].rpartition(".")[2]
        for group in groups
        if group["weight_decay"] == 0
        for p in group["params"]
    }
    expected = {"dt_bias", "D"} if preset == "mamba3-tiny" else {"dt_bias", "D", "A_log"}
    assert free == expected | ({"lambda_raw"} if "sisa" in preset else set())
    rates = {
        group["lr_scale"]
        for group in groups
        if any("dt_bias" in names[id(p)] for p in group["params"])
    }
    assert rates == {1.0}


@pytest.mark.parametrize("preset", TINY)
def test_save_load_and_continue(preset, tmp_path):
    model, ids = build(preset), tokens()
    sm.save(model, tmp_path)
    loaded = sm.load(tmp_path)
    assert loaded.config == model.config
    assert torch.equal(loaded(ids), model(ids))
    assert sm.generate(loaded, ids[:, :5], 3).shape == (2, 8)


@pytest.mark.parametrize("preset", ["mamba3-tiny", "hybrid-sisa-tiny"])
def test_they_train(preset, tmp_path):
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog; " * 300)
    settings = {
        "steps": 16,
        "seq_len": 64,
        "batch_size": 4,
        "val_every": 16,
        "val_blocks": 4,
        "sample_tokens": 0,
    }
    result = train(
        TrainConfig(preset=preset, data=(tmp_path / "text.txt",), out=tmp_path / "run", **settings)
    )
    assert result.val_loss < result.unigram


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["mamba2-tiny", "mamba3-tiny"])
def test_models_compile_whole(preset):
    check_compiles(build(preset, n_layers=1), tokens())
