"""Argument checks: every error names the argument, what was given and what is allowed."""

import math

import torch
from torch import Tensor

from sisa_kernels.inputs import MODES, Rotary, ScoreInputs, SisaInputs
from sisa_kernels.ops import say_once

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
OTHER_LAYOUT = (
    "; is it [batch, heads, length, channels], the layout of scaled_dot_product_attention? "
    "Here it is [batch, length, heads, channels]: x.transpose(1, 2)"
)
_PYTHON = torch._C.DispatchKey.Python  # of tensors whose class runs Python for every op
MOST_HEADS = 128  # of any published model


def concrete(x: Tensor) -> Tensor | None:
    """x taken out of torch.func's wrappers, without its gradient; None where it has no values.

    It has none in a traced call (torch.compile, make_fx, FakeTensorMode) and on "meta". vmap's
    dimensions come first."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return None
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        batch = torch._C._functorch.maybe_get_bdim(x)
        x = torch._C._functorch.get_unwrapped(x)
        x = x if batch < 0 else x.movedim(batch, 0)
    without = x.device.type == "meta" or torch._C._dispatch_keys(x).has(_PYTHON)
    return None if without else x.detach()


def readable(x: Tensor) -> Tensor | None:
    """:func:`concrete` where reading it costs no wait; None on a GPU."""
    values = concrete(x)
    return values if values is not None and values.device.type == "cpu" else None


def check_tensor(
    name: str,
    x: object,
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
    if_swapped: tuple[int, ...] | None = None,
) -> None:
    """Raise TypeError/ValueError unless ``x`` is a tensor of this shape, dtype and device.

    ``if_swapped``: its shape where q is in SDPA's layout; None: ``shape`` with axes 1 and 2
    swapped."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    given = tuple(x.shape)
    if given != shape:
        swapped = if_swapped or (shape[0], *reversed(shape[1:3]), *shape[3:])
        hint = OTHER_LAYOUT if given == swapped else ""
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(given)}{hint}")
    if x.dtype not in dtypes:
        raise TypeError(
            f"{name} must be {' or '.join(map(str, dtypes))}, got {x.dtype}: "
            f"{name}.to({dtypes[0]}) mends it"
        )
    if x.device != device:
        raise ValueError(f"{name} must be on {device} like q, got {x.device}")


def _given(x: object) -> str:
    return str(list(x.shape)) if isinstance(x, Tensor) else type(x).__name__


def wide_dtypes(q: Tensor) -> tuple[torch.dtype, ...]:
    """The dtypes that what is fp32 beside q may have."""
    return (torch.float32, torch.float64) if q.dtype == torch.float64 else (torch.float32,)


def check_rotary(rotary: Rotary | None, q: Tensor, by_row: bool = False) -> None:
    """Check the rotary tables of ``q`` [B, L, H, Dh]: a pair of constants [L, Dh / 2].

    ``by_row``: or [B, L, Dh / 2]."""
    if rotary is None:
        return
    if not isinstance(rotary, (tuple, list)) or len(rotary) != 2:
        raise TypeError(f"rotary must be a pair (cos, sin) or None, got {type(rotary).__name__}")
    B, L, _, Dh = q.shape
    if Dh % 2:
        raise ValueError(f"rotary needs an even head width, got q with {Dh} channels")
    for name, table in zip(("rotary[0] (cos)", "rotary[1] (sin)"), rotary):
        rows = (B,) if by_row and isinstance(table, Tensor) and table.ndim == 3 else ()
        shape = (*rows, L, Dh // 2)
        if_swapped = (*rows, q.shape[2], Dh // 2)
        check_tensor(name, table, shape, wide_dtypes(q), q.device, if_swapped)
        if table.requires_grad:
            raise ValueError(
                f"{name} must not require grad: the rotary tables are constants of the operator"
            )


def check_documents(cu_seqlens: Tensor | None, q: Tensor) -> None:
    """Check the bounds of the documents packed into ``q`` [1, L, ...].

    On a GPU their values are asserted there, which waits for nothing."""
    if cu_seqlens is None:
        return
    wanted = "cu_seqlens must be an int32 or int64 tensor [documents + 1], got"
    if not isinstance(cu_seqlens, Tensor):
        raise ValueError(f"{wanted} {type(cu_seqlens).__name__}")
    integers = cu_seqlens.dtype in (torch.int32, torch.int64)
    if not integers or cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(f"{wanted} {cu_seqlens.dtype} {list(cu_seqlens.shape)}")
    B, L = q.shape[:2]
    if B != 1:
        raise ValueError(
            f"cu_seqlens needs the documents packed into one sequence (batch 1), got batch {B}"
        )
    allowed = f"cu_seqlens must rise from 0 to at most the length {L}"
    bounds = readable(cu_seqlens)
    if bounds is not None:
        if not _rises(bounds, L):
            hint = OTHER_LAYOUT if q.ndim == 4 and bounds.max() == q.shape[2] else ""
            raise ValueError(f"{allowed}, got {bounds.tolist()}{hint}")
    elif cu_seqlens.device.type == "cuda" and not torch.compiler.is_compiling():
        torch._assert_async(_rises(cu_seqlens, L), allowed)


def _rises(bounds: Tensor, length: int) -> Tensor:
    """Whether bounds [..., documents + 1] rise, not always strictly, from 0 to at most length."""
    return (bounds[..., 0] == 0).all() & (bounds.diff() >= 0).all() & (bounds <= length).all()


def check_qk(q: Tensor, k: Tensor, *, empty: bool = False) -> None:
    """Check q [B, L, H, Dh] and k [B, L, G, Dh]; ``empty``: L may be 0, a rank's share of it."""
    if not isinstance(q, Tensor):
        raise TypeError(f"q must be a torch.Tensor, got {type(q).__name__}")
    sizes = (*q.shape[:1], *q.shape[2:]) if empty else q.shape
    if q.ndim != 4 or 0 in sizes:
        raise ValueError(
            f"q must be [batch, length, heads, channels] with every size >= 1, got {list(q.shape)}"
        )
    if q.dtype not in DTYPES:
        raise TypeError(
            f"q must be one of {', '.join(map(str, DTYPES))}, got {q.dtype}: q.float() mends it"
        )
    if not isinstance(k, Tensor) or k.ndim != 4:
        raise ValueError(
            f"k must be a 4-d tensor [batch, length, key heads, channels], got {_given(k)}"
        )
    B, L, H, Dh = q.shape
    G = k.shape[2]
    if G == 0 or H % G:
        hint = OTHER_LAYOUT if G == L and k.shape[1] and H % k.shape[1] == 0 else ""
        raise ValueError(
            "the number of key heads must divide the number of query heads, "
            f"got k with {G} heads and q with {H}{hint}"
        )
    # In SDPA's layout with shared key heads: as long as q, of heads that divide q's.
    fewer = k.shape[1] if G == H and k.shape[1] and L % k.shape[1] == 0 else H
    check_tensor("k", k, (B, L, G, Dh), (q.dtype,), q.device, (B, fewer, G, Dh))
    if not torch.compiler.is_compiling() and not empty and max(L, MOST_HEADS) < H:
        say_once(f"q {list(q.shape)} has {L} tokens of {H} heads{OTHER_LAYOUT}", stacklevel=4)


def check_values(v: Tensor, k: Tensor) -> None:
    """Check v [B, L, G, Dv] beside keys that :func:`check_qk` has checked."""
    if not isinstance(v, Tensor) or v.ndim != 4 or v.shape[3] == 0:
        raise ValueError(f"v must be [batch, length, key heads, Dv] with Dv >= 1, got {_given(v)}")
    check_tensor("v", v, (*k.shape[:3], v.shape[3]), (k.dtype,), k.device)


def check_log(name: str, x: Tensor, meaning: str) -> None:
    """Refuse a log of a factor above 1 (or NaN) in a CPU tensor; on a GPU it would be a stall."""
    values = readable(x)
    if values is None or not values.numel():
        return
    worst = values.max().item()
    if not worst <= 0:
        raise ValueError(
            f"{name} must be <= 0 everywhere (log of a {meaning} in (0, 1]), "
            f"got a maximum of {worst:g}"
        )


def check_shapes(x: ScoreInputs, *, empty: bool = False) -> None:
    """Check shape, dtype and device of all of a SISA layer's inputs but v."""
    check_qk(x.q, x.k, empty=empty)
    B, L, H, _ = x.q.shape
    G = x.k.shape[2]
    device = x.q.device
    wide = wide_dtypes(x.q)
    if not isinstance(x.b, Tensor) or x.b.ndim != 4 or x.b.shape[3] < 2 or x.b.shape[3] % 2:
        raise ValueError(
            f"b must be [batch, length, key heads, Ds] with Ds even and >= 2, got {_given(x.b)}"
        )
    Ds = x.b.shape[3]
    check_tensor("b", x.b, (B, L, G, Ds), (x.q.dtype,), device)
    check_tensor("c", x.c, (B, L, H, Ds), (x.q.dtype,), device)
    check_tensor("log_decay", x.log_decay, (B, L, G), wide, device)
    check_tensor("theta", x.theta, (B, L, G, Ds // 2), wide, device)
    check_tensor("lam", x.lam, (H,), wide, device, (L,))
    check_rotary(x.rotary, x.q)


def check_operands(x: ScoreInputs, *, empty: bool = False) -> None:
    """Check all of a SISA layer's inputs but v, and for CPU tensors their values too.

    These are ``log_decay <= 0`` and ``lam >= 0``; on a GPU the check would stall the device."""
    check_shapes(x, empty=empty)
    check_log("log_decay", x.log_decay, "decay")
    lam = readable(x.lam)
    if lam is None:
        return
    least, most = (bound.item() for bound in lam.aminmax())
    if not 0 <= least <= most < math.inf:
        raise ValueError(f"lam must be finite and >= 0 for every head, got {lam.tolist()}")


def check_attention(inputs: SisaInputs, mode: str, *, empty: bool = False) -> None:
    """Check every argument of :func:`sisa_kernels.sisa_attention` but ``backend``."""
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    check_operands(inputs.scores(), empty=empty)
    check_values(inputs.v, inputs.k)
    check_documents(inputs.cu_seqlens, inputs.q)


def check_forgetting(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_forget: Tensor,
    rotary: Rotary | None,
    cu_seqlens: Tensor | None,
    *,
    empty: bool = False,
) -> None:
    """Check every argument of :func:`sisa_kernels.forgetting_attention`."""
    check_qk(q, k, empty=empty)
    check_values(v, k)
    check_tensor("log_forget", log_forget, q.shape[:3], wide_dtypes(q), q.device)
    check_rotary(rotary, q)
    check_log("log_forget", log_forget, "forget gate")
    check_documents(cu_seqlens, q)
