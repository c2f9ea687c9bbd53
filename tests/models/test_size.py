"""What a model costs, against models that are built and run."""

import pytest
import torch

import sisa_model as sm
from sisa_model.models.flops import forward_flops
from sisa_model.models.presets import preset_config
from sisa_model.models.size import model_size
from tests.support.models import tiny, tokens

PRESETS = ["sisa-tiny-ds16", "transformer-tiny", "fox-tiny", "mamba2-tiny", "hybrid-head-tiny"]


def saved_bytes(model, batch, length, autocast):
    """Bytes that the backward of ``model``'s layers needs, each memory counted once."""
    saved = {}

    def keep(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    ids = tokens(batch, length)
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        model.hidden(ids)
    return sum(storage.nbytes() for storage in saved.values())


@pytest.mark.parametrize("preset", PRESETS)
def test_memory_is_what_a_model_takes(preset):
    model, size = tiny(preset), model_size(preset_config(preset), 192)
    assert size.parameters == sm.count_parameters(model)
    assert size.weights == sum(p.nbytes for p in model.parameters())
    for autocast, found in ((False, size.activations), (True, size.activations_bf16)):
        one, two = (saved_bytes(model, batch, 192, autocast) for batch in (1, 2))
        # Of a token beside the layers: the residual stream twice, its id, the last norm's factor.
        beside = 192 * (8 * model.config.d_model + 8 + 4)
        assert found == pytest.approx(two - one - beside, rel=0.002)
    assert size.forward_flops == forward_flops(model.config, 192)
    assert size.training_flops == 3 * size.forward_flops


@torch.no_grad()
def test_a_cache_is_what_decoding_keeps():
    size = model_size(preset_config("sisa-tiny-ds16"), 64)
    model = tiny("sisa-tiny-ds16")
    cache = model.make_cache(1)
    model(tokens(1, 40), cache=cache)
    buffers = [x for layer in cache.layers for x in layer.buffers.values()]
    assert size.cache_per_token == sum(x[:, :, :1].nbytes for x in buffers)
    assert size.cache_per_sequence == 0
    mamba = model_size(preset_config("mamba2-tiny"), 64)
    assert mamba.cache_per_token == 0
    assert mamba.cache_per_sequence > 0
    clamped = model_size(preset_config("sisa-tiny-ds16", mode="clamped"), 64)
    assert clamped.cache_per_token is None


def test_a_length_is_needed():
    with pytest.raises(ValueError, match="seq_len must be at least 1, got 0"):
        model_size(preset_config("sisa-tiny-ds16"), 0)
