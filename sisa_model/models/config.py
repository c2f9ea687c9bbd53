"""ModelConfig: every number that defines a model, checked when it is made."""

import math
from dataclasses import MISSING, dataclass, fields

from sisa_kernels.attention import BACKENDS
from sisa_kernels.checks import MODES

MAMBAS = ("mamba2", "mamba3")
FAMILIES = ("sisa", "transformer", "fox", "alibi", *MAMBAS)
LAMBDAS = ("per-head", "shared", "zero")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A causal language model: pre-norm layers of attention and SwiGLU, or of Mamba, on a tied
    embedding (paper, section 3).

    Raises ValueError, naming the field, for a value or a combination that no model can have.
    """

    family: str
    """"sisa", "transformer", "fox" or "alibi": the attention of every layer; "mamba2", "mamba3":
    Mamba blocks without an MLP.
    """
    d_model: int
    """Width of the residual stream."""
    n_heads: int
    """Query heads; the head width is d_model / n_heads. A Mamba layer, 2 d_model wide inside, has
    twice as many of that width.
    """
    n_layers: int
    """Number of layers."""
    vocab_size: int
    """Number of tokens."""
    max_seq_len: int
    """Longest sequence the model accepts."""
    d_ff_transformer: int = 0
    """SwiGLU width of the plain Transformer that this model's layers equal in parameters; 0 for a
    Mamba, which has no SwiGLU.
    """
    d_state: int = 0
    """Width of the importance channel a head (even); 0 for every family but "sisa", which have
    none.
    """
    mamba_state: int = 0
    """State size of Mamba's heads (of a mamba3: a multiple of 4); 0 in a model without them."""
    pattern: str = ""
    """Layers of a hybrid, repeated to n_layers: m a Mamba-2 block, a the family's attention with
    SwiGLU; "h": every layer mixes attention and SSD heads (sisa_model.models.hybrid). Empty: every
    layer the family's own."""
    n_kv_heads: int = 0
    """Key/value heads, shared by equal groups of query heads; 0: as many as query heads."""
    d_ff: int = 0
    """SwiGLU width; 0: computed, so that a layer has the Transformer's parameters as nearly as an
    integer allows.
    """
    init_std: float = 0.02
    """Standard deviation of the initial matrices and the embedding."""
    decay: bool = True
    """Learn a decay of the importance term (the control "nodecay": g = 0)."""
    rotation: bool = True
    """Learn a rotation of the importance term (the control "norotation": Phi = 0)."""
    lam: str = "per-head"
    """Weight of the importance term: learned "per-head", one "shared" by a layer's heads, or "zero"
    (no importance term).
    """
    mode: str = "exact"
    """SISA's numerics: "exact", or "clamped" as its authors ran it."""
    backend: str = "auto"
    """Attention path (sisa_kernels.sisa_attention)."""

    def __post_init__(self) -> None:
        def require(field: str, ok: bool, allowed: str) -> None:
            if not ok:
                raise ValueError(f"{field} must be {allowed}, got {getattr(self, field)!r}")

        require("family", self.family in FAMILIES, f"one of {', '.join(FAMILIES)}")
        for field in ("d_model", "n_heads", "n_layers", "vocab_size", "max_seq_len"):
            require(field, getattr(self, field) >= 1, "at least 1")
        require(
            "n_heads", self.d_model % self.n_heads == 0, f"a divisor of d_model = {self.d_model}"
        )
        require(
            "n_heads",
            self.d_model // self.n_heads % 2 == 0,
            "such that the head width d_model / n_heads is even",
        )
        require("init_std", 0 < self.init_std < math.inf, "above 0 and finite")
        if self.family in MAMBAS:
            for item in fields(self):
                idle = item.default is not MISSING and item.name not in ("mamba_state", "init_std")
                unchanged = not idle or getattr(self, item.name) == item.default
                require(
                    item.name,
                    unchanged,
                    f"left at {item.default!r} for a {self.family}, which has no attention and no SwiGLU",
                )
            unit = 4 if self.family == "mamba3" else 1
            whole = self.mamba_state >= unit and self.mamba_state % unit == 0
            require("mamba_state", whole, f"a multiple of {unit}, at least {unit}")
            return
        require("d_ff_transformer", self.d_ff_transformer >= 1, "at least 1")
        hybrid = self.pattern == "h" or set(self.pattern) == {"a", "m"}
        require("pattern", hybrid or not self.pattern, "empty, 'h', or made of both m and a")
        if hybrid:
            require(
                "n_layers",
                self.n_layers % len(self.pattern) == 0,
                f"a multiple of the length of pattern {self.pattern!r}",
            )
            require(
                "mamba_state", self.mamba_state >= 1, f"at least 1 with pattern {self.pattern!r}"
            )
        else:
            require(
                "mamba_state",
                self.mamba_state == 0,
                f"left at 0 for a {self.family} without pattern, which has no Mamba layer",
            )
        if not self.n_kv_heads:
            object.__setattr__(self, "n_kv_heads", self.n_heads)
        require(
            "n_kv_heads",
            self.n_kv_heads >= 1 and self.n_heads % self.n_kv_heads == 0,
            f"a divisor of n_heads = {self.n_heads}",
        )
        require("lam", self.lam in LAMBDAS, f"one of {', '.join(LAMBDAS)}")
        require("mode", self.mode in MODES, f"one of {', '.join(MODES)}")
        require("backend", self.backend in BACKENDS, f"one of {', '.join(BACKENDS)}")
        if self.family != "sisa":
            model = f"{'an' if self.family == 'alibi' else 'a'} {self.family}"
            for field, default in {
                "d_state": 0,
                "decay": True,
                "rotation": True,
                "lam": "per-head",
                "mode": "exact",
            }.items():
                require(
                    field,
                    getattr(self, field) == default,
                    f"left at {default!r} for {model}, which has no importance term",
                )
            require(
                "backend",
                self.backend == "auto",
                f"left at 'auto' for {model}, which runs on stock attention",
            )
        else:
            if self.lam == "zero":
                require(
                    "mode",
                    self.mode == "exact",
                    "left at 'exact' with lam 'zero', which has no importance term",
                )
                require(
                    "backend",
                    self.backend == "auto",
                    "left at 'auto' with lam 'zero', which runs on stock attention",
                )
            require("d_state", self.d_state >= 2 and self.d_state % 2 == 0, "even and at least 2")
        if not self.d_ff:
            object.__setattr__(self, "d_ff", matched_d_ff(self))
        require(
            "d_ff",
            self.d_ff >= 1,
            f"at least 1 (what is beside it in a layer exceeds d_ff_transformer = {self.d_ff_transformer})",
        )

    @property
    def layer_kinds(self) -> str:
        """A letter a layer: m a Mamba block, a attention, h heads of both (``pattern``)."""
        return (
            "m" * self.n_layers
            if self.family in MAMBAS
            else (self.pattern or "a") * (self.n_layers // len(self.pattern or "a"))
        )

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.d_model // self.n_heads


def importance_parameters(config: ModelConfig) -> int:
    """Parameters a layer of the full importance term: W_B, W_C, w_a with b_a, W_theta and lambda
    (paper, section 3).
    """
    d, H, G, Ds = config.d_model, config.n_heads, config.n_kv_heads, config.d_state
    return d * G * Ds + d * H * Ds + (d * G + G) + d * G * Ds // 2 + H


def forget_parameters(config: ModelConfig) -> int:
    """Parameters a layer of FoX's forget gate: w_f and b_f (arXiv 2503.02130, section 3)."""
    return (config.d_model + 1) * config.n_heads


def ssd_head_parameters(config: ModelConfig) -> int:
    """Parameters that SSD heads add to a layer of attention: projection in, convolution, dt_bias,
    A_log, D and both norms.
    """
    d, H, N = config.d_model, config.n_heads, config.mamba_state
    return d * (2 * d + 2 * N + H) + 5 * (d + 2 * N) + 3 * H + 2 * d


def matched_d_ff(config: ModelConfig) -> int:
    """The SwiGLU width that brings a layer closest to the Transformer's parameters; controls keep
    the full model's width.
    """
    beyond = {"sisa": importance_parameters, "fox": forget_parameters}.get(
        config.family, lambda _: 0
    )(config)
    beyond += ssd_head_parameters(config) if config.pattern == "h" else 0
    return config.d_ff_transformer - round(beyond / (3 * config.d_model))
