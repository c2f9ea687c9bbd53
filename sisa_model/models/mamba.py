"""Mamba-2 (arXiv 2405.21060) and Mamba-3 (SISO) mixers, as mamba-ssm 2.3.2.post1 has them.

Parameters have the package's names and shapes, so that weights move between the two. On CUDA in
bf16 its kernels run where it is installed (:mod:`mamba_kernels`); elsewhere the same mathematics in
plain PyTorch, between the projections in fp32 (fp64 for fp64 weights). E = expand * D inner
channels, P = head_dim, H = E / P heads, N = mamba_state, one group of B and C.

Over a cache it is plain PyTorch everywhere, a step being the chunked scan of one token: the kernels
take and leave no state."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sisa_kernels.cache import last, take
from sisa_kernels.ops import without_autocast
from sisa_kernels.rotation import rotate
from sisa_model.models.config import ModelConfig
from sisa_model.models.context import Context
from sisa_model.models.linear import Fp32Parameters, Linear
from sisa_model.models.mamba_kernels import kernels_for
from sisa_model.models.scan import decayed_scan

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
            documents = projected.split(context.documents(x.shape[1]), 1)
            pieces = [self.mix(document, cache, context.lengths) for document in documents]
        return self.out_proj(torch.cat(pieces, 1).to(projected.dtype))

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
        z, xBC, dt = self.parts(projected)
        dt = self.steps(dt, lengths)
        A = -wide(self.A_log).exp()
        kernels = kernels_for(projected) if cache is None else None
        state = self.state(projected, cache)
        xBC = xBC if kernels else wide(xBC)
        xBC = torch.cat((state["xBC"].to(xBC.dtype), xBC), 1)
        x, B, C = F.silu(self.conv1d(xBC)).split([self.d_inner, self.d_state, self.d_state], -1)
        x = self.heads(x)
        B = B[:, :, None]
        C = C[:, :, None]
        if kernels:
            y = kernels.mamba2(x, dt, A, B, C, chunk_size=256, D=wide(self.D))
        else:
            y, h = ssd(x, dt, A, B, C, self.D, state["h"])
            if cache is not None:
                cache.state = {"xBC": take(xBC, lengths or [x.shape[1]] * len(x), CONV - 1), "h": h}
        gated = wide(y).flatten(2) * F.silu(wide(z))
        return self.norm(gated)


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
        z, x, B, C, dt, A, trap, angle = self.parts(projected)
        z = self.heads(z)
        x = self.heads(x)
        dt = self.steps(dt, lengths)
        A = (-F.softplus(wide(A))).clamp(max=-A_FLOOR)
        B = self.B_norm(wide(B))[:, :, None]
        C = self.C_norm(wide(C))[:, :, None]
        B_bias = wide(self.B_bias).squeeze(1)
        C_bias = wide(self.C_bias).squeeze(1)
        if cache is None and (
            kernels := kernels_for(projected, powers_of_two=(self.d_state, self.head_dim))
        ):
            angles = angle.float()[:, :, None].expand(-1, -1, self.n_heads, -1)
            steps = ((A * dt).transpose(1, 2), dt.transpose(1, 2), trap.transpose(1, 2))
            y = kernels.mamba3(
                C, B, x, *steps, C_bias, B_bias, angles, D=wide(self.D), Z=z, chunk_size=64
            )
        else:
            state = self.state(projected, cache)
            y, state = siso(
                C + C_bias, B + B_bias, wide(x), A * dt, dt, wide(trap), wide(angle), self.D, state
            )
            y = y * F.silu(wide(z))
            if cache is not None:
                ends = lengths or [x.shape[1]] * len(x)
                cache.state = {
                    name: t if name == "h" else last(t, ends) for name, t in state.items()
                }
        return y.flatten(2)


class MambaBlock(nn.Module):
    """``x + mixer(norm(x))``, RMSNorm eps 1e-6, without an MLP: the layer of the Mamba models."""

    def __init__(self, mixer: nn.Module, d_model: int):
        super().__init__()
        self.norm = nn.RMSNorm(d_model, eps=1e-6)
        self.mixer = mixer

    def forward(self, x: Tensor, context: Context, cache: StateCache | None = None) -> Tensor:
        return x + self.mixer(self.norm(x), context, cache)


def ssd(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, h: Tensor
) -> tuple[Tensor, Tensor]:
    """Mamba-2's recurrence from the state h [B, H, N, P]: y [B, L, H, P], and the last state.

    x [B, L, H, P], dt [B, L, H] > 0, A [H] < 0, B and C [B, L, 1, N], D [H]."""
    now = dt * (C * B).sum(-1) + D
    y, h = decayed_scan(C, B, dt[..., None] * x, dt * A, h)
    return y + now[..., None] * x, h


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
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mamba-3's recurrence: q, k [B, L, H, N] unrotated, x [B, L, H, P] -> y [B, L, H, P].

    log_decay, dt and trap (before its sigmoid) [B, L, H]; angle (before pi tanh) [B, L, S], shared
    by the heads; D [H]. Goes on from ``state``: h [B, H, N, P] and the last token's phase [B, H,
    S], k (rotated) [B, H, N] and x [B, H, P]. Returns, too, the last h, and phase, k and x of every
    token."""
    lam = trap.sigmoid()
    now = lam * dt
    later = (1 - lam) * dt
    # Token s enters the state twice: by its own step, and by the next token's, whose trapezoid
    # begins at s.
    weight = now + F.pad(later[:, 1:], (0, 0, 0, 1))
    h = state["h"] + later[:, 0, :, None, None] * state["k"][..., None] * state["x"][..., None, :]
    skip = now * (q * k).sum(-1) + D  # a token's own product is free of the rotation
    # Summed in fp64 and wrapped to one turn, so that the phase keeps its bits at any length.
    turns = (dt[..., None].double() * (math.pi * angle.tanh())[:, :, None]).cumsum(1)
    phase = (state["phase"][:, None] + turns).remainder(2 * math.pi)
    cos = phase.to(x.dtype).cos()
    sin = phase.to(x.dtype).sin()
    width = 2 * angle.shape[-1]  # of the channels that turn
    q, k = (torch.cat((rotate(t[..., :width], cos, sin), t[..., width:]), -1) for t in (q, k))
    y, h = decayed_scan(q, k, weight[..., None] * x, log_decay, h)
    return y + skip[..., None] * x, {"phase": phase, "h": h, "k": k, "x": x}
