"""Random problems, the same on every device and under every default dtype."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from sisa_kernels.inputs import NAMES, SisaInputs

LAM = 0.3133  # softplus(-1), with which a SISA layer begins


def problem(
    *,
    B: int = 1,
    L: int = 257,
    H: int = 2,
    G: int | None = None,
    Dh: int = 64,
    Ds: int = 16,
    Dv: int | None = None,
    decay: float = -3.0,
    theta: float = 0.3,
    lam: float | None = LAM,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> tuple[SisaInputs, Tensor]:
    """Random inputs of :func:`sisa_kernels.sisa_attention` as leaves, and dL/dy.

    Args:
        B, L, H, G, Dh, Ds, Dv: the shape; G as H and Dv as Dh where None.
        decay: log_decay is -softplus(decay + noise).
        theta: the size of a token's phase steps, radians.
        lam: of every head; None: random, each head its own.
        dtype: of q, k, v, b, c and dy; the others are fp32, in an fp64 problem fp64.
    """
    G = G or H
    Dv = Dv or Dh
    normal = _normal(seed)
    wide = {"q": (H, Dh), "k": (G, Dh), "v": (G, Dv), "b": (G, Ds), "c": (H, Ds)}
    leaves = {name: normal(B, L, *shape).to(dtype) for name, shape in wide.items()}
    narrow = {
        "log_decay": -F.softplus(0.5 * normal(B, L, G) + decay),
        "theta": theta * normal(B, L, G, Ds // 2),
        "lam": F.softplus(0.3 * normal(H) - 1) if lam is None else _constant(lam, H),
    }
    leaves |= {name: x.to(_narrow(dtype)) for name, x in narrow.items()}
    tensors = (leaves[name].to(device).requires_grad_() for name in NAMES)
    inputs = SisaInputs._make((*tensors, None, None))
    return inputs, normal(B, L, H, Dv).to(device, dtype)


def forgetting_problem(
    *,
    B: int = 1,
    L: int = 257,
    H: int = 2,
    G: int | None = None,
    Dh: int = 64,
    Dv: int | None = None,
    decay: float = -5.0,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[dict[str, Tensor], Tensor]:
    """Random inputs of :func:`sisa_kernels.forgetting_attention` by name as leaves, and dL/dy.

    The arguments are those of :func:`problem`; log_forget is -softplus(decay + noise)."""
    G = G or H
    Dv = Dv or Dh
    normal = _normal(seed)
    wide = {"q": (H, Dh), "k": (G, Dh), "v": (G, Dv)}
    leaves = {name: normal(B, L, *shape).to(dtype) for name, shape in wide.items()}
    leaves["log_forget"] = -F.softplus(0.5 * normal(B, L, H) + decay).to(_narrow(dtype))
    return {name: x.requires_grad_() for name, x in leaves.items()}, normal(B, L, H, Dv).to(dtype)


def _normal(seed: int) -> Callable[..., Tensor]:
    """Normal noise of a shape in fp32 on the CPU, whatever the defaults are."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu")

    return draw


def _constant(value: float, size: int) -> Tensor:
    return torch.full((size,), value, dtype=torch.float32, device="cpu")


def _narrow(dtype: torch.dtype) -> torch.dtype:
    """The dtype of what is fp32 beside operands of ``dtype``."""
    return torch.promote_types(dtype, torch.float32)
