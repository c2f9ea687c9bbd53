"""Registers, spills and shared memory of the Triton kernels, compiled ahead of time: no GPU needed.

For every architecture, width and importance width it compiles the three kernels with the tiles of
sisa_kernels/tiles.py, prints one row a kernel, and fails if one needs more shared memory than its
chip has, spills (but for the safe rows, which fp32 takes), or on Hopper multiplies without wgmma.
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

from sisa_kernels.triton import op as ta
from sisa_kernels.triton.tiles import SAFE, Tile, table_tiles

KERNELS = {
    "forward": ta.forward_kernel,
    "query": ta.backward_query_kernel,
    "key": ta.backward_key_kernel,
}
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
FP32 = ("g_hi", "g_lo", "lam", "lse", "delta", "dc", "db", "own")
IMPORTANCE = ("c", "b", "g_hi", "g_lo", "lam", "near", "dc", "db", "own")
# Bytes a block may have (CUDA programming guide, compute capabilities).
SHARED_MEMORY = {
    80: 163 << 10,
    86: 99 << 10,
    89: 99 << 10,
    90: 227 << 10,
    100: 227 << 10,
    120: 99 << 10,
}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def compile_kernel(name: str, arch: int, dtype: torch.dtype, Dh: int, Ds: int, tile: Tile) -> Any:
    """The kernel for sm_<arch> as a launch would specialise it: aligned pointers and strides, one
    query head a key head.
    """
    kernel = KERNELS[name]
    blocks = {
        "BH": Dh,
        "BV": Dh,
        "BS": max(16, Ds),
        "BM": tile.m,
        "BN": tile.n,
        "BD": tile.diagonal,
    }
    constants = {
        "IMPORTANCE": Ds > 0,
        "PACKED": False,
        "DH": Dh,
        "DV": Dh,
        "DS": Ds,
        "REPEAT": 1,
        **blocks,
    }
    constants |= dict.fromkeys(("first", "last") if Ds else ("first", "last", *IMPORTANCE))
    signature, constexprs, attributes = {}, {}, {}
    for i, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
            constexprs[(i,)] = constants[argument]
        elif argument == "scale":
            signature[argument] = "fp32"
        elif argument in ("L", "H"):
            signature[argument] = "i32"
        else:
            stride = re.fullmatch("[qkv]_[blh]", argument)
            pointer = (
                "*i32"
                if argument == "near"
                else "*fp32"
                if argument in FP32
                else f"*{TYPES[dtype]}"
            )
            signature[argument] = "i32" if stride else pointer
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attributes)
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def resources(compiled: Any) -> tuple[int, int, int]:
    """(registers a thread, bytes of stack a thread: spilled registers, bytes of shared memory a
    block).
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [CUOBJDUMP, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    return registers, stack, compiled.metadata.shared


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90, 100], choices=SHARED_MEMORY)
    parser.add_argument("--widths", type=int, nargs="+", default=[64], choices=[16, 32, 64, 128])
    parser.add_argument(
        "--state-widths",
        type=int,
        nargs="+",
        default=[0, 16, 32, 64, 128],
        choices=[0, 16, 32, 64, 128],
    )
    parser.add_argument("--dtype", default="bf16", choices=sorted(TYPES.values()))
    args = parser.parse_args()
    if ta.INTERPRETED:
        sys.exit("TRITON_INTERPRET is set: the interpreter compiles nothing")
    dtype = next(dtype for dtype, name in TYPES.items() if name == args.dtype)
    print(
        f"triton {triton.__version__}, {args.dtype}; tile: queries x keys (on the diagonal), warps, stages"
    )
    print(
        f"{'arch':>6} {'Dh':>4} {'Ds':>4} {'kernel':8} {'tile':20} {'registers':>9} {'spilled B':>9} {'shared B':>8}  products"
    )
    faults = 0
    for arch in args.arch:
        for width in args.widths:
            for state_width in args.state_widths:
                for name in KERNELS:
                    row = table_tiles((arch // 10, arch % 10), dtype, width, state_width)
                    tile = getattr(row, name)
                    compiled = compile_kernel(name, arch, dtype, width, state_width, tile)
                    registers, spilled, shared = resources(compiled)
                    ptx = compiled.asm["ptx"]
                    products = next(
                        (x for x in ("wgmma", "tcgen05.mma", "mma.sync", "fma") if x in ptx), "none"
                    )
                    safe = any(row is tiles for _, _, tiles in SAFE)
                    wrong = shared > SHARED_MEMORY[arch] or (spilled > 0 and not safe)
                    wrong |= arch == 90 and dtype != torch.float32 and products != "wgmma"
                    faults += wrong
                    shape = f"{tile.m}x{tile.n} ({tile.diagonal}), {tile.warps}, {tile.stages}"
                    line = f"{f'sm_{arch}':>6} {width:4} {state_width:4} {name:8} {shape:20} {registers:9} {spilled:9} {shared:8}"
                    print(f"{line}  {products}{'  FAULT' if wrong else ''}", flush=True)
    sys.exit(f"{faults} faults" if faults else 0)


if __name__ == "__main__":
    main()
