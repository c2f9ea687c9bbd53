"""ModelConfig: every number that defines a model, checked when it is made."""

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, Literal, get_args

from sisa_kernels.inputs import BACKENDS, MODES, PLAIN_BACKENDS, Backend, Mode

Family = Literal["sisa", "transformer", "fox", "alibi", "mamba2", "mamba3"]
LambdaKind = Literal["per-head", "shared", "zero"]
Weights = Literal["fp32", "bf16"]
FAMILIES: tuple[Family, ...] = get_args(Family)
MAMBAS: tuple[Family, ...] = ("mamba2", "mamba3")
# What has a default and is not idle in a model of Mamba blocks alone.
MAMBA_FIELDS = ("mamba_state", "init_std", "weights")
LAMBDAS: tuple[LambdaKind, ...] = get_args(LambdaKind)
WEIGHTS: tuple[Weights, ...] = get_args(Weights)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A causal language model: pre-norm layers on a tied embedding (paper, section 3).

    The layers are attention and SwiGLU, or Mamba. Raises ValueError, naming the field, for a value
    or a combination that no model can have."""

    family: Family
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
    lam: LambdaKind = "per-head"
    """Weight of the importance term: learned "per-head", one "shared" by a layer's heads, or "zero"
    (no importance term).
    """
    mode: Mode = "exact"
    """SISA's numerics: "exact", or "clamped" as its authors ran it."""
    backend: Backend = "auto"
    """Attention path (sisa_kernels.sisa_attention); without an importance term "auto", "native" or
    "sdpa", PyTorch's own.
    """
    weights: Weights = "fp32"
    """Dtype of the parameters: "fp32", or "bf16" as the authors trained: RoPE's tables and the
    decay's logits too, but not lambda_raw (in a hybrid that as well, where it never moves).
    """

    def __post_init__(self) -> None:
        self._check_trunk()
        if self.family in MAMBAS:
            self._check_mamba()
            return
        self._check_layers()
        if not self.n_kv_heads:
            object.__setattr__(self, "n_kv_heads", self.n_heads)
        grouped = self.n_kv_heads >= 1 and self.n_heads % self.n_kv_heads == 0
        self._require("n_kv_heads", grouped, f"a divisor of n_heads = {self.n_heads}")
        self._require_choice("lam", LAMBDAS)
        self._require_choice("mode", MODES)
        self._require_choice("backend", BACKENDS)
        if self.family == "sisa":
            self._check_importance()
        else:
            self._check_no_importance()
        if not self.d_ff:
            object.__setattr__(self, "d_ff", matched_d_ff(self))
        beside = f"what is beside it in a layer exceeds d_ff_transformer = {self.d_ff_transformer}"
        self._require("d_ff", self.d_ff >= 1, f"at least 1 ({beside})")

    def _require(self, field: str, ok: bool, allowed: str) -> None:
        if not ok:
            raise ValueError(f"{field} must be {allowed}, got {getattr(self, field)!r}")

    def _require_choice(self, field: str, allowed: tuple[str, ...]) -> None:
        self._require(field, getattr(self, field) in allowed, f"one of {', '.join(allowed)}")

    def _require_left(self, defaults: Mapping[str, Any], reason: str) -> None:
        """Refuse a field that has another value than its default, which would change nothing."""
        for field, default in defaults.items():
            left = getattr(self, field) == default
            self._require(field, left, f"left at {default!r} {reason}")

    def _check_trunk(self) -> None:
        """What every family has."""
        self._require_choice("family", FAMILIES)
        for field in ("d_model", "n_heads", "n_layers", "vocab_size", "max_seq_len"):
            self._require(field, getattr(self, field) >= 1, "at least 1")
        whole = self.d_model % self.n_heads == 0
        self._require("n_heads", whole, f"a divisor of d_model = {self.d_model}")
        even = self.d_model // self.n_heads % 2 == 0
        self._require("n_heads", even, "such that the head width d_model / n_heads is even")
        self._require("init_std", 0 < self.init_std < math.inf, "above 0 and finite")
        self._require_choice("weights", WEIGHTS)

    def _check_mamba(self) -> None:
        """A model of Mamba blocks alone: all that belongs to attention or SwiGLU is idle."""
        idle = {
            field.name: field.default
            for field in fields(self)
            if field.default is not MISSING and field.name not in MAMBA_FIELDS
        }
        self._require_left(idle, f"for a {self.family}, which has no attention and no SwiGLU")
        unit = 4 if self.family == "mamba3" else 1
        whole = self.mamba_state >= unit and self.mamba_state % unit == 0
        self._require("mamba_state", whole, f"a multiple of {unit}, at least {unit}")

    def _check_layers(self) -> None:
        """Layers with attention, in a hybrid's pattern or alone."""
        self._require("d_ff_transformer", self.d_ff_transformer >= 1, "at least 1")
        pattern = self.pattern
        hybrid = pattern == "h" or set(pattern) == {"a", "m"}
        known = hybrid or not pattern
        self._require("pattern", known, "empty, 'h', or made of both m and a")
        if not hybrid:
            reason = f"for a {self.family} without pattern, which has no Mamba layer"
            self._require_left({"mamba_state": 0}, reason)
            return
        repeats = self.n_layers % len(pattern) == 0
        self._require("n_layers", repeats, f"a multiple of the length of pattern {pattern!r}")
        self._require("mamba_state", self.mamba_state >= 1, f"at least 1 with pattern {pattern!r}")

    def _check_importance(self) -> None:
        """SISA's own: with lambda = 0 a Transformer's attention is what runs."""
        if self.lam == "zero":
            self._require_left({"mode": "exact"}, "with lam 'zero', which has no importance term")
            self._require_choice("backend", PLAIN_BACKENDS)
        even = self.d_state >= 2 and self.d_state % 2 == 0
        self._require("d_state", even, "even and at least 2")

    def _check_no_importance(self) -> None:
        """Families without an importance term: all that belongs to it is idle."""
        model = f"{'an' if self.family == 'alibi' else 'a'} {self.family}"
        idle = {"d_state": 0, "decay": True, "rotation": True, "lam": "per-head", "mode": "exact"}
        self._require_left(idle, f"for {model}, which has no importance term")
        self._require_choice("backend", PLAIN_BACKENDS)

    @property
    def layer_kinds(self) -> str:
        """A letter a layer: m a Mamba block, a attention, h heads of both (``pattern``)."""
        if self.family in MAMBAS:
            return "m" * self.n_layers
        pattern = self.pattern or "a"
        return pattern * (self.n_layers // len(pattern))

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.d_model // self.n_heads


def importance_parameters(config: ModelConfig) -> int:
    """Parameters a layer of the full importance term: W_B, W_C, w_a, b_a, W_theta and lambda."""
    d = config.d_model
    H = config.n_heads
    G = config.n_kv_heads
    Ds = config.d_state
    return d * G * Ds + d * H * Ds + (d * G + G) + d * G * Ds // 2 + H


def forget_parameters(config: ModelConfig) -> int:
    """Parameters a layer of FoX's forget gate: w_f and b_f (arXiv 2503.02130, section 3)."""
    return (config.d_model + 1) * config.n_heads


def ssd_head_parameters(config: ModelConfig) -> int:
    """Parameters a layer of SSD heads: projection, convolution, dt_bias, A_log, D, both norms."""
    d = config.d_model
    H = config.n_heads
    N = config.mamba_state
    return d * (2 * d + 2 * N + H) + 5 * (d + 2 * N) + 3 * H + 2 * d


def matched_d_ff(config: ModelConfig) -> int:
    """The SwiGLU width whose layer comes closest to the Transformer's parameters.

    Controls keep the full model's width."""
    beyond = 0
    if config.family == "sisa":
        beyond += importance_parameters(config)
    if config.family == "fox":
        beyond += forget_parameters(config)
    if config.pattern == "h":
        beyond += ssd_head_parameters(config)
    return config.d_ff_transformer - round(beyond / (3 * config.d_model))
