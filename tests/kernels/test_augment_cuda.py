"""The augmentation's CUDA kernels: compiled for the host (cuda_shim.h), and on a GPU."""

import ctypes
import re
import shutil
import subprocess
import sys
from functools import partial

import pytest
import torch

import sisa_kernels as sk
from sisa_kernels import _extension
from sisa_kernels.paths.augment import MAX_STATE_ON_CUDA
from sisa_kernels.testing import relative
from tests.support import ROOT
from tests.support.augment import (
    BF16,
    CASES,
    COMPILED,
    DTYPES,  # as sisa::DType counts them
    FP32,
    RESULTS,
    Implementation,
    any_call,
    augment_call,
    check,
    check_elements,
    run,
    strided_and_plain,
)


class Rows(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_int32),
        *((name, ctypes.c_int64) for name in ("batch", "token", "head", "channel")),
    )


class Params(ctypes.Structure):
    """sisa::AugmentParams."""

    _fields_ = (
        *(
            (name, ctypes.c_int64)
            for name in (
                "batch",
                "length",
                "heads",
                "key_heads",
                "head_width",
                "state_width",
                "width",
            )
        ),
        *((name, Rows) for name in ("q", "k", "b", "c", "log_decay", "theta", "cos", "sin")),
        ("lam", ctypes.c_void_p),
        ("starts", ctypes.c_void_p),
        ("segments", ctypes.c_int64),
        ("clamp", ctypes.c_double),
        ("q_aug", Rows),
        ("k_aug", Rows),
    )


class BackwardParams(Params):
    """sisa::AugmentBackwardParams."""

    _fields_ = (
        *((name, Rows) for name in ("dq", "dk", "db", "dc")),
        *(
            (name, ctypes.c_void_p)
            for name in ("dlog_decay", "dtheta", "dlam", "decay_flux", "phase_flux")
        ),
    )


def rows(x):
    if x is None:
        return Rows()
    strides = (0, x.stride(0), 0, x.stride(1)) if x.ndim == 2 else (*x.stride(), 1)[:4]
    return Rows(x.data_ptr(), DTYPES.index(x.dtype), *strides)


def fill(params, q, k, b, c, log_decay, theta, lam, cos, sin, starts, clamp, q_aug, k_aug):
    """Sets ``params`` and returns what must outlive them."""
    B, L, H, Dh = q.shape
    params.batch, params.length, params.heads, params.key_heads = B, L, H, k.shape[2]
    params.head_width, params.state_width, params.width = Dh, b.shape[3], q_aug.shape[3]
    tensors = dict(
        q=q,
        k=k,
        b=b,
        c=c,
        log_decay=log_decay,
        theta=theta,
        cos=cos,
        sin=sin,
        q_aug=q_aug,
        k_aug=k_aug,
    )
    for name, x in tensors.items():
        setattr(params, name, rows(x))
    lam, starts = lam.contiguous(), torch.tensor(starts)
    params.lam, params.starts, params.segments, params.clamp = (
        lam.data_ptr(),
        starts.data_ptr(),
        len(starts),
        clamp,
    )
    return lam, starts


def host_augment(
    library,
    last_block_first,
    q,
    k,
    b,
    c,
    log_decay,
    theta,
    lam,
    cos,
    sin,
    starts,
    clamp,
    width,
    dtype,
):
    q_aug, k_aug = (torch.full((*x.shape[:3], width), torch.nan, dtype=dtype) for x in (q, k))
    params = Params()
    alive = fill(params, q, k, b, c, log_decay, theta, lam, cos, sin, starts, clamp, q_aug, k_aug)
    assert library.host_augment(ctypes.byref(params), last_block_first) is None
    del alive
    return q_aug, k_aug


def host_augment_backward(library, last_block_first, dq_aug, dk_aug, *inputs):
    *inputs, decay_flux, phase_flux = inputs
    fluxes = [None if x is None else x.contiguous() for x in (decay_flux, phase_flux)]
    grads = [torch.full(x.shape, torch.nan, dtype=x.dtype) for x in inputs[:7]]
    params = BackwardParams()
    alive = fill(params, *inputs, dq_aug, dk_aug)
    params.dq, params.dk, params.db, params.dc = map(rows, grads[:4])
    params.dlog_decay, params.dtheta, params.dlam = (x.data_ptr() for x in grads[4:])
    params.decay_flux, params.phase_flux = (None if x is None else x.data_ptr() for x in fluxes)
    assert library.host_augment_backward(ctypes.byref(params), last_block_first) is None
    del alive
    return grads


@pytest.fixture(scope="session")
def host_library(tmp_path_factory):
    path = tmp_path_factory.mktemp("cuda_host") / "cuda_host.so"
    command = [
        "g++",
        "-std=c++20",
        "-O1",
        "-shared",
        "-fPIC",
        str(ROOT / "tests" / "cuda_host" / "cuda_host.cpp"),
        "-o",
        str(path),
    ]
    subprocess.run(command, check=True)
    library = ctypes.CDLL(str(path))
    for function in (library.host_augment, library.host_augment_backward):
        function.restype = ctypes.c_char_p  # what went wrong, or null
    return library


def host(library, last_block_first=False):
    return Implementation(
        partial(host_augment, library, last_block_first),
        partial(host_augment_backward, library, last_block_first),
    )


def on_gpu(op):
    """The op on copies of its operands on the GPU, of the same strides, its results copied back."""

    def copy(x):
        if not isinstance(x, torch.Tensor):
            return x
        storage = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
        return storage.cuda().as_strided(x.shape, x.stride(), x.storage_offset())

    return lambda *arguments: [x.cpu() for x in op(*map(copy, arguments))]


@pytest.fixture(params=["host", pytest.param("gpu", marks=pytest.mark.gpu)])
def implementation(request):
    if request.param == "host":
        return host(request.getfixturevalue("host_library"))
    if not _extension.has_kernels("cuda"):
        pytest.skip("the library was built without CUDA")
    return Implementation(*map(on_gpu, COMPILED))


BORDERS = {
    "a chunk": dict(length=32),
    "a chunk and a token": dict(length=33, heads=(2, 1), decay=1.0, clamp=11.0),
    "more sums than threads": dict(length=65, widths=(8, 128), heads=(4, 4), batch=1),
    "more chunks than threads": dict(length=4200, widths=(2, 2), heads=(1, 1), batch=1, flux=True),
    "more segments than a launch carries": dict(
        length=600, widths=(8, 8), heads=(2, 1), batch=1, starts=range(0, 600, 2)
    ),
    "widest state": dict(length=40, widths=(8, 256), heads=(2, 1), batch=1),
    "narrow state, whole words": dict(length=40, widths=(64, 8), packed=False, pad=56),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*CASES.values(), *BORDERS.values()], ids=[*CASES, *BORDERS])
def test_matches_fp64(case, dtype, implementation):
    check(augment_call(dtype=dtype, **case), dtype, implementation=implementation)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("out", DTYPES, ids=str)
def test_result_dtype_is_independent_of_the_inputs(dtype, out, implementation):
    check(augment_call(length=63, dtype=dtype, out=out), out, implementation=implementation)


def test_any_strides(implementation):
    strided, plain = strided_and_plain()
    results = run(implementation, strided, FP32)
    for name, expected in run(implementation, plain, FP32).items():
        assert torch.equal(results[name], expected), name


@any_call
def test_any_call_matches_fp64(call, host_library):
    check_elements(host(host_library), *call)


def test_long_phase_keeps_its_digits(implementation):
    length = 20000
    theta = torch.rand(1, length, 1, 1, generator=torch.Generator().manual_seed(0)) * 400
    q, unit = torch.zeros(1, length, 1, 2), torch.tensor([1.0, 0.0]).expand(1, length, 1, 2)
    lam = torch.full((1,), 2**-0.5)  # makes s = 1 at Dh = 2
    _, k_aug = implementation.forward(
        q, q, unit, unit, q[..., 0], theta, lam, None, None, [0], 11.0, 4, FP32
    )
    phase = theta.double().cumsum(1)
    exact = torch.stack((phase.cos(), phase.sin()), -1).flatten(-2)
    assert (k_aug[..., 2:].double() - exact).abs().max() < 1e-6


def test_bits_do_not_depend_on_the_order_of_blocks(host_library):
    p = augment_call(starts=(0, 100, 231), flux=True, heads=(4, 2))
    results = [run(host(host_library, order), p, FP32) for order in (False, True)]
    for name in RESULTS:
        assert torch.equal(results[0][name], results[1][name]), name


def test_close_to_the_cpu_kernel(implementation):
    if not _extension.LOADED:
        pytest.skip(f"the extension is {_extension.STATE}")
    p = augment_call(length=300, heads=(4, 2), starts=(0, 100), flux=True)
    results = run(implementation, p, FP32)
    for name, expected in run(COMPILED, p, FP32).items():
        torch.testing.assert_close(
            results[name], expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item()
        )


@pytest.mark.gpu
def test_captured_in_a_cuda_graph():
    """The kernels wait for nothing: two segments, their table made by a launch, and a replay."""
    p = augment_call(dtype=BF16, starts=(0, 100))
    inputs, grads = ([x.contiguous().cuda() for x in tensors] for tensors in (p.inputs, p.grads))
    arguments = (*inputs, *(x.cuda() for x in p.rotary), p.starts, p.clamp)

    def both():
        return (
            *COMPILED.forward(*arguments, p.width, BF16),
            *COMPILED.backward(*grads, *arguments, None, None),
        )

    both()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = both()
    inputs[0].neg_()
    grads[0].neg_()
    graph.replay()
    for result, expected in zip(results, both()):
        assert torch.equal(result, expected)


@pytest.mark.gpu
def test_states_too_wide_for_the_kernels_run_in_python():
    """And are no fault of theirs: a warning that they are out would be an error."""
    p = augment_call(length=40, widths=(8, 260), heads=(2, 1), batch=1)
    if not _extension.has_kernels("cuda"):
        pytest.skip("the library was built without CUDA")
    found = sk.augment_qk(*(x.cuda() for x in p.inputs), rotary=tuple(x.cuda() for x in p.rotary))
    for x, right in zip(found, sk.augment_qk(*p.inputs, rotary=tuple(p.rotary))):
        assert relative(x.cpu(), right) < 1e-6


def test_the_widest_state_is_the_kernels_own():
    header = (ROOT / "csrc" / "cuda" / "augment.h").read_text()
    assert f"kMaxStateWidth = {MAX_STATE_ON_CUDA};" in header


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc is not found")
def test_nothing_spills():
    command = [sys.executable, str(ROOT / "tools" / "cuda_resources.py"), "--arch", "90"]
    table = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert len(re.findall("(?:augment|backward)_chunk", table)) == 18
