"""What a training step computes, and its share of a device's peak (model FLOP utilisation)."""

from collections.abc import Iterable

import torch

from sisa_model.models.config import ModelConfig
from sisa_model.models.mamba import CONV

# Dense bf16 matrix products with fp32 accumulation, 1e12 FLOP/s, of NVIDIA's data sheets (which
# print twice that, "with sparsity", from Hopper on): A100 80GB; H100 SXM, PCIe and NVL; H200 SXM;
# HGX B200 (a GPU of it); L40S. RTX 4090: the Ada whitepaper, table 2.
PEAK_TFLOPS = {
    "A100": 312.0,
    "H100": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H200": 989.0,
    "B200": 2250.0,
    "L40S": 362.0,
    "RTX 4090": 165.2,
}
# torch.cuda.get_device_name -> data sheet. Whole names: a GH200, an RTX 4090 D or a MIG slice has
# another peak.
DEVICE_NAMES = {
    "NVIDIA A100-SXM4-40GB": "A100",
    "NVIDIA A100-SXM4-80GB": "A100",
    "NVIDIA A100-PCIE-40GB": "A100",
    "NVIDIA A100 80GB PCIe": "A100",
    "NVIDIA H100 80GB HBM3": "H100",
    "NVIDIA H100 PCIe": "H100 PCIe",
    "NVIDIA H100 NVL": "H100 NVL",
    "NVIDIA H200": "H200",
    "NVIDIA B200": "B200",
    "NVIDIA L40S": "L40S",
    "NVIDIA GeForce RTX 4090": "RTX 4090",
}


def forward_flops(config: ModelConfig, seq_len: int, *, causal: bool = True) -> float:
    """FLOPs a token of a forward pass over ``seq_len`` tokens; a multiply-add counts as two.

    Counted are the matrix products: projections, SwiGLU, the output matrix, scores and weighted
    values, Mamba's convolution and state. ``causal`` counts half of the seq_len^2 pairs, else all.
    Looking up the embedding is free. Not counted, as under 1 % of the whole: norms, softmax, RoPE,
    and SISA's decay, phase and rotation (about 20 d_state a head, against 4 seq_len head_dim of
    attention)."""
    pairs = seq_len / 2 if causal else seq_len
    layers = config.layer_kinds
    products = config.d_model * config.vocab_size + layers.count("m") * _mamba(config, expand=2)
    if attention := len(layers) - layers.count("m"):
        products += attention * _attention(config, pairs)
    if both := layers.count("h"):  # one output matrix serves both kinds of heads
        products += both * (_mamba(config, expand=1) - config.d_model**2)
    return 2 * products


def _mamba(config: ModelConfig, expand: int) -> float:
    """Multiplications a token of a Mamba mixer, its inner width ``expand`` times d_model.

    Of the recurrence the state's update and its reading, whatever the chunks by which an
    implementation runs it."""
    E = expand * config.d_model
    N = config.mamba_state
    H = E // config.head_dim
    if config.family == "mamba3":
        sizes = 2 * E + 2 * N + 3 * H + N // 4
        convolution = 0
    else:
        sizes = 2 * E + 2 * N + H
        convolution = CONV * (E + 2 * N)
    return config.d_model * sizes + convolution + 2 * E * N + E * config.d_model


def _attention(config: ModelConfig, pairs: float) -> float:
    """Multiplications a token of attention (to ``pairs`` keys on average) and SwiGLU."""
    d = config.d_model
    H = config.n_heads
    G = config.n_kv_heads
    E = config.head_dim
    Ds = config.d_state
    outputs = H * E + 2 * G * E
    score = E
    if config.family == "sisa" and config.lam != "zero":
        outputs += H * Ds + G * Ds + G * config.decay + G * Ds // 2 * config.rotation
        score += Ds
    if config.family == "fox":
        outputs += H
    return d * outputs + pairs * H * (score + E) + H * E * d + 3 * d * config.d_ff


def training_flops(config: ModelConfig, seq_len: int) -> float:
    """FLOPs a token, forward and backward (two more products for each); nothing recomputed."""
    return 3 * forward_flops(config, seq_len)


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s by ``device``'s data sheet; None where none is known (CPU, MIG slice)."""
    if device.type != "cuda":
        return None
    sheet = DEVICE_NAMES.get(torch.cuda.get_device_name(device))
    return None if sheet is None else 1e12 * PEAK_TFLOPS[sheet]


def utilisation(
    config: ModelConfig, shapes: Iterable[torch.Size], seconds: float, device: torch.device
) -> float | None:
    """Share of ``device``'s peak in a step of ``seconds`` on inputs [B, L]; None without a peak."""
    peak = peak_flops(device)
    if peak is None:
        return None
    return sum(B * L * training_flops(config, L) for B, L in shapes) / seconds / peak
