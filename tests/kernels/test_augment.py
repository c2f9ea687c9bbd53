"""The augmentation against its fp64 form: the compiled op and the PyTorch one, forward and every
gradient.
"""

import math
import subprocess
import sys
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

import sisa_kernels as sk
from sisa_kernels import _extension
from sisa_kernels.paths.augment import augment_backward_eager, augment_eager

NAMES = ("dq", "dk", "db", "dc", "dlog_decay", "dtheta", "dlam")
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
needs_extension = pytest.mark.skipif(
    not _extension.LOADED, reason=f"the extension is {_extension.STATE}"
)


class Implementation(NamedTuple):
    forward: Callable
    backward: Callable


COMPILED = Implementation(torch.ops.sisa.augment.default, torch.ops.sisa.augment_backward.default)
EAGER = Implementation(augment_eager, augment_backward_eager)


class Problem(NamedTuple):
    inputs: list  # q, k, b, c, log_decay, theta, lam
    rotary: list  # cos, sin; or None, None
    starts: list
    clamp: float
    width: int
    grads: list  # dq_aug, dk_aug
    flux: list  # decay, phase; or None, None

    def double(self) -> "Problem":
        return self._replace(
            **{name: _double(getattr(self, name)) for name in ("inputs", "rotary", "grads", "flux")}
        )


def _double(tensors):
    return [None if x is None else x.double() for x in tensors]


def rotary_tables(length: int, head_width: int) -> list[torch.Tensor]:
    angle = torch.arange(length)[:, None] * 10000 ** (-torch.arange(0, head_width, 2) / head_width)
    return [angle.cos(), angle.sin()]


def packed_views(projection: torch.Tensor, sizes: list[tuple[int, int]]) -> list[torch.Tensor]:
    """Views [B, L, heads, channels] that lie one after the other in the last axis of one [B, L,
    sum] tensor.
    """
    pieces = projection.split([heads * channels for heads, channels in sizes], 2)
    return [piece.unflatten(2, size) for piece, size in zip(pieces, sizes)]


def problem(
    length=257,
    batch=2,
    heads=(4, 4),
    widths=(64, 16),
    dtype=FP32,
    out=None,
    decay=-5.0,
    step=0.3,
    starts=(0,),
    clamp=math.inf,
    pad=0,
    rotary=True,
    flux=False,
    packed=True,
    seed=0,
) -> Problem:
    """A random problem of (query heads, key heads) and (Dh, Ds); log_decay is -softplus(decay +
    noise), theta step * noise.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    (H, G), (Dh, Ds) = heads, widths
    sizes = [(H, Dh), (G, Dh), (G, Ds), (H, Ds)]
    wide = packed_views(normal(batch, length, sum(n * w for n, w in sizes)).to(dtype), sizes)
    narrow = packed_views(normal(batch, length, G + G * Ds // 2), [(G, 1), (G, Ds // 2)])
    narrow = [-F.softplus(decay + 0.5 * narrow[0][..., 0]), narrow[1].mul_(step)]
    if not packed:
        wide, narrow = [x.contiguous() for x in wide], [x.contiguous() for x in narrow]
    lam = 0.1 + torch.rand(H, generator=generator)
    width = Dh + Ds + pad
    grads = [normal(batch, length, n, width).to(out or dtype) for n in heads]
    fluxes = (
        [normal(batch, len(starts), G).double(), normal(batch, len(starts), G, Ds // 2).double()]
        if flux
        else [None, None]
    )
    tables = rotary_tables(length, Dh) if rotary else [None, None]
    return Problem([*wide, *narrow, lam], tables, list(starts), clamp, width, grads, fluxes)


def run(implementation: Implementation, p: Problem, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    results = implementation.forward(*p.inputs, *p.rotary, p.starts, p.clamp, p.width, dtype)
    grads = implementation.backward(*p.grads, *p.inputs, *p.rotary, p.starts, p.clamp, *p.flux)
    return dict(zip(("q_aug", "k_aug", *NAMES), (*results, *grads)))


def errors(
    results: dict[str, torch.Tensor], oracle: dict[str, torch.Tensor]
) -> dict[str, tuple[float, float]]:
    """Relative error of each result over the whole tensor, and of its worst token's row against the
    typical row's size.
    """
    found = {}
    for name, exact in oracle.items():
        error = (
            (results[name].double() - exact).flatten(2)
            if exact.ndim > 1
            else (results[name].double() - exact)[:, None]
        )
        rows = exact.flatten(2) if exact.ndim > 1 else exact[:, None]
        scale = max(rows.norm(dim=-1).square().mean().sqrt().item(), 1e-30)
        found[name] = (
            (error.norm() / max(rows.norm().item(), 1e-30)).item(),
            (error.norm(dim=-1).max() / scale).item(),
        )
    return found


def check(
    p: Problem, dtype: torch.dtype, multiple: float = 2.0, implementation: Implementation = COMPILED
) -> None:
    """The compiled op's error stays within a small multiple of the PyTorch implementation's in the
    same dtype.
    """
    oracle = run(EAGER, p.double(), torch.float64)
    compiled, eager = run(implementation, p, dtype), run(EAGER, p, dtype)
    for name in oracle:
        assert compiled[name].shape == eager[name].shape, name
        assert compiled[name].dtype == eager[name].dtype, name
        assert compiled[name].is_contiguous(), name
    floor = 4 * torch.finfo(FP32).eps
    found, allowed = errors(compiled, oracle), errors(eager, oracle)
    for name, pair in found.items():
        for what, error, bound in zip(("whole", "worst row"), pair, allowed[name]):
            assert error <= multiple * bound + floor, (
                f"{name}, {what}: {error:.2e}, PyTorch in the same dtype {bound:.2e}"
            )


CASES = {
    "one token": dict(length=1),
    "63 tokens, rotation off": dict(length=63, rotary=False),
    "1000 tokens, weak decay": dict(length=1000, decay=-7.0),
    "strong decay, clamped": dict(decay=1.0, clamp=11.0),
    "decay past every exponent, segments": dict(length=63, decay=40.0, starts=range(63)),
    "shared key heads": dict(heads=(6, 2)),
    "one key head": dict(heads=(3, 1), flux=True),
    "segments and fluxes": dict(starts=(0, 1, 40, 41, 200), decay=-1.0, flux=True),
    "padded width": dict(pad=13),
    "odd widths": dict(widths=(60, 6), heads=(3, 3), pad=1),
    "odd head width, rotation off": dict(widths=(5, 2), rotary=False),
    "wide state": dict(widths=(64, 128), length=100),
    "contiguous": dict(packed=False),
    "past the caches": dict(length=3000, batch=1, heads=(12, 12), widths=(64, 32)),
    "large steps": dict(step=50.0),
}


@needs_extension
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_compiled_matches_fp64(case, dtype):
    check(problem(dtype=dtype, **case), dtype)


@needs_extension
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("out", [FP32, BF16, FP16], ids=str)
def test_result_dtype_is_independent_of_the_inputs(dtype, out):
    check(problem(length=63, dtype=dtype, out=out), out)


def strided_and_plain() -> tuple[Problem, Problem]:
    """One problem with its tensors transposed, expanded and sliced, and contiguous."""
    p = problem(length=63)
    transposed = [x.transpose(1, -1).contiguous().transpose(1, -1) for x in p.inputs[:6]]
    expanded = [*transposed[:3], transposed[3][:, :, :1].expand_as(transposed[3]), *transposed[4:]]
    strided = p._replace(
        inputs=[*expanded, torch.stack((p.inputs[6], p.inputs[6]), 1)[:, 0]],
        rotary=[table.T.contiguous().T for table in p.rotary],
        grads=[x.transpose(0, 3).contiguous().transpose(0, 3) for x in p.grads],
    )
    plain = strided._replace(
        **{
            name: [x.contiguous() for x in getattr(strided, name)]
            for name in ("inputs", "rotary", "grads")
        }
    )
    return strided, plain


@needs_extension
def test_any_strides():
    strided, plain = strided_and_plain()
    results = run(COMPILED, strided, FP32)
    for name, expected in run(COMPILED, plain, FP32).items():
        assert torch.equal(results[name], expected), name


@needs_extension
@pytest.mark.parametrize(
    "case",
    [dict(length=1000), dict(length=1000, batch=1, starts=(0, 100, 731), flux=True, heads=(4, 2))],
)
def test_bits_do_not_depend_on_threads(case):
    p, threads = problem(**case), torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3, 1):
            torch.set_num_threads(n)
            results.append(run(COMPILED, p, FP32))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for name, x in results[0].items():
            assert torch.equal(x, other[name]), name


@pytest.mark.parametrize(
    "implementation",
    [pytest.param(COMPILED, marks=needs_extension), EAGER],
    ids=["compiled", "eager"],
)
def test_long_phase_keeps_its_digits(implementation):
    length = 131072
    theta = torch.rand(1, length, 1, 8, generator=torch.Generator().manual_seed(0)) * 2
    q, unit = (
        torch.zeros(1, length, 1, 2),
        torch.tensor([1.0, 0.0]).repeat(8).expand(1, length, 1, 16),
    )
    lam = torch.full((1,), 2**-0.5)  # makes s = 1 at Dh = 2
    _, k_aug = implementation.forward(
        q, q, unit, unit, q[..., 0], theta, lam, None, None, [0], 11.0, 18, FP32
    )
    phase = theta.double().cumsum(1)
    exact = torch.stack((phase.cos(), phase.sin()), -1).flatten(-2)
    assert (k_aug[..., 2:].double() - exact).abs().max() < 1e-6


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)], ids=["G=H", "G<H"])
@pytest.mark.parametrize("decay", [-5.0, 0.0], ids=["weak", "strong"])
def test_attention_matches_the_oracle(heads, decay):
    p = problem(length=150, heads=heads, decay=decay)
    q, k, b, c, *narrow = p.inputs
    inputs = [x.detach().requires_grad_() for x in (q, k, k[..., :32].clone(), b, c, *narrow)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    y = sk.sisa_attention(*inputs, rotary=tuple(p.rotary))
    y_exact = sk.reference.sisa_attention(*exact, rotary=tuple(_double(p.rotary)))
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    grads, grads_exact = (
        torch.autograd.grad(y, inputs, dy),
        torch.autograd.grad(y_exact, exact, dy.double()),
    )
    assert (y - y_exact).norm() / y_exact.norm() < 1e-6
    for name, grad, grad_exact in zip(
        ("q", "k", "v", "b", "c", "log_decay", "theta", "lam"), grads, grads_exact
    ):
        assert (grad - grad_exact).norm() / grad_exact.norm() < 1e-5, name


def test_gradients_of_fp64_are_exact():
    p = problem(length=5, batch=1, heads=(2, 1), widths=(4, 2), step=0.5).double()
    inputs = [x.contiguous().requires_grad_() for x in p.inputs]

    def scores(*x):  # in which m, a constant of the backward, cancels
        return torch.einsum("bihw,bjgw->bhij", *sk.augment_qk(*x, rotary=tuple(p.rotary)))

    assert torch.autograd.gradcheck(scores, inputs)


@pytest.mark.parametrize("dtype", [FP32, torch.float64], ids=str)
def test_opcheck(dtype):
    p = problem(length=9, starts=(0, 4), flux=True, heads=(4, 2), pad=2)
    p = p.double() if dtype == torch.float64 else p
    inputs = [x.detach().requires_grad_() for x in p.inputs]
    torch.library.opcheck(
        torch.ops.sisa.augment, (*inputs, *p.rotary, p.starts, p.clamp, p.width, dtype)
    )
    torch.library.opcheck(
        torch.ops.sisa.augment_backward,
        (*p.grads, *p.inputs, *p.rotary, p.starts, p.clamp, *p.flux),
    )


@pytest.mark.parametrize(
    "function",
    [sk.augment_qk, lambda *x, rotary: (sk.sisa_attention(*x[:2], x[1], *x[2:], rotary=rotary),)],
)
def test_compile_fullgraph(function):
    p = problem(length=64)
    inputs = [x.detach().requires_grad_() for x in p.inputs]

    def loss(*x):
        return sum(y.square().sum() for y in function(*x, rotary=tuple(p.rotary)))

    plain = loss(*inputs)
    compiled = torch.compile(loss, fullgraph=True)(*inputs)
    torch.testing.assert_close(compiled, plain)
    for grad, expected in zip(
        torch.autograd.grad(compiled, inputs), torch.autograd.grad(plain, inputs)
    ):
        torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "function",
    [sk.augment_qk, lambda *x: (sk.sisa_attention(*x[:2], x[1], *x[2:]),)],
    ids=["augment", "sdpa"],
)
def test_differentiable_once(function):
    inputs = [x.detach().requires_grad_() for x in problem(length=9).inputs]
    (first,) = torch.autograd.grad(
        function(*inputs)[0].square().sum(), inputs[:1], create_graph=True
    )
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(first.sum(), inputs[1:2])


@pytest.mark.parametrize("dtype", [FP32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "function",
    [sk.augment_qk, lambda *x: (sk.sisa_attention(*x[:2], x[1], *x[2:]),)],
    ids=["augment", "sdpa"],
)
def test_no_transform_gives_a_wrong_gradient(function, dtype):
    q, *others = [x.to(dtype) for x in problem(length=9).inputs]

    def loss(x):
        return function(x, *others)[0].square().sum()

    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(loss, (q,), (q,))
    with pytest.raises(RuntimeError, match="functorch"):
        torch.func.grad(loss)(q)


WRONG = {
    "q": [("q", lambda x: x[0]), ("q", lambda x: x[:, :0]), ("q", lambda x: x.int())],
    "k": [
        ("k", lambda x: x[0]),
        ("k", lambda x: x[:, :, :3]),
        ("k", lambda x: x.half()),
        ("k", lambda x: x[..., :8]),
    ],
    "b": [("b", lambda x: x[..., :3]), ("b", lambda x: x[0]), ("b", lambda x: x[:, :5])],
    "c": [("c", lambda x: x[..., :8]), ("c", lambda x: x.half())],
    "log_decay": [
        ("log_decay", lambda x: x[..., None]),
        ("log_decay", lambda x: x[:1]),
        ("log_decay", lambda x: x.half()),
    ],
    "theta": [
        ("theta", lambda x: x[..., :3]),
        ("theta", lambda x: x.long()),
        ("theta", lambda x: x.double()),
    ],
    "lam": [("lam", lambda x: x[:1]), ("lam", lambda x: x[None]), ("lam", lambda x: x.double())],
    "cos": [("cos", lambda x: None), ("cos", lambda x: x[:3])],
    "sin": [("sin", lambda x: x[:, :3]), ("sin", lambda x: x.half())],
    "starts": [
        ("starts", lambda x, bad=bad: bad) for bad in ([], [1], [0, 0], [0, 5, 3], [0, 9], [0, -1])
    ],
    "clamp": [("clamp", lambda x: -1.0), ("clamp", lambda x: math.nan)],
}
FORWARD = (
    "q",
    "k",
    "b",
    "c",
    "log_decay",
    "theta",
    "lam",
    "cos",
    "sin",
    "starts",
    "clamp",
    "width",
    "dtype",
)
BACKWARD = ("dq_aug", "dk_aug", *FORWARD[:-2], "decay_flux", "phase_flux")


@pytest.mark.parametrize("implementation", [COMPILED, EAGER], ids=["compiled", "eager"])
@pytest.mark.parametrize(("name", "change"), [x for group in WRONG.values() for x in group])
def test_a_wrong_call_raises(implementation, name, change):
    p = problem(length=9, starts=(0, 4), flux=True)
    given = dict(zip(FORWARD, (*p.inputs, *p.rotary, p.starts, p.clamp, p.width, FP32)))
    backward = {**dict(zip(BACKWARD, (*p.grads, *p.inputs, *p.rotary, p.starts, p.clamp, *p.flux)))}
    for function, arguments in (
        (implementation.forward, given),
        (implementation.backward, backward),
    ):
        with pytest.raises((ValueError, TypeError), match=name):
            function(*{**arguments, name: change(arguments[name])}.values())


@pytest.mark.parametrize("implementation", [COMPILED, EAGER], ids=["compiled", "eager"])
def test_wrong_results_and_fluxes_raise(implementation):
    p = problem(length=9, starts=(0, 4), flux=True)
    for width, dtype in ((79, FP32), (-1, FP32), (80, torch.int32)):
        with pytest.raises((ValueError, TypeError), match="width" if dtype == FP32 else "dtype"):
            implementation.forward(*p.inputs, *p.rotary, p.starts, p.clamp, width, dtype)
    arguments = dict(zip(BACKWARD, (*p.grads, *p.inputs, *p.rotary, p.starts, p.clamp, *p.flux)))
    wrong = [
        ("dq_aug", lambda x: x[..., :79]),
        ("dk_aug", lambda x: x.half()),
        ("dk_aug", lambda x: x[:, :5]),
    ]
    for name in ("decay_flux", "phase_flux"):
        wrong += [(name, lambda x: x[:, :1]), (name, lambda x: x.float()), (name, lambda x: x[0])]
    for name, change in wrong:
        with pytest.raises((ValueError, TypeError), match=name):
            implementation.backward(*{**arguments, name: change(arguments[name])}.values())
    with pytest.raises((ValueError, TypeError, RuntimeError, NotImplementedError)):
        implementation.forward(
            *p.inputs[:1],
            p.inputs[1].to("meta"),
            *p.inputs[2:],
            *p.rotary,
            p.starts,
            p.clamp,
            p.width,
            FP32,
        )
    with pytest.raises((ValueError, TypeError, RuntimeError, NotImplementedError)):
        implementation.forward(
            p.inputs[0],
            p.inputs[1].to_sparse(),
            *p.inputs[2:],
            *p.rotary,
            p.starts,
            p.clamp,
            p.width,
            FP32,
        )


@needs_extension
def test_schemas_agree():
    for name, eager in (("augment", augment_eager), ("augment_backward", augment_backward_eager)):
        schema = str(getattr(torch.ops.sisa, name).default._schema)
        assert schema == f"sisa::{name}{torch.library.infer_schema(eager, mutates_args=())}"


@needs_extension
def test_build_info():
    from sisa_kernels import _C  # type: ignore[attr-defined]

    assert _C.build_info() == _extension.RECORD
    assert _extension.RECORD["torch"] == torch.__version__
    assert _extension.RECORD["openmp"] != "off"


def _in_another_process(code: str, **environment: str) -> str:
    import os

    command = [sys.executable, "-W", "always", "-c", code]
    done = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )
    return done.stdout + done.stderr


def test_switched_off_it_is_silent():
    code = "import sisa_kernels as sk; print(sk.backends()['extension'])"
    assert _in_another_process(code, SISA_EXTENSION="0") == "switched off by SISA_EXTENSION=0\n"


@needs_extension
def test_another_torch_or_cpu_is_said_once_and_works():
    code = "import torch; torch.__version__ = '2.0'; import sisa_kernels as sk; print(sk.backends()['extension'])"
    said = _in_another_process(code)
    assert said.count("pip install") == 1
    assert "this is torch 2.0" in said
    if _extension.RECORD["vector"] != "DEFAULT":
        said = _in_another_process(
            "import sisa_kernels as sk; print(sk.backends()['extension'])",
            ATEN_CPU_CAPABILITY="default",
        )
        assert "this CPU runs DEFAULT" in said
