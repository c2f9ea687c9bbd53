"""The command ``sisa``: which command runs, what of it is printed, and its exit status."""

import contextlib
import importlib.util
import logging
import os
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from sisa_model.commands import COMMANDS
from sisa_model.help import command_help, overview, show, width
from sisa_model.parser import (
    CONFIG,
    UsageError,
    completion,
    given_flags,
    nearest,
    read_command_line,
)
from sisa_model.terminal import Drawn
from sisa_model.utils.flags import flags_of
from sisa_model.utils.progress import RunStopped

STOPPED = 75  # of a run that is to be continued: "try again later", by sysexits.h
WRONG_USE = 2
HELP = ("-h", "--help")
COMPLETION = "--tyro-print-completion"


def version() -> str:
    """The version of the two packages, read without importing them, and torch with them."""
    found = importlib.util.find_spec("sisa_kernels")
    assert found is not None
    assert found.origin is not None
    return str(runpy.run_path(str(Path(found.origin).with_name("version.py")))["__version__"])


def share_cores() -> None:
    """Let OpenMP's idle threads sleep after a moment, unless the environment says how they wait.

    GNU's default has them spin: beside two other busy processes on two cores a training step took
    ten times as long. OpenMP reads it as torch is loaded, which is later."""
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(os.environ):
        os.environ["GOMP_SPINCOUNT"] = "1000"


class _Messages(logging.StreamHandler):
    """Ends the command where nobody reads on, instead of telling of it at each message."""

    def handleError(self, record: logging.LogRecord) -> None:
        if isinstance(sys.exc_info()[1], BrokenPipeError):
            raise
        super().handleError(record)


@contextlib.contextmanager
def messages_on(out: TextIO, err: TextIO) -> Iterator[None]:
    """Let the packages' messages appear bare on ``out``, their warnings on ``err``."""
    told = _Messages(out)
    told.setFormatter(Drawn(width()) if out.isatty() else logging.Formatter("%(message)s"))
    told.addFilter(lambda record: record.levelno < logging.WARNING)
    warned = logging.StreamHandler(err)
    warned.setFormatter(logging.Formatter("sisa: %(message)s"))
    warned.setLevel(logging.WARNING)
    loggers = [logging.getLogger(name) for name in ("sisa_model", "sisa_kernels")]
    for logger in loggers:
        logger.setLevel(logging.INFO)
        logger.addHandler(told)
        logger.addHandler(warned)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(told)
            logger.removeHandler(warned)


def main(args: list[str] | None = None) -> int:
    """Run a command; 0, or 1 after one line on which argument, file or disk was at fault.

    2 for a command or flags that there are not, 75 for training that was stopped before its end,
    141 where nobody reads the output on."""
    share_cores()
    try:
        with messages_on(sys.stdout, sys.stderr):
            _run(sys.argv[1:] if args is None else args)
    except UsageError as error:
        print(f"sisa: error: {error}", file=sys.stderr)
        return WRONG_USE
    except RunStopped as stop:
        if stop.args:
            print(stop)
        return STOPPED
    except BrokenPipeError:  # `sisa ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python's last flush
        return 141  # as a shell has it of a program that SIGPIPE ended
    except (ValueError, TypeError, OSError, FloatingPointError) as error:
        print(f"sisa: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _run(args: list[str]) -> None:
    """A command, or what is answered without one."""
    name, *rest = args or ["--help"]
    if name in HELP:
        show(overview({known: command.about for known, command in COMMANDS.items()}))
    elif name == "--version":
        print(f"sisa {version()}")
    elif name == COMPLETION:
        print(completion({known: x.load()[0] for known, x in COMMANDS.items()}, args))
    elif name not in COMMANDS:
        raise UsageError(
            f"{name} is none of its commands{nearest(name, COMMANDS)} (sisa --help lists them)"
        )
    elif set(rest) & set(HELP):
        _explain(name, [arg for arg in rest if arg not in HELP])
    else:
        config, run = COMMANDS[name].load()
        product = run(read_command_line(name, config, rest))
        if isinstance(product, str):
            print(product, flush=True)


def _explain(name: str, args: list[str]) -> None:
    """The help of a command, with what its flags are where ``args`` are given."""
    command = COMMANDS[name]
    config, _ = command.load()
    defaults = (
        command.defaults(config(**given_flags(name, config, args))) if command.defaults else {}
    )
    show(command_help(name, config, [*flags_of(config), CONFIG], defaults, command.examples))
