"""`LocalPlane`: fetches from and pushes to one daemon on this host, through shared memory.

A `LocalPlane` has the daemon's DRAM tier (mapped into this process), one session (connection) per running fetch, and the staging memory for
pushes. Each fetch has a session of its own, because closing a session reliably ends all its leases. Sessions without a fetch are kept and
used again.
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
    """The local plane (shared memory) of one daemon: sends fetches, and offers memory for pushes. Thread-safe.

    Its main session (connection) identifies the plane to the daemon and is used by pushes. When that session ends, by `close` or by the
    daemon, `is_alive` becomes False, and the user of this object must open another plane.
    """

    def __init__(self, name: str, session: LocalSession, arena: ArenaView) -> None:
        """Makes a plane from an open session (connection) and the daemon's memory, mapped into this process. Use `connect` instead."""
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
        """Opens the plane through the Unix socket whose abstract name is `name`. Raises the errors of `LocalSession.connect`."""
        return LocalPlane(name, *LocalSession.connect(name))

    @property
    def session(self) -> int:
        """The daemon's number for the main session (connection). A push stream sends this number in its first message (PushOpen)."""
        return self._session.number

    @property
    def is_alive(self) -> bool:
        """Whether the main session is still open on both sides."""
        return self._session.is_alive

    # Fetches

    def fetch(self, fetch: local_pb2.LocalFetch, *, timeout_s: float) -> LocalCall:
        """Sends a fetch to the daemon, and returns it as a `LocalCall`, from which the daemon's answers are read.

        The answers must come within `timeout_s` seconds. Raises Unavailable, InvalidRequest.
        """
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
        """Keeps a session (connection) open for the next fetch. Call this when the fetch on the session has ended and it holds no lease."""
        with self._lock:
            if not self._closed:
                self._idle.append(session)
                return
        session.close()

    # Pushes

    def staging_for(self, num_bytes: int) -> Staging | None:
        """Returns the staging memory, through which pushed bodies (experts' bytes) reach the daemon, if `num_bytes` fit into it.

        None: the body does not fit, or the daemon accepts no staging memory. The first call makes the memory.
        """
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
        """Wakes threads that wait for a place in the staging memory: each checks whether it still needs one (`Staging.allocate`)."""
        with self._staging_lock:
            if self._staging is not None:
                self._staging.wake()

    def close(self) -> None:
        """Closes the plane and its sessions. A session with a running fetch is closed when that fetch ends.

        The arena (the daemon's shared memory) is unmapped when nobody reads it any more.
        """
        self._session.close()
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for session in idle:
            session.close()
        self.wake()


class LocalCall:
    """One running fetch on the local plane (shared memory): reads the daemon's answers, and gives back the leases in them.

    A lease is the right to read a record in the daemon's memory for a limited time.
    """

    def __init__(self, plane: LocalPlane, session: LocalSession, deadline: float) -> None:
        """Wraps a session on which a fetch was sent. Use `LocalPlane.fetch` instead.

        `deadline`: until when answers may come, a time of `time.monotonic()`.
        """
        self.plane = plane
        self._session: LocalSession | None = session
        self._deadline = deadline

    def next(self) -> local_pb2.LocalAnswer | None:
        """Waits for the next answer of the daemon, and returns it. Returns None when the fetch has ended.

        Release all leases before that end is read. Raises the errors of `LocalSession.receive`; the caller must then call `cancel`.
        """
        assert self._session is not None
        answer = self._session.receive(self._deadline)
        if answer is None:
            self.plane.reuse(self._session)
            self._session = None
        return answer

    def release(self, leases: Sequence[int]) -> None:
        """Gives leases back to the daemon, which may then overwrite their records. `leases`: the ids."""
        if self._session is not None:
            self._session.release(leases)

    def cancel(self) -> None:
        """Ends the fetch and all its leases. Does nothing if the fetch has ended."""
        if self._session is not None:
            self._session.close()
            self._session = None
