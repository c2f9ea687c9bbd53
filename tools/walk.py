"""The README followed to the letter, timed: python tools/walk.py.

It clones this checkout (its last commit) into a scratch folder, makes an environment there, and
runs the commands of the README as they come, each with its seconds. Fails at the first that fails,
and if git sees anything that they wrote. Without --tests the line that runs the
tests is left out: it takes ten minutes."""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
COMMANDS = ("git", "pip", "sisa")


def commands(page: str) -> list[str]:
    """The lines of a page's blocks without a language that are commands."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    lines = [line for language, block in blocks if not language for line in block.splitlines()]
    return [line for line in lines if line.partition(" ")[0] in COMMANDS]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tests", action="store_true", help="run the tests' line, too")
    tests = parser.parse_args().tests
    with tempfile.TemporaryDirectory(prefix="walk-") as scratch:
        folder = Path(scratch)
        subprocess.run([sys.executable, "-m", "venv", folder / "env"], check=True)
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        environment["PATH"] = f"{folder / 'env' / 'bin'}:{os.environ['PATH']}"
        begin = time.monotonic()
        for line in commands((ROOT / "README.md").read_text(encoding="utf-8")):
            if "pytest" in line and not tests:
                continue
            start = time.monotonic()
            # `cd` is the last part of the line that clones; what follows runs in the clone.
            subprocess.run(
                line.replace("URL", str(ROOT)),
                shell=True,
                check=True,
                cwd=folder / "sisa" if (folder / "sisa").exists() else folder,
                env=environment,
            )
            now = time.monotonic()
            print(f"{now - start:6.1f} s, {now - begin:6.1f} from the start: {line}", flush=True)
        status = ["git", "status", "--porcelain"]
        seen = subprocess.run(status, cwd=folder / "sisa", capture_output=True, text=True).stdout
        if seen:
            sys.exit(f"git sees what the commands wrote:\n{seen}")


if __name__ == "__main__":
    main()
