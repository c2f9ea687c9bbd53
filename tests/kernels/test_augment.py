"""The augmentation against fp64: the compiled op and PyTorch's, forward and every gradient."""

import math

import pytest
import torch

import sisa_kernels as sk
from sisa_kernels import _extension
from sisa_kernels.testing import relative
from tests.support.augment import (
    BF16,
    CASES,
    COMPILED,
    EAGER,
    FP16,
    FP32,
    any_call,
    augment_call,
    check,
    check_elements,
    run,
    strided_and_plain,
)

needs_extension = pytest.mark.skipif(
    not _extension.LOADED, reason=f"the library is {_extension.STATE}"
)
PAST_THE_CACHES = dict(length=3000, batch=1, heads=(12, 12), widths=(64, 32))


@needs_extension
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize(
    "case", [*CASES.values(), PAST_THE_CACHES], ids=[*CASES, "past the caches"]
)
def test_compiled_matches_fp64(case, dtype):
    check(augment_call(dtype=dtype, **case), dtype)


@needs_extension
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("out", [FP32, BF16, FP16], ids=str)
def test_result_dtype_is_independent_of_the_inputs(dtype, out):
    check(augment_call(length=63, dtype=dtype, out=out), out)


@needs_extension
@any_call
def test_any_call_matches_fp64(call):
    check_elements(COMPILED, *call)


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
    p, threads = augment_call(**case), torch.get_num_threads()
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
    p = augment_call(length=150, heads=heads, decay=decay)
    q, k, b, c, *narrow = p.inputs
    inputs = [x.detach().requires_grad_() for x in (q, k, k[..., :32].clone(), b, c, *narrow)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    y = sk.sisa_attention(*inputs, rotary=tuple(p.rotary))
    y_exact = sk.reference.sisa_attention(*exact, rotary=tuple(p.double().rotary))
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    grads = torch.autograd.grad(y, inputs, dy)
    grads_exact = torch.autograd.grad(y_exact, exact, dy.double())
    assert relative(y, y_exact) < 1e-6
    for name, grad, grad_exact in zip(
        ("q", "k", "v", "b", "c", "log_decay", "theta", "lam"), grads, grads_exact
    ):
        assert relative(grad, grad_exact) < 1e-5, name


def test_decay_and_phase_in_fp32_beside_fp64():
    p = augment_call(length=63)
    wide = p.double().inputs
    for found, right in zip(sk.augment_qk(*wide[:4], *p.inputs[4:]), sk.augment_qk(*wide)):
        assert relative(found, right) < 1e-14


@pytest.mark.parametrize("heads", [(2, 1), (2, 2)], ids=["G<H", "G=H"])
@pytest.mark.parametrize("decay", [-5.0, 9.0], ids=["free", "clamped"])
def test_gradcheck(decay, heads):
    p = augment_call(length=5, batch=1, heads=heads, widths=(2, 2), step=0.5, decay=decay).double()
    inputs = [x.contiguous().requires_grad_() for x in p.inputs]
    spans = -inputs[4].sum(1)
    assert (spans > 40).all() if decay > 0 else (spans < 1).all()

    def augmented(*x):
        return sk.augment_qk(*x, rotary=tuple(p.rotary))

    assert torch.autograd.gradcheck(augmented, inputs)


@pytest.mark.parametrize("clamp", [1.0, math.inf])
def test_gradcheck_within_segments(clamp):
    """What is attended within segments alone needs no carry into them."""
    p = augment_call(length=6, batch=1, heads=(2, 1), widths=(2, 2), starts=(0, 1, 3), decay=0.5)
    p = p._replace(clamp=clamp).double()
    inputs = [x.contiguous().requires_grad_() for x in p.inputs]

    def scores(*x):
        call = p._replace(inputs=x)
        q_aug, k_aug = torch.ops.sisa.augment_eager(*call.of_both(), p.width, torch.float64)
        segments = zip(q_aug.tensor_split(p.starts[1:], 1), k_aug.tensor_split(p.starts[1:], 1))
        return tuple(torch.einsum("bihw,bjgw->bhij", q, k) for q, k in segments)

    assert torch.autograd.gradcheck(scores, inputs)


@pytest.mark.parametrize(
    ("suffix", "dtype"), [("", FP32), ("_eager", FP32), ("_eager", torch.float64)], ids=str
)
def test_opcheck(suffix, dtype):
    p = augment_call(length=9, starts=(0, 4), flux=True, heads=(4, 2), pad=2)
    p = p.double() if dtype == torch.float64 else p
    inputs = [x.detach().requires_grad_() for x in p.inputs]
    forward, backward = (
        getattr(torch.ops.sisa, f"{name}{suffix}") for name in ("augment", "augment_backward")
    )
    torch.library.opcheck(forward, (*p._replace(inputs=inputs).of_both(), p.width, dtype))
    torch.library.opcheck(backward, (*p.grads, *p.of_both(), *p.flux))


@pytest.mark.parametrize(
    "function",
    [sk.augment_qk, lambda *x, rotary: (sk.sisa_attention(*x[:2], x[1], *x[2:], rotary=rotary),)],
)
def test_compile_fullgraph(function):
    p = augment_call(length=64)
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
    ids=["augment", "chunked"],
)
def test_differentiable_once(function):
    inputs = [x.detach().requires_grad_() for x in augment_call(length=9).inputs]
    (first,) = torch.autograd.grad(
        function(*inputs)[0].square().sum(), inputs[:1], create_graph=True
    )
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(first.sum(), inputs[1:2])


@pytest.mark.parametrize("dtype", [FP32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "function",
    [sk.augment_qk, lambda *x: (sk.sisa_attention(*x[:2], x[1], *x[2:]),)],
    ids=["augment", "chunked"],
)
def test_forward_mode_is_refused(function, dtype):
    q, *others = [x.to(dtype) for x in augment_call(length=9).inputs]

    def loss(x):
        return function(x, *others)[0].square().sum()

    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(loss, (q,), (q,))


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
# Of a direct call; the compiled kernels' own checks can raise nothing else.
refusing = pytest.mark.parametrize(
    ("implementation", "refusal"),
    [
        pytest.param(COMPILED, RuntimeError, marks=needs_extension, id="compiled"),
        pytest.param(EAGER, (ValueError, TypeError), id="eager"),
    ],
)
BACKWARD = ("dq_aug", "dk_aug", *FORWARD[:-2], "decay_flux", "phase_flux")


@refusing
@pytest.mark.parametrize(("name", "change"), [x for group in WRONG.values() for x in group])
def test_a_wrong_call_raises(implementation, refusal, name, change):
    p = augment_call(length=9, starts=(0, 4), flux=True)
    given = dict(zip(FORWARD, (*p.of_both(), p.width, FP32)))
    backward = dict(zip(BACKWARD, (*p.grads, *p.of_both(), *p.flux)))
    for function, arguments in (
        (implementation.forward, given),
        (implementation.backward, backward),
    ):
        with pytest.raises(refusal, match=name):
            function(*{**arguments, name: change(arguments[name])}.values())


@refusing
def test_wrong_results_and_fluxes_raise(implementation, refusal):
    p = augment_call(length=9, starts=(0, 4), flux=True)
    for width, dtype in ((79, FP32), (-1, FP32), (80, torch.int32)):
        with pytest.raises(refusal, match="width" if dtype == FP32 else "dtype"):
            implementation.forward(*p.of_both(), width, dtype)
    arguments = dict(zip(BACKWARD, (*p.grads, *p.of_both(), *p.flux)))
    wrong = [
        ("dq_aug", lambda x: x[..., :79]),
        ("dk_aug", lambda x: x.half()),
        ("dk_aug", lambda x: x[:, :5]),
    ]
    for name in ("decay_flux", "phase_flux"):
        wrong += [(name, lambda x: x[:, :1]), (name, lambda x: x.float()), (name, lambda x: x[0])]
    for name, change in wrong:
        with pytest.raises(refusal, match=name):
            implementation.backward(*{**arguments, name: change(arguments[name])}.values())
    q, k, *rest = p.inputs
    for elsewhere in (k.to("meta"), k.to_sparse()):
        call = p._replace(inputs=[q, elsewhere, *rest])
        with pytest.raises((ValueError, TypeError, RuntimeError, NotImplementedError)):
            implementation.forward(*call.of_both(), p.width, FP32)
