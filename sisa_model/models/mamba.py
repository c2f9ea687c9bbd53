"""Mamba-2 (arXiv 2405.21060) and Mamba-3 (SISO) mixers, as mamba-ssm 2.3.2.post1 has them.

Parameters have the package's names and shapes, so that weights move between the two. On CUDA in
bf16 its kernels run where it is installed (:mod:`mamba_kernels`); elsewhere the same mathematics in
plain PyTorch, between the projections in fp32 (fp64 for fp64 weights). E = expand * D inner
channels, P = head_dim, H = E / P heads, N = mamba_state, one group of B and C.

Over a cache it is plain PyTorch everywhere, a step being the chunked scan of one token: the kernels
take and leave no state."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sisa_kernels.cache import last, take
from sisa_kernels.ops import without_autocast
from sisa_kernels.rotation import rotate
from sisa_model.models.config import ModelConfig
from sisa_model.models.context import Context
from sisa_model.models.linear import Fp32Parameters, Linear
from sisa_model.models.mamba_kernels import Kernels, kernels_for
from sisa_model.models.pieces import CutSequence
from sisa_model.models.scan import decayed_scan, read_state

CONV = 4  # tokens that Mamba-2's causal convolution sees
NORM_EPS = 1e-5
DT_RANGE = (1e-3, 0.1)  # initial steps
A_RANGE = (1.0, 16.0)  # initial decay rates of Mamba-2
A_FLOOR = 1e-4  # least decay rate of Mamba-3


def wide(x: Tensor) -> Tensor:
    """x in fp32, or fp64 if it has that."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class WideRMSNorm(nn.RMSNorm):
    """RMSNorm of a wide input in its own dtype, whatever the weight's."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, wide(self.weight), self.eps)


class CausalConv(nn.Conv1d):
    """Each channel of x over CONV tokens, [B, CONV - 1 + L, channels] -> [B, L, channels]."""

    def __init__(self, channels: int):
        super().__init__(channels, channels, CONV, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = (p.to(x.dtype) for p in self.parameters())
        return F.conv1d(x.transpose(1, 2), weight, bias, groups=x.shape[-1]).transpose(1, 2)


class StateCache:
    """What a mixer keeps of ``batch`` sequences so far: a state whose size does not grow.

    ``state`` has the mixer's ``state_sizes``, [B, *size] by name, in fp32 (fp64 for fp64 weights; a
    phase always); empty at first. Raises ValueError for a batch below 1."""

    def __init__(self, batch: int):
        if batch < 1:
            raise ValueError(f"batch must be at least 1, got {batch}")
        self.batch = batch
        self.state: dict[str, Tensor] = {}

    def check(self, batch: int, dtype: torch.dtype, device: torch.device) -> None:
        """Refuse tokens that the state cannot take."""
        if batch != self.batch:
            raise ValueError(f"x must have the cache's batch of {self.batch}, got {batch}")
        held = self.state.get("h")
        if held is not None and (held.dtype, held.device) != (dtype, device):
            raise ValueError(
                f"x must give a state in {held.dtype} on {held.device} as in the cache, "
                f"got {dtype} on {device}"
            )

    def select(self, rows: list[int]) -> None:
        """Let row r be what row ``rows[r]`` was: the beams that go on, say."""
        self.batch = len(rows)
        self.state = {name: x[rows] for name, x in self.state.items()}


class MambaMixer(Fp32Parameters):
    """What both Mambas share: projections in and out, each document by itself, dt_bias and D."""

    state_sizes: dict[str, tuple[int, ...]]
    """[*size] by name of what the tokens so far leave to later ones."""

    def __init__(self, config: ModelConfig, expand: int, **sizes: int):
        super().__init__()
        self.d_inner = expand * config.d_model
        self.d_state = config.mamba_state
        self.head_dim = config.head_dim
        self.n_heads = self.d_inner // self.head_dim
        self.sizes = sizes
        self.in_proj = Linear(config.d_model, sum(sizes.values()))
        self.dt_bias = nn.Parameter(torch.empty(self.n_heads, dtype=torch.float32))
        self.D = nn.Parameter(torch.empty(self.n_heads, dtype=torch.float32))
        self.out_proj = nn.Linear(self.d_inner, config.d_model, bias=False)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The package's initial values; the matrices of every family are set by the model."""
        # softplus(dt_bias), the step before any input, is log-uniform.
        step = self.dt_bias.uniform_(*map(math.log, DT_RANGE)).exp()
        self.dt_bias.copy_(step + torch.log(-torch.expm1(-step)))
        nn.init.ones_(self.D)

    @torch.no_grad()
    def draw_matrices(self) -> None:
        """Draw the projections' initial values as the package does: uniform, nn.Linear's own."""
        for projection in (self.in_proj, self.out_proj):
            bound = projection.in_features**-0.5
            drawn = torch.empty_like(projection.weight, dtype=torch.float32)
            projection.weight.copy_(drawn.uniform_(-bound, bound))

    def make_cache(self, batch: int) -> StateCache:
        """An empty cache of ``batch`` sequences."""
        return StateCache(batch)

    def forward(self, x: Tensor, context: Context, cache: StateCache | None = None) -> Tensor:
        projected = self.in_proj(x)
        with without_autocast(x.device):
            if context.layout is not None:
                mixed = self.mix_over_processes(projected, CutSequence(context, projected))
            else:
                documents = projected.split(context.documents(x.shape[1]), 1)
                pieces = [self.mix(document, cache, context.lengths) for document in documents]
                mixed = torch.cat(pieces, 1)
        return self.out_proj(mixed.to(projected.dtype))

    def mix_over_processes(self, projected: Tensor, cut: CutSequence) -> Tensor:
        """:meth:`mix` of the documents of a sequence that is cut over processes.

        Every piece runs from a state of 0; once all know what each piece adds to the state, each
        adds what its tokens read of the pieces before. In plain PyTorch: the kernels leave no
        state."""
        tails = (projected[:, piece.tail] for piece in cut.pieces)
        projected, endings = cut.gather(projected, [self.ending(tail) for tail in tails])
        log_decay = endings[..., : self.n_heads]
        zeros = self.state(projected, None)
        runs = []
        for part in cut.parts:
            before = zeros
            if part.head_of is not None:
                before = zeros | self.beginning(cut.behind(part.head_of, endings), zeros["h"].dtype)
            runs.append(self.recurrence(projected[:, part.rows], before)[0])
        found = [run.scan() for run in runs]
        nothing = self.heads(wide(projected[:, :0, : self.d_inner]))
        y = torch.cat([nothing, *(y for y, _ in found)], 1)
        of_tails = {part.tail_of: h for part, (_, h) in zip(cut.parts, found)}
        own = [of_tails.get(piece.number, zeros["h"]) for piece in cut.pieces]
        y, added = cut.gather(y, own)
        pieces = list(y.split([part.rows.stop - part.rows.start for part in cut.parts], 1))
        for n, (part, run) in enumerate(zip(cut.parts, runs)):
            if part.head_of is not None:
                state = cut.incoming(part.head_of, added, log_decay)
                pieces[n] = pieces[n] + read_state(run.q, run.log_decay, state)
        return self.gate(torch.cat([y[:, :0], *pieces], 1), projected)

    def recurrence(
        self, projected: Tensor, state: dict[str, Tensor], lengths: list[int] | None = None
    ) -> tuple["Recurrence", dict[str, Tensor]]:
        """The recurrence behind ``state``, and what of every token later ones need beside it."""
        raise NotImplementedError

    def gate(self, y: Tensor, projected: Tensor) -> Tensor:
        """The mixer's output before its last projection, [B, L, E], of the recurrence's y."""
        raise NotImplementedError

    def ending(self, projected: Tensor) -> Tensor:
        """What later pieces need of the end of a document's part, beside its state: [B, K] fp64.

        First the sum of the logs of its decay [B, H]; all 0 for no token."""
        raise NotImplementedError

    def beginning(self, endings: list[tuple[int, Tensor]], dtype: torch.dtype) -> dict[str, Tensor]:
        """The state in ``dtype``, but for h, behind pieces of so many tokens and these endings."""
        raise NotImplementedError

    def mix(
        self, projected: Tensor, cache: StateCache | None = None, lengths: list[int] | None = None
    ) -> Tensor:
        """The gated output [B, L, E] of a document's projections [B, L, sum(sizes)].

        ``cache`` holds the document's beginning. The cache's state becomes that after the document:
        of row r after its first ``lengths[r]`` tokens."""
        raise NotImplementedError

    def state(self, projected: Tensor, cache: StateCache | None) -> dict[str, Tensor]:
        """What the tokens before left in ``cache``, zeros where there were none."""
        batch = len(projected)
        dtype = torch.promote_types(projected.dtype, torch.float32)
        if cache is not None:
            cache.check(batch, dtype, projected.device)
            if cache.state:
                return cache.state
        return {
            name: projected.new_zeros(batch, *size, dtype=dtype)
            for name, size in self.state_sizes.items()
        }

    def steps(self, dt: Tensor, lengths: list[int] | None) -> Tensor:
        """The steps [B, L, H] of their projections; 0, changing no state, behind ``lengths[r]``."""
        dt = F.softplus(wide(dt) + self.dt_bias)
        if lengths is None:
            return dt
        places = torch.arange(dt.shape[1], device=dt.device)
        real = places < torch.tensor(lengths, device=dt.device)[:, None]
        return dt * real[..., None]

    def parts(self, projected: Tensor) -> tuple[Tensor, ...]:
        """The projections apart, in the order of ``sizes``."""
        return projected.split(list(self.sizes.values()), -1)

    def heads(self, x: Tensor) -> Tensor:
        """[B, L, E] -> [B, L, H, P]."""
        return x.unflatten(-1, (self.n_heads, self.head_dim))


class Mamba2(MambaMixer):
    """``h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T``, ``y_t = h_t C_t + D x_t``.

    The output is ``out_proj(RMSNorm(y silu(z)))``. A = -exp(A_log), one decay rate a head; x, B and
    C have passed a causal depthwise convolution over 4 tokens and silu."""

    fp32 = no_weight_decay = ("dt_bias", "A_log", "D")

    def __init__(self, config: ModelConfig, expand: int = 2):
        E = expand * config.d_model
        N = config.mamba_state
        super().__init__(config, expand, z=E, xBC=E + 2 * N, dt=E // config.head_dim)
        channels = self.sizes["xBC"]
        self.state_sizes = {"xBC": (CONV - 1, channels), "h": (self.n_heads, N, self.head_dim)}
        self.conv1d = CausalConv(channels)
        self.A_log = nn.Parameter(torch.empty(self.n_heads, dtype=torch.float32))
        self.norm = WideRMSNorm(E, eps=NORM_EPS)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.conv1d.reset_parameters()
        self.A_log.uniform_(*A_RANGE).log_()

    def mix(
        self, projected: Tensor, cache: StateCache | None = None, lengths: list[int] | None = None
    ) -> Tensor:
        kernels = kernels_for(projected) if cache is None else None
        state = self.state(projected, cache)
        if kernels:
            _, xBC, dt = self.parts(projected)
            x, B, C = self.convolved(xBC, state)
            rest = {"chunk_size": 256, "D": wide(self.D)}
            y = kernels.mamba2(x, self.steps(dt, lengths), self.A(), B, C, **rest)
            return self.gate(y, projected)
        run, later = self.recurrence(projected, state, lengths)
        y, h = run.scan()
        if cache is not None:
            ends = lengths or [projected.shape[1]] * len(projected)
            cache.state = {"xBC": take(later["xBC"], ends, CONV - 1), "h": h}
        return self.gate(y, projected)

    def A(self) -> Tensor:
        """The decay rates [H] < 0."""
        return -wide(self.A_log).exp()

    def convolved(self, xBC: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, L, H, P], B and C [B, L, 1, N] behind the tokens that ``state`` has."""
        xBC = torch.cat((state["xBC"].to(xBC.dtype), xBC), 1)
        x, B, C = F.silu(self.conv1d(xBC)).split([self.d_inner, self.d_state, self.d_state], -1)
        return self.heads(x), B[:, :, None], C[:, :, None]

    def recurrence(
        self, projected: Tensor, state: dict[str, Tensor], lengths: list[int] | None = None
    ) -> tuple["Recurrence", dict[str, Tensor]]:
        _, xBC, dt = self.parts(projected)
        xBC = wide(xBC)
        x, B, C = self.convolved(xBC, state)
        run = ssd(x, self.steps(dt, lengths), self.A(), B, C, self.D, state["h"])
        return run, {"xBC": torch.cat((state["xBC"].to(xBC.dtype), xBC), 1)}

    def gate(self, y: Tensor, projected: Tensor) -> Tensor:
        z, *_ = self.parts(projected)
        return self.norm(wide(y).flatten(2) * F.silu(wide(z)))

    def ending(self, projected: Tensor) -> Tensor:
        _, xBC, dt = self.parts(projected)
        log_decay = (self.steps(dt, None) * self.A()).double().sum(1)
        last = wide(xBC[:, max(0, xBC.shape[1] - CONV + 1) :]).double()
        halo = F.pad(last, (0, 0, CONV - 1 - last.shape[1], 0)).flatten(1)
        return torch.cat((log_decay, halo), 1)

    def beginning(self, endings: list[tuple[int, Tensor]], dtype: torch.dtype) -> dict[str, Tensor]:
        halos = [
            ending[:, self.n_heads :].unflatten(1, (CONV - 1, -1))[:, -min(tokens, CONV - 1) :]
            for tokens, ending in endings
        ]
        halo = torch.cat(halos, 1)[:, 1 - CONV :]
        return {"xBC": F.pad(halo, (0, 0, CONV - 1 - halo.shape[1], 0)).to(dtype)}


class Mamba3(MambaMixer):
    """``h_t = alpha_t h_{t-1} + beta_t x_{t-1} k_{t-1}^T + gamma_t x_t k_t^T``.

    ``y_t = h_t q_t + D x_t``; the output is ``out_proj(y silu(z))``. alpha = exp(dt A), beta = (1 -
    lam) dt alpha, gamma = lam dt: the trapezoidal rule, lam = sigmoid(trap); A <= -1e-4 is each
    token's own. q and k are C and B, normed and biased, half of their channels rotated by the
    running sum of dt pi tanh(angle): a complex state. The decay rate is -softplus, as released;
    later versions of the package have another."""

    fp32 = ("dt_bias", "B_bias", "C_bias", "D")
    no_weight_decay = ("dt_bias", "D")

    def __init__(self, config: ModelConfig, expand: int = 2):
        E = expand * config.d_model
        N = config.mamba_state
        H = E // config.head_dim
        super().__init__(config, expand, z=E, x=E, B=N, C=N, dt=H, A=H, trap=H, angle=N // 4)
        self.state_sizes = {
            "phase": (H, N // 4),
            "h": (H, N, self.head_dim),
            "k": (H, N),
            "x": (H, self.head_dim),
        }
        self.B_bias = nn.Parameter(torch.empty(H, 1, N, dtype=torch.float32))
        self.C_bias = nn.Parameter(torch.empty(H, 1, N, dtype=torch.float32))
        self.B_norm = WideRMSNorm(N, eps=NORM_EPS)
        self.C_norm = WideRMSNorm(N, eps=NORM_EPS)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.ones_(self.B_bias)
        nn.init.ones_(self.C_bias)

    def mix(
        self, projected: Tensor, cache: StateCache | None = None, lengths: list[int] | None = None
    ) -> Tensor:
        kernels = None
        if cache is None:
            kernels = kernels_for(projected, powers_of_two=(self.d_state, self.head_dim))
        if kernels:
            return self._by_kernels(kernels, projected)
        run, later = self.recurrence(projected, self.state(projected, cache), lengths)
        y, h = run.scan()
        if cache is not None:
            ends = lengths or [projected.shape[1]] * len(projected)
            cache.state = {"h": h} | {name: last(t, ends) for name, t in later.items()}
        return self.gate(y, projected)

    def _by_kernels(self, kernels: Kernels, projected: Tensor) -> Tensor:
        z, x, _, _, dt, A, trap, angle = self.parts(projected)
        B, C = self.normed(projected)
        dt = self.steps(dt, None)
        angles = angle.float()[:, :, None].expand(-1, -1, self.n_heads, -1)
        steps = (t.transpose(1, 2) for t in (self.log_decay(A, dt), dt, trap))
        bias = (wide(t).squeeze(1) for t in (self.C_bias, self.B_bias))
        rest = {"D": wide(self.D), "Z": self.heads(z), "chunk_size": 64}
        return kernels.mamba3(C, B, self.heads(x), *steps, *bias, angles, **rest).flatten(2)

    def log_decay(self, A: Tensor, dt: Tensor) -> Tensor:
        """[B, L, H] < 0 of A's projection and the steps."""
        return (-F.softplus(wide(A))).clamp(max=-A_FLOOR) * dt

    def normed(self, projected: Tensor) -> tuple[Tensor, Tensor]:
        """B and C [B, L, 1, N], without their biases."""
        _, _, B, C, *_ = self.parts(projected)
        return self.B_norm(wide(B))[:, :, None], self.C_norm(wide(C))[:, :, None]

    def keys(self, projected: Tensor) -> tuple[Tensor, Tensor]:
        """k and q [B, L, H, N], before they turn."""
        B, C = self.normed(projected)
        return B + wide(self.B_bias).squeeze(1), C + wide(self.C_bias).squeeze(1)

    def recurrence(
        self, projected: Tensor, state: dict[str, Tensor], lengths: list[int] | None = None
    ) -> tuple["Recurrence", dict[str, Tensor]]:
        _, x, _, _, dt, A, trap, angle = self.parts(projected)
        dt = self.steps(dt, lengths)
        k, q = self.keys(projected)
        x = wide(self.heads(x))
        return siso(q, k, x, self.log_decay(A, dt), dt, wide(trap), wide(angle), self.D, state)

    def gate(self, y: Tensor, projected: Tensor) -> Tensor:
        z, *_ = self.parts(projected)
        return (y * F.silu(wide(self.heads(z)))).flatten(2)

    def ending(self, projected: Tensor) -> Tensor:
        _, x, _, _, dt, A, _, angle = self.parts(projected)
        dt = self.steps(dt, None)
        sums = self.log_decay(A, dt).double().sum(1), turns(dt, wide(angle)).sum(1).flatten(1)
        if not projected.shape[1]:
            width = self.n_heads * (self.d_state + self.head_dim)
            return torch.cat((*sums, sums[0].new_zeros(len(projected), width)), 1)
        k, _ = self.keys(projected[:, -1:])
        x = wide(self.heads(x[:, -1:]))
        return torch.cat((*sums, k.double().flatten(1), x.double().flatten(1)), 1)

    def beginning(self, endings: list[tuple[int, Tensor]], dtype: torch.dtype) -> dict[str, Tensor]:
        sizes = {name: self.state_sizes[name] for name in ("phase", "k", "x")}
        widths = [math.prod(size) for size in sizes.values()]
        split = [ending[:, self.n_heads :].split(widths, 1) for _, ending in endings]
        found = dict(zip(sizes, split[-1]))
        found["phase"] = sum((x[0] for x in split[:-1]), split[-1][0])
        found = {name: x.unflatten(1, sizes[name]) for name, x in found.items()}
        phase = found["phase"].remainder(2 * math.pi)
        x = found["x"].to(dtype)
        k = turned(found["k"].to(dtype), phase)
        return {"phase": phase, "k": k, "x": x}


class MambaBlock(nn.Module):
    """``x + mixer(norm(x))``, RMSNorm eps 1e-6, without an MLP: the layer of the Mamba models."""

    def __init__(self, mixer: nn.Module, d_model: int):
        super().__init__()
        self.norm = nn.RMSNorm(d_model, eps=1e-6)
        self.mixer = mixer

    def forward(self, x: Tensor, context: Context, cache: StateCache | None = None) -> Tensor:
        return x + self.mixer(self.norm(x), context, cache)


class Recurrence(NamedTuple):
    """:func:`decayed_scan` of q .. log_decay from a state, and each token's own ``skip x``."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor
    state: Tensor
    skip: Tensor
    """[B, L, H]."""
    x: Tensor
    """[B, L, H, P]."""

    def scan(self) -> tuple[Tensor, Tensor]:
        """y [B, L, H, P], and the last state."""
        y, h = decayed_scan(self.q, self.k, self.v, self.log_decay, self.state)
        return y + self.skip[..., None] * self.x, h


def ssd(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, h: Tensor) -> Recurrence:
    """Mamba-2's recurrence from the state h [B, H, N, P].

    x [B, L, H, P], dt [B, L, H] > 0, A [H] < 0, B and C [B, L, 1, N], D [H]."""
    return Recurrence(C, B, dt[..., None] * x, dt * A, h, dt * (C * B).sum(-1) + D, x)


def turns(dt: Tensor, angle: Tensor) -> Tensor:
    """By how much each token turns q and k, [B, L, H, S] fp64 radians; angle [B, L, S]."""
    return dt[..., None].double() * (math.pi * angle.tanh())[:, :, None]


def turned(x: Tensor, phase: Tensor) -> Tensor:
    """x [..., N] with its first 2 S channels turned by a phase [..., S]."""
    cos = phase.to(x.dtype).cos()
    sin = phase.to(x.dtype).sin()
    width = 2 * phase.shape[-1]
    return torch.cat((rotate(x[..., :width], cos, sin), x[..., width:]), -1)


def siso(
    q: Tensor,
    k: Tensor,
    x: Tensor,
    log_decay: Tensor,
    dt: Tensor,
    trap: Tensor,
    angle: Tensor,
    D: Tensor,
    state: dict[str, Tensor],
) -> tuple[Recurrence, dict[str, Tensor]]:
    """Mamba-3's recurrence: q, k [B, L, H, N] unrotated, x [B, L, H, P].

    log_decay, dt and trap (before its sigmoid) [B, L, H]; angle (before pi tanh) [B, L, S], shared
    by the heads; D [H]. Goes on from ``state``: h [B, H, N, P] and the last token's phase [B, H,
    S], k (rotated) [B, H, N] and x [B, H, P]. Returns, too, phase, k and x of every token."""
    lam = trap.sigmoid()
    now = lam * dt
    later = (1 - lam) * dt
    # Token s enters the state twice: by its own step, and by the next token's, whose trapezoid
    # begins at s.
    weight = now + F.pad(later[:, 1:], (0, 0, 0, 1))
    h = state["h"] + later[:, 0, :, None, None] * state["k"][..., None] * state["x"][..., None, :]
    skip = now * (q * k).sum(-1) + D  # a token's own product is free of the rotation
    # Summed in fp64 and wrapped to one turn, so that the phase keeps its bits at any length.
    phase = (state["phase"][:, None] + turns(dt, angle).cumsum(1)).remainder(2 * math.pi)
    q, k = (turned(t, phase) for t in (q, k))
    run = Recurrence(q, k, weight[..., None] * x, log_decay, h, skip, x)
    return run, {"phase": phase, "k": k, "x": x}
