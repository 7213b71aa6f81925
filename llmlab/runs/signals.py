"""Signals that ask a process to stop: Ctrl+C, SIGTERM (schedulers, `kill`) and SIGHUP (a closed terminal). When it
stops is up to the handler: `callbacks.SaveSchedule` lets the current step finish."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

HANGUP = getattr(signal, "SIGHUP", None)  # Windows has none


class Interrupted(SystemExit):
    """SIGTERM or SIGHUP ended the program; the exit code is 128 plus the signal's number, as shells report it."""


@contextmanager
def handle_signals(handler: Callable[[int], None]) -> Iterator[None]:
    """Calls `handler(number)` on each stop signal; after a hangup, output to the lost terminal is dropped."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals reach the main thread only
        return
    terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]

    def handle(number: int, frame: Any) -> None:
        if number == HANGUP:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            for descriptor in terminals:
                os.dup2(nowhere, descriptor)
            os.close(nowhere)
        handler(number)

    signals = [signal.SIGINT, signal.SIGTERM]
    if HANGUP and signal.getsignal(HANGUP) != signal.SIG_IGN:  # as `nohup` sets it
        signals.append(HANGUP)
    earlier = {number: signal.signal(number, handle) for number in signals}
    try:
        yield
    finally:
        for number, previous in earlier.items():
            signal.signal(number, previous)


def interrupt(number: int) -> None:
    """Raises KeyboardInterrupt for Ctrl+C's signal and `Interrupted` for any other."""
    raise KeyboardInterrupt if number == signal.SIGINT else Interrupted(128 + number)
