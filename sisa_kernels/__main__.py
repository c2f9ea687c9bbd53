"""``python -m sisa_kernels``: the build, the devices, and every path's error against the oracle."""

import os
import platform
import time

import torch
from torch import Tensor

from sisa_kernels import __version__, _extension, backends, sisa_attention
from sisa_kernels.inputs import SisaInputs
from sisa_kernels.selfcheck import described
from sisa_kernels.testing import ValueAndGrads, oracle, problem, relative_errors, value_and_grads

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CASES = {"weak decay": -5.0, "strong decay": 1.0}
LENGTH = 1000
PATHS = (
    ("exact", "native"),
    ("exact", "triton"),
    ("exact", "chunked"),
    ("exact", "one_call"),
    ("clamped", "one_call"),
)


def self_check(device: torch.device) -> list[str]:
    """One line a (decay, dtype, mode, backend): the errors, and the time of forward + backward."""
    columns = f"{'error of y':>11} {'worst gradient':>22} {'fwd+bwd ms':>11}"
    lines = [f"{'decay':13} {'dtype':9} {'mode':8} {'backend':8} {columns}"]
    elsewhere = "native" if device.type == "cuda" else "triton"
    paths = [path for path in PATHS if path[1] != elsewhere]
    for name, decay in CASES.items():
        for dtype in DTYPES:
            inputs, dy = problem(L=LENGTH, decay=decay, dtype=dtype, device=device)
            right = oracle(inputs, dy)
            for mode, backend in paths:
                head = f"{name:13} {str(dtype)[6:]:9} {mode:8} {backend:8}"
                try:
                    lines.append(f"{head} {_row(inputs, dy, right, mode=mode, backend=backend)}")
                except Exception as error:  # whatever keeps a path from running here
                    lines.append(f"{head} {described(error)}")
    return lines


def _row(inputs: SisaInputs, dy: Tensor, right: ValueAndGrads, **choice: str) -> str:
    """The errors of a path, and its time once it has registered and compiled what it needs."""
    found = value_and_grads(sisa_attention, inputs, dy, **choice)
    start = time.perf_counter()
    value_and_grads(sisa_attention, inputs, dy, **choice)
    if dy.device.type == "cuda":
        torch.cuda.synchronize()
    elapsed = 1e3 * (time.perf_counter() - start)
    errors = relative_errors(found, right)
    error_y = errors.pop("y")
    worst = max(errors, key=lambda name: errors[name])
    return f"{error_y:11.1e} {errors[worst]:12.1e} {worst:>9} {elapsed:11.1f}"


def main() -> None:
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
    for device in devices:
        print(f"\nself-check on {device}, length {LENGTH}: ", end="")
        print("relative error against the fp64 oracle of Eq. 2")
        print("\n".join(self_check(device)))
    print("\nThe clamped rows show what the published formulation loses once g's range passes 22.")


if __name__ == "__main__":
    main()
