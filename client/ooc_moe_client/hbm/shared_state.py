"""`SharedState`: what the training thread and the background threads of one cache share.

It has the lock, the table (which expert is in which slot), the slots, the counters, and the error of background work that is still to be
raised. Its method `load` makes every fetch from the store. No thread holds the lock while it calls the store.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Sequence

from ooc_moe_client.hbm.admission import Admission, AdmissionMode
from ooc_moe_client.hbm.slots import ExpertSlots
from ooc_moe_client.hbm.stats import Counters
from ooc_moe_client.hbm.table import LoadState, Resident, SlotTable
from ooc_moe_client.store import ExpertStore, Fetched, Priority, Sections
from ooc_moe_wire.errors import InvalidRequest, LostUpdate, StaleVersion
from ooc_moe_wire.layout import BankSpec
from ooc_moe_wire.rules import check_experts

log = logging.getLogger(__name__)


class SharedState:
    """The lock and the data that all threads of one cache share.

    A thread holds the condition `changed` (a lock) while it uses any of the fields. It notifies `changed` after a change that a waiting
    thread may need.
    """

    def __init__(
        self, store: ExpertStore, spec: BankSpec, slots: ExpertSlots, capacity: int, admission: AdmissionMode = AdmissionMode.OFF
    ) -> None:
        self.store = store
        self.bank = spec.name
        self.layout = spec.layout
        self.num_experts = spec.num_experts
        self.slots = slots
        self.changed = threading.Condition()
        self.counters = Counters()
        self.fetches: Counter[int] = Counter()  # by expert
        self.table = SlotTable(spec.layout, capacity, self.counters)
        self.admission = Admission(admission)
        self.own_versions: dict[int, int] = {}  # by expert: the newest version that this cache's pushes made
        self.version_at_open = self.newest_version()  # a newer version that this cache did not make is another writer's
        self.demanding = False  # the training thread is claiming slots: prefetches claim none
        self.fetching = False  # the training thread waits for a fetch, not for room: no push begins
        self.closed = False
        self._error: Exception | None = None

    def check_ids(self, experts: Sequence[int]) -> None:
        """Raises UnknownExpert when one of these expert ids is outside the bank."""
        check_experts(self.bank, experts, self.num_experts)

    def newest_version(self) -> int:
        """Asks the store for the highest version of any expert of the bank."""
        return self.store.get_bank(self.bank).newest_version

    def fail(self, error: Exception) -> None:
        """Keeps an error of background work until the training thread's next call raises it.

        Only the first error is kept; later ones are logged.
        """
        with self.changed:
            if self._error is None:
                self._error = error
            elif error is not self._error:
                log.warning("bank %s: another background error: %s", self.bank, error)
            self.changed.notify_all()

    def raise_error(self) -> None:
        """Raises the kept error of background work, once. Raises InvalidRequest when the cache is closed. The caller holds the lock."""
        if self.closed:
            raise InvalidRequest(f"bank {self.bank!r}: the cache is closed")
        if (error := self.pop_error()) is not None:
            raise error

    def pop_error(self) -> Exception | None:
        """Returns the kept error of background work (None: there is none), and forgets it. The caller holds the lock."""
        error, self._error = self._error, None
        return error

    def load(self, residents: Sequence[Resident], sections: Sections, priority: Priority) -> None:
        """Fetches experts from the store into their slots, in one call. Each expert's state changes from LOADING to READY when it arrives.

        Args:
            residents: the experts, which already have slots.
            sections: which part of each to fetch.
            priority: whether the training thread waits for them (DEMAND), or they are fetched ahead (PREFETCH).

        Raises:
            What the store raises. Experts that had not arrived are then removed from the table, and their pins dropped.
        """
        loading = {resident.expert: resident for resident in residents}
        size = sections.num_bytes(self.layout)
        began = time.perf_counter()
        try:
            for fetched in self.store.fetch(
                self.bank,
                list(loading),
                into=lambda expert: self.slots.landing(loading[expert].slot, size),
                sections=sections,
                priority=priority,
            ):
                if not self._is_right_version(fetched, priority):
                    continue
                self.slots.landed(loading[fetched.expert].slot, size)
                self._ready(loading.pop(fetched.expert), fetched)
            with self.changed:
                self.admission.measure(size * len(residents), time.perf_counter() - began)
        finally:
            self._drop(list(loading.values()))

    def _is_right_version(self, fetched: Fetched, priority: Priority) -> bool:
        """Whether the cache may use the version that was fetched. After the cache's first push, nobody else may write the bank.

        Raises LostUpdate when the version is older than the one that this cache pushed. When another writer made the version, raises
        StaleVersion if the training thread asked for the expert (DEMAND). Returns False instead if the fetch was a prefetch: a snapshot may
        have been restored just now (see `ExpertCache.forget`).
        """
        newest = self.own_versions.get(fetched.expert, 0)
        if fetched.version < newest:
            raise LostUpdate(
                f"bank {self.bank!r}, expert {fetched.expert}: the store gave version {fetched.version}, but had acknowledged {newest}"
            )
        if self.own_versions and fetched.version > (newest or self.version_at_open):
            if priority is Priority.DEMAND:
                raise StaleVersion(f"bank {self.bank!r}, expert {fetched.expert}: another writer made version {fetched.version}")
            return False
        return True

    def _ready(self, resident: Resident, fetched: Fetched) -> None:
        with self.changed:
            resident.state = LoadState.READY
            resident.version = fetched.version
            self.counters.bytes_in += resident.num_bytes
            self.counters.count_fetched(fetched.served_from.name.lower())
            self.fetches[fetched.expert] += 1
            self.changed.notify_all()

    def _drop(self, residents: Sequence[Resident]) -> None:
        with self.changed:
            for resident in residents:
                self.slots.abandon(resident.slot)
                resident.pins = 0
                if resident.prefetched:
                    resident.prefetched = False
                    self.counters.count_prefetch("cancelled", resident.num_bytes, scheduled=resident.scheduled)
                self.table.remove(resident)
            self.changed.notify_all()
