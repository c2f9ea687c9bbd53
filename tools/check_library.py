"""What must hold of the compiled library, read from its file: python tools/check_library.py [FILE].

It is bound to torch's stable ABI alone: no undefined symbol of torch's C++ or of Python's. And no
function uses vector instructions beyond those of the namespace that it is in (csrc/cpu/isa.h), so
that none runs on a CPU that lacks them. Needs binutils (nm, objdump)."""

import re
import subprocess
import sys
from pathlib import Path

LIBRARY = Path(__file__).parent.parent / "sisa_kernels" / "libsisa.so"
# Names of the stable C interface; undefined ones of torch may begin with nothing else.
STABLE = ("aoti_torch_", "torch_")
FOREIGN = re.compile(r"^_ZN?K?(2at|3c10|5torch)|^_?Py")
ALLOWED = {  # registers or encodings, by namespace
    "portable": set(),
    "avx2": {"vex"},
    "avx512": {"vex", "evex"},
    "avx512_bf16": {"vex", "evex", "bf16"},
}
FUNCTION = re.compile(r"^[0-9a-f]+ <(?P<name>.+)>:$")
EVEX = re.compile(r"%zmm|\{%k|%[xy]mm(1[6-9]|2\d|3[01])|^(kmov|kxor|korte|kand)")


def output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def undefined(library: Path) -> list[str]:
    """The names that the library takes from others, without their versions."""
    lines = output("nm", "-D", "--undefined-only", str(library)).splitlines()
    return [line.split()[-1].partition("@")[0] for line in lines]


def kind(instruction: str) -> str | None:
    """What an instruction needs beyond the platform's baseline."""
    mnemonic = instruction.split(maxsplit=1)[0]
    if "bf16" in mnemonic:
        return "bf16"
    if EVEX.search(instruction):
        return "evex"
    return "vex" if mnemonic.startswith("v") or mnemonic in ("shlx", "mulx", "andn") else None


def namespace(function: str) -> str:
    """The instruction set in a mangled name, of the function or of a lambda it is made for."""
    found = re.search(r"3cpu(?:8(portable)|4(avx2)|6(avx512)|11(avx512_bf16))", function)
    return next(filter(None, found.groups())) if found else "portable"


def misplaced(library: Path) -> dict[str, str]:
    """Functions with an instruction that their namespace does not have, and one such."""
    found: dict[str, str] = {}
    function = ""
    for line in output("objdump", "-d", "--no-show-raw-insn", str(library)).splitlines():
        if head := FUNCTION.match(line):
            function = head["name"]
            continue
        instruction = line.partition(":\t")[2].strip()
        needed = kind(instruction) if instruction else None
        if needed is not None and needed not in ALLOWED[namespace(function)]:
            found.setdefault(function, instruction)
    return found


def main() -> None:
    library = Path(sys.argv[1]) if len(sys.argv) > 1 else LIBRARY
    names = undefined(library)
    foreign = [name for name in names if FOREIGN.match(name)]
    stable = sum(name.startswith(STABLE) for name in names)
    wrong = misplaced(library)
    size = library.stat().st_size / 2**20
    print(f"{library.name}: {size:.2f} MiB, {stable} symbols of torch's stable interface")
    print(f"symbols of torch's C++ or of Python's: {', '.join(foreign) or 'none'}")
    print(f"functions with instructions of another namespace's: {len(wrong) or 'none'}")
    for function, instruction in wrong.items():
        print(f"  {function}: {instruction}")
    sys.exit(1 if foreign or wrong else 0)


if __name__ == "__main__":
    main()
