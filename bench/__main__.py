"""``python -m bench COMMAND``: measures this checkout, and draws what was measured."""

import argparse
import importlib
import sys

COMMANDS = {  # a command is the function main(arguments) of the module of its name
    "cpu": "time every operator and layer beside its rivals on the CPU (18 minutes)",
    "gpu": "build, test and time everything on a GPU (--dry-run: show the plan, no GPU needed)",
    "accuracy": "measure the error of every attention path against Eq. 2 in fp64",
    "clamp": "measure the finished runs of `sisa study clamp`",
    "data": "measure tokens a second of `sisa prepare` and of the loader of its shards",
    "figures": "draw docs/{speed,growth,accuracy,clamp}.png from the rows in bench/results",
    "roofline": "compute the least time that each attention path can take on a GPU",
}


def main(arguments: list[str] | None = None) -> int:
    """Run the command that comes first with the arguments that follow it; its exit status."""
    width = max(map(len, COMMANDS))
    listing = "\n".join(f"  {name:{width}}  {what}" for name, what in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Measures this checkout: needs PyTorch, no installation, no network.",
        epilog=f"commands:\n{listing}\n\n`python -m bench COMMAND --help` explains one. Rows go to "
        "bench/out, which git ignores,\nwith --keep to bench/results, of which the figures are "
        "drawn (figures --results: of others).",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of those below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="its own")
    given = parser.parse_args(arguments)
    return importlib.import_module(f"bench.{given.command}").main(given.arguments)


if __name__ == "__main__":
    sys.exit(main())
