"""Speed of the augmentation on the CPU against the chain of PyTorch ops that the paper's authors run.

Forward + backward against that chain in eager mode, and forward against the same chain under ``torch.compile``; the variants
take turns and the ratio is of medians. Each is first checked against the fp64 chain: one that fails it prints no number.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import sisa_kernels as sk

CLAMP = 11.0
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x0, x1 = x[..., 0::2], x[..., 1::2]
    return torch.stack((x0 * cos - x1 * sin, x0 * sin + x1 * cos), -1).flatten(-2)


def eager_chain(q, k, b, c, log_decay, theta, lam, cos, sin, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Proposition 1 op by op under autograd, scans, rotations and concatenation in fp32 (or ``dtype``), results in q's dtype."""
    work, out = dtype or torch.float32, dtype or q.dtype
    q, k, b, c = (x.to(work) for x in (q, k, b, c))
    q, k = rotate(q, cos[:, None], sin[:, None]), rotate(k, cos[:, None], sin[:, None])
    g = log_decay.cumsum(1)
    middle = ((g.amax(1, keepdim=True) + g.amin(1, keepdim=True)) / 2).detach()
    x = (g - middle).clamp(-CLAMP, CLAMP)[..., None]
    phase = theta.cumsum(1)
    s = (q.shape[3] ** 0.25 * lam.sqrt())[:, None]
    c = s * x.exp() * rotate(c, phase.cos(), phase.sin())
    b = s * (-x).exp() * rotate(b, phase.cos(), phase.sin())
    return torch.cat((q, c), -1).to(out), torch.cat((k, b), -1).to(out)


def fused(q, k, b, c, log_decay, theta, lam, cos, sin) -> tuple[Tensor, Tensor]:
    return sk.augment_qk(q, k, b, c, log_decay, theta, lam, rotary=(cos, sin))


def problem(length: int, heads: int, head_width: int, state_width: int, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """(q .. lam, rotary tables) and the gradients of both results, with the decay and phase of initialisation."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    wide = [normal(1, length, heads, n).to(dtype) for n in (head_width, head_width, state_width, state_width)]
    log_decay = -F.softplus(normal(1, length, heads) * 0.5 - 5)
    inputs = [*wide, log_decay, 0.3 * normal(1, length, heads, state_width // 2), torch.full((heads,), 0.3133)]
    angle = torch.arange(length)[:, None] * 10000 ** (-torch.arange(0, head_width, 2) / head_width)
    grads = [normal(1, length, heads, head_width + state_width).to(dtype) for _ in range(2)]
    return [*(x.requires_grad_() for x in inputs), angle.cos(), angle.sin()], grads


def run(function: Callable, inputs: list[Tensor], grads: list[Tensor] | None) -> list[Tensor]:
    """The function's results, and the gradients of the inputs where ``grads`` are given."""
    if grads is None:
        with torch.no_grad():
            return list(function(*inputs))
    results = function(*inputs)
    return [*results, *torch.autograd.grad(results, inputs[:7], grads)]


def worst_error(function: Callable, inputs: list[Tensor], grads: list[Tensor]) -> float:
    exact = [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]

    def oracle(*args: Tensor) -> tuple[Tensor, Tensor]:
        return eager_chain(*args, dtype=torch.float64)

    pairs = zip(run(function, inputs, grads), run(oracle, exact, [g.double() for g in grads]))
    return max(((x.double() - r).norm() / r.norm()).item() for x, r in pairs)


def medians(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median milliseconds of each call; the calls take turns, so that whatever else runs here slows them alike."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for n in range(rounds + 3):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if n >= 3:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(series) for name, series in times.items()}


def measure(inputs: list[Tensor], grads: list[Tensor], rounds: int) -> str:
    torch._dynamo.reset()
    compiled = torch.compile(eager_chain, dynamic=False)
    both = medians({"chain": lambda: run(eager_chain, inputs, grads), "fused": lambda: run(fused, inputs, grads)}, rounds)
    forward = medians({"compiled": lambda: run(compiled, inputs, None), "fused": lambda: run(fused, inputs, None)}, rounds)
    pieces = [f"{both['chain']:8.1f} {both['fused']:7.2f} {both['chain'] / both['fused']:6.1f}"]
    pieces += [f"{forward['compiled']:8.2f} {forward['fused']:7.2f} {forward['compiled'] / forward['fused']:6.1f}"]
    return " | ".join(pieces)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--head-width", type=int, default=64)
    parser.add_argument("--state-widths", type=int, nargs="+", default=[16, 32, 128])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {args.threads} threads, extension {sk.backends()['extension']}")
    print(f"batch 1, length {args.length}, {args.heads} heads of {args.head_width}; medians of {args.rounds} in ms")
    print(f"{'':23} | {'forward + backward':^23} | {'forward':^23}")
    print(
        f"{'dtype':9} {'Ds':>4} {'error':>8} | {'chain':>8} {'fused':>7} {'ratio':>6} | {'compiled':>8} {'fused':>7} {'ratio':>6}"
    )
    for dtype in (torch.float32, torch.bfloat16):
        for state_width in args.state_widths:
            inputs, grads = problem(args.length, args.heads, args.head_width, state_width, dtype)
            error = worst_error(fused, inputs, grads)
            line = measure(inputs, grads, args.rounds) if error < TOLERANCE[dtype] else "wrong, not timed"
            print(f"{str(dtype)[6:]:9} {state_width:4} {error:8.1e} | {line}", flush=True)


if __name__ == "__main__":
    main()
