"""`SlotTable`: which expert is in which slot, and in which order experts are evicted.

When a schedule (the announced order in which experts will be used) is set, experts that the schedule does not name are evicted first, the
least recently used before the rest. Then come the experts that it names, the one with the furthest next use first:

    evicted first -> [not in the schedule, least recently used ... most recently used] [next use far ... next use near] -> evicted last

Demand, prefetch and write-back hold the cache's lock when they call this table.
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


class LoadState(Enum):
    """Whether the bytes of an expert in a slot may be read: LOADING while they are fetched, then READY."""

    LOADING = 0
    READY = 1


@dataclass(slots=True, eq=False)
class Resident:
    """An expert that has a slot, and its state: what was fetched of it, its pins, its changes, and when it was last asked for.

    It is READY when the bytes of its `sections` are in the slot. It is dirty when it has changes that the store does not have.
    """

    expert: int
    slot: int
    sections: Sections  # what was fetched of the expert
    num_bytes: int  # of these sections
    state: LoadState = LoadState.LOADING
    version: int = 0
    pins: int = 0
    dirty: bool = False  # it has changes that the store does not have
    updating: int = 0  # open `updating` blocks: the slot is not copied out meanwhile
    copying: bool = False  # the slot is being copied out: the expert is neither updated nor evicted meanwhile
    generation: int = 0  # grows with every update; a push clears `dirty` only if it has not grown since
    prefetched: bool = False  # fetched before it was asked for, and not asked for yet
    scheduled: bool = False  # fetched because the schedule names it
    demanded_at: int = NEVER  # the table's clock when it was last asked for
    prefetch_call: int = 0  # the number of the last prefetch call that named it

    def holds(self, sections: Sections) -> bool:
        """Whether these sections of the expert have been fetched and may be read."""
        return self.state is LoadState.READY and self.sections.includes(sections)


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Experts that were asked for together, and their slots. While these experts stay in their slots, one look-up finds the group."""

    experts: tuple[int, ...]
    residents: list[Resident]
    slots: list[int]
    sections: Sections  # that every resident of the group holds


class SlotTable:
    """The experts in slots ("residents"), the free slots, and the order of eviction. The cache's threads look up and change it.

    Callers of every method hold the cache's lock.
    """

    def __init__(self, layout: Layout, capacity: int, counters: Counters) -> None:
        self.capacity = capacity
        self.residents: dict[int, Resident] = {}
        self.num_dirty = 0
        self.num_removed = 0  # residents removed since the start
        self.schedule = Schedule()
        self._layout = layout
        self._counters = counters
        self._free = list(range(capacity - 1, -1, -1))
        self._groups: dict[tuple[int, ...], Group] = {}
        self._unordered_groups: dict[Group, int] = {}  # groups whose last demand is not in `_order` yet, and the time of that demand
        self._order: NextUse[int] = NextUse(lambda expert: self.schedule.next_use(expert))
        self._clock = 0  # experts demanded so far
        self._working_set_since = 0

    @property
    def num_free(self) -> int:
        """The number of empty slots."""
        return len(self._free)

    # The schedule

    def follow_schedule(self, schedule: Schedule) -> None:
        """Replaces the schedule (the announced order in which experts will be used), and sorts the order of eviction by the new one."""
        self.schedule = schedule
        self._reorder_by_schedule()

    def advance(self, experts: Sequence[int]) -> None:
        """Moves the trainer's position in the schedule on, because the training thread asks for these experts in one call.

        Afterwards call `note_demand` for each of them.
        """
        if not self.schedule.advance(experts):
            self._reorder_by_schedule()

    def _reorder_by_schedule(self) -> None:
        """Sorts the order of eviction again, by the next uses that the schedule gives now."""
        self._order_groups()
        for expert in list(self._order.victims()):
            self._order.touch(expert)

    def sections_to_fetch(self, expert: int, sections: Sections) -> Sections:
        """Decides which sections of an expert to fetch when `sections` are asked for.

        The optimizer section is added if the schedule will update the expert before it would be evicted.
        """
        return Sections.ALL if self.schedule.updated_within(expert, self.capacity) else sections

    def sections_for_next_use(self, expert: int) -> Sections:
        """Decides which sections to fetch for the next use of an expert that the schedule names."""
        sections = self.schedule.next_sections(expert)
        assert sections is not None
        return self.sections_to_fetch(expert, sections)

    def lacks_for_next_use(self, expert: int) -> bool:
        """Whether the expert's next use needs a fetch: the expert has no slot, or was fetched without a section that the use needs."""
        resident, needed = self.residents.get(expert), self.schedule.next_sections(expert)
        if resident is None:
            return True
        return needed is not None and resident.state is LoadState.READY and not resident.sections.includes(needed)

    # Demand

    def find_group(self, experts: tuple[int, ...], sections: Sections) -> Group | None:
        """Returns the group (experts with their slots) that was remembered for exactly these experts.

        Returns None unless these experts were asked for together before, have `sections` in their slots, and kept the slots.
        """
        group = self._groups.get(experts)
        return group if group is not None and group.sections.includes(sections) else None

    def remember_group(self, experts: tuple[int, ...], residents: list[Resident]) -> Group:
        """Makes a group of experts that are ready in their slots, and keeps it for `find_group`."""
        is_whole = all(resident.sections is Sections.ALL for resident in residents)
        group = Group(experts, residents, [resident.slot for resident in residents], Sections.ALL if is_whole else Sections.PARAMETERS)
        if len(self._groups) == GROUPS_MAX:
            del self._groups[next(iter(self._groups))]
        self._groups[experts] = group
        return group

    def note_group_demand(self, group: Group) -> None:
        """Notes that the training thread asks for the experts of a group. Call it instead of `advance` and `note_demand`: it is faster.

        The order of eviction is updated later, when it is needed.
        """
        self._clock += len(group.experts)
        self._unordered_groups.pop(group, None)
        self._unordered_groups[group] = self._clock
        self.advance(group.experts)

    def _order_groups(self) -> None:
        """Updates the order of eviction with what `note_group_demand` has noted."""
        for group, clock in self._unordered_groups.items():
            for resident in group.residents:
                resident.demanded_at = clock
                self._order.touch(resident.expert)
        self._unordered_groups.clear()

    def note_demand(self, resident: Resident) -> None:
        """Notes that the training thread asks for this expert. If it was fetched ahead, counts that fetch as useful or late."""
        self._order_groups()
        self._clock += 1
        resident.demanded_at = self._clock
        if resident.prefetched:
            resident.prefetched = False
            fate: PrefetchCount = "useful" if resident.state is LoadState.READY else "late"
            self._counters.count_prefetch(fate, resident.num_bytes, scheduled=resident.scheduled)
        self._order.touch(resident.expert)

    def set_dirty(self, resident: Resident, dirty: bool) -> None:
        """Marks the expert as dirty (it has changes that the store does not have) or clean."""
        self.num_dirty += dirty - resident.dirty
        resident.dirty = dirty

    def new_working_set(self) -> None:
        """Starts a new, empty working set: prefetches may evict all experts that were asked for until now."""
        self._working_set_since = self._clock

    def in_working_set(self, resident: Resident) -> bool:
        """Whether the expert is in the working set, the recently used experts that prefetches must not evict.

        The expert is in it when it was asked for since `new_working_set`, and among the last 2 x `capacity` demands (experts asked for).
        Training visits layers forward and then backward, so each expert of a set that fits into the cache is asked for at least once within
        that many demands. Experts that are no longer used drop out by themselves.
        """
        return resident.demanded_at > max(self._working_set_since, self._clock - 2 * self.capacity)

    # Slots

    def insert(self, expert: int, sections: Sections) -> Resident:
        """Gives a free slot to an expert, in the state LOADING. Returns its `Resident`. `sections`: what will be fetched of the expert."""
        self._order_groups()
        resident = Resident(expert, self._free.pop(), sections, sections.num_bytes(self._layout))
        self.residents[expert] = resident
        self._order.insert(expert)
        return resident

    def remove(self, resident: Resident) -> None:
        """Frees an expert's slot. The expert must be clean, or its changes must be in a buffer of the write-back."""
        assert resident.pins == 0, f"expert {resident.expert} is removed while it is pinned"
        self._order_groups()
        self._groups.clear()
        if resident.prefetched:
            self._counters.count_prefetch("wasted", resident.num_bytes, scheduled=resident.scheduled)
        self.num_removed += 1
        self.num_dirty -= resident.dirty
        del self.residents[resident.expert]
        self._order.remove(resident.expert)
        self._free.append(resident.slot)

    def evict(self, resident: Resident) -> None:
        """Frees an expert's slot to make room for another expert, and counts an eviction."""
        self._counters.evictions += 1
        self.remove(resident)

    def evictable(self) -> Iterator[Resident]:
        """Yields the experts that may be evicted now (ready, not pinned, not being copied out), in the order in which to evict them."""
        self._order_groups()
        for expert in self._order.victims():
            resident = self.residents[expert]
            if resident.state is LoadState.READY and not (resident.pins or resident.copying):
                yield resident
