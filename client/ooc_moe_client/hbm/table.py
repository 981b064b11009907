"""Which expert is in which slot, and who may be evicted for whom.

The rules of eviction stand here; demand, write-back and prefetch (cache.py, write_back.py, prefetch.py) call it with the lock held. Who has
the furthest next use leaves first, as far as a schedule tells; of whom it tells nothing, the least recently used, before all others. Knows
nothing of networks, threads or devices.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

from ooc_moe_client.hbm.schedule import Schedule
from ooc_moe_client.hbm.stats import Counters, PrefetchCount
from ooc_moe_client.store import Sections
from ooc_moe_wire.layout import Layout
from ooc_moe_wire.policy import NextUse

NEVER = -1
GROUPS_MAX = 256


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
    num_bytes: int  # of these
    state: State = State.LOADING
    version: int = 0
    pins: int = 0
    dirty: bool = False
    updating: int = 0  # open `updating` blocks: their slot is never copied out
    copying: bool = False  # being copied out: neither updated nor evicted
    generation: int = 0  # grows with every update; a push clears `dirty` only if it has not grown since
    prefetched: bool = False  # brought by a prefetch and not asked for yet
    foretold: bool = False  # a prefetch brought it because the schedule names it
    demanded_at: int = NEVER  # the table's clock when it was last asked for
    wanted_by: int = 0  # the number of the last prefetch call that named it

    def holds(self, sections: Sections) -> bool:
        """Its bytes may be read, all those of `sections`."""
        return self.state is State.READY and (self.sections is Sections.ALL or sections is Sections.PARAMETERS)


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Residents that were asked for together. What is asked for again and again is found by one look, as long as nobody of it left."""

    experts: tuple[int, ...]
    residents: list[Resident]
    slots: list[int]
    sections: Sections  # that all of them hold


class Table:
    """Residents, free slots and their order of leaving. Every method needs the cache's lock."""

    def __init__(self, layout: Layout, capacity: int, counters: Counters) -> None:
        self.capacity = capacity
        self.residents: dict[int, Resident] = {}
        self.num_dirty = 0  # residents with changes that the store does not have
        self.schedule = Schedule()
        self._layout = layout
        self._counters = counters
        self._free = list(range(capacity - 1, -1, -1))
        self._groups: dict[tuple[int, ...], Group] = {}
        self._demanded: dict[Group, int] = {}  # groups that are still to be noted in the order, by the time of their demand
        self._order: NextUse[int] = NextUse(lambda expert: self.schedule.next_use(expert))
        self.num_removed = 0  # so far
        self._clock = 0  # experts demanded so far
        self._working_set_since = 0

    @property
    def num_free(self) -> int:
        """Slots that hold nothing."""
        return len(self._free)

    def follow(self, schedule: Schedule) -> None:
        """Goes by another schedule from now on."""
        self.schedule = schedule
        self._reorder()

    def advance(self, experts: Sequence[int]) -> None:
        """Notes that the training thread asks for these, in one call; `demand` follows for each."""
        if not self.schedule.advance(experts):
            self._reorder()

    def group(self, experts: tuple[int, ...], sections: Sections) -> Group | None:
        """These experts, if they were asked for together before, hold `sections`, and are all still here."""
        group = self._groups.get(experts)
        return group if group is not None and (group.sections is Sections.ALL or sections is Sections.PARAMETERS) else None

    def make_group(self, experts: tuple[int, ...], residents: list[Resident]) -> Group:
        """Remembers ready residents as a group."""
        is_whole = all(resident.sections is Sections.ALL for resident in residents)
        group = Group(experts, residents, [resident.slot for resident in residents], Sections.ALL if is_whole else Sections.PARAMETERS)
        if len(self._groups) == GROUPS_MAX:
            del self._groups[next(iter(self._groups))]
        self._groups[experts] = group
        return group

    def demand_group(self, group: Group) -> None:
        """As `advance` and `demand` of each; the order of eviction learns of it when somebody asks for it."""
        self._clock += len(group.experts)
        self._demanded.pop(group, None)
        self._demanded[group] = self._clock
        self.advance(group.experts)

    def _settle(self) -> None:
        """Notes the demands of groups, in their order."""
        for group, clock in self._demanded.items():
            for resident in group.residents:
                resident.demanded_at = clock
                self._order.touch(resident.expert)
        self._demanded.clear()

    def _reorder(self) -> None:
        """Asks the schedule anew about everyone."""
        self._settle()
        for expert in list(self._order.victims()):
            self._order.touch(expert)

    def sections_now(self, expert: int, sections: Sections) -> Sections:
        """What to fetch of an expert that is asked for: the optimizer section too, if it will stay until the schedule updates it."""
        return Sections.ALL if self.schedule.updated_within(expert, self.capacity) else sections

    def sections_ahead(self, expert: int) -> Sections:
        """What to fetch for the next use of an expert that the schedule names."""
        sections = self.schedule.next_sections(expert)
        assert sections is not None
        return self.sections_now(expert, sections)

    def lacks(self, expert: int) -> bool:
        """It is not here, or not all that its next use needs."""
        resident, sections = self.residents.get(expert), self.schedule.next_sections(expert)
        return resident is None or (sections is Sections.ALL and resident.sections is not Sections.ALL and resident.state is State.READY)

    def demand(self, resident: Resident) -> None:
        """Notes that the training thread asked for it."""
        self._settle()
        self._clock += 1
        resident.demanded_at = self._clock
        if resident.prefetched:
            resident.prefetched = False
            fate: PrefetchCount = "useful" if resident.state is State.READY else "late"
            self._counters.count_prefetch(fate, resident.num_bytes, foretold=resident.foretold)
        self._order.touch(resident.expert)

    def mark(self, resident: Resident, *, dirty: bool) -> None:
        """Notes whether the store has its last change."""
        self.num_dirty += dirty - resident.dirty
        resident.dirty = dirty

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
        self._settle()
        resident = self.residents[expert] = Resident(expert, self._free.pop(), sections, num_bytes(self._layout, sections))
        self._order.insert(expert)
        return resident

    def remove(self, resident: Resident) -> None:
        """Empties its slot. What it held is clean, or in a buffer of the write-back."""
        assert resident.pins == 0, f"expert {resident.expert} leaves while it is pinned"
        self._settle()
        self._groups.clear()
        if resident.prefetched:
            self._counters.count_prefetch("wasted", resident.num_bytes, foretold=resident.foretold)
        self.num_removed += 1
        self.num_dirty -= resident.dirty
        del self.residents[resident.expert]
        self._order.remove(resident.expert)
        self._free.append(resident.slot)

    def evict(self, resident: Resident) -> None:
        """Empties its slot to make room."""
        self._counters.evictions += 1
        self.remove(resident)

    def idle(self) -> Iterator[Resident]:
        """Residents that nobody uses at the moment, the next to leave first."""
        self._settle()
        for expert in self._order.victims():
            resident = self.residents[expert]
            if resident.state is State.READY and not (resident.pins or resident.copying):
                yield resident


def num_bytes(layout: Layout, sections: Sections) -> int:
    """What travels of an expert."""
    return layout.body_bytes if sections is Sections.ALL else layout.parameter_bytes
