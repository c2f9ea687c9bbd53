"""sisa_attention: the argument checks, the choice of a path, and the dispatch to it."""

import os

import torch
from torch import Tensor

from sisa_kernels import _extension, reference, selfcheck
from sisa_kernels.checks import Rotary, check_attention
from sisa_kernels.ops import refuse_forward_mode, say_once, without_autocast
from sisa_kernels.paths import one_call as flash
from sisa_kernels.paths.augment import guard_compiled
from sisa_kernels.paths.chunked import sdpa_exact
from sisa_kernels.rotation import by_document

try:
    from sisa_kernels.triton import op as triton_attention
except ImportError as error:
    triton_attention = None  # type: ignore[assignment]
    _NO_TRITON = f"needs the package triton ({error})"

BACKENDS = ("auto", "triton", "flash", "sdpa", "reference")


def backends(*, table: bool = False) -> dict[str, str]:
    """What can run here: each of "triton", "flash", "sdpa" and "extension" mapped to "available" or
    to why it is not.

    ``table``: with each stock kernel of "flash", in its order of preference, as "flash/NAME", for a
    training call of width 64 + 16 in bf16 on the current GPU, or in fp32 on the CPU."""
    found = {
        "triton": _triton_state(),
        "flash": "available",
        "sdpa": "available",
        "extension": _extension.STATE,
    }
    if table:
        device, dtype = torch.device("cpu"), torch.float32
        if torch.cuda.is_available():
            device, dtype = torch.device("cuda", torch.cuda.current_device()), torch.bfloat16
        call = flash.Call(
            device, flash.capability(device), dtype, length=2048, width=80, value_width=64
        )
        found |= {f"flash/{name}": state for name, state in flash.state(call).items()}
    return found


def _triton_state() -> str:
    if triton_attention is None:
        return _NO_TRITON
    if triton_attention.INTERPRETED:
        return "available"
    return "available" if torch.cuda.is_available() else "needs a CUDA device"


def _triton_refusal(q: Tensor, v: Tensor, b: Tensor) -> str | None:
    """Why the Triton path cannot run on these operands, or None."""
    state = _triton_state()
    return f"it {state}" if state != "available" else triton_attention.refusal(q, v, b)


def _triton_fault(q: Tensor, v: Tensor, b: Tensor) -> str | None:
    """What the first use of the Triton path on such operands finds wrong with it, or None."""
    attend, widths = triton_attention.exact_attention, (q.shape[3], b.shape[3], v.shape[3])
    return selfcheck.fault("triton", attend, q.device, q.dtype, *widths)


def _preferred(mode: str, device: torch.device) -> str:
    """What "auto" runs where nothing speaks against it."""
    if mode == "clamped":
        return "flash"
    return "sdpa" if device.type in ("cpu", "meta") else "triton"


def asked_backend(backend: str) -> tuple[str, str]:
    """SISA_BACKEND if set, else ``backend``, and the name of the one that counts; ValueError where
    it is no backend.
    """
    name = "SISA_BACKEND" if "SISA_BACKEND" in os.environ else "backend"
    backend = os.environ.get("SISA_BACKEND", backend)
    if backend not in BACKENDS:
        raise ValueError(f"{name} must be one of {', '.join(BACKENDS)}, got {backend!r}")
    return backend, name


def _choose(backend: str, mode: str, q: Tensor, v: Tensor, b: Tensor) -> str:
    """The path that runs: what is asked for, with "auto" resolved by mode, device and operands."""
    backend, name = asked_backend(backend)
    if backend == "auto":
        path = _preferred(mode, q.device)
        why = (_triton_refusal(q, v, b) or _triton_fault(q, v, b)) if path == "triton" else None
        if why is None:
            return path
        say_once(
            f"exact SISA attention on {q.device.type} runs the 'sdpa' path with densely tiled scores, not 'triton': {why}"
        )
        return "sdpa"
    if backend == "triton":
        why = "it computes mode 'exact' only" if mode != "exact" else _triton_refusal(q, v, b)
        if why is not None:
            raise ValueError(f"{name} 'triton' cannot run here: {why}")
    return backend


def sisa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    b: Tensor,
    c: Tensor,
    log_decay: Tensor,
    theta: Tensor,
    lam: Tensor,
    *,
    rotary: Rotary | None = None,
    mode: str = "exact",
    backend: str = "auto",
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """SISA: causal softmax attention with an importance term from a state-space model inside the
    score (arXiv 2606.02332).

    ``s_ij = q_i.k_j / sqrt(Dh) + lam exp(g_i - g_j) (R(Phi_i) c_i).(R(Phi_j) b_j)`` for i >= j (Eq.
    2), ``y_i = sum_j softmax_j(s_ij) v_j``; g and Phi are the running sums of ``log_decay`` and
    ``theta``, R rotates the channel pairs (2n, 2n+1). With fewer key heads than query heads, head h
    uses key head h // (H/G), its b, log_decay and theta.

    Args:
        q: queries [B, L, H, Dh], fp32, bf16, fp16 or fp64.
        k: keys [B, L, G, Dh] in q's dtype; G divides H.
        v: values [B, L, G, Dv] in q's dtype.
        b: importance keys [B, L, G, Ds] in q's dtype, Ds even.
        c: importance queries [B, L, H, Ds] in q's dtype.
        log_decay: natural log of the decay, [B, L, G] fp32, <= 0 (-inf: the token forgets all
            before it).
        theta: phase steps in radians, [B, L, G, Ds/2] fp32.
        lam: weight of the importance term, [H] fp32, > 0.
        rotary: (cos, sin) of the positions, each [L, Dh/2] fp32, applied to q and k inside
            (interleaved pairs, indexed by the place in the packed sequence); None: already applied,
            or not wanted.
        mode: "exact", Eq. 2 at any length and decay; "clamped", the authors' formulation with g's
            distance from the middle of its range clamped to +-11, to reproduce their numbers and
            run their weights (wrong once the range passes 22; in fp16 on a GPU exp(11) leaves
            operands above 1 no room: use bf16).
        backend: "auto"; "sdpa", exact by query chunks on stock kernels (in mode "clamped", which
            takes one call, the same as "flash"); "flash", one call of a stock kernel on augmented
            operands, the first of a table that is legal and right (in exact mode an error once the
            range of g is too wide for one call); "triton", exact in one kernel on a GPU, its
            products past the horizon left out; "reference", the dense fp64 oracle. The environment
            variable SISA_BACKEND overrides it. A named backend that cannot run is an error, never a
            fallback.
        cu_seqlens: [documents + 1] int32, rising from 0 to L: documents packed into one sequence (B
            = 1), where decay, phase and attention restart at each.

    Returns:
        y [B, L, H, Dv] in q's dtype, differentiable in q, k, v, b, c, log_decay, theta and lam. For
        fp64, pass log_decay, theta, lam and rotary in fp64 or fp32.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype, device or range; the
            message names it. The ranges of log_decay and lam are checked for CPU tensors only (on a
            GPU the check would stall the device). Wrong bounds in cu_seqlens on a GPU are an
            assertion there, which fails at some later call; in a compiled call they are not
            checked.
    """
    check_attention(q, k, v, b, c, log_decay, theta, lam, rotary, mode, cu_seqlens)
    path = _choose(backend, mode, q, v, b)
    if path == "reference":
        return reference.sisa_attention(
            q, k, v, b, c, log_decay, theta, lam, rotary=rotary, mode=mode, cu_seqlens=cu_seqlens
        )
    refuse_forward_mode(q, k, v, b, c, log_decay, theta, lam)
    if path != "triton":
        guard_compiled(q, b)

    def attend(q, k, v, b, c, log_decay, theta, *tables: Tensor) -> Tensor:
        cos, sin = (table[0] for table in tables) if tables else (None, None)
        if path == "sdpa" and mode == "exact":
            return sdpa_exact(q, k, v, b, c, log_decay, theta, lam, cos, sin)[0].to(q.dtype)
        return flash.one_call(q, k, v, b, c, log_decay, theta, lam, cos, sin, mode)

    with without_autocast(q.device):
        if path == "triton":
            tables, horizon = rotary or (None, None), triton_attention.default_horizon(q.dtype)
            return triton_attention.triton_exact(
                q, k, v, b, c, log_decay, theta, lam, *tables, cu_seqlens, horizon
            )[0]
        return by_document(
            attend,
            cu_seqlens,
            q,
            k,
            v,
            b,
            c,
            log_decay,
            theta,
            *(table[None] for table in rotary or ()),
        )
