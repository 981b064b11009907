"""Which expert is in which slot, and who may be evicted for whom.

The rules of eviction stand here; demand, write-back and prefetch (cache.py, write_back.py, prefetch.py) call it with the lock held. Knows
nothing of networks, threads or devices.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from ooc_moe_client.cache_stats import Counters
from ooc_moe_client.store import Sections
from ooc_moe_wire.policy import LRU

NEVER = -1


class State(Enum):
    """Whether a slot's bytes may be read."""

    LOADING = 0
    READY = 1


@dataclass(slots=True, eq=False)
class Resident:
    """An expert in a slot."""

    expert: int
    slot: int
    sections: Sections
    state: State = State.LOADING
    version: int = 0
    pins: int = 0
    dirty: bool = False
    updating: int = 0  # open `updating` blocks: their slot is never copied out
    generation: int = 0  # grows with every update; a push clears `dirty` only if it has not grown since
    prefetched: bool = False  # brought by a prefetch and not asked for yet
    demanded_at: int = NEVER  # the table's clock when it was last asked for
    wanted_by: int = 0  # the number of the last prefetch call that named it

    def holds(self, sections: Sections) -> bool:
        """Its bytes may be read, all those of `sections`."""
        return self.state is State.READY and (self.sections is Sections.ALL or sections is Sections.PARAMETERS)


class Table:
    """Residents, free slots and their order of leaving. Every method needs the cache's lock."""

    def __init__(self, capacity: int, counters: Counters) -> None:
        self.capacity = capacity
        self.residents: dict[int, Resident] = {}
        self._counters = counters
        self._free = list(range(capacity - 1, -1, -1))
        self._order: LRU[int] = LRU()
        self._clock = 0  # experts demanded so far
        self._working_set_since = 0

    @property
    def num_free(self) -> int:
        """Slots that hold nothing."""
        return len(self._free)

    @property
    def num_dirty(self) -> int:
        """Residents with changes that the store does not have."""
        return sum(resident.dirty for resident in self.residents.values())

    def demand(self, resident: Resident) -> None:
        """Notes that the training thread asked for it."""
        self._clock += 1
        resident.demanded_at = self._clock
        if resident.prefetched:
            resident.prefetched = False
            if resident.state is State.READY:
                self._counters.prefetch_useful += 1
            else:
                self._counters.prefetch_late += 1
        self._order.touch(resident.expert)

    def new_working_set(self) -> None:
        """What was demanded until now may make room for prefetches."""
        self._working_set_since = self._clock

    def in_working_set(self, resident: Resident) -> bool:
        """Demanded among the last 2 x `capacity` demands, and since `new_working_set`.

        A set that fits the cache is demanded at least that often, also when layers are visited forward and then backward, so speculation
        never pushes it out; what is left over from before ages out by itself.
        """
        return resident.demanded_at > max(self._working_set_since, self._clock - 2 * self.capacity)

    def insert(self, expert: int, sections: Sections) -> Resident:
        """Puts an expert, still loading, into a free slot."""
        resident = self.residents[expert] = Resident(expert, self._free.pop(), sections)
        self._order.insert(expert)
        return resident

    def remove(self, resident: Resident) -> None:
        """Empties its slot. What it held is clean, or in a buffer of the write-back."""
        assert resident.pins == 0, f"expert {resident.expert} leaves while it is pinned"
        if resident.prefetched:
            self._counters.prefetch_wasted += 1
        del self.residents[resident.expert]
        self._order.remove(resident.expert)
        self._free.append(resident.slot)

    def evict(self, resident: Resident) -> None:
        """Empties its slot to make room."""
        self._counters.evictions += 1
        self.remove(resident)

    def idle(self) -> Iterator[Resident]:
        """Residents that nobody uses at the moment, the least recently used first."""
        for expert in self._order.victims():
            resident = self.residents[expert]
            if resident.state is State.READY and resident.pins == 0:
                yield resident
