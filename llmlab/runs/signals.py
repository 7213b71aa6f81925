"""What asks a process to stop: Ctrl+C, SIGTERM (schedulers, `kill`) and SIGHUP (a closed terminal).

When a run stops is decided by who handles them: `callbacks.Rhythm` after the current step.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

HANGUP = getattr(signal, "SIGHUP", None)  # Windows has none


class Interrupted(SystemExit):
    """SIGTERM or SIGHUP ended the program: its exit code is 128 and the signal's number, as shells report it."""


@contextmanager
def handle_signals(handler: Callable[[int], None]) -> Iterator[None]:
    """Calls `handler(number)` for each signal that asks this process to stop.

    After a hangup nothing more is written to the terminal, which is gone.
    """
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

    handled = [signal.SIGINT, signal.SIGTERM]
    if HANGUP and signal.getsignal(HANGUP) != signal.SIG_IGN:  # as `nohup` sets it
        handled.append(HANGUP)
    before = {number: signal.signal(number, handle) for number in handled}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def interrupt(number: int) -> None:
    """Ends what is going on at once.

    Raises:
        KeyboardInterrupt: the signal is Ctrl+C's.
        Interrupted: it is another.
    """
    raise KeyboardInterrupt if number == signal.SIGINT else Interrupted(128 + number)
