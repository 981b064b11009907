"""What the training thread and the background threads of one cache share: one lock, the table, the counters, and the way in from the store.

The lock is never held while the store is asked. Knows nothing of who loads, or why.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence

from ooc_moe_client.cache_stats import Counters
from ooc_moe_client.slab import Slab
from ooc_moe_client.store import ExpertStore, Fetched, Priority, Sections
from ooc_moe_client.table import Resident, State, Table
from ooc_moe_wire.errors import InvalidRequest, LostUpdate
from ooc_moe_wire.layout import Layout

log = logging.getLogger(__name__)


class Core:
    """The shared state of one cache. `changed` guards everything in it, and is notified whenever a waiter might go on."""

    def __init__(self, store: ExpertStore, bank: str, layout: Layout, slab: Slab, capacity: int) -> None:
        self.store = store
        self.bank = bank
        self.layout = layout
        self.slab = slab
        self.changed = threading.Condition()
        self.counters = Counters()
        self.table = Table(capacity, self.counters)
        self.acknowledged: dict[int, int] = {}  # by expert: the newest version of our own pushes
        self.closed = False
        self._error: Exception | None = None

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
        num_bytes = self.layout.body_bytes if sections is Sections.ALL else self.layout.parameter_bytes
        try:
            for fetched in self.store.fetch(
                self.bank,
                list(loading),
                into=lambda expert: self.slab.landing(loading[expert].slot, num_bytes),
                sections=sections,
                priority=priority,
            ):
                self._check_version(fetched)
                self.slab.landed(loading[fetched.expert].slot, num_bytes)
                self._ready(loading.pop(fetched.expert), fetched, num_bytes)
        finally:
            self._drop(list(loading.values()))

    def _check_version(self, fetched: Fetched) -> None:
        newest = self.acknowledged.get(fetched.expert, 0)
        if fetched.version < newest:
            raise LostUpdate(
                f"bank {self.bank!r}, expert {fetched.expert}: the store gave version {fetched.version}, but had acknowledged {newest}"
            )

    def _ready(self, resident: Resident, fetched: Fetched, num_bytes: int) -> None:
        with self.changed:
            resident.state = State.READY
            resident.version = fetched.version
            self.counters.bytes_in += num_bytes
            tier = fetched.served_from.name.lower()
            self.counters.fetched_from[tier] = self.counters.fetched_from.get(tier, 0) + 1
            self.changed.notify_all()

    def _drop(self, residents: Sequence[Resident]) -> None:
        with self.changed:
            for resident in residents:
                self.slab.abandon(resident.slot)
                resident.pins = 0
                self.counters.prefetch_cancelled += resident.prefetched
                resident.prefetched = False
                self.table.remove(resident)
            self.changed.notify_all()
