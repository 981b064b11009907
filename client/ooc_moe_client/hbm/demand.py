"""`Demand`: brings the experts that the training thread asks for into slots, and pins them (a pinned expert stays in its slot).

What is done depends on where the expert is:

    ready in its slot                  -> pinned at once
    a prefetch is loading it           -> waited for
    its write-back is still pending    -> copied back from the write-back's buffer: the store has an older version
    missing                            -> gets a slot (another expert is evicted for it, and saved first if it is dirty), and is fetched

All missing experts are fetched in one call. There is one exception: while a large dirty expert is being saved before its eviction, a helper
thread already fetches the missing experts that have a slot, in several calls. If some of these calls have not begun when all experts have a
slot, the training thread makes them itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from types import TracebackType

from ooc_moe_client.hbm.prefetch import Prefetcher
from ooc_moe_client.hbm.shared_state import SharedState
from ooc_moe_client.hbm.table import Group, LoadState, Resident
from ooc_moe_client.hbm.write_back import WriteBack
from ooc_moe_client.store import Priority, Sections
from ooc_moe_wire.errors import InvalidRequest, TierFull

# While the next victim is saved, experts of this many bytes together are worth a fetch of their own.
PIECE_BYTES = 8 << 20


class Pinned:
    """A context manager that pins experts: inside the `with` block they stay in their slots.

    `as` gives the list of the experts' slots, in the order of the experts. `ExpertCache.reading` and `ExpertCache.updating` return a
    `Pinned`.
    """

    __slots__ = ("_counted", "_demand", "_experts", "_group", "_sections", "_updating")

    def __init__(self, demand: Demand, experts: Sequence[int], sections: Sections, *, counted: bool, updating: bool = False) -> None:
        self._demand, self._experts, self._sections, self._counted, self._updating = demand, experts, sections, counted, updating

    def __enter__(self) -> list[int]:
        self._group = self._demand.pin(tuple(self._experts), self._sections, self._counted, self._updating)
        return self._group.slots

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._demand.unpin(self._group, updated=self._updating)


class Demand:
    """Fetches and pins the experts that the training thread asks for: the work behind `ExpertCache.reading` and `updating`.

    Public methods take the cache's lock.
    """

    def __init__(
        self, shared: SharedState, write_back: WriteBack, prefetcher: Prefetcher, *, on_access: Callable[[Sequence[int]], None] | None
    ) -> None:
        self._shared, self._table, self._counters = shared, shared.table, shared.counters
        self._write_back, self._prefetcher, self._on_access = write_back, prefetcher, on_access
        self._fetcher = ThreadPoolExecutor(1, thread_name_prefix=f"fetch {shared.bank}", initializer=shared.slots.enter_thread)

    def join(self) -> None:
        """Waits for the helper thread to end."""
        self._fetcher.shutdown()

    def pin(self, experts: tuple[int, ...], sections: Sections, counted: bool, updating: bool) -> Group:
        """Pins experts, and returns them as a `Group` (the experts and their slots) when all are ready.

        `updating`: the caller will write the experts. `ExpertCache.reading` documents the other arguments and the errors.
        """
        self._shared.slots.check_stream()
        with self._shared.changed:
            self._shared.raise_error()
            group = self._table.find_group(experts, sections)
            if group is None or (updating and any(resident.copying for resident in group.residents)):
                group = self._pin_singly(experts, sections, counted, updating)
            else:
                self._table.note_group_demand(group)
                self._count(experts, len(experts), counted)
                for resident in group.residents:
                    resident.pins += 1
            if updating:
                for resident in group.residents:
                    resident.updating += 1
            self._shared.slots.acquire(group.slots, writing=updating)
        return group

    def _check_reading(self, experts: Sequence[int]) -> None:
        self._shared.check_ids(experts)
        if len(set(experts)) < len(experts):
            repeated = next(expert for expert in experts if experts.count(expert) > 1)
            raise InvalidRequest(f"bank {self._shared.bank!r}: expert {repeated} is repeated")
        if len(experts) > self._table.capacity:
            raise InvalidRequest(
                f"bank {self._shared.bank!r}: {len(experts)} experts at once, capacity_experts is {self._table.capacity}; use waves()"
            )

    def _pin_singly(self, experts: tuple[int, ...], sections: Sections, counted: bool, updating: bool) -> Group:
        """Pins experts one by one: ready ones at once, all others after they were fetched or loaded. Returns them as a group."""
        self._check_reading(experts)
        pinned: dict[int, Resident] = {}
        self._count(experts, self._note_demand(experts, sections), counted)
        try:
            self._pin_ready(experts, sections, pinned, updating)
            if len(pinned) < len(experts):
                self._fetch_and_wait(experts, sections, pinned, updating)
        except BaseException:
            for resident in pinned.values():
                resident.pins -= 1
            self._shared.changed.notify_all()
            raise
        return self._table.remember_group(experts, [pinned[expert] for expert in experts])

    def unpin(self, group: Group, *, updated: bool = False) -> None:
        """Unpins the experts of a group. With `updated`, also marks the experts dirty: they were changed, and must be pushed."""
        with self._shared.changed:
            self._shared.slots.release(group.slots)
            for resident in group.residents:
                resident.pins -= 1
                if updated:
                    resident.updating -= 1
                    resident.generation += 1
                    self._table.set_dirty(resident, True)
            if self._prefetcher.has_work or self._write_back.has_requests:
                self._shared.changed.notify_all()
        self._shared.slots.check_stream()

    def _note_demand(self, experts: tuple[int, ...], sections: Sections) -> int:
        """Records in the table and the schedule that these experts are asked for. Returns how many are ready with these sections."""
        ready = 0
        self._table.advance(experts)
        for expert in experts:
            resident = self._table.residents.get(expert)
            if resident is None:
                self._prefetcher.hand_over_to_demand(expert)
            else:
                self._table.note_demand(resident)
                ready += resident.holds(sections)
        return ready

    def _count(self, experts: tuple[int, ...], ready: int, counted: bool) -> None:
        if counted:
            if self._on_access is not None:
                self._on_access(experts)
            self._counters.accesses += len(experts)
            self._counters.hits += ready
            self._counters.misses += len(experts) - ready
        else:
            self._counters.refetches += len(experts) - ready

    def _pin_ready(self, experts: Sequence[int], sections: Sections, pinned: dict[int, Resident], updating: bool) -> None:
        for expert in experts:
            resident = self._table.residents.get(expert)
            if expert not in pinned and resident is not None and resident.holds(sections) and not (updating and resident.copying):
                resident.pins += 1
                pinned[expert] = resident

    def _fetch_and_wait(self, experts: Sequence[int], sections: Sections, pinned: dict[int, Resident], updating: bool) -> None:
        """Fetches missing experts, waits for those that are loading, and pins all of them.

        The lock is held on entry and exit, and released to fetch and to wait.
        """
        started = time.perf_counter()
        self._shared.fetching = True
        try:
            while len(pinned) < len(experts):
                missing = [expert for expert in experts if expert not in pinned and not self._is_coming(expert)]
                if missing:
                    self._fetch_missing(missing, sections, pinned)
                else:
                    self._shared.changed.wait()
                self._pin_ready(experts, sections, pinned, updating)
        finally:
            self._shared.fetching = False
            self._shared.changed.notify_all()
            self._counters.stall_s += time.perf_counter() - started

    def _is_coming(self, expert: int) -> bool:
        """Whether to wait for the expert instead of fetching it: it is loading, or its slot is being copied out and may be used after
        that.
        """
        resident = self._table.residents.get(expert)
        return resident is not None and (resident.state is LoadState.LOADING or resident.copying)

    def _fetch_missing(self, missing: Sequence[int], sections: Sections, pinned: dict[int, Resident]) -> None:
        claimed: list[Resident] = []
        pieces: dict[Future[None], list[Resident]] = {}
        num_sent = 0
        self._shared.demanding = True
        try:
            for expert in missing:
                if self._is_worth_sending(claimed[num_sent:]):
                    pieces[self._fetcher.submit(self._load, claimed[num_sent:])] = claimed[num_sent:]
                    num_sent = len(claimed)
                self._claim(expert, sections, claimed, pinned)
        except BaseException:
            self._discard(claimed[num_sent:])
            del claimed[num_sent:]
            raise
        finally:
            self._shared.demanding = False
            self._shared.changed.notify_all()
            if claimed:
                self._finish(claimed, num_sent, pieces, pinned)

    def _is_worth_sending(self, claimed: Sequence[Resident]) -> bool:
        """Whether to fetch these experts, which have their slots, in a call of their own while the next dirty expert is saved."""
        num_bytes = sum(resident.num_bytes for resident in claimed)
        return num_bytes >= PIECE_BYTES and not self._table.num_free and self._write_back.next_victim_is_dirty

    def _finish(
        self, claimed: Sequence[Resident], num_sent: int, pieces: dict[Future[None], list[Resident]], pinned: dict[int, Resident]
    ) -> None:
        """Fetches the claimed experts that the helper thread has not begun to fetch, and waits for the helper thread to fetch the rest.

        The lock is held on entry and exit. Raises the first error.

        Args:
            claimed: all experts that got a slot, in order.
            num_sent: how many of these, from the first on, were handed to the helper thread.
            pieces: the helper thread's calls, each with its experts.
            pinned: the experts that are ready are added to this.
        """
        self._shared.changed.release()
        try:
            self._load(claimed[num_sent:])
            for piece, residents in reversed(pieces.items()):
                if piece.cancel():
                    self._load(residents)
            for piece in pieces:
                if not piece.cancelled():
                    piece.result()
        finally:
            wait(pieces)
            self._shared.changed.acquire()
            pinned.update((resident.expert, resident) for resident in claimed if resident.state is LoadState.READY)

    def _load(self, claimed: Sequence[Resident]) -> None:
        """Fetches experts that have a slot, in two calls: one for whole experts, one for those that need only their parameters."""
        parts = [[resident for resident in claimed if resident.sections is sections] for sections in Sections]
        try:
            while parts:
                if part := parts.pop(0):
                    self._shared.load(part, part[0].sections, Priority.DEMAND)
        except BaseException:
            with self._shared.changed:
                self._discard([resident for part in parts for resident in part])
            raise

    def _discard(self, claimed: Sequence[Resident]) -> None:
        for resident in claimed:
            resident.pins = 0
            self._table.remove(resident)

    def _claim(self, expert: int, sections: Sections, claimed: list[Resident], pinned: dict[int, Resident]) -> None:
        """Gives a slot to a missing expert, and adds the expert to `claimed`, the list of experts to fetch.

        If the expert's write-back is pending, its bytes are copied from the write-back's buffer to the slot instead, because the store has
        an older version; the expert is then added to `pinned`. If a prefetch brought the expert while this waited for a slot, nothing is
        done, and the caller looks again.
        """
        resident = self._table.residents.get(expert)
        if resident is not None and resident.state is LoadState.READY and not resident.holds(sections):
            if resident.pins:
                raise InvalidRequest(f"bank {self._shared.bank!r}: expert {expert} is pinned with its parameters only")
            self._table.remove(resident)
        self._wait_for_room(claimed)
        if expert in self._table.residents:
            return
        if self._write_back.pending(expert) is not None:
            resident = pinned[expert] = self._write_back.bring_back(expert)
        else:
            resident = self._table.insert(expert, self._table.sections_to_fetch(expert, sections))
            claimed.append(resident)
        self._table.note_demand(resident)
        resident.pins = 1

    def _wait_for_room(self, claimed: Sequence[Resident]) -> None:
        """Evicts experts until a slot is free. Raises TierFull when all slots are pinned.

        Releases the lock while it saves a dirty expert, and while it waits. `claimed`: experts that this call has already given a slot.
        """
        while not self._table.num_free:
            if self._write_back.make_room(lambda resident: True):
                continue
            if (error := self._write_back.failed()) is not None:
                raise error
            mine = {resident.expert for resident in claimed}
            loading = any(
                resident.state is LoadState.LOADING and resident.expert not in mine for resident in self._table.residents.values()
            )
            if not (self._write_back.busy or loading):
                raise TierFull(f"bank {self._shared.bank!r}: all {self._table.capacity} slots are pinned")
            self._shared.fetching = False  # The room may come from a push.
            self._shared.changed.notify_all()
            self._shared.changed.wait()
            self._shared.fetching = True
