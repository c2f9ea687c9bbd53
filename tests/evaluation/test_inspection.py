"""sisa inspect: share and entropies against a loop over rows, on tiny models of every kind."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

import sisa_model as sm
from sisa_kernels import reference
from sisa_model.cli import main
from sisa_model.evaluation.inspection import inspect_model
from sisa_model.models.sisa import SisaAttention
from sisa_model.runs.config import TrainConfig
from sisa_model.training.trainer import train
from tests.support.problems import problem

SETTINGS = {
    "steps": 2,
    "seq_len": 32,
    "batch_size": 2,
    "val_blocks": 2,
    "val_every": 2,
    "save_every": 2,
    "sample_tokens": 0,
}


def tiny(preset="sisa-tiny-ds16", **overrides):
    torch.manual_seed(0)
    return sm.build(preset, **overrides).eval()


def tokens(B=2, L=24, seed=0):
    return torch.randint(257, (B, L), generator=torch.Generator().manual_seed(seed))


def attention_inputs(model, ids):
    """The normed input of each SISA layer."""
    found = []
    hooks = [
        m.register_forward_pre_hook(lambda m, args: found.append((m, args[0], args[1].rotary)))
        for m in model.modules()
        if isinstance(m, SisaAttention)
    ]
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    return found


def by_hand(attn, x, rotary, head):
    """Share and entropies of a head, a row of scores at a time, rotated as complex numbers."""
    q, k, _, b, c, log_decay, theta, _ = (y.detach().double() for y in attn.operands(x)[:8])
    key, lam = (
        head * attn.n_kv_heads // attn.n_heads,
        F.softplus(attn.lambda_raw.detach()).expand(attn.n_heads)[head].double(),
    )
    turn = torch.complex(*(table.double() for table in rotary))
    squares, entropies = [[], []], [[], []]
    for n in range(x.shape[0]):
        g, phase = log_decay[n, :, key].cumsum(0), theta[n, :, key].cumsum(0)
        qq, kk = (
            torch.view_as_complex(y.reshape(len(g), -1, 2).contiguous()) * turn
            for y in (q[n, :, head], k[n, :, key])
        )
        spin = torch.polar(torch.ones_like(phase), phase)
        cc, bb = (
            torch.view_as_complex(y.reshape(len(g), -1, 2).contiguous()) * spin
            for y in (c[n, :, head], b[n, :, key])
        )
        for i in range(len(g)):
            e = (qq[i].conj() * kk[: i + 1]).real.sum(-1) / math.sqrt(q.shape[-1])
            p = lam * (g[i] - g[: i + 1]).exp() * (cc[i].conj() * bb[: i + 1]).real.sum(-1)
            for held, y in zip(squares, (p, e + p)):
                held += (y - y.mean()).square().tolist()
            for held, y in zip(entropies, (e + p, e)):
                held.append(torch.distributions.Categorical(logits=y).entropy().item())
    share = math.sqrt(sum(squares[0]) / sum(squares[1]))
    return share, *(sum(values) / len(values) for values in entropies)


@pytest.mark.parametrize(
    ("preset", "overrides", "numbers"),
    [
        ("sisa-tiny-ds16", {"n_heads": 4, "n_kv_heads": 2}, [0, 1]),
        ("sisa-tiny-ds32-lambdashared", {}, [0, 1]),
        ("hybrid-sisa-tiny", {}, [2]),
        ("hybrid-head-tiny", {"family": "sisa", "d_state": 16}, [0, 1]),
    ],
)
def test_share_and_entropy_are_what_a_loop_finds(preset, overrides, numbers):
    model, ids = tiny(preset, **overrides), tokens()
    with torch.no_grad():
        for attn in (m for m in model.modules() if isinstance(m, SisaAttention)):
            attn.lambda_raw.copy_(torch.linspace(-1, 2, len(attn.lambda_raw)))
            attn.decay_bias.fill_(-2.0)
    found = inspect_model(model, ids)
    assert (
        [layer.layer for layer in found]
        == [layer.layer for layer in sm.health(model, ids)]
        == numbers
    )
    for layer, (attn, x, rotary) in zip(found, attention_inputs(model, ids)):
        assert layer.lam == pytest.approx(attn.lam().tolist())
        rate = (
            -attn.operands(x)
            .log_decay.double()
            .mean((0, 1))
            .repeat_interleave(attn.n_heads // attn.n_kv_heads)
        )
        assert layer.half_life == pytest.approx((math.log(2) / rate).tolist(), rel=1e-6)
        for head in range(attn.n_heads):
            ours = layer.share[head], layer.entropy[head], layer.entropy_without[head]
            assert ours == pytest.approx(
                by_hand(attn, x, rotary, head), rel=1e-12
            )  # both in fp64, of the same fp32 operands


def test_a_weak_term_is_idle_and_a_strong_one_is_all():
    model, ids = tiny(), tokens()
    shares = []
    for raw in (-30.0, 12.0):
        with torch.no_grad():
            for layer in model.layers:
                layer.attn.lambda_raw.fill_(raw)
        first = inspect_model(model, ids)[0]
        shares.append(max(first.share))
        if raw < 0:
            assert first.entropy == pytest.approx(first.entropy_without, abs=1e-9)
    assert shares[0] < 1e-9
    assert shares[1] == pytest.approx(1, abs=0.1)


def test_scores_are_those_of_the_clamped_mode_too():
    """Softmax of the two terms' sum is the oracle's attention, also where the clamp binds."""
    inputs, _ = problem(L=40, H=4, G=2, Dh=8, Ds=4, Dv=3, decay=1.0, dtype=torch.float64)
    v = inputs["v"].repeat_interleave(2, 2)
    operands = {name: x for name, x in inputs.items() if name != "v"}
    found = {mode: sum(reference.scores(**operands, mode=mode)) for mode in ("exact", "clamped")}
    assert not torch.equal(found["exact"], found["clamped"])
    for mode, score in found.items():
        y = torch.einsum("bhij,bjhd->bihd", score.softmax(-1), v)
        torch.testing.assert_close(
            y, reference.sisa_attention(**inputs, mode=mode), rtol=0, atol=1e-14
        )
    exact, clamped = (
        inspect_model(tiny(mode=mode, init_std=0.5), tokens(L=200))[0]
        for mode in ("exact", "clamped")
    )
    assert exact.share != clamped.share


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of 2 steps on 20 distinct lines, of which one is held out, and its text."""
    folder = tmp_path_factory.mktemp("inspect")
    text = "<|endoftext|>\n".join(
        f"{n} green bottles hanging on the wall number {n}; " * 8 for n in range(40)
    )
    (folder / "text.txt").write_text(text)
    return train(TrainConfig(data=(folder / "text.txt",), out=folder / "run", **SETTINGS)).folder


def test_the_command_writes_a_table_a_picture_and_json(run, tmp_path, capsys):
    assert main(["inspect", str(run)]) == 0
    printed = capsys.readouterr().out
    record = json.loads((run / "inspect" / "inspect.json").read_text())
    assert (record["weights"], record["length"], record["blocks"]) == ("final", 32, 2)
    assert record["measured_on"] == "held-out text of the run"
    assert (run / "inspect" / "inspect.png").read_bytes().startswith(b"\x89PNG")
    assert (run / "inspect" / "inspect.md").read_text() in printed
    assert [layer["layer"] for layer in record["layers"]] == [0, 1]
    for layer in record["layers"]:
        assert all(len(values) == 2 for name, values in layer.items() if name != "layer")
        change = [a - b for a, b in zip(layer["entropy"], layer["entropy_without"])]
        assert layer["entropy_change"] == change
        first, second = sorted(layer["share"])
        assert f"{(first + second) / 2:.3g} ({first:.3g} to {second:.3g})" in printed

    (tmp_path / "other.txt").write_text("To be, or not to be, that is the question. " * 20)
    flags = [
        "--text",
        str(tmp_path / "other.txt"),
        "--length",
        "48",
        "--blocks",
        "2",
        "--out",
        str(tmp_path / "out"),
    ]
    assert main(["inspect", str(run), *flags]) == 0
    other = json.loads((tmp_path / "out" / "inspect.json").read_text())
    assert (other["length"], other["blocks"], other["measured_on"]) == (
        48,
        2,
        str(tmp_path / "other.txt"),
    )
    assert other["layers"] != record["layers"]
    ids = torch.frombuffer(
        bytearray((tmp_path / "other.txt").read_bytes()), dtype=torch.uint8
    ).long()
    last = 48 * ((len(ids) + 1 - 1) // 48 - 1)  # the end-of-text token makes one more
    expected = inspect_model(sm.load(run / "final"), torch.stack((ids[:48], ids[last : last + 48])))
    assert other["layers"][1]["share"] == pytest.approx(expected[1].share, rel=1e-9)


def test_a_run_on_a_task_is_measured_on_its_exam(tmp_path, capsys):
    folder = train(
        TrainConfig(
            task="parity", preset="sisa-tiny-ds32-nodecay", out=tmp_path / "run", **SETTINGS
        )
    ).folder
    assert main(["inspect", str(folder), "--length", "20"]) == 0
    record = json.loads((folder / "inspect" / "inspect.json").read_text())
    assert (record["measured_on"], record["length"]) == ("exam of parity", 20)
    assert record["layers"][0]["half_life"] == pytest.approx([math.log(2) / 1e-12] * 2), (
        "nothing decays"
    )
    assert main(["inspect", str(folder), "--length", "33"]) == 1
    assert (
        "length must be at most 32, as the run was trained on parity, got 33"
        in capsys.readouterr().err
    )


def test_what_cannot_be_inspected_is_named(run, tmp_path, capsys):
    with pytest.raises(ValueError, match="the model must have a SISA layer, got a transformer"):
        inspect_model(tiny("transformer-tiny"), tokens())
    with pytest.raises(ValueError, match=r"must have a SISA layer, got a sisa \(lam 'zero'\)"):
        inspect_model(tiny("sisa-tiny-ds32-lambda0"), tokens())
    (tmp_path / "short.txt").write_text("short")
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        ([tmp_path / "empty"], "is not a run folder of sisa train"),
        (
            [run, "--length", "1025"],
            "length must be from 2 to the model's max_seq_len of 1024, got 1025",
        ),
        ([run, "--length", "1"], "length must be from 2"),
        ([run, "--blocks", "0"], "blocks must be at least 1, got 0"),
        (
            [run, "--length", "32", "--text", tmp_path / "short.txt"],
            "the inspected corpus must hold at least one block of 33 tokens, got 6",
        ),
        ([run, "--text", tmp_path / "none.txt"], "none.txt does not exist"),
        ([run, "--device", "cuda:99"], "device must be one this machine has"),
    ):
        assert main(["inspect", *map(str, arguments), "--out", str(tmp_path / "out")]) == 1
        assert message in capsys.readouterr().err
    text = run.parent / "text.txt"
    kept = run / "held-out.npy"
    before = text.read_text()
    blocks = kept.read_bytes()
    try:  # a run of before, which keeps no held-out blocks
        kept.unlink()
        text.write_text(before + "one more bottle")
        assert main(["inspect", str(run), "--out", str(tmp_path / "out")]) == 1
    finally:
        text.write_text(before)
        kept.write_bytes(blocks)
    assert (
        "changed since its training: give text to measure on with --text" in capsys.readouterr().err
    )
    assert not (tmp_path / "out").exists()
