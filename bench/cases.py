"""What the benches time, by section: groups of cases that take turns, each with its check."""

import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import sisa_kernels as sk
import sisa_model as sm
from bench import authors, llama
from bench.paths import (
    ATTENTION,
    AUTHORS,
    EXACT,
    EXACT_ON_CPU,
    FLASH_TABLE,
    HALF_LIFE,
    STOCK,
    Path,
    augmented,
    failure,
    first_wrong,
    problem,
    results,
)
from bench.roofline import Device, Shape, horizon_tokens, importance_share, stages
from sisa_kernels import _extension
from sisa_kernels.inputs import SisaInputs
from sisa_kernels.rotation import rotate
from sisa_kernels.testing import relative
from sisa_kernels.triton.op import padded_width
from sisa_kernels.triton.prologue import LOG2E, fused, prologue
from sisa_kernels.triton.tiles import choose_tiles, tile_key, tuned_tiles
from sisa_kernels.triton.tune import CHECK_LENGTH, autotune
from sisa_model.models.context import Context, rotary_at, rotary_tables
from sisa_model.models.presets import preset_config
from sisa_model.runs.config import TrainConfig, resolve
from sisa_model.training.loss import Objective
from sisa_model.training.optimizer import make_optimizer
from sisa_model.training.parallel import Parallel, World

CUDA = torch.device("cuda")
LAYER_LIMIT = 1e-5  # relative error of a whole layer in fp32


@dataclass(frozen=True)
class Setting:
    """Where and at what sizes; the defaults are an attention layer of the 152M model."""

    device: torch.device = CUDA
    dtype: torch.dtype = torch.bfloat16
    lengths: tuple[int, ...] = ()  # of the sequences; empty: each section's own
    d_states: tuple[int, ...] = (16, 32, 64, 128)
    tokens: int = 32768  # of a batch
    heads: int = 12
    head_dim: int = 64
    # The first is the baseline.
    models: tuple[str, ...] = ("transformer-152m", "sisa-152m-ds16", "mamba2-152m")
    datasheet: Device | None = None  # what bounds are taken from; None: no bounds

    def shapes(self, *lengths: int) -> list[Shape]:
        """A shape for each length and d_state: ``lengths`` where the setting has none."""
        return [
            Shape(self.batch(length), length, self.heads, self.head_dim, d_state, self.head_dim)
            for length in self.lengths or lengths
            for d_state in self.d_states
        ]

    def batch(self, length: int) -> int:
        """Of sequences of this length."""
        return max(1, self.tokens // length)


class Work(NamedTuple):
    """What a call gets done, for its rate."""

    amount: float  # of the unit, times a second
    unit: str
    formula: str


def no_check() -> str | None:
    """The check of what is made of stock ops alone."""
    return None


@dataclass(frozen=True, kw_only=True)
class Case:
    """One thing to time. Cases that are timed together take turns."""

    op: str
    path: str
    mode: str
    shape: str
    passes: str
    make: Callable[[], Callable[[], object]]  # allocates the inputs and returns what is timed
    work: Work
    check: Callable[[], str | None] = no_check  # why it must not be timed
    proofs: str = ""  # pattern of the tests whose failure keeps it from being timed
    kernels: str = ""  # what must be compiled for it, by a name that cases share; empty: nothing
    bound: float | None = None  # ms
    # The fastest such case of a group and pass is what the others are measured against.
    baseline: bool = False


def label_of(shape: Shape) -> str:
    B, L, H, Dh, Ds, Dv = astuple(shape)
    return f"{B}x{L}x{H} {Dh}+{Ds}/{Dv}"


def widths_of(shape: Shape) -> tuple[int, int, int]:
    return shape.head_dim, shape.d_state, shape.value_dim


def attention_bound(
    path: Path, shape: Shape, s: Setting, backward: bool, rope: bool, half_life: float
) -> float:
    """The roofline's, in ms; without RoPE there is no prologue."""
    horizon = horizon_tokens(shape.d_state, half_life) if path is EXACT else math.inf
    kernels = stages(path.cost, shape, backward=backward, horizon=horizon)
    if not rope:
        kernels = [kernel for kernel in kernels if not kernel.name.startswith("prologue")]
    return 1e3 * sum(kernel.seconds(s.datasheet) for kernel in kernels)


def attention_work(path: Path, shape: Shape, backward: bool, half_life: float) -> Work:
    """FLOPs of the causal scores."""
    B, L, H, Dh, Ds, Dv = astuple(shape)
    horizon = horizon_tokens(Ds, half_life) if path is EXACT else math.inf
    width = Dh
    width_formula = "Dh"
    if path.mode != "plain":
        width = Dh + Ds * importance_share(L, horizon)
        width_formula = "Dh+Ds*share within horizon"
    macs = 4 * width + 3 * Dv if backward else width + Dv
    macs_formula = "4W+3Dv" if backward else "W+Dv"
    formula = f"BHL(L+1)({macs_formula}); W={width_formula}"
    return Work(1e-12 * B * H * L * (L + 1) * macs, "TFLOP/s", formula)


def attention_case(
    op: str,
    path: Path,
    shape: Shape,
    passes: str,
    s: Setting,
    *,
    label: str = "",
    half_life: float = HALF_LIFE,
    baseline: bool = False,
) -> Case:
    """A path at a shape, in the rows ``label``, with RoPE in every section but ``stock``.

    ``half_life``: in tokens, named in the mode where it is not as at initialisation."""
    rope = op != "stock"
    backward = passes == "fwd+bwd"

    def make() -> Callable[[], object]:
        x, dy = problem(shape, s.dtype, s.device, half_life)
        if not rope:
            x = x._replace(rotary=None)
        if backward:
            return lambda: results(path.call, x, dy, path.uses)
        return lambda: path.call(x)

    mode = path.mode
    if rope and mode == "plain":
        mode += ", RoPE compiled" if s.device.type == "cuda" else ", RoPE eager"
    if op == "decay" or half_life != HALF_LIFE:
        mode += f", half-life {half_life:g}"
    of_states = "" if path.mode == "plain" else f"+{shape.d_state}"
    bounded = s.datasheet is not None
    return Case(
        op=op,
        path=path.name,
        mode=mode,
        shape=label or label_of(shape),
        passes=passes,
        make=make,
        work=attention_work(path, shape, backward, half_life),
        check=partial(failure, path, widths_of(shape), s.dtype, s.device, rope),
        proofs=path.proofs.format(ds=shape.d_state),
        kernels=f"{path.name} {shape.head_dim}{of_states}/{shape.value_dim}" if rope else "",
        bound=attention_bound(path, shape, s, backward, rope, half_life) if bounded else None,
        baseline=baseline,
    )


def gemm_case(op: str, shape: Shape, s: Setting, size: int = 2048) -> Case:
    """PyTorch's product of square matrices, to compare rates with."""

    def make() -> Callable[[], object]:
        a, b, out = (torch.randn(size, size, dtype=s.dtype, device=s.device) for _ in range(3))
        return lambda: torch.mm(a, b, out=out)

    return Case(
        op=op,
        path="gemm",
        mode=f"{size} x {size} x {size}",
        shape=label_of(shape),
        passes="fwd+bwd",
        make=make,
        work=Work(2e-12 * size**3, "TFLOP/s", "2 n^3"),
    )


def stock_groups(s: Setting) -> list[list[Case]]:
    """Each stock backend at the widths of augmented operands, v as it is or padded to them.

    Baseline: the plain widths."""
    Dh = s.head_dim
    widths = [(Dh, Dh)]
    for ds in s.d_states:
        widths += [(Dh + ds, Dh), (Dh + ds, Dh + ds)]
    if (192, 64) in widths:
        widths.append((192, 128))  # the one pair past 128 that cuDNN trains
    groups = []
    for shape in dict.fromkeys(replace(shape, d_state=2) for shape in s.shapes(2048, 16384)):
        cases = []
        for qk, v in widths:
            wide = replace(shape, head_dim=qk, value_dim=v)
            label = f"{shape.batch}x{shape.length}x{shape.heads} {qk}/{v}"
            options = {"label": label, "baseline": qk == Dh}
            cases += [attention_case("stock", p, wide, "fwd+bwd", s, **options) for p in STOCK]
        groups.append(cases)
    return groups


def attention_groups(s: Setting, paths: Sequence[Path] = ATTENTION) -> list[list[Case]]:
    """Every attention path, forward and forward + backward.

    Baseline: plain attention with RoPE by the fastest stock backend."""
    return [
        [
            attention_case("attention", path, shape, passes, s, baseline=path in STOCK)
            for passes in ("fwd", "fwd+bwd")
            for path in paths
        ]
        for shape in s.shapes(2048, 16384, 4096, 8192, 1024, 32768)  # the targets' two first
    ]


def decay_groups(
    op: str, paths: Sequence[Path], s: Setting, half_lives: Sequence[float]
) -> list[list[Case]]:
    """Paths at the first d_state, the targets' lengths and these half-lives, both passes.

    Baseline: plain attention with RoPE by the fastest stock backend."""
    groups = []
    for shape in s.shapes(2048, 16384):
        if shape.d_state != s.d_states[0]:
            continue
        for half_life in half_lives:
            fades = "" if half_life == HALF_LIFE else f" t={half_life:g}"
            options = {"label": label_of(shape) + fades, "half_life": half_life}
            groups.append(
                [
                    attention_case(op, path, shape, passes, s, baseline=path in STOCK, **options)
                    for passes in ("fwd", "fwd+bwd")
                    for path in paths
                ]
            )
    return groups


# ---- The prologue and the augmentation -----------------------------------------------------------


def timed_prologue(
    function: Callable, shape: Shape, s: Setting, again: bool
) -> Callable[[], object]:
    x, _ = problem(shape, s.dtype, s.device)
    return torch.no_grad()(lambda: function(x.scores(), 128, 32 if again else None))


def timed_copy(moved: int, device: torch.device) -> Callable[[], object]:
    """A copy that reads half of the bytes ``moved`` and writes the other half."""
    source, target = (torch.ones(moved // 2, dtype=torch.int8, device=device) for _ in range(2))
    return lambda: target.copy_(source)


@torch.no_grad()
def prologue_failure(shape: Shape, s: Setting, again: bool) -> str | None:
    """Why the compiled prologue must not be timed: q, k, b, c rotated and g, against fp64."""
    small = replace(shape, batch=1, length=CHECK_LENGTH, heads=2)
    x, _ = problem(small, s.dtype, s.device)
    q, k, found = fused(s.device, prologue)(x.scores(), 128, 32 if again else None)
    cos, sin = (table.double()[:, None] for table in x.rotary)
    phase = x.theta.double().cumsum(1)
    g = x.log_decay.double().cumsum(1) * LOG2E
    fraction = (g - g.round())[..., None]
    pairs = {
        "q": (q, rotate(x.q.double(), cos, sin)),
        "k": (k, rotate(x.k.double(), cos, sin)),
        "b": (found.b, rotate(x.b.double(), phase.cos(), phase.sin()) * (-fraction).exp2()),
        "c": (found.c, rotate(x.c.double(), phase.cos(), phase.sin()) * fraction.exp2()),
    }
    limits = dict.fromkeys(pairs, 2 * torch.finfo(s.dtype).eps + 1e-6)
    pairs["g"] = (found.g, g.transpose(1, 2))
    limits["g"] = 1e-6
    return first_wrong({name: relative(*pair) for name, pair in pairs.items()}, limits)


def prologue_groups(s: Setting) -> list[list[Case]]:
    """The Triton path's prologue, compiled and op by op, as the forward and the backward run it.

    Baseline: a copy of its bytes."""
    groups = []
    for shape in s.shapes(2048, 16384):
        costs = {stage.name: stage for stage in stages("exact", shape)}
        cases = []
        for passes, name in (("fwd", "prologue"), ("bwd", "prologue again")):
            cost = costs[name]
            again = passes == "bwd"
            compiled = fused(s.device, prologue)
            makes = {
                "compiled": partial(timed_prologue, compiled, shape, s, again),
                "eager": partial(timed_prologue, prologue, shape, s, again),
                "copy": partial(timed_copy, cost.bytes, s.device),
            }
            checks = {"compiled": partial(prologue_failure, shape, s, again)}
            bound = None if s.datasheet is None else 1e3 * cost.seconds(s.datasheet)
            cases += [
                Case(
                    op="prologue",
                    path=path,
                    mode="exact",
                    shape=label_of(shape),
                    passes=passes,
                    make=make,
                    work=Work(1e-9 * cost.bytes, "GB/s", "bytes of roofline.py's stage"),
                    check=checks.get(path, no_check),
                    kernels="" if path == "copy" else f"prologue {path} {label_of(shape)}",
                    bound=bound,
                    baseline=path == "copy",
                )
                for path, make in makes.items()
            ]
        groups.append(cases)
    return groups


Augment = Callable[[SisaInputs], tuple[Tensor, Tensor]]
AUGMENTATIONS: dict[str, Augment] = {
    "extension": augmented,
    "chain": authors.eager_chain,
    "compiled": torch.compile(authors.eager_chain, dynamic=False),
}


def timed_augmentation(
    function: Augment, shape: Shape, s: Setting, backward: bool
) -> Callable[[], object]:
    x, _ = problem(shape, s.dtype, s.device)
    if not backward:
        return torch.no_grad()(lambda: function(x))
    inputs = x.scores().tensors()
    grads = [torch.randn_like(t) for t in augmented(x)]
    return lambda: torch.autograd.grad(function(x), inputs, grads)


def extension_failure(shape: Shape, s: Setting) -> str | None:
    """Why the compiled augmentation must not be timed."""
    if not _extension.has_kernels(s.device.type):
        return f"the library has no kernels for {s.device.type}: plain PyTorch would run"
    return failure(FLASH_TABLE, widths_of(shape), s.dtype, s.device, True)


def augmentation_bytes(shape: Shape, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes that are read and written: q, k, b, c, and in fp32 the decay and Ds / 2 phases, in."""
    rows = shape.batch * shape.length * shape.heads
    operands = 2 * (shape.head_dim + shape.d_state) * dtype.itemsize
    return rows * (operands + 4 + 2 * shape.d_state), rows * operands


def augmentation_groups(s: Setting, baseline: str = "copy") -> list[list[Case]]:
    """The extension's augmentation, the authors' chain, that compiled, and a copy of the bytes."""
    on_gpu = s.device.type == "cuda"
    groups = []
    for shape in s.shapes(2048):
        checks = {
            "extension": partial(extension_failure, shape, s),
            "chain": partial(failure, AUTHORS, widths_of(shape), s.dtype, s.device, True),
        }
        proofs = {"extension": "test_augment_cuda"} if on_gpu else {}
        read, written = augmentation_bytes(shape, s.dtype)
        cases = []
        for passes, moved in (("fwd", read + written), ("fwd+bwd", 3 * read + 2 * written)):
            makes = {
                name: partial(timed_augmentation, function, shape, s, passes == "fwd+bwd")
                for name, function in AUGMENTATIONS.items()
            }
            makes["copy"] = partial(timed_copy, moved, s.device)
            cases += [
                Case(
                    op="augment",
                    path=path,
                    mode="clamped",
                    shape=label_of(shape),
                    passes=passes,
                    make=make,
                    work=Work(1e-9 * moved, "GB/s", "inputs and results, each once"),
                    check=checks.get(path, no_check),
                    proofs=proofs.get(path, ""),
                    kernels=f"chain {label_of(shape)}" if path == "compiled" else "",
                    baseline=path == baseline,
                )
                for path, make in makes.items()
            ]
        groups.append(cases)
    return groups


# ---- Layers and models ---------------------------------------------------------------------------


def preset_gate(preset: str, s: Setting) -> dict[str, Any]:
    """The check and the tests that gate a model: those of its attention.

    Of a rival's it is its layer against the same in fp64."""
    config = preset_config(authors.ours(preset))
    if config.family == "transformer":
        return {"check": no_check}
    if config.family != "sisa":
        return {"check": partial(layer_failure, preset, s)}
    path = EXACT if s.device.type == "cuda" else EXACT_ON_CPU
    if authors.is_theirs(preset):
        path = AUTHORS
    widths = (config.head_dim, config.d_state, config.head_dim)
    check = partial(failure, path, widths, s.dtype, s.device, True)
    return {"check": check, "proofs": path.proofs.format(ds=config.d_state)}


def one_layer(preset: str, device: torch.device) -> Any:
    """A model of the preset's first layer alone, of the same weights every time."""
    torch.manual_seed(0)
    return authors.build(preset, n_layers=1, vocab_size=8).to(device)


def layer_limit(s: Setting) -> float:
    """The relative error that a whole layer may have."""
    return LAYER_LIMIT if s.dtype == torch.float32 else torch.finfo(s.dtype).eps


@functools.cache
def layer_failure(preset: str, s: Setting) -> str | None:
    """Why a model's first layer must not be timed: y and dL/dx against its formulas in fp64.

    With autocast as timed."""
    model = one_layer(preset, s.device)
    x, dy = torch.randn(2, 1, CHECK_LENGTH, model.config.d_model, device=s.device).unbind()
    found = []
    for dtype in (torch.float32, torch.float64):
        layer = model.to(dtype).layers[0]
        rotary = rotary_tables(CHECK_LENGTH, model.config.head_dim, s.device)
        leaf = x.to(dtype).requires_grad_()
        autocast = dtype == torch.float32 and s.dtype != torch.float32
        with torch.autocast(s.device.type, s.dtype, enabled=autocast):
            y = layer(leaf, Context(rotary))
        found.append([y.detach(), *torch.autograd.grad(y, leaf, dy.to(dtype))])
    (y, dx), (right_y, right_dx) = found
    off = {"y": relative(y, right_y), "dx": relative(dx, right_dx)}
    return first_wrong(off, dict.fromkeys(off, layer_limit(s)))


def layer_step(preset: str, batch: int, length: int, s: Setting) -> Callable[[], object]:
    """Forward and backward of a preset's first layer."""
    model = one_layer(preset, s.device)
    layer = model.layers[0]
    parameters = list(layer.parameters())
    x, dy = torch.randn(2, batch, length, model.config.d_model, device=s.device).unbind()
    context = Context(rotary_tables(length, model.config.head_dim, s.device))
    x = x.requires_grad_()

    def call() -> object:
        with torch.autocast(s.device.type, s.dtype, enabled=s.dtype != torch.float32):
            y = layer(x, context)
        return torch.autograd.grad(y, [x, *parameters], dy)

    return call


def layer_groups(s: Setting) -> list[list[Case]]:
    """One layer of each model, forward + backward, fp32 weights, autocast to a half dtype.

    Baseline: the first model's."""
    return [
        [
            Case(
                op="layer",
                path=preset,
                mode="eager",
                shape=f"{s.batch(length)}x{length}",
                passes="fwd+bwd",
                make=partial(layer_step, preset, s.batch(length), length, s),
                work=Work(s.batch(length) * length, "tok/s", "BL"),
                kernels=f"{preset} eager",
                baseline=preset == s.models[0],
                **preset_gate(preset, s),
            )
            for preset in s.models
        ]
        for length in s.lengths or (2048,)
    ]


def decode_step(preset: str, length: int, s: Setting) -> Callable[[], object]:
    """The next token behind ``length`` tokens; every 32nd takes a cache of tokens back to them."""
    model = one_layer(preset, s.device).to(s.dtype)
    layer = model.layers[0]
    cache = layer.mixer.make_cache(1)
    states = torch.randn(1, length + 1, model.config.d_model, device=s.device).to(s.dtype)
    before, at_last = (
        Context(rotary_at(torch.arange(*span, device=s.device), model.config.head_dim))
        for span in ((0, length), (length, length + 1))
    )
    with torch.no_grad():
        layer(states[:, :length], before, cache)

    @torch.no_grad()
    def call() -> Tensor:
        if isinstance(cache, sk.TokenCache) and cache.lengths[0] >= length + 32:
            cache.lengths = [length]
        return layer(states[:, length:], at_last, cache)

    return call


@functools.cache
def decode_failure(preset: str, s: Setting) -> str | None:
    """Why a model's decoding must not be timed: the next token against fp64 without a cache."""
    found = decode_step(preset, CHECK_LENGTH, s)()
    model = one_layer(preset, s.device).to(s.dtype)
    states = torch.randn(1, CHECK_LENGTH + 1, model.config.d_model, device=s.device).to(s.dtype)
    rotary = rotary_tables(CHECK_LENGTH + 1, model.config.head_dim, s.device)
    with torch.no_grad():
        right = model.double().layers[0](states.double(), Context(rotary))[:, -1:]
    name = "the next token"
    return first_wrong({name: relative(found, right)}, {name: layer_limit(s)})


def decode_groups(s: Setting) -> list[list[Case]]:
    """One token of one layer of each model behind a cache, weights in the setting's dtype.

    Baseline: the first model's."""
    return [
        [
            Case(
                op="decode",
                path=preset,
                mode="cache",
                shape=f"1x{length}",
                passes="token",
                make=partial(decode_step, preset, length, s),
                work=Work(1.0, "tok/s", "B"),
                check=partial(decode_failure, preset, s),
                kernels=f"{preset} token",
                baseline=preset == s.models[0],
            )
            for preset in s.models
        ]
        for length in s.lengths or (512, 4096, 8192)
    ]


def training_step(
    compiled: bool, batch: int, length: int, device: torch.device, preset: str
) -> Callable[[], object]:
    """A training step of a preset as the trainer makes it, AdamW's at a learning rate of nought."""
    torch.manual_seed(0)
    model = authors.build(preset, max_seq_len=length).to(device)
    ids = torch.randint(model.config.vocab_size, (batch, length + 1), device=device)
    network = torch.compile(model) if compiled else model
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=0.0)

    def call() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = network(ids[:, :-1])
        F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return call


def model_groups(s: Setting) -> list[list[Case]]:
    """A training step, as the trainer runs it and under torch.compile.

    On a GPU bf16 autocast over fp32 weights; fp32 on a CPU, there not compiled."""
    modes = ("eager", "compiled") if s.device.type == "cuda" else ("eager",)
    groups = []
    for length in s.lengths or (2048,):
        batch = max(1, min(s.tokens, 16384) // length)  # at 2048 the trainer's micro-batch, 8
        for mode in modes:
            step = partial(training_step, mode == "compiled", batch, length, s.device)
            cases = [
                Case(
                    op="model",
                    path=preset,
                    mode=mode,
                    shape=f"{batch}x{length} {mode}",
                    passes="step",
                    make=partial(step, preset),
                    work=Work(batch * length, "tok/s", "BL"),
                    kernels=f"{preset} {mode}",
                    baseline=preset == s.models[0],
                    **preset_gate(preset, s),
                )
                for preset in s.models
            ]
            groups.append(cases)
    return groups


def trainers_step(
    preset: str, batch: int, length: int, device: torch.device
) -> Callable[[], object]:
    """A training step by the trainer's own parts in fp32, at a learning rate of nought."""
    torch.manual_seed(0)
    config = resolve(TrainConfig(preset=preset, device=device.type, seq_len=length))
    model = sm.build(preset, max_seq_len=length).to(device)
    optimizer = make_optimizer(model, config)
    objective = Objective(model, contextlib.nullcontext())
    parallel = Parallel(objective, World(), config.parallel, bf16=False)
    ids = torch.randint(model.config.vocab_size, (batch, length + 1), device=device)

    def call() -> None:
        parallel.backward(ids[:, :-1], ids[:, 1:], None, 1 / (batch * length), last=True)
        parallel.clip(config.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return call


def step_groups(s: Setting) -> list[list[Case]]:
    """A whole training step in fp32, the trainer's, beside that of a stock Hugging Face Llama.

    The Llama, of the sizes of the first model, a Transformer, is the baseline."""
    groups = []
    for length in s.lengths or (2048,):
        shape = (s.batch(length), length)
        like = s.models[0]
        made: dict[str, dict[str, Any]] = {
            preset: {
                "make": partial(trainers_step, preset, *shape, s.device),
                **preset_gate(preset, s),
            }
            for preset in s.models
        }
        made[like.replace("transformer", "llama")] = {
            "make": partial(llama.training_step, like, *shape, s.device),
            "check": partial(llama.failure, like),
            "baseline": True,
        }
        groups.append(
            [
                Case(
                    op="step",
                    path=path,
                    mode="eager",
                    shape="{}x{}".format(*shape),
                    passes="step",
                    work=Work(math.prod(shape), "tok/s", "BL"),
                    **how,
                )
                for path, how in made.items()
            ]
        )
    return groups


# ---- Tiles ---------------------------------------------------------------------------------------


def with_tiles(case: Case, shape: Shape, s: Setting, search: bool) -> Callable[[], object]:
    """``case`` with the tiles of the table, or with those that are searched first."""
    width = max(padded_width(shape.head_dim), padded_width(shape.value_dim))
    widths = (width, padded_width(shape.d_state))
    if search:
        tiles = autotune(*astuple(shape)[:5], dtype=s.dtype, device=s.device)
        print(f"{case.shape}: {tiles}", flush=True)
    else:
        tiles = choose_tiles(s.device, s.dtype, *widths)
    key = tile_key(s.device, s.dtype, *widths)
    call = case.make()

    def run() -> object:
        tuned_tiles()[key] = tiles
        return call()

    return run


def tune_groups(s: Setting) -> list[list[Case]]:
    """Exact attention with the tiles in use and with those that autotuning finds.

    These are printed, and kept where tiles.py keeps them."""
    groups = []
    for shape in s.shapes(2048):
        case = attention_case("tune", EXACT, shape, "fwd+bwd", s)
        in_use = partial(with_tiles, case, shape, s, search=False)
        tuned = partial(with_tiles, case, shape, s, search=True)
        groups.append(
            [
                replace(case, path="in use", make=in_use, baseline=True),
                replace(case, path="tuned", make=tuned, kernels=f"tuned {case.shape}"),
            ]
        )
    return groups


GROUPS = {
    "stock": stock_groups,
    "attention": attention_groups,
    "prologue": prologue_groups,
    "augment": augmentation_groups,
    "layer": layer_groups,
    "decode": decode_groups,
    "model": model_groups,
    "tune": tune_groups,
}
