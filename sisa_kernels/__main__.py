"""``python -m sisa_kernels``: the build, the devices, every backend, and each path's error against the fp64 oracle."""

import platform
import time

import torch

from . import __version__, _extension, backends, reference, sisa_attention

NAMES = ("q", "k", "v", "b", "c", "log_decay", "theta", "lam")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CASES = {"weak decay": -5.0, "strong decay": 1.0}


def problem(decay: float, dtype: torch.dtype, device: torch.device, length: int = 1000) -> tuple[list[torch.Tensor], torch.Tensor]:
    """A random problem (2 heads, Dh 64, Ds 16) whose decay is softplus(decay + noise) a token: (q .. lam, dL/dy)."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    wide = [normal(1, length, 2, size) for size in (64, 64, 64, 16, 16)]
    log_decay = -torch.nn.functional.softplus(decay + 0.5 * normal(1, length, 2))
    narrow = [log_decay, 0.3 * normal(1, length, 2, 8), torch.full((2,), 0.3133)]
    inputs = [x.to(device, dtype) for x in wide] + [x.to(device) for x in narrow]
    return [x.requires_grad_() for x in inputs], normal(1, length, 2, 64).to(device, dtype)


def relative_error(x: torch.Tensor, oracle: torch.Tensor) -> float:
    """|x - oracle| / |oracle| over the whole tensor, in fp64."""
    return ((x.double() - oracle).norm() / oracle.norm()).item()


def self_check(device: torch.device) -> list[str]:
    """One line a (decay, dtype, mode, backend): error of y, the worst gradient's error and name, time of forward + backward."""
    lines = [f"{'decay':13} {'dtype':9} {'mode':8} {'backend':8} {'error of y':>11} {'worst gradient':>22} {'fwd+bwd ms':>11}"]
    for name, decay in CASES.items():
        for dtype in DTYPES:
            inputs, dy = problem(decay, dtype, device)
            exact = [x.detach().double().requires_grad_() for x in inputs]
            sisa_attention(*inputs)  # the first call of an op pays for its registration
            y_ref = reference.sisa_attention(*exact)
            grads_ref = torch.autograd.grad(y_ref, exact, dy.double())
            for mode, backend in (("exact", "sdpa"), ("exact", "flash"), ("clamped", "flash")):
                head = f"{name:13} {str(dtype)[6:]:9} {mode:8} {backend:8}"
                start = time.perf_counter()
                try:
                    y = sisa_attention(*inputs, mode=mode, backend=backend)
                except ValueError as error:
                    lines.append(f"{head} {str(error).split(';')[0]}")
                    continue
                grads = torch.autograd.grad(y, inputs, dy)
                elapsed = 1e3 * (time.perf_counter() - start)
                worst, grad = max((relative_error(x, r), n) for x, r, n in zip(grads, grads_ref, NAMES))
                lines.append(f"{head} {relative_error(y, y_ref):11.1e} {worst:12.1e} {grad:>9} {elapsed:11.1f}")
    return lines


def main() -> None:
    print(f"sisa_kernels {__version__}   torch {torch.__version__}   Python {platform.python_version()}   {platform.platform()}")
    print(f"extension: {_extension.STATE}\n{_extension.build_info()}".strip())
    print(f"cpu: {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads")
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices.append(torch.device("cuda"))
        major, minor = torch.cuda.get_device_capability()
        print(f"cuda: {torch.cuda.get_device_name()} (sm_{major}{minor}), CUDA {torch.version.cuda}")
    else:
        print("cuda: no device")
    for name, state in backends().items():
        print(f"backend {name:10} {state}")
    for device in devices:
        print(f"\nself-check on {device}, length 1000: relative error against the fp64 oracle of Eq. 2")
        print("\n".join(self_check(device)))
    print("\nThe clamped rows show what the published formulation loses once the range of g passes 22.")


if __name__ == "__main__":
    main()
