"""sisa_attention on stock kernels: exact at any length and decay, linear memory, checked."""

import itertools
import math
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import sisa_kernels as sk
from sisa_kernels import __main__ as command
from sisa_kernels import checks
from sisa_kernels.paths import chunked, dense
from sisa_kernels.testing import (
    NAMES,
    gradient_errors,
    in_fp64,
    oracle,
    relative,
    value_and_grads,
    worst_row,
)
from tests.support import ROOT
from tests.support.problems import problem

LENGTHS = (1, 63, 257, 1000)


def check_exact(inputs, dy, **kwargs):
    """The bounds of "exact" in fp32, on y, its worst row and every gradient (lam: its measure)."""
    y, grads = value_and_grads(sk.sisa_attention, inputs, dy, backend="chunked", **kwargs)
    y_ref, grads_ref = oracle(inputs, dy, **kwargs)
    assert relative(y, y_ref) <= 5e-6
    assert worst_row(y, y_ref) <= 1e-4
    errors = gradient_errors(grads, grads_ref, inputs)
    assert errors.pop("lam") <= 2e-6
    assert max(errors.values()) <= 2e-5, errors


@pytest.mark.parametrize("decay", [-6.0, -4.0, -1.0, 1.0])
@pytest.mark.parametrize("L", LENGTHS)
def test_exact(L, decay):
    check_exact(*problem(L=L, decay=decay))


@pytest.mark.parametrize("decay", [-5.0, 1.0])
@pytest.mark.parametrize("Ds", [2, 64, 128])
def test_exact_at_every_importance_width(Ds, decay):
    check_exact(*problem(L=1000, Ds=Ds, decay=decay))


@pytest.mark.parametrize("L", [2048, 4096])
def test_exact_where_the_clamp_is_wrong_by_half(L):
    inputs, dy = problem(L=L, H=1, decay=-3.0 if L == 2048 else -5.0)
    check_exact(inputs, dy)
    y_ref = sk.reference.sisa_attention(**in_fp64(inputs))
    assert 0.3 < relative(sk.sisa_attention(**inputs, mode="clamped"), y_ref) < math.inf


AT_LENGTH = [
    *itertools.product([2048], [-6.0, -5.0, -4.0, -3.0, -1.0, 1.0], [2, 16, 64, 128]),
    *itertools.product([4096], [-6.0, -4.0, -1.0, 1.0], [16, 128]),
    *itertools.product([6144], [-6.0, -3.0, 1.0], [2, 64]),
]


@pytest.mark.slow
@pytest.mark.parametrize(("L", "decay", "Ds"), AT_LENGTH)
def test_exact_at_length(L, decay, Ds):
    check_exact(*problem(L=L, decay=decay, Ds=Ds))


@pytest.mark.parametrize("decay", [-4.0, 1.0])
def test_grouped_heads_rotary_documents_and_value_width(decay):
    inputs, dy = problem(L=257, H=6, G=2, Dh=32, Ds=16, Dv=80, decay=decay)
    angle = torch.rand(257, 16) * 6
    check_exact(
        inputs,
        dy,
        rotary=(angle.cos(), angle.sin()),
        cu_seqlens=torch.tensor([0, 1, 64, 200, 257], dtype=torch.int32),
    )


def test_strided_inputs():
    inputs, dy = problem(B=2, L=63, H=2, decay=0.0)
    packed = torch.cat([inputs[name].detach().flatten(2) for name in ("q", "k", "v", "b", "c")], -1)
    views = dict(zip(("q", "k", "v", "b", "c"), packed.split([128, 128, 128, 32, 32], -1)))
    strided = {
        name: views[name].unflatten(-1, (2, -1)) if name in views else x
        for name, x in inputs.items()
    }
    strided["log_decay"] = inputs["log_decay"].detach().mT.contiguous().mT
    assert not strided["q"].is_contiguous()
    y, grads = value_and_grads(sk.sisa_attention, inputs, dy)
    y_strided, grads_strided = value_and_grads(sk.sisa_attention, strided, dy)
    torch.testing.assert_close(y_strided, y, rtol=0, atol=0)
    torch.testing.assert_close(grads_strided, grads, rtol=0, atol=0)


# Channels apart; the length innermost, which a pad would keep.
@pytest.mark.parametrize("order", [(0, 1, 3, 2), (0, 2, 3, 1)])
@pytest.mark.parametrize("Dv", [64, 80, 96])  # narrower than the augmented keys, as wide, wider
@pytest.mark.parametrize("mode", ["exact", "clamped"])
def test_values_whose_channels_lie_apart(mode, Dv, order):
    inputs, dy = problem(L=65, Dv=Dv)
    back = [order.index(axis) for axis in range(4)]
    apart = {**inputs, "v": inputs["v"].detach().permute(order).contiguous().permute(back)}
    assert apart["v"].stride(3) > 1
    expected = value_and_grads(sk.sisa_attention, inputs, dy, mode=mode)
    found = value_and_grads(
        sk.sisa_attention, apart, dy.permute(order).contiguous().permute(back), mode=mode
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("mode", ["exact", "clamped"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_good_as_its_inputs(dtype, mode):
    """Within twice the rounding of the oracle's own result and gradients to the dtype."""
    inputs, dy = problem(L=257, decay=-4.0, dtype=dtype)
    y, grads = value_and_grads(sk.sisa_attention, inputs, dy, mode=mode)
    y_ref, grads_ref = oracle(inputs, dy, mode=mode)
    assert y.dtype == dtype
    assert relative(y, y_ref) <= 2 * relative(y_ref.to(dtype), y_ref)
    assert worst_row(y, y_ref) <= 2 * worst_row(y_ref.to(dtype), y_ref)
    for name in NAMES:
        assert grads[name].dtype == inputs[name].dtype
        rounding = relative(grads_ref[name].to(grads[name].dtype), grads_ref[name])
        assert relative(grads[name], grads_ref[name]) <= 2 * rounding + 1e-5, name


@pytest.mark.parametrize(
    ("mode", "backend"), [("exact", "chunked"), ("exact", "one_call"), ("clamped", "one_call")]
)
def test_autocast_does_not_reach_inside(mode, backend):
    inputs, dy = problem(L=257, decay=-4.0)
    plain = value_and_grads(sk.sisa_attention, inputs, dy, mode=mode, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        inside = value_and_grads(sk.sisa_attention, inputs, dy, mode=mode, backend=backend)
    torch.testing.assert_close(inside, plain, rtol=0, atol=0)


@pytest.mark.parametrize("decay", [-3.0, 6.0])
def test_fp64_and_its_gradcheck(decay):
    inputs, _ = problem(L=20, H=2, G=1, Dh=4, Ds=4, Dv=12, decay=decay, dtype=torch.float64)
    expected = sk.reference.sisa_attention(**inputs)
    torch.testing.assert_close(sk.sisa_attention(**inputs), expected, rtol=1e-11, atol=1e-11)
    assert torch.autograd.gradcheck(sk.sisa_attention, tuple(inputs.values()), nondet_tol=1e-12)


@pytest.mark.parametrize("decay", [-4.0, 1.0, 3.0])
def test_devices_without_a_flash_kernel(monkeypatch, decay):
    """The dense scores of other devices, on the CPU, 100 queries at a time."""
    monkeypatch.setattr(dense, "has_flash", lambda device: False)
    monkeypatch.setattr(dense, "ROWS", 100)
    check_exact(*problem(B=2, L=257, H=4, G=2, Ds=16, decay=decay))


@pytest.mark.parametrize("decay", [-5.0, -2.0, 1.0])
def test_later_tokens_do_not_change_earlier_outputs(decay):
    inputs, _ = problem(L=600, decay=decay)
    changed, _ = problem(L=600, decay=decay, seed=1)
    cut = 400
    mixed = {
        n: x if n == "lam" else torch.cat((x[:, :cut], changed[n][:, cut:]), 1)
        for n, x in inputs.items()
    }
    mixed["log_decay"][:, cut:] *= 20
    before, after = (sk.sisa_attention(**x)[:, :cut] for x in (inputs, mixed))
    assert worst_row(after, before.double()) <= 5e-6


@pytest.mark.parametrize("flash", [True, False])
def test_one_token_may_wipe_out_everything_before_it(monkeypatch, flash):
    monkeypatch.setattr(dense, "has_flash", lambda device: flash)
    inputs, dy = problem(L=300, decay=-5.0)
    log_decay = inputs["log_decay"].detach().clone()
    log_decay[:, 150] = -1e30
    log_decay[:, 200:203] = -500.0
    log_decay[:, 250] = -torch.inf
    check_exact({**inputs, "log_decay": log_decay}, dy)


def test_chunks_follow_the_decay():
    g = torch.linspace(0, -100, 1001, dtype=torch.float64)[None, :, None].expand(1, 1001, 2).clone()
    bounds = chunked.chunk_bounds(g)
    assert bounds[0][0] == 0
    assert bounds[-1][1] == 1001
    assert all(end == start for (_, end), (start, _) in itertools.pairwise(bounds))
    assert len(bounds) == 3
    assert all((g[:, lo] - g[:, hi - 1]).max() <= chunked.MAX_RANGE for lo, hi in bounds)
    g[:, :, 1] *= 4
    assert len(chunked.chunk_bounds(g)) == 10, "the fastest head decides"


@pytest.mark.parametrize("decay", [-5.0, 0.0])
def test_memory_is_linear_in_length(decay):
    """Peak extra memory of the forward at L = 8192, 2 heads, in its own process: under 200 MB."""
    script = f"""
import resource
import torch
import sisa_kernels as sk
from sisa_kernels.testing import problem
torch.set_num_threads(2)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with torch.no_grad():
    sk.sisa_attention(**problem(L=64)[0]._asdict())
    inputs, _ = problem(L=8192, decay={decay})
    before = peak()
    sk.sisa_attention(**inputs._asdict())
print((peak() - before) / 1024)
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 200


def test_clamped_is_the_augmented_call():
    """mode="clamped" is stock attention on augment_qk's operands, and the oracle's clamped mode."""
    inputs, dy = problem(L=257, decay=0.0)
    y, grads = value_and_grads(sk.sisa_attention, inputs, dy, mode="clamped")
    y_ref, grads_ref = oracle(inputs, dy, mode="clamped")
    assert relative(y, y_ref) <= 5e-6
    assert max(relative(grads[n], grads_ref[n]) for n in NAMES) <= 1e-4

    q_aug, k_aug = sk.augment_qk(**{n: x for n, x in inputs.items() if n != "v"})
    operands = (x.transpose(1, 2) for x in (q_aug, k_aug, inputs["v"]))
    plain = F.scaled_dot_product_attention(*operands, is_causal=True, scale=64**-0.5)
    torch.testing.assert_close(plain.transpose(1, 2), y, rtol=1e-4, atol=1e-5)


def test_one_call_is_exact_or_refuses():
    inputs, dy = problem(L=257, decay=-4.0)
    y, _ = value_and_grads(sk.sisa_attention, inputs, dy, backend="one_call")
    assert relative(y, sk.reference.sisa_attention(**in_fp64(inputs))) <= 5e-6
    wide, _ = problem(L=257, decay=1.0)
    with pytest.raises(ValueError, match=r"backend 'one_call' is exact in torch.float32 while"):
        sk.sisa_attention(**wide, backend="one_call")


def test_the_environment_forces_a_backend(monkeypatch):
    inputs, _ = problem(L=63)
    monkeypatch.setenv("SISA_BACKEND", "triton")
    with pytest.raises(ValueError, match="SISA_BACKEND 'triton' cannot run here"):
        sk.sisa_attention(**in_fp64(inputs), backend="chunked")
    monkeypatch.setenv("SISA_BACKEND", "cuda")
    with pytest.raises(ValueError, match=r"SISA_BACKEND must be one of auto, .* got 'cuda'"):
        sk.sisa_attention(**inputs)
    monkeypatch.setenv("SISA_BACKEND", "reference")
    assert torch.equal(sk.sisa_attention(**inputs), sk.reference.sisa_attention(**inputs))


@pytest.mark.parametrize(("old", "name"), [("sdpa", "chunked"), ("flash", "one_call")])
def test_old_names_of_backends(monkeypatch, old, name):
    inputs, _ = problem(L=63, decay=-4.0)
    y = sk.sisa_attention(**inputs, backend=name)
    assert torch.equal(sk.sisa_attention(**inputs, backend=old), y)
    monkeypatch.setenv("SISA_BACKEND", old)
    assert torch.equal(sk.sisa_attention(**inputs, backend="reference"), y)


NAN_DECAY = torch.full((1, 63, 4), torch.nan)
BAD = {
    "q must be [batch, length, heads, channels]": {"q": torch.zeros(3, 4)},
    "q must be a torch.Tensor, got list": {"q": [1.0]},
    "q must be one of torch.float32": {"q": torch.zeros(1, 63, 4, 64, dtype=torch.int64)},
    "the number of key heads must divide": {"k": torch.zeros(1, 63, 3, 64)},
    "k must have shape [1, 63, 4, 64], got [1, 62, 4, 64]": {"k": torch.zeros(1, 62, 4, 64)},
    "k must be torch.float32, got torch.bfloat16": {
        "k": torch.zeros(1, 63, 4, 64, dtype=torch.bfloat16)
    },
    "v must be [batch, length, key heads, Dv]": {"v": None},
    "v must have shape [1, 63, 4, 16], got [1, 63, 2, 16]": {"v": torch.zeros(1, 63, 2, 16)},
    "b must be [batch, length, key heads, Ds] with Ds even": {"b": torch.zeros(1, 63, 4, 15)},
    "c must have shape [1, 63, 4, 16], got [1, 63, 4, 18]": {"c": torch.zeros(1, 63, 4, 18)},
    "theta must have shape [1, 63, 4, 8]": {"theta": torch.zeros(1, 63, 4, 16)},
    "log_decay must be torch.float32, got torch.float16": {
        "log_decay": torch.zeros(1, 63, 4, dtype=torch.float16)
    },
    "log_decay must be <= 0 everywhere": {"log_decay": torch.full((1, 63, 4), 0.1)},
    "log_decay must be <= 0 everywhere (log of a decay in (0, 1]), got a maximum of nan": {
        "log_decay": NAN_DECAY
    },
    "lam must be finite and >= 0": {"lam": torch.tensor([1.0, 1.0, -0.1, 1.0])},
    "lam must have shape [4], got [1]": {"lam": torch.ones(1)},
    "lam must be on cpu like q, got meta": {"lam": torch.ones(4, device="meta")},
    "rotary must be a pair": {"rotary": torch.zeros(63, 32)},
    "rotary[1] (sin) must have shape [63, 32]": {
        "rotary": (torch.zeros(63, 32), torch.zeros(63, 31))
    },
    "rotary[0] (cos) must not require grad": {
        "rotary": (torch.zeros(63, 32, requires_grad=True), torch.zeros(63, 32))
    },
    "mode must be one of exact, clamped, got 'fast'": {"mode": "fast"},
    "backend must be one of": {"backend": "fast"},
    "backend 'triton' cannot run here: it computes mode 'exact' only": {
        "backend": "triton",
        "mode": "clamped",
    },
    "cu_seqlens must be an int32 or int64 tensor": {"cu_seqlens": torch.tensor([0.0, 63.0])},
    "cu_seqlens must rise from 0 to at most the length 63, got [0, 9, 8, 63]": {
        "cu_seqlens": torch.tensor([0, 9, 8, 63])
    },
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message):
    inputs, _ = problem(L=63, H=4)
    with pytest.raises((ValueError, TypeError)) as error:
        sk.sisa_attention(**{**inputs, **BAD[message]})
    assert message in str(error.value)


def test_bounds_on_a_gpu_are_asserted_there(monkeypatch):
    """What is asserted, its result read here."""
    asserted = []
    monkeypatch.setattr(torch, "_assert_async", lambda holds, _: asserted.append(holds.item()))
    cases = (([0, 9, 9, 62], True), ([0, 9, 8, 63], False), ([1, 63], False), ([0, 64], False))
    for bounds, right in cases:
        given = torch.tensor(bounds, dtype=torch.int32)
        on_gpu = type("OnGpu", (torch.Tensor,), {"device": torch.device("cuda", 0)})
        checks.check_documents(given.as_subclass(on_gpu), torch.zeros(1, 63, 1, 1))
        assert asserted.pop() is right


def test_packed_documents_need_batch_one():
    inputs, _ = problem(B=2, L=63)
    with pytest.raises(ValueError, match="cu_seqlens needs the documents packed into one sequence"):
        sk.sisa_attention(**inputs, cu_seqlens=torch.tensor([0, 63], dtype=torch.int32))


def test_command_line_checks_the_machine(monkeypatch):
    monkeypatch.setenv("SISA_BACKEND", "reference")
    done = subprocess.run(
        [sys.executable, "-m", "sisa_kernels"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    rows = [line.split() for line in lines if line.startswith("strong fp32")]
    errors = {(row[2], row[3]): row[4] for row in rows}
    assert float(errors["exact", "chunked"]) <= 5e-6
    assert float(errors["clamped", "one_call"]) > 0.3
    verdicts = {(row[2], row[3]): row[-1] for row in rows}
    native = "exact" if sk.backends()["native"] == "available" else "absent"
    if not torch.cuda.is_available():
        assert verdicts == {
            ("exact", "native"): native,
            ("exact", "chunked"): "exact",
            ("exact", "one_call"): "refused",
            ("clamped", "one_call"): "published",
        }
    assert re.fullmatch(r"OK: all \d+ rows are as they should be", lines[-1])
    assert all(len(line) <= 80 for line in lines if line.startswith(("strong", "weak")))
    assert "SISA_BACKEND=reference does not count below" in done.stdout
    assert set(sk.backends()) == {"native", "triton", "flash", "sdpa", "extension"}


def test_command_line_says_why_a_path_failed(monkeypatch, capsys):
    def fails(*_, **__):
        raise RuntimeError("no kernel image\nCompile with")

    monkeypatch.setattr(command, "sisa_attention", fails)
    monkeypatch.setattr(command, "backends", lambda table=False: {"native": "of other sources"})
    assert command.main() == 1
    *_, last = lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line.startswith(("strong", "weak"))]
    failed = [line for line in rows if line.endswith("RuntimeError: no kernel image  FAILED")]
    absent = [line for line in rows if line.endswith("of other sources  absent")]
    assert len(failed) + len(absent) == len(rows)
    assert last == f"NOT OK: {len(failed)} of {len(rows)} rows are wrong or failed"
    assert failed


def test_command_line_finds_a_wrong_path(monkeypatch, capsys):
    def wrong(*args, **kwargs):
        return 1.01 * sk.sisa_attention(*args, **kwargs)

    monkeypatch.setattr(command, "sisa_attention", wrong)
    monkeypatch.setattr(command, "CASES", {"weak": -5.0})
    monkeypatch.setattr(command, "DTYPES", {torch.float32: "fp32"})
    assert command.main() == 1
    assert "  WRONG\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("page", "shape"), [("README.md", (2, 1000, 8, 64)), ("docs/own-model.md", (2, 1000, 512))]
)
def test_the_first_example_of_a_page_runs(page, shape):
    scope: dict = {}
    exec((ROOT / page).read_text().split("```python\n")[1].split("```")[0], scope)
    assert scope["y"].shape == shape
    scope["y"].sum().backward()
    lam = scope["attn"].lambda_raw if "attn" in scope else scope["lam"]
    assert lam.grad.isfinite().all()
