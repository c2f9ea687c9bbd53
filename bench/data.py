"""Tokens a second of `sisa prepare` by its workers, and of the loader (``python
bench/bench_data.py``).

The loader reads shuffled batches of the shards that were just made, from the system's cache; beside
its rate stands how many times that is what training consumes (``--consumes``, tokens a second).
Wall-clock, and for the loader also seconds of CPU."""

import argparse
import tempfile
import time
from pathlib import Path

from sisa_model.data.blocks import Blocks
from sisa_model.data.prepare import PrepareConfig, prepare
from sisa_model.data.shards import Shards
from sisa_model.data.text import standard_library


def loader_rates(
    shards: Shards, seq_len: int, batch_size: int, seconds: float
) -> tuple[float, float]:
    """Tokens a second of wall-clock and of CPU, over as many batches as fit ``seconds`` after one
    that is not counted.
    """
    blocks = Blocks(shards.train, seq_len, 0, "training")
    blocks.take(blocks.ids(0, batch_size))
    wall, cpu, batches = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - wall < seconds:
        batches += 1
        blocks.take(blocks.ids(batches * batch_size, batch_size))
    tokens = batches * batch_size * seq_len
    return tokens / (time.perf_counter() - wall), tokens / (time.process_time() - cpu)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--text",
        nargs="+",
        default=[str(path) for path in standard_library()],
        help="default: Python's own sources",
    )
    parser.add_argument("--tokenizer", default="bytes")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[256, 8])
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument(
        "--consumes", type=float, default=5e5, help="tokens a second that training reads"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for workers in args.workers:
            out, start = Path(folder) / str(workers), time.perf_counter()
            shards = prepare(
                PrepareConfig(
                    sources=tuple(args.text), out=out, tokenizer=args.tokenizer, workers=workers
                )
            )
            took, tokens = time.perf_counter() - start, len(shards.train) + len(shards.val)
            rate = f"{tokens / took:,.0f}/s, the start of the workers included"
            print(f"prepare, {workers} workers: {tokens:,} tokens in {took:.1f} s, {rate}")
        for batch_size in args.batch_sizes:
            wall, cpu = loader_rates(shards, args.seq_len, batch_size, args.seconds)
            ratio = f"{wall / args.consumes:.0f}x of {args.consumes:,.0f}/s"
            print(
                f"loader, batches of {batch_size} x {args.seq_len}: {wall:,.0f} tokens/s ({ratio}), {cpu:,.0f} a second of CPU"
            )


if __name__ == "__main__":
    main()
