"""``python -m sisa_kernels``: the build, the devices, every backend, and each path's error against
the fp64 oracle.
"""

import functools
import os
import platform
import time

import torch

from sisa_kernels import __version__, _extension, backends, sisa_attention
from sisa_kernels.selfcheck import NAMES, described, oracle, problem, relative_errors, results

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CASES = {"weak decay": -5.0, "strong decay": 1.0}
LENGTH = 1000


def self_check(device: torch.device) -> list[str]:
    """One line a (decay, dtype, mode, backend): error of y, the worst gradient's error and name,
    time of forward + backward.
    """
    lines = [
        f"{'decay':13} {'dtype':9} {'mode':8} {'backend':8} {'error of y':>11} {'worst gradient':>22} {'fwd+bwd ms':>11}"
    ]
    paths = [("exact", "sdpa"), ("exact", "flash"), ("clamped", "flash")]
    if device.type == "cuda":
        paths.insert(0, ("exact", "triton"))
    for name, decay in CASES.items():
        for dtype in DTYPES:
            inputs, dy = problem(device, dtype, L=LENGTH, decay=decay)
            right = oracle(inputs, dy)
            for mode, backend in paths:
                head = f"{name:13} {str(dtype)[6:]:9} {mode:8} {backend:8}"
                attend = functools.partial(sisa_attention, mode=mode, backend=backend)
                try:
                    found = results(
                        attend, inputs, dy
                    )  # also pays for what a first call registers and compiles
                except Exception as error:  # whatever keeps a path from running here
                    lines.append(f"{head} {described(error)}")
                    continue
                start = time.perf_counter()
                results(attend, inputs, dy)
                if device.type == "cuda":
                    torch.cuda.synchronize()
                elapsed = 1e3 * (time.perf_counter() - start)
                error_y, *errors = relative_errors(found, right)
                worst, grad = max(zip(errors, NAMES))
                lines.append(f"{head} {error_y:11.1e} {worst:12.1e} {grad:>9} {elapsed:11.1f}")
    return lines


def main() -> None:
    print(
        f"sisa_kernels {__version__}   torch {torch.__version__}   Python {platform.python_version()}   {platform.platform()}"
    )
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
    if forced is not None:
        print(f"SISA_BACKEND={forced} does not count below: each row is the path that it names")
    for device in devices:
        print(
            f"\nself-check on {device}, length {LENGTH}: relative error against the fp64 oracle of Eq. 2"
        )
        print("\n".join(self_check(device)))
    print(
        "\nThe clamped rows show what the published formulation loses once the range of g passes 22."
    )


if __name__ == "__main__":
    main()
