"""``python -m sisa_kernels``: the build, the devices, and every path's error against the oracle."""

import os
import platform
import sys
import time
from collections import Counter

import torch
from torch import Tensor

from sisa_kernels import __version__, _extension, backends, sisa_attention
from sisa_kernels.inputs import SisaInputs
from sisa_kernels.selfcheck import ALLOWED, described
from sisa_kernels.testing import ValueAndGrads, oracle, problem, relative_errors, value_and_grads

DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
CASES = {"weak": -5.0, "strong": 1.0}  # b_a: half-lives of 100 tokens, and of half a token
LENGTH = 1000
PATHS = (
    ("exact", "native"),
    ("exact", "triton"),
    ("exact", "chunked"),
    ("exact", "one_call"),
    ("clamped", "one_call"),
)
REFUSED = ("strong", "exact", "one_call")  # one call holds g's range to 80 in fp32
COLUMNS = (
    f"{'decay':6} {'':4} {'mode':7} {'path':8} {'error y':>8} "
    f"{'worst gradient':17} {'fwd+bwd ms':>10}  verdict"
)
VERDICTS = """
exact         mode exact is right to the rounding of its dtype
ok            mode clamped is right: the clamp does not bind
as published  mode clamped is wrong where the clamp binds, which is its definition
refused       one_call says that it cannot hold such a decay, which is right: chunked can
absent        the path cannot run here: the reason stands before it
WRONG FAILED  a fault: please report it"""


def self_check(device: torch.device) -> list[tuple[str, str]]:
    """A row and its verdict for each (decay, dtype, mode, path): errors, time of fwd + bwd."""
    elsewhere = "native" if device.type == "cuda" else "triton"
    paths = [path for path in PATHS if path[1] != elsewhere]
    absent = {name: why for name, why in backends().items() if why != "available"}
    rows = []
    for name, decay in CASES.items():
        for dtype in DTYPES:
            inputs, dy = problem(L=LENGTH, decay=decay, dtype=dtype, device=device)
            right = oracle(inputs, dy)
            for mode, path in paths:
                try:
                    if path in absent:
                        figures, verdict = absent[path], "absent"
                    else:
                        figures, verdict = _row(inputs, dy, right, mode=mode, backend=path)
                except Exception as error:  # whatever keeps a path from running here
                    expected = (name, mode, path) == REFUSED and isinstance(error, ValueError)
                    figures = f"{'':37}" if expected else described(error)
                    verdict = "refused" if expected else "FAILED"
                head = f"{name:6} {DTYPES[dtype]:4} {mode:7} {path:8}"
                rows.append((f"{head} {figures}  {verdict}", verdict))
    return rows


def _row(inputs: SisaInputs, dy: Tensor, right: ValueAndGrads, **choice: str) -> tuple[str, str]:
    """The errors of a path, and its time once it has registered and compiled what it needs."""
    found = value_and_grads(sisa_attention, inputs, dy, **choice)
    start = time.perf_counter()
    value_and_grads(sisa_attention, inputs, dy, **choice)
    if dy.device.type == "cuda":
        torch.cuda.synchronize()
    elapsed = 1e3 * (time.perf_counter() - start)
    errors = relative_errors(found, right)
    is_right = all(error <= ALLOWED[dy.dtype] for error in errors.values())
    error_y = errors.pop("y")
    worst = max(errors, key=lambda name: errors[name])
    if choice["mode"] == "exact":
        verdict = "exact" if is_right else "WRONG"
    else:
        verdict = "ok" if is_right else "as published"
    return f"{error_y:8.1e} {errors[worst]:8.1e} {worst:9} {elapsed:9.1f}", verdict


def _conclusion(verdicts: Counter[str]) -> str:
    """What the rows say together, in one line that a log may end with."""
    bad = verdicts["WRONG"] + verdicts["FAILED"]
    if bad:
        return f"NOT OK: {bad} of {verdicts.total()} rows are wrong or failed"
    return f"OK: all {verdicts.total()} rows are as they should be"


def main() -> int:
    """Print all of it; 0, or 1 where a path is wrong or fails."""
    python = f"Python {platform.python_version()}"
    versions = (f"sisa_kernels {__version__}", f"torch {torch.__version__}", python)
    print("   ".join((*versions, platform.platform())))
    print(f"extension: {_extension.STATE}\n{_extension.build_info()}".strip())
    print(f"cpu: {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads")
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices.append(torch.device("cuda"))
        major, minor = torch.cuda.get_device_capability()
        print(
            f"cuda: {torch.cuda.get_device_name()} (sm_{major}{minor}), CUDA {torch.version.cuda}"
        )
    else:
        print("cuda: no device")
    for name, state in backends(table=True).items():
        print(f"backend {name:18} {state}")
    forced = os.environ.pop("SISA_BACKEND", None)
    if forced:
        print(f"SISA_BACKEND={forced} does not count below: each row is the path that it names")
    verdicts: Counter[str] = Counter()
    for device in devices:
        print(f"\nself-check on {device}, length {LENGTH:,}: ", end="")
        print("relative error against the fp64 oracle of Eq. 2")
        print(COLUMNS)
        for row, verdict in self_check(device):
            print(row)
            verdicts[verdict] += 1
    print(f"{VERDICTS}\n\n{_conclusion(verdicts)}")
    return 1 if verdicts["WRONG"] or verdicts["FAILED"] else 0


if __name__ == "__main__":
    sys.exit(main())
