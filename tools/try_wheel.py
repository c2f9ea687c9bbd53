"""One wheel beside many torches and Pythons: python tools/try_wheel.py WHEEL.

For each torch and each Python a fresh environment in a scratch folder (gigabytes each, removed
before the next): the wheel is installed beside that torch, the kernels' error against the fp64
oracle is taken under each instruction set, and a core of the tests runs on what was installed.
With --emulate also under QEMU's user emulation of CPUs that lack this one's instructions (package
qemu-user). Prints a row each and writes them to bench/results/wheels.csv; fails if a cell is not
right."""

import argparse
import csv
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results" / "wheels.csv"
TORCHES = ("2.11.0", "2.12.1", "2.13.0", "2.14.1")
PYTHONS = ("python3.10", "python3.13")
ISAS = ("default", "avx2", "avx512", "avx512_bf16")
EMULATED = {"Nehalem": "default", "Haswell": "avx2"}
MISSING = "not on this CPU"
TESTS = ("test_augment.py", "test_decode.py", "test_attention.py")
PACKAGES = ("pytest", "hypothesis")

# The largest relative error of y and of the gradients against the oracle, and the kernels that ran.
ERROR = """
import warnings; warnings.simplefilter("error", RuntimeWarning)
import torch, sisa_kernels as sk
from sisa_kernels import _extension
from sisa_kernels.testing import oracle, problem, relative_errors, value_and_grads
inputs, dy = problem(L=300, decay=-3.0)
errors = relative_errors(value_and_grads(sk.sisa_attention, inputs, dy), oracle(inputs, dy))
print(_extension.RECORD["isa"], max(errors.values()))
"""


def run(*command: object, **options: object) -> str:
    """The standard output of a command; an error that shows its last lines where it fails."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)
    if done.returncode:
        last = "\n".join((done.stdout + done.stderr).splitlines()[-25:])
        raise RuntimeError(f"{' '.join(map(str, command))}\n{last}")
    return done.stdout


def error_under(interpreter: list[object], isa: str, cwd: Path, **environment: str) -> str:
    """What :data:`ERROR` finds, or why it does not run."""
    # What names a CPU for numpy's OpenBLAS would name one that is not emulated.
    env = {name: value for name, value in os.environ.items() if not name.startswith("OPENBLAS")}
    env |= {"OMP_NUM_THREADS": "2", **environment}
    try:
        ran, error = run(*interpreter, "-c", ERROR, cwd=cwd, env=env).split()
    except RuntimeError as failure:
        text = str(failure)
        return MISSING if "this CPU runs" in text else text.splitlines()[-1]
    return f"{float(error):.1e}" if ran == isa else f"ran {ran}"


def try_one(wheel: Path, torch: str, python: str, emulate: bool) -> dict[str, str]:
    """A row of the table: torch, Python, seconds and size of the installation, errors, tests."""
    with tempfile.TemporaryDirectory(prefix="wheel-") as scratch:
        folder = Path(scratch)
        run(python, "-m", "venv", folder / "env")
        own = folder / "env" / "bin" / "python"
        run(own, "-m", "pip", "install", "-q", f"torch=={torch}", *PACKAGES)
        start = time.monotonic()
        run(own, "-m", "pip", "install", "-q", f"torch=={torch}", wheel)
        row = {
            "torch": run(own, "-c", "import torch; print(torch.__version__)").strip(),
            "python": run(own, "-c", "import platform as p; print(p.python_version())").strip(),
            "install_s": f"{time.monotonic() - start:.0f}",
        }
        for isa in ISAS:
            row[isa] = error_under([own], isa, folder, SISA_CPU_ISA=isa)
        for cpu, isa in EMULATED.items() if emulate else ():
            row[f"qemu {cpu}"] = error_under(["qemu-x86_64", "-cpu", cpu, own], isa, folder)
        row["tests"] = core_tests(own, folder)
    return row


def core_tests(python: Path, folder: Path) -> str:
    """How many of the core tests pass on what is installed, the checkout not on the path."""
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    files = [f"tests/kernels/{name}" for name in TESTS]
    command = (
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        "not compile and not page",
        *files,
    )
    try:
        said = run(python, *command, cwd=folder)
    except RuntimeError as failure:
        said = str(failure)
        print(said)
    counts = re.findall(r"\d+ (?:passed|failed|errors?)", said.splitlines()[-1])
    return ", ".join(counts) or said.splitlines()[-1]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--torch", nargs="+", default=TORCHES)
    parser.add_argument("--python", nargs="+", default=PYTHONS, help="interpreters")
    parser.add_argument("--emulate", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    rows = []
    for torch in args.torch:
        for python in args.python:
            row = try_one(args.wheel.resolve(), torch, python, args.emulate and not rows)
            rows.append({"wheel": args.wheel.name, **row})
            print(" | ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    names = list(dict.fromkeys(name for row in rows for name in row))
    with args.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    sys.exit(0 if all(map(is_right, rows)) else 1)


def is_right(row: dict[str, str]) -> bool:
    """Whether every error is small and every test passed; an instruction set may be missing."""
    cells = [row.get(name, MISSING) for name in (*ISAS, *(f"qemu {cpu}" for cpu in EMULATED))]
    errors = [cell for cell in cells if cell != MISSING]
    small = all(re.fullmatch(r"\d\.\de-0[6-9]", error) for error in errors)
    return small and re.fullmatch(r"\d+ passed", row["tests"]) is not None


if __name__ == "__main__":
    main()
