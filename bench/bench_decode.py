"""One token over a cache on the CPU, a 152M SISA layer beside the Transformer's (``python bench/bench_decode.py``).

The layers take turns, each appending a token to its cache at every step; times are medians, of the attention module with its
projections and of the whole layer. The step is checked against the fp64 oracle first: one that fails prints no number.
"""

import argparse

import torch
from bench_augment import medians

import sisa_kernels as sk
import sisa_model as sm
from sisa_model.layers import Context, Layer, rotary_at

BASELINE = "transformer-152m"
PRESETS = (BASELINE, "sisa-152m-ds16", "sisa-152m-ds32")
HEAD_DIM = 64


class Step:
    """A layer with a cache of ``length`` tokens; each call appends one, and every 32nd takes the cache back to ``length``."""

    def __init__(self, preset: str, length: int, dtype: torch.dtype):
        torch.manual_seed(0)
        self.layer: Layer = sm.build(preset, n_layers=1, vocab_size=8).layers[0].to(dtype)
        self.cache, self.length = self.layer.attn.make_cache(1), length
        states = torch.randn(1, length + 1, 768, dtype=dtype)
        self.layer(states[:, :length], Context(rotary_at(torch.arange(length), HEAD_DIM)), self.cache)
        self.states, self.x = states, states[:, length:]
        self.context = Context(rotary_at(torch.arange(length, length + 1), HEAD_DIM))

    def run(self, module: torch.nn.Module) -> torch.Tensor:
        if self.cache.lengths[0] >= self.length + 32:
            self.cache.lengths = [self.length]
        return module(self.x, self.context, self.cache)

    def error(self) -> float:
        """Of the layer's next token, relative, against the layer in fp64 on the oracle without a cache."""
        found = self.run(self.layer).double()
        exact = self.layer.double()(self.states.double(), Context(rotary_at(torch.arange(self.length + 1), HEAD_DIM)))[:, -1:]
        self.layer.to(self.x.dtype)
        return ((found - exact).norm() / exact.norm()).item()


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 4096, 8192])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dtype, bound = getattr(torch, args.dtype), 1e-5 if args.dtype == "float32" else 2e-2
    print(f"torch {torch.__version__}, {args.threads} threads, extension {sk.backends()['extension']}; batch 1, {args.dtype}")
    for length in args.lengths:
        steps = {preset: Step(preset, length, dtype) for preset in PRESETS}
        for preset in PRESETS:
            if not (error := steps[preset].error()) < bound:
                print(f"context {length:5} {preset}: wrong by {error:.1e}, not timed")
                del steps[preset]
        for what in ("attention", "layer"):
            pick = {p: s.layer.attn if what == "attention" else s.layer for p, s in steps.items()}
            times = medians({p: lambda s=s, m=pick[p]: s.run(m) for p, s in steps.items()}, args.rounds)
            for preset, time in times.items():
                print(f"context {length:5} {what:10} {preset:18} {time:8.3f} ms  {time / times[BASELINE]:.3f}x the Transformer's")


if __name__ == "__main__":
    main()
