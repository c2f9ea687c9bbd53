"""The authors' checkpoints: their layout, from the paper alone, against what is loaded."""

import math

import pytest
import torch
from torch.nn.functional import logsigmoid, silu, softplus

import sisa_model as sm
from sisa_model.cli import main

# sisa-tiny-ds16, and as many tokens as bind the clamp below.
D, H, DH, DS, FF, LAYERS, VOCAB, L = 64, 2, 32, 16, 229, 2, 257, 60
IMPORTANCE = ("W_B", "W_C", "alpha_proj", "theta_proj", "lambda_raw")


def authors_state(importance=True, ff=FF, dtype=torch.bfloat16):
    """Random weights under the authors' names, [out, in], the rows of a projection head by head."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, std=0.1, mean=0.0):
        return (mean + std * torch.randn(*shape, generator=generator)).to(dtype)

    state = {"embed.weight": normal(VOCAB, D, std=0.5), "final_norm.weight": normal(D, mean=1.0)}
    for i in range(LAYERS):
        layer = {f"{name}.weight": normal(D, D) for name in ("W_Q", "W_K", "W_V", "W_O")}
        layer |= {f"{name}.weight": normal(H * DS, D) for name in ("W_B", "W_C")}
        # The first head's decay spans some 120 over the sequence, the second's 3.
        layer |= {
            "alpha_proj.weight": normal(H, D),
            "alpha_proj.bias": torch.tensor([2.0, -3.0]).to(dtype),
        }
        layer |= {"theta_proj.weight": normal(H * DS // 2, D), "lambda_raw": normal(H, std=0.5)}
        layer |= {"attn_norm.weight": normal(D, mean=1.0), "ffn_norm.weight": normal(D, mean=1.0)}
        layer |= {
            "ffn.w_gate.weight": normal(ff, D),
            "ffn.w_up.weight": normal(ff, D),
            "ffn.w_down.weight": normal(D, ff),
        }
        state |= {
            f"layers.{i}.{name}": w
            for name, w in layer.items()
            if importance or not name.startswith(IMPORTANCE)
        }
    return state


def rotated(x, phase):
    """Turn channel pairs (2n, 2n + 1) of x [L, 2N] by phase [L, N]: times exp(i phase)."""
    turned = torch.complex(x[:, 0::2], x[:, 1::2]) * torch.polar(torch.ones_like(phase), phase)
    return torch.stack((turned.real, turned.imag), -1).flatten(1)


def authors_logits(state, ids, mode):
    """Logits [L, V] in fp64, head by head: "clamped", "exact", None for a Transformer.

    Also the widest range of g met."""
    w = {name: x.double() for name, x in state.items()}
    length, widest = len(ids), 0.0
    positions = torch.arange(length).double()[:, None] * 10000.0 ** (
        -torch.arange(0, DH, 2).double() / DH
    )
    future = torch.ones(length, length, dtype=torch.bool).triu(1)

    def norm(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    x = w["embed.weight"][ids]
    for i in range(LAYERS):
        p = {
            name.removeprefix(f"layers.{i}."): weight
            for name, weight in w.items()
            if name.startswith(f"layers.{i}.")
        }
        n, heads = norm(x, p["attn_norm.weight"]), []
        for h in range(H):
            own, state_rows, phase_rows = (slice(h * e, (h + 1) * e) for e in (DH, DS, DS // 2))
            q, k = (rotated(n @ p[f"{name}.weight"][own].T, positions) for name in ("W_Q", "W_K"))
            scores = q @ k.T / math.sqrt(DH)
            if mode is not None:
                alpha = n @ p["alpha_proj.weight"][h] + p["alpha_proj.bias"][h]
                g = logsigmoid(-alpha).cumsum(0)  # of -softplus(alpha)
                phase = (n @ p["theta_proj.weight"][phase_rows].T).cumsum(0)
                b, c = (
                    rotated(n @ p[f"{name}.weight"][state_rows].T, phase) for name in ("W_B", "W_C")
                )
                lam, widest = softplus(p["lambda_raw"][h]), max(widest, (g.max() - g.min()).item())
                if mode == "exact":  # Eq. 2, position by position
                    for t in range(length):
                        scores[t, : t + 1] += lam * (g[t] - g[: t + 1]).exp() * (b[: t + 1] @ c[t])
                else:  # Proposition 1 with the clamp
                    e, s = (
                        (g - (g.max() + g.min()) / 2).clamp(-11, 11)[:, None],
                        DH**0.25 * lam.sqrt(),
                    )
                    query, key = (
                        torch.cat((q, s * e.exp() * c), 1),
                        torch.cat((k, s * (-e).exp() * b), 1),
                    )
                    scores = query @ key.T / math.sqrt(DH)
            weights = scores.masked_fill(future, -math.inf).softmax(-1)
            heads.append(weights @ (n @ p["W_V.weight"][own].T))
        x = x + torch.cat(heads, 1) @ p["W_O.weight"].T
        n = norm(x, p["ffn_norm.weight"])
        x = (
            x
            + (silu(n @ p["ffn.w_gate.weight"].T) * (n @ p["ffn.w_up.weight"].T))
            @ p["ffn.w_down.weight"].T
        )
    return norm(x, w["final_norm.weight"]) @ w["embed.weight"].T, widest


def write(path, state, prefix=""):
    torch.save(
        {
            "model": {prefix + name: x for name, x in state.items()},
            "step": 9536,
            "optimizer": {"state": {}},
        },
        path,
    )
    return path


IDS = torch.randint(VOCAB, (L,), generator=torch.Generator().manual_seed(1))


def off(model, expected):
    return ((model(IDS[None])[0].double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_their_sisa_gives_their_logits_in_both_modes(tmp_path, prefix):
    state = authors_state()
    path = write(tmp_path / "sisa.pt", state, prefix)
    clamped, exact = (
        sm.load_paper_checkpoint(path, "sisa-tiny-ds16"),
        sm.load_paper_checkpoint(path, "sisa-tiny-ds16", "exact"),
    )
    assert (clamped.config.mode, exact.config.mode) == ("clamped", "exact"), "theirs is the default"
    (theirs, span), (eq2, _) = (
        authors_logits(state, IDS, "clamped"),
        authors_logits(state, IDS, "exact"),
    )
    assert span > 100, "the clamp binds from 22 on"
    assert ((theirs - eq2).norm() / eq2.norm()).item() > 0.1, "and is seen in the logits"
    # fp32 against fp64 over two layers: measured 7e-7 and 5e-7.
    assert off(clamped, theirs) < 2e-6
    assert off(exact, eq2) < 2e-6
    assert {p.dtype for p in clamped.parameters()} == {torch.float32}
    assert torch.equal(clamped.layers[1].attn.lambda_raw, state["layers.1.lambda_raw"].float())


def test_their_transformer_gives_their_logits(tmp_path):
    state = authors_state(importance=False, ff=256, dtype=torch.float32)
    model = sm.load_paper_checkpoint(write(tmp_path / "transformer.pt", state), "transformer-tiny")
    assert off(model, authors_logits(state, IDS, None)[0]) < 2e-6


def test_overrides_size_the_model(tmp_path):
    state = authors_state(ff=100)
    model = sm.load_paper_checkpoint(
        write(tmp_path / "narrow.pt", state), "sisa-tiny-ds16", "exact", d_ff=100
    )
    assert off(model, authors_logits(state, IDS, "exact")[0]) < 2e-6


def test_convert_writes_this_packages_format(tmp_path, capsys):
    state = authors_state()
    path, out = write(tmp_path / "sisa.pt", state), tmp_path / "model"
    command = ["convert", str(path), "--preset", "sisa-tiny-ds16", "--out"]
    out.mkdir()  # an empty folder may be given
    assert main([*command, str(out), "--mode", "exact"]) == 0
    names = ["config.json", "model.safetensors", "modeling_sisa.py"]
    assert sorted(file.name for file in out.iterdir()) == names
    assert off(sm.load(out), authors_logits(state, IDS, "exact")[0]) < 2e-6
    assert main([*command, str(tmp_path / "theirs")]) == 0
    assert sm.load(tmp_path / "theirs").config.mode == "clamped"
    assert "147,976 parameters, mode clamped" in capsys.readouterr().out
    assert main([*command, str(out)]) == 1
    assert f"out {out} exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("preset", "change", "message", "fitting"),
    [
        (
            "sisa-tiny-ds32",
            {},
            "layers.0.W_B.weight is [32, 64] in the file, [64, 64] in the model",
            "sisa-tiny-ds16",
        ),
        (
            "transformer-tiny",
            {},
            "layers.0.ffn.w_gate.weight is [229, 64] in the file, [256, 64] in the model",
            "sisa-tiny-ds16",
        ),
        (
            "sisa-50m-ds16",
            {},
            "embed.weight is [257, 64] in the file, [50277, 512] in the model",
            "sisa-tiny-ds16",
        ),
        (
            "sisa-tiny-ds16",
            {"layers.2.W_Q.weight": torch.zeros(64, 64)},
            "the model has no layers.2.W_Q.weight",
            "none",
        ),
        ("sisa-tiny-ds16", {"layers.1.W_C.weight": None}, "it has no layers.1.W_C.weight", "none"),
    ],
)
def test_a_wrong_preset_is_named_with_the_one_that_fits(tmp_path, preset, change, message, fitting):
    state = {name: x for name, x in (authors_state() | change).items() if x is not None}
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the message is checked below
        sm.load_paper_checkpoint(write(tmp_path / "sisa.pt", state), preset)
    found = str(error.value)
    assert found.startswith(f"{tmp_path / 'sisa.pt'} does not hold {preset}: {message}. ")
    assert found.endswith(f"Presets that fit it: {fitting}")


def test_damaged_and_foreign_files_are_named(tmp_path):
    def refused(path):
        with pytest.raises((ValueError, FileNotFoundError)) as error:
            sm.load_paper_checkpoint(path, "sisa-tiny-ds16")
        assert str(path) in str(error.value)
        return str(error.value)

    assert "no checkpoint at" in refused(tmp_path / "none.pt")
    assert "no checkpoint at" in refused(tmp_path)
    whole = write(tmp_path / "whole.pt", authors_state()).read_bytes()
    for name, content in {
        "half.pt": whole[: len(whole) // 2],
        "empty.pt": b"",
        "text.pt": b"weights",
    }.items():
        (tmp_path / name).write_bytes(content)
        assert "truncated or no checkpoint" in refused(tmp_path / name)
    for name, content, held in (
        ("bare.pt", authors_state(), "got the keys embed.weight, final_norm.weight"),
        ("tensor.pt", torch.zeros(3), "got a Tensor"),
        ("model.pt", {"model": {"epoch": 3}}, "got a int under 'epoch'"),
    ):
        torch.save(content, tmp_path / name)
        assert held in refused(tmp_path / name)
    # A module would have to run code to load.
    torch.save({"model": torch.nn.Linear(2, 2)}, tmp_path / "pickled.pt")
    assert "read as data alone" in refused(tmp_path / "pickled.pt")
    with pytest.raises(ValueError, match="mode must be one of exact, clamped, got 'fast'"):
        sm.load_paper_checkpoint(tmp_path / "whole.pt", "transformer-tiny", "fast")
