"""`LocalPlane`: the local plane of one daemon. It has the daemon's DRAM tier, mapped here, sessions for fetches, and staging for pushes.

Each fetch has a session of its own, because closing the session surely ends the fetch's leases. Idle sessions are used again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from ooc_moe_client.local.arena_view import ArenaView
from ooc_moe_client.local.session import LocalSession
from ooc_moe_client.local.staging import Staging
from ooc_moe_wire.errors import OocMoeError
from ooc_moe_wire.v1 import local_pb2

# The staging memory holds this many records, within these bounds. Daemons accept no more than the upper one.
STAGED_RECORDS = 4
STAGING_BYTES_MIN, STAGING_BYTES_MAX = 64 << 20, 1 << 30


class LocalPlane:
    """The plane. Thread-safe.

    It ends with its main session, which pushes use: `is_alive` is False after `close`, or when the daemon ended that session.
    """

    def __init__(self, name: str, session: LocalSession, arena: ArenaView) -> None:
        """Use `connect`."""
        self.arena = arena
        self._name = name
        self._session = session
        self._lock = threading.Lock()
        self._idle: list[LocalSession] = []
        self._closed = False
        self._staging_lock = threading.Lock()
        self._staging: Staging | None = None

    @staticmethod
    def connect(name: str) -> LocalPlane:
        """Opens the plane through the socket of that abstract name. Raises as `LocalSession.connect`."""
        return LocalPlane(name, *LocalSession.connect(name))

    @property
    def session(self) -> int:
        """The number of the main session, for PushOpen."""
        return self._session.number

    @property
    def is_alive(self) -> bool:
        """Whether the main session goes on."""
        return self._session.is_alive

    # Fetches

    def fetch(self, fetch: local_pb2.LocalFetch, *, timeout_s: float) -> LocalCall:
        """Begins a fetch. Raises Unavailable, InvalidRequest."""
        session = self._pop_idle() or LocalSession.connect(self._name)[0]
        try:
            session.send_fetch(fetch)
        except OocMoeError:
            session.close()
            raise
        return LocalCall(self, session, time.monotonic() + timeout_s)

    def _pop_idle(self) -> LocalSession | None:
        while True:
            with self._lock:
                if not self._idle:
                    return None
                session = self._idle.pop()
            if session.is_alive:
                return session
            session.close()

    def reuse(self, session: LocalSession) -> None:
        """Keeps a session whose fetch has ended, and which holds no lease, for the next fetch."""
        with self._lock:
            if not self._closed:
                self._idle.append(session)
                return
        session.close()

    # Pushes

    def staging_for(self, num_bytes: int) -> Staging | None:
        """The staging memory for bodies of so many bytes. None when they do not fit, or the daemon accepts no staging memory."""
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
        """Makes threads that wait for staging memory ask again whether they still want it."""
        with self._staging_lock:
            if self._staging is not None:
                self._staging.wake()

    def close(self) -> None:
        """Ends the sessions; one with a fetch in flight ends with that. The arena is unmapped when its last reader is done."""
        self._session.close()
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for session in idle:
            session.close()
        self.wake()


class LocalCall:
    """One fetch in flight."""

    def __init__(self, plane: LocalPlane, session: LocalSession, deadline: float) -> None:
        """Use `LocalPlane.fetch`."""
        self.plane = plane
        self._session: LocalSession | None = session
        self._deadline = deadline

    def next(self) -> local_pb2.LocalAnswer | None:
        """The next answer of the daemon; None at the end, when all leases must have been released.

        Raises as `LocalSession.receive`. The caller then calls `cancel`.
        """
        assert self._session is not None
        answer = self._session.receive(self._deadline)
        if answer is None:
            self.plane.reuse(self._session)
            self._session = None
        return answer

    def release(self, leases: Sequence[int]) -> None:
        """Gives leases back."""
        if self._session is not None:
            self._session.release(leases)

    def cancel(self) -> None:
        """Ends the fetch with all its leases, if it has not ended."""
        if self._session is not None:
            self._session.close()
            self._session = None
