"""The models in transformers' interface: folders, padding, generation, training."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import sisa_model as sm
from sisa_kernels.testing import relative

transformers = pytest.importorskip("transformers", minversion="5.24")
from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402

from sisa_model.interop.transformers import SisaConfig, SisaForCausalLM  # noqa: E402

FAMILIES = [
    "sisa-tiny-ds16",
    "transformer-tiny",
    "fox-tiny",
    "alibi-tiny",
    "mamba2-tiny",
    "mamba3-tiny",
    "hybrid-sisa-tiny",
]
CACHED = [*FAMILIES, "hybrid-head-tiny"]


def small(preset="sisa-tiny-ds16", **overrides):
    torch.manual_seed(0)
    return sm.build(preset, **{"max_seq_len": 64, **overrides})


def wrapped(preset="sisa-tiny-ds16", **overrides):
    model = small(preset, **overrides)
    return SisaForCausalLM(SisaConfig(**dataclasses.asdict(model.config)), model).eval()


def tokens(B=3, L=12, seed=1):
    return torch.randint(256, (B, L), generator=torch.Generator().manual_seed(seed))


def test_the_core_imports_no_transformers():
    code = "import sys, sisa_model, sisa_model.cli; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("preset", FAMILIES)
@torch.no_grad()
def test_a_folder_serves_both_libraries(preset, tmp_path):
    model = small(preset)
    sm.save(model, tmp_path / "ours")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert isinstance(theirs, SisaForCausalLM)
    assert isinstance(AutoConfig.from_pretrained(tmp_path / "ours"), SisaConfig)
    assert torch.equal(theirs(tokens(), use_cache=False).logits, model(tokens()))
    theirs.save_pretrained(tmp_path / "theirs")
    back = sm.load(tmp_path / "theirs")
    assert back.config == model.config
    assert torch.equal(back(tokens()), model(tokens()))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")
    assert torch.equal(again(tokens(), use_cache=False).logits, model(tokens()))
    assert {f"model.{name}" for name in model.state_dict()} == {
        name for name, _ in again.named_parameters()
    }


@torch.no_grad()
def test_dtype_casts_all_but_what_stays_fp32(tmp_path):
    model = small("hybrid-sisa-tiny")
    sm.save(model, tmp_path)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    dtypes = {name: p.dtype for name, p in model.bfloat16().named_parameters()}
    assert {name.removeprefix("model."): p.dtype for name, p in half.named_parameters()} == dtypes
    assert set(dtypes.values()) == {torch.bfloat16, torch.float32}
    assert torch.equal(half(tokens()).logits, model(tokens()))
    half.save_pretrained(tmp_path / "half")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half").dtype == torch.bfloat16


def test_a_shard_a_state_dict_and_a_wrapped_model(tmp_path):
    model = wrapped()
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    shards = AutoModelForCausalLM.from_pretrained(tmp_path)
    given = SisaForCausalLM.from_pretrained(
        None, config=model.config, state_dict=model.state_dict()
    )
    fresh = SisaForCausalLM(model.config)
    assert not torch.equal(fresh(tokens()).logits, model(tokens()).logits)
    fresh.load_state_dict(model.state_dict())
    for other in (shards, given, fresh):
        assert torch.equal(other(tokens()).logits, model(tokens()).logits)


def test_one_matrix_is_embedding_and_output(tmp_path):
    model = wrapped()
    assert sum(p.numel() for p in model.parameters()) == sm.count_parameters(model.model)
    assert model.get_input_embeddings() is model.model.embed
    assert model.get_output_embeddings().weight is model.model.embed.weight
    before = model(tokens()).logits
    model.resize_token_embeddings(300)
    after = model(tokens()).logits
    assert after.shape[-1] == 300
    torch.testing.assert_close(after[..., :257], before)
    model.save_pretrained(tmp_path)
    assert torch.equal(sm.load(tmp_path)(tokens()), after)


@pytest.mark.parametrize("preset", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right", "between"])
@torch.no_grad()
def test_padding_changes_no_real_token(preset, side):
    model, ids, lengths = wrapped(preset), tokens(), [12, 5, 1]
    padded, mask = torch.full((3, 12), 256), torch.zeros(3, 12, dtype=torch.int64)
    for row, n in enumerate(lengths):
        places = (
            {"left": range(12 - n, 12), "right": range(n), "between": range(0, 2 * n, 2)}[side]
            if n < 6
            else range(12)
        )
        padded[row, places], mask[row, places] = ids[row, :n], 1
    logits = model(padded, attention_mask=mask).logits
    for row, n in enumerate(lengths):
        torch.testing.assert_close(
            logits[row, mask[row].bool()],
            model(ids[row : row + 1, :n]).logits[0],
            rtol=1e-5,
            atol=1e-5,
        )
    assert torch.equal(model(ids, attention_mask=torch.ones_like(ids)).logits, model(ids).logits)


@torch.no_grad()
def test_padding_in_mode_clamped_and_past_max_seq_len():
    model, ids = wrapped(mode="clamped"), tokens(2, 60)
    for layer in model.model.layers:
        layer.attn.decay_bias.fill_(0.0)  # 40 nats over 60 tokens: the clamp binds
    mask = torch.ones(2, 70)
    mask[0, :30], mask[1, :10] = 0, 0
    padded = F.pad(ids, (10, 0))
    logits = model(padded, attention_mask=mask).logits
    alone = model(padded[:1, 30:]).logits
    torch.testing.assert_close(logits[:1, 30:], alone, rtol=1e-5, atol=1e-5)
    together = wrapped(mode="exact")
    together.load_state_dict(model.state_dict())
    assert relative(together(padded[:1, 30:]).logits, alone.double()) > 1e-4


@pytest.mark.parametrize("preset", CACHED)
def test_greedy_generation_is_ours(preset):
    model, ids = wrapped(preset), tokens()
    ours = sm.generate(model.model, ids, 20)
    for use_cache in (True, False):
        assert torch.equal(
            model.generate(ids, max_new_tokens=20, do_sample=False, use_cache=use_cache), ours
        )
    seen = []
    hook = model.model.embed.register_forward_hook(
        lambda module, args, y: seen.append(args[0].shape[1])
    )
    model.generate(ids, max_new_tokens=4, do_sample=False)
    hook.remove()
    assert seen == [12, 1, 1, 1], "each token is run once"


@pytest.mark.parametrize("preset", CACHED)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_padded_prompts_are_continued_as_alone(preset, side, use_cache):
    model, ids, lengths = wrapped(preset), tokens(), [12, 1, 7]
    mask = torch.stack([(torch.arange(12) < n).long() for n in lengths])
    mask = mask.flip(1) if side == "left" else mask
    together = model.generate(
        ids, attention_mask=mask, max_new_tokens=10, do_sample=False, use_cache=use_cache
    )
    for row, real in enumerate(mask.bool()):
        alone = sm.generate(model.model, ids[row, real][None], 10)
        assert torch.equal(together[row, 12:], alone[0, -10:])


@pytest.mark.parametrize("preset", CACHED)
def test_beams_and_a_cache_passed_on(preset):
    model, ids = wrapped(preset), tokens()
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    settings = {"attention_mask": mask, "max_new_tokens": 8, "num_beams": 3, "do_sample": False}
    assert torch.equal(
        model.generate(ids, **settings), model.generate(ids, use_cache=False, **settings)
    )
    first = model.generate(ids, max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
    whole = model.generate(ids, max_new_tokens=9, do_sample=False)
    assert torch.equal(
        model.generate(first.sequences, max_new_tokens=4, do_sample=False, cache=first.cache), whole
    )


def test_without_a_cache_generate_runs_all_again_and_says_so():
    model = wrapped(mode="clamped")
    with pytest.warns(
        UserWarning,
        match=f"generate runs every token again for each new one: {model.model.cache_refusal()}",
    ):
        out = model.generate(tokens(), max_new_tokens=5, do_sample=False)
    assert torch.equal(out, sm.generate(model.model, tokens(), 5, use_cache=False))
    with pytest.raises(ValueError, match="use_cache must be False for this model"):
        model(tokens(), use_cache=True)


@pytest.mark.parametrize("preset", FAMILIES)
def test_checkpointing_gives_the_same_loss_and_gradients(preset):
    results = []
    for every in (None, 1, 2):
        model, calls = wrapped(preset).train(), []
        if every:
            model.activation_checkpointing_enable(every_n_layers=every)
            assert model.is_activation_checkpointing
        first = model.model.layers[0]
        first.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        inner = first.attn if hasattr(first, "attn") else first.mixer
        inner.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        loss = model(tokens(), labels=tokens()).loss
        loss.backward()
        results.append(
            (len(calls), loss.detach(), {name: p.grad for name, p in model.named_parameters()})
        )
    plain, *others = results
    for calls, loss, grads in others:
        assert calls == plain[0] + 1, "the layer's inside runs again in the backward pass"
        assert torch.equal(loss, plain[1])
        torch.testing.assert_close(grads, plain[2])
    model.activation_checkpointing_disable()
    assert not model.is_activation_checkpointing


def test_loss_is_shifted_masked_and_normalised():
    model, ids = wrapped(), tokens()
    labels = ids.masked_fill(
        torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < 0.3, -100
    )
    logits = model(ids).logits
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(model(ids, labels=labels).loss, expected)
    summed = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(model(ids, labels=labels, num_items_in_batch=7).loss, summed / 7)
    loss, logits = model(ids, labels=labels, return_dict=False)[:2]
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, logits[:, -2:])


def test_loss_is_that_without_padding():
    model, ids = wrapped(), tokens()[:1]
    padded, mask = F.pad(ids, (3, 0)), F.pad(torch.ones_like(ids), (3, 0))
    expected = model(ids, labels=ids).loss
    for turn in (0, -3):  # on the left, on the right
        ids, real = padded.roll(turn, 1), mask.roll(turn, 1)
        torch.testing.assert_close(
            model(ids, attention_mask=real, labels=ids.masked_fill(real == 0, -100)).loss, expected
        )
    with torch.no_grad():  # behind a cache the mask is longer than the labels
        first = model(padded[:, :6], attention_mask=mask[:, :6], use_cache=True)
        rest = model(padded[:, 6:], attention_mask=mask, cache=first.cache, labels=padded[:, 6:])
    torch.testing.assert_close(rest.loss, F.cross_entropy(rest.logits[0, :-1], padded[0, 7:]))


def test_trainer_steps_saves_and_resumes(tmp_path):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    rows = [
        {"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)}
        for row in tokens(8)
    ]

    def run(steps, resume=None):
        arguments = TrainingArguments(
            tmp_path,
            max_steps=steps,
            save_steps=1,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            activation_checkpointing=True,
            use_cpu=True,
            disable_tqdm=True,
            report_to=[],
        )
        model = wrapped()
        trainer = Trainer(model, arguments, train_dataset=rows)
        trainer.train(resume_from_checkpoint=resume)
        return model

    straight = run(3)
    assert not torch.equal(
        straight.model.layers[0].attn.lambda_raw, wrapped().model.layers[0].attn.lambda_raw
    )
    resumed = run(3, str(tmp_path / "checkpoint-1"))
    for name, p in straight.named_parameters():
        torch.testing.assert_close(p, resumed.get_parameter(name), rtol=1e-5, atol=1e-6)
    assert torch.equal(
        sm.load(tmp_path / "checkpoint-3")(tokens()), resumed.eval()(tokens()).logits
    )


def test_configuration_is_modelconfig_checked(tmp_path):
    fields = dataclasses.asdict(small().config)
    config = SisaConfig(**fields, pad_token_id=3)
    assert (config.hidden_size, config.num_hidden_layers, config.max_position_embeddings) == (
        64,
        2,
        64,
    )
    assert (
        SisaConfig(hidden_size=128, **{k: v for k, v in fields.items() if k != "d_model"}).d_model
        == 128
    )
    with pytest.raises(ValueError, match="n_heads must be a divisor of d_model = 64, got 3"):
        SisaConfig(**{**fields, "n_heads": 3})
    with pytest.raises(
        ValueError, match=r"SisaConfig must be given ModelConfig's fields: .*family"
    ):
        SisaConfig(d_model=64)
    SisaForCausalLM(config).save_pretrained(tmp_path)
    assert (
        AutoModelForCausalLM.from_pretrained(tmp_path, mode="clamped").model.layers[0].attn.mode
        == "clamped"
    )
    assert AutoConfig.from_pretrained(tmp_path).model_config() == small().config
    assert AutoConfig.from_pretrained(tmp_path).pad_token_id == 3


def test_bad_folders_and_arguments_are_named(tmp_path):
    model = wrapped()
    model.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**fields, "d_state": 32}))
    with pytest.raises(ValueError, match=r"does not hold this sisa model: .*W_B"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**fields, "model_type": "llama"}))
    with pytest.raises(ValueError, match="its model_type is not 'sisa'"):
        sm.load(tmp_path)
    ids = tokens()
    with torch.no_grad():
        cache = model(ids, use_cache=True).cache
        for error, message, kwargs in [
            (
                ValueError,
                r"attention_mask must have shape \[3, 12\], got \[3, 11\]",
                {"attention_mask": torch.ones(3, 11)},
            ),
            (
                ValueError,
                "attention_mask must leave each row at least one token",
                {"attention_mask": torch.zeros(3, 12)},
            ),
            (
                ValueError,
                r"attention_mask must have shape \[3, 24\]",
                {"attention_mask": torch.ones(3, 12), "cache": cache},
            ),
            (
                ValueError,
                "attention_mask must be 1 for all tokens behind the 12 in the cache",
                {"attention_mask": torch.arange(24).expand(3, -1) < 20, "cache": cache},
            ),
        ]:
            with pytest.raises(error, match=message):
                model(ids, **kwargs)
