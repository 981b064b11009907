"""Ctrl-C as a wish: long work ends where it can be taken up again."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

INTERRUPTED_EXIT = 130
"""Exit code of a command that a signal ended, its work saved; as a shell has it for SIGINT."""


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Turns the first Ctrl-C (or SIGTERM) into a wish that the loop fulfils at its next safe point; the second one stops at once.

    Outside the main thread, where Python handles no signals, nobody interrupts.
    """
    wish = False

    def note(signum: int, frame: object) -> None:
        nonlocal wish
        if wish:
            raise KeyboardInterrupt
        wish = True

    numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    previous = {number: signal.signal(number, note) for number in numbers}
    try:
        yield lambda: wish
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
