"""transformers' own tests of a model, which its source distribution holds, on every family.

``TRANSFORMERS_TESTS`` names the folder ``tests`` of the distribution (PyPI, transformers-*.tar.gz),
unpacked, of the installed version; without it these tests are skipped:

    pip download --no-deps --no-binary :all: transformers==5.24.0
    tar xf transformers-5.24.0.tar.gz
    TRANSFORMERS_TESTS=transformers-5.24.0/tests pytest tests/interop/test_transformers_generic.py

Llama stands beside the families as the control: what it fails, the environment fails."""

import copy
import dataclasses
import importlib
import os
import sys
import types
import unittest
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", minversion="5.24")
pytest.importorskip("parameterized")
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

from sisa_model.interop.transformers import SisaConfig, SisaForCausalLM, SisaModel
from sisa_model.models.presets import preset_config

FOLDER = Path(os.environ.get("TRANSFORMERS_TESTS", ""))
PACKAGE = "transformers_tests"
# Files that the distribution lacks: an empty class stands for each.
LEFT_OUT = {
    "exporters.test_export": "ExportTesterMixin",
    "generation.test_utils": "GenerationTesterMixin",
}
DOES_NOT_APPLY = {
    "test_model_weights_reload_no_missing_tied_weights": "a folder without weights is refused",
}
BATCH = 3
LENGTH = 9
VOCABULARY = 99

if not (FOLDER / "test_modeling_common.py").is_file():
    pytest.skip(
        "TRANSFORMERS_TESTS names no folder with transformers' test_modeling_common.py, which its "
        "source distribution holds",
        allow_module_level=True,
    )


def mixins():
    """transformers' test classes, of models and of generation, under a package name of ours."""
    package = types.ModuleType(PACKAGE)
    package.__path__ = [str(FOLDER)]
    sys.modules[PACKAGE] = package
    for name, mixin in LEFT_OUT.items():
        if (FOLDER / f"{name.replace('.', '/')}.py").is_file():
            continue
        module = types.ModuleType(f"{PACKAGE}.{name}")
        setattr(module, mixin, type(mixin, (), {}))
        parent = f"{PACKAGE}.{name.split('.')[0]}"
        sys.modules.setdefault(parent, types.ModuleType(parent))
        sys.modules[module.__name__] = module
    common = importlib.import_module(f"{PACKAGE}.test_modeling_common")
    # By these lists of their own models the tests know which class has a head.
    common.MODEL_MAPPING_NAMES = {"sisa": "SisaModel", "llama": "LlamaModel"}
    common.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES = {
        "sisa": "SisaForCausalLM",
        "llama": "LlamaForCausalLM",
    }
    return common.ModelTesterMixin, common.GenerationTesterMixin


ModelTesterMixin, GenerationTesterMixin = mixins()


class ModelTester:
    """What transformers' tests ask of a model: a small configuration of it, and inputs."""

    is_training = True
    batch_size = BATCH
    seq_length = LENGTH
    vocab_size = VOCABULARY

    def __init__(self, config):
        self.config = config
        self.hidden_size = config.hidden_size
        self.num_hidden_layers = config.num_hidden_layers
        self.num_attention_heads = config.num_attention_heads

    def get_config(self):
        return copy.deepcopy(self.config)

    def prepare_config_and_inputs_for_common(self):
        ids = torch.randint(VOCABULARY, (BATCH, LENGTH))
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class Generic(ModelTesterMixin, GenerationTesterMixin):
    """The tests of one configuration, the model with its head and without."""

    config = None

    def setUp(self):
        self.model_tester = ModelTester(self.config)


def family(preset, **fields):
    """The tests of a small model of a preset."""
    config = preset_config(preset, vocab_size=VOCABULARY, max_seq_len=64, n_layers=2, **fields)
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    members = {
        "config": SisaConfig(**dataclasses.asdict(config), **special),
        "all_model_classes": (SisaModel, SisaForCausalLM),
        "has_attentions": False,
    }
    skipped = {
        name: unittest.skip(reason)(getattr(Generic, name))
        for name, reason in DOES_NOT_APPLY.items()
    }
    return type(preset, (Generic, unittest.TestCase), members | skipped)


TestSisa = family("sisa-tiny-ds16")
TestTransformer = family("transformer-tiny")
TestFox = family("fox-tiny")
TestAlibi = family("alibi-tiny")
TestMamba2 = family("mamba2-tiny")
TestMamba3 = family("mamba3-tiny")
TestHybrid = family("hybrid-sisa-tiny", pattern="ma")
TestHybridHead = family("hybrid-head-tiny")


class TestLlama(Generic, unittest.TestCase):
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    all_model_classes = (LlamaModel, LlamaForCausalLM)
