"""Generation and the command line around it."""

import dataclasses
import shutil

import pytest
import torch

import sisa_kernels as sk
import sisa_model as sm
from sisa_kernels.testing import relative
from sisa_model.cli import main
from sisa_model.models.context import Context, rotary_behind
from sisa_model.models.generate import filter_logits
from sisa_model.runs.config import TrainConfig
from sisa_model.training.trainer import train


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return sm.build("sisa-tiny-ds16", max_seq_len=32)


def prompt():
    return torch.randint(256, (2, 7), generator=torch.Generator().manual_seed(0))


def test_greedy_is_the_argmax_of_the_whole_sequence(model):
    out = sm.generate(model, prompt(), 5)
    assert out.shape == (2, 12)
    assert torch.equal(out[:, :7], prompt())
    assert torch.equal(out[:, 7:], model(out[:, :-1]).argmax(-1)[:, 6:])


def test_sampling_is_seeded_and_narrowed(model):
    def sample(seed, **kwargs):
        return sm.generate(
            model, prompt(), 20, 1.0, generator=torch.Generator().manual_seed(seed), **kwargs
        )

    assert torch.equal(sample(0), sample(0))
    assert not torch.equal(sample(0), sample(1))
    greedy = sm.generate(model, prompt(), 20)
    assert torch.equal(sample(0, top_k=1), greedy)
    assert torch.equal(sample(0, top_p=1e-6), greedy)
    cold = sm.generate(model, prompt(), 20, 1e-40, generator=torch.Generator().manual_seed(0))
    assert torch.equal(cold, greedy)


def test_filter_keeps_the_smallest_set_that_reaches_top_p():
    logits = torch.tensor([[0.5, 0.05, 0.3, 0.15]]).log()
    kept = [
        filter_logits(logits, None, p).isfinite().tolist()[0] for p in (0.4, 0.5, 0.75, 0.95, 1.0)
    ]
    assert kept == [
        [True, False, False, False],
        [True, False, False, False],
        [True, False, True, False],
        [True, False, True, True],
        [True, True, True, True],
    ]
    assert filter_logits(logits, 2, 1.0).isfinite().tolist() == [[True, False, True, False]]
    assert torch.equal(filter_logits(logits, 99, 1.0), logits)


SISA = (
    "sisa-tiny-ds16",
    "sisa-tiny-ds32-nodecay",
    "sisa-tiny-ds32-norotation",
    "sisa-tiny-ds32-lambda0",
)
RIVALS = ("transformer-tiny", "fox-tiny", "alibi-tiny", "mamba2-tiny", "mamba3-tiny")
HYBRIDS = tuple(f"hybrid-{name}-tiny" for name in ("transformer", "sisa", "block", "head"))
CACHED = (*SISA, *RIVALS, *HYBRIDS)


def small(preset="sisa-tiny-ds16", **overrides):
    """A model whose heads forget, or halve SISA's importance, within 2 tokens, 30 and so on."""
    torch.manual_seed(0)
    heads = {"n_heads": 4} if preset.startswith("mamba") else {"n_heads": 4, "n_kv_heads": 2}
    model = sm.build(preset, **{"max_seq_len": 64, **heads, **overrides})
    for layer in model.layers:
        if hasattr(layer.mixer, "decay_bias"):
            layer.mixer.decay_bias.data = torch.tensor([-0.9, -9.6])[: layer.mixer.n_kv_heads]
        if hasattr(layer.mixer, "forget_bias"):
            layer.mixer.forget_bias.data = torch.tensor([0.9, 3.8, 6.5, 0.0])
    return model


@pytest.mark.parametrize("preset", CACHED)
@pytest.mark.parametrize("sizes", [[1], [7, 1, 1, 12, 1], [40]], ids=str)
@torch.no_grad()
def test_pieces_over_a_cache_give_the_logits_of_the_whole(preset, sizes):
    model, ids = (
        small(preset),
        torch.randint(256, (2, 44), generator=torch.Generator().manual_seed(2)),
    )
    cache, whole = model.make_cache(2), model.double()(ids)
    model.float()
    sizes = [*sizes, *[1] * (44 - sum(sizes))]
    logits = torch.cat([model(piece, cache=cache) for piece in ids.split(sizes, 1)], 1)
    assert cache.lengths == [44, 44]
    assert relative(logits, whole) <= 1e-5
    assert (logits - whole).norm(dim=-1).max() <= 1e-5 * whole.norm(dim=-1).min()


@pytest.mark.parametrize("preset", ["sisa-tiny-ds16", "fox-tiny", "mamba2-tiny", "mamba3-tiny"])
@torch.no_grad()
def test_bf16_over_a_cache(preset):
    model = small(preset).bfloat16()
    ids, cache = (
        torch.randint(256, (2, 44), generator=torch.Generator().manual_seed(2)),
        model.make_cache(2),
    )
    whole = model.float()(ids)
    plain = model.bfloat16()(ids)
    logits = torch.cat([model(piece, cache=cache) for piece in ids.split([20, *[1] * 24], 1)], 1)
    held = (
        cache.layers[0].state["h"] if preset.startswith("mamba") else cache.layers[0].buffers["k"]
    )
    assert held.dtype == (torch.float32 if preset.startswith("mamba") else torch.bfloat16)
    assert relative(logits, whole) <= 2 * relative(plain, whole), (
        "no worse than twice what bf16 costs without a cache"
    )


@pytest.mark.parametrize("preset", CACHED)
def test_a_cache_changes_no_token(preset):
    """Greedy and sampled, before and after the window of max_seq_len slides."""
    model = small(preset, max_seq_len=20)
    for temperature in (0.0, 1.0):
        outputs = [
            sm.generate(
                model,
                prompt(),
                20,
                temperature,
                use_cache,
                generator=torch.Generator().manual_seed(0),
            )
            for use_cache in (True, False)
        ]
        assert torch.equal(*outputs)


@pytest.mark.parametrize(
    ("preset", "use_cache"),
    [(preset, True) for preset in ("sisa-tiny-ds16", *RIVALS, *HYBRIDS)]
    + [("sisa-tiny-ds16", False)],
)
def test_rows_of_unequal_prompts_are_continued_as_alone(preset, use_cache):
    model, lengths = small(preset, max_seq_len=20), [7, 1, 4]
    ids = torch.randint(256, (3, 7), generator=torch.Generator().manual_seed(3))
    together = sm.generate(model, ids, 18, 0.0, use_cache, prompt_lengths=lengths)
    assert torch.equal(
        sm.generate(model, ids, 18, 0.0, use_cache, prompt_lengths=tuple(lengths)), together
    )
    assert torch.equal(together[:, :7], ids)
    for row, n in enumerate(lengths):
        alone = sm.generate(model, ids[row : row + 1, 7 - n :], 18, 0.0, use_cache)
        assert torch.equal(together[row, 7:], alone[0, n:])


@pytest.mark.parametrize("preset", ["sisa-tiny-ds16", *RIVALS, *HYBRIDS])
def test_with_a_cache_the_model_sees_each_token_once(preset, monkeypatch):
    model, seen = small(preset, max_seq_len=10), []
    real = model.hidden
    monkeypatch.setattr(
        model, "hidden", lambda ids, **kwargs: seen.append(ids.shape[1]) or real(ids, **kwargs)
    )
    sm.generate(model, prompt(), 6)
    assert seen == [7, 1, 1, 1, 10, 10], "past max_seq_len all that it sees is run again"
    seen.clear()
    sm.generate(model, prompt(), 6, use_cache=False)
    assert seen == [7, 8, 9, 10, 10, 10]


def test_every_preset_has_a_cache():
    with torch.device("meta"):
        assert all(sm.build(preset).cache_refusal() is None for preset in sm.presets())


def test_what_cannot_be_cached_is_said():
    clamped = small(mode="clamped")
    with pytest.raises(
        ValueError,
        match="use_cache must be False for this model: SISA in mode 'clamped' has no cache",
    ):
        sm.generate(clamped, prompt(), 3)
    assert sm.generate(clamped, prompt(), 3, use_cache=False).shape == (2, 10)
    for model in (
        clamped,
        small("hybrid-sisa-tiny", mode="clamped"),
        small("hybrid-head-tiny", family="sisa", d_state=16, mode="clamped"),
    ):
        with pytest.raises(ValueError, match="SISA in mode 'clamped' has no cache"):
            model.make_cache(1)


def test_bad_uses_of_a_cache_are_named():
    model = small()
    with pytest.raises(ValueError, match="a cache is for inference"):
        model(prompt(), cache=model.make_cache(2))
    documents = torch.tensor([0, 7], dtype=torch.int32)
    with torch.no_grad():
        for message, ids, kwargs in [
            ("lengths needs a cache", prompt(), {"lengths": [7, 7]}),
            (
                "input_ids must have the cache's batch of 3, got 2",
                prompt(),
                {"cache": model.make_cache(3)},
            ),
            (
                "cu_seqlens cannot be combined with a cache",
                prompt()[:1],
                {"cache": model.make_cache(1), "cu_seqlens": documents},
            ),
            (
                "lengths must be 2 integers from 1 to 7, got",
                prompt(),
                {"cache": model.make_cache(2), "lengths": [8, 1]},
            ),
            ("it has 1 layers, the model 2", prompt(), {"cache": small(n_layers=1).make_cache(2)}),
        ]:
            with pytest.raises(ValueError, match=message):
                model(ids, **kwargs)
        cache = model.make_cache(2)
        model(prompt(), cache=cache)
        with pytest.raises(
            ValueError,
            match=r"input_ids must be 1 to 64 .* tokens long, got 58 behind 7 in the cache",
        ):
            model(torch.zeros(2, 58, dtype=torch.int64), cache=cache)
        with pytest.raises(
            ValueError,
            match=r"lengths is for the first tokens of an empty cache, this one holds \[7, 7\]",
        ):
            model(prompt(), cache=cache, lengths=[1, 1])
    assert cache.lengths == [7, 7]


def test_a_window_of_max_seq_len_slides(model):
    out = sm.generate(model, prompt(), 40)
    assert torch.equal(out[:, -1], model(out[:, -33:-1]).argmax(-1)[:, -1])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"temperature": -1.0}, "temperature must be at least 0 and finite, got -1.0"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"top_p": 1.5}, r"top_p must be in \(0, 1\], got 1.5"),
        ({"prompt_lengths": [7]}, r"prompt_lengths must be 2 integers from 1 to 7, got \[7\]"),
        (
            {"prompt_lengths": [0, 8]},
            r"prompt_lengths must be 2 integers from 1 to 7, got \[0, 8\]",
        ),
        (
            {"prompt_lengths": torch.tensor([1, 2])},
            r"prompt_lengths must be 2 integers from 1 to 7, got tensor\(\[1, 2\]\)",
        ),
        (
            {"prompt_lengths": [1.0, 2]},
            r"prompt_lengths must be 2 integers from 1 to 7, got \[1.0, 2\]",
        ),
        (
            {"input_ids": torch.zeros(2, 0, dtype=torch.int64)},
            r"with at least one token a row, got \[2, 0\]",
        ),
    ],
)
def test_bad_sampling_settings_are_named(model, kwargs, message):
    with pytest.raises(ValueError, match=message):
        sm.generate(model, **{"input_ids": prompt(), "max_new_tokens": 3, **kwargs})


def test_command_line_continues_a_prompt_of_a_run(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("all work and no play " * 200)
    run = train(
        TrainConfig(
            data=(tmp_path / "text.txt",),
            out=tmp_path / "run",
            steps=3,
            seq_len=32,
            batch_size=2,
            sample_tokens=0,
        )
    )
    capsys.readouterr()
    flags = [
        "--prompt",
        "all work",
        "--max-new-tokens",
        "9",
        "--seed",
        "3",
        "--top-k",
        "20",
        "--top-p",
        "0.9",
    ]
    assert main(["generate", str(run.folder), *flags]) == 0
    first = capsys.readouterr().out
    assert first.startswith("all work")
    assert main(["generate", str(run.folder), *flags]) == 0
    assert capsys.readouterr().out == first
    shutil.move(run.folder / "final", tmp_path / "elsewhere")
    assert main(["generate", str(tmp_path / "elsewhere"), "--tokenizer", "bytes", *flags]) == 0
    assert capsys.readouterr().out == first, "a folder of weights, as sisa convert makes one"
    assert main(["generate", str(tmp_path / "elsewhere"), *flags]) == 0
    assert capsys.readouterr().out == first, "by the tokenizer that is in it"
    (tmp_path / "elsewhere" / "tokenizer.json").unlink()
    assert main(["generate", str(tmp_path / "elsewhere"), *flags]) == 1
    assert "which holds none: a file, or bytes" in capsys.readouterr().err
    assert main(["generate", str(run.folder), *flags]) == 0
    assert capsys.readouterr().out == first, "the newest checkpoint serves as well"
    shutil.rmtree(run.folder / "checkpoints")
    assert main(["generate", str(run.folder)]) == 1
    assert "holds no final weights and no checkpoint" in capsys.readouterr().err
    assert main(["generate", str(tmp_path)]) == 1
    assert (
        "run must be a run folder of sisa train or a folder of model weights"
        in capsys.readouterr().err
    )
    assert main(["generate", str(run.folder), "--top-p", "0"]) == 1
    assert "top_p must be in (0, 1], got 0.0" in capsys.readouterr().err


def test_a_clamped_run_is_sampled_without_a_cache_and_says_so(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("all work and no play " * 200)
    config = TrainConfig(
        data=(tmp_path / "text.txt",),
        out=tmp_path / "run",
        steps=1,
        seq_len=32,
        batch_size=2,
        sample_tokens=3,
    )
    run = train(dataclasses.replace(config, mode="clamped"))
    assert (run.folder / "sample.txt").exists()
    assert main(["generate", str(run.folder), "--max-new-tokens", "3"]) == 0
    assert (
        "sisa: every token runs all before it again: SISA in mode 'clamped' has no cache"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("changed", ["plain", "hooked", "autocast", "no rotation", "bf16 weights"])
@torch.no_grad()
def test_a_token_is_what_the_operands_of_its_layer_give(changed):
    """By one op from the projections, or where its gates are others by those."""
    fields = {"no rotation": {"rotation": False}, "bf16 weights": {"weights": "bf16"}}
    torch.manual_seed(0)
    model = sm.build("sisa-tiny-ds16", n_layers=1, **fields.get(changed, {})).eval()
    attn = model.layers[0].attn
    if changed == "hooked":
        attn.proj.W_Q.register_forward_hook(lambda *call: call[2] * 2)
    dtype = attn.W_O.weight.dtype
    x = torch.randn(2, 6, model.config.d_model).to(dtype)
    cache, other = attn.make_cache(2), attn.make_cache(2)
    with torch.autocast("cpu", torch.bfloat16, enabled=changed == "autocast"):
        attn(x[:, :4], cache=cache)
        attn(x[:, :4], cache=other)
        for t in (4, 5):
            found = attn(x[:, t : t + 1], cache=cache)
            rotary = rotary_behind(other.lengths, 1, attn.head_dim, x.device)
            operands = attn.operands(x[:, t : t + 1], Context(rotary))._asdict()
            del operands["cu_seqlens"]
            right = attn.W_O(sk.sisa_decode(**operands, cache=other).flatten(2))
            tolerance = {"rtol": 2e-2, "atol": 2e-3} if right.dtype == torch.bfloat16 else {}
            torch.testing.assert_close(found, right, **tolerance)


def test_rows_end_with_their_first_stop_token():
    model = small().eval()
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    free = sm.generate(model, ids, 12)
    stop = {free[0, 5].item(), free[1, 9].item()}
    heard = []
    found = sm.generate(model, ids, 12, stop=stop, on_token=lambda x: heard.append(x.tolist()))
    ends = [next(n for n in range(3, 15) if row[n].item() in stop) for row in free]
    assert found.shape[1] == max(ends) + 1
    for row, alone, end in zip(found, free, ends):
        assert torch.equal(row[: end + 1], alone[: end + 1])
        assert (row[end:] == alone[end]).all()
    assert torch.equal(torch.tensor(heard).T, found[:, 3:])
    for bad in (-1, model.config.vocab_size):
        with pytest.raises(ValueError, match="stop must hold token ids in"):
            sm.generate(model, ids, 2, stop=[bad])
