"""`Reporter`: sends the counters of a trainer's caches to the daemon every two seconds.

With these counters, `ooc-moe stats` can show all three tiers (HBM, DRAM, NVMe). The reporter never disturbs training: while the daemon is
away, reports are lost silently, and any other error of the store is only logged.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from types import TracebackType

from ooc_moe_client.hbm.cache import ExpertCache
from ooc_moe_client.store import ExpertStore
from ooc_moe_wire.errors import DeadlineExceeded, OocMoeError, Unavailable

log = logging.getLogger(__name__)


class Reporter:
    """A thread that sends the counters of caches to the daemon at regular intervals, until it is closed.

    Set `activity` to what the trainer is doing, for example "training krull"; it is sent along.
    """

    def __init__(self, store: ExpertStore, caches: Sequence[ExpertCache], *, activity: str = "", interval_s: float = 2.0) -> None:
        self.activity = activity
        self._store = store
        self._caches = caches
        self._interval_s = interval_s
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="reporter", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            try:
                self._store.report_trainer([cache.stats().to_proto() for cache in self._caches], self.activity)
            except (Unavailable, DeadlineExceeded):
                pass
            except OocMoeError as error:
                log.warning("reporting to the daemon failed: %s", error)
            if self._closed.wait(self._interval_s):
                return

    def close(self) -> None:
        """Ends the thread. Some seconds later, the daemon drops this trainer's last report."""
        self._closed.set()
        self._thread.join()

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()
