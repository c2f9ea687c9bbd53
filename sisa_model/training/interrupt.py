"""Ctrl-C and other signals, which end a run after the step under way."""

import contextlib
import logging
import signal
from typing import Any

log = logging.getLogger(__name__)

# SIGUSR1: of a batch system, ahead of its end of time; SIGHUP: of a terminal that is closed.
NAMES = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")
STOPS = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))


class Interrupt:
    """A context in which Ctrl-C, SIGTERM, SIGUSR1 and SIGHUP ask for a stop (``requested``).

    A second Ctrl-C interrupts at once. A SIGHUP that the process was started to ignore, by nohup,
    is ignored on. ``main``: whether this process says so."""

    def __init__(self, main: bool):
        self.main = main
        self.requested = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Interrupt":
        hangup = getattr(signal, "SIGHUP", None)
        ignored = hangup is not None and signal.getsignal(hangup) == signal.SIG_IGN
        heard = [number for number in STOPS if not (ignored and number == hangup)]
        self._before = _on_signals(self._request, *heard)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            _on_signals(handler, number)

    def refuse(self) -> None:
        """Let nothing interrupt what follows in the context."""
        _on_signals(signal.SIG_IGN, *STOPS)

    def _request(self, number: int, frame: Any) -> None:
        self.requested = True
        if self.main:
            log.info("\nstopping after this step; Ctrl-C again to stop at once, without saving")
        _on_signals(signal.default_int_handler, signal.SIGINT)


def _on_signals(handler: Any, *numbers: signal.Signals) -> dict[signal.Signals, Any]:
    """Set what signals do, and return what they did; nothing outside the main thread."""
    with contextlib.suppress(ValueError):
        return {number: signal.signal(number, handler) for number in numbers}
    return {}
