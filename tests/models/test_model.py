"""Models: exact sizes, every field alive, lambda in fp32, save and load, bad input."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import sisa_kernels as sk
import sisa_model as sm
from sisa_model.models.config import ModelConfig
from tests.support.models import check_compiles, check_refused, tokens

# The paper's tables, and the rivals' own: preset -> (parameters, d_ff).
COUNTS = {
    "transformer-50m": (50_914_304, 2048),
    "transformer-152m": (151_878_144, 3072),
    "transformer-369m": (369_252_352, 2944),
    "transformer-152m-reduced": (142_920_192, 2748),
    "fox-50m": (50_911_280, 2045),
    "fox-152m": (151_878_288, 3068),
    "fox-369m": (369_277_312, 2939),
    "alibi-50m": (50_914_304, 2048),
    "alibi-152m": (151_878_144, 3072),
    "alibi-369m": (369_252_352, 2944),
    "sisa-50m-ds16": (None, 1939),
    "sisa-50m-ds32": (50_914_400, 1832),
    "sisa-50m-ds64": (None, 1619),
    "sisa-50m-ds128": (None, 1192),
    "sisa-152m-ds16": (151_878_432, 2908),
    "sisa-152m-ds32": (151_878_432, 2748),
    "sisa-152m-ds64": (151_878_432, 2428),
    "sisa-152m-ds128": (151_878_432, 1788),
    "sisa-369m-ds16": (None, 2725),
    "sisa-369m-ds32": (369_253_120, 2512),
    "sisa-369m-ds64": (None, 2085),
    "sisa-369m-ds128": (369_253_120, 1232),
}


def tiny(preset="sisa-tiny-ds16", seed=0, **overrides):
    torch.manual_seed(seed)
    return sm.build(preset, **{"n_layers": 1, **overrides})


@pytest.mark.parametrize("preset", COUNTS)
def test_parameter_counts(preset):
    with torch.device("meta"):
        model = sm.build(preset)
    parameters, d_ff = COUNTS[preset]
    assert model.config.d_ff == d_ff
    assert parameters is None or sm.count_parameters(model) == parameters
    if preset == "sisa-152m-ds32":
        assert sum(p.numel() for p in model.layers[0].parameters()) == 9_438_744


@pytest.mark.parametrize("scale", ["tiny", "50m", "152m", "369m"])
def test_a_layer_is_as_close_to_the_transformer_as_an_integer_d_ff_allows(scale):
    with torch.device("meta"):
        target = sum(p.numel() for p in sm.build(f"transformer-{scale}").layers[0].parameters())
        for preset in (
            *(f"sisa-{scale}-ds{d_state}" for d_state in (16, 32, 64, 128)),
            f"fox-{scale}",
            f"alibi-{scale}",
        ):
            model = sm.build(preset)
            difference = sum(p.numel() for p in model.layers[0].parameters()) - target
            assert abs(difference) <= 3 * model.config.d_model / 2


FAMILIES = ["sisa-tiny-ds16", "transformer-tiny", "fox-tiny", "alibi-tiny"]


@pytest.mark.parametrize("preset", FAMILIES)
def test_packed_documents_do_not_see_each_other(preset):
    model, ids = tiny(preset, n_layers=2), tokens(1, 60)
    packed = model(ids, torch.tensor([0, 1, 23, 60], dtype=torch.int32))
    apart = torch.cat([model(document) for document in ids.split([1, 22, 37], 1)], 1)
    torch.testing.assert_close(packed, apart, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to at most the length 60"):
        model(ids, torch.tensor([0, 61], dtype=torch.int32))
    short = tiny(preset, n_layers=2, max_seq_len=37)
    torch.testing.assert_close(short(ids, torch.tensor([0, 1, 23, 60], dtype=torch.int32)), packed)
    with pytest.raises(
        ValueError, match=r"input_ids must be 1 to 37 \(max_seq_len\) tokens long, got 38"
    ):
        short(ids, torch.tensor([0, 22, 60], dtype=torch.int32))


def test_every_preset_builds_and_controls_change_the_result():
    ids = tokens()
    outputs = {}
    for name in sm.presets():
        with torch.device("meta"):
            meta = sm.build(name)
        assert meta(ids.to("meta")).shape == (*ids.shape, meta.config.vocab_size)
        if "-tiny" in name:
            torch.manual_seed(0)
            outputs[name] = sm.build(name)(ids)
    full = outputs.pop("sisa-tiny-ds32")
    shared = outputs.pop("sisa-tiny-ds32-lambdashared")
    assert torch.equal(shared, full), (
        "one lambda or one a head begin at the same value; they differ in what they can learn"
    )
    assert all(not torch.allclose(y, full, atol=1e-4) for y in outputs.values())
    assert torch.equal(outputs["sisa-tiny-ds32-lambda0"], outputs["transformer-tiny-reduced"]), (
        "lambda = 0 is that Transformer"
    )


def test_controls_are_the_operator_without_decay_or_rotation(monkeypatch):
    seen = {}

    def spy(q, k, v, b, c, log_decay, theta, lam, **kwargs):
        seen.update(log_decay=log_decay, theta=theta, lam=lam)
        return real(q, k, v, b, c, log_decay, theta, lam, **kwargs)

    real = sk.sisa_attention
    monkeypatch.setattr(sk, "sisa_attention", spy)
    for control, still in {
        "nodecay": ["log_decay"],
        "norotation": ["theta"],
        "bilinear": ["log_decay", "theta"],
    }.items():
        tiny(f"sisa-tiny-ds32-{control}")(tokens())
        assert [name for name in ("log_decay", "theta") if not seen[name].any()] == still
    shared = tiny("sisa-tiny-ds32-lambdashared")
    assert shared.layers[0].attn.lambda_raw.shape == (1,)


CHANGES = {
    "d_model": 128,
    "n_heads": 4,
    "n_kv_heads": 1,
    "n_layers": 2,
    "d_ff_transformer": 300,
    "d_ff": 100,
    "d_state": 32,
    "vocab_size": 300,
    "init_std": 0.2,
    "decay": False,
    "rotation": False,
    "lam": "shared",
    "family": None,
    "max_seq_len": None,
    "mode": "clamped",
    "backend": "reference",
    "pattern": None,
    "mamba_state": None,
    "weights": "bf16",
}


def test_every_field_has_a_case():
    assert set(CHANGES) == set(ModelConfig.__dataclass_fields__)


@pytest.mark.parametrize("field", [name for name, value in CHANGES.items() if value is not None])
def test_changing_a_field_changes_the_result(field):
    ids = tokens()
    base, changed = tiny(), tiny(**{field: CHANGES[field]})
    if field in ("mode", "backend"):
        changed.load_state_dict(base.state_dict())
        for model in (base, changed):  # a decay that the clamp binds on
            torch.nn.init.constant_(model.layers[0].attn.decay_bias, 2.0)
    if field == "lam":
        with torch.no_grad():
            for model in (base, changed):
                model.layers[0].attn.lambda_raw[0] += 1.0
    before, after = base(ids), changed(ids)
    assert before.shape != after.shape or not torch.equal(before, after)
    if field == "backend":
        torch.testing.assert_close(before, after, rtol=1e-3, atol=1e-4)


def test_max_seq_len_bounds_the_input():
    with pytest.raises(
        ValueError, match=r"input_ids must be 1 to 32 \(max_seq_len\) tokens long, got 40"
    ):
        tiny(max_seq_len=32)(tokens())
    assert tiny(max_seq_len=40)(tokens()).isfinite().all()


@pytest.mark.parametrize(
    ("preset", "overrides", "message"),
    [
        (
            "sisa-tiny-ds17",
            {},
            "preset must be one of those that `sisa info` lists, such as sisa-tiny-ds16",
        ),
        ("sisa-tiny-ds16", {"width": 3}, "width is not a field of the model"),
        ("sisa-tiny-ds16", {"d_state": 15}, "d_state must be even and at least 2, got 15"),
        ("sisa-tiny-ds16", {"n_heads": 3}, "n_heads must be a divisor of d_model = 64, got 3"),
        (
            "sisa-tiny-ds16",
            {"n_heads": 64},
            "n_heads must be such that the head width d_model / n_heads is even",
        ),
        ("sisa-tiny-ds16", {"n_kv_heads": 3}, "n_kv_heads must be a divisor of n_heads = 2, got 3"),
        ("sisa-tiny-ds16", {"d_state": 512}, "d_ff must be at least 1"),
        ("sisa-tiny-ds16", {"mode": "fast"}, "mode must be one of exact, clamped"),
        ("sisa-tiny-ds16", {"backend": "fast"}, "backend must be one of auto"),
        ("sisa-tiny-ds16", {"lam": "two"}, "lam must be one of per-head, shared, zero"),
        ("sisa-tiny-ds16", {"init_std": 0.0}, "init_std must be above 0"),
        ("sisa-tiny-ds16", {"n_layers": 0}, "n_layers must be at least 1, got 0"),
        ("transformer-tiny", {"d_state": 16}, "d_state must be left at 0 for a transformer"),
        ("transformer-tiny", {"mode": "clamped"}, "mode must be left at 'exact' for a transformer"),
        (
            "sisa-tiny-ds32-lambda0",
            {"mode": "clamped"},
            "mode must be left at 'exact' with lam 'zero'",
        ),
        (
            "transformer-tiny",
            {"backend": "chunked"},
            "backend must be one of auto, native, sdpa, got 'chunked'",
        ),
        (
            "fox-tiny",
            {"d_state": 16},
            "d_state must be left at 0 for a fox, which has no importance term, got 16",
        ),
        ("fox-tiny", {"decay": False}, "decay must be left at True for a fox"),
        ("alibi-tiny", {"lam": "zero"}, "lam must be left at 'per-head' for an alibi"),
        ("alibi-tiny", {"backend": "triton"}, "backend must be one of auto, native, sdpa"),
    ],
)
def test_bad_configurations_are_named(preset, overrides, message):
    check_refused(preset, overrides, message)


def test_bad_ids_are_named():
    model = tiny()
    with pytest.raises(ValueError, match=r"input_ids must lie in \[0, 257\), got 0 to 257"):
        model(torch.tensor([[0, 257]]))
    with pytest.raises(
        ValueError,
        match=r"input_ids must be int64 \[batch >= 1, length\], got torch.float32 \[1, 3\]",
    ):
        model(torch.zeros(1, 3))
    with pytest.raises(
        ValueError,
        match=r"input_ids must be int64 \[batch >= 1, length\], got torch.int64 \[0, 3\]",
    ):
        model(torch.zeros(0, 3, dtype=torch.int64))


def test_lambda_stays_fp32_and_keeps_its_bits():
    model = tiny()
    raw = model.layers[0].attn.lambda_raw
    with torch.no_grad():
        raw += 1e-4
    before = raw.detach().clone()
    for cast in (model.bfloat16, model.half, model.double, lambda: model.to(torch.bfloat16)):
        cast()
        assert model.layers[0].attn.lambda_raw.dtype == torch.float32
        assert torch.equal(model.layers[0].attn.lambda_raw, before)
    logits = model(tokens())
    assert logits.dtype == torch.bfloat16
    assert logits.isfinite().all()


def test_causal_end_to_end():
    model, ids = tiny(n_layers=2), tokens()
    changed = ids.clone()
    changed[:, 25:] = (changed[:, 25:] + 1) % 257
    torch.testing.assert_close(model(ids)[:, :25], model(changed)[:, :25], rtol=1e-4, atol=1e-5)


def test_meta_model_can_be_materialised():
    with torch.device("meta"):
        model = sm.build("sisa-tiny-ds16")
    model.to_empty(device="cpu")
    plain = sm.build("sisa-tiny-ds16")
    for each in (model, plain):
        torch.manual_seed(0)
        each.reset_parameters()
    assert torch.equal(model(tokens()), plain(tokens()))


@pytest.mark.parametrize("preset", [*FAMILIES, "sisa-tiny-ds32-bilinear"])
def test_save_and_load(tmp_path, preset):
    model = tiny(preset, n_kv_heads=1)
    sm.save(model, tmp_path / "model")
    loaded = sm.load(tmp_path / "model")
    assert loaded.config == model.config
    assert torch.equal(loaded(tokens()), model(tokens()))
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == [
        "config.json",
        "model.safetensors",
        "modeling_sisa.py",
    ]
    if preset == "sisa-tiny-ds16":
        assert sm.load(tmp_path / "model", mode="clamped").config.mode == "clamped"


def test_layers_that_share_weights_are_saved(tmp_path):
    model = tiny(n_layers=2)
    model.layers[1].ffn = model.layers[0].ffn
    sm.save(model, tmp_path)
    assert torch.equal(sm.load(tmp_path)(tokens()), model(tokens()))


def test_bf16_weights_load_into_fp32(tmp_path):
    model = tiny().bfloat16()
    sm.save(model, tmp_path)
    loaded = sm.load(tmp_path)
    assert loaded.embed.weight.dtype == torch.float32
    assert torch.equal(loaded.embed.weight, model.embed.weight.float())


def test_damaged_and_foreign_folders_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no model configuration at"):
        sm.load(tmp_path)
    sm.save(tiny(), tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    whole = weights.read_bytes()

    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="truncated or not a safetensors file"):
        sm.load(tmp_path)
    save_file({"weight": torch.zeros(3)}, weights)
    with pytest.raises(ValueError, match=r"does not hold this sisa model.*embed.weight"):
        sm.load(tmp_path)
    state = {name: x.clone() for name, x in tiny().state_dict().items()}
    state["layers.0.attn.proj.W_B.weight"] = torch.zeros(2, 2)
    save_file(state, weights)
    with pytest.raises(ValueError, match=r"size mismatch for layers.0.attn.proj.W_B.weight"):
        sm.load(tmp_path)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="no weights at"):
        sm.load(tmp_path)

    config.write_text("{")
    with pytest.raises(ValueError, match="is not a model configuration of this package"):
        sm.load(tmp_path)
    config.write_text(json.dumps({"hidden_size": 3}))
    with pytest.raises(ValueError, match="hidden_size"):
        sm.load(tmp_path)


def test_a_failed_save_leaves_the_old_file_whole(tmp_path, monkeypatch):
    model = tiny()
    sm.save(model, tmp_path)
    before = load_file(tmp_path / "model.safetensors")

    def full_disk(state, path, **kwargs):
        path.write_bytes(b"half a file")
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("sisa_model.models.checkpoint.save_file", full_disk)
    with pytest.raises(OSError, match="No space left on device"):
        sm.save(tiny(seed=1), tmp_path)
    names = ["config.json", "model.safetensors", "modeling_sisa.py"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names
    after = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_health_reports_what_the_layers_compute():
    model = tiny(n_layers=2, mode="clamped")
    for layer, bias in zip(model.layers, (-5.0, 2.0)):
        torch.nn.init.constant_(layer.attn.decay_bias, bias)
        torch.nn.init.zeros_(layer.attn.proj.W_alpha.weight)
    slow, fast = sm.health(model, tokens())
    rate = torch.nn.functional.softplus(torch.tensor(-5.0)).item()
    assert slow.lam == pytest.approx([0.3133] * 2, abs=1e-4)
    assert slow.half_life == pytest.approx([0.6931 / rate] * 2, rel=1e-3)
    assert slow.g_range == pytest.approx([39 * rate] * 2, rel=1e-3)
    assert slow.clamped == 0
    assert 0.6 < fast.clamped < 0.8, "39 steps of 2.13 span 83; 22 of it is not clamped"
    assert sm.health(tiny("transformer-tiny"), tokens()) == []


@pytest.mark.parametrize("preset", ["sisa-tiny-ds16", "transformer-tiny", "fox-tiny"])
def test_models_compile_whole(preset):
    check_compiles(tiny(preset), tokens())
