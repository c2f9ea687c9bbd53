"""``backend="one_call"``: SISA as one call of a stock kernel, from a table, each checked.

SDPA's own choice is never taken. With value heads narrower than the augmented queries and keys it
leaves its flash kernels without a word: for a kernel without Hopper's instructions on Ampere, for
dense scores on a CPU. So each row of ``TABLE`` says for which calls its kernel is legal and how
wide the operands must then be, and the first row that is legal, and right against the oracle on its
first use, runs. Always ``is_causal``, never a mask tensor: cuDNN's backward gave NaN with one
(PyTorch issue 196678)."""

import functools
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sisa_kernels import selfcheck
from sisa_kernels.checks import concrete
from sisa_kernels.inputs import Mode, SisaInputs, by_document, is_grouped
from sisa_kernels.ops import matmul, say_once
from sisa_kernels.paths.augment import augment
from sisa_kernels.paths.chunked import chunked, finite, padded
from sisa_kernels.rotation import CLAMP
from sisa_kernels.scans import LOWEST_LOG_DECAY, to_query_heads, work_dtype

# By how much g may fall in a single call: exp(+-range/2) must leave room in the format for the
# operands themselves.
ONE_CALL_RANGE = {
    torch.float64: 1000.0,
    torch.float32: 80.0,
    torch.bfloat16: 80.0,
    torch.float16: 10.0,
}
HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Call:
    """What is asked of a stock kernel."""

    device: torch.device
    capability: tuple[int, int]
    """CUDA compute capability; (0, 0) elsewhere."""
    dtype: torch.dtype
    """Of the operands as the kernel gets them."""
    length: int
    width: int
    """Of the augmented queries and keys, Dh + Ds."""
    value_width: int
    grouped: bool = False
    """Fewer key heads than query heads."""
    grad: bool = True
    deterministic: bool = False
    """torch.use_deterministic_algorithms is on, and not only to warn."""


Widths = tuple[int, int]  # of queries and keys, and of values, zeros past what they hold


@dataclass(frozen=True)
class Kernel:
    """A row of the table."""

    name: str
    reason: str
    """Why it stands where it stands."""
    legal: Callable[[Call], Widths | str]
    """The widths that the kernel needs the operands padded to, or why it cannot run the call."""
    attend: Callable[[Tensor, Tensor, Tensor, float, bool], Tensor]
    """(q, k, v [B, L, heads, width], scale, deterministic) -> y [B, L, H, width of v]."""


def _up(width: int, multiple: int) -> int:
    return -(-width // multiple) * multiple


def _sdpa(backend: SDPBackend) -> Callable[[Tensor, Tensor, Tensor, float, bool], Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, deterministic: bool) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        gqa = is_grouped(q.shape[1], k.shape[1])
        with sdpa_kernel(backend):
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=gqa)
        return y.transpose(1, 2)

    return attend


def _flash_attn_2(q: Tensor, k: Tensor, v: Tensor, scale: float, deterministic: bool) -> Tensor:
    from flash_attn import flash_attn_func

    return flash_attn_func(q, k, v, softmax_scale=scale, causal=True, deterministic=deterministic)


def _flash_attn_4(q: Tensor, k: Tensor, v: Tensor, scale: float, deterministic: bool) -> Tensor:
    from flash_attn.cute import flash_attn_func

    found = flash_attn_func(q, k, v, softmax_scale=scale, causal=True)
    # Some releases return the log-sum-exp too.
    return found[0] if isinstance(found, tuple) else found


def _dense(q: Tensor, k: Tensor, v: Tensor, scale: float, deterministic: bool) -> Tensor:
    dtype = work_dtype(q)
    H = q.shape[2]
    query = (scale * q.to(dtype)).transpose(1, 2)
    key, value = (to_query_heads(x, H).to(dtype).transpose(1, 2) for x in (k, v))
    score = matmul(query, key.mT)
    later = torch.ones(score.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    weight = score.masked_fill(later, -math.inf).softmax(-1)
    return matmul(weight, value).transpose(1, 2).to(q.dtype)


@functools.cache
def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:  # of the package that would hold it
        return False


def _half_on_cuda(call: Call, capabilities: str, ok: bool) -> str | None:
    """What every kernel for half precision on a GPU refuses."""
    if call.device.type != "cuda":
        return "needs a CUDA device"
    if not ok:
        major, minor = call.capability
        return f"needs compute capability {capabilities}, this is {major}.{minor}"
    return None if call.dtype in HALF else f"takes bfloat16 and float16, not {str(call.dtype)[6:]}"


def _to_128(width: int, value: int) -> Widths | str:
    """The sizes that cuDNN, and flash-attn 4 on Blackwell, have kernels for."""
    if max(width, value) <= 128:
        return width, value
    if width <= 192 and value <= 128:
        return 192, 128
    return f"takes widths to 128 each, or 192 and 128, not {width} and {value}"


def _on_cpu(call: Call) -> Widths | str:
    width = max(call.width, call.value_width)
    return (width, width) if call.device.type == "cpu" else "needs a CPU"


def _cudnn(call: Call) -> Widths | str:
    refusal = _half_on_cuda(call, "9.x or 10.x", call.capability[0] in (9, 10))
    if refusal is not None:
        return refusal
    if call.deterministic:
        return "is not deterministic"
    if call.length == 1:
        return "takes more than one key"
    return _to_128(_up(call.width, 8), _up(call.value_width, 8))


def _cute(call: Call) -> Widths | str:
    refusal = _half_on_cuda(call, "9.x or 10.x", call.capability[0] in (9, 10))
    if refusal is not None:
        return refusal
    if not _installed("flash_attn.cute"):
        return "is not installed (pip install flash-attn-4)"
    if call.deterministic:
        return "is not deterministic"
    width = _up(call.width, 8)
    value = _up(call.value_width, 8)
    if call.capability[0] != 9:
        return _to_128(width, value)
    if call.grouped and call.grad:  # its backward with shared key heads knows one width
        width = value = max(width, value)
    if max(width, value) > 256:
        return f"takes widths to 256, not {width} and {value}"
    return width, value


def _one_width(call: Call) -> Widths | str:
    """FlashAttention 2, by itself or inside PyTorch."""
    refusal = _half_on_cuda(call, "8.0 or later", call.capability >= (8, 0))
    if refusal is not None:
        return refusal
    width = _up(max(call.width, call.value_width), 8)
    if width > 256:
        return f"takes widths to 256, not {width}"
    major, minor = call.capability
    if width > 192 and call.grad and ((major, minor) in ((8, 6), (8, 9)) or major == 12):
        return (
            f"has no backward of width {width} on compute capability {major}.{minor}, only to 192"
        )
    return width, width


def _package_2(call: Call) -> Widths | str:
    widths = _one_width(call)
    if isinstance(widths, str) or _installed("flash_attn_2_cuda"):
        return widths
    return "is not installed (pip install flash-attn)"


def _efficient(call: Call) -> Widths | str:
    if call.device.type != "cuda":
        return "needs a CUDA device"
    if call.dtype not in (*HALF, torch.float32):
        return f"takes bfloat16, float16 and float32, not {str(call.dtype)[6:]}"
    if call.deterministic and call.grad:
        return "has no deterministic backward"
    multiple = 4 if call.dtype == torch.float32 else 8
    return _up(call.width, multiple), _up(call.value_width, multiple)


TABLE = (
    Kernel(
        "cpu",
        "The only fused kernel of a CPU, in fp32: its bf16 backward takes 4 to 5 times as long "
        "without bf16 hardware.",
        _on_cpu,
        _sdpa(SDPBackend.FLASH_ATTENTION),
    ),
    Kernel(
        "cudnn",
        "On Hopper 1.7 to 2.3 times as fast as FlashAttention 2 (Hugging Face transformers pull "
        "request 48163), and it takes values narrower than keys; on Ampere 0.8 times, so not "
        "there.",
        _cudnn,
        _sdpa(SDPBackend.CUDNN_ATTENTION),
    ),
    Kernel(
        "flash-attn-4",
        "Written for Hopper and Blackwell, exact widths; second to cuDNN until measured side by "
        "side.",
        _cute,
        _flash_attn_4,
    ),
    Kernel(
        "flash-attn-2",
        "The newer release of the kernels inside PyTorch; one width, so v is padded.",
        _package_2,
        _flash_attn_2,
    ),
    Kernel(
        "flash",
        "FlashAttention 2 inside PyTorch: Ampere's best; one width, so v is padded.",
        _one_width,
        _sdpa(SDPBackend.FLASH_ATTENTION),
    ),
    Kernel(
        "efficient",
        "Any width, fp32 too, and older GPUs; no Hopper instructions.",
        _efficient,
        _sdpa(SDPBackend.EFFICIENT_ATTENTION),
    ),
    Kernel(
        "math",
        "Dense scores, O(L^2) memory: what is left.",
        lambda call: (call.width, call.value_width),
        _dense,
    ),
)


def capability(device: torch.device) -> tuple[int, int]:
    """The CUDA compute capability of ``device``, (0, 0) for another kind."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def state(call: Call) -> dict[str, str]:
    """Each row of the table by name: "available" for ``call``, or why not."""
    found = {kernel.name: kernel.legal(call) for kernel in TABLE}
    return {
        name: f"it {legal}" if isinstance(legal, str) else "available"
        for name, legal in found.items()
    }


def kernel_fault(
    kernel: Kernel, call: Call, mode: Mode, Dh: int, input_dtype: torch.dtype
) -> str | None:
    """What is known to be wrong with :func:`one_call` by one kernel, in such a call."""
    use = selfcheck.Use(
        path=kernel.name,
        device=call.device,
        dtype=input_dtype,
        Dh=Dh,
        Ds=call.width - Dh,
        Dv=call.value_width,
        mode=mode,
        grouped=call.grouped,
        backward=call.grad,
    )
    return selfcheck.fault(use, functools.partial(one_call, mode=mode, kernel=kernel))


def choose(call: Call, mode: Mode, Dh: int, input_dtype: torch.dtype) -> tuple[Kernel, Widths]:
    """The first row that is legal for ``call`` and right on its first use; wrong ones are said."""
    asked = [(kernel, kernel.legal(call)) for kernel in TABLE]
    legal = [(kernel, widths) for kernel, widths in asked if not isinstance(widths, str)]
    chosen = legal[-1]  # dense scores: what is left, unchecked
    faults: dict[str, str] = {}
    for kernel, widths in legal[:-1]:
        fault = kernel_fault(kernel, call, mode, Dh, input_dtype)
        if fault is None:
            chosen = kernel, widths
            break
        faults[kernel.name] = fault
    runs = chosen[0].name
    for name, fault in faults.items():
        say_once(f"backend 'one_call' leaves its kernel {name!r} out and runs {runs!r}: {fault}")
    return chosen


def one_call(inputs: SisaInputs, mode: Mode, kernel: Kernel | None = None) -> Tensor:
    """SISA as one attention call on augmented operands: y [B, L, H, Dv] in q's dtype.

    They are padded with zeros to the widths of the kernel that runs. In mode "clamped" this is the
    authors' formulation. In mode "exact" it is legal while the range of g fits the dtype's
    exponents, and a ValueError past that. On a CPU half precision runs in fp32. ``kernel``: a row
    of the table to run unchecked, a ValueError if it is not legal; None: as :func:`choose`
    finds."""
    q = inputs.q
    Dh = q.shape[3]
    dtype = work_dtype(q) if q.device.type == "cpu" else q.dtype
    clamp = CLAMP
    if mode == "exact":
        clamp = math.inf
        _check_range(inputs.log_decay, dtype)
    call = _call_for(inputs, dtype)
    if kernel is None:
        kernel, widths = choose(call, mode, Dh, q.dtype)
    else:
        legal = kernel.legal(call)
        if isinstance(legal, str):
            raise ValueError(f"kernel {kernel.name!r} of backend 'one_call' {legal}")
        widths = legal
    width, value_width = widths
    q_aug, k_aug = augment(inputs.scores(), [0], clamp, width, dtype)
    clean, lacking = finite(inputs.v.to(dtype))
    value = padded(clean, value_width)
    y = kernel.attend(q_aug, k_aug, value, Dh**-0.5, call.deterministic)
    return (y[..., : inputs.v.shape[3]] + to_query_heads(lacking, q.shape[2])).to(q.dtype)


def attend(inputs: SisaInputs, mode: Mode) -> Tensor:
    """:func:`one_call` of each packed document, y [B, L, H, Dv]; 0 past the last one's end.

    On a CPU packed documents, and calls under torch.func, are in mode "clamped" :func:`chunked`'s
    one chunk a document, on the kernel that the table would choose: an op, which vmap takes whole,
    and a compiled call with any number of documents."""
    bounds = inputs.cu_seqlens
    on_cpu = inputs.q.device.type in ("cpu", "meta")
    as_op = bounds is not None or torch._C._are_functorch_transforms_active()
    if mode == "clamped" and on_cpu and as_op:
        return chunked(inputs, CLAMP)
    if bounds is None:
        return one_call(inputs, mode)
    if on_cpu and concrete(bounds) is None:  # they cannot be read: exact, too
        return chunked(inputs)
    length = inputs.q.shape[1]
    return by_document(lambda rows: one_call(inputs.rows(rows), mode), bounds, length)


def _check_range(log_decay: Tensor, dtype: torch.dtype) -> None:
    """ValueError where g falls by more than one call holds; asserted where it has no values yet."""
    limit = ONE_CALL_RANGE[dtype]
    values = concrete(log_decay)
    given = log_decay.detach() if values is None else values
    widest = -given.double().clamp(min=LOWEST_LOG_DECAY).sum(-2).min()
    if values is None:
        torch._assert_async(widest <= limit, f"log_decay must sum to at least {-limit:g}")
        return
    range_of_g = widest.item()
    if range_of_g > limit:
        raise ValueError(
            f"backend 'one_call' is exact in {dtype} while log_decay sums to at least {-limit:g}, "
            f"got {-range_of_g:.4g}; use backend 'chunked'"
        )


def _call_for(inputs: SisaInputs, dtype: torch.dtype) -> Call:
    q = inputs.q
    return Call(
        device=q.device,
        capability=capability(q.device),
        dtype=dtype,
        length=q.shape[1],
        width=q.shape[3] + inputs.b.shape[3],
        value_width=inputs.v.shape[3],
        grouped=is_grouped(q.shape[2], inputs.k.shape[2]),
        grad=torch.is_grad_enabled() and any(x.requires_grad for x in inputs.tensors()),
        deterministic=torch.are_deterministic_algorithms_enabled()
        and not torch.is_deterministic_algorithms_warn_only_enabled(),
    )
