"""sisa_attention: the argument checks, the choice of a path, and the dispatch to it."""

import os
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from sisa_kernels import _extension, reference, selfcheck
from sisa_kernels.checks import check_attention
from sisa_kernels.distributed.attention import Place, attend_over_ranks, find_place
from sisa_kernels.distributed.layout import SequenceLayout
from sisa_kernels.distributed.local import Chunked, Native, Pieces, Triton
from sisa_kernels.inputs import BACKENDS, Backend, Mode, Operands, Rotary, SisaInputs
from sisa_kernels.ops import of_one_dtype, refuse_forward_mode, say_once, without_autocast
from sisa_kernels.paths import native, one_call
from sisa_kernels.paths.augment import guard_compiled
from sisa_kernels.paths.choice import Adaptive, Form
from sisa_kernels.paths.chunked import chunked

try:
    from sisa_kernels.paths import forms
    from sisa_kernels.triton import op as triton_op
except ImportError as error:
    forms = triton_op = None  # type: ignore[assignment]
    _NO_TRITON = f"needs the package triton ({error})"

# What the paths are called, by the names that they have had.
ALIASES = {"flash": "one_call", "sdpa": "chunked"}
FUSED = ("native", "triton")  # exact in one kernel, checked on their first use
FORMS = ("far_and_band", "wide", "adaptive")  # on stock kernels beside Triton's
_adaptive = Adaptive()  # of all calls that ask for it by name
# Those that return a log-sum-exp: what runs on a rank's own pieces.
OVER_RANKS: dict[str, type[Pieces]] = {"native": Native, "triton": Triton, "chunked": Chunked}


def backends(*, table: bool = False) -> dict[str, str]:
    """What can run here, each by name "available" or why it is not.

    The names are "native", "triton", "flash" (one_call), "sdpa" (chunked) and "extension", the
    compiled library; with ``table`` also "flash/NAME" of each stock kernel, in the order of
    preference, for a training call of width 64 + 16 in bf16 on the current GPU, or in fp32 on the
    CPU."""
    cpu = torch.device("cpu")
    found = {
        "native": native.refusal(cpu, torch.float32, 64) or "available",
        "triton": _triton_state(),
        "flash": "available",
        "sdpa": "available",
        "extension": _extension.STATE,
    }
    if table:
        device = cpu
        dtype = torch.float32
        if torch.cuda.is_available():
            device = torch.device("cuda", torch.cuda.current_device())
            dtype = torch.bfloat16
        call = one_call.Call(
            device, one_call.capability(device), dtype, length=2048, width=80, value_width=64
        )
        found |= {f"flash/{name}": state for name, state in one_call.state(call).items()}
    return found


def _triton_state() -> str:
    if triton_op is None:
        return _NO_TRITON
    if triton_op.INTERPRETED or torch.cuda.is_available():
        return "available"
    return "needs a CUDA device"


def _widths(inputs: SisaInputs) -> tuple[int, int, int]:
    """(Dh, Ds, Dv)."""
    return inputs.q.shape[3], inputs.b.shape[3], inputs.v.shape[3]


def _refusal(path: str, inputs: SisaInputs) -> str | None:
    """Why "native", "triton" or a form cannot run on these operands, or None."""
    q = inputs.q
    if path == "native":
        return native.refusal(q.device, q.dtype, *_widths(inputs))
    state = _triton_state()
    if state != "available":
        return f"it {state}"
    if path in ("far_and_band", "wide") and inputs.cu_seqlens is not None:
        return "it takes one document a row, not packed ones (cu_seqlens)"
    return triton_op.refusal(q, inputs.v, inputs.b)


def _fault(path: str, inputs: SisaInputs) -> str | None:
    """What is known to be wrong with "native" or "triton" on such operands, or None."""
    use = selfcheck.Use(path, inputs.q.device, inputs.q.dtype, *_widths(inputs))
    return selfcheck.fault(use, native.attend if path == "native" else triton_op.attend)


def _preferred(mode: str, q: Tensor) -> str:
    """What "auto" runs where nothing speaks against it."""
    if mode == "clamped":
        return "one_call"
    if native.is_first_choice(q):
        return "native"
    return "chunked" if q.device.type in ("cpu", "meta") else "triton"


def asked_backend(backend: str | Adaptive) -> tuple[str, str]:
    """SISA_BACKEND if set, else ``backend``, an old name resolved; and which of the two counts.

    Raises ValueError where it is no backend."""
    forced = os.environ.get("SISA_BACKEND")  # empty counts as unset
    source = "SISA_BACKEND" if forced else "backend"
    if isinstance(backend, Adaptive):
        backend = "adaptive"
    backend = forced or backend
    if backend not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}, got {backend!r}")
    return ALIASES.get(backend, backend), source


def _choose(backend: str | Adaptive, mode: str, inputs: SisaInputs) -> str:
    """The path that runs: what is asked for, with "auto" resolved by mode, device and operands."""
    backend, source = asked_backend(backend)
    if backend == "auto":
        backend = _preferred(mode, inputs.q)
        if backend not in FUSED:
            return backend
        why = _refusal(backend, inputs) or _fault(backend, inputs)
        if why is None:
            return backend
        say_once(
            f"exact SISA attention on {inputs.q.device.type} runs the 'chunked' path in place of "
            f"{backend!r}: {why}"
        )
        return "chunked"
    if backend in FUSED + FORMS:
        why = "it computes mode 'exact' only" if mode != "exact" else _refusal(backend, inputs)
        if why is not None:
            raise ValueError(f"{source} {backend!r} cannot run here: {why}")
    return backend


def runs_native(inputs: SisaInputs, backend: str | Adaptive) -> bool:
    """Whether :func:`sisa_attention` of such operands in mode "exact" runs the "native" path."""
    return _choose(backend, "exact", inputs) == "native"


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
    mode: Mode = "exact",
    backend: Backend | Adaptive = "auto",
    cu_seqlens: Tensor | None = None,
    group: ProcessGroup | None = None,
    layout: SequenceLayout | None = None,
) -> Tensor:
    """SISA: causal softmax attention with a state-space model's importance term in the score.

    ``s_ij = q_i.k_j / sqrt(Dh) + lam exp(g_i - g_j) (R(Phi_i) c_i).(R(Phi_j) b_j)`` for i >= j (Eq.
    2 of arXiv 2606.02332), ``y_i = sum_j softmax_j(s_ij) v_j``; g and Phi are the running sums of
    ``log_decay`` and ``theta``, R rotates the channel pairs (2n, 2n+1). With fewer key heads than
    query heads, head h uses key head h // (H/G), its b, log_decay and theta. Returns y [B, L, H,
    Dv] in q's dtype, differentiable in q .. lam, also under torch.func. Under autocast q, k, v, b,
    c of different dtypes are cast to autocast's.

    Args:
        q, k, v: [B, L, H, Dh], [B, L, G, Dh], [B, L, G, Dv], of one dtype: fp32, bf16, fp16, fp64.
        b, c: importance keys [B, L, G, Ds] and queries [B, L, H, Ds] in q's dtype, Ds even.
        log_decay: natural log of the decay, [B, L, G] fp32, <= 0 (-inf: the token forgets all
            before it). It, theta, lam and rotary are fp32; beside fp64, fp64 or fp32.
        theta: phase steps in radians, [B, L, G, Ds/2].
        lam: weight of the importance term, [H], >= 0.
        rotary: (cos, sin) of the positions, each [L, Dh/2], applied to q and k inside (interleaved
            pairs); None: already applied, or not wanted.
        mode: "exact", Eq. 2 at any length and decay; "clamped", the authors' formulation, g clamped
            to +-11 about the middle of its range (wrong once that passes 22; on a GPU not in fp16).
        backend: "auto"; "native", exact in one compiled kernel on a CPU, which multiplies bf16 in
            fp32 or, faster, in bf16 under ``torch.set_float32_matmul_precision("medium")``;
            "chunked", exact by query chunks on stock kernels (auto's in fp64); "one_call", a stock
            kernel on augmented operands, the first of a table that is legal and right (in exact
            mode an error once the range of g is too wide, on a GPU an assertion there); "triton",
            exact in one kernel on a GPU; "far_and_band", "wide", "adaptive" or a
            :class:`sisa_kernels.Adaptive`, exact, stock kernels taking what is plain; "reference",
            the dense fp64 oracle; "sdpa" and "flash", old names of "chunked" and "one_call". The
            environment's SISA_BACKEND overrides it. A named one that cannot run is an error.
        cu_seqlens: [documents + 1] int32 or int64, rising from 0 to at most L: documents packed
            into one sequence (B = 1), where decay, phase and attention restart at each. Some may be
            empty; past the last bound y and the gradients are 0.
        group, layout: one sequence over several ranks (:class:`sisa_kernels.SequenceLayout`):
            tensors and rotary are of this rank's tokens, cu_seqlens is the whole sequence's.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype, device or range; the
            message names it. The ranges of log_decay and lam are checked on CPUs only; wrong
            cu_seqlens fail on a GPU at some later call, and in a compiled call not at all.
    """
    q, k, v, b, c = of_one_dtype(q, k, v, b, c)
    inputs = SisaInputs(q, k, v, b, c, log_decay, theta, lam, rotary, cu_seqlens)
    return _attend(inputs, mode, backend, find_place(group, layout, q, cu_seqlens))


def _attend_over_ranks(
    inputs: SisaInputs, place: Place, mode: Mode, backend: str | Adaptive
) -> Tensor:
    inputs = inputs._replace(cu_seqlens=None)
    check_attention(inputs, mode, empty=True)
    if mode != "exact":
        raise ValueError(
            "group: over several ranks mode must be 'exact', got 'clamped', whose clamp depends "
            "on the whole sequence"
        )
    path = _choose(backend, mode, inputs)
    if path not in OVER_RANKS:
        raise ValueError(
            f"group: over several ranks backend must be one of auto, {', '.join(OVER_RANKS)}, "
            f"got {path!r}"
        )
    refuse_forward_mode(*inputs.tensors())
    x = Operands._make(inputs[:9])
    with without_autocast(inputs.q.device):
        return attend_over_ranks(x, place, OVER_RANKS[path])


def _attend(inputs: SisaInputs, mode: Mode, backend: str | Adaptive, place: Place | None) -> Tensor:
    if place is not None:
        return _attend_over_ranks(inputs, place, mode, backend)
    check_attention(inputs, mode)
    path = _choose(backend, mode, inputs)
    if path == "reference":
        return reference.sisa_attention(**inputs._asdict(), mode=mode)
    refuse_forward_mode(*inputs.tensors())
    with without_autocast(inputs.q.device):
        if path == "native":
            return native.attend(inputs)
        if path == "triton":
            return _by_triton(inputs)
        if path in ("far_and_band", "wide"):
            return forms.attend(inputs, cast(Form, path))
        if path == "adaptive":
            return _by_form(inputs, backend if isinstance(backend, Adaptive) else _adaptive)
        guard_compiled(inputs.scores())
        if path == "chunked" and mode == "exact":
            return chunked(inputs)
        return one_call.attend(inputs, mode)


def _by_triton(inputs: SisaInputs) -> Tensor:
    """By the kernels, for which every token is of a document: what is past the last is one more."""
    bounds = inputs.cu_seqlens
    if bounds is None:
        return triton_op.attend(inputs)
    length = inputs.q.shape[1]
    covering = F.pad(bounds.int(), (0, 1), value=length)
    past = torch.arange(length, device=bounds.device) >= bounds[-1]
    y = triton_op.attend(inputs._replace(cu_seqlens=covering))
    return y.masked_fill(past.to(y.device)[:, None, None], 0)


def _by_form(inputs: SisaInputs, adaptive: Adaptive) -> Tensor:
    """By the form that is chosen; packed documents by the kernels alone."""
    if inputs.cu_seqlens is not None:
        return _by_triton(inputs)
    return adaptive.attend(inputs, forms.attend_and_needs, _fault_of_form)


def _fault_of_form(form: Form, inputs: SisaInputs) -> str | None:
    """What is known to be wrong with a form on such operands, said once."""
    found = None if form == "exact" else forms.fault(form, inputs)
    if found is not None:
        say_once(f"backend 'adaptive' leaves the form {form!r} out: {found}")
    return found
