"""What the Triton kernels take of a GPU, compiled ahead of time for GPUs that are not there.

It compiles ``KERNELS``, those of attention, those before and after it and that of cross entropy,
for every architecture, width, importance width and variant, with the tiles of
sisa_kernels/triton/tiles.py, and prints a row each: registers, spilled bytes, shared memory,
instructions of a step of each loop (near, diagonal, far; of the kernels around attention as they
come), and global loads in the program, 16 bytes at a time into shared memory ahead of their use,
and 2 bytes at a time. Variants: packed documents, four query heads a key head (gqa), both; launches
of flagged heads, of a band, for the forms on stock kernels; and, of the first widths, a v of an odd
token stride, which shows the cost: the wrapper copies such a v. What goes before and after
attention takes the first width, and once an importance width, ODD, whose rows do not begin at 16
bytes.

It fails if a kernel needs more shared memory than its chip has, spills within a loop or, outside,
more than tools/spills.csv holds for it and this Triton (the safe rows of the tiles, which fp32
takes, may), loads single numbers of aligned operands, or on sm_90 multiplies without wgmma or has
its wgmma serialised (ptxas C7515).

Another Triton: ``pip install --no-deps --target FOLDER triton==3.6.0``, and ``--triton FOLDER``."""

import argparse
import contextlib
import csv
import functools
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, product
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sisa_kernels.triton import (
    cross_entropy,
    epilogue_kernels,
    horizon_kernels,
    kernels,
    prologue_kernels,
    wide,
    wide_kernels,
)
from sisa_kernels.triton.prologue import TOKENS, block_of, pairs_of_program, rows_of_program
from sisa_kernels.triton.tiles import SAFE, Tile, Tiles, table_tiles

PRODUCTS = ("wgmma", "tcgen05.mma", "mma.sync", "fma")  # as PTX calls them
WIDTHS = [64, 16, 32, 128]  # the first is that of the kernels around attention
ODD = 34
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
FP32 = ("lam", "lse", "delta", "dc", "db", "d_diagonal", "far_lse")
SIZES = ("L", "H", "G", "count", "terms", "tolerance")
INT32 = ("level", "horizon_start", "horizon_end", "first", "last", "flags")
IMPORTANCE = ("c", "b", "near_b", "near_c", "level", "lam", *INT32[1:3], "dc", "db", "d_diagonal")
FAR = ("far_y", "far_lse", "far_dq", "far_dk", "far_dv")  # what a band continues
BAND = 256  # tokens


class Variant(NamedTuple):
    """What a launch is compiled for beside its widths."""

    packed: bool = False
    repeat: int = 1  # query heads a key head
    flagged: bool = False
    band: bool = False


VARIANTS = {
    "plain": Variant(),
    "packed": Variant(packed=True),
    "gqa": Variant(repeat=4),
    "packed+gqa": Variant(packed=True, repeat=4),
    "flagged": Variant(flagged=True),
    "band": Variant(flagged=True, band=True),
    "band+gqa": Variant(repeat=4, flagged=True, band=True),
    "odd v": Variant(),
}
# KiB a block may have (CUDA programming guide, compute capabilities).
KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
SHARED_MEMORY = {arch: kib << 10 for arch, kib in KIB.items()}
BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# Bytes of a thread (addresses, sizes) that are put by once a program, where no loop touches them.
SPILLS = Path(__file__).parent / "spills.csv"
KEY = ("triton", "arch", "dtype", "Dh", "Ds", "kernel", "variant")
WAIT = 16  # instructions of a loop that only waits, at most


@dataclass(frozen=True)
class Kernel:
    """A kernel to compile: a line in ``KERNELS``.

    What its arguments' names say need not be given: ``constants`` and ``types`` are for names of
    its own, and override the others'. A constant may be a function of the job."""

    function: Any
    tile: str = ""  # whose tile of sisa_kernels.triton.tiles.Tiles it runs on
    fixed: Tile | None = None  # its tile, where it runs on none of them
    constants: Mapping[str, Any] = field(default_factory=dict)  # compile-time arguments
    types: Mapping[str, str] = field(default_factory=dict)  # of arguments, as Triton writes them
    importance: bool = False  # compiled for d_s > 0 alone
    loops: tuple[str, ...] = ("near", "diagonal", "far")  # in the program's order
    narrow_loads: int = 0  # of single numbers that it makes once a program
    unaligned: tuple[str, ...] = ()  # arguments of its own that 16 need not divide

    def tile_of(self, tiles: Tiles) -> Tile:
        return self.fixed or getattr(tiles, self.tile)


ATTENTION = {
    "forward": Kernel(kernels.forward_kernel, "forward"),
    "query": Kernel(kernels.backward_query_kernel, "query"),
    "key": Kernel(kernels.backward_key_kernel, "key"),
}

# What runs before and after them: 4 warps a chunk of tokens, strides of one channel.
CHUNK = Tile(prologue_kernels.CHUNK, 2 * prologue_kernels.PAIRS, warps=4, stages=3, diagonal=16)
ONE = dict.fromkeys([f"{name}_d" for name in ("q", "k", "b", "c", "t", "x", "y", "cos", "sin")], 1)
ROPE = {
    "C": lambda job: job.width // 2,
    "BLOCK": lambda job: block_of(job.width // 2),
    "ROWS": lambda job: rows_of_program(job.width),
}
CHANNELS = {
    "C": lambda job: job.d_state // 2,
    "BLOCK": lambda job: pairs_of_program(job.d_state // 2),
    "CHUNK": CHUNK.m,
    "UNIT": 4,
    "a_h": 1,
    "lam_h": 1,
}
FOLD = {
    "KEYS": lambda job: job.tiles.forward.n,
    "QUERIES": lambda job: job.tiles.forward.n,
    "BACKWARD": False,
    "near_c": None,
    "phase": None,
}
REFOLD = {
    "KEYS": lambda job: job.tiles.query.n,
    "QUERIES": lambda job: job.tiles.key.m,
    "BACKWARD": True,
}
STARTS = {
    "START_M": lambda job: job.tiles.forward.m,
    "START_N": lambda job: job.tiles.forward.n,
    "END_M": 0,
    "END_N": 0,
    "ends": None,
}
BOTH = {
    "START_M": lambda job: job.tiles.query.m,
    "START_N": lambda job: job.tiles.query.n,
    "END_M": lambda job: job.tiles.key.m,
    "END_N": lambda job: job.tiles.key.n,
    "reach": None,
}
WIDE = {
    "DX": lambda job: job.width,
    "DY": lambda job: job.d_state,
    "BX": lambda job: block_of(job.width),
    "BY": lambda job: block_of(job.d_state),
    "ROWS": wide.ROWS,
}
FP32_STEPS = dict.fromkeys(("log_decay", "theta", "fraction", "square_b", "square_c"), "*fp32")
FP32_SUMS = dict.fromkeys(("decay_sums", "phase_sums", "lam_sums"), "*fp32")
STEPS = FP32_STEPS | {"decay_sums": "*i64", "phase_sums": "*i64", "phase": "*i32"}
STEPS |= {"lam_out": "*fp32", "starts": "*i32", "ends": "*i32", "reach": "*i32"}
BACK = FP32_STEPS | FP32_SUMS | dict.fromkeys(("dlog_decay", "dtheta", "dlam"), "*fp32")
TABLES = {"cos": "*fp32", "sin": "*fp32", "cos_l": "i32", "sin_l": "i32"}


def around(
    function: Any, constants: Mapping[str, Any], types: Mapping[str, str], importance: bool = True
) -> Kernel:
    """One of the kernels before or after attention."""
    constants = ONE | dict(constants)
    return Kernel(function, "", CHUNK, constants, types, importance, loops=())


AROUND = {
    "documents": around(
        prologue_kernels.documents_kernel,
        {"TOKENS": TOKENS},
        {"bounds": "*i64", "first": "*i32", "last": "*i32"},
        importance=False,
    ),
    "rotary": around(
        prologue_kernels.rotary_kernel, ROPE | {"INVERSE": False}, TABLES, importance=False
    ),
    "sums": around(prologue_kernels.sums_kernel, CHANNELS, STEPS),
    "fold": around(prologue_kernels.fold_kernel, CHANNELS | FOLD, STEPS),
    "refold": around(prologue_kernels.fold_kernel, CHANNELS | REFOLD, STEPS),
    "horizon": around(horizon_kernels.horizon_kernel, STARTS, STEPS),
    "horizons": around(horizon_kernels.horizon_kernel, BOTH, STEPS),
    "delta": around(
        epilogue_kernels.row_products_kernel,
        {
            "WIDTH": lambda job: job.width,
            "BLOCK": lambda job: job.width,
            "ROWS": lambda job: rows_of_program(job.width),
        },
        {"out": "*fp32"},
        importance=False,
    ),
    "widen_q": around(wide_kernels.widen_kernel, WIDE, {}),
    "widen_k": around(wide_kernels.widen_kernel, WIDE | {"lam": None}, {}),
    "narrow_q": around(wide_kernels.narrow_kernel, WIDE, {"dy": "*fp32"}),
    "narrow_k": around(wide_kernels.narrow_kernel, WIDE | {"lam": None}, {"dy": "*fp32"}),
    "products": around(epilogue_kernels.products_kernel, CHANNELS, BACK | {"phase": "*i32"}),
    "reverse": around(epilogue_kernels.reverse_sums_kernel, CHANNELS, BACK),
}


def of_loss(function: Any, constants: Mapping[str, Any], narrow_loads: int) -> Kernel:
    """One of cross entropy's kernels."""
    return Kernel(
        function,
        fixed=replace(CHUNK, warps=cross_entropy.WARPS),
        constants={"BLOCK": cross_entropy.BLOCK, **constants},
        types=dict.fromkeys(("stride", "width", "vocab", "ignored"), "i32")
        | dict.fromkeys(("targets", "at"), "*i64")
        | dict.fromkeys(("losses", "sums", "log_sums"), "*fp32"),
        unaligned=("vocab", "ignored"),
        loops=(),
        narrow_loads=narrow_loads,
    )


LOSS = {
    "cross_entropy": of_loss(cross_entropy._kernel, {"GRADIENT": True}, 1),  # the target's logit
    "softmax_sums": of_loss(cross_entropy._sums_kernel, {}, 1),
    "softmax_gradient": of_loss(cross_entropy._gradient_kernel, {}, 0),
}
KERNELS = ATTENTION | AROUND | LOSS


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
    def tiles(self) -> Tiles:
        return table_tiles((self.arch // 10, self.arch % 10), self.dtype, self.width, self.d_state)

    @property
    def tile(self) -> Tile:
        return KERNELS[self.kernel].tile_of(self.tiles)


# Instructions that a roofline counts apart from their issue.
CLASSES = {
    "products": "HGMMA|HMMA|UTC[A-Z]*MMA",
    "exp2": "MUFU",
    "shared": "LDS|STS|LDSM|STSM",
    "global": "LDG|STG|LDGSTS|UTMALDG",
}


@dataclass(frozen=True)
class Loop:
    """Instructions of one step."""

    name: str
    instructions: int
    classes: dict[str, int]
    spills: bool


@dataclass(frozen=True)
class Report:
    """What ptxas made of it."""

    registers: int
    spilled: int  # bytes of a thread
    shared: int  # bytes of a block
    product: str
    loops: list[Loop]
    wide_loads: int
    narrow_loads: int
    serialised: bool


def constants(job: Job) -> dict[str, Any]:
    """The kernel's compile-time arguments, of those that the attention kernels have."""
    tile = job.tile
    variant = VARIANTS[job.variant]
    blocks = {"BH": job.width, "BV": job.width, "BS": max(16, job.d_state)}
    sizes = {"BM": tile.m, "BN": tile.n, "BD": tile.diagonal}
    widths = {"DH": job.width, "DV": job.width, "DS": job.d_state}
    flags = {"IMPORTANCE": job.d_state > 0, "PACKED": variant.packed, "REPEAT": variant.repeat}
    flags |= {"WANTED": 0, "WINDOW": BAND if variant.band else 0}
    absent = [] if variant.packed or job.kernel == "documents" else ["first", "last"]
    absent += [] if job.d_state else IMPORTANCE
    absent += [] if variant.band else FAR
    absent += [] if variant.flagged else ["flags"]
    known = flags | blocks | sizes | widths | dict.fromkeys(absent)
    own = KERNELS[job.kernel].constants.items()
    return known | {name: value(job) if callable(value) else value for name, value in own}


def argument_type(name: str, dtype: torch.dtype) -> str:
    """Of a kernel's argument by its name, as Triton writes types."""
    if name == "scale":
        return "fp32"
    if name in SIZES or re.fullmatch("[a-z]_[blh]", name):
        return "i32"
    if name in INT32:
        return "*i32"
    return "*fp32" if name in FP32 else f"*{TYPES[dtype]}"


def compiled(job: Job) -> tuple[Any, str]:
    """The kernel as a launch would specialise it, and what ptxas says of it."""
    kernel = KERNELS[job.kernel]
    known = constants(job)
    unaligned = {"scale", *SIZES, *kernel.unaligned, *(["v_l"] if job.variant == "odd v" else [])}
    signature, constexprs, attributes = {}, {}, {}
    for i, argument in enumerate(kernel.function.arg_names):
        if argument in known:
            signature[argument] = "constexpr"
            constexprs[(i,)] = known[argument]
            continue
        signature[argument] = kernel.types.get(argument) or argument_type(argument, job.dtype)
        if argument not in unaligned:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(
        fn=kernel.function, signature=signature, constexprs=constexprs, attrs=attributes
    )
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


def loop_of(name: str, lines: Sequence[str]) -> Loop:
    """A loop's instructions counted."""
    counts = {
        kind: sum(bool(re.match(rf"(@\S+\s+)?({names})\b", line)) for line in lines)
        for kind, names in CLASSES.items()
    }
    spills = any(re.search(r"\b(LDL|STL)\b", line) for line in lines)
    return Loop(name, len(lines), counts, spills)


def report(job: Job) -> Report:
    """Compile it and read the result."""
    binary, said = compiled(job)
    cubin = binary.asm["cubin"]
    usage = disassembled(cubin, "cuobjdump", "--dump-resource-usage")
    takes = dict(re.findall(r"(REG|STACK):(\d+)", usage))
    ptx = binary.asm["ptx"]
    loops = innermost_loops(disassembled(cubin, "nvdisasm", "-c"))
    names = KERNELS[job.kernel].loops[-len(loops) :]  # plain attention has no near loop
    if len(names) != len(loops):
        names = tuple(map(str, range(len(loops))))
    return Report(
        registers=int(takes["REG"]),
        spilled=int(takes["STACK"]),
        shared=binary.metadata.shared,
        product=next((one for one in PRODUCTS if one in ptx), "none"),
        loops=[loop_of(*pair) for pair in zip(names, loops)],
        wide_loads=len(re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*, 0x10\b", ptx)),
        narrow_loads=len(re.findall(r"ld\.global\S*\.[bu]16\b", ptx)),
        serialised="C7515" in said,
    )


# ---- What is wrong with one ----------------------------------------------------------------------


def key_of(job: Job) -> tuple[str, ...]:
    """Its key in the table of spills."""
    version = ".".join(triton.__version__.split(".")[:2])
    fields = (job.arch, TYPES[job.dtype], job.width, job.d_state, job.kernel, job.variant)
    return version, *map(str, fields)


@functools.cache
def allowed_spills() -> dict[tuple[str, ...], int]:
    """Bytes that may be spilled outside the loops, by ``KEY``."""
    with open(SPILLS, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {tuple(row[name] for name in KEY): int(row["bytes"]) for row in rows}


def record_spills(found: Mapping[tuple[str, ...], int]) -> None:
    """Replace what the table holds of the kernels that were compiled."""
    kept = {key: size for key, size in (allowed_spills() | dict(found)).items() if size}
    with open(SPILLS, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*KEY, "bytes"])
        writer.writerows([*key, size] for key, size in sorted(kept.items()))


def faults(job: Job, found: Report) -> Iterator[str]:
    """What is wrong with it."""
    if found.shared > SHARED_MEMORY[job.arch]:
        yield "too much shared memory"
    if job.variant == "odd v":
        return
    if not any(job.tiles is row for _, _, row in SAFE):
        if any(loop.spills for loop in found.loops):
            yield "spills in a loop"
        if found.spilled > allowed_spills().get(key_of(job), 0):
            yield "a new spill"
    if found.narrow_loads > KERNELS[job.kernel].narrow_loads:
        yield "loads single numbers"
    multiplies = job.arch == 90 and job.dtype != torch.float32 and not KERNELS[job.kernel].fixed
    if multiplies and found.product != "wgmma":
        yield "no wgmma"
    if found.serialised:
        yield "serialised wgmma"


# ---- Rows ----------------------------------------------------------------------------------------

Row = dict[str, Any]
COLUMNS = {  # of the text table: title, width
    "arch": 6,
    "Dh": 4,
    "Ds": 4,
    "kernel": -13,
    "variant": -10,
    "tile": -20,
    "registers": 9,
    "spilled B": 9,
    "shared B": 8,
    "near/diag/far": 15,
    "16 B": 5,
    "2 B": 4,
    "products": -8,
}


def row_of(job: Job) -> Row:
    """A kernel's row, plain data."""
    found = report(job)
    tile = job.tile
    return {
        **dict(zip(KEY, key_of(job))),
        "version": triton.__version__,
        "tile": f"{tile.m}x{tile.n} ({tile.diagonal}), {tile.warps}, {tile.stages}",
        **asdict(tile),
        **asdict(found),
        "faults": list(faults(job, found)),
    }


def steps(row: Row) -> str:
    return "/".join(str(loop["instructions"]) for loop in row["loops"])


def line(row: Row) -> str:
    """A row of the text table."""
    cells = {
        **row,
        "arch": f"sm_{row['arch']}",
        "spilled B": row["spilled"],
        "shared B": row["shared"],
        "near/diag/far": steps(row),
        "16 B": row["wide_loads"],
        "2 B": row["narrow_loads"],
        "products": row["product"],
    }
    fault = f"  FAULT: {', '.join(row['faults'])}" if row["faults"] else ""
    return aligned(cells) + fault


LOOP = ("version", "arch", "Dh", "Ds", "kernel", "variant", "m", "n", "diagonal", "warps")


def loops_of(row: Row) -> Iterator[str]:
    """A line of bench/instructions.csv for each of a kernel's loops."""
    for loop in row["loops"]:
        cells = [row[name] for name in LOOP]
        cells += [loop["name"], loop["instructions"], loop["classes"]["exp2"]]
        yield ",".join(map(str, cells))


def aligned(cells: Mapping[str, Any]) -> str:
    parts = [
        f"{cells[name]:<{-width}}" if width < 0 else f"{cells[name]:>{width}}"
        for name, width in COLUMNS.items()
    ]
    return " ".join(parts).rstrip()


def markdown(rows: Sequence[Row]) -> str:
    """One table, a line a kernel; registers, spills and steps once for every Triton."""
    versions = sorted({row["version"] for row in rows})
    by_kernel: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        key = tuple(row[name] for name in KEY[1:])
        by_kernel.setdefault(key, {})[row["version"]] = row
    titles = ["kernel", "tile, warps, stages", "16 B / 2 B loads", "products"]
    titles += [f"Triton {version}: registers, spilled, near/diag/far" for version in versions]
    lines = [" | ".join(titles), "|".join("---" for _ in titles)]
    for (arch, dtype, width, d_state, kernel, variant), found in by_kernel.items():
        first = next(iter(found.values()))
        cells = [
            f"sm_{arch} {dtype} {width}+{d_state} {kernel}, {variant}",
            first["tile"],
            f"{first['wide_loads']} / {first['narrow_loads']}",
            first["product"],
        ]
        for version in versions:
            took = found.get(version)
            cells.append(f"{took['registers']}, {took['spilled']}, {steps(took)}" if took else "")
        lines.append(" | ".join(cells))
    return "\n".join(f"| {text} |" for text in lines)


# ---- The command ---------------------------------------------------------------------------------


def parse() -> tuple[argparse.Namespace, list[str]]:
    """The command line, and its part that says what to compile."""
    output = argparse.ArgumentParser(add_help=False)
    add = output.add_argument
    add("--triton", nargs="+", default=[], metavar="FOLDER", help="others, beside the one here")
    add("--markdown", action="store_true", help="print one table for a page, all Tritons in it")
    add("--json", action="store_true", help="print a JSON object a row")
    add("--loops", action="store_true", help="print what bench/instructions.csv holds")
    add("--record", action="store_true", help="put what spills outside loops into spills.csv")
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[output],
    )
    add = parser.add_argument
    add("--arch", type=int, nargs="+", default=list(SHARED_MEMORY), choices=SHARED_MEMORY)
    add("--widths", type=int, nargs="+", default=[64], choices=WIDTHS)
    add("--d-states", type=int, nargs="+", default=[0, 16, 64], choices=[0, *WIDTHS])
    add("--dtype", default="bf16", choices=sorted(TYPES.values()))
    add("--kernels", nargs="+", choices=KERNELS, help="default: all; with --loops, attention's")
    add("--variants", nargs="+", default=["plain", "packed+gqa"], choices=VARIANTS)
    add("--all", action="store_true", help="every width and variant: hours of a core")
    add("--jobs", type=int, default=os.cpu_count(), help="compiled at a time")
    args = parser.parse_args()
    args.kernels = args.kernels or list(ATTENTION if args.loops else KERNELS)
    return args, [*output.parse_known_args()[1], "--kernels", *args.kernels]


def makes_sense(job: Job, first: tuple[int, int, str]) -> bool:
    """Whether it is another kernel than before, ``first`` the first width, d_state and variant."""
    flagged = VARIANTS[job.variant].flagged
    if job.kernel in ATTENTION:
        return job.d_state > 0 or not flagged
    if KERNELS[job.kernel].importance:
        return job.width == first[0] and job.d_state > 0 and not flagged
    return (job.d_state, job.variant) == first[1:]


def chosen_jobs(args: argparse.Namespace) -> Iterator[Job]:
    """What the flags choose to compile."""
    dtype = next(dtype for dtype, name in TYPES.items() if name == args.dtype)
    widths = WIDTHS if args.all else args.widths
    d_states = [0, *WIDTHS] if args.all else args.d_states
    variants = [name for name in VARIANTS if name != "odd v"] if args.all else args.variants
    for arch, width, d_state, kernel, variant in product(
        args.arch, widths, d_states, args.kernels, variants
    ):
        job = Job(arch, dtype, width, d_state, kernel, variant)
        if makes_sense(job, first=(widths[0], d_states[0], variants[0])):
            yield job
    if args.loops:
        return
    for arch in args.arch:
        if "odd v" not in variants and "forward" in args.kernels:
            yield Job(arch, dtype, widths[0], d_states[0], "forward", "odd v")
        for kernel in args.kernels:
            if KERNELS[kernel].importance:
                yield Job(arch, dtype, widths[0], ODD, kernel, "plain")


def rows_here(args: argparse.Namespace) -> Iterator[Row]:
    """The rows of this Triton, as they are compiled."""
    with ProcessPoolExecutor(args.jobs) as pool:
        yield from pool.map(row_of, chosen_jobs(args))


def rows_of(folder: str, arguments: Sequence[str]) -> Iterator[Row]:
    """The rows of the Triton in a folder of ``pip install --target``."""
    path = os.pathsep.join([folder, str(Path(__file__).parent.parent)])
    command = [sys.executable, __file__, *arguments, "--json"]
    environment = os.environ | {"PYTHONPATH": path}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        yield from map(json.loads, process.stdout or ())


def show(row: Row, args: argparse.Namespace) -> None:
    """Print a row, in the form that was asked for."""
    if args.json:
        print(json.dumps(row), flush=True)
    elif args.loops:
        for text in loops_of(row):
            print(text, flush=True)
    elif not args.markdown:
        print(line(row), flush=True)


def main() -> None:
    args, what = parse()
    if kernels.INTERPRETED:
        sys.exit("TRITON_INTERPRET is set: the interpreter compiles nothing")
    if args.loops:
        print(",".join([*LOOP, "loop", "instructions", "exp2"]), flush=True)
    elif not (args.markdown or args.json):
        print("tile: queries x keys (on the diagonal), warps, stages")
        print(aligned({name: name for name in COLUMNS}))
    rows = []
    for row in chain(rows_here(args), *(rows_of(folder, what) for folder in args.triton)):
        rows.append(row)
        show(row, args)
    if args.markdown:
        print(markdown(rows))
    if args.record:
        record_spills({tuple(row[name] for name in KEY): row["spilled"] for row in rows})
        return
    wrong = sum(len(row["faults"]) for row in rows)
    if wrong and not args.json:
        print(f"{wrong} faults", file=sys.stderr)
    sys.exit(int(wrong > 0))


if __name__ == "__main__":
    main()
