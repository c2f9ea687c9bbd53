"""Error of every attention path against Eq. 2 in fp64, by length and decay (``python
bench/accuracy.py``).

Relative error of y over the whole tensor, of its worst row and of the worst gradient, on the
problem of the paths' self-check. Rows are appended to bench/results/accuracy.csv; where a path
refuses or gives no number, the row says so. The load of the machine does not matter. The oracle
holds scores in fp64: 1.4 GB at length 4,096, and four times that at twice the length."""

import argparse
import functools
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import sisa_kernels as sk
from bench import authors
from bench.paths import reason
from bench.rows import RESULTS, WHERE, append, now, provenance
from sisa_kernels.selfcheck import NAMES, oracle, problem, relative_errors, results

COLUMNS = (
    "path",
    "mode",
    "dtype",
    "length",
    "half_life",
    "g_range",
    "error",
    "worst_row",
    "gradient",
    "of",
    "status",
    *WHERE,
)
LENGTHS = (256, 512, 1024, 2048, 4096)
HALF_LIVES = (100.0, 20.0, 2.0)  # tokens: about that of initialisation, and what heads learn
DTYPES = (torch.float32, torch.bfloat16)


def no_turn(length: int, width: int) -> tuple[Tensor, Tensor]:
    """RoPE's tables of no rotation."""
    return torch.ones(length, width // 2), torch.zeros(length, width // 2)


def as_written(*x: Tensor, clamp: float) -> Tensor:
    """The authors' chain and stock attention, op by op."""
    tables = (table.to(x[0].device) for table in no_turn(x[0].shape[1], x[0].shape[3]))
    return authors.attention(*x, tuple(tables), clamp)


PATHS: dict[str, tuple[str, Callable[..., Tensor]]] = {
    "sisa": ("exact", sk.sisa_attention),
    "one call": ("exact", functools.partial(sk.sisa_attention, backend="flash")),
    "as published": ("clamped", functools.partial(as_written, clamp=sk.reference.CLAMP)),
    "clamped": ("clamped", functools.partial(sk.sisa_attention, mode="clamped")),
    "without the clamp": ("exact", functools.partial(as_written, clamp=math.inf)),
}


def bias_of(half_life: float) -> float:
    """The bias whose softplus halves the importance every ``half_life`` tokens."""
    return math.log(math.expm1(math.log(2) / half_life))


def row_of(
    attend: Callable[..., Tensor], inputs: list[Tensor], dy: Tensor, right: list[Tensor]
) -> dict[str, str]:
    """The errors of a path, or why it has none."""
    try:
        found = results(attend, inputs, dy)
    except Exception as error:
        return {"status": reason(error)}
    if not all(x.isfinite().all() for x in found):
        return {"status": "not finite"}
    of_y, *gradients = relative_errors(found, right)
    rows = ((found[0].double() - right[0]).norm(dim=-1) / right[0].norm(dim=-1)).max().item()
    worst, name = max(zip(gradients, NAMES))
    return {
        "error": f"{of_y:.3e}",
        "worst_row": f"{rows:.3e}",
        "gradient": f"{worst:.3e}",
        "of": name,
        "status": "ok",
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--half-lives", type=float, nargs="+", default=HALF_LIVES, help="tokens")
    parser.add_argument("--state-width", type=int, default=16)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of accuracy.csv")
    args = parser.parse_args(arguments)
    device = torch.device(args.device)
    where = provenance(device)
    print(
        f"{'dtype':9} {'length':>6} {'half-life':>9} {'range of g':>10} {'path':18} {'of y':>9} {'row':>9} {'gradient':>9}"
    )
    for dtype in DTYPES:
        for length in args.lengths:
            for half_life in args.half_lives:
                inputs, dy = problem(
                    device, dtype, L=length, H=1, G=1, Ds=args.state_width, decay=bias_of(half_life)
                )
                right, fall = oracle(inputs, dy), -inputs[5].detach().double().sum(1).min().item()
                shown = f"{str(dtype)[6:]:9} {length:6} {half_life:9g} {fall:10.1f}"
                what = {
                    "dtype": str(dtype)[6:],
                    "length": length,
                    "half_life": f"{half_life:g}",
                    "g_range": f"{fall:.1f}",
                }
                for name, (mode, attend) in PATHS.items():
                    row = (
                        what
                        | {"path": name, "mode": mode, "date": now()}
                        | row_of(attend, inputs, dy, right)
                    )
                    row = append(args.out / "accuracy.csv", COLUMNS, where | row)
                    found = " ".join(
                        f"{row[column]:>9}" for column in ("error", "worst_row", "gradient")
                    )
                    print(
                        f"{shown} {name:18} {found if row['status'] == 'ok' else row['status'][:60]}",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
