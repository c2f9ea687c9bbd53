"""FLOPs of a step: by hand, against PyTorch's own counter, and the share of a device's peak."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import sisa_model as sm
from bench.roofline import DEVICES
from sisa_model.models.config import FAMILIES
from sisa_model.models.flops import (
    DEVICE_NAMES,
    PEAK_TFLOPS,
    forward_flops,
    peak_flops,
    training_flops,
)
from sisa_model.models.presets import PRESETS, preset_config


def test_by_hand():
    # d 512, 8 heads of 64, 6 layers, d_ff 2048: four square matrices and three of SwiGLU, 1,024
    # earlier tokens on average.
    products, attention = 4 * 512 * 512 + 3 * 512 * 2048, 1024 * 8 * (64 + 64)
    assert forward_flops(preset_config("transformer-50m"), 2048) == 2 * (
        6 * (products + attention) + 512 * 50277
    )
    # d_s 16, d_ff 1939: B and C of 16 a head, the decay of 1, theta of 8; queries and keys 16
    # wider.
    products, attention = (
        4 * 512 * 512 + 512 * 8 * (16 + 16 + 1 + 8) + 3 * 512 * 1939,
        1024 * 8 * (64 + 16 + 64),
    )
    assert forward_flops(preset_config("sisa-50m-ds16"), 2048) == 2 * (
        6 * (products + attention) + 512 * 50277
    )


def inside_chunks(config):
    """FLOPs a token of the scan in chunks of 64 beyond the recurrence: scores and values."""
    found = 0
    for kind in config.layer_kinds.replace("a", ""):
        inner = (2 if kind == "m" else 1) * config.d_model
        # Mamba-2's heads share B and C.
        scores = inner // config.head_dim if config.family == "mamba3" else 1
        found += 2 * 64 * (scores * config.mamba_state + inner)
    return found


FUSED = ("fox", "alibi")  # one op, whose products the counter does not see


@pytest.mark.parametrize(
    "preset", [name for name in PRESETS if "-tiny" in name and not name.startswith(FUSED)]
)
@pytest.mark.parametrize("heads", [{}, {"n_kv_heads": 1}])
def test_against_pytorchs_counter(preset, heads):
    """Equal to the last FLOP over all pairs: PyTorch counts unfused attention without its mask."""
    backend = "auto" if preset.startswith("mamba") else "sdpa"
    if "sisa" in preset and "lambda0" not in preset:
        backend = "reference"  # which makes no product twice
    if heads and preset.startswith("mamba"):
        pytest.skip("a Mamba has no key heads")
    model = sm.build(preset, backend=backend, **heads)
    ids = torch.zeros(2, 64, dtype=torch.int64)
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            logits = model(ids)
        with FlopCounterMode(display=False) as backward:
            logits.sum().backward()
    assert forward.get_total_flops() == ids.numel() * (
        forward_flops(model.config, 64, causal=False) + inside_chunks(model.config)
    )
    if set(model.config.layer_kinds) == {
        "a"
    }:  # a grouped convolution's backward is counted as if it were dense
        assert (
            forward.get_total_flops() + backward.get_total_flops() == 3 * forward.get_total_flops()
        )
    assert training_flops(model.config, 64) == 3 * forward_flops(model.config, 64)


def test_the_rivals_by_hand():
    """ALiBi computes what a Transformer does; FoX a gate a head more, and a narrower SwiGLU."""
    fox, alibi, transformer = (preset_config(f"{name}-152m") for name in (*FUSED, "transformer"))
    assert forward_flops(alibi, 2048) == forward_flops(transformer, 2048)
    gate, narrower = 768 * 12, 3 * 768 * (3072 - fox.d_ff)
    assert forward_flops(fox, 2048) == forward_flops(transformer, 2048) + 2 * 12 * (gate - narrower)


def test_every_family_has_a_formula():
    assert {preset.model.family for preset in PRESETS.values()} == set(FAMILIES)
    assert all(training_flops(preset_config(name), 128) > 0 for name in PRESETS)


@pytest.mark.parametrize(
    ("d_state", "causal", "full"), [(16, 1.014, 1.025), (32, 1.028, 1.050), (64, 1.055, 1.100)]
)
def test_what_the_importance_term_costs_at_152m(d_state, causal, full):
    transformer, sisa = (
        preset_config(name) for name in ("transformer-152m", f"sisa-152m-ds{d_state}")
    )
    for half, ratio in ((True, causal), (False, full)):
        found = forward_flops(sisa, 2048, causal=half) / forward_flops(
            transformer, 2048, causal=half
        )
        assert found == pytest.approx(ratio, abs=5e-4)


def test_the_papers_ratio():
    """Its 1.07 at d_s 32 is causal, of the layers alone, with v padded to the keys' width."""
    transformer, sisa = (preset_config(name) for name in ("transformer-152m", "sisa-152m-ds32"))
    output, padding = 2 * 768 * 50277, 2 * 12 * 12 * 1024 * 32
    ratio = (forward_flops(sisa, 2048) - output + padding) / (
        forward_flops(transformer, 2048) - output
    )
    assert ratio == pytest.approx(1.07, abs=5e-3)


def test_peaks_are_those_of_known_devices(monkeypatch):
    assert peak_flops(torch.device("cpu")) is None
    assert set(DEVICE_NAMES.values()) == set(PEAK_TFLOPS)
    assert all(device.tflops == PEAK_TFLOPS[name] for name, device in DEVICES.items())
    for name, peak in {
        "NVIDIA H200": 989e12,
        "NVIDIA A100-SXM4-80GB": 312e12,
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA GH200 480GB": None,
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb": None,
        "NVIDIA GeForce RTX 4090 D": None,
        "Radeon": None,
    }.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(torch.device("cuda")) == peak, name
