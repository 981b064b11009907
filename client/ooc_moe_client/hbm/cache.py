"""`ExpertCache`: the trainer's cache of experts, in HBM (or in host memory: device "cpu" runs the same code).

    with cache.reading([3, 7]) as slots:              # pins both experts; missing ones are fetched in one call
        w1_SDH = cache.views["w1"]                     # S: slots. The weights of expert 3 are w1_SDH[slots[0]]
    with cache.updating([3, 7]) as slots: ...          # the optimizer writes; afterwards the experts are dirty (changed, not yet pushed)
    cache.flush()                                      # returns when the store holds every change durably

This file has the class that the trainer calls. demand.py pins experts (a pinned expert stays in its slot); write_back.py and prefetch.py
work in the background. table.py decides which expert is evicted, and slots.py holds the bytes. The cache knows nothing of layers, routing
or optimizers: such code reads and writes the tensors in `views`.
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
    """Holds some experts of one bank in a fixed number of slots on a device, where they are read and updated.

    Missing experts are fetched from the store, and changed experts are pushed back to it. A slot is memory for one expert.

    Only one thread, the training thread, may use the cache; `stats` and `fetches` may be called from any thread. The class is long because
    it has all methods that trainers call: most of them check their arguments, take the lock, and call the part that does the work.

    When background work fails (a push is refused, say), the next call of `reading`, `flush` or another method raises the error, once.
    Changes that could not be pushed stay in the cache.

    Args:
        store: the store that the experts are fetched from and pushed to.
        bank: the bank's name; it must exist.
        capacity_experts: the number of slots.
        device: "cpu", "cuda" or "cuda:N".
        prefetch_experts_max: the most experts that wait in the prefetch queue.
        admission: whether to refuse prefetches that are not worth their slot and bandwidth (see admission.py).
        on_access: called by each `reading` whose `counted` is True, with the expert ids in the order in which they were asked for. It runs
            under the cache's lock: it must be quick, and must not call the cache.

    Raises:
        InvalidRequest: capacity_experts is below 1, or prefetch_experts_max is negative.
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
        """The memory of all slots as tensors: for each tensor name of the layout, a strided view of shape (slots, *shape).

        Row s of each tensor belongs to the expert in slot s. There are views of the parameter tensors and of the optimizer tensors. Read or
        write only the rows of slots that are pinned.
        """
        return self._slots.views

    @property
    def num_experts(self) -> int:
        """The number of experts in the bank."""
        return self._shared.num_experts

    def grow(self, num_experts: int) -> None:
        """Raises the bank's number of experts in the store to `num_experts`, if it has fewer. The number of slots stays."""
        self._shared.num_experts = self._shared.store.grow_bank(self.bank, num_experts).spec.num_experts

    # The working set

    def reading(self, experts: Sequence[int], *, sections: Sections = Sections.ALL, counted: bool = True) -> Pinned:
        """Pins experts (keeps them in their slots) for reading inside a `with` block. `as` gives their slots, in the order of `experts`.

        Missing experts are fetched first, in one call. When the same list of experts was read before, and all are still in their slots, the
        cache finds the whole list by a single look-up.

        Args:
            experts: distinct ids, at most `capacity_experts` (see `waves`).
            sections: PARAMETERS fetches only the parameters, unless the schedule says that the expert will be updated before it would be
                evicted. A later reading of ALL fetches the whole expert again.
            counted: whether to count the experts in the statistics (accesses, hits and misses). Pass False when they were counted already
                for the same step, as in backward and the optimizer.

        Raises:
            InvalidRequest: an expert is repeated, or there are more experts than slots.
            UnknownExpert: an id is outside the bank; nothing was fetched.
            TierFull: too many slots are pinned.
            CorruptRecord, Unavailable, StaleVersion, LostUpdate, NotTheWriter: as the store raised them, in this call or earlier in the
                background.
        """
        return Pinned(self._demand, experts, sections, counted=counted)

    def updating(self, experts: Sequence[int]) -> Pinned:
        """Pins experts for reading and writing, with their optimizer sections. Use it like `reading`; it raises the same errors.

        When the `with` block ends, also by an exception, the experts are marked dirty: changed, and to be pushed to the store.
        """
        return Pinned(self._demand, experts, Sections.ALL, counted=False, updating=True)

    def waves(self, experts: Sequence[int]) -> Iterator[list[int]]:
        """Splits a list of experts into waves: sorted lists, none of them longer than the cache has slots. Yields one wave at a time.

        Ids ascend in each wave and from wave to wave. So a sum over the experts is always added up in the same order, whatever the cache
        holds. When the schedule names more experts than there are slots, a wave fills only half of the slots: the next wave is fetched
        while the trainer computes with this one.
        """
        ordered = sorted(experts)
        for start in range(0, len(ordered), self._wave_experts):
            yield ordered[start : start + self._wave_experts]

    def schedule(self, uses: Iterable[Use], *, ahead: bool = True) -> None:
        """Announces the coming steps in order: which experts each step reads (PARAMETERS) or updates (ALL). Replaces the earlier schedule.

        From then on, the cache evicts experts that are not in the schedule before experts that are in it. Of the experts in the schedule,
        it evicts the one whose next use is furthest away. Readings may deviate from the schedule: they take longer then, and their results
        are the same.

        Args:
            uses: the experts of each step, in the order of the steps.
            ahead: whether to fetch scheduled experts in the background before they are asked for.

        Raises:
            UnknownExpert: an id is outside the bank.
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
        """Declares that other experts will be needed from now on, for example because training goes on to another game.

        Prefetches never evict the working set, the experts that were read recently. This call empties the working set, so prefetches may
        evict the experts that were read until now. (Dirty experts are copied to a buffer first, to be pushed.)
        """
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
        """Queues experts that will probably be needed, to be fetched in the background. Returns at once.

        First the daemon is asked to copy the experts to its DRAM. Then they are fetched into free slots, and into slots of experts outside
        the working set (the recently read experts, see `new_working_set`). Experts that are in a slot or queued already are skipped.

        Args:
            experts: ids, the most urgent first.
            sections: which part of each expert to fetch.
            within_s: seconds until they are needed, for the decision whether the prefetch is worthwhile (admission.py). None: unknown.
            probabilities: how likely each expert is to be needed, for the same decision. None: all are certain to be needed.

        Raises:
            UnknownExpert: an id is outside the bank.
        """
        self._shared.check_ids(experts)
        with self._shared.changed:
            self._shared.raise_error()
            self._prefetcher.enqueue(experts, sections, within_s=within_s, probabilities=probabilities)

    def cancel_prefetch(self) -> None:
        """Drops all prefetches that have not begun, in this cache's queue and in the daemon's queue."""
        with self._shared.changed:
            self._shared.raise_error()
            self._prefetcher.cancel()

    def write_back(self, experts: Sequence[int] | None = None) -> None:
        """Queues experts to be pushed to the store in the background, and returns at once.

        Experts that are not in a slot, or not dirty (changed since their last push), are ignored. When `experts` is None, all dirty experts
        are queued.
        """
        with self._shared.changed:
            self._shared.raise_error()
            self._write_back.retry()
            self._write_back.request(list(self._table.residents) if experts is None else experts)

    def flush(self) -> None:
        """Pushes all changed experts to the store, and returns when the changes are durable.

        When a push fails, raises its error. No change is lost then, and the next flush tries again.
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
        """Empties all slots and drops the schedule. Call this after a snapshot was restored: the experts in the slots are then outdated.

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
        """Returns a copy of the cache's counters, and how many slots are filled and dirty now. May be called from any thread."""
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
        """Returns how often each expert was fetched since the cache was made. Prefetches count too. May be called from any thread."""
        with self._shared.changed:
            return self._shared.fetches.copy()

    def close(self) -> None:
        """Flushes all changes to the store, and ends the cache's threads, even when the flush fails. The store stays open.

        Raises the error of the flush. When the flush succeeds, raises an earlier error of background work that no call has raised yet.
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
        """Closes the cache. If the block raised an exception, an error of closing is only logged, so that it does not hide the first."""
        try:
            self.close()
        except Exception as later:
            if error is None:
                raise
            log.info("bank %s: closing after an error, another one: %s", self.bank, later)
