"""A small random problem solved by a path and by the oracle: guards a path's first use, serves
tuning and the command line.
"""

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from sisa_kernels import reference

NAMES = ("q", "k", "v", "b", "c", "log_decay", "theta", "lam")
# Of y and of every gradient, relative: several times what a right path shows at this size, far
# below what a wrong one does.
ALLOWED = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2}
DECAY = -3.5  # g falls by about 8 over the problem, which one call in fp16 still holds


def problem(
    device: torch.device,
    dtype: torch.dtype,
    *,
    B: int = 1,
    L: int = 257,
    H: int = 2,
    G: int = 2,
    Dh: int = 64,
    Ds: int = 16,
    Dv: int | None = None,
    decay: float = -3.0,
) -> tuple[list[Tensor], Tensor]:
    """A random problem whose decay is softplus(decay + noise) a token: (q .. lam as leaves, dL/dy)."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(
            *shape, generator=generator, dtype=torch.float32, device="cpu"
        )  # whatever the defaults are

    Dv = Dv or Dh
    wide = [
        normal(B, L, heads, width) for heads, width in ((H, Dh), (G, Dh), (G, Dv), (G, Ds), (H, Ds))
    ]
    log_decay = -F.softplus(decay + 0.5 * normal(B, L, G))
    narrow = [
        log_decay,
        0.3 * normal(B, L, G, Ds // 2),
        torch.full((H,), 0.3133, dtype=torch.float32, device="cpu"),
    ]
    inputs = [x.to(device, dtype) for x in wide] + [x.to(device) for x in narrow]
    return [x.requires_grad_() for x in inputs], normal(B, L, H, Dv).to(device, dtype)


def results(function: Callable[..., Tensor], inputs: list[Tensor], dy: Tensor) -> list[Tensor]:
    """y and the gradient of every input."""
    y = function(*inputs)
    return [y.detach(), *torch.autograd.grad(y, inputs, dy)]


def oracle(inputs: list[Tensor], dy: Tensor, mode: str = "exact") -> list[Tensor]:
    """:func:`results` of the fp64 oracle."""
    exact = [x.detach().double().requires_grad_() for x in inputs]
    return results(functools.partial(reference.sisa_attention, mode=mode), exact, dy.double())


def relative_errors(found: list[Tensor], right: list[Tensor]) -> list[float]:
    """|x - right| / |right| of each over the whole tensor, in fp64; inf for what is not a number."""
    errors = [((x.double() - r).norm() / r.norm()).item() for x, r in zip(found, right)]
    return [math.inf if math.isnan(error) else error for error in errors]


def described(error: Exception) -> str:
    """Its type and first line."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def possible(device: torch.device) -> bool:
    """Whether a check may run now: inside a traced, captured or observed call it would become a
    part of it.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or device.type == "meta"
    ):
        return False
    return not (device.type == "cuda" and torch.cuda.is_current_stream_capturing())


# By constants alone, which a compiled call can guard.
_verdicts: dict[tuple[str, str, str, int, int, int, str, bool, bool], str | None] = {}


def fault(
    name: str,
    attend: Callable[..., Tensor],
    device: torch.device,
    dtype: torch.dtype,
    Dh: int,
    Ds: int,
    Dv: int,
    mode: str = "exact",
    grouped: bool = False,
    backward: bool = True,
) -> str | None:
    """What is wrong with attention by ``attend(q .. lam)`` on a device, dtype, widths and mode;
    None: nothing that is known.

    Checked once, on the first use where a check is :func:`possible`; the verdict holds for every
    later use. ``name``: the kernel's; ``backward``: with its gradients, or y alone."""
    key = name, str(device), str(dtype), Dh, Ds, Dv, mode, grouped, backward
    if key not in _verdicts and possible(device):
        _verdicts[key] = _compare(attend, device, dtype, Dh, Ds, Dv, mode, grouped, backward)
    return _verdicts.get(key)


def _compare(
    attend: Callable[..., Tensor],
    device: torch.device,
    dtype: torch.dtype,
    Dh: int,
    Ds: int,
    Dv: int,
    mode: str,
    grouped: bool,
    backward: bool,
) -> str | None:
    # The innermost hooks are the ones that run: those of an activation checkpoint around would
    # count what is saved here.
    unhooked = torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)
    try:
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(device.type, enabled=False),
            unhooked,
        ):
            inputs, dy = problem(
                device, dtype, H=4 if grouped else 2, Dh=Dh, Ds=Ds, Dv=Dv, decay=DECAY
            )
            right = oracle(inputs, dy, mode)
            if backward:
                found = results(attend, inputs, dy)
            else:
                with torch.no_grad():
                    found = [attend(*inputs)]
    except Exception as error:  # whatever keeps a kernel from compiling or launching there
        return f"it fails on {device}: {described(error)}"
    errors = dict(zip(("y", *NAMES), relative_errors(found, right)))
    wrong = {name: error for name, error in errors.items() if not error <= ALLOWED[dtype]}
    if not wrong:
        return None
    worst = ", ".join(f"{name} by {error:.1e}" for name, error in wrong.items())
    return f"on a small problem (Dh {Dh}, Ds {Ds}, Dv {Dv}, {dtype}) it is wrong against the oracle, relative error of {worst}"
