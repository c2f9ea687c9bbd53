"""Presets as records, and their fields overridden."""

import dataclasses

from sisa_model.models.presets import PRESETS, TrainingDefaults, find_preset, preset_config
from sisa_model.runs.config import TrainConfig


def test_records_tell_presets_apart():
    assert all(find_preset(name).name == name for name in PRESETS)
    records = {(p.family, p.scale, p.variant, p.model.d_state) for p in PRESETS.values()}
    assert len(records) == len(PRESETS)
    hybrid = find_preset("hybrid-sisa-152m")
    assert (hybrid.family, hybrid.scale, hybrid.variant) == ("hybrid", "152m", "sisa")
    assert hybrid.model.family == "sisa"
    control = find_preset("sisa-tiny-ds32-nodecay")
    assert (control.family, control.scale, control.variant) == ("sisa", "tiny", "nodecay")
    assert all(p.model.family == p.family for p in PRESETS.values() if p.family != "hybrid")


def test_training_defaults_are_settings_of_a_run():
    fields = {field.name for field in dataclasses.fields(TrainConfig)}
    assert {field.name for field in dataclasses.fields(TrainingDefaults)} <= fields
    paper = find_preset("sisa-152m-ds16").training
    assert (paper.steps, paper.batch_size, paper.seq_len, paper.lr) == (9536, 256, 2048, 6e-4)
    assert find_preset("transformer-369m").training == dataclasses.replace(paper, lr=3e-4)
    assert find_preset("mamba3-tiny").training.steps == 1000


def test_what_was_computed_follows_what_is_overridden():
    assert preset_config("sisa-152m-ds16", d_state=32) == find_preset("sisa-152m-ds32").model
    assert preset_config("sisa-152m-ds16", n_heads=6).n_kv_heads == 6
    assert preset_config("sisa-152m-ds16", d_ff=100, d_state=32).d_ff == 100
    reduced = preset_config("transformer-152m-reduced", n_heads=6)
    assert (reduced.d_ff, reduced.n_kv_heads) == (2748, 6)
    assert preset_config("hybrid-block-152m", mamba_state=32).d_ff == 3309
