"""The paths of attention that the benches time, and the check that each must pass in this process
first.

A path's results and gradients at 257 tokens may err at most twice as much, against the fp64 oracle,
as its own formula written densely in the operands' dtype, plus a floor: a path that fails is
reported and never timed. Operands are random; the decay halves the importance every 100 tokens,
about as at initialisation, so that the horizon is what a model starts with."""

import functools
import math
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import sisa_kernels as sk
from bench import authors
from bench.authors import eager_chain, sdpa
from bench.roofline import LAM, Shape
from sisa_kernels.checks import Rotary
from sisa_kernels.rotation import rotate
from sisa_kernels.triton import op as ta
from sisa_kernels.triton.tune import CHECK_LENGTH
from sisa_model.models.context import rotary_tables

HALF_LIFE = 100.0  # tokens
CHECK_HALF_LIFE = 5.0  # so short that the check's 257 tokens reach past the horizon
FLOOR = {torch.float32: 1e-6, torch.float16: 1e-4, torch.bfloat16: 1e-4}
NAMES = ("y", "dq", "dk", "dv", "db", "dc", "dlog_decay", "dtheta", "dlam")


@dataclass(frozen=True)
class Path:
    """A way to compute attention from the inputs (q, k, v, b, c, log_decay, theta, lam) and RoPE's
    tables, None: no RoPE.
    """

    name: str
    mode: str  # exact, clamped or plain (the importance inputs unused)
    cost: str  # its name in the roofline
    call: Callable[[Sequence[Tensor], Rotary | None], Tensor]
    formula: Callable[
        [Sequence[Tensor], Rotary | None], Tensor
    ]  # the same, densely in the operands' dtype
    proofs: str = (
        ""  # pattern of the tests (with {ds}) whose failure keeps it from being timed; empty: none
    )
    trains: bool = True  # has a backward

    @property
    def uses(self) -> int:
        """How many of the inputs, the first ones, it has gradients for."""
        return (3 if self.mode == "plain" else 8) if self.trains else 0


# ---- Problems and paths --------------------------------------------------------------------------


@functools.lru_cache(maxsize=16)
def problem(shape: Shape, dtype: torch.dtype, device: torch.device, half_life: float = HALF_LIFE):
    """Random inputs (q .. lam) as leaves, RoPE's (cos, sin), and dL/dy [B, L, H, Dv]; one key head
    for each query head.
    """
    B, L, H, Dh, Ds, Dv = astuple(shape)
    generator = torch.Generator(device).manual_seed(0)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, device=device)

    wide = [normal(B, L, H, width).to(dtype) for width in (Dh, Dh, Dv, Ds, Ds)]
    decay = torch.rand(B, L, H, generator=generator, device=device) * (-2 * math.log(2) / half_life)
    inputs = [*wide, decay, 0.3 * normal(B, L, H, Ds // 2), torch.full((H,), LAM, device=device)]
    return (
        [x.requires_grad_() for x in inputs],
        rotary_tables(L, Dh, device),
        normal(B, L, H, Dv).to(dtype),
    )


def softmax_attention(score: Tensor, v: Tensor) -> Tensor:
    """Causal softmax of score [B, H, L, L] fp32 times v [B, L, H, Dv], in v's dtype."""
    future = torch.ones(score.shape[-2:], dtype=torch.bool, device=v.device).triu(1)
    return (
        score.masked_fill(future, -math.inf).softmax(-1).to(v.dtype) @ v.transpose(1, 2)
    ).transpose(1, 2)


def dense(x: Sequence[Tensor], rotary: Rotary | None) -> Tensor:
    """Eq. 2 as a user would write it: products in the operands' dtype, scores in fp32."""
    q, k, v, b, c, log_decay, theta, lam = x
    q, k, importance = ta.prologue(
        q, k, b, c, log_decay, theta, lam, *(rotary or (None, None)), False
    )
    assert importance is not None
    g = log_decay.double().cumsum(1).transpose(1, 2)
    fall = (g[..., :, None] - g[..., None, :]).clamp(max=0).exp().float()
    q, k, b, c = (t.transpose(1, 2) for t in (q, k, importance.b, importance.c))
    return softmax_attention(
        (q @ k.mT).float() / math.sqrt(q.shape[3]) + lam[:, None, None] * fall * (c @ b.mT).float(),
        v,
    )


def dense_augmented(x: Sequence[Tensor], rotary: Rotary | None) -> Tensor:
    q, k, v, b, c, log_decay, theta, lam = x
    q_aug, k_aug = (
        t.transpose(1, 2) for t in eager_chain(q, k, b, c, log_decay, theta, lam, *rotary)
    )
    return softmax_attention((q_aug @ k_aug.mT).float() / math.sqrt(q.shape[3]), v)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    q_rot, k_rot = (rotate(t.float(), cos[:, None], sin[:, None]).to(t.dtype) for t in (q, k))
    return q_rot, k_rot


def stock(backend: SDPBackend) -> Callable[[Sequence[Tensor], Rotary | None], Tensor]:
    """Plain attention by one stock backend; RoPE is compiled on a GPU, the fastest that a user gets
    without a kernel.
    """

    def call(x: Sequence[Tensor], rotary: Rotary | None) -> Tensor:
        q, k, v = x[:3]
        if rotary is not None:
            q, k = ta.fused(q.device, rope)(q, k, *rotary)
        with sdpa_kernel(backend):
            return sdpa(q, k, v)

    return call


def flash(x: Sequence[Tensor], rotary: Rotary | None) -> Tensor:
    return sk.sisa_attention(*x, rotary=rotary, mode="clamped", backend="flash")


def exact(x: Sequence[Tensor], rotary: Rotary | None) -> Tensor:
    return sk.sisa_attention(*x, rotary=rotary, backend="triton")


def exact_on_stock(x: Sequence[Tensor], rotary: Rotary | None) -> Tensor:
    return sk.sisa_attention(*x, rotary=rotary, backend="sdpa")


def exact_in_one_call(x: Sequence[Tensor], rotary: Rotary | None) -> Tensor:
    return sk.sisa_attention(*x, rotary=rotary, backend="flash")


def unpadded(x: Sequence[Tensor], rotary: Rotary | None) -> Tensor:
    """Our augmentation, then what SDPA makes of d_qk != d_v: what the padding of v gains."""
    q, k, v, *rest = x
    return sdpa(*sk.augment_qk(q, k, *rest, rotary=rotary), v, scale=q.shape[3] ** -0.5)


def as_published(x: Sequence[Tensor], rotary: Rotary | None) -> Tensor:
    return authors.attention(*x, rotary)


@functools.cache
def compiled_flex(length: int, device: torch.device) -> Callable[..., Tensor]:
    """FlexAttention of causal scores, compiled."""
    mask = create_block_mask(
        lambda batch, head, i, j: i >= j, None, None, length, length, device=device.type
    )
    return partial(torch.compile(flex_attention, dynamic=False), block_mask=mask)


@torch.no_grad()
def flex(x: Sequence[Tensor], rotary: Rotary | None) -> Tensor:
    """The authors' chain, then FlexAttention, which takes v as narrow as it is; its scores know no
    second product of vectors.
    """
    q, k, v, *rest = x
    q_aug, k_aug = (t.transpose(1, 2) for t in eager_chain(q, k, *rest, *rotary))
    return compiled_flex(q.shape[1], q.device)(
        q_aug, k_aug, v.detach().transpose(1, 2), scale=q.shape[3] ** -0.5
    ).transpose(1, 2)


def exact_full(x: Sequence[Tensor], rotary: Rotary | None) -> Tensor:
    return ta.exact_attention(*x, rotary=rotary, horizon=None)


def plain(x: Sequence[Tensor], rotary: Rotary | None) -> Tensor:
    return ta.causal_attention(*x[:3], rotary=rotary)


EXACT_TESTS = r"test_exact_in_bf16.*\[\d+-{ds}-|test_two_runs_give_the_same_bits"
EXACT = Path("sisa", "exact", "exact", exact, dense, EXACT_TESTS + "|past_the_horizon")
STOCK = [
    Path(name, "plain", "plain", stock(getattr(SDPBackend, f"{name.upper()}_ATTENTION")), dense)
    for name in ("cudnn", "flash", "efficient")
]
FLASH_TABLE = Path(
    "flash table", "clamped", "augmented", flash, dense_augmented, "test_every_legal_row_on_the_gpu"
)
AUTHORS = Path("eager+sdpa", "clamped", "eager", as_published, dense_augmented)
ATTENTION = [
    EXACT,
    Path("no horizon", "exact", "exact", exact_full, dense, EXACT_TESTS),
    Path(
        "our plain",
        "plain",
        "plain",
        plain,
        dense,
        "test_without_the_importance_term|test_addresses_past_32_bits",
    ),
    *STOCK,
    FLASH_TABLE,
    AUTHORS,
]
FLEX = Path(
    "flex", "clamped", "eager", flex, dense_augmented, trains=False
)  # it has no backward on a CPU
EXACT_ON_CPU = Path("sisa", "exact", "exact", exact_on_stock, dense)
ATTENTION_ON_CPU = [
    EXACT_ON_CPU,
    Path("one call", "exact", "augmented", exact_in_one_call, dense),
    FLASH_TABLE,
    Path("unpadded", "clamped", "augmented", unpadded, dense_augmented),
    AUTHORS,
    STOCK[1],
]

# ---- The check -----------------------------------------------------------------------------------


def reason(error: BaseException, told: Sequence[warnings.WarningMessage] = ()) -> str:
    """The first line of an error; where SDPA only says that no kernel is available, the warning in
    which it says why.
    """
    first = str(error).strip().partition("\n")[0]
    said = [str(w.message).partition(" (Triggered")[0].partition("\n")[0] for w in told]
    said = [
        line for line in said if not re.search("not used because|has been runtime disabled", line)
    ]
    return (
        said[0]
        if said and re.search("No available kernel|No viable backend", first)
        else f"{type(error).__name__}: {first}"
    )


def results(
    function: Callable, x: list[Tensor], rotary: Rotary | None, dy: Tensor, uses: int
) -> list[Tensor]:
    """y and the gradients of the first ``uses`` inputs."""
    y = function(x, rotary)
    return [y.detach(), *(torch.autograd.grad(y, x[:uses], dy) if uses else ())]


def errors(found: list[Tensor], oracle: list[Tensor], x: list[Tensor]) -> list[float]:
    """|r - oracle| / |oracle| of each. lam's gradient, a sum over tokens that may nearly cancel, by
    the sum of their sizes.
    """
    sizes = [r.norm() for r in oracle]
    if len(oracle) == len(NAMES):
        sizes[8] = ((oracle[5] * x[4].double()).sum(3).abs().sum((0, 1)) / x[7]).norm()
    return [((f.double() - r).norm() / size).item() for f, r, size in zip(found, oracle, sizes)]


@functools.cache
def failure(
    path: Path,
    widths: tuple[int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    with_rope: bool,
) -> str | None:
    """Why a path must not be timed at these widths (Dh, Ds, Dv): what it raises, or its results are
    wrong; None: it may be.
    """
    x, rotary, dy = problem(Shape(1, CHECK_LENGTH, 2, *widths), dtype, device, CHECK_HALF_LIFE)
    rotary = rotary if with_rope else None
    if path.mode == "plain":  # the oracle's, with an importance of nought
        x = [*x[:3], *(torch.zeros_like(t) for t in x[3:5]), *x[5:]]
    fine = [t.detach().double().requires_grad_() for t in x]
    mode = "clamped" if path.mode == "clamped" else "exact"
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            found = results(path.call, x, rotary, dy, path.uses)
        except Exception as error:
            return reason(error, told)
    for warning in told:  # recorded for a refusal only
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    oracle = results(
        lambda x, r: sk.reference.sisa_attention(*x, rotary=r, mode=mode),
        fine,
        rotary,
        dy.double(),
        path.uses,
    )
    allowed = errors(results(path.formula, x, rotary, dy, path.uses), oracle, x)
    limits = [2 * off + FLOOR[dtype] for off in allowed]
    return first_wrong(NAMES, errors(found, oracle, x), limits)


def first_wrong(names: Sequence[str], off: list[float], limits: list[float]) -> str | None:
    """What to say of the first error that is above its limit, or NaN."""
    named = zip(names, off, limits)
    return next(
        (
            f"wrong: {n} is off by {e:.1e}, at most {m:.1e} allowed"
            for n, e, m in named
            if not e <= m
        ),
        None,
    )
