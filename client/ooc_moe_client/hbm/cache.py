"""`ExpertCache`: the trainer's cache of experts, in HBM (or in host memory: device "cpu" runs the same code).

    with cache.reading([3, 7]) as slots:              # pinned; misses are fetched in one call
        w1_SDH = cache.views["w1"]                     # expert 3 is w1_SDH[slots[0]]
    with cache.updating([3, 7]) as slots: ...          # the optimizer writes; dirty afterwards
    cache.flush()                                      # everything is durable

This file is what the trainer calls. demand.py pins for it; behind its back work write_back.py and prefetch.py; table.py knows who may be
evicted, slab.py where the bytes lie. Deliberately knows nothing of layers, routing or optimizers.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from ooc_moe_client.hbm.admission import AdmissionMode
from ooc_moe_client.hbm.cuda_slots import CudaSlab
from ooc_moe_client.hbm.demand import Demand, Pinned
from ooc_moe_client.hbm.prefetch import Prefetcher
from ooc_moe_client.hbm.schedule import Schedule, Use
from ooc_moe_client.hbm.shared_state import Core
from ooc_moe_client.hbm.slots import HostSlab, Slab
from ooc_moe_client.hbm.stats import CacheStats
from ooc_moe_client.hbm.table import State
from ooc_moe_client.hbm.write_back import WriteBack
from ooc_moe_client.store import ExpertStore, Sections
from ooc_moe_wire.errors import InvalidRequest
from ooc_moe_wire.layout import Layout

log = logging.getLogger(__name__)

PREFETCH_EXPERTS_MAX = 64


class ExpertCache:
    """A fixed number of slots for the experts of one bank, read, changed and pushed back here.

    One training thread uses it; `stats` may be called from any. Errors of background work (a refused push, say) are raised, once, by the
    next call; what could not be pushed is kept.

    Args:
        store: where the experts live.
        bank: the bank's name; it must exist.
        capacity_experts: the number of slots.
        device: "cpu", "cuda" or "cuda:N".
        prefetch_experts_max: the most experts that wait in the prefetch queue.
        admission: whether prefetches are judged (see admission.py).
        on_access: told the ids of each counted reading, in order and under the cache's lock: it must be quick, and not call the cache.

    Raises:
        InvalidRequest: capacity_experts is below 1.
        UnknownBank: there is no such bank.
    """

    def __init__(
        self,
        store: ExpertStore,
        bank: str,
        *,
        capacity_experts: int,
        device: str | torch.device = "cpu",
        prefetch_experts_max: int = PREFETCH_EXPERTS_MAX,
        admission: AdmissionMode = AdmissionMode.OFF,
        on_access: Callable[[Sequence[int]], None] | None = None,
    ) -> None:
        if capacity_experts < 1:
            raise InvalidRequest(f"capacity_experts: {capacity_experts} slots cannot hold one expert of bank {bank!r}")
        if prefetch_experts_max < 0:
            raise InvalidRequest(f"prefetch_experts_max: {prefetch_experts_max} is negative")
        spec = store.get_bank(bank).spec
        self.bank = bank
        self.layout: Layout = spec.layout
        self.capacity_experts = capacity_experts
        self.device = torch.device(device)
        self._slab = _slab_on(self.device, spec.layout, capacity_experts)
        self._core = Core(store, spec, self._slab, capacity_experts, admission)
        self._wave_experts = capacity_experts
        self._table = self._core.table
        self._counters = self._core.counters
        self._write_back = WriteBack(self._core)
        self._prefetcher = Prefetcher(self._core, self._write_back, experts_max=prefetch_experts_max)
        self._demand = Demand(self._core, self._write_back, self._prefetcher, on_access=on_access)

    @property
    def views(self) -> dict[str, Tensor]:
        """By tensor name (parameters and optimizer): a strided view (slots, *shape) of the slab. Only pinned slots may be touched."""
        return self._slab.views

    @property
    def num_experts(self) -> int:
        """Experts in the bank."""
        return self._core.num_experts

    def grow(self, num_experts: int) -> None:
        """Raises the bank's number of experts to at least `num_experts`."""
        self._core.num_experts = self._core.store.grow_bank(self.bank, num_experts).spec.num_experts

    # The working set

    def reading(self, experts: Sequence[int], *, sections: Sections = Sections.ALL, counted: bool = True) -> Pinned:
        """Pins experts for reading; gives their slots, in the same order. Misses are fetched in one call.

        What was read together before, and is still here, costs one look at the table.

        Args:
            experts: distinct ids, at most `capacity_experts` (see `waves`).
            sections: PARAMETERS fetches only these, unless the schedule updates the expert while it is still here; a later reading of ALL
                fetches the expert anew.
            counted: False for a second look at what was already counted (backward, optimizer): not in accesses, hits or misses.

        Raises:
            InvalidRequest: an expert is repeated, or they are more than the slots.
            UnknownExpert: an id outside the bank, before anything is fetched.
            TierFull: too many slots are pinned.
            And what the store raises, or raised behind (CorruptRecord, Unavailable, StaleVersion, LostUpdate, NotTheWriter).
        """
        return Pinned(self._demand, experts, sections, counted=counted)

    def updating(self, experts: Sequence[int]) -> Pinned:
        """Pins experts for writing, both sections; they are dirty afterwards, also after an exception. Raises as `reading`."""
        return Pinned(self._demand, experts, Sections.ALL, counted=False, updating=True)

    def waves(self, experts: Sequence[int]) -> Iterator[list[int]]:
        """Cuts a list into pieces that fit the slots, in ascending order of ids, so that sums over them never depend on residency.

        While a schedule is followed that the slots have no room for, pieces fit half of them: the next one comes while one is computed.
        """
        ordered = sorted(experts)
        for start in range(0, len(ordered), self._wave_experts):
            yield ordered[start : start + self._wave_experts]

    def schedule(self, uses: Iterable[Use], *, ahead: bool = True) -> None:
        """Tells which experts will be read (PARAMETERS) and updated (ALL) from now on, in order; replaces what was told before.

        It is advice: whoever has the furthest next use leaves first, and with `ahead` what is needed next is fetched before anybody asks.
        What is read or updated otherwise, or never, costs time but is right.

        Raises:
            UnknownExpert: an id outside the bank.
        """
        uses = list(uses)
        experts = {expert for use in uses for expert in use.experts}
        self._core.check_ids(sorted(experts))
        self._wave_experts = self.capacity_experts if len(experts) <= self.capacity_experts else max(1, self.capacity_experts // 2)
        schedule = Schedule(Use(tuple(wave), use.sections) for use in uses for wave in self.waves(use.experts))
        with self._core.changed:
            self._core.raise_error()
            if not (uses or self._table.schedule.num_left):
                return
            self._table.follow(schedule)
            self._prefetcher.follow_schedule(ahead=ahead)

    def new_working_set(self) -> None:
        """Says that what was read until now is no longer needed: prefetches may take its slots once it is clean (see `write_back`)."""
        with self._core.changed:
            self._core.raise_error()
            self._table.new_working_set()
            self._core.changed.notify_all()

    # Behind

    def prefetch(
        self,
        experts: Sequence[int],
        *,
        sections: Sections = Sections.ALL,
        within_s: float | None = None,
        probabilities: Mapping[int, float] | None = None,
    ) -> None:
        """Asks for experts that will be needed, the most urgent first; returns at once.

        The daemon promotes them to DRAM; then they are fetched into slots that are free or hold something clean and outside the working set
        (see `new_working_set`). What is resident or queued already is not asked for twice.

        Args:
            experts: ids.
            sections: what to fetch of them.
            within_s: when they will be needed, for the admission; None: nobody knows.
            probabilities: how likely each is to be needed, for the admission; None: certain.

        Raises:
            UnknownExpert: an id outside the bank.
        """
        self._core.check_ids(experts)
        with self._core.changed:
            self._core.raise_error()
            self._prefetcher.enqueue(experts, sections, within_s=within_s, probabilities=probabilities)

    def cancel_prefetch(self) -> None:
        """Forgets what is still queued, here and in the daemon."""
        with self._core.changed:
            self._core.raise_error()
            self._prefetcher.cancel()

    def write_back(self, experts: Sequence[int] | None = None) -> None:
        """Asks for the dirty ones of `experts` (of all) to be pushed behind; returns at once."""
        with self._core.changed:
            self._core.raise_error()
            self._write_back.retry()
            self._write_back.request(list(self._table.residents) if experts is None else experts)

    def flush(self) -> None:
        """Returns when nothing is dirty and everything is durable.

        Raises what went wrong on the way; nothing is lost then, and the next flush tries again.
        """
        with self._core.changed:
            self._core.raise_error()
            if any(resident.updating for resident in self._table.residents.values()):
                raise InvalidRequest(f"bank {self.bank!r}: flush inside an updating block")
            self._write_back.retry()
            while self._table.num_dirty or not self._write_back.idle:
                self._write_back.request(list(self._table.residents))
                self._core.changed.wait()
                self._core.raise_error()

    def forget(self) -> None:
        """Drops every resident and the schedule, after the bank changed underneath (a snapshot was restored).

        Raises:
            InvalidRequest: an expert is pinned, or has changes that the store does not have.
        """
        newest = self._core.newest_version()
        self.schedule(())
        with self._core.changed:
            self._core.raise_error()
            self._prefetcher.cancel()
            while any(resident.state is State.LOADING for resident in self._table.residents.values()):
                self._core.changed.wait()
            for resident in self._table.residents.values():
                if resident.pins or resident.dirty:
                    raise InvalidRequest(
                        f"bank {self.bank!r}: forget while expert {resident.expert} is {'pinned' if resident.pins else 'dirty'}"
                    )
            if not self._write_back.idle:
                raise InvalidRequest(f"bank {self.bank!r}: forget while evicted experts are not written; flush first")
            for resident in list(self._table.residents.values()):
                self._table.remove(resident)
            self._core.acknowledged.clear()
            self._core.version_at_open = newest

    def stats(self) -> CacheStats:
        """The cache at this moment. From any thread."""
        with self._core.changed:
            counts: dict[str, Any] = {item.name: getattr(self._counters, item.name) for item in fields(self._counters)}
            counts |= {"fetched_from": dict(self._counters.fetched_from), "ahead": dict(self._counters.ahead)}
            return CacheStats(
                bank=self.bank,
                capacity=self.capacity_experts,
                resident=len(self._table.residents),
                dirty=self._table.num_dirty,
                expert_bytes=self.layout.body_bytes,
                **counts,
            )

    def fetches(self) -> Counter[int]:
        """How often each expert came from the store, on demand or ahead, since the cache's start. From any thread."""
        with self._core.changed:
            return self._core.fetches.copy()

    def close(self) -> None:
        """Flushes, and ends the threads, also when the flush fails. The store stays open.

        Raises what went wrong in the flush, or else behind before it, when everything else is durable.
        """
        if self._core.closed:
            return
        with self._core.changed:
            earlier = self._core.take_error()
        try:
            self.flush()
            if earlier is not None:
                raise earlier
        finally:
            with self._core.changed:
                self._core.closed = True
                self._core.changed.notify_all()
            self._demand.join()
            self._prefetcher.join()
            self._write_back.join()
            self._slab.close()

    def __enter__(self) -> ExpertCache:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        """Closes. What goes wrong in that does not hide what went wrong before."""
        try:
            self.close()
        except Exception as later:
            if error is None:
                raise
            log.info("bank %s: closing after an error, another one: %s", self.bank, later)


def _slab_on(device: torch.device, layout: Layout, num_slots: int) -> Slab:
    return CudaSlab(layout, num_slots, device) if device.type == "cuda" else HostSlab(layout, num_slots)
