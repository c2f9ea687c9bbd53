"""SISA in other people's models: a Llama of transformers, and a plain module."""

import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sisa_model as sm
from sisa_kernels.testing import relative
from sisa_model.models.context import Context, rotary_tables

transformers = pytest.importorskip("transformers", minversion="5.24")
from transformers import (  # noqa: E402
    AutoModel,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from sisa_model.adapt import LlamaSisaAttention, SisaLlamaForCausalLM, replace_attention  # noqa: E402


def llama(attn="sdpa", **overrides):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.1,
        "attn_implementation": attn,
    }
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **overrides})).eval()


def adapted(lam=0.5, layers=None, attn="sdpa", **overrides):
    """A Llama whose importance term weighs in, with heads that forget within 2 tokens, or 30."""
    model = llama(attn, **overrides)
    replace_attention(model, 8, lam, layers)
    for module in model.modules():
        if isinstance(module, LlamaSisaAttention):
            module.decay_bias.data = torch.tensor([-0.9, -3.8])
    return model


def tokens(B=3, L=12):
    return torch.randint(97, (B, L), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("layers", [None, [1]])
@torch.no_grad()
def test_the_first_logits_are_the_old_ones(attn, layers):
    model, ids = llama(attn), tokens()
    before = model(ids).logits
    added = replace_attention(model, layers=layers)
    after = model(ids).logits
    assert 0 < (after - before).abs().max() <= 1e-3 * before.abs().max(), (
        "lambda 1e-4 on products of size 1 to 10"
    )
    found = [isinstance(layer.self_attn, LlamaSisaAttention) for layer in model.model.layers]
    assert found == [layers is None or index in layers for index in range(3)]
    assert len(added) == 6 * sum(found)
    strong = adapted(layers=layers, attn=attn)
    assert (strong(ids).logits - before).abs().max() > 1e-2 * before.abs().max()


@torch.no_grad()
def test_without_importance_it_is_llama_whatever_its_rope_and_head_width():
    scaled = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
    for overrides in (
        {"rope_parameters": scaled},
        {"head_dim": 32},
        {"attention_bias": True},
        {"num_key_value_heads": 4},
    ):
        model, ids = llama(**overrides), tokens(2, 40)
        before = model(ids).logits
        replace_attention(model, lam=1e-12)
        torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-4)


def test_every_new_parameter_learns():
    model, ids = llama().train(), tokens()
    model.model.requires_grad_(False)
    added = replace_attention(model)
    model(ids, labels=ids).loss.backward()
    attn = model.model.layers[0].self_attn
    assert all(p.grad.abs().sum(1).min() > 0 for p in attn.importance.parameters())
    assert all(p.grad is not None and p.grad.all() for p in (attn.decay_bias, attn.lambda_raw))
    assert {id(p) for p in model.model.parameters() if p.requires_grad} == {id(p) for p in added}
    before = [p.detach().clone() for p in added]
    torch.optim.AdamW(added, lr=0.1, weight_decay=0).step()
    assert all((a != b).any() for a, b in zip(before, added))


def test_autocast():
    model, ids = adapted(), tokens()
    expected = model(ids).logits
    with torch.autocast("cpu", torch.bfloat16):
        found = model(ids, labels=ids)
        assert model.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0).shape == (
            3,
            14,
        )
    # bf16 has 8 bits, and three layers round a few times each.
    assert (found.logits - expected).norm() / expected.norm() < 0.05
    found.loss.backward()
    assert model.model.layers[0].self_attn.lambda_raw.grad.all()


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("layers", [None, [0, 2], [1]])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_changes_no_real_token(attn, layers, side):
    model, ids, lengths = adapted(layers=layers, attn=attn), tokens(), [12, 5, 1]
    mask = torch.stack([(torch.arange(12) < n).long() for n in lengths])
    mask = mask.flip(1) if side == "left" else mask
    logits = model(ids, attention_mask=mask).logits
    for row, real in enumerate(mask.bool()):
        torch.testing.assert_close(
            logits[row, real], model(ids[row, real][None]).logits[0], rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("layers", [None, [0, 2], [1]])
@torch.no_grad()
def test_generation_over_a_cache(layers):
    model, ids = adapted(layers=layers), tokens()
    mask = torch.ones_like(ids)
    mask[1, :5], mask[2, :11] = 0, 0
    for settings in (
        {},
        {"num_beams": 3},
        {"prefill_chunk_size": 5, "attention_mask": torch.ones_like(ids)},
    ):
        settings = {
            "attention_mask": mask,
            "max_new_tokens": 12,
            "do_sample": False,
            "pad_token_id": 0,
            **settings,
        }
        plain = {name: value for name, value in settings.items() if name != "prefill_chunk_size"}
        assert torch.equal(
            model.generate(ids, **settings), model.generate(ids, use_cache=False, **plain)
        )
    whole, seen = model(ids).logits, []
    first = model(ids[:, :7], use_cache=True)
    rest = model(ids[:, 7:], cache=first.cache)
    torch.testing.assert_close(
        torch.cat((first.logits, rest.logits), 1), whole, rtol=1e-4, atol=1e-4
    )
    hook = model.model.embed_tokens.register_forward_hook(
        lambda module, args, y: seen.append(args[0].shape[1])
    )
    model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
    hook.remove()
    assert seen == [12, 1, 1]


@pytest.mark.parametrize("layers", [None, [1]])
@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_an_adapted_llama_is_saved_as_what_it_is(tied, layers, tmp_path):
    model, ids = adapted(layers=layers, tie_word_embeddings=tied), tokens()
    config = llama().config
    assert isinstance(model, SisaLlamaForCausalLM)
    assert type(config) is LlamaConfig
    model.save_pretrained(tmp_path)
    back = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(back) is SisaLlamaForCausalLM
    assert back.config.sisa_d_state == ([8, 8, 8] if layers is None else [0, 8, 0])
    expected = dict(model.named_parameters())
    assert dict(back.named_parameters()).keys() == expected.keys()
    assert all(torch.equal(p, expected[name]) for name, p in back.named_parameters())
    assert torch.equal(back(ids).logits, model(ids).logits)
    assert (back.lm_head.weight is back.model.embed_tokens.weight) == tied
    backbone = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(backbone(ids)[0], model.model(ids)[0])
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(back.generate(ids, **settings), model.generate(ids, **settings))
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    attn = half.model.layers[1].self_attn
    assert (attn.lambda_raw.dtype, attn.decay_bias.dtype) == (torch.float32, torch.bfloat16)
    assert torch.equal(attn.lambda_raw, model.model.layers[1].self_attn.lambda_raw)
    found = {}
    exec((tmp_path / "modeling_sisa.py").read_text(), found)
    assert found["SisaLlamaForCausalLM"] is SisaLlamaForCausalLM


@torch.no_grad()
def test_an_adapted_llama_of_the_meta_device_is_initialised_whole():
    config = adapted(0.5, layers=[0, 2]).config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.to_empty(device="cpu")
    for p in model.parameters():
        p.fill_(torch.nan)
    model.init_weights()
    assert all(p.isfinite().all() for p in model.parameters())
    attn = model.model.layers[2].self_attn
    torch.testing.assert_close(attn.lam(), torch.full((4,), 0.5))
    assert (attn.decay_bias == -5).all()
    for name, std in (("W_B", 0.1), ("W_theta", 0.01)):
        assert abs(attn.importance.get_parameter(f"{name}.weight").std() / std - 1) < 0.1


@torch.no_grad()
def test_layers_are_adapted_one_after_another(tmp_path):
    config = llama().config
    model, other = LlamaForCausalLM(config), LlamaForCausalLM(config)
    replace_attention(model, 8, layers=[0])
    replace_attention(model, 4, layers=[2])
    assert model.config.sisa_d_state == [8, 0, 4]
    assert (other.config.model_type, other.config.use_cache) == ("llama", True)
    model.save_pretrained(tmp_path)
    back = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert [getattr(layer.self_attn, "d_state", 0) for layer in back.model.layers] == [8, 0, 4]
    with pytest.raises(ValueError, match="attn_implementation must be sdpa or eager"):
        AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="flex_attention")


@torch.no_grad()
def test_a_folder_of_old_and_new_tensors_is_read_as_before(tmp_path):
    """As version 0.1 said: build the old model, replace its attention, load the state dict."""
    from safetensors.torch import load_file

    model, ids = adapted(), tokens()
    model.save_pretrained(tmp_path)
    again = llama()
    replace_attention(again, 8, 0.5)
    again.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(again(ids).logits, model(ids).logits)
    half = again.bfloat16()
    assert half.model.layers[0].self_attn.lambda_raw.dtype == torch.float32
    assert half(ids).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("bits", [4, 8])
@torch.no_grad()
def test_a_quantised_base_keeps_its_projections(bits, tmp_path):
    pytest.importorskip("bitsandbytes")
    llama(hidden_size=128, intermediate_size=128).save_pretrained(tmp_path / "base")
    settings = transformers.BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    base, model = (
        AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=settings, dtype=torch.float32
        )
        for _ in range(2)
    )
    added = replace_attention(model, 8, lam=1e-6)
    assert {p.dtype for p in added} == {torch.float32}
    model.save_pretrained(tmp_path / "adapted")  # before a call, which repacks 4 bits on a CPU
    ids = tokens()
    # In 8 bits activations are rounded to 1 in 127: some fall on the other side.
    assert relative(model(ids).logits, base(ids).logits.double()) < 1e-2
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "adapted")
    kind = type(base.model.layers[0].self_attn.q_proj)
    assert type(back.model.layers[0].self_attn.q_proj) is kind is not nn.Linear
    assert torch.equal(back(ids).logits, model(ids).logits)


def test_a_base_quantised_otherwise_is_refused():
    model = llama()
    model.config.quantization_config = transformers.GPTQConfig(bits=4)
    with pytest.raises(ValueError, match=r"model must be quantised by bitsandbytes, .* got gptq"):
        replace_attention(model)


@torch.no_grad()
def test_a_state_dict_with_one_packed_matrix_loads():
    model, ids = adapted(), tokens()
    state = model.state_dict()
    for index in range(3):
        prefix = f"model.layers.{index}.self_attn.importance."
        parts = [
            state.pop(f"{prefix}{name}.weight") for name in ("W_B", "W_C", "W_alpha", "W_theta")
        ]
        state[f"{prefix}weight"] = torch.cat(parts)
    again = llama()
    replace_attention(again, 8, 0.5)
    again.load_state_dict(state)
    assert torch.equal(again(ids).logits, model(ids).logits)
    state[f"{prefix}weight"] = state[f"{prefix}weight"][1:]
    with pytest.raises(RuntimeError, match=r"importance\.weight"):
        again.load_state_dict(state)


def test_checkpointing_gives_the_same_gradients():
    grads = []
    for checkpointed in (False, True):
        model = adapted().train()
        if checkpointed:
            model.activation_checkpointing_enable()
        model(tokens(), labels=tokens()).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    torch.testing.assert_close(*grads)


def test_bad_arguments_are_named():
    for error, message, model, kwargs in [
        (TypeError, "model must be a LlamaForCausalLM or .*, got Linear", nn.Linear(2, 2), {}),
        (ValueError, "d_state must be even and at least 2, got 3", llama(), {"d_state": 3}),
        (ValueError, "lam must be above 0 and finite, got 0", llama(), {"lam": 0}),
        (
            ValueError,
            r"layers must be different indices from 0 to 2, got \[3\]",
            llama(),
            {"layers": [3]},
        ),
        (
            ValueError,
            r"layers must be different indices from 0 to 2, got \[\]",
            llama(),
            {"layers": []},
        ),
        (
            ValueError,
            "layers must have LlamaAttention, layer 1 has LlamaSisaAttention",
            adapted(layers=[1]),
            {},
        ),
        (
            ValueError,
            "attention_dropout must be 0, SISA has none, got 0.1",
            llama(attention_dropout=0.1),
            {},
        ),
        (
            ValueError,
            "attn_implementation must be sdpa or eager, .*got 'flex_attention'",
            llama("flex_attention"),
            {},
        ),
    ]:
        with pytest.raises(error, match=message):
            replace_attention(model, **kwargs)
    model, ids = adapted(layers=[1]), tokens(1)
    for first in (1, 6, 11):
        packed = torch.cat((torch.arange(first), torch.arange(12 - first)))[None]
        with pytest.raises(ValueError, match="attention_mask must be causal with padding"):
            model(ids, position_ids=packed, use_cache=False)
    with pytest.raises(ValueError, match="a cache is for inference"):
        model(ids, use_cache=True)
    with torch.no_grad():
        cache = llama()(ids, use_cache=True).cache
        with pytest.raises(
            ValueError, match="cache already holds tokens of layer 1 without their importance"
        ):
            model(ids, cache=cache)
        cache = model(ids, use_cache=True).cache
        with pytest.raises(
            ValueError, match="attention_mask must be 1 for all tokens behind the 12 in the cache"
        ):
            model(tokens(1), cache=cache, attention_mask=(torch.arange(24) < 20)[None].long())
        with pytest.raises(ValueError, match="this cache cannot be cropped"):
            cache.crop(-1)


class Block(nn.Module):
    """A block of someone's own model, pre-norm, with SISA where its attention was."""

    def __init__(self, **fields):
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(32), sm.SisaAttention.of(32, 4, **fields)

    def forward(self, x):
        return x + self.attn(self.norm(x))


def test_a_layer_of_ones_own():
    torch.manual_seed(0)
    block, x = Block(d_state=8, n_kv_heads=2), torch.randn(2, 20, 32)
    y = block(x)
    context = Context(rotary_tables(20, 8, x.device))
    assert torch.equal(y, x + block.attn(block.norm(x), context))
    torch.testing.assert_close(block(x[:, :9]), y[:, :9], msg=lambda text: f"not causal: {text}")
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in block.parameters())
    assert abs(block.attn.proj.W_B.weight.std().item() - 0.02) < 0.002
    assert F.softplus(block.attn.lambda_raw).tolist() == pytest.approx([0.3133] * 4, abs=1e-4)
    assert block.bfloat16().attn.lambda_raw.dtype == torch.float32


@torch.no_grad()
def test_a_layer_of_ones_own_over_its_cache():
    attn, x = Block(d_state=8).attn, 10 * torch.randn(1, 20, 32)
    cache = attn.make_cache(1)
    pieces = [attn(piece, cache=cache) for piece in x.split([12, 1, 7], 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), attn(x))


def test_its_fields_are_alive_and_checked():
    outputs = []
    for fields in (
        {},
        {"n_kv_heads": 2},
        {"init_std": 0.2},
        {"decay": False},
        {"rotation": False},
        {"d_state": 8},
    ):
        torch.manual_seed(0)
        outputs.append(Block(**fields)(torch.linspace(-1, 1, 320).sin().view(1, 10, 32)))
    assert all(not torch.equal(outputs[0], other) for other in outputs[1:])
    assert Block(lam="shared").attn.lambda_raw.shape == (1,)
    assert (Block(mode="clamped").attn.mode, Block(backend="reference").attn.backend) == (
        "clamped",
        "reference",
    )
    for fields, message in [
        ({"d_state": 3}, "d_state must be even and at least 2, got 3"),
        ({"n_layers": 2}, "n_layers is not a field of the layer by itself"),
        ({"lam": "zero"}, "lam must be per-head or shared, got 'zero'"),
    ]:
        with pytest.raises(ValueError, match=message):
            Block(**fields)


def test_the_example_runs(capsys):
    path = Path(__file__).parents[2] / "examples" / "finetune_llama.py"
    spec = importlib.util.spec_from_file_location("finetune_llama", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    found = example.main(3)
    assert found["fine-tuned"] < found["pretrained"]
    assert abs(found["probe after"] - found["probe before"]) < 1e-4
    assert found["lambda"] > 1.01e-4
    assert "one text before and after replace_attention" in capsys.readouterr().out
