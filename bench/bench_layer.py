"""One 152M layer on the CPU, SISA and its rivals beside the Transformer of equal parameters (``python bench/bench_layer.py``).

Forward + backward, the layers taking turns, ratio of medians; then the peak of what a forward + backward allocates. The layers
are checked against the fp64 oracle path first: one that fails prints no number.
"""

import argparse
from unittest.mock import patch

import torch
from bench_augment import medians
from torch.profiler import ProfilerActivity, profile

import sisa_kernels as sk
import sisa_model as sm
from sisa_model.layers import Context, Layer, rotary_tables

BASELINE = "transformer-152m"
PRESETS = (BASELINE, "sisa-152m-ds16", "sisa-152m-ds32", "fox-152m", "alibi-152m")


def make_layer(preset: str, **overrides: str) -> Layer:
    torch.manual_seed(0)
    return sm.build(preset, n_layers=1, vocab_size=8, **overrides).layers[0]


def step(layer: Layer, x: torch.Tensor, dy: torch.Tensor, context: Context) -> torch.Tensor:
    """Forward and backward of one layer, its gradients cleared; returns dL/dx."""
    layer.zero_grad(set_to_none=True)
    x = x.detach().requires_grad_()
    layer(x, context).backward(dy)
    assert x.grad is not None
    return x.grad


def peak_mib(call) -> float:
    """Peak of the memory that a call allocates and has not freed, in MiB, from the profiler's allocation records."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, record_shapes=False) as trace:
        call()
    live = peak = 0
    for event in sorted(trace.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 512])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--profile", action="store_true", help="print where the time of each layer goes")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {args.threads} threads, extension {sk.backends()['extension']}; batch 1, fp32")
    for length in args.lengths:
        x, dy = torch.randn(2, 1, length, 768).unbind()
        context = Context(rotary_tables(length, 64, torch.device("cpu")))
        layers = {}
        for preset in PRESETS:
            layer = make_layer(preset)
            if preset != BASELINE:
                oracle = {"backend": "reference"} if preset.startswith("sisa") else {}
                with patch.object(sk, "forgetting_attention", sk.reference.forgetting_attention):
                    exact = step(make_layer(preset, **oracle), x, dy, context)
                error = ((step(layer, x, dy, context) - exact).norm() / exact.norm()).item()
                if not error < 1e-5:
                    print(f"L {length:5} {preset}: wrong by {error:.1e}, not timed")
                    continue
            layers[preset] = layer
        times = medians({p: lambda m=m: step(m, x, dy, context) for p, m in layers.items()}, args.rounds)
        memory = {p: peak_mib(lambda m=m: step(m, x, dy, context)) for p, m in layers.items()}
        for preset in layers:
            speed, space = times[BASELINE] / times[preset], memory[preset] / memory[BASELINE]
            time = f"{times[preset]:8.1f} ms  speed {speed:.3f}x"
            print(f"L {length:5} {preset:18} {time}   peak {memory[preset]:6.1f} MiB  {space:.3f}x")
            if args.profile:
                with profile(activities=[ProfilerActivity.CPU]) as trace:
                    step(layers[preset], x, dy, context)
                print(trace.key_averages().table(sort_by="self_cpu_time_total", row_limit=18, max_name_column_width=60))


if __name__ == "__main__":
    main()
