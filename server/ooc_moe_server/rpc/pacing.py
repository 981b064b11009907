"""Turns on the event loop: large messages are handed to gRPC one per iteration, so that small calls never wait for several.

Copying a megabyte into a message and on into the socket takes the loop a good part of a millisecond; a small call takes about five
iterations. Four streams that each took their share of every iteration made GetStats twice to four times as slow at the same throughput.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager


class Turns:
    """Shared by all streams of a loop."""

    def __init__(self) -> None:
        self.num_streams = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    @contextmanager
    def stream(self) -> Iterator[None]:
        """Counts a stream while it runs."""
        self.num_streams += 1
        try:
            yield
        finally:
            self.num_streams -= 1

    async def take(self) -> None:
        """Returns when it is the caller's turn: in some coming iteration of the loop, and in none that is another's."""
        loop = asyncio.get_running_loop()
        turn: asyncio.Future[None] = loop.create_future()
        if not self._waiting:
            loop.call_soon(self._give, loop)
        self._waiting.append(turn)
        await turn

    def _give(self, loop: asyncio.AbstractEventLoop) -> None:
        while self._waiting and self._waiting[0].done():  # Its caller left.
            self._waiting.popleft()
        if self._waiting:
            self._waiting[0].set_result(None)
            self._waiting.popleft()
        if self._waiting:
            loop.call_soon(self._give, loop)
