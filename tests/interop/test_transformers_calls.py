"""What a Llama's forward and generate take: packed documents, embeddings, cropped caches."""

import dataclasses
import logging

import pytest
import torch
import torch.nn.functional as F

import sisa_model as sm

transformers = pytest.importorskip("transformers", minversion="5.24")
from transformers import DataCollatorWithFlattening  # noqa: E402

from sisa_model.interop.transformers import (  # noqa: E402
    DecodingCache,
    SisaConfig,
    SisaForCausalLM,
)

CROPPED = ["sisa-tiny-ds16", "transformer-tiny", "fox-tiny", "alibi-tiny"]
RECURRENT = ["mamba2-tiny", "mamba3-tiny", "hybrid-sisa-tiny", "hybrid-head-tiny"]
FAMILIES = [*CROPPED, *RECURRENT]
# Rows of documents: 5 + 2 + 5 tokens, 3 + 9 (the first of them its rest from position 3 on), 12.
POSITIONS = torch.tensor(
    [
        [0, 1, 2, 3, 4, 0, 1, 0, 1, 2, 3, 4],
        [3, 4, 5, 0, 1, 2, 3, 4, 5, 6, 7, 8],
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11],
    ]
)
DOCUMENTS = [(0, 0, 5), (0, 5, 7), (0, 7, 12), (1, 0, 3), (1, 3, 12), (2, 0, 12)]


def wrapped(preset="sisa-tiny-ds16", **overrides):
    torch.manual_seed(0)
    model = sm.build(preset, **{"max_seq_len": 64, **overrides})
    return SisaForCausalLM(SisaConfig(**dataclasses.asdict(model.config)), model).eval()


def tokens(B=3, L=12):
    return torch.randint(256, (B, L), generator=torch.Generator().manual_seed(1))


def greedy(model, ids, count, **settings):
    return model.generate(ids, max_new_tokens=count, do_sample=False, **settings)


@pytest.mark.parametrize("preset", [*FAMILIES, "clamped"])
@torch.no_grad()
def test_documents_of_restarting_positions_are_kept_apart(preset):
    model = wrapped(mode="clamped") if preset == "clamped" else wrapped(preset)
    ids = tokens()
    packed = model(ids, position_ids=POSITIONS)
    assert packed.cache is None
    for row, start, end in DOCUMENTS:
        alone = model(ids[row : row + 1, start:end]).logits[0]
        torch.testing.assert_close(packed.logits[row, start:end], alone)
    # Padding between documents: the second row's first three tokens, and the last of the third.
    real = torch.ones_like(ids)
    real[1, :3] = real[2, -1] = 0
    padded = model(ids, attention_mask=real, position_ids=POSITIONS).logits
    torch.testing.assert_close(padded[real.bool()], packed.logits[real.bool()])


@pytest.mark.parametrize("preset", FAMILIES)
def test_no_gradient_crosses_the_bounds_of_a_document(preset):
    model = wrapped(preset)
    x = model.get_input_embeddings()(tokens()).detach().requires_grad_()
    model(inputs_embeds=x, position_ids=POSITIONS).logits[0, 6].square().sum().backward()
    assert x.grad[0, 5:7].any(-1).all()
    x.grad[0, 5:7] = 0
    assert not x.grad.any()


@torch.no_grad()
def test_collators_name_documents_in_several_ways_which_must_agree():
    model = wrapped()
    rows = [{"input_ids": row[:n].tolist()} for row, n in zip(tokens(), (5, 12, 1))]
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
    batch = {**collate(rows, return_tensors="pt")}
    logits = model(**batch).logits
    for row, start, end in [(0, 0, 5), (1, 5, 17), (2, 17, 18)]:
        alone = model(tokens()[row : row + 1, : end - start]).logits[0]
        torch.testing.assert_close(logits[0, start:end], alone)
    for name in ("position_ids", "cu_seq_lens_q", "seq_idx"):
        ids = batch["input_ids"]
        torch.testing.assert_close(model(ids, **{name: batch[name]}).logits, logits)
    with pytest.raises(ValueError, match="position_ids and cu_seq_lens_q must name the same docum"):
        model(**{**batch, "cu_seq_lens_q": torch.tensor([0, 6, 18])})


@pytest.mark.parametrize("preset", FAMILIES)
def test_the_loss_of_packed_documents_is_that_of_each_alone(preset):
    model, ids = wrapped(preset), tokens()
    rows = [{"input_ids": row[:n].tolist()} for row, n in zip(ids, (5, 12, 2))]
    batch = DataCollatorWithFlattening()(rows, return_tensors="pt")
    count = 4 + 11 + 1
    losses = [
        model(ids[r : r + 1, :n], labels=ids[r : r + 1, :n]).loss for r, n in ((0, 5), (1, 12))
    ]
    losses.append(model(ids[2:, :2], labels=ids[2:, :2]).loss)
    expected = (4 * losses[0] + 11 * losses[1] + losses[2]) / count
    torch.testing.assert_close(model(**batch).loss, expected)
    torch.testing.assert_close(
        model(**batch, num_items_in_batch=torch.tensor(32)).loss, expected / 2
    )


@torch.no_grad()
def test_shift_labels_stand_for_labels():
    model, ids = wrapped(), tokens()
    shifted = F.pad(ids[:, 1:], (0, 1), value=-100)
    assert torch.equal(model(ids, shift_labels=shifted).loss, model(ids, labels=ids).loss)
    assert torch.equal(
        model(ids, labels=ids + 1, shift_labels=shifted).loss, model(ids, labels=ids).loss
    )


@pytest.mark.parametrize("preset", FAMILIES)
@torch.no_grad()
def test_embeddings_positions_and_hidden_states(preset):
    model, ids = wrapped(preset), tokens()
    logits = model(ids).logits
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embeds).logits, logits)
    for position_ids in (torch.arange(12)[None], torch.arange(7, 19).expand(3, -1)):
        assert torch.equal(model(ids, position_ids=position_ids).logits, logits)
    hidden = model(ids, output_hidden_states=True).hidden_states
    assert len(hidden) == len(model.model.layers) + 1
    assert torch.equal(hidden[0], embeds)
    assert torch.equal(hidden[-1], model.model(ids).last_hidden_state)
    assert torch.equal(model.lm_head(hidden[-1]), logits)
    model.config.output_hidden_states = True
    real = torch.ones_like(ids)
    real[0, :4] = 0
    padded = model(ids, attention_mask=real).hidden_states
    alone = model(ids[:1, 4:]).hidden_states
    for state, own in zip(padded, alone, strict=True):
        torch.testing.assert_close(state[0, 4:], own[0])
    assert model(ids, output_hidden_states=False).hidden_states is None


@torch.no_grad()
def test_the_backbone_takes_padding_and_gives_states():
    model, ids = wrapped(), tokens()
    real = torch.ones_like(ids)
    real[0, :4] = 0
    states = model.base_model(ids, attention_mask=real).last_hidden_state
    assert torch.equal(model.lm_head(states), model(ids, attention_mask=real).logits)
    assert torch.equal(model.base_model(ids, return_dict=False)[0], model.base_model(ids)[0])


@torch.no_grad()
def test_the_configuration_says_whether_a_cache_is_made():
    model, ids = wrapped(), tokens()
    assert isinstance(model(ids).cache, DecodingCache)
    assert model(ids, use_cache=False).cache is None
    model.config.use_cache = False
    assert model(ids).cache is None
    first = model(ids[:, :7], use_cache=True)
    with pytest.warns(FutureWarning, match="`past_key_values` is deprecated"):
        rest = model(ids[:, 7:], past_key_values=first.cache)
    torch.testing.assert_close(rest.logits, model(ids).logits[:, 7:])
    assert rest.cache is first.cache
    assert rest.cache.get_seq_length() == 12
    model.config.use_cache = True
    with torch.enable_grad():
        assert model(ids).cache is None, "a cache records no gradient, a loss needs one"
        assert not model(ids, use_cache=True).logits.requires_grad
        with pytest.raises(ValueError, match="use_cache must be False in training"):
            model.train()(ids, use_cache=True)
    assert wrapped(mode="clamped")(ids).cache is None


@pytest.mark.parametrize(
    ("error", "message", "kwargs"),
    [
        (ValueError, "output_attentions must be False", {"output_attentions": True}),
        (ValueError, "is_causal must be True", {"is_causal": False}),
        (TypeError, "unexpected keyword argument 'head_mask'", {"head_mask": torch.ones(2, 2)}),
        (
            ValueError,
            "exactly one of input_ids and inputs_embeds",
            {"inputs_embeds": torch.ones(1)},
        ),
        (ValueError, "exactly one of input_ids and inputs_embeds", {"input_ids": None}),
        (
            ValueError,
            r"inputs_embeds must be \[batch, length, 64\], got \[3, 12, 32\]",
            {"input_ids": None, "inputs_embeds": torch.ones(3, 12, 32)},
        ),
        (
            ValueError,
            r"position_ids must be integers of shape \[3, 12\], got torch.int64 \[3, 11\]",
            {"position_ids": POSITIONS[:, 1:]},
        ),
        (
            ValueError,
            r"position_ids must rise by one within a document .* got a step of 2 at \[0, 6\]",
            {"position_ids": POSITIONS + (torch.arange(12) > 5)},
        ),
        (
            ValueError,
            r"cu_seq_lens_q must rise from 0 to the length 12 of one row, got \[0, 12\] with bat",
            {"cu_seq_lens_q": torch.tensor([0, 12])},
        ),
        (
            ValueError,
            "use_cache must be False where position_ids restart",
            {"position_ids": POSITIONS, "use_cache": True},
        ),
        (
            TypeError,
            "cache must be a sisa_model.hf.DecodingCache, .* got DynamicCache: pass DecodingCache",
            {"cache": transformers.DynamicCache()},
        ),
    ],
)
@torch.no_grad()
def test_what_the_model_does_not_do_is_refused_by_name(error, message, kwargs):
    with pytest.raises(error, match=message):
        wrapped()(**{"input_ids": tokens(), **kwargs})


@pytest.mark.parametrize("preset", CROPPED)
@torch.no_grad()
def test_a_cropped_cache_is_as_if_the_tokens_had_not_come(preset):
    model, ids = wrapped(preset), tokens()
    real = torch.ones_like(ids)
    real[0, :4] = 0  # rows of unequal length, too
    cache = model(ids[:, :7], attention_mask=real[:, :7], use_cache=True).cache
    expected = model(ids[:, 7:], attention_mask=real, cache=cache).logits
    cache.crop(-5)
    assert cache.get_seq_length() == 7
    assert torch.equal(model(ids[:, 7:], attention_mask=real, cache=cache).logits, expected)
    cache.crop(-1)
    again = model(ids[:, 11:], attention_mask=real, cache=cache).logits
    torch.testing.assert_close(again, expected[:, 4:])
    with pytest.raises(ValueError, match="must leave the 7 tokens of the padded prompt, or none"):
        cache.crop(-8)
    with pytest.raises(ValueError, match="tokens_to_remove must be from -12 to 0, got 3"):
        cache.crop(3)
    cache.crop(-12)
    assert torch.equal(model(ids, cache=cache).logits, model(ids).logits)


@pytest.mark.parametrize("preset", CROPPED)
def test_assisted_and_prompt_lookup_decoding_give_the_greedy_tokens(preset):
    model, ids = wrapped(preset), tokens(1)
    expected = greedy(model, ids, 24)
    other = wrapped(preset, n_layers=1)
    assert torch.equal(greedy(model, ids, 24, prompt_lookup_num_tokens=3), expected)
    assert torch.equal(greedy(model, ids, 24, assistant_model=other), expected)


@pytest.mark.parametrize("preset", RECURRENT)
@torch.no_grad()
def test_a_recurrent_state_has_no_way_back_and_says_so(preset):
    model, ids = wrapped(preset), tokens(1)
    cache = model(ids, use_cache=True).cache
    assert not cache.is_croppable
    with pytest.raises(
        ValueError, match="cannot be cropped: a Mamba layer's state has no way back"
    ):
        cache.crop(-1)
    cache.crop(0)
    with pytest.raises(ValueError, match="prompt_lookup_num_tokens and the like must be left out"):
        greedy(model, ids, 4, prompt_lookup_num_tokens=3)


@torch.no_grad()
def test_positions_behind_a_cache_go_on_or_are_refused():
    model, ids = wrapped(), tokens()
    cache = model(ids[:, :7], position_ids=torch.arange(5, 12)[None], use_cache=True).cache
    rest = model(ids[:, 7:], position_ids=torch.arange(12, 17)[None], cache=cache)
    torch.testing.assert_close(rest.logits, model(ids).logits[:, 7:])
    for first in (0, 12, 18):
        with pytest.raises(ValueError, match=rf"must go on .* at \[17, 17, 17\], got \[{first}\]"):
            model(ids, position_ids=torch.arange(first, first + 12)[None], cache=cache)


@pytest.mark.parametrize("preset", FAMILIES)
def test_generation_goes_on_past_max_seq_len_with_one_warning(preset, caplog):
    logger = logging.getLogger("transformers")
    transformers.utils.logging.warning_once.cache_clear()  # which remembers the other families'
    model, ids = wrapped(preset, max_seq_len=20), tokens(2)
    logger.addHandler(caplog.handler)
    try:
        long = greedy(model, ids, 20)
    finally:
        logger.removeHandler(caplog.handler)
    past = "exceeded the model's predefined maximum length"
    # By itself: a record comes twice where the logger also passes it on to the root.
    assert len({id(record) for record in caplog.records if past in record.getMessage()}) == 1
    assert torch.equal(long, greedy(wrapped(preset, max_seq_len=64), ids, 20))
    assert torch.equal(long, greedy(model, ids, 20, use_cache=False))


@pytest.mark.parametrize("preset", FAMILIES)
def test_generation_from_embeddings(preset):
    model, ids = wrapped(preset), tokens()
    real = torch.ones_like(ids)
    real[0, :5] = 0
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(
        greedy(model, None, 6, inputs_embeds=embeds, attention_mask=real),
        greedy(model, ids, 6, attention_mask=real)[:, 12:],
    )


@pytest.mark.parametrize("preset", FAMILIES)
def test_generation_leaves_each_parameter_its_own_memory(preset):
    model = wrapped(preset)
    greedy(model, tokens(), 2)
    storages = [p.untyped_storage().data_ptr() for p in model.parameters()]
    assert len(set(storages)) == len(storages), "savers take one block of memory for one tensor"


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["sisa-tiny-ds16", "fox-tiny"])
@torch.no_grad()
def test_an_exported_model_takes_any_batch_length_and_padding(preset):
    model = wrapped(preset)
    batch, length = (torch.export.Dim(name, min=2, max=64) for name in ("batch", "length"))
    shapes = {name: {0: batch, 1: length} for name in ("input_ids", "attention_mask")}

    def padded(B, L):
        ids = tokens(B, L)
        real = torch.ones_like(ids)
        real[0, : L // 2] = real[1, L // 2 :] = 0
        return {"input_ids": ids, "attention_mask": real, "use_cache": False}

    program = torch.export.export(
        model, (), padded(3, 12), dynamic_shapes={**shapes, "use_cache": None}
    )
    for size in ((3, 12), (5, 23)):
        inputs = padded(*size)
        torch.testing.assert_close(program.module()(**inputs).logits, model(**inputs).logits)


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["sisa-tiny-ds16", "mamba3-tiny"])
def test_a_compiled_model_has_the_loss_and_gradients(preset):
    model, ids = wrapped(preset), tokens()
    real = torch.ones_like(ids)
    real[0, :4] = 0
    inputs = {"attention_mask": real, "labels": ids.masked_fill(real == 0, -100)}
    results = []
    for forward in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        loss = forward(ids, **inputs).loss
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    torch.testing.assert_close(*results)


class Listener(transformers.generation.streamers.BaseStreamer):
    def __init__(self):
        self.heard = []

    def put(self, value):
        self.heard += value.flatten().tolist()

    def end(self):
        self.heard.append(None)


def test_streams_samples_and_several_sequences():
    model, ids = wrapped(), tokens(1)
    listener = Listener()
    out = greedy(model, ids, 6, streamer=listener)
    assert listener.heard == [*out[0].tolist(), None]
    draws = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        settings = {"do_sample": True, "num_return_sequences": 4, "max_new_tokens": 6}
        draws.append(model.generate(ids, use_cache=use_cache, **settings))
    assert draws[0].shape == (4, 18)
    assert torch.equal(*draws)
    assert len({tuple(row.tolist()) for row in draws[0]}) == 4


def test_caches_of_other_kinds_are_refused_by_name():
    model, ids = wrapped(), tokens()
    expected = greedy(model, ids, 4)
    assert torch.equal(greedy(model, ids, 4, cache_implementation="dynamic"), expected)
    assert torch.equal(greedy(model, ids, 4, cache=DecodingCache()), expected)
    for kind in ("static", "offloaded", "quantized"):
        with pytest.raises(ValueError, match=f"cache_implementation must be None: .* got '{kind}'"):
            greedy(model, ids, 4, cache_implementation=kind)
