"""Times every operator and layer beside its rivals on the CPU, and keeps the rows.

It runs bench/test_speed.py under pytest (with pytest-benchmark), which takes pytest's flags:
``-k 'attention and 2048'`` chooses. A case is checked against the fp64 oracle before it is timed;
one that fails has no number, and the command fails. The environment:

  SISA_BENCH_OUT=FOLDER  keep the rows there, not in bench/results
  SISA_BENCH_QUICK=1     tiny sizes that say nothing; the rows are kept only in SISA_BENCH_OUT
  OMP_NUM_THREADS=N      threads of the CPU"""

import argparse

import pytest

from bench.rows import PYTEST, ROOT


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench cpu",
        usage="%(prog)s [-h] [flags of pytest]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _, flags = parser.parse_known_args(arguments)
    return int(pytest.main([*PYTEST, str(ROOT / "bench" / "test_speed.py"), *flags]))
