"""How far a long command is: a bar on a terminal, plain lines anywhere else."""

import logging
import math
import sys
import time
from types import TracebackType

from tqdm import tqdm

log = logging.getLogger(__name__)

EVERY = 30.0  # seconds between two lines, at least


class RunStopped(Exception):
    """A signal ended training before its last step; the message, if any, says how to go on."""


def duration(seconds: float) -> str:
    """Hours, minutes and seconds in words, the two greatest of them: "3 h 20 min"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


class Progress:
    """Counts ``unit``s up to ``total`` (None: nobody knows), from ``done`` on.

    Where the standard error is no terminal: a line in the log for the first of them, then one each
    30 s at most, and one for the last. ``quiet``: neither bar nor lines."""

    def __init__(self, unit: str, total: int | None, done: int = 0, quiet: bool = False):
        self.unit = unit
        self.total = total
        self.begun = self.done = done
        self.facts = ""
        self.start = time.monotonic()
        self.told = -math.inf
        self.told_of: int | None = None
        terminal = sys.stderr.isatty()
        self.lines = not (terminal or quiet)
        self.bar = tqdm(
            total=total,
            initial=done,
            unit=unit,
            unit_scale=total is None,
            dynamic_ncols=True,
            disable=quiet or not terminal,
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.bar.close()
        if self.lines and self.told_of != self.done:
            self._tell()

    def advance(self, count: int = 1, facts: dict[str, str] | None = None) -> None:
        """``count`` more are done; ``facts`` is what is said beside."""
        self.done += count
        if facts is not None:
            self.bar.set_postfix(facts, refresh=False)
            self.facts = "".join(f", {name} {value}" for name, value in facts.items())
        self.bar.update(count)
        if self.lines and time.monotonic() - self.told >= EVERY:
            self._tell()

    def _tell(self) -> None:
        self.told = time.monotonic()
        self.told_of = self.done
        far = f"{self.done:,}"
        left = ""
        if self.total is not None:
            far += f" of {self.total:,}"
            pace = (self.told - self.start) / max(1, self.done - self.begun)
            left = f", {duration(pace * (self.total - self.done))} left"
        log.info(f"{self.unit} {far}{self.facts}{left}")
