"""Serves the fetches that callers on this host send through the local plane's socket instead of gRPC.

The guard counts and limits these fetches like calls through gRPC, and an error is sent to the caller as a message that names it.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable

from ooc_moe_server.engine.engine import Engine
from ooc_moe_server.local.plane import Session
from ooc_moe_server.rpc import replies
from ooc_moe_server.rpc.interceptor import Guard, shown
from ooc_moe_server.rpc.services import checked_trainer, fetch_of
from ooc_moe_wire.errors import Internal, OocMoeError, TierFull
from ooc_moe_wire.v1 import expert_pb2, local_pb2

log = logging.getLogger(__name__)


class LocalFetches:
    """Serves the fetches of local sessions (callers on this host that read DRAM in place). Give its method `serve` to the `LocalPlane`."""

    def __init__(self, engine: Callable[[], Engine], guard: Guard) -> None:
        self._engine, self._guard = engine, guard

    async def serve(self, session: Session, fetch_request: local_pb2.LocalFetch) -> None:
        """Answers one fetch of a session: sends leases, then an end message, which carries the error if there was one.

        A lease is the right to read a record in shared memory. Stops early when the session is closed.
        """
        end = local_pb2.LocalEnd()
        try:
            async with self._guard.counted():
                bank, fetch = fetch_of(self._engine(), fetch_request.request, checked_trainer(fetch_request.trainer))
                await replies.send_leases(fetch, bank.layout, session, arena=self._engine().arena, pinned=fetch_request.pin)
        except OocMoeError as error:
            end = _end_with(error)
        except Exception as error:
            log.exception("a fetch through the local plane failed")
            end = _end_with(Internal(f"{type(error).__name__}: {error}"))
        with contextlib.suppress(OocMoeError):  # The session was closed.
            await session.send(local_pb2.LocalAnswer(end=end))


def _end_with(error: OocMoeError) -> local_pb2.LocalEnd:
    info = expert_pb2.ErrorInfo(kind=type(error).__name__, message=shown(error))
    return local_pb2.LocalEnd(error=info, retry_after_ms=error.retry_after_ms if isinstance(error, TierFull) else 0)
