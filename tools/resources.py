"""What the Triton kernels take of a GPU, compiled ahead of time for GPUs that are not there.

For every architecture, width and importance width it compiles the three kernels with the tiles of
sisa_kernels/triton/tiles.py, for one document and a key head for every query head, and for packed
documents and four query heads a key head, and prints a row each: registers, spilled bytes, shared
memory, instructions of a step of each loop (near, diagonal, far), and global loads in the program,
16 bytes at a time into shared memory ahead of their use, and 2 bytes at a time. The first widths
are compiled with a v of an odd token stride too, which shows the cost: the wrapper copies such a v.

It fails if a kernel needs more shared memory than its chip has, spills within a loop, or outside
more than SPILLED_OUTSIDE (but for the safe rows, which fp32 takes), loads single numbers of aligned
operands, or on sm_90 multiplies without wgmma or has its wgmma serialised (ptxas C7515)."""

import argparse
import contextlib
import io
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton import knobs
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
FP32 = ("lam", "lse", "delta", "dc", "db", "d_diagonal", "far_lse")
INT32 = ("level", "horizon_start", "horizon_end", "first", "last", "flags")
IMPORTANCE = ("c", "b", "near_b", "near_c", "level", "lam", *INT32[1:3], "dc", "db", "d_diagonal")
FAR = ("far_y", "far_lse", "far_dq", "far_dk", "far_dv")
VARIANTS = ("plain", "packed", "flagged", "band", "odd v")
BAND = 256  # tokens
# KiB a block may have (CUDA programming guide, compute capabilities).
KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
SHARED_MEMORY = {arch: kib << 10 for arch, kib in KIB.items()}
BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# Bytes of a thread, addresses and sizes, that may be put by once a program, where no loop over
# tiles touches them: sm_80, sm_86 and sm_89 need them for packed documents with shared key heads.
SPILLED_OUTSIDE = 128
WAIT = 16  # instructions of a loop that only waits, at most


@dataclass(frozen=True)
class Job:
    """One kernel to compile."""

    arch: int
    dtype: torch.dtype
    width: int
    d_state: int
    kernel: str
    variant: str

    @property
    def tiles(self) -> Any:
        return table_tiles((self.arch // 10, self.arch % 10), self.dtype, self.width, self.d_state)

    @property
    def tile(self) -> Tile:
        return getattr(self.tiles, self.kernel)


class Report(NamedTuple):
    """What ptxas made of it."""

    registers: int
    spilled: int
    shared: int
    product: str
    loops: list[int]
    spilled_in_loops: bool
    wide_loads: int
    narrow_loads: int
    serialised: bool


def constants(job: Job) -> dict[str, Any]:
    """The kernel's compile-time arguments."""
    tile = job.tile
    packed = job.variant == "packed"
    blocks = {"BH": job.width, "BV": job.width, "BS": max(16, job.d_state)}
    sizes = {"BM": tile.m, "BN": tile.n, "BD": tile.diagonal}
    widths = {"DH": job.width, "DV": job.width, "DS": job.d_state}
    flags = {"IMPORTANCE": job.d_state > 0, "PACKED": packed, "REPEAT": 4 if packed else 1}
    band = job.variant == "band"
    flags |= {"WANTED": 0, "WINDOW": BAND if band else 0}
    absent = [*(() if packed else ("first", "last")), *(() if job.d_state else IMPORTANCE)]
    absent += [*(() if band else FAR), *(() if band or job.variant == "flagged" else ("flags",))]
    return flags | blocks | sizes | widths | dict.fromkeys(absent)


def argument_type(name: str, dtype: torch.dtype) -> str:
    """Of a kernel's argument by its name, as Triton writes types."""
    if name == "scale":
        return "fp32"
    if name in ("L", "H") or re.fullmatch("[qkv]_[blh]", name):
        return "i32"
    if name in INT32:
        return "*i32"
    return "*fp32" if name in FP32 else f"*{TYPES[dtype]}"


def compiled(job: Job) -> tuple[Any, str]:
    """The kernel as a launch would specialise it, and what ptxas says of it."""
    kernel = KERNELS[job.kernel]
    known = constants(job)
    unaligned = {"scale", "L", "H"} | ({"v_l"} if job.variant == "odd v" else set())
    signature, constexprs, attributes = {}, {}, {}
    for i, argument in enumerate(kernel.arg_names):
        if argument in known:
            signature[argument] = "constexpr"
            constexprs[(i,)] = known[argument]
            continue
        signature[argument] = argument_type(argument, job.dtype)
        if argument not in unaligned:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attributes)
    options = {"num_warps": job.tile.warps, "num_stages": job.tile.stages}
    knobs.compilation.always_compile = True  # from the cache ptxas would say nothing
    knobs.nvidia.dump_ptxas_log = True
    with contextlib.redirect_stdout(io.StringIO()) as said:
        binary = triton.compile(source, target=GPUTarget("cuda", job.arch, 32), options=options)
    return binary, said.getvalue()


def disassembled(cubin: bytes, *command: str) -> str:
    """What one of Triton's own binary tools prints of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = [str(BINARIES / command[0]), *command[1:], file.name]
        return subprocess.run(tool, capture_output=True, text=True, check=True).stdout


def innermost_loops(sass: str) -> list[list[str]]:
    """The instructions of each, in order: between a label and a branch back to it."""
    instructions: list[str] = []
    labels = {}
    loops = []
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L\S+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            target = re.search(r"\bBRA\b.*`\((\.L\S+)\)", instruction[1])
            start = labels.get(target[1]) if target else None
            # A branch to itself is the end of the program.
            if start is not None and start < len(instructions):
                loops.append((start, len(instructions)))
            instructions.append(instruction[1])
    inner = [
        (start, end)
        for start, end in loops
        if not any(start <= s and e < end for s, e in loops if (s, e) != (start, end))
    ]
    # A few instructions: a wait for a barrier.
    return [instructions[start : end + 1] for start, end in inner if end - start > WAIT]


def report(job: Job) -> Report:
    """Compile it and read the result."""
    binary, said = compiled(job)
    cubin = binary.asm["cubin"]
    usage = disassembled(cubin, "cuobjdump", "--dump-resource-usage")
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    ptx = binary.asm["ptx"]
    loops = innermost_loops(disassembled(cubin, "nvdisasm", "-c"))
    return Report(
        registers=registers,
        spilled=stack,
        shared=binary.metadata.shared,
        product=next((one for one in PRODUCTS if one in ptx), "none"),
        loops=[len(loop) for loop in loops],
        spilled_in_loops=any(re.search(r"\b(LDL|STL)\b", line) for loop in loops for line in loop),
        wide_loads=len(re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*, 0x10\b", ptx)),
        narrow_loads=len(re.findall(r"ld\.global\S*\.[bu]16\b", ptx)),
        serialised="C7515" in said,
    )


def faults(job: Job, found: Report) -> Iterator[str]:
    """What is wrong with it."""
    if found.shared > SHARED_MEMORY[job.arch]:
        yield "too much shared memory"
    safe = any(job.tiles is row for _, _, row in SAFE)
    spills = found.spilled_in_loops or found.spilled > SPILLED_OUTSIDE
    if spills and not safe and job.variant != "odd v":
        yield "spills"
    if found.narrow_loads and job.variant != "odd v":
        yield "loads single numbers"
    if job.arch == 90 and job.dtype != torch.float32:
        if found.product != "wgmma":
            yield "no wgmma"
        if found.serialised and job.variant != "odd v":
            yield "serialised wgmma"


def row_of(job: Job) -> tuple[str, int]:
    """A kernel's row of the table, and how much is wrong with it."""
    found = report(job)
    tile = job.tile
    wrong = list(faults(job, found))
    shape = f"{tile.m}x{tile.n} ({tile.diagonal}), {tile.warps}, {tile.stages}"
    what = (
        f"{f'sm_{job.arch}':>6} {job.width:4} {job.d_state:4} {job.kernel:8} {job.variant:7} "
        f"{shape:20}"
    )
    takes = f"{found.registers:9} {found.spilled:9} {found.shared:8}"
    loads = f"{found.wide_loads:5} {found.narrow_loads:4}"
    steps = "/".join(map(str, found.loops))
    fault = f"  FAULT: {', '.join(wrong)}" if wrong else ""
    return f"{what} {takes} {steps:>15} {loads}  {found.product}{fault}", len(wrong)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--arch", type=int, nargs="+", default=list(SHARED_MEMORY), choices=SHARED_MEMORY)
    add("--widths", type=int, nargs="+", default=[64], choices=WIDTHS)
    add("--d-states", type=int, nargs="+", default=[0, 16, 64], choices=[0, *WIDTHS])
    add("--dtype", default="bf16", choices=sorted(TYPES.values()))
    add("--variants", nargs="+", default=["plain", "packed"], choices=VARIANTS)
    add("--all", action="store_true", help="every width: half an hour on two cores")
    add("--jobs", type=int, default=os.cpu_count(), help="compiled at a time")
    args = parser.parse_args()
    if kernels.INTERPRETED:
        sys.exit("TRITON_INTERPRET is set: the interpreter compiles nothing")
    dtype = next(dtype for dtype, name in TYPES.items() if name == args.dtype)
    widths = WIDTHS if args.all else args.widths
    d_states = [0, *WIDTHS] if args.all else args.d_states
    jobs = [
        Job(arch, dtype, width, d_state, kernel, variant)
        for arch, width, d_state, kernel, variant in product(
            args.arch, widths, d_states, KERNELS, args.variants
        )
    ]
    if "odd v" not in args.variants:
        jobs += [Job(arch, dtype, widths[0], d_states[0], "forward", "odd v") for arch in args.arch]
    print(f"triton {triton.__version__}, {args.dtype}; tile: queries x keys (on the diagonal), ...")
    counts = f"{'registers':>9} {'spilled B':>9} {'shared B':>8} {'near/diag/far':>15} 16 B  2 B"
    columns = f"{'arch':>6} {'Dh':>4} {'Ds':>4} {'kernel':8} {'variant':7} {'tile':20}"
    print(f"{columns} {counts}  products")
    total = 0
    with ProcessPoolExecutor(args.jobs) as pool:
        for row, wrong in pool.map(row_of, jobs):
            total += wrong
            print(row, flush=True)
    sys.exit(f"{total} faults" if total else 0)


if __name__ == "__main__":
    main()
