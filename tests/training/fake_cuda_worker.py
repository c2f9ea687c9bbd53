"""Started by test_fake_cuda.py, with a CUDA device that does nothing: steps without values.

Prints a line of JSON a case: "wait" is where a value on that device was read, or one copied to it
without leave to go on, "odd" the products with rows that begin at no multiple of 16 bytes."""

import contextlib
import json
import math
import traceback
import warnings

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.distributed.utils import _to_kwargs
from torch.utils._python_dispatch import TorchDispatchMode

import sisa_model as sm
from sisa_kernels import attention, forgetting
from sisa_kernels.paths import chunked
from sisa_kernels.testing import problem
from sisa_kernels.triton import epilogue, horizon, op, prologue
from sisa_model.models import language_model, linear
from sisa_model.training.loss import Objective, Piece
from sisa_model.training.parallel import Parallel, World
from tests.support import ROOT
from tests.support.models import Products

LENGTH = 48
DOCUMENTS = torch.tensor([0, 13, 13, 40], dtype=torch.int32)  # one empty, tokens past the last


class Awaited(Exception):
    """A copy to the device that waits for it."""


class Copies(TorchDispatchMode):
    """Raises where a tensor is copied to the device, and is not in pinned memory unawaited."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in ("_to_copy", "copy_"):
            source = args[0] if func.overloadpacket.__name__ == "_to_copy" else args[1]
            unawaited = (kwargs or {}).get("non_blocking") or source.numel() == 0
            if result.is_cuda and not source.is_cuda and not unawaited:
                raise Awaited
        return result


class NoKernel:
    """In the place of a Triton kernel: launched, it does nothing."""

    def __getitem__(self, grid):
        return lambda *args, **kwargs: None


def with_values(function):
    """``function``, whose tensors on the CPU have values as on a GPU's machine."""

    def run(*args):
        with unset_fake_temporarily():
            return function(*args)

    return run


def prepare():
    """What is asked of a GPU and its libraries, answered as on one."""
    warnings.simplefilter("ignore")
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    torch.cuda.get_device_name = lambda *_: "a device that does nothing"
    torch.cuda.device_of = lambda _: contextlib.nullcontext()
    torch.Tensor.pin_memory = lambda x: x
    linear.PLAIN = {*linear.PLAIN, FakeTensor}  # what a parameter without values is
    language_model.as_bounds = with_values(language_model.as_bounds)
    attention._triton_state = lambda: "available"
    op.INTERPRETED = False
    for module in (prologue, horizon, epilogue):
        module.launch = lambda *_: None
    for name in ("forward_kernel", "backward_query_kernel", "backward_key_kernel"):
        setattr(op, name, NoKernel())
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.set_autocast_enabled("cuda", True)


def step(preset, packed, moved=False, **overrides):
    """Forward, loss, backward and clipping of a model of one layer.

    ``moved``: what the model is called with goes to the device first, as FSDP sends it there."""
    with torch.device("cuda"):
        model = sm.build(preset, n_layers=1, **overrides)
        ids = torch.zeros(1 if packed else 2, LENGTH, dtype=torch.int64)
    if moved:
        hidden = model.hidden

        def send(*args, **kwargs):
            (args,), (kwargs,) = _to_kwargs(args, kwargs, torch.device("cuda"), False)
            return hidden(*args, **kwargs)

        model.hidden = send
    with Copies():
        _step(model, ids, packed)


def _step(model, ids, packed):
    parallel = Parallel(Objective(model, contextlib.nullcontext()), World(), "auto", bf16=True)
    parallel.backward(Piece(ids, ids, DOCUMENTS if packed else None), 1.0, last=True)
    norm = parallel.clip(1.0)
    assert norm.is_cuda
    assert all(p.grad.dtype == p.dtype == torch.float32 for p in model.parameters())


def triton_wrapper(packed):
    """The code around Triton's kernels, whose op has no values to run on elsewhere."""
    inputs, dy = problem(L=LENGTH, H=4, G=2, Dh=64, Ds=16, Dv=64, dtype=torch.bfloat16)
    operands = [None if x is None else x.detach().cuda() for x in inputs.flat()]
    bounds = torch.tensor([0, 13, 40, LENGTH], device="cuda") if packed else None
    dy = dy.cuda()
    with Copies():
        y, lse = op.triton_exact_eager(*operands, bounds, 2**-8)
        op.triton_exact_backward_eager(dy, y, lse, *operands, bounds, 2**-8)


def chunked_wrapper(packed, on):
    """SISA and FoX by dense scores, with bounds on a device: the ops have no values to run on."""
    inputs, dy = problem(L=LENGTH, H=4, G=2, Dh=16, Ds=16, Dv=16)
    gates = torch.zeros(1, LENGTH, 4)
    operands = [None if x is None else x.detach().cuda() for x in inputs.flat()]
    bounds = DOCUMENTS.to(on) if packed else None
    dy, gates = dy.cuda(), gates.cuda()
    with Copies():
        y, lse = chunked.chunked_eager(*operands, bounds, math.inf)
        chunked.chunked_backward_eager(dy, y, lse, *operands, bounds, math.inf)
        y, lse = forgetting.forgetting_eager(*operands[:3], gates, bounds)
        forgetting.forgetting_backward_eager(dy, y, lse, *operands[:3], gates, bounds)


def read(how):
    """What must be found."""
    x = torch.zeros(4, device="cuda")
    with Copies():
        {
            "item": x.sum().item,
            "bool": lambda: bool((x > 0).all()),
            "mask": lambda: x[x > 0],
            "list": lambda: x.tolist(),
            "copy": lambda: torch.tensor([1.0, 2.0], device="cuda"),
        }[how]()


MODELS = [
    {"preset": "sisa-tiny-ds16"},
    {"preset": "sisa-tiny-ds16", "mode": "clamped"},
    {"preset": "sisa-tiny-ds16", "backend": "one_call"},
    {"preset": "transformer-tiny"},
    {"preset": "fox-tiny"},
    {"preset": "mamba2-tiny"},
    {"preset": "mamba3-tiny"},
]
SIZES = ["sisa-50m-ds16", "sisa-152m-ds16", "sisa-369m-ds16", "sisa-152m-ds128"]
SIZES += ["transformer-152m", "fox-152m", "mamba2-152m"]
CASES = [
    *((step, {**model, "packed": packed}) for model in MODELS for packed in (False, True)),
    *((step, {**model, "packed": True, "moved": True}) for model in MODELS),
    *((step, {"preset": preset, "packed": False}) for preset in SIZES),
    *((triton_wrapper, {"packed": packed}) for packed in (False, True)),
    *((chunked_wrapper, {"packed": bool(on), "on": on}) for on in (None, "cpu", "cuda")),
    *((read, {"how": how}) for how in ("item", "bool", "mask", "list", "copy")),
]


def run(function, arguments):
    found = {"case": f"{function.__name__} {arguments}", "wait": None}
    products = Products()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        with mode, products, torch.autograd.set_multithreading_enabled(False):
            function(**arguments)
    except (DataDependentOutputException, DynamicOutputShapeException, Awaited) as error:
        frames = traceback.extract_tb(error.__traceback__)
        ours = [frame for frame in frames if frame.filename.startswith(str(ROOT))]
        inside = [frame for frame in ours if "tests" not in frame.filename] or ours
        found["wait"] = f"{inside[-1].filename}:{inside[-1].lineno}"
    return {**found, "products": len(products.pitches), "odd": products.odd(16)}


if __name__ == "__main__":
    prepare()
    for function, arguments in CASES:
        print(json.dumps(run(function, arguments)), flush=True)
