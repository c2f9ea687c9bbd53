"""Every way of saving gives every tensor back, and a folder says by itself what is in it."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, load_model, save_file, save_model
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)

import sisa_model as sm
from sisa_kernels.testing import relative
from sisa_model.data.tokenizer import Encoder
from sisa_model.models.checkpoint import CODE_FILE
from sisa_model.training.artifacts import write_final
from tests.support.models import tokens

transformers = pytest.importorskip("transformers", minversion="5.24")
accelerate = pytest.importorskip("accelerate")
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from sisa_model.hf import SisaConfig, SisaForCausalLM  # noqa: E402

FAMILIES = [
    "sisa-tiny-ds16",
    "sisa-tiny-ds32-bilinear",
    "sisa-tiny-ds32-lambdashared",
    "transformer-tiny",
    "fox-tiny",
    "alibi-tiny",
    "mamba2-tiny",
    "mamba3-tiny",
    "hybrid-sisa-tiny",
    "hybrid-head-tiny",
]
FP32_IN_BF16 = ("lambda_raw", "dt_bias", "A_log", ".D", "B_bias", "C_bias")


def plain(preset, seed=0):
    torch.manual_seed(seed)
    return sm.build(preset, max_seq_len=64)


def wrapped(preset, seed=0):
    model = plain(preset, seed)
    return SisaForCausalLM(SisaConfig(**dataclasses.asdict(model.config)), model).eval()


def values(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same_values(found, expected):
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert found[name].dtype == x.dtype, name
        assert torch.equal(found[name], x), name


def assert_same(found, model):
    """Bit for bit, by name, in dtype, tied, and in what they compute."""
    assert_same_values(values(found), values(model))
    if isinstance(found, SisaForCausalLM):
        assert found.lm_head.weight is found.model.embed.weight
        with torch.no_grad():
            ids = tokens()
            assert torch.equal(found.eval()(ids).logits, model.eval()(ids).logits)


# A way of saving: (model in transformers, folder, preset) -> (what came back, what it must equal).


def by_save(model, folder, preset):
    used = plain(preset)
    sm.generate(used, tokens(1, 4), 2)  # after which memory may lie otherwise
    sm.save(used, folder)
    return sm.load(folder), plain(preset)


def by_save_into_transformers(model, folder, preset):
    sm.save(plain(preset), folder)
    return AutoModelForCausalLM.from_pretrained(folder), model


def by_save_pretrained(model, folder, preset):
    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder), model


def by_save_pretrained_into_load(model, folder, preset):
    model.save_pretrained(folder)
    return sm.load(folder), plain(preset)


def by_shards(model, folder, preset):
    model.save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return AutoModelForCausalLM.from_pretrained(folder), model


def by_shards_into_load(model, folder, preset):
    model.save_pretrained(folder, max_shard_size="100KB")
    return sm.load(folder), plain(preset)


def by_backbone(model, folder, preset):
    model.save_pretrained(folder)
    backbone = AutoModel.from_pretrained(folder)
    assert_same_values(values(backbone), values(model.model))
    backbone.save_pretrained(folder / "backbone")
    return AutoModelForCausalLM.from_pretrained(folder / "backbone"), model


def by_bf16(model, folder, preset):
    model.bfloat16().save_pretrained(folder)
    for name, p in model.named_parameters():
        assert (p.dtype == torch.float32) == name.endswith(FP32_IN_BF16), name
    back = AutoModelForCausalLM.from_pretrained(folder)
    assert_same(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16), model)
    return back, model


def by_torch_save(model, folder, preset):
    torch.save(model.state_dict(), folder / "state.pt")
    fresh = wrapped(preset, seed=1)
    fresh.load_state_dict(torch.load(folder / "state.pt"))
    return fresh, model


def by_pickle(model, folder, preset):
    torch.save(model, folder / "model.pt")
    return torch.load(folder / "model.pt", weights_only=False), model


def by_safetensors(model, folder, preset):
    model.generate(tokens(1, 4), max_new_tokens=2, do_sample=False)
    save_model(model, folder / "model.safetensors")
    fresh = wrapped(preset, seed=1)
    load_model(fresh, folder / "model.safetensors")
    return fresh, model


def by_accelerator_state(model, folder, preset):
    accelerator = accelerate.Accelerator(cpu=True)
    fresh = accelerator.prepare(wrapped(preset))
    accelerator.save_state(folder)
    with torch.no_grad():
        for p in fresh.parameters():
            p.add_(1)
    accelerator.load_state(folder)
    return fresh, model


def by_accelerator_model(model, folder, preset):
    model.generate(tokens(1, 4), max_new_tokens=2, do_sample=False)
    accelerate.Accelerator(cpu=True).save_model(model, folder)
    fresh = wrapped(preset, seed=1)
    accelerate.load_checkpoint_in_model(fresh, str(folder))
    return fresh, model


def by_dispatch(model, folder, preset):
    model.save_pretrained(folder)
    with accelerate.init_empty_weights():
        empty = AutoModelForCausalLM.from_config(model.config)
    empty.tie_weights()
    return accelerate.load_checkpoint_and_dispatch(empty, folder, {"": "cpu"}), model


def by_dcp(model, folder, preset):
    dcp.save(get_model_state_dict(model), checkpoint_id=folder, no_dist=True)
    fresh = wrapped(preset, seed=1)
    state = get_model_state_dict(fresh)
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    set_model_state_dict(fresh, state)
    return fresh, model


def by_dcp_of_plain(model, folder, preset):
    dcp.save(get_model_state_dict(plain(preset)), checkpoint_id=folder, no_dist=True)
    fresh = plain(preset, seed=1)
    state = get_model_state_dict(fresh)
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    set_model_state_dict(fresh, state)
    return fresh, plain(preset)


WAYS = [way for name, way in list(globals().items()) if name.startswith("by_")]
COLLECTING = (by_accelerator_model, by_dispatch)  # accelerate collects garbage, for a second each
TABLE = [
    pytest.param(way, preset, id=f"{way.__name__}-{preset}", marks=marks)
    for way in WAYS
    for preset in FAMILIES
    for marks in [[pytest.mark.slow] if way in COLLECTING and preset != FAMILIES[0] else []]
]


@pytest.mark.parametrize(("way", "preset"), TABLE)
def test_every_way_gives_every_tensor_back(way, preset, tmp_path):
    assert_same(*way(wrapped(preset), tmp_path, preset))


@pytest.mark.parametrize("preset", FAMILIES)
def test_parameters_state_and_file_have_the_same_names(preset, tmp_path):
    model = wrapped(preset)
    names = dict(model.named_parameters()).keys()
    model.save_pretrained(tmp_path / "theirs")
    assert load_file(tmp_path / "theirs" / "model.safetensors").keys() == names
    assert model.state_dict().keys() == {*names, "lm_head.weight"}
    every = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    assert sorted(every) == sorted(model.state_dict())
    body = plain(preset)
    sm.save(body, tmp_path / "ours")
    own = dict(body.named_parameters()).keys()
    assert load_file(tmp_path / "ours" / "model.safetensors").keys() == own
    assert body.state_dict().keys() == own
    assert names == {f"model.{name}" for name in own}


@pytest.mark.parametrize("preset", FAMILIES)
@torch.no_grad()
def test_weights_kept_elsewhere_are_there_when_they_are_used(preset, tmp_path):
    model, ids = wrapped(preset), tokens()
    expected = model(ids).logits
    model.save_pretrained(tmp_path)
    folder, layers = str(tmp_path / "offloaded"), {"model.layers": "disk"}
    places = {"model.embed": "cpu", "lm_head": "cpu", "model.final_norm": "cpu", **layers}
    on_disk = AutoModelForCausalLM.from_pretrained(
        tmp_path, device_map=places, offload_folder=folder
    )
    assert all(p.is_meta for p in on_disk.model.layers.parameters())
    for found in (on_disk, accelerate.cpu_offload(wrapped(preset), "cpu")):
        # Each projection is multiplied by itself, which rounds otherwise than one product of all.
        assert relative(found(ids).logits, expected.double()) < 3e-6


@pytest.mark.parametrize("preset", FAMILIES)
@torch.no_grad()
def test_a_model_of_the_meta_device_is_initialised_whole(preset):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(wrapped(preset).config)
    model.to_empty(device="cpu")
    for p in model.parameters():
        p.fill_(torch.nan)
    torch.manual_seed(3)
    model.init_weights()
    expected = plain(preset)
    torch.manual_seed(3)
    expected.reset_parameters()
    assert_same_values(values(model.model), values(expected))
    assert model.lm_head.weight is model.model.embed.weight
    std = expected.config.init_std
    for name, p in model.named_parameters():
        if name.endswith("norm.weight"):
            assert (p == 1).all()
        elif name.endswith(("embed.weight", "W_Q.weight", "W_O.weight", "in_proj.weight")):
            assert abs(p.std() / std - 1) < 0.05, name


def quantised(library):
    pytest.importorskip(library)
    if library == "bitsandbytes":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    from torchao.quantization import Int8WeightOnlyConfig

    return transformers.TorchAoConfig(Int8WeightOnlyConfig())


@pytest.mark.slow
@pytest.mark.parametrize("library", ["bitsandbytes", "torchao"])
@torch.no_grad()
def test_weights_in_eight_bits_are_saved_and_loaded(library, tmp_path):
    model, ids = wrapped("hybrid-sisa-tiny"), tokens()
    model.save_pretrained(tmp_path / "whole")
    settings = quantised(library)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", quantization_config=settings)
    assert 0 < relative(found(ids).logits, model(ids).logits.double()) < 0.1
    found.save_pretrained(tmp_path / "quantised")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "quantised")
    assert torch.equal(back(ids).logits, found(ids).logits)


@torch.no_grad()
def test_what_is_loaded_is_not_drawn_again():
    state = wrapped("hybrid-sisa-tiny").state_dict()
    missing = [name for name in state if name.startswith("model.layers.1.")]
    for name in missing:
        del state[name]
    config = wrapped("hybrid-sisa-tiny").config
    found = SisaForCausalLM.from_pretrained(None, config=config, state_dict=state)
    for name, x in found.state_dict().items():
        assert x.isfinite().all()
        assert name in missing or torch.equal(x, state[name])
    assert found.get_parameter("model.layers.1.mixer.D").eq(1).all()


def test_an_output_matrix_of_its_own_is_kept(tmp_path):
    config = wrapped("sisa-tiny-ds16").config
    config.tie_word_embeddings = False
    model = SisaForCausalLM(config).eval()
    assert not torch.equal(model.lm_head.weight, model.model.embed.weight)
    assert abs(model.lm_head.weight.std() / config.init_std - 1) < 0.05
    model.save_pretrained(tmp_path)
    back = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same_values(values(back), values(model))
    assert torch.equal(back(tokens()).logits, model(tokens()).logits)
    with pytest.raises(ValueError, match="its output matrix is not the embedding"):
        sm.load(tmp_path)


@pytest.mark.parametrize("preset", ["sisa-tiny-ds16", "mamba2-tiny"])
def test_files_of_version_0_1_load(preset, tmp_path):
    """By names without "model.", and a configuration that names no code."""
    model = wrapped(preset)
    state = {name: x.clone() for name, x in plain(preset).state_dict().items()}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    fields = dataclasses.asdict(plain(preset).config)
    fields.pop("weights", None)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "sisa", **fields}))
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path), model)
    assert_same_values(values(sm.load(tmp_path)), values(plain(preset)))
    fresh = wrapped(preset, seed=1)
    fresh.load_state_dict(state)  # as Trainer does, which resumes
    assert_same(fresh, model)


def test_other_tensors_are_refused_by_name(tmp_path):
    model = wrapped("sisa-tiny-ds16")
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    norm = state.pop("model.final_norm.weight")
    for other, message in (
        ({}, "missing model.final_norm.weight"),
        ({"model.final_norm.weight": norm, "bias": norm.clone()}, "unknown bias"),
        ({"model.final_norm.weight": norm[1:].clone()}, r"final_norm.weight is \[63\], .* \[64\]"),
    ):
        save_file({**state, **other}, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=message):
            AutoModelForCausalLM.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    shard = sorted((tmp_path / "shards").glob("*.safetensors"))[0]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"no weights at {shard}"):
        sm.load(tmp_path / "shards")
    (tmp_path / "shards" / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ValueError, match="is not an index of shards"):
        sm.load(tmp_path / "shards")
    with pytest.raises(TypeError, match="got SisaForCausalLM: call its save_pretrained"):
        sm.save(model, tmp_path / "other")


def test_a_sharded_model_of_fsdp_saves_and_loads(tmp_path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    def sharded(model):
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rank", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for preset in ("sisa-tiny-ds16", "hybrid-head-tiny"):
            dcp.save(get_model_state_dict(sharded(wrapped(preset))), checkpoint_id=tmp_path)
            fresh = sharded(wrapped(preset, seed=1))
            state = get_model_state_dict(fresh)
            dcp.load(state, checkpoint_id=tmp_path)
            set_model_state_dict(fresh, state)
            options = StateDictOptions(full_state_dict=True, cpu_offload=True)
            whole = get_model_state_dict(fresh, options=options)
            assert_same_values(whole, dict(wrapped(preset).state_dict()))
    finally:
        dist.destroy_process_group()


def test_trainer_resumes_from_a_checkpoint_of_version_0_1(tmp_path):
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": row, "labels": row} for row in tokens(8)]

    def run(steps, resume=None):
        arguments = TrainingArguments(
            tmp_path,
            max_steps=steps,
            save_steps=1,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            use_cpu=True,
            disable_tqdm=True,
            report_to=[],
        )
        model = wrapped("hybrid-sisa-tiny", seed=0 if resume is None else 1)
        Trainer(model, arguments, train_dataset=rows).train(resume_from_checkpoint=resume)
        return model

    straight = run(2)
    weights = tmp_path / "checkpoint-1" / "model.safetensors"
    old = {name.removeprefix("model."): x for name, x in load_file(weights).items()}
    save_file(old, weights, metadata={"format": "pt"})
    resumed = run(2, str(tmp_path / "checkpoint-1"))
    torch.testing.assert_close(values(resumed), values(straight), rtol=1e-5, atol=1e-6)
    assert_same_values(values(sm.load(tmp_path / "checkpoint-2")), values(resumed.model))


ODD_TEXT = 'a b  "héllo"\n\twörld 🎉 \x00\x7f\xa0\xad'


def test_the_tokenizer_of_bytes_is_ours(tmp_path):
    encoder = Encoder(None)
    sm.save(plain("sisa-tiny-ds16"), tmp_path / "ours", encoder)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    model.save_pretrained(tmp_path / "again")
    assert model.generation_config.eos_token_id == 256
    for folder in ("ours", "again"):
        theirs = AutoTokenizer.from_pretrained(tmp_path / folder)
        every = "".join(map(chr, range(0x250))) + ODD_TEXT
        ids = theirs(every).input_ids
        assert ids == encoder.encode_text(every) == list(every.encode())
        assert theirs.decode(ids) == encoder.decode(ids) == every
        assert (len(theirs), theirs.eos_token_id, theirs.bos_token_id) == (257, 256, 256)
        assert theirs("a<|endoftext|>").input_ids == [97, 256]


@pytest.mark.parametrize("encoder", [Encoder(None), None])
def test_a_run_leaves_its_tokenizer_with_its_weights(encoder, tmp_path):
    model = plain("sisa-tiny-ds16")
    write_final(tmp_path, values(model), model.config, encoder)
    assert_same_values(values(sm.load(tmp_path / "final")), values(model))
    assert (tmp_path / "final" / "tokenizer.json").is_file() == (encoder is not None)


def test_the_code_of_a_folder_names_what_to_install(tmp_path, monkeypatch):
    wrapped("sisa-tiny-ds16").save_pretrained(tmp_path)
    code = (tmp_path / CODE_FILE).read_text()
    found = {}
    exec(code, found)
    assert found["SisaForCausalLM"] is SisaForCausalLM
    monkeypatch.setitem(sys.modules, "sisa_model.hf", None)
    with pytest.raises(ImportError, match=r"pip install 'sisa-attention\[hf\]'"):
        exec(code, {})


WITHOUT_US = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
assert not any(name.startswith("sisa") for name in sys.modules)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
model.save_pretrained(sys.argv[2])
print(model.generate(**tokenizer("ab", return_tensors="pt"), max_new_tokens=4, do_sample=False))
"""


def run_elsewhere(folder, *command):
    """Run Python in ``folder``, offline, with caches of its own."""
    settings = {"HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1"}
    path = os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env={**os.environ, **settings, "PYTHONPATH": path},
        check=True,
        capture_output=True,
        text=True,
    ).stdout


@pytest.mark.slow
def test_a_folder_loads_where_nobody_imported_the_package(tmp_path):
    model = plain("sisa-tiny-ds16")
    sm.save(model, tmp_path / "ours", Encoder(None))
    printed = run_elsewhere(tmp_path, "-c", WITHOUT_US, tmp_path / "ours", tmp_path / "again")
    expected = sm.generate(model, torch.tensor([[97, 98]]), 4)
    assert str(expected) in printed
    names = {path.name for path in (tmp_path / "again").iterdir()}
    assert {CODE_FILE, "tokenizer.json", "tokenizer_config.json"} <= names
    assert "transformers.py" not in names, "no copy of the package's own code"
    assert_same_values(values(sm.load(tmp_path / "again")), values(model))


@pytest.mark.slow
def test_lm_eval_scores_a_folder(tmp_path):
    pytest.importorskip("lm_eval")
    model = plain("sisa-tiny-ds16")
    sm.save(model, tmp_path / "ours", Encoder(None))
    rows = [{"q": f"{n} plus one is", "a": f" {n + 1}"} for n in range(3)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = {
        "task": "sums",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "loglikelihood",
        "doc_to_text": "{{q}}",
        "doc_to_target": "{{a}}",
        "metric_list": [{"metric": "perplexity"}],
    }
    (tmp_path / "sums.yaml").write_text(json.dumps(task))  # which is YAML, too
    given = f"pretrained={tmp_path / 'ours'},trust_remote_code=True"
    run_elsewhere(
        tmp_path,
        *("-m", "lm_eval", "--model", "hf", "--model_args", given, "--device", "cpu"),
        *("--tasks", "sums", "--include_path", tmp_path, "--output_path", tmp_path / "out"),
    )
    (path,) = (tmp_path / "out").rglob("results_*.json")
    found = json.loads(path.read_text())["results"]["sums"]["perplexity,none"]
    total = 0.0
    for row in rows:
        ids = torch.tensor([list(f"{row['q']}{row['a']}".encode())])
        asked = len(row["q"])
        with torch.no_grad():
            logs = model(ids)[0].log_softmax(-1)
        total += logs[asked - 1 : -1].gather(1, ids[0, asked:, None]).sum().item()
    assert found == pytest.approx(torch.tensor(-total / len(rows)).exp().item(), rel=1e-4)
