"""Reading sharded folders of runs whose projections were saved packed."""

import pytest
import torch
import torch.distributed.checkpoint as dcp

import sisa_model as sm
from sisa_model.models.dcp import read_tensors
from sisa_model.models.linear import PackedLinear
from tests.support.models import tokens

KEYS = ("exp_avg", "exp_avg_sq", "step")


def training_state(model):
    """The parameters and AdamW's state of each, by a run's names; the values are random."""
    tensors = {}
    for name, parameter in model.named_parameters():
        tensors[f"model.{name}"] = parameter.detach()
        tensors |= {f"optimizer.{name}.{key}": torch.randn_like(parameter) for key in KEYS[:2]}
        tensors[f"optimizer.{name}.step"] = torch.tensor(7.0)
    return tensors


def packed(model, tensors):
    """``tensors`` with the projections of one input below each other in one matrix."""
    tensors = dict(tensors)
    for path, module in model.named_modules():
        if not isinstance(module, PackedLinear):
            continue
        for kind, key in [("model", ""), *(("optimizer", f".{key}") for key in KEYS)]:
            parts = [tensors.pop(f"{kind}.{path}.{name}.weight{key}") for name in module.sizes]
            tensors[f"{kind}.{path}.weight{key}"] = parts[0] if key == ".step" else torch.cat(parts)
    return tensors


@pytest.mark.parametrize("preset", ["sisa-tiny-ds16", "fox-tiny", "hybrid-head-tiny"])
def test_packed_projections_are_taken_apart(preset, tmp_path):
    model = sm.build(preset)
    tensors = training_state(model)
    old = packed(model, tensors)
    assert "model.layers.0.ffn.w_in.weight" in old
    dcp.save(old, checkpoint_id=tmp_path, no_dist=True)
    found = {name: torch.full_like(x, torch.nan) for name, x in tensors.items()}
    read_tensors(tmp_path, found)
    assert all(torch.equal(found[name], x) for name, x in tensors.items())


def test_a_run_of_packed_projections_loads_as_a_model(tmp_path):
    model = sm.build("sisa-tiny-ds16")
    sm.save(model, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    dcp.save(packed(model, training_state(model)), checkpoint_id=tmp_path, no_dist=True)
    assert torch.equal(sm.load(tmp_path)(tokens()), model(tokens()))


def test_a_packed_matrix_of_another_model_is_refused(tmp_path):
    model = sm.build("sisa-tiny-ds16", n_layers=1)
    dcp.save(packed(model, training_state(model)), checkpoint_id=tmp_path, no_dist=True)
    other = sm.build("sisa-tiny-ds32", n_layers=1)
    with pytest.raises(ValueError, match=f"checkpoint {tmp_path} is truncated or"):
        read_tensors(tmp_path, training_state(other))
