"""PEFT's adapters and TRL's trainer on the models, and the parameter groups of an optimizer."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import sisa_model as sm
from sisa_kernels.testing import relative
from sisa_model.data.tokenizer import Encoder
from sisa_model.models.linear import PackedLinear
from sisa_model.runs.config import TrainConfig, resolve
from sisa_model.training.optimizer import make_optimizer
from tests.support.models import tokens

transformers = pytest.importorskip("transformers", minversion="5.24")
peft = pytest.importorskip("peft")
from sisa_model.hf import SisaConfig, SisaForCausalLM, parameter_groups  # noqa: E402

FAMILIES = [
    "sisa-tiny-ds16",
    "transformer-tiny",
    "fox-tiny",
    "alibi-tiny",
    "mamba2-tiny",
    "mamba3-tiny",
    "hybrid-sisa-tiny",
    "hybrid-head-tiny",
]


def wrapped(preset):
    torch.manual_seed(0)
    model = sm.build(preset, max_seq_len=64)
    return SisaForCausalLM(SisaConfig(**vars(model.config)), model).eval()


def projections(model):
    """The last names of all linear layers but the output's, which is the embedding."""
    found = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return sorted({name.split(".")[-1] for name in found} - {"lm_head"})


def lora(**settings):
    return peft.LoraConfig(task_type="CAUSAL_LM", **{"target_modules": "all-linear", **settings})


def ia3(preset):
    names = projections(wrapped(preset))
    inputs = [name for name in names if name == "w_down"]
    return peft.IA3Config(task_type="CAUSAL_LM", target_modules=names, feedforward_modules=inputs)


def check_adapters(preset, config, folder):
    """They all learn, are saved and loaded, and merged give the same; returns what was saved."""
    model, ids = wrapped(preset), tokens()
    before = model(ids).logits.detach()
    adapted = peft.get_peft_model(model, config)
    torch.manual_seed(1)
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    for p in trained.values():
        p.data.add_(0.05 * torch.randn_like(p))
    adapted.train()(input_ids=ids, labels=ids).loss.backward()
    for name, p in trained.items():
        assert p.grad is not None, name
        assert p.grad.any(), name
    adapted.eval()
    with torch.no_grad():
        after = adapted(input_ids=ids).logits
        assert relative(after, before.double()) > 1e-4  # of W_alpha alone, which is the least
        adapted.save_pretrained(folder)
        saved = load_file(folder / "adapter_model.safetensors")
        assert len(saved) == len(trained)
        back = peft.PeftModel.from_pretrained(wrapped(preset), folder).eval()
        assert torch.equal(back(input_ids=ids).logits, after)
        assert relative(back.merge_and_unload()(ids).logits, after.double()) < 3e-6
    return saved


KINDS = {
    "lora": lambda preset: lora(),
    "dora": lambda preset: lora(use_dora=True),
    "ia3": ia3,
    "modules_to_save": lambda preset: lora(modules_to_save=["embed", "final_norm"]),
}


@pytest.mark.parametrize("preset", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_of_all_projections(kind, preset, tmp_path):
    check_adapters(preset, KINDS[kind](preset), tmp_path)


@torch.no_grad()
def test_a_merged_embedding_leaves_the_output_matrix_as_it_was(tmp_path):
    model, ids = wrapped("sisa-tiny-ds16"), tokens()
    head = model.lm_head.weight.clone()
    adapted = peft.get_peft_model(model, lora(modules_to_save=["embed"]))
    adapted.base_model.model.model.embed.modules_to_save.default.weight.mul_(2)
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path)
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(back.lm_head.weight, head)
    assert torch.equal(back.model.embed.weight, 2 * head)
    assert torch.equal(back(ids).logits, merged.eval()(ids).logits)


@pytest.mark.parametrize("name", projections(wrapped("hybrid-sisa-tiny")))
@pytest.mark.parametrize("use_dora", [False, True])
def test_an_adapter_of_a_projection_by_name(name, use_dora, tmp_path):
    preset = "hybrid-sisa-tiny"
    saved = check_adapters(preset, lora(target_modules=[name], use_dora=use_dora), tmp_path)
    places = [n for n, _ in wrapped(preset).named_modules() if n.endswith(f".{name}")]
    assert len(saved) == len(places) * (3 if use_dora else 2)


def test_an_adapter_of_hybrid_heads_finds_no_place_without_weights(tmp_path):
    saved = check_adapters("hybrid-head-tiny", lora(target_modules=["W_O"]), tmp_path)
    assert len(saved) == 4, "one output matrix in each of two layers"


def test_a_packed_projection_with_an_adapter_is_called_by_itself():
    adapted = peft.get_peft_model(wrapped("sisa-tiny-ds16"), lora(target_modules=["W_K"]))
    packed = next(m for m in adapted.modules() if isinstance(m, PackedLinear) and "W_K" in m.sizes)
    calls = []
    packed.W_K.register_forward_hook(lambda *_: calls.append(1))
    adapted(input_ids=tokens())
    assert calls == [1]


def losses_of_steps(model, steps=20):
    ids = tokens(4, 24)
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-2, weight_decay=0.1))
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_twenty_steps_of_lora_learn():
    adapted = peft.get_peft_model(wrapped("sisa-tiny-ds16"), lora(r=16, lora_alpha=32))
    before = {name: p.clone() for name, p in adapted.named_parameters() if not p.requires_grad}
    losses = losses_of_steps(adapted)
    assert losses[-1] < losses[0] - 0.3
    assert all(torch.equal(p, before[n]) for n, p in adapted.named_parameters() if n in before)


@pytest.mark.slow
@pytest.mark.parametrize(("adapters", "packing"), [(True, False), (False, True)])
def test_twenty_steps_of_sft_learn(adapters, packing, tmp_path):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    Encoder(None).save_pretrained(tmp_path)
    rows = {"text": [f"{n} green bottles on the wall; " * 3 for n in range(64)]}
    model = wrapped("sisa-tiny-ds16").train()
    arguments = trl.SFTConfig(
        tmp_path,
        max_steps=20,
        save_steps=20,
        logging_steps=1,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        packing=packing,
        max_length=64,
        bf16=False,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    groups = parameter_groups(model, lr=1e-2, weight_decay=0.1)
    settings = (
        {"peft_config": lora()} if adapters else {"optimizers": (torch.optim.AdamW(groups), None)}
    )
    trainer = trl.SFTTrainer(
        model,
        arguments,
        train_dataset=datasets.Dataset.from_dict(rows),
        processing_class=transformers.AutoTokenizer.from_pretrained(tmp_path),
        **settings,
    )
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == 20
    assert losses[-1] < 0.5 * losses[0]
    names = {path.name for path in (tmp_path / "checkpoint-20").iterdir()}
    assert {"adapter_model.safetensors" if adapters else "model.safetensors"} <= names
    if not adapters:
        saved = sm.load(tmp_path / "checkpoint-20")
        ids = tokens()
        with torch.no_grad():
            assert torch.equal(saved(ids), trainer.model.eval()(ids).logits)


UNDECAYED = {
    "sisa-tiny-ds16": (),
    "mamba2-tiny": ("dt_bias", "A_log", "D"),
    "mamba3-tiny": ("dt_bias", "D"),
    "hybrid-sisa-tiny": ("dt_bias", "A_log", "D"),
}


@pytest.mark.parametrize("preset", UNDECAYED)
def test_groups_are_those_of_a_run(preset):
    model = wrapped(preset)
    names = {id(p): name for name, p in model.named_parameters()}
    found = {}
    for group in parameter_groups(model, lr=1e-3, weight_decay=0.1):
        for p in group["params"]:
            assert id(p) not in found
            found[id(p)] = (group["lr"], group["weight_decay"])
    assert found.keys() == names.keys(), "every parameter is in one group"
    for key, name in names.items():
        last = name.split(".")[-1]
        if last == "lambda_raw":
            assert found[key] == (pytest.approx(1e-4), 0.0)
        else:
            assert found[key] == (1e-3, 0.0 if last in UNDECAYED[preset] else 0.1)
    config = resolve(TrainConfig(preset=preset, task="recall", lr=1e-3))
    for group in make_optimizer(model.model, config).param_groups:
        for p in group["params"]:
            rate, decay = found[id(p)]
            assert group["lr_scale"] * config.lr == pytest.approx(rate)
            assert group["weight_decay"] == decay


def test_groups_hold_what_is_trained_alone():
    adapted = peft.get_peft_model(wrapped("hybrid-sisa-tiny"), lora(target_modules=["W_O"]))
    (group,) = parameter_groups(adapted, lr=1e-3, weight_decay=0.1)
    assert {id(p) for p in group["params"]} == {
        id(p) for p in adapted.parameters() if p.requires_grad
    }
    adapted.base_model.model.model.layers[2].attn.lambda_raw.requires_grad_(True)
    _, lambdas = parameter_groups(adapted, lr=1e-3, weight_decay=0.1, lambda_lr_scale=5)
    assert (len(lambdas["params"]), lambdas["lr"], lambdas["weight_decay"]) == (1, 5e-3, 0.0)
