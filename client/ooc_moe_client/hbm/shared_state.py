"""What the training thread and the background threads of one cache share: one lock, the table, the counters, and the way in from the store.

The lock is never held while the store is asked. Knows nothing of who loads, or why.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Sequence

from ooc_moe_client.hbm.admission import Admission, AdmissionMode
from ooc_moe_client.hbm.slots import Slab
from ooc_moe_client.hbm.stats import Counters
from ooc_moe_client.hbm.table import Resident, State, Table, num_bytes
from ooc_moe_client.store import ExpertStore, Fetched, Priority, Sections
from ooc_moe_wire.errors import InvalidRequest, LostUpdate, StaleVersion, UnknownExpert
from ooc_moe_wire.layout import BankSpec

log = logging.getLogger(__name__)


class Core:
    """The shared state of one cache. `changed` guards everything in it, and is notified whenever a waiter might go on."""

    def __init__(self, store: ExpertStore, spec: BankSpec, slab: Slab, capacity: int, admission: AdmissionMode = AdmissionMode.OFF) -> None:
        self.store = store
        self.bank = spec.name
        self.layout = spec.layout
        self.num_experts = spec.num_experts
        self.slab = slab
        self.changed = threading.Condition()
        self.counters = Counters()
        self.fetches: Counter[int] = Counter()  # by expert
        self.table = Table(spec.layout, capacity, self.counters)
        self.admission = Admission(admission)
        self.acknowledged: dict[int, int] = {}  # by expert: the newest version of our own pushes
        self.version_at_open = self.newest_version()  # what is newer and not our own is another writer's
        self.demanding = False  # the training thread is taking slots; speculation stands back
        self.fetching = False  # the training thread waits for a fetch, and for no room: pushes stand back
        self.closed = False
        self._error: Exception | None = None

    def check_ids(self, experts: Sequence[int]) -> None:
        """Raises UnknownExpert for an id outside the bank."""
        for expert in experts:
            if not 0 <= expert < self.num_experts:
                raise UnknownExpert(f"bank {self.bank!r}: expert {expert} is not between 0 and {self.num_experts - 1}")

    def newest_version(self) -> int:
        """Of the whole bank, as the store has it now."""
        return self.store.get_bank(self.bank).newest_version

    def fail(self, error: Exception) -> None:
        """Keeps a background error for the training thread; the first one wins, the others are logged."""
        with self.changed:
            if self._error is None:
                self._error = error
            elif error is not self._error:
                log.warning("bank %s: another background error: %s", self.bank, error)
            self.changed.notify_all()

    def raise_error(self) -> None:
        """Raises the background error, once; and InvalidRequest when the cache is closed. Needs the lock."""
        if self.closed:
            raise InvalidRequest(f"bank {self.bank!r}: the cache is closed")
        if (error := self.take_error()) is not None:
            raise error

    def take_error(self) -> Exception | None:
        """The background error, once. Needs the lock."""
        error, self._error = self._error, None
        return error

    def load(self, residents: Sequence[Resident], sections: Sections, priority: Priority) -> None:
        """Fetches the experts of `residents` (loading, not to be evicted by others) in one call; each becomes ready as it arrives.

        Raises:
            Whatever the store raises; what had not arrived is then no longer resident (its pins are dropped).
        """
        loading = {resident.expert: resident for resident in residents}
        size = num_bytes(self.layout, sections)
        began = time.perf_counter()
        try:
            for fetched in self.store.fetch(
                self.bank,
                list(loading),
                into=lambda expert: self.slab.landing(loading[expert].slot, size),
                sections=sections,
                priority=priority,
            ):
                if not self._is_right_version(fetched, priority):
                    continue
                self.slab.landed(loading[fetched.expert].slot, size)
                self._ready(loading.pop(fetched.expert), fetched)
            with self.changed:
                self.admission.measure(size * len(residents), time.perf_counter() - began)
        finally:
            self._drop(list(loading.values()))

    def _is_right_version(self, fetched: Fetched, priority: Priority) -> bool:
        """What this cache writes nobody else may have written: an older version is wrong, and so is a newer one that is not its own.

        A newer one by prefetch is only not taken, for it may be a snapshot restored since (see `ExpertCache.forget`).
        """
        newest = self.acknowledged.get(fetched.expert, 0)
        if fetched.version < newest:
            raise LostUpdate(
                f"bank {self.bank!r}, expert {fetched.expert}: the store gave version {fetched.version}, but had acknowledged {newest}"
            )
        if self.acknowledged and fetched.version > (newest or self.version_at_open):
            if priority is Priority.DEMAND:
                raise StaleVersion(f"bank {self.bank!r}, expert {fetched.expert}: another writer made version {fetched.version} meanwhile")
            return False
        return True

    def _ready(self, resident: Resident, fetched: Fetched) -> None:
        with self.changed:
            resident.state = State.READY
            resident.version = fetched.version
            self.counters.bytes_in += resident.num_bytes
            self.counters.count_fetched(fetched.served_from.name.lower())
            self.fetches[fetched.expert] += 1
            self.changed.notify_all()

    def _drop(self, residents: Sequence[Resident]) -> None:
        with self.changed:
            for resident in residents:
                self.slab.abandon(resident.slot)
                resident.pins = 0
                if resident.prefetched:
                    resident.prefetched = False
                    self.counters.count_prefetch("cancelled", resident.num_bytes, foretold=resident.foretold)
                self.table.remove(resident)
            self.changed.notify_all()
