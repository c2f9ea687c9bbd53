"""Error of every attention path against Eq. 2 in fp64, by length and decay.

Relative error of y over the whole tensor, of its worst row and of the worst gradient, on the
problem of the paths' self-check. Rows are appended to accuracy.csv; where a path
refuses or gives no number, the row says so. The load of the machine does not matter. The oracle
holds scores in fp64: 1.4 GB at length 4,096, and four times that at twice the length."""

import argparse
import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from bench import authors
from bench.paths import Attend, ours, reason, results
from bench.rows import WHERE, add_destination, append, now, provenance
from sisa_kernels.inputs import Rotary, SisaInputs
from sisa_kernels.rotation import CLAMP
from sisa_kernels.testing import ValueAndGrads, oracle, problem, relative_errors, worst_row

WHAT = ("path", "mode", "dtype", "length", "half_life", "g_range")
ERRORS = ("error", "worst_row", "gradient", "of")
COLUMNS = (*WHAT, *ERRORS, "status", *WHERE)
LENGTHS = (256, 512, 1024, 2048, 4096)
HALF_LIVES = (100.0, 20.0, 2.0)  # tokens: about that of initialisation, and what heads learn
DTYPES = (torch.float32, torch.bfloat16)


def no_turn(length: int, width: int, device: torch.device) -> Rotary:
    """RoPE's tables of no rotation."""
    shape = (length, width // 2)
    return torch.ones(shape, device=device), torch.zeros(shape, device=device)


def as_written(clamp: float) -> Attend:
    """The authors' chain and stock attention, op by op."""

    def attend(x: SisaInputs) -> Tensor:
        tables = no_turn(x.q.shape[1], x.q.shape[3], x.q.device)
        return authors.attention(x._replace(rotary=tables), clamp)

    return attend


PATHS: dict[str, tuple[str, Attend]] = {  # name -> mode, and what it calls
    "sisa": ("exact", ours("exact", "auto")),
    "one call": ("exact", ours("exact", "one_call")),
    "as published": ("clamped", as_written(CLAMP)),
    "clamped": ("clamped", ours("clamped", "auto")),
    "without the clamp": ("exact", as_written(math.inf)),
}


def bias_of(half_life: float) -> float:
    """The bias whose softplus halves the importance every ``half_life`` tokens."""
    return math.log(math.expm1(math.log(2) / half_life))


def row_of(attend: Attend, x: SisaInputs, dy: Tensor, right: ValueAndGrads) -> dict[str, str]:
    """The errors of a path, or why it has none."""
    try:
        y, grads = results(attend, x, dy)
    except Exception as error:
        return {"status": reason(error)}
    if not all(found.isfinite().all() for found in (y, *grads.values())):
        return {"status": "not finite"}
    errors = relative_errors((y, grads), right)
    of_y = errors.pop("y")
    worst, name = max((error, name) for name, error in errors.items())
    return {
        "error": f"{of_y:.3e}",
        "worst_row": f"{worst_row(y, right[0]):.3e}",
        "gradient": f"{worst:.3e}",
        "of": name,
        "status": "ok",
    }


def printed(row: dict[str, str]) -> str:
    """A line of the table that appears while it is measured."""
    told = " ".join(f"{row[column]:>9}" for column in ERRORS[:3])
    if row["status"] != "ok":
        told = row["status"][:60]
    what = f"{row['dtype']:9} {row['length']:>6} {row['half_life']:>9} {row['g_range']:>10}"
    return f"{what} {row['path']:18} {told}"


def measure_problem(
    device: torch.device, dtype: torch.dtype, length: int, half_life: float, d_state: int
) -> Iterator[dict[str, str]]:
    """A row for each path on one problem."""
    options = {"decay": bias_of(half_life), "dtype": dtype, "device": device}
    x, dy = problem(L=length, H=1, Ds=d_state, **options)
    right = oracle(x, dy)
    range_of_g = -x.log_decay.detach().double().sum(1).min().item()
    what = {
        "dtype": str(dtype)[6:],
        "length": str(length),
        "half_life": f"{half_life:g}",
        "g_range": f"{range_of_g:.1f}",
    }
    for name, (mode, attend) in PATHS.items():
        started = now()
        errors = row_of(attend, x, dy, right)
        yield {"path": name, "mode": mode, **what, **errors, "date": started}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench accuracy",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--lengths", type=int, nargs="+", default=LENGTHS)
    add("--half-lives", type=float, nargs="+", default=HALF_LIVES, help="tokens")
    add("--d-state", type=int, default=16)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add_destination(parser)
    args = parser.parse_args(arguments)
    device = torch.device(args.device)
    where = provenance(device)
    what = f"{'dtype':9} {'length':>6} {'half-life':>9} {'range of g':>10}"
    print(f"{what} {'path':18} {'of y':>9} {'row':>9} {'gradient':>9}")
    for dtype, length, half_life in itertools.product(DTYPES, args.lengths, args.half_lives):
        for row in measure_problem(device, dtype, length, half_life, args.d_state):
            kept = append(args.out / "accuracy.csv", COLUMNS, where | row)
            print(printed(kept), flush=True)
    return 0
