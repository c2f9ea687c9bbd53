"""Registers, spills and shared memory of the Triton kernels, compiled ahead of time: no GPU needed.

For every architecture, width and importance width it compiles the three kernels with the tiles of
sisa_kernels/triton/tiles.py, prints one row a kernel, and fails if one needs more shared memory
than its chip has, spills (but for the safe rows, which fp32 takes), or on Hopper multiplies without
wgmma.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sisa_kernels.triton import kernels
from sisa_kernels.triton.tiles import SAFE, Tile, table_tiles

KERNELS = {
    "forward": kernels.forward_kernel,
    "query": kernels.backward_query_kernel,
    "key": kernels.backward_key_kernel,
}
PRODUCTS = ("wgmma", "tcgen05.mma", "mma.sync", "fma")  # as PTX calls them
WIDTHS = [16, 32, 64, 128]
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
FP32 = ("g_hi", "g_lo", "lam", "lse", "delta", "dc", "db", "d_diagonal")
INT32 = ("horizon_start", "horizon_end")
IMPORTANCE = ("c", "b", "g_hi", "g_lo", "lam", *INT32, "dc", "db", "d_diagonal")
# KiB a block may have (CUDA programming guide, compute capabilities).
KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
SHARED_MEMORY = {arch: kib << 10 for arch, kib in KIB.items()}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def constants(tile: Tile, Dh: int, Ds: int) -> dict[str, Any]:
    """Compile-time arguments of one document, one query head a key head; without Ds: plain."""
    blocks = {"BH": Dh, "BV": Dh, "BS": max(16, Ds)}
    sizes = {"BM": tile.m, "BN": tile.n, "BD": tile.diagonal, "DH": Dh, "DV": Dh, "DS": Ds}
    absent = ("first", "last") if Ds else ("first", "last", *IMPORTANCE)
    flags = {"IMPORTANCE": Ds > 0, "PACKED": False, "REPEAT": 1}
    return flags | blocks | sizes | dict.fromkeys(absent)


def argument_type(name: str, dtype: torch.dtype) -> str:
    """Of a kernel's argument by its name, as Triton writes types."""
    if name == "scale":
        return "fp32"
    if name in ("L", "H") or re.fullmatch("[qkv]_[blh]", name):
        return "i32"
    if name in INT32:
        return "*i32"
    return "*fp32" if name in FP32 else f"*{TYPES[dtype]}"


def compile_kernel(name: str, arch: int, dtype: torch.dtype, Dh: int, Ds: int, tile: Tile) -> Any:
    """The kernel for sm_<arch> as a launch would specialise it: aligned pointers and strides."""
    kernel = KERNELS[name]
    known = constants(tile, Dh, Ds)
    signature, constexprs, attributes = {}, {}, {}
    for i, argument in enumerate(kernel.arg_names):
        if argument in known:
            signature[argument] = "constexpr"
            constexprs[(i,)] = known[argument]
            continue
        signature[argument] = argument_type(argument, dtype)
        if argument not in ("scale", "L", "H"):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attributes)
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def resources(compiled: Any) -> tuple[int, int, int]:
    """(registers a thread, bytes of stack a thread: spills, bytes of shared memory a block)."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [CUOBJDUMP, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    return registers, stack, compiled.metadata.shared


def row_of(name: str, arch: int, dtype: torch.dtype, width: int, d_state: int) -> tuple[str, bool]:
    """A kernel's row with the tiles of the table, and whether something is wrong with it."""
    tiles = table_tiles((arch // 10, arch % 10), dtype, width, d_state)
    tile = getattr(tiles, name)
    compiled = compile_kernel(name, arch, dtype, width, d_state, tile)
    registers, spilled, shared = resources(compiled)
    ptx = compiled.asm["ptx"]
    product = next((one for one in PRODUCTS if one in ptx), "none")
    safe = any(tiles is row for _, _, row in SAFE)
    wrong = (
        shared > SHARED_MEMORY[arch]
        or (spilled > 0 and not safe)
        or (arch == 90 and dtype != torch.float32 and product != "wgmma")
    )
    shape = f"{tile.m}x{tile.n} ({tile.diagonal}), {tile.warps}, {tile.stages}"
    what = f"{f'sm_{arch}':>6} {width:4} {d_state:4} {name:8} {shape:20}"
    fault = "  FAULT" if wrong else ""
    return f"{what} {registers:9} {spilled:9} {shared:8}  {product}{fault}", wrong


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--arch", type=int, nargs="+", default=[80, 90, 100], choices=SHARED_MEMORY)
    add("--widths", type=int, nargs="+", default=[64], choices=WIDTHS)
    add("--d-states", type=int, nargs="+", default=[0, *WIDTHS], choices=[0, *WIDTHS])
    add("--dtype", default="bf16", choices=sorted(TYPES.values()))
    args = parser.parse_args()
    if kernels.INTERPRETED:
        sys.exit("TRITON_INTERPRET is set: the interpreter compiles nothing")
    dtype = next(dtype for dtype, name in TYPES.items() if name == args.dtype)
    tile = "tile: queries x keys (on the diagonal), warps, stages"
    print(f"triton {triton.__version__}, {args.dtype}; {tile}")
    counts = f"{'registers':>9} {'spilled B':>9} {'shared B':>8}  products"
    print(f"{'arch':>6} {'Dh':>4} {'Ds':>4} {'kernel':8} {'tile':20} {counts}")
    faults = 0
    for arch in args.arch:
        for width in args.widths:
            for d_state in args.d_states:
                for name in KERNELS:
                    row, wrong = row_of(name, arch, dtype, width, d_state)
                    faults += wrong
                    print(row, flush=True)
    sys.exit(f"{faults} faults" if faults else 0)


if __name__ == "__main__":
    main()
