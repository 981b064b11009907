"""Prefetch: the thread that brings experts nearer before anybody asks for them.

First the daemon is asked to promote them (NVMe to DRAM), then they are fetched, few at a time, into slots that nobody misses: free ones
beyond a reserve for demand, then clean, idle ones outside the working set that no newer prefetch names. Never a dirty or a pinned one. What
finds no such slot waits in the queue. Demand goes first everywhere: an expert that is asked for leaves the queue, and what is already
loading is waited for.

An error of speculation that demand would meet and retry by itself (daemon away, tier full) is only logged; any other surfaces.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field

from ooc_moe_client.core import Core
from ooc_moe_client.store import Priority, Sections
from ooc_moe_client.table import Resident
from ooc_moe_client.write_back import WriteBack
from ooc_moe_wire.errors import DeadlineExceeded, TierFull, Unavailable

log = logging.getLogger(__name__)

BATCH_EXPERTS_MAX = 4  # in one fetch: what a demand for its last expert may have to wait for


@dataclass(kw_only=True, slots=True)
class _Work:
    """The thread's next calls to the store."""

    cancel: bool = False
    promote: list[int] = field(default_factory=list)
    load: list[Resident] = field(default_factory=list)  # all need the same sections


class Prefetcher:
    """The queue of speculation and its thread. All but `join` needs the cache's lock."""

    def __init__(self, core: Core, write_back: WriteBack, *, experts_max: int) -> None:
        self._core = core
        self._write_back = write_back
        self._experts_max = experts_max
        self._reserve = core.table.capacity // 8
        self._calls = 0
        self._queue: dict[int, Sections] = {}  # in order of need
        self._promote: dict[int, None] = {}  # not yet named to the daemon
        self._cancel = False  # the daemon is to drop its queue
        self._thread = threading.Thread(target=self._run, name=f"prefetch {core.bank}", daemon=True)
        self._thread.start()

    def join(self) -> None:
        """Waits for the thread, after `core.closed` was set."""
        self._thread.join()

    def enqueue(self, experts: Iterable[int], sections: Sections) -> None:
        """Adds what is neither resident nor queued. When the queue is full, what has waited longest is cancelled."""
        self._calls += 1
        for expert in experts:
            resident = self._core.table.residents.get(expert)
            if resident is not None:
                resident.wanted_by = self._calls
            elif expert not in self._queue:
                self._queue[expert] = sections
                self._promote[expert] = None
                self._core.counters.prefetch_issued += 1
        while len(self._queue) > self._experts_max:
            self._cancel_queued(next(iter(self._queue)))
        self._core.changed.notify_all()

    def cancel(self) -> None:
        """Empties the queue, and the daemon's."""
        for expert in list(self._queue):
            self._cancel_queued(expert)
        self._cancel = True
        self._core.changed.notify_all()

    def _cancel_queued(self, expert: int) -> None:
        del self._queue[expert]
        self._promote.pop(expert, None)
        self._core.counters.prefetch_cancelled += 1

    @property
    def waiting(self) -> bool:
        """Something is queued, perhaps for want of a slot."""
        return bool(self._queue)

    def take(self, expert: int) -> None:
        """Demand takes over: the expert leaves the queue, if it is there, and counts as late."""
        if self._queue.pop(expert, None) is not None:
            self._promote.pop(expert, None)
            self._core.counters.prefetch_late += 1

    # The thread

    def _run(self) -> None:
        while True:
            with self._core.changed:
                while (work := self._next_work()) is None:
                    if self._core.closed:
                        return
                    self._core.changed.wait()
            try:
                self._do(work)
            except (Unavailable, DeadlineExceeded, TierFull) as error:
                log.info("bank %s: prefetch failed: %s", self._core.bank, error)
            except Exception as error:
                self._core.fail(error)

    def _next_work(self) -> _Work | None:
        if self._core.closed:
            return None
        if self._cancel or self._promote:
            work = _Work(cancel=self._cancel, promote=list(self._promote))
            self._cancel, self._promote = False, {}
            return work
        loading = self._claim()
        return _Work(load=loading) if loading else None

    def _claim(self) -> list[Resident]:
        """Takes slots for the first experts of the queue that need the same sections."""
        claimed: list[Resident] = []
        for expert, sections in list(self._queue.items()):
            if len(claimed) == BATCH_EXPERTS_MAX or (claimed and sections is not claimed[0].sections):
                break
            if self._write_back.pending(expert) is not None:
                continue
            if not self._make_room():
                break
            del self._queue[expert]
            resident = self._core.table.insert(expert, sections)
            resident.prefetched = True
            resident.wanted_by = self._calls
            claimed.append(resident)
        return claimed

    def _make_room(self) -> bool:
        """Whether a slot is free for speculation; evicts one that may be."""
        table = self._core.table
        if table.num_free > self._reserve:
            return True
        for resident in table.idle():
            if not (resident.dirty or table.in_working_set(resident) or resident.wanted_by == self._calls):
                table.evict(resident)
                return True
        return False

    def _do(self, work: _Work) -> None:
        if work.cancel:
            self._core.store.cancel_prefetch(self._core.bank)
        if work.promote:
            self._core.store.prefetch(self._core.bank, work.promote)
        if work.load:
            self._core.load(work.load, work.load[0].sections, Priority.PREFETCH)
