"""`ExpertCache`: the trainer's cache of experts, in HBM (or in host memory: device "cpu" runs the same code).

    with cache.reading([3, 7]) as slots:              # pinned; misses are fetched in one call
        w1_SDH = cache.views["w1"]                     # expert 3 is w1_SDH[slots[0]]
    with cache.updating([3, 7]) as slots: ...          # the optimizer writes; the experts are dirty afterwards
    cache.flush()                                      # returns when every change is durable

This file is what the trainer calls. demand.py pins experts for it; write_back.py and prefetch.py work in the background. table.py decides
what is evicted, and slots.py holds the bytes. The cache deliberately knows nothing of layers, routing or optimizers: they use `views`.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import TracebackType

import torch
from torch import Tensor

from ooc_moe_client.hbm.admission import AdmissionMode
from ooc_moe_client.hbm.cuda_slots import CudaSlots
from ooc_moe_client.hbm.demand import Demand, Pinned
from ooc_moe_client.hbm.prefetch import Prefetcher
from ooc_moe_client.hbm.schedule import Schedule, Use
from ooc_moe_client.hbm.shared_state import SharedState
from ooc_moe_client.hbm.slots import ExpertSlots, HostSlots
from ooc_moe_client.hbm.stats import CacheStats, copied_counts
from ooc_moe_client.hbm.table import LoadState
from ooc_moe_client.hbm.write_back import WriteBack
from ooc_moe_client.store import ExpertStore, Sections
from ooc_moe_wire.errors import InvalidRequest, require_at_least
from ooc_moe_wire.layout import Layout

log = logging.getLogger(__name__)

PREFETCH_EXPERTS_MAX = 64


class ExpertCache:
    """A fixed number of slots in which the experts of one bank are read and changed. Changes are pushed back to the store.

    One training thread uses it; `stats` and `fetches` may be called from any. The class is long because it is the face of its room: most
    methods check their arguments, take the lock, and call the part that does the work.

    An error of background work (a refused push, say) is raised
    once, by the next call; what could not be pushed is kept.

    Args:
        store: where the experts live.
        bank: the bank's name; it must exist.
        capacity_experts: the number of slots.
        device: "cpu", "cuda" or "cuda:N".
        prefetch_experts_max: the most experts that wait in the prefetch queue.
        admission: whether prefetches that are not worth their fetch are refused (see admission.py).
        on_access: called with the ids of each counted reading, in order. It runs under the cache's lock: it must be quick, and must not
            call the cache.

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
        require_at_least(0, prefetch_experts_max=prefetch_experts_max)
        spec = store.get_bank(bank).spec
        self.bank = bank
        self.layout: Layout = spec.layout
        self.capacity_experts = capacity_experts
        self.device = torch.device(device)
        on_gpu = self.device.type == "cuda"
        self._slots: ExpertSlots = (
            CudaSlots(spec.layout, capacity_experts, self.device) if on_gpu else HostSlots(spec.layout, capacity_experts)
        )
        self._shared = SharedState(store, spec, self._slots, capacity_experts, admission)
        self._wave_experts = capacity_experts
        self._table = self._shared.table
        self._counters = self._shared.counters
        self._write_back = WriteBack(self._shared)
        self._prefetcher = Prefetcher(self._shared, self._write_back, experts_max=prefetch_experts_max)
        self._demand = Demand(self._shared, self._write_back, self._prefetcher, on_access=on_access)

    @property
    def views(self) -> dict[str, Tensor]:
        """For each tensor name (parameters and optimizer) a strided view (slots, *shape) of all slots. Touch only slots that are pinned."""
        return self._slots.views

    @property
    def num_experts(self) -> int:
        """The number of experts in the bank."""
        return self._shared.num_experts

    def grow(self, num_experts: int) -> None:
        """Raises the bank's number of experts to at least `num_experts`."""
        self._shared.num_experts = self._shared.store.grow_bank(self.bank, num_experts).spec.num_experts

    # The working set

    def reading(self, experts: Sequence[int], *, sections: Sections = Sections.ALL, counted: bool = True) -> Pinned:
        """Pins experts for reading, in a `with` block that binds their slots, in the same order. Misses are fetched in one call.

        Experts that were read together before, and are all still here, are found by one look-up.

        Args:
            experts: distinct ids, at most `capacity_experts` (see `waves`).
            sections: PARAMETERS fetches only the parameters, unless the schedule says that the expert will be updated while it is still
                here. A later reading of ALL fetches the expert anew.
            counted: whether the reading counts in accesses, hits and misses. False for experts that were counted already for the same
                step (backward, optimizer).

        Raises:
            InvalidRequest: an expert is repeated, or there are more experts than slots.
            UnknownExpert: an id outside the bank, before anything is fetched.
            TierFull: too many slots are pinned.
            CorruptRecord, Unavailable, StaleVersion, LostUpdate, NotTheWriter: as the store raised them, now or in the background.
        """
        return Pinned(self._demand, experts, sections, counted=counted)

    def updating(self, experts: Sequence[int]) -> Pinned:
        """Pins experts for reading and writing, both sections. They are dirty afterwards, also after an exception. Raises as `reading`."""
        return Pinned(self._demand, experts, Sections.ALL, counted=False, updating=True)

    def waves(self, experts: Sequence[int]) -> Iterator[list[int]]:
        """Cuts a list of experts into waves that fit the slots.

        Waves are in ascending order of ids, so that sums over them never depend on which experts are resident. Under a schedule that names
        more experts than there are slots, a wave fits half of the slots: the next wave is fetched while one is computed.
        """
        ordered = sorted(experts)
        for start in range(0, len(ordered), self._wave_experts):
            yield ordered[start : start + self._wave_experts]

    def schedule(self, uses: Iterable[Use], *, ahead: bool = True) -> None:
        """Announces which experts will be read (PARAMETERS) and updated (ALL) from now on, in order. Replaces the earlier schedule.

        Eviction then takes the expert with the furthest next use. With `ahead`, experts are fetched before they are asked for. The schedule
        is advice: a reading that deviates from it takes longer, and is still right.

        Raises:
            UnknownExpert: an id outside the bank.
        """
        uses = list(uses)
        experts = {expert for use in uses for expert in use.experts}
        self._shared.check_ids(sorted(experts))
        self._wave_experts = self.capacity_experts if len(experts) <= self.capacity_experts else max(1, self.capacity_experts // 2)
        schedule = Schedule(Use(tuple(wave), use.sections) for use in uses for wave in self.waves(use.experts))
        with self._shared.changed:
            self._shared.raise_error()
            if not (uses or self._table.schedule.num_left):
                return
            self._table.follow_schedule(schedule)
            self._prefetcher.follow_schedule(ahead=ahead)

    def new_working_set(self) -> None:
        """Begins a new working set: experts that were read until now may be evicted for prefetches, dirty ones once they are written."""
        with self._shared.changed:
            self._shared.raise_error()
            self._table.new_working_set()
            self._shared.changed.notify_all()

    # In the background

    def prefetch(
        self,
        experts: Sequence[int],
        *,
        sections: Sections = Sections.ALL,
        within_s: float | None = None,
        probabilities: Mapping[int, float] | None = None,
    ) -> None:
        """Queues experts that will probably be needed, the most urgent first; returns at once.

        The daemon promotes them to DRAM; then they are fetched into free slots, and into slots of experts outside the working set (see
        `new_working_set`). Experts that are resident or queued already are skipped.

        Args:
            experts: ids.
            sections: what to fetch of them.
            within_s: the time until they are needed, for the admission. None: unknown.
            probabilities: how likely each expert is to be needed, for the admission. None: certain.

        Raises:
            UnknownExpert: an id outside the bank.
        """
        self._shared.check_ids(experts)
        with self._shared.changed:
            self._shared.raise_error()
            self._prefetcher.enqueue(experts, sections, within_s=within_s, probabilities=probabilities)

    def cancel_prefetch(self) -> None:
        """Drops all queued prefetches, here and in the daemon."""
        with self._shared.changed:
            self._shared.raise_error()
            self._prefetcher.cancel()

    def write_back(self, experts: Sequence[int] | None = None) -> None:
        """Asks for those of `experts` (None: of all) that are dirty to be pushed in the background; returns at once."""
        with self._shared.changed:
            self._shared.raise_error()
            self._write_back.retry()
            self._write_back.request(list(self._table.residents) if experts is None else experts)

    def flush(self) -> None:
        """Pushes all changes, and returns when they are durable.

        Raises what went wrong. Nothing is lost then, and the next flush tries again.
        """
        with self._shared.changed:
            self._shared.raise_error()
            if any(resident.updating for resident in self._table.residents.values()):
                raise InvalidRequest(f"bank {self.bank!r}: flush inside an updating block")
            self._write_back.retry()
            while self._table.num_dirty or not self._write_back.idle:
                self._write_back.request(list(self._table.residents))
                self._shared.changed.wait()
                self._shared.raise_error()

    def forget(self) -> None:
        """Drops every resident and the schedule. To be called after the bank changed in the store (a snapshot was restored).

        Raises:
            InvalidRequest: an expert is pinned, or has changes that the store does not have.
        """
        newest = self._shared.newest_version()
        self.schedule(())
        with self._shared.changed:
            self._shared.raise_error()
            self._prefetcher.cancel()
            while any(resident.state is LoadState.LOADING for resident in self._table.residents.values()):
                self._shared.changed.wait()
            for resident in self._table.residents.values():
                if resident.pins or resident.dirty:
                    raise InvalidRequest(
                        f"bank {self.bank!r}: forget while expert {resident.expert} is {'pinned' if resident.pins else 'dirty'}"
                    )
            if not self._write_back.idle:
                raise InvalidRequest(f"bank {self.bank!r}: forget while evicted experts are not written; flush first")
            for resident in list(self._table.residents.values()):
                self._table.remove(resident)
            self._shared.own_versions.clear()
            self._shared.version_at_open = newest

    def stats(self) -> CacheStats:
        """The gauges and counters of this moment. May be called from any thread."""
        with self._shared.changed:
            return CacheStats(
                bank=self.bank,
                capacity=self.capacity_experts,
                resident=len(self._table.residents),
                dirty=self._table.num_dirty,
                expert_bytes=self.layout.body_bytes,
                **copied_counts(self._counters),
            )

    def fetches(self) -> Counter[int]:
        """How often each expert was fetched since the cache's start, for any reason. May be called from any thread."""
        with self._shared.changed:
            return self._shared.fetches.copy()

    def close(self) -> None:
        """Flushes, and ends the threads even when the flush fails. The store stays open.

        Raises the error of the flush. When the flush succeeds, raises an error of background work that was not raised yet.
        """
        if self._shared.closed:
            return
        with self._shared.changed:
            earlier = self._shared.pop_error()
        try:
            self.flush()
            if earlier is not None:
                raise earlier
        finally:
            with self._shared.changed:
                self._shared.closed = True
                self._shared.changed.notify_all()
            self._demand.join()
            self._prefetcher.join()
            self._write_back.join()
            self._slots.close()

    def __enter__(self) -> ExpertCache:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        """Closes the cache. An error of that does not hide an exception that left the block."""
        try:
            self.close()
        except Exception as later:
            if error is None:
                raise
            log.info("bank %s: closing after an error, another one: %s", self.bank, later)
