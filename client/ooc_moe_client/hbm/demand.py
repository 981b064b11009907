"""Demand: what the training thread does when it asks for experts: look, claim slots, fetch, wait, pin.

Whoever is there is pinned at once; what is missing is fetched in one call, into slots that write-back freed where no clean one was; what is
still on its way to the store comes back from its buffer; what a prefetch is just bringing is waited for. Where large victims have to be
saved first, what has a slot is fetched meanwhile, in pieces, by a thread that the training thread helps in the end. Knows nothing of the
reasons for which experts are asked.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from types import TracebackType

from ooc_moe_client.hbm.prefetch import Prefetcher
from ooc_moe_client.hbm.shared_state import Core
from ooc_moe_client.hbm.table import Group, Resident, State
from ooc_moe_client.hbm.write_back import WriteBack
from ooc_moe_client.store import Priority, Sections
from ooc_moe_wire.errors import InvalidRequest, TierFull

# What is worth a fetch of its own while the next victim is saved.
PIECE_BYTES = 8 << 20


class Pinned:
    """A `with` block in which experts stay in their slots; gives these slots, in the order of the experts."""

    __slots__ = ("_counted", "_demand", "_experts", "_group", "_sections", "_updating")

    def __init__(self, demand: Demand, experts: Sequence[int], sections: Sections, *, counted: bool, updating: bool = False) -> None:
        self._demand, self._experts, self._sections, self._counted, self._updating = demand, experts, sections, counted, updating

    def __enter__(self) -> list[int]:
        self._group = self._demand.pin(tuple(self._experts), self._sections, self._counted, self._updating)
        return self._group.slots

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._demand.unpin(self._group, updated=self._updating)


class Demand:
    """Pins experts for the training thread. Takes the cache's lock itself."""

    def __init__(
        self, core: Core, write_back: WriteBack, prefetcher: Prefetcher, *, on_access: Callable[[Sequence[int]], None] | None
    ) -> None:
        self._core, self._table, self._counters = core, core.table, core.counters
        self._write_back, self._prefetcher, self._on_access = write_back, prefetcher, on_access
        self._fetcher = ThreadPoolExecutor(1, thread_name_prefix=f"fetch {core.bank}")

    def join(self) -> None:
        """Ends the thread."""
        self._fetcher.shutdown()

    def pin(self, experts: tuple[int, ...], sections: Sections, counted: bool, updating: bool) -> Group:
        """Returns when all are ready and pinned."""
        with self._core.changed:
            self._core.raise_error()
            group = self._table.group(experts, sections)
            if group is None or (updating and any(resident.copying for resident in group.residents)):
                group = self._pin_singly(experts, sections, counted, updating)
            else:
                self._table.demand_group(group)
                self._count(experts, len(experts), counted)
                for resident in group.residents:
                    resident.pins += 1
            if updating:
                for resident in group.residents:
                    resident.updating += 1
            self._core.slab.acquire(group.slots, writing=updating)
        return group

    def _check_reading(self, experts: Sequence[int]) -> None:
        self._core.check_ids(experts)
        if len(set(experts)) < len(experts):
            repeated = next(expert for expert in experts if experts.count(expert) > 1)
            raise InvalidRequest(f"bank {self._core.bank!r}: expert {repeated} is repeated")
        if len(experts) > self._table.capacity:
            raise InvalidRequest(
                f"bank {self._core.bank!r}: {len(experts)} experts at once, capacity_experts is {self._table.capacity}; use waves()"
            )

    def _pin_singly(self, experts: tuple[int, ...], sections: Sections, counted: bool, updating: bool) -> Group:
        """Looks at each expert, fetches what is not there, and waits for what is on its way."""
        self._check_reading(experts)
        pinned: dict[int, Resident] = {}
        self._count(experts, self._demand(experts, sections), counted)
        try:
            self._pin_ready(experts, sections, pinned, updating)
            if len(pinned) < len(experts):
                self._bring(experts, sections, pinned, updating)
        except BaseException:
            for resident in pinned.values():
                resident.pins -= 1
            self._core.changed.notify_all()
            raise
        return self._table.make_group(experts, [pinned[expert] for expert in experts])

    def unpin(self, group: Group, *, updated: bool = False) -> None:
        """Lets go of them; `updated`: they changed."""
        with self._core.changed:
            self._core.slab.release(group.slots)
            for resident in group.residents:
                resident.pins -= 1
                if updated:
                    resident.updating -= 1
                    resident.generation += 1
                    self._table.mark(resident, dirty=True)
            if self._prefetcher.waiting or self._write_back.waiting:
                self._core.changed.notify_all()

    def _demand(self, experts: tuple[int, ...], sections: Sections) -> int:
        """Notes the demand for each; how many are there for it."""
        ready = 0
        self._table.advance(experts)
        for expert in experts:
            resident = self._table.residents.get(expert)
            if resident is None:
                self._prefetcher.take(expert)
            else:
                self._table.demand(resident)
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

    def _bring(self, experts: Sequence[int], sections: Sections, pinned: dict[int, Resident], updating: bool) -> None:
        """Fetches and waits until all are pinned. Enters and leaves with the lock, and lets go of it to fetch and to wait."""
        started = time.perf_counter()
        self._core.fetching = True
        try:
            while len(pinned) < len(experts):
                missing = [expert for expert in experts if expert not in pinned and not self._is_coming(expert)]
                if missing:
                    self._fetch_missing(missing, sections, pinned)
                else:
                    self._core.changed.wait()
                self._pin_ready(experts, sections, pinned, updating)
        finally:
            self._core.fetching = False
            self._core.changed.notify_all()
            self._counters.stall_s += time.perf_counter() - started

    def _is_coming(self, expert: int) -> bool:
        """It will be ready by itself: it is loading, or being copied out before it may be updated."""
        resident = self._table.residents.get(expert)
        return resident is not None and (resident.state is State.LOADING or resident.copying)

    def _fetch_missing(self, missing: Sequence[int], sections: Sections, pinned: dict[int, Resident]) -> None:
        claimed: list[Resident] = []
        pieces: dict[Future[None], list[Resident]] = {}
        num_sent = 0
        self._core.demanding = True
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
            self._core.demanding = False
            self._core.changed.notify_all()
            if claimed:
                self._finish(claimed, num_sent, pieces, pinned)

    def _is_worth_sending(self, claimed: Sequence[Resident]) -> bool:
        """Whether to fetch these while the next victim is saved."""
        num_bytes = sum(resident.num_bytes for resident in claimed)
        return num_bytes >= PIECE_BYTES and not self._table.num_free and self._write_back.must_save

    def _finish(
        self, claimed: Sequence[Resident], num_sent: int, pieces: dict[Future[None], list[Resident]], pinned: dict[int, Resident]
    ) -> None:
        """Fetches what was not sent, helps with the pieces, and waits. Enters and leaves with the lock. Raises what went wrong first."""
        self._core.changed.release()
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
            self._core.changed.acquire()
            pinned.update((resident.expert, resident) for resident in claimed if resident.state is State.READY)

    def _load(self, claimed: Sequence[Resident]) -> None:
        """One fetch for each choice of sections: one in all, but where the schedule keeps only some until their update."""
        parts = [[resident for resident in claimed if resident.sections is sections] for sections in Sections]
        try:
            while parts:
                if part := parts.pop(0):
                    self._core.load(part, part[0].sections, Priority.DEMAND)
        except BaseException:
            with self._core.changed:
                self._discard([resident for part in parts for resident in part])
            raise

    def _discard(self, claimed: Sequence[Resident]) -> None:
        for resident in claimed:
            resident.pins = 0
            self._table.remove(resident)

    def _claim(self, expert: int, sections: Sections, claimed: list[Resident], pinned: dict[int, Resident]) -> None:
        """Takes a slot for a missing expert, unless it came back while we waited for the slot (then the caller looks again).

        What the store does not have yet comes from its buffer: fetching it would bring an older version.
        """
        resident = self._table.residents.get(expert)
        if resident is not None and resident.state is State.READY and not resident.holds(sections):
            if resident.pins:
                raise InvalidRequest(f"bank {self._core.bank!r}: expert {expert} is pinned with its parameters only")
            self._table.remove(resident)
        self._wait_for_room(claimed)
        if expert in self._table.residents:
            return
        if self._write_back.pending(expert) is not None:
            resident = pinned[expert] = self._write_back.bring_back(expert)
        else:
            resident = self._table.insert(expert, self._table.sections_now(expert, sections))
            claimed.append(resident)
        self._table.demand(resident)
        resident.pins = 1

    def _wait_for_room(self, claimed: Sequence[Resident]) -> None:
        """Until a slot is free: evicts the next to leave that is idle and saved. Lets go of the lock to save one, and to wait."""
        while not self._table.num_free:
            if self._write_back.make_room(lambda resident: True):
                continue
            if (error := self._write_back.failed()) is not None:
                raise error
            mine = {resident.expert for resident in claimed}
            loading = any(resident.state is State.LOADING and resident.expert not in mine for resident in self._table.residents.values())
            if not (self._write_back.busy or loading):
                raise TierFull(f"bank {self._core.bank!r}: all {self._table.capacity} slots are pinned")
            self._core.fetching = False  # What it waits for may be a push.
            self._core.changed.notify_all()
            self._core.changed.wait()
            self._core.fetching = True
