"""Turns Ctrl-C into a request to stop, so that long work can end at a point from which it can be resumed."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

INTERRUPTED_EXIT = 130
"""The exit code of a command that saved its work after a signal; shells use it for SIGINT."""


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Catches Ctrl-C (and SIGTERM) in the `with` block. Yields a function that says whether a signal has come.

    A long loop calls that function wherever it can stop without loss, and stops if it returns True. A second signal raises
    KeyboardInterrupt at once. Outside the main thread Python handles no signals, and the function always returns False.
    """
    requested = False

    def on_signal(signum: int, frame: object) -> None:
        nonlocal requested
        if requested:
            raise KeyboardInterrupt
        requested = True

    numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    previous = {number: signal.signal(number, on_signal) for number in numbers}
    try:
        yield lambda: requested
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
