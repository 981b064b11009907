"""Which resident leaves first: the eviction policies of the daemon's DRAM tier, the trainer's HBM cache, and simulations.

A policy orders keys and owns nothing else: pins, dirty bits and room are its caller's. The caller asks `victims()` for an order, which
changes nothing, takes the first that it may take, and says so with `evict`; what it passed over (a pinned one) stays where it was.
"""

from __future__ import annotations

import random
from array import array
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from ooc_moe_wire.errors import InvalidRequest

Key = TypeVar("Key", bound=Hashable)


class EvictionPolicy(Protocol[Key]):
    """The order in which residents leave. A key that is not resident is a KeyError."""

    name: ClassVar[str]

    def insert(self, key: Key, size: int = 1) -> None:
        """A key becomes resident; `size` in whatever unit the caller counts its room in."""

    def touch(self, key: Key) -> None:
        """A resident key was used."""

    def rename(self, old: Key, new: Key) -> None:
        """A resident goes by another key from now on, and keeps its place; no use."""

    def evict(self, key: Key) -> None:
        """A key that `victims()` gave left to make room; the policy may remember that it was here."""

    def remove(self, key: Key) -> None:
        """A key left for any other reason, without a trace."""

    def victims(self) -> Iterator[Key]:
        """Residents, the next to leave first. The caller changes nothing while it iterates."""


class LRU(Generic[Key]):
    """The least recently used leaves first."""

    name: ClassVar[str] = "lru"

    def __init__(self) -> None:
        self._order: OrderedDict[int, Key] = OrderedDict()  # By the time of the last use; under tickets, which outlast a renaming.
        self._tickets: dict[Key, int] = {}
        self._next_ticket = 0

    def insert(self, key: Key, size: int = 1) -> None:
        """Enters as the most recently used."""
        ticket = self._tickets[key] = self._next_ticket
        self._order[ticket] = key
        self._next_ticket += 1

    def touch(self, key: Key) -> None:
        """Becomes the most recently used."""
        self._order.move_to_end(self._tickets[key])

    def rename(self, old: Key, new: Key) -> None:
        """Keeps the time of its last use."""
        ticket = self._tickets[new] = self._tickets.pop(old)
        self._order[ticket] = new

    def evict(self, key: Key) -> None:
        """Forgets the key."""
        self.remove(key)

    def remove(self, key: Key) -> None:
        """Forgets the key."""
        del self._order[self._tickets.pop(key)]

    def victims(self) -> Iterator[Key]:
        """From the least to the most recently used."""
        return iter(self._order.values())


@dataclass(slots=True, eq=False)
class _Resident(Generic[Key]):
    """A key in one of the two queues of S3-FIFO."""

    key: Key
    size: int
    queue: _Fifo[Key]
    ticket: int = 0
    uses: int = 0  # Since it entered its queue, at most USES_MAX.


class _Fifo(Generic[Key]):
    """A queue that can also be left from its middle."""

    def __init__(self) -> None:
        self.size = 0
        self.waiting: OrderedDict[int, _Resident[Key]] = OrderedDict()
        self._next_ticket = 0

    def enter(self, resident: _Resident[Key], uses: int) -> None:
        """Goes to the end, with so many uses."""
        resident.queue, resident.ticket, resident.uses = self, self._next_ticket, uses
        self._next_ticket += 1
        self.waiting[resident.ticket] = resident
        self.size += resident.size

    def leave(self, resident: _Resident[Key]) -> None:
        """Goes, from wherever it stands."""
        del self.waiting[resident.ticket]
        self.size -= resident.size


class S3FIFO(Generic[Key]):
    """Small and main queue, and the keys of those that left the small one (Yang et al., SOSP 2023, algorithm 1).

    A newcomer passes through the small queue, a tenth of the room: used twice on the way, it goes on to the main queue; if not, it leaves
    early, and only its key is kept for a while (a ghost); coming back in that time, it enters the main queue at once. The main queue gives
    another round for each use, up to three. So a scan, used once, flows through a tenth of the room and leaves the rest alone.

    As the paper, but: the shares are of what is resident now (the policy is not told its caller's room, and is asked for victims only when
    that is full); and each eviction is of exactly one key, where the paper's may take one more from a full main queue.
    """

    name: ClassVar[str] = "s3fifo"
    USES_MAX = 3

    def __init__(self) -> None:
        self._residents: dict[Key, _Resident[Key]] = {}
        self._small: _Fifo[Key] = _Fifo()
        self._main: _Fifo[Key] = _Fifo()
        self._ghosts: OrderedDict[Key, int] = OrderedDict()  # Sizes, the oldest first.
        self._ghosts_size = 0

    def insert(self, key: Key, size: int = 1) -> None:
        """Enters the small queue, or the main one if it left the small one not long ago."""
        queue = self._main if self._drop_ghost(key) else self._small
        resident = self._residents[key] = _Resident(key, size, queue)
        queue.enter(resident, 0)

    def touch(self, key: Key) -> None:
        """Counts a use; moves nothing."""
        resident = self._residents[key]
        if resident.uses < self.USES_MAX:
            resident.uses += 1

    def rename(self, old: Key, new: Key) -> None:
        """Keeps its place and its uses."""
        resident = self._residents[new] = self._residents.pop(old)
        resident.key = new
        self._drop_ghost(new)

    def evict(self, key: Key) -> None:
        """Leaves; those that `victims()` moved on the way to it move now, and those that it gave before it stay where they are."""
        room = self._small.size + self._main.size
        victim = self._residents[key]
        for resident in self._moved_before(victim):
            promoted = resident.queue is self._small
            resident.queue.leave(resident)
            self._main.enter(resident, 0 if promoted else resident.uses - 1)
        from_small = victim.queue is self._small
        self.remove(key)
        if from_small:
            self._ghosts[key] = victim.size
            self._ghosts_size += victim.size
        while 10 * self._ghosts_size > 9 * room:
            self._drop_ghost(next(iter(self._ghosts)))

    def remove(self, key: Key) -> None:
        """Leaves its queue."""
        resident = self._residents.pop(key)
        resident.queue.leave(resident)

    def victims(self) -> Iterator[Key]:
        """In the order in which evictions without a use between them would take the residents."""
        return (resident.key for resident, leaves in self._walk() if leaves)

    def _moved_before(self, victim: _Resident[Key]) -> list[_Resident[Key]]:
        """Who moves, and how often, until the walk comes to the victim."""
        moved = []
        for resident, leaves in self._walk():
            if leaves and resident is victim:
                break
            if not leaves:
                moved.append(resident)
        return moved

    def _walk(self) -> Iterator[tuple[_Resident[Key], bool]]:
        """Plays evictions without changing anything: who comes up next, and whether it leaves or moves to the end of the main queue."""
        small_size, main_size = self._small.size, self._main.size
        small, main = iter(self._small.waiting.values()), iter(self._main.waiting.values())
        moved: deque[tuple[_Resident[Key], int]] = deque()  # Behind all of `main`; with their uses.
        while small_size or main_size:
            if small_size and 10 * small_size >= small_size + main_size:
                resident = next(small)
                small_size -= resident.size
                leaves = resident.uses <= 1
                if not leaves:
                    main_size += resident.size
                    moved.append((resident, 0))
            else:
                following = next(main, None)
                resident, uses = moved.popleft() if following is None else (following, following.uses)
                leaves = uses == 0
                if leaves:
                    main_size -= resident.size
                else:
                    moved.append((resident, uses - 1))
            yield resident, leaves

    def _drop_ghost(self, key: Key) -> bool:
        """Forgets a ghost; False when the key is none."""
        size = self._ghosts.pop(key, 0)
        self._ghosts_size -= size
        return size > 0


class Random(Generic[Key]):
    """Anyone leaves, all with the same chance: what a policy must beat to have learned anything from the past."""

    name: ClassVar[str] = "random"

    def __init__(self, seed: int = 0) -> None:
        self._random = random.Random(seed)
        self._keys: list[Key] = []
        self._places: dict[Key, int] = {}

    def insert(self, key: Key, size: int = 1) -> None:
        """Enters."""
        self._places[key] = len(self._keys)
        self._keys.append(key)

    def touch(self, key: Key) -> None:
        """Changes nothing."""
        self._places[key]

    def rename(self, old: Key, new: Key) -> None:
        """Goes by another key."""
        place = self._places[new] = self._places.pop(old)
        self._keys[place] = new

    def evict(self, key: Key) -> None:
        """Forgets the key."""
        self.remove(key)

    def remove(self, key: Key) -> None:
        """Forgets the key; the last one takes its place."""
        place, last = self._places.pop(key), self._keys.pop()
        if place < len(self._keys):
            self._keys[place] = last
            self._places[last] = place

    def victims(self) -> Iterator[Key]:
        """In a random order, another each time."""
        drawn: set[int] = set()
        while len(drawn) < len(self._keys):
            place = int(self._random.random() * len(self._keys))
            if place not in drawn:
                drawn.add(place)
                yield self._keys[place]


class NextUse(Generic[Key]):
    """The one whose next use is furthest leaves first; those of which none is known before all others, the least recently used first.

    Args:
        next_use: when a key will be used next, as a number that no other key answers; None where nobody knows. Asked at insert and touch.
    """

    name: ClassVar[str] = "next-use"

    def __init__(self, next_use: Callable[[Key], int | None]) -> None:
        self._foretold = next_use
        self._clock = 0
        self._next_use: dict[Key, int] = {}  # Of the residents.
        self._by_next_use: dict[int, Key] = {}
        self._furthest: list[int] = []  # A heap of negated next uses, some of them outdated.

    def insert(self, key: Key, size: int = 1) -> None:
        """Enters with its next use."""
        self._clock += 1
        foretold = self._foretold(key)
        self._place(key, _UNKNOWN - self._clock if foretold is None else foretold)

    def touch(self, key: Key) -> None:
        """Its next use is now a later one."""
        self.remove(key)
        self.insert(key)

    def rename(self, old: Key, new: Key) -> None:
        """Keeps its next use."""
        next_use = self._next_use[old]
        self.remove(old)
        self._place(new, next_use)

    def evict(self, key: Key) -> None:
        """Forgets the key."""
        self.remove(key)

    def remove(self, key: Key) -> None:
        """Forgets the key."""
        del self._by_next_use[self._next_use.pop(key)]

    def victims(self) -> Iterator[Key]:
        """From the furthest to the nearest next use. The first costs little, all of them a sort."""
        while self._furthest and -self._furthest[0] not in self._by_next_use:
            heappop(self._furthest)
        if not self._furthest:
            return
        yield self._by_next_use[-self._furthest[0]]
        for next_use in sorted(self._by_next_use, reverse=True)[1:]:
            yield self._by_next_use[next_use]

    def _place(self, key: Key, next_use: int) -> None:
        self._next_use[key] = next_use
        self._by_next_use[next_use] = key
        heappush(self._furthest, -next_use)
        if len(self._furthest) > 64 + 2 * len(self._by_next_use):
            self._furthest = [-use for use in self._by_next_use]
            heapify(self._furthest)


_UNKNOWN = 1 << 62  # Later than any next use that is known.


class Belady(NextUse[Key]):
    """The optimum for records of one size (Belady 1966), to measure the others against: `NextUse` that knows everything.

    It must be told the future: `trace` is every access in order, and each insert or touch is the next of them.
    """

    name: ClassVar[str] = "belady"

    def __init__(self, trace: Sequence[Key]) -> None:
        super().__init__(self._following)
        self._trace = trace
        self._next_uses = _next_uses(trace)
        self._num_accesses = 0

    def _following(self, key: Key) -> int:
        assert self._trace[self._num_accesses] == key, "not the access that the trace foretold"
        self._num_accesses += 1
        return self._next_uses[self._num_accesses - 1]


def _next_uses(trace: Sequence[Key]) -> array[int]:
    """For each access the position of the same key's next one; beyond the end, each another, where there is none."""
    following: dict[Key, int] = {}
    next_uses = array("q", bytes(8 * len(trace)))
    for position in range(len(trace) - 1, -1, -1):
        next_uses[position] = following.get(trace[position], len(trace) + position)
        following[trace[position]] = position
    return next_uses


_POLICIES: dict[str, Callable[[], EvictionPolicy[Any]]] = {LRU.name: LRU, S3FIFO.name: S3FIFO, Random.name: Random}


def make_policy(name: str) -> EvictionPolicy[Any]:
    """An online policy by its name: "lru", "s3fifo" or "random". Raises InvalidRequest."""
    if name not in _POLICIES:
        raise InvalidRequest(f"policy: {name!r} is not one of {', '.join(_POLICIES)}")
    return _POLICIES[name]()
