"""Registers, spills and shared memory of the CUDA kernels, as ptxas reports them.

Needs nvcc, no GPU and no torch with CUDA. For every architecture it compiles csrc/cuda/augment.cu,
prints one row a kernel, and fails if one spills or keeps a stack. Shared memory is what a kernel
asks for by itself; the chunk kernels get theirs at launch, at most 48 KiB. Threads: in as many
blocks as a multiprocessor's registers hold, at most what it runs."""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).parent.parent / "csrc" / "cuda" / "augment.cu"
FLAGS = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-cubin", "-Xptxas", "-v"]
# That a multiprocessor runs (CUDA programming guide).
THREADS = {80: 2048, 86: 1536, 89: 1536, 90: 2048, 100: 2048, 120: 1536}
REGISTERS = 65536  # a multiprocessor has; a warp takes them by eight a thread
BLOCK = 128  # kThreads
BRIEF = {"__nv_bfloat16": "bf16", "__half": "fp16", "float": "fp32", ", ": " -> "}
REPORT = re.compile(
    r"Compiling entry function '(?P<name>\w+)'.*?(?P<stack>\d+) bytes stack frame, "
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?:.*?(?P<shared>\d+) bytes smem)?[^\n]*",
    re.DOTALL,
)


def short(name: str) -> str:
    """A kernel's name and types, from its mangled name."""
    full = subprocess.run(["c++filt", name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"::(\w+)(?:<(.*?)>)?\(", full.replace("(anonymous namespace)", ""))
    kernel, types = found.groups(default="")
    for long, brief in BRIEF.items():
        types = types.replace(long, brief)
    return f"{kernel} {types}".strip()


def compile_for(arch: int) -> list[tuple[str, int, int, int]]:
    """(name, registers and spilled bytes a thread, bytes of shared memory) of each kernel."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["nvcc", *FLAGS, f"-arch=sm_{arch}", str(SOURCE), "-o", f"{folder}/augment.cubin"]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    found = []
    for x in REPORT.finditer(done.stderr):
        spilled = int(x["stack"]) + int(x["stores"]) + int(x["loads"])
        found.append((short(x["name"]), int(x["registers"]), spilled, int(x["shared"] or 0)))
    if not found:
        sys.exit(f"no kernel in what ptxas said:\n{done.stderr}")
    return sorted(found)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90, 100], choices=THREADS)
    args = parser.parse_args()
    if not shutil.which("nvcc"):
        print("skipped: nvcc is not found")
        return
    counts = f"{'registers':>9} {'spilled B':>9} {'shared B':>8} {'threads':>7}"
    print(f"{'arch':>6} {'kernel':28} {counts}")
    faults = 0
    for arch in args.arch:
        for name, registers, spilled, shared in compile_for(arch):
            held = -(-registers // 8) * 8 * BLOCK  # by a block
            threads = min(THREADS[arch], REGISTERS // held * BLOCK)
            faults += spilled > 0
            fault = "  FAULT" if spilled else ""
            counts = f"{registers:9} {spilled:9} {shared:8} {threads:7}"
            print(f"{f'sm_{arch}':>6} {name:28} {counts}{fault}", flush=True)
    sys.exit(f"{faults} faults" if faults else 0)


if __name__ == "__main__":
    main()
