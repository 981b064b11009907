"""Prefetch: the thread that brings experts nearer before anybody asks for them.

First the daemon is asked to promote them (NVMe to DRAM), then they are fetched, few at a time, into slots that nobody misses: free ones
beyond a reserve for demand, then idle ones outside the working set that no newer prefetch names, saved first where they are dirty. What
finds no such slot waits in the queue. Demand goes first everywhere: an expert that is asked for leaves the queue, and what is already
loading is waited for.

What the schedule foretells is no speculation: it is fetched in the order of need, before anything that is queued, into slots that are free
or hold what the schedule does not name. For what is needed soon, what is needed later leaves too, saved first where it is dirty. Only for
that: in a loop, what was used last is what is needed last, and would be given up for the next missing one after each use.

What a fetch did not bring is left to demand. An error that demand would meet and retry by itself (daemon away, tier full) is only logged;
any other surfaces.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from ooc_moe_client.hbm.admission import AdmissionMode
from ooc_moe_client.hbm.shared_state import Core
from ooc_moe_client.hbm.stats import PrefetchCount
from ooc_moe_client.hbm.table import Resident, State, num_bytes
from ooc_moe_client.hbm.write_back import WriteBack
from ooc_moe_client.store import Priority, Sections
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
        self._ahead = False  # the schedule is fetched before it is asked for
        self._complete_at: int | None = None  # all that it needs was there when so many residents had been removed
        self._promote: dict[int, None] = {}  # not yet named to the daemon
        self._cancel = False  # the daemon is to drop its queue
        self._not_brought: set[int] = set()  # by the fetches so far: demand must get to ask for it, until the schedule changes
        self._thread = threading.Thread(target=self._run, name=f"prefetch {core.bank}", daemon=True)
        self._thread.start()

    def join(self) -> None:
        """Waits for the thread, after `core.closed` was set."""
        self._thread.join()

    def enqueue(
        self, experts: Iterable[int], sections: Sections, *, within_s: float | None = None, probabilities: Mapping[int, float] | None = None
    ) -> None:
        """Adds what is neither resident nor queued, and admitted. When the queue is full, what has waited longest is cancelled."""
        self._calls += 1
        absent = []
        for expert in experts:
            resident = self._core.table.residents.get(expert)
            if resident is not None:
                resident.wanted_by = self._calls
            elif expert not in self._queue:
                absent.append(expert)
        for expert in absent:
            if self._admits(sections, within_s, 1.0 if probabilities is None else probabilities[expert]):
                self._queue[expert] = sections
                self._promote[expert] = None
                self._count("issued", sections)
        while len(self._queue) > self._experts_max:
            self._cancel_queued(next(iter(self._queue)))
        self._core.changed.notify_all()

    def _admits(self, sections: Sections, within_s: float | None, probability: float) -> bool:
        """Asks the admission, after what is queued already."""
        admission, table, layout = self._core.admission, self._core.table, self._core.layout
        if admission.mode is AdmissionMode.OFF:
            return True
        replaceable = sum(not table.in_working_set(resident) and resident.wanted_by != self._calls for resident in table.idle())
        before = sum(num_bytes(layout, queued) for queued in self._queue.values())
        loading = sum(resident.num_bytes for resident in table.residents.values() if resident.state is State.LOADING)
        refused = admission.refuses(
            num_bytes=loading + before + num_bytes(layout, sections),
            slots_left=max(0, table.num_free - self._reserve) + replaceable - len(self._queue),
            within_s=within_s,
            probability=probability,
        )
        if refused:
            self._count("refused", sections)
        return not refused or admission.mode is AdmissionMode.OBSERVE

    def _count(self, what: PrefetchCount, sections: Sections) -> None:
        self._core.counters.count_prefetch(what, num_bytes(self._core.layout, sections))

    def follow_schedule(self, *, ahead: bool) -> None:
        """The schedule changed; `ahead`: it is to be fetched before it is asked for."""
        self._ahead, self._complete_at = ahead, None
        self._not_brought.clear()
        self._core.changed.notify_all()

    def cancel(self) -> None:
        """Empties the queue, and the daemon's."""
        for expert in list(self._queue):
            self._cancel_queued(expert)
        self._cancel = True
        self._core.changed.notify_all()

    def _cancel_queued(self, expert: int) -> None:
        self._count("cancelled", self._queue.pop(expert))
        self._promote.pop(expert, None)

    @property
    def waiting(self) -> bool:
        """Something is queued or foretold, perhaps for want of a slot."""
        return bool(self._queue) or (self._ahead and self._complete_at != self._core.table.num_removed)

    def take(self, expert: int) -> None:
        """Demand takes over: the expert leaves the queue, if it is there, and counts as late."""
        if (sections := self._queue.pop(expert, None)) is not None:
            self._promote.pop(expert, None)
            self._count("late", sections)

    # The thread

    def _run(self) -> None:
        while True:
            try:
                with self._core.changed:
                    while (work := self._next_work()) is None:
                        if self._core.closed:
                            return
                        self._core.changed.wait()
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
        if self._core.demanding:
            return None
        loading = self._claim_foretold() or self._claim()
        return _Work(load=loading) if loading else None

    def _claim_foretold(self) -> list[Resident]:
        """Takes slots for what the schedule needs next, in its order, from what it needs later."""
        table = self._core.table
        claimed: list[Resident] = []
        for next_use, expert in self._foretold() if self.waiting else ():
            if len(claimed) == BATCH_EXPERTS_MAX:
                break
            if not self._is_missing(expert, next_use):
                continue
            if expert not in table.residents and not self._make_room_before(next_use):
                break
            if not self._is_missing(expert, next_use):
                continue
            sections = table.sections_ahead(expert)
            if claimed and sections is not claimed[0].sections:
                break
            if (resident := table.residents.get(expert)) is not None:
                table.remove(resident)  # It lacks its optimizer section.
            self._issue_foretold(expert, sections)
            claimed.append(self._insert(expert, sections, foretold=True))
        return claimed

    def _is_missing(self, expert: int, next_use: int) -> bool:
        """Whether to fetch what `_foretold` named. To be asked again whenever the lock was let go, to save a victim."""
        resident = self._core.table.residents.get(expert)
        return (
            self._core.table.schedule.next_use(expert) == next_use
            and self._core.table.lacks(expert)
            and not (resident is not None and resident.pins)
            and self._write_back.pending(expert) is None
        )

    def _issue_foretold(self, expert: int, sections: Sections) -> None:
        """Counts it; the schedule takes over what speculation has queued."""
        if (queued := self._queue.pop(expert, None)) is not None:
            self._count("cancelled", queued)
        self._core.counters.count_prefetch("issued", num_bytes(self._core.layout, sections), foretold=True)

    def _foretold(self) -> list[tuple[int, int]]:
        """(next use, expert) of what is still to be fetched, the soonest first."""
        table = self._core.table
        experts = (expert for expert in table.schedule.experts if expert not in self._not_brought)
        uses = [(next_use, expert) for expert in experts if (next_use := table.schedule.next_use(expert)) is not None]
        missing = sorted((next_use, expert) for next_use, expert in uses if table.lacks(expert))
        if not missing and all(table.residents[expert].sections is Sections.ALL for _, expert in uses):
            self._complete_at = table.num_removed
        return missing

    def _make_room_before(self, next_use: int) -> bool:
        """Frees a slot that nothing needs before `next_use`; may let go of the lock."""
        table = self._core.table
        soon = next_use < table.schedule.soon(table.capacity // 2)

        def later(resident: Resident) -> bool:
            other = table.schedule.next_use(resident.expert)
            return other is None or (soon and other > next_use)

        while not table.num_free:
            if not self._evict(later):
                return False
        return True

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
            if self._write_back.pending(expert) is not None or self._queue.pop(expert, None) is None:
                continue  # Demand was faster, while the lock was let go to save a victim.
            claimed.append(self._insert(expert, sections))
        return claimed

    def _insert(self, expert: int, sections: Sections, *, foretold: bool = False) -> Resident:
        resident = self._core.table.insert(expert, sections)
        resident.prefetched, resident.foretold = True, foretold
        resident.wanted_by = self._calls
        return resident

    def _make_room(self) -> bool:
        """Whether a slot is free for speculation; evicts one that may be, and may let go of the lock."""
        table = self._core.table
        if table.num_free > self._reserve:
            return True
        num_free = table.num_free

        def may_leave(resident: Resident) -> bool:
            return not (table.in_working_set(resident) or resident.wanted_by == self._calls)

        while table.num_free <= num_free:
            if not self._evict(may_leave):
                return False
        return True

    def _evict(self, may_leave: Callable[[Resident], bool]) -> bool:
        """As `WriteBack.make_room`, after demand. An error is left to the training thread: what has a slot already is to be fetched."""
        try:
            return not self._core.demanding and self._write_back.make_room(may_leave)
        except Exception as error:
            self._core.fail(error)
            return False

    def _do(self, work: _Work) -> None:
        if work.cancel:
            self._core.store.cancel_prefetch(self._core.bank)
        if work.promote:
            self._core.store.prefetch(self._core.bank, work.promote)
        if work.load:
            try:
                self._core.load(work.load, work.load[0].sections, Priority.PREFETCH)
            finally:
                with self._core.changed:
                    self._not_brought.update(resident.expert for resident in work.load if resident.state is State.LOADING)
