"""The rows of `sisa study clamp` and their figure."""

import math

import pytest
import torch

from bench import clamp, figures
from bench.rows import append, read
from sisa_kernels.rotation import CLAMP
from sisa_model.runs.config import TrainConfig
from sisa_model.runs.log import read_rows
from sisa_model.training.trainer import train
from tests.support.models import tiny, tokens


def test_what_a_row_says_of_heads():
    """Decays of known half-lives: their ranges, and the share outside the clamp's window."""
    model, ids = tiny(mode="clamped"), tokens(B=2, L=200)
    with torch.no_grad():
        for layer, half_life in zip(model.layers, (100, 4)):
            layer.attn.proj.W_alpha.weight.zero_()
            layer.attn.decay_bias.fill_(math.log(math.expm1(math.log(2) / half_life)))
        model.layers[0].attn_norm.weight[0] = 2.0
    found = clamp.heads_of(model, ids)
    slow, fast = (199 * math.log(2) / half_life for half_life in (100, 4))
    assert found["half_life_least"] == pytest.approx(4, rel=1e-5)
    assert found["half_life_most"] == pytest.approx(100, rel=1e-5)
    assert found["half_life_median"] == pytest.approx(52, rel=1e-5)
    assert found["g_range_most"] == pytest.approx(fast, rel=1e-5)
    assert found["g_range_median"] == pytest.approx((slow + fast) / 2, rel=1e-5)
    assert found["clamped"] == pytest.approx((1 - 2 * CLAMP / fast) / 2, abs=0.01)
    assert found["biases_moved"] == 1.0
    assert found["gains_moved"] == pytest.approx(1 / (5 * model.config.d_model))


def test_a_run_becomes_a_row_and_rows_a_figure(corpus, tmp_path, capsys):
    settings = {"steps": 2, "seq_len": 64, "batch_size": 2, "val_blocks": 2, "sample_tokens": 0}
    run = TrainConfig(data=(corpus,), out=tmp_path / "run", precision="bf16-pure", **settings)
    train(run)
    assert clamp.main([str(tmp_path / "run"), "--out", str(tmp_path)]) == 0
    (row,) = read(tmp_path / "clamp.csv")
    assert (row["mode"], row["precision"], row["seed"], row["tokens"]) == (
        "exact",
        "bf16-pure",
        "0",
        "256",
    )
    assert float(row["loss"]) == pytest.approx(
        read_rows(tmp_path / "run" / "val.jsonl")[-1]["loss"], abs=1e-4
    )
    for mode in ("exact", "clamped"):
        for seed in ("0", "1"):
            append(tmp_path / "clamp.csv", clamp.COLUMNS, {**row, "mode": mode, "seed": seed})
    assert len(figures.newest(read(tmp_path / "clamp.csv"))) == 4, "one of each mode and seed"
    assert (
        figures.main(["--results", str(tmp_path), "--out", str(tmp_path), "--only", "clamp"]) == 0
    )
    assert (tmp_path / "clamp.png").read_bytes().startswith(b"\x89PNG")
