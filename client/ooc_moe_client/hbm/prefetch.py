"""`Prefetcher`: a thread that fetches experts before the training thread asks for them.

It takes experts from two sources, the queue and the schedule. Experts that the training thread asks for now (demand) come before both
sources: such an expert leaves the queue, and if it is already loading, the training thread waits for it.

The queue holds guesses (`ExpertCache.prefetch`). The daemon is asked to copy them from NVMe to DRAM. Then they are fetched, a few at a
time, into free slots (some of which are reserved for demand), and into slots of experts that are outside the working set (the recently used
experts) and that the newest prefetch call does not name. Such an expert is saved before its eviction if it is dirty. A guess that finds no
slot stays in the queue.

The schedule (`ExpertCache.schedule`) names experts that will be needed for certain. They are fetched before the queue, in the order of
their next use, into slots that are free or hold an expert that the schedule does not name. For an expert that is needed soon, the thread
also evicts an expert that is needed later. It never does this for an expert that is needed late: in a loop, the expert that was just used
is needed last, and would be evicted after each use.

When a fetch fails, the experts that it did not bring are left to the training thread, which fetches them when it asks for them. (A later
prefetch call or schedule may name them again.) Errors that the training thread's own fetch would meet and retry (Unavailable,
DeadlineExceeded, TierFull) are only logged; any other error is raised in the training thread.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from ooc_moe_client.hbm.admission import AdmissionMode
from ooc_moe_client.hbm.shared_state import SharedState
from ooc_moe_client.hbm.stats import PrefetchCount
from ooc_moe_client.hbm.table import LoadState, Resident
from ooc_moe_client.hbm.write_back import WriteBack
from ooc_moe_client.store import Priority, Sections
from ooc_moe_wire.errors import DeadlineExceeded, TierFull, Unavailable

log = logging.getLogger(__name__)

BATCH_EXPERTS_MAX = 4  # of one fetch; a demand for the last of them has to wait for the others


@dataclass(kw_only=True, slots=True)
class _Work:
    """What the prefetch thread asks of the store next: cancel prefetches, promote experts (NVMe to DRAM), or fetch them into slots."""

    cancel: bool = False  # cancel all queued promotions
    promote: list[int] = field(default_factory=list)
    load: list[Resident] = field(default_factory=list)  # all need the same sections


class Prefetcher:
    """A thread that fetches experts before they are asked for: guesses from a queue, and experts that the schedule names.

    Callers of every method but `join` hold the cache's lock.
    """

    def __init__(self, shared: SharedState, write_back: WriteBack, *, experts_max: int) -> None:
        self._shared = shared
        self._write_back = write_back
        self._experts_max = experts_max
        self._reserve = shared.table.capacity // 8
        self._calls = 0
        self._queue: dict[int, Sections] = {}  # the most urgent first
        self._fetch_ahead = False  # whether to fetch what the schedule names
        self._complete_at: int | None = None  # the table's `num_removed` when all that the schedule needs was here
        self._promote: dict[int, None] = {}  # experts that the daemon is still to be asked to promote
        self._cancel = False  # the daemon is still to be asked to cancel its queue
        self._not_brought: set[int] = set()  # by failed fetches: left to demand until the schedule changes
        self._thread = threading.Thread(target=self._run, name=f"prefetch {shared.bank}", daemon=True)
        self._thread.start()

    def join(self) -> None:
        """Waits for the thread to end. Call this after `shared.closed` was set, which makes it end."""
        self._thread.join()

    def enqueue(
        self, experts: Iterable[int], sections: Sections, *, within_s: float | None = None, probabilities: Mapping[int, float] | None = None
    ) -> None:
        """Queues experts to be prefetched, if they are in no slot, are not queued yet, and `Admission` finds their fetches worthwhile.

        When the queue is full, the experts that have waited longest are dropped. `ExpertCache.prefetch` documents the arguments.
        """
        self._calls += 1
        absent = []
        for expert in experts:
            resident = self._shared.table.residents.get(expert)
            if resident is not None:
                resident.prefetch_call = self._calls
            elif expert not in self._queue:
                absent.append(expert)
        for expert in absent:
            if self._admits(sections, within_s, 1.0 if probabilities is None else probabilities[expert]):
                self._queue[expert] = sections
                self._promote[expert] = None
                self._count("issued", sections)
        while len(self._queue) > self._experts_max:
            self._cancel_queued(next(iter(self._queue)))
        self._shared.changed.notify_all()

    def _admits(self, sections: Sections, within_s: float | None, probability: float) -> bool:
        """Whether the admission allows one more expert in the queue, behind those that are queued or loading. Counts a refusal."""
        admission, table, layout = self._shared.admission, self._shared.table, self._shared.layout
        if admission.mode is AdmissionMode.OFF:
            return True
        replaceable = sum(not table.in_working_set(resident) and resident.prefetch_call != self._calls for resident in table.evictable())
        queued = sum(queued.num_bytes(layout) for queued in self._queue.values())
        loading = sum(resident.num_bytes for resident in table.residents.values() if resident.state is LoadState.LOADING)
        refused = admission.refuses(
            num_bytes=loading + queued + sections.num_bytes(layout),
            slots_left=max(0, table.num_free - self._reserve) + replaceable - len(self._queue),
            within_s=within_s,
            probability=probability,
        )
        if refused:
            self._count("refused", sections)
        return not refused or admission.mode is AdmissionMode.OBSERVE

    def _count(self, what: PrefetchCount, sections: Sections) -> None:
        self._shared.counters.count_prefetch(what, sections.num_bytes(self._shared.layout))

    def follow_schedule(self, *, ahead: bool) -> None:
        """Starts to follow the new schedule (announced order of uses) in the table. `ahead`: fetch its experts before they are needed."""
        self._fetch_ahead, self._complete_at = ahead, None
        self._not_brought.clear()
        self._shared.changed.notify_all()

    def cancel(self) -> None:
        """Empties this queue of prefetches. The thread then asks the daemon to cancel the bank's prefetches that the daemon has queued."""
        for expert in list(self._queue):
            self._cancel_queued(expert)
        self._cancel = True
        self._shared.changed.notify_all()

    def _cancel_queued(self, expert: int) -> None:
        self._count("cancelled", self._queue.pop(expert))
        self._promote.pop(expert, None)

    @property
    def has_work(self) -> bool:
        """Whether any expert is still to be fetched, because it is queued or scheduled. That expert may have to wait for a slot."""
        return bool(self._queue) or (self._fetch_ahead and self._complete_at != self._shared.table.num_removed)

    def hand_over_to_demand(self, expert: int) -> None:
        """Removes an expert from the queue, if it is there, because the training thread fetches it itself now.

        In that case the prefetch counts as late.
        """
        if (sections := self._queue.pop(expert, None)) is not None:
            self._promote.pop(expert, None)
            self._count("late", sections)

    # The thread

    def _run(self) -> None:
        self._shared.slots.enter_thread()
        while True:
            try:
                with self._shared.changed:
                    while (work := self._next_work()) is None:
                        if self._shared.closed:
                            return
                        self._shared.changed.wait()
                self._do(work)
            except (Unavailable, DeadlineExceeded, TierFull) as error:
                log.info("bank %s: prefetch failed: %s", self._shared.bank, error)
            except Exception as error:
                self._shared.fail(error)

    def _next_work(self) -> _Work | None:
        if self._shared.closed:
            return None
        if self._cancel or self._promote:
            work = _Work(cancel=self._cancel, promote=list(self._promote))
            self._cancel, self._promote = False, {}
            return work
        if self._shared.demanding:
            return None
        loading = self._claim_scheduled() or self._claim()
        return _Work(load=loading) if loading else None

    def _claim_scheduled(self) -> list[Resident]:
        """Gives slots to the experts that the schedule needs next, at most `BATCH_EXPERTS_MAX`. Returns them, to be fetched."""
        table = self._shared.table
        claimed: list[Resident] = []
        for next_use, expert in self._scheduled_and_missing() if self.has_work else ():
            if len(claimed) == BATCH_EXPERTS_MAX:
                break
            if not self._is_missing(expert, next_use):
                continue
            if expert not in table.residents and not self._make_room_before(next_use):
                break
            if not self._is_missing(expert, next_use):
                continue
            sections = table.sections_for_next_use(expert)
            if claimed and sections is not claimed[0].sections:
                break
            if (resident := table.residents.get(expert)) is not None:
                table.remove(resident)  # It has no optimizer section yet.
            self._issue_scheduled(expert, sections)
            claimed.append(self._insert(expert, sections, scheduled=True))
        return claimed

    def _is_missing(self, expert: int, next_use: int) -> bool:
        """Whether an expert from `_scheduled_and_missing` must still be fetched. Call this again whenever the lock was released."""
        resident = self._shared.table.residents.get(expert)
        return (
            self._shared.table.schedule.next_use(expert) == next_use
            and self._shared.table.lacks_for_next_use(expert)
            and not (resident is not None and resident.pins)
            and self._write_back.pending(expert) is None
        )

    def _issue_scheduled(self, expert: int, sections: Sections) -> None:
        """Counts the fetch of an expert that the schedule names. If the expert was also queued as a guess, removes it from the queue."""
        if (queued := self._queue.pop(expert, None)) is not None:
            self._count("cancelled", queued)
        self._shared.counters.count_prefetch("issued", sections.num_bytes(self._shared.layout), scheduled=True)

    def _scheduled_and_missing(self) -> list[tuple[int, int]]:
        """The pairs (next use, expert) of the experts that the schedule names and that must still be fetched, the soonest use first."""
        table = self._shared.table
        experts = (expert for expert in table.schedule.experts if expert not in self._not_brought)
        uses = [(next_use, expert) for expert in experts if (next_use := table.schedule.next_use(expert)) is not None]
        missing = sorted((next_use, expert) for next_use, expert in uses if table.lacks_for_next_use(expert))
        if not missing and all(table.residents[expert].sections is Sections.ALL for _, expert in uses):
            self._complete_at = table.num_removed
        return missing

    def _make_room_before(self, next_use: int) -> bool:
        """Frees a slot for an expert that is used at `next_use`, without evicting one that is needed earlier. False: there is none.

        May release the lock.
        """
        table = self._shared.table
        is_soon = next_use < table.schedule.end_of_near_future(table.capacity // 2)

        def is_needed_later(resident: Resident) -> bool:
            other = table.schedule.next_use(resident.expert)
            return other is None or (is_soon and other > next_use)

        while not table.num_free:
            if not self._evict(is_needed_later):
                return False
        return True

    def _claim(self) -> list[Resident]:
        """Gives slots to the first experts of the queue that need the same sections. Returns them, to be fetched."""
        claimed: list[Resident] = []
        for expert, sections in list(self._queue.items()):
            if len(claimed) == BATCH_EXPERTS_MAX or (claimed and sections is not claimed[0].sections):
                break
            if self._write_back.pending(expert) is not None:
                continue
            if not self._make_room():
                break
            if self._write_back.pending(expert) is not None or self._queue.pop(expert, None) is None:
                continue  # Demand took it, while the lock was released to save a victim.
            claimed.append(self._insert(expert, sections))
        return claimed

    def _insert(self, expert: int, sections: Sections, *, scheduled: bool = False) -> Resident:
        resident = self._shared.table.insert(expert, sections)
        resident.prefetched, resident.scheduled = True, scheduled
        resident.prefetch_call = self._calls
        return resident

    def _make_room(self) -> bool:
        """Frees a slot for a guessed expert, by an eviction if necessary. Returns whether there is a slot. May release the lock."""
        table = self._shared.table
        if table.num_free > self._reserve:
            return True
        num_free = table.num_free

        def may_leave(resident: Resident) -> bool:
            return not (table.in_working_set(resident) or resident.prefetch_call == self._calls)

        while table.num_free <= num_free:
            if not self._evict(may_leave):
                return False
        return True

    def _evict(self, may_leave: Callable[[Resident], bool]) -> bool:
        """Calls `WriteBack.make_room`, but returns False while the training thread is taking slots.

        An error is kept for the training thread and not raised in this method, so that the experts that already have a slot are still
        fetched.
        """
        try:
            return not self._shared.demanding and self._write_back.make_room(may_leave)
        except Exception as error:
            self._shared.fail(error)
            return False

    def _do(self, work: _Work) -> None:
        if work.cancel:
            self._shared.store.cancel_prefetch(self._shared.bank)
        if work.promote:
            self._shared.store.prefetch(self._shared.bank, work.promote)
        if work.load:
            try:
                self._shared.load(work.load, work.load[0].sections, Priority.PREFETCH)
            finally:
                with self._shared.changed:
                    self._not_brought.update(resident.expert for resident in work.load if resident.state is LoadState.LOADING)
