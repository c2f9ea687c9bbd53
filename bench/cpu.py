"""Times every operator and layer beside its rivals on the CPU, and keeps the rows.

It runs bench/test_speed.py under pytest (with pytest-benchmark), which takes pytest's flags:
``-k 'attention and 2048'`` chooses. A case is checked against the fp64 oracle before it is timed;
one that fails has no number, and the command fails. The environment:

  SISA_BENCH_OUT=FOLDER  where the rows go; default: bench/out, which git ignores
  SISA_BENCH_QUICK=1     tiny sizes that say nothing; the rows go nowhere but to SISA_BENCH_OUT
  OMP_NUM_THREADS=N      threads of the CPU"""

import argparse
import os

import pytest

from bench.rows import PYTEST, RESULTS, ROOT


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench cpu",
        usage="%(prog)s [-h] [--keep] [flags of pytest]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    keep = "append the rows to those that the repository has, in bench/results"
    parser.add_argument("--keep", action="store_true", help=keep)
    given, flags = parser.parse_known_args(arguments)
    if given.keep:
        os.environ["SISA_BENCH_OUT"] = str(RESULTS)
    return int(pytest.main([*PYTEST, str(ROOT / "bench" / "test_speed.py"), *flags]))
