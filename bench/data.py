"""Tokens a second of `sisa prepare` by its workers, and of the loader.

The loader reads shuffled batches of the shards that were just made, from the system's cache; beside
its rate stands how many times that is what training consumes (``--consumes``, tokens a second).
Wall-clock, and for the loader also seconds of CPU."""

import argparse
import logging
import sys
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
    """Tokens a second of wall-clock and of CPU, over the batches that fit ``seconds``.

    One batch before them is not counted."""
    blocks = Blocks(shards.train, seq_len, 0, "training")
    blocks.take(blocks.ids(0, batch_size))
    wall = time.perf_counter()
    cpu = time.process_time()
    batches = 0
    while time.perf_counter() - wall < seconds:
        batches += 1
        blocks.take(blocks.ids(batches * batch_size, batch_size))
    tokens = batches * batch_size * seq_len
    return tokens / (time.perf_counter() - wall), tokens / (time.process_time() - cpu)


def report_prepare(sources: tuple[str, ...], tokenizer: str, workers: int, out: Path) -> Shards:
    """Prepare the sources, print the rate, and return the shards."""
    start = time.perf_counter()
    shards = prepare(PrepareConfig(sources=sources, out=out, tokenizer=tokenizer, workers=workers))
    took = time.perf_counter() - start
    tokens = len(shards.train) + len(shards.val)
    rate = f"{tokens / took:,.0f}/s, the start of the workers included"
    print(f"prepare, {workers} workers: {tokens:,} tokens in {took:.1f} s, {rate}")
    return shards


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench data",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    own = [str(path) for path in standard_library()]
    add("--text", nargs="+", default=own, help="default: Python's own sources")
    add("--tokenizer", default="bytes")
    add("--workers", type=int, nargs="+", default=[1, 2])
    add("--seq-len", type=int, default=2048)
    add("--batch-sizes", type=int, nargs="+", default=[256, 8])
    add("--seconds", type=float, default=5.0)
    add("--consumes", type=float, default=5e5, help="tokens a second that training reads")
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    with tempfile.TemporaryDirectory() as folder:
        for workers in args.workers:
            out = Path(folder) / str(workers)
            shards = report_prepare(tuple(args.text), args.tokenizer, workers, out)
        for batch_size in args.batch_sizes:
            wall, cpu = loader_rates(shards, args.seq_len, batch_size, args.seconds)
            ratio = f"{wall / args.consumes:.0f}x of {args.consumes:,.0f}/s"
            print(
                f"loader, batches of {batch_size} x {args.seq_len}: {wall:,.0f} tokens/s "
                f"({ratio}), {cpu:,.0f} a second of CPU"
            )
    return 0
