"""The paths of attention that the benches time, and the check that each must pass first.

A path's results and gradients at 257 tokens may err at most twice as much, against the fp64 oracle,
as its own formula written densely in the operands' dtype, plus a floor: a path that fails is
reported and never timed. Operands are random; the decay halves the importance every 100 tokens,
about as at initialisation, so that the horizon is what a model starts with."""

import functools
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import sisa_kernels as sk
from bench import authors
from bench.authors import eager_chain, sdpa
from bench.roofline import Shape
from sisa_kernels import testing
from sisa_kernels.inputs import BACKENDS, NAMES, SisaInputs
from sisa_kernels.rotation import rotate
from sisa_kernels.scans import cumulative_phase
from sisa_kernels.testing import ValueAndGrads
from sisa_kernels.triton.op import causal_attention, exact_attention
from sisa_kernels.triton.prologue import fused, rotate_qk
from sisa_kernels.triton.tune import CHECK_LENGTH
from sisa_model.models.context import rotary_tables

HALF_LIFE = 100.0  # tokens
CHECK_HALF_LIFE = 5.0  # so short that the check's 257 tokens reach past the horizon
FLOOR = {torch.float32: 1e-6, torch.float16: 1e-4, torch.bfloat16: 1e-4}

Attend = Callable[[SisaInputs], Tensor]


@dataclass(frozen=True)
class Path:
    """A way to compute attention; inputs without ``rotary`` get no RoPE."""

    name: str  # in the rows
    mode: str  # exact, clamped or plain (the importance inputs unused)
    cost: str  # its name in the roofline
    call: Attend
    formula: Attend  # the same, densely in the operands' dtype
    proofs: str = ""  # pattern of the tests (with {ds}) whose failure keeps it from being timed
    trains: bool = True  # has a backward

    @property
    def uses(self) -> int:
        """How many of the inputs, the first ones, it has gradients for."""
        if not self.trains:
            return 0
        return 3 if self.mode == "plain" else len(NAMES)


# ---- Problems and paths --------------------------------------------------------------------------


@functools.lru_cache(maxsize=16)
def problem(
    shape: Shape, dtype: torch.dtype, device: torch.device, half_life: float = HALF_LIFE
) -> tuple[SisaInputs, Tensor]:
    """Random inputs as leaves, with RoPE's tables, and dL/dy; a key head for each query head.

    The log-decay is uniform from 0 on, and halves the importance every ``half_life`` on average.
    """
    B, L, H, Dh, Ds, Dv = astuple(shape)
    sizes = {"B": B, "L": L, "H": H, "Dh": Dh, "Ds": Ds, "Dv": Dv}
    x, dy = testing.problem(**sizes, dtype=dtype, device=device)
    uniform = torch.rand(B, L, H, generator=torch.Generator().manual_seed(1)).to(device)
    log_decay = (uniform * (-2 * math.log(2) / half_life)).requires_grad_()
    return x._replace(log_decay=log_decay, rotary=rotary_tables(L, Dh, device)), dy


def softmax_attention(score: Tensor, v: Tensor) -> Tensor:
    """Causal softmax of score [B, H, L, L] fp32 times v [B, L, H, Dv], in v's dtype."""
    future = torch.ones(score.shape[-2:], dtype=torch.bool, device=v.device).triu(1)
    weight = score.masked_fill(future, -math.inf).softmax(-1).to(v.dtype)
    return (weight @ v.transpose(1, 2)).transpose(1, 2)


def dense(x: SisaInputs) -> Tensor:
    """Eq. 2 as a user would write it: products in the operands' dtype, scores in fp32."""
    q, k = rotate_qk(x.q, x.k, x.rotary)
    cos, sin = cumulative_phase(x.theta, torch.float32)
    b, c = (rotate(t.float(), cos, sin).to(t.dtype) for t in (x.b, x.c))
    g = x.log_decay.double().cumsum(1).transpose(1, 2)
    decay_between = (g[..., :, None] - g[..., None, :]).clamp(max=0).exp().float()
    q, k, b, c = (t.transpose(1, 2) for t in (q, k, b, c))
    content = (q @ k.mT).float() / math.sqrt(q.shape[3])
    importance_term = x.lam[:, None, None] * decay_between * (c @ b.mT).float()
    return softmax_attention(content + importance_term, x.v)


def dense_augmented(x: SisaInputs) -> Tensor:
    """The clamped score as one product of augmented operands."""
    q_aug, k_aug = (t.transpose(1, 2) for t in eager_chain(x))
    return softmax_attention((q_aug @ k_aug.mT).float() / math.sqrt(x.q.shape[3]), x.v)


def stock(backend: SDPBackend) -> Attend:
    """Plain attention by one stock backend, RoPE compiled on a GPU.

    It is the fastest that a user gets without a kernel."""

    def call(x: SisaInputs) -> Tensor:
        q = x.q
        k = x.k
        if x.rotary is not None:
            q, k = fused(q.device, rotate_qk)(q, k, x.rotary)
        with sdpa_kernel(backend):
            return sdpa(q, k, x.v)

    return call


def ours(mode: str, backend: str) -> Attend:
    """:func:`sisa_kernels.sisa_attention` in a mode, by a backend."""

    def call(x: SisaInputs) -> Tensor:
        return sk.sisa_attention(**x._asdict(), mode=mode, backend=backend)

    return call


exact = ours("exact", "triton")


def augmented(x: SisaInputs) -> tuple[Tensor, Tensor]:
    """Our augmented q and k."""
    return sk.augment_qk(**x.scores()._asdict())


def unpadded(x: SisaInputs) -> Tensor:
    """Our augmentation, then what SDPA makes of d_qk != d_v: what the padding of v gains."""
    q_aug, k_aug = augmented(x)
    return sdpa(q_aug, k_aug, x.v, scale=x.q.shape[3] ** -0.5)


@functools.cache
def compiled_flex(length: int, device: torch.device) -> Callable[..., Tensor]:
    """FlexAttention of causal scores, compiled."""
    mask = create_block_mask(
        lambda batch, head, i, j: i >= j, None, None, length, length, device=device.type
    )
    return partial(torch.compile(flex_attention, dynamic=False), block_mask=mask)


@torch.no_grad()
def flex(x: SisaInputs) -> Tensor:
    """The authors' chain, then FlexAttention, whose scores know no second product of vectors."""
    attend = compiled_flex(x.q.shape[1], x.q.device)
    q_aug, k_aug = (t.transpose(1, 2) for t in eager_chain(x))
    y = attend(q_aug, k_aug, x.v.detach().transpose(1, 2), scale=x.q.shape[3] ** -0.5)
    return y.transpose(1, 2)


def without_horizon(x: SisaInputs) -> Tensor:
    """The Triton path with every importance product made."""
    return exact_attention(**x._asdict(), horizon=None)


def plain(x: SisaInputs) -> Tensor:
    """Plain attention by our Triton kernels."""
    return causal_attention(x.q, x.k, x.v, rotary=x.rotary)


def plain_native(x: SisaInputs) -> Tensor:
    """Plain attention by our kernel for CPUs."""
    return sk.causal_attention(x.q, x.k, x.v, rotary=x.rotary, backend="native")


EXACT_TESTS = r"test_exact_in_bf16.*\[\d+-{ds}-|test_two_runs_give_the_same_bits"
PLAIN_TESTS = "test_without_the_importance_term|test_addresses_past_32_bits"
FLASH_TESTS = "test_every_legal_row_on_the_gpu"
EXACT = Path("sisa", "exact", "exact", exact, dense, EXACT_TESTS + "|past_the_horizon")
# Exact attention through a stock kernel, by the backend's name, and its name in the roofline: those
# that this checkout has.
FORMS = {"far_and_band": "far and band", "wide": "wide"}
STOCK_FORMS = [
    Path(name, "exact", cost, ours("exact", name), dense)
    for name, cost in FORMS.items()
    if name in BACKENDS
]
STOCK = [
    Path(name, "plain", "plain", stock(getattr(SDPBackend, f"{name.upper()}_ATTENTION")), dense)
    for name in ("cudnn", "flash", "efficient")
]
FLASH_TABLE = Path(
    "flash table", "clamped", "augmented", ours("clamped", "one_call"), dense_augmented, FLASH_TESTS
)
AUTHORS = Path("eager+sdpa", "clamped", "eager", authors.attention, dense_augmented)
ATTENTION = [
    EXACT,
    Path("no horizon", "exact", "exact", without_horizon, dense, EXACT_TESTS),
    Path("our plain", "plain", "plain", plain, dense, PLAIN_TESTS),
    *STOCK,
    FLASH_TABLE,
    AUTHORS,
]
# It has no backward on a CPU.
FLEX = Path("flex", "clamped", "eager", flex, dense_augmented, trains=False)
EXACT_ON_CPU = Path("sisa", "exact", "exact", ours("exact", "native"), dense)
CHUNKED = Path("chunked", "exact", "exact", ours("exact", "chunked"), dense)
PLAIN_ON_CPU = Path("our plain", "plain", "plain", plain_native, dense)
ATTENTION_ON_CPU = [
    EXACT_ON_CPU,
    PLAIN_ON_CPU,
    CHUNKED,
    Path("one call", "exact", "augmented", ours("exact", "one_call"), dense),
    FLASH_TABLE,
    Path("unpadded", "clamped", "augmented", unpadded, dense_augmented),
    AUTHORS,
    STOCK[1],
]

# ---- The check -----------------------------------------------------------------------------------


def reason(error: BaseException, told: Sequence[warnings.WarningMessage] = ()) -> str:
    """The first line of an error; of SDPA's "no kernel", the warning in which it says why."""
    first = str(error).strip().partition("\n")[0]
    if re.search("No available kernel|No viable backend", first):
        for warning in told:
            line = str(warning.message).partition(" (Triggered")[0].partition("\n")[0]
            if not re.search("not used because|has been runtime disabled", line):
                return line
    return f"{type(error).__name__}: {first}"


def results(attend: Attend, x: SisaInputs, dy: Tensor, uses: int = len(NAMES)) -> ValueAndGrads:
    """y and the gradients of the first ``uses`` inputs by name."""
    y = attend(x)
    grads = torch.autograd.grad(y, x[:uses], dy) if uses else ()
    return y.detach(), dict(zip(NAMES, grads))


def errors(found: ValueAndGrads, right: ValueAndGrads, x: SisaInputs) -> dict[str, float]:
    """The relative error of y and of every gradient that was found."""
    off = testing.relative_errors(found, right)
    if "lam" in off:  # nearly cancels: measured by the sizes of what it sums
        off |= testing.gradient_errors(found[1], right[1], x)
    return off


@functools.cache
def failure(
    path: Path,
    widths: tuple[int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    with_rope: bool,
) -> str | None:
    """Why a path must not be timed at widths (Dh, Ds, Dv): it raises, or is wrong; None: it may."""
    x, dy = problem(Shape(1, CHECK_LENGTH, 2, *widths), dtype, device, CHECK_HALF_LIFE)
    if not with_rope:
        x = x._replace(rotary=None)
    if path.mode == "plain":  # the oracle's, with an importance of nought
        x = x._replace(b=torch.zeros_like(x.b), c=torch.zeros_like(x.c))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            found = results(path.call, x, dy, path.uses)
        except Exception as error:
            return reason(error, told)
    for warning in told:  # recorded for a refusal only
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    mode = "clamped" if path.mode == "clamped" else "exact"
    right = testing.oracle(x, dy, rotary=x.rotary, mode=mode)
    by_formula = errors(results(path.formula, x, dy, path.uses), right, x)
    limits = {name: 2 * error + FLOOR[dtype] for name, error in by_formula.items()}
    return first_wrong(errors(found, right, x), limits)


def first_wrong(errors: Mapping[str, float], limits: Mapping[str, float]) -> str | None:
    """What to say of the first error that is above its limit, or NaN."""
    for name, error in errors.items():
        if not error <= limits[name]:
            of = f"d{name}" if name in NAMES else name
            return f"wrong: {of} is off by {error:.1e}, at most {limits[name]:.1e} allowed"
    return None
