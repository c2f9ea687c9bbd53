"""What is wrong with a path in this process: each is checked on its first use, once.

A small random problem is solved by the path and by the oracle. A path found wrong is out for the
rest of the process; whoever chooses a path asks here first, also in traced and captured calls,
where no check may run but what is known holds."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from sisa_kernels.inputs import Mode, SisaInputs
from sisa_kernels.testing import ValueAndGrads, oracle, problem, relative_errors, value_and_grads

# Of y and of every gradient, relative: several times what a right path shows at this size, far
# below what a wrong one does.
ALLOWED = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2}
DECAY = -3.5  # g falls by about 8 over the problem, which one call in fp16 still holds


class Use(NamedTuple):
    """What a verdict holds for."""

    path: str
    """Its name."""
    device: torch.device
    dtype: torch.dtype
    Dh: int
    Ds: int
    Dv: int
    mode: Mode = "exact"
    grouped: bool = False
    """Fewer key heads than query heads."""
    backward: bool = True
    """With its gradients, or y alone."""


# By constants alone, which a compiled call can guard.
_verdicts: dict[tuple[str | int | bool, ...], str | None] = {}


def verdict(
    key: tuple[str | int | bool, ...], device: torch.device, find: Callable[[], str | None]
) -> str | None:
    """What ``find`` says is wrong, asked once, when a check is :func:`possible`; None: nothing.

    Asked in a thread of its own, which knows nothing of what the caller is in: torch.func's
    transforms, inference mode, autocast, hooks of saved tensors, a default device."""
    key = tuple(int(x) if isinstance(x, torch.SymInt) else x for x in key)
    if key not in _verdicts and possible(device):
        with ThreadPoolExecutor(1) as alone:
            _verdicts[key] = alone.submit(find).result()
    return _verdicts.get(key)


def fault(use: Use, attend: Callable[[SisaInputs], Tensor]) -> str | None:
    """What is wrong with attention by ``attend`` in such a use; None: nothing that is known."""
    path, device, dtype, *shape = use
    return verdict((path, str(device), str(dtype), *shape), device, lambda: _compare(use, attend))


def rule_out(path: str, device_type: str, why: str) -> None:
    """From now on :func:`ruled_out` on every device of this type."""
    _verdicts[path, device_type] = why


def ruled_out(path: str, device_type: str) -> bool:
    """Whether a path is out for every dtype and width on devices of this type."""
    return (path, device_type) in _verdicts


def possible(device: torch.device) -> bool:
    """Whether a check may run now: no part of a traced, captured or observed call."""
    if torch.compiler.is_compiling() or device.type == "meta":
        return False
    if torch._C._len_torch_dispatch_stack() > 0:
        return False
    return not (device.type == "cuda" and torch.cuda.is_current_stream_capturing())


def described(error: Exception) -> str:
    """Its type and first line."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def small_problem(
    device: torch.device, dtype: torch.dtype, *, H: int = 2, Dh: int, Ds: int, Dv: int
) -> tuple[SisaInputs, Tensor]:
    """The problem of a check, with two key heads."""
    return problem(H=H, G=2, Dh=Dh, Ds=Ds, Dv=Dv, decay=DECAY, dtype=dtype, device=device)


def _compare(use: Use, attend: Callable[[SisaInputs], Tensor]) -> str | None:
    def solve() -> tuple[ValueAndGrads, ValueAndGrads]:
        heads = 4 if use.grouped else 2
        inputs, dy = small_problem(use.device, use.dtype, H=heads, Dh=use.Dh, Ds=use.Ds, Dv=use.Dv)
        found = _results(attend, inputs, dy, use.backward)
        return found, oracle(inputs, dy, mode=use.mode)

    shape = f"Dh {use.Dh}, Ds {use.Ds}, Dv {use.Dv}"
    return compare(solve, use.device, use.dtype, shape)


def compare(
    solve: Callable[[], tuple[ValueAndGrads, ValueAndGrads]],
    device: torch.device,
    dtype: torch.dtype,
    shape: str,
) -> str | None:
    """What is wrong with a path's y and gradients beside the oracle's (``solve``), or None."""
    try:
        errors = relative_errors(*solve())
    except Exception as error:  # whatever keeps a kernel from compiling or launching there
        return f"it fails on {device}: {described(error)}"
    wrong = {name: error for name, error in errors.items() if not error <= ALLOWED[dtype]}
    if not wrong:
        return None
    worst = ", ".join(f"{name} by {error:.1e}" for name, error in wrong.items())
    return (
        f"on a small problem ({shape}, {dtype}) it is wrong "
        f"against the oracle, relative error of {worst}"
    )


def _results(
    attend: Callable[[SisaInputs], Tensor], inputs: SisaInputs, dy: Tensor, backward: bool
) -> ValueAndGrads:
    if backward:
        return value_and_grads(lambda **x: attend(SisaInputs(**x)), inputs, dy)
    with torch.no_grad():
        return attend(inputs), {}
