"""The local plane of one daemon: its DRAM tier mapped here, sessions for fetches, and the staging of pushes.

A fetch has a session to itself, so that its leases end with it whatever happens; idle ones are used again. Knows nothing of banks.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from ooc_moe_client.local.arena_view import LocalMemory
from ooc_moe_client.local.session import LocalSession
from ooc_moe_client.local.staging import Staging
from ooc_moe_wire.errors import OocMoeError
from ooc_moe_wire.v1 import local_pb2

# The size of the staging memory: for so many records, within these bounds (daemons take no more).
STAGED_RECORDS = 4
STAGING_BYTES_MIN, STAGING_BYTES_MAX = 64 << 20, 1 << 30


class LocalPlane:
    """Thread-safe. After `close`, or when the daemon ended its main session, which pushes use, `is_alive` is False."""

    def __init__(self, name: str, session: LocalSession, memory: LocalMemory) -> None:
        """As `connect` makes it."""
        self.memory = memory
        self._name = name
        self._session = session
        self._lock = threading.Lock()
        self._idle: list[LocalSession] = []
        self._closed = False
        self._staging_lock = threading.Lock()
        self._staging: Staging | None = None

    @staticmethod
    def connect(name: str) -> LocalPlane:
        """Begins a session through the socket of that abstract name. Raises as `LocalSession.connect`."""
        return LocalPlane(name, *LocalSession.connect(name))

    @property
    def session(self) -> int:
        """For PushOpen."""
        return self._session.number

    @property
    def is_alive(self) -> bool:
        """The daemon has not ended the session."""
        return self._session.is_alive

    # Fetches

    def fetch(self, fetch: local_pb2.LocalFetch, *, timeout_s: float) -> LocalCall:
        """Asks for leases. Raises Unavailable, InvalidRequest."""
        session = self._take_idle() or LocalSession.connect(self._name)[0]
        try:
            session.ask(fetch)
        except OocMoeError:
            session.close()
            raise
        return LocalCall(self, session, time.monotonic() + timeout_s)

    def _take_idle(self) -> LocalSession | None:
        while True:
            with self._lock:
                if not self._idle:
                    return None
                session = self._idle.pop()
            if session.is_alive:
                return session
            session.close()

    def give_back(self, session: LocalSession) -> None:
        """The session's fetch has ended, and it holds no lease."""
        with self._lock:
            if not self._closed:
                self._idle.append(session)
                return
        session.close()

    # Pushes

    def staging_for(self, num_bytes: int) -> Staging | None:
        """The memory that bodies of so many bytes are pushed from; None when they do not fit, or the daemon wants none."""
        with self._staging_lock:
            if self._staging is None:
                wanted = max(STAGING_BYTES_MIN, STAGED_RECORDS * num_bytes)
                self._staging = self._make_staging(min(wanted, STAGING_BYTES_MAX))
            return self._staging if self._staging is not None and num_bytes <= self._staging.num_bytes else None

    def _make_staging(self, num_bytes: int) -> Staging | None:
        if not self.is_alive:
            return None
        staging = Staging(num_bytes)
        return staging if self._session.stage(staging.fd, num_bytes) else None

    def wake(self) -> None:
        """Lets those that wait for staging memory ask whether they still want it."""
        with self._staging_lock:
            if self._staging is not None:
                self._staging.wake()

    def close(self) -> None:
        """Ends the sessions; one that is fetching ends with its fetch. The memory goes when its last reader is done."""
        self._session.close()
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for session in idle:
            session.close()
        self.wake()


class LocalCall:
    """One fetch under way."""

    def __init__(self, plane: LocalPlane, session: LocalSession, deadline: float) -> None:
        """As `LocalPlane.fetch` makes it."""
        self.plane = plane
        self._session: LocalSession | None = session
        self._deadline = deadline

    def next(self) -> local_pb2.LocalAnswer | None:
        """The next answer; None at the end, when all leases must have been released. Raises as `LocalSession.answer`; then cancel."""
        assert self._session is not None
        answer = self._session.answer(self._deadline)
        if answer is None:
            self.plane.give_back(self._session)
            self._session = None
        return answer

    def release(self, leases: Sequence[int]) -> None:
        """Gives leases back."""
        if self._session is not None:
            self._session.release(leases)

    def cancel(self) -> None:
        """Ends the fetch, if it has not ended, and all its leases."""
        if self._session is not None:
            self._session.close()
            self._session = None
