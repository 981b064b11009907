"""Eviction policies: which resident is evicted first. The daemon's DRAM tier, the trainer's HBM cache and simulations use them.

A policy keeps the order of eviction, and nothing else. Pins, dirty bits and free room are the caller's business:

    for key in policy.victims():      # the order; asking for it changes nothing
        if not is_pinned(key):        # keys that are passed over keep their place
            policy.evict(key)
            break
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
    """An order of eviction over the resident keys. A method that is given a key that is not resident raises KeyError."""

    name: ClassVar[str]

    def insert(self, key: Key, size: int = 1) -> None:
        """Notes that a key became resident. `size` is in the unit in which the caller counts its room."""

    def touch(self, key: Key) -> None:
        """Notes that a resident key was used."""

    def rename(self, old: Key, new: Key) -> None:
        """Gives a resident another key. The resident keeps its place in the order."""

    def evict(self, key: Key) -> None:
        """Notes that a key of `victims()` was evicted to make room. The policy may remember that it was resident."""

    def remove(self, key: Key) -> None:
        """Notes that a key left for another reason. The policy forgets it."""

    def victims(self) -> Iterator[Key]:
        """The resident keys, the next victim first. The policy must not be changed while this is iterated."""


class LRU(Generic[Key]):
    """Evicts the least recently used key first."""

    name: ClassVar[str] = "lru"

    def __init__(self) -> None:
        self._order: OrderedDict[int, Key] = OrderedDict()  # In order of the last use. Keys are found by tickets, which survive `rename`.
        self._tickets: dict[Key, int] = {}
        self._next_ticket = 0

    def insert(self, key: Key, size: int = 1) -> None:
        """Adds the key as the most recently used one."""
        ticket = self._tickets[key] = self._next_ticket
        self._order[ticket] = key
        self._next_ticket += 1

    def touch(self, key: Key) -> None:
        """Makes the key the most recently used one."""
        self._order.move_to_end(self._tickets[key])

    def rename(self, old: Key, new: Key) -> None:
        """Replaces the key; its last use stays as it was."""
        ticket = self._tickets[new] = self._tickets.pop(old)
        self._order[ticket] = new

    def remove(self, key: Key) -> None:
        """Forgets the key."""
        del self._order[self._tickets.pop(key)]

    evict = remove

    def victims(self) -> Iterator[Key]:
        """The keys from the least to the most recently used one."""
        return iter(self._order.values())


@dataclass(slots=True, eq=False)
class _Resident(Generic[Key]):
    """A key in one of the two queues of S3-FIFO."""

    key: Key
    size: int
    queue: _Fifo[Key]
    ticket: int = 0
    uses: int = 0  # Uses since it entered its queue, at most USES_MAX.


class _Fifo(Generic[Key]):
    """A queue from whose middle keys may leave, too."""

    def __init__(self) -> None:
        self.size = 0
        self.waiting: OrderedDict[int, _Resident[Key]] = OrderedDict()
        self._next_ticket = 0

    def enter(self, resident: _Resident[Key], uses: int) -> None:
        """Appends a resident, and sets its number of uses."""
        resident.queue, resident.ticket, resident.uses = self, self._next_ticket, uses
        self._next_ticket += 1
        self.waiting[resident.ticket] = resident
        self.size += resident.size

    def leave(self, resident: _Resident[Key]) -> None:
        """Removes a resident from any place."""
        del self.waiting[resident.ticket]
        self.size -= resident.size


class S3FIFO(Generic[Key]):
    """S3-FIFO: a small and a main queue, and the keys of recent victims of the small one (Yang et al., SOSP 2023, algorithm 1).

        new key -> small queue (a tenth of the room) --used twice--> main queue --used--> another round in the main queue, at most 3
                              |                                          |
                              v not used twice                           v not used
                            evicted; the key is kept for a while       evicted
                            as a ghost: if it comes back, it
                            enters the main queue at once

    A scan uses each key once, so it passes through a tenth of the room and leaves the rest alone.

    This differs from the paper in two points. The shares are of the residents' total size, because the policy does not know its caller's
    room, and is asked for victims only when that is full. And each eviction takes exactly one key, where the paper's may take a second one
    from a full main queue.
    """

    name: ClassVar[str] = "s3fifo"
    USES_MAX = 3

    def __init__(self) -> None:
        self._residents: dict[Key, _Resident[Key]] = {}
        self._small: _Fifo[Key] = _Fifo()
        self._main: _Fifo[Key] = _Fifo()
        self._ghosts: OrderedDict[Key, int] = OrderedDict()  # Their sizes, the oldest ghost first.
        self._ghosts_size = 0

    def insert(self, key: Key, size: int = 1) -> None:
        """Adds the key to the small queue; to the main queue if the key is a ghost."""
        queue = self._main if self._drop_ghost(key) else self._small
        resident = self._residents[key] = _Resident(key, size, queue)
        queue.enter(resident, 0)

    def touch(self, key: Key) -> None:
        """Counts a use. The key keeps its place."""
        resident = self._residents[key]
        if resident.uses < self.USES_MAX:
            resident.uses += 1

    def rename(self, old: Key, new: Key) -> None:
        """Replaces the key; its place and its uses stay as they were."""
        resident = self._residents[new] = self._residents.pop(old)
        resident.key = new
        self._drop_ghost(new)

    def evict(self, key: Key) -> None:
        """Removes the key. Keys that would move to or in the main queue before its turn move now; earlier victims keep their places."""
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
        """Forgets the key."""
        resident = self._residents.pop(key)
        resident.queue.leave(resident)

    def victims(self) -> Iterator[Key]:
        """The order in which repeated evictions would take the residents, if none were used in between."""
        return (resident.key for resident, leaves in self._walk() if leaves)

    def _moved_before(self, victim: _Resident[Key]) -> list[_Resident[Key]]:
        """The residents that move before it is the victim's turn, once for each move."""
        moved = []
        for resident, leaves in self._walk():
            if leaves and resident is victim:
                break
            if not leaves:
                moved.append(resident)
        return moved

    def _walk(self) -> Iterator[tuple[_Resident[Key], bool]]:
        """Simulates evictions: yields the next resident to decide on, and whether it leaves or moves to the end of the main queue."""
        small_size, main_size = self._small.size, self._main.size
        small, main = iter(self._small.waiting.values()), iter(self._main.waiting.values())
        moved: deque[tuple[_Resident[Key], int]] = deque()  # They stand behind all of `main`; each with its uses.
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
        """Forgets a ghost. False when the key is no ghost."""
        size = self._ghosts.pop(key, 0)
        self._ghosts_size -= size
        return size > 0


class Random(Generic[Key]):
    """Evicts a random key. A policy that is no better has learned nothing from the past."""

    name: ClassVar[str] = "random"

    def __init__(self, seed: int = 0) -> None:
        self._random = random.Random(seed)
        self._keys: list[Key] = []
        self._places: dict[Key, int] = {}

    def insert(self, key: Key, size: int = 1) -> None:
        """Adds the key."""
        self._places[key] = len(self._keys)
        self._keys.append(key)

    def touch(self, key: Key) -> None:
        """Does nothing."""
        self._places[key]

    def rename(self, old: Key, new: Key) -> None:
        """Replaces the key."""
        place = self._places[new] = self._places.pop(old)
        self._keys[place] = new

    def remove(self, key: Key) -> None:
        """Forgets the key; the last key of the list takes its place."""
        place, last = self._places.pop(key), self._keys.pop()
        if place < len(self._keys):
            self._keys[place] = last
            self._places[last] = place

    evict = remove

    def victims(self) -> Iterator[Key]:
        """The keys in random order. Each call draws a new order."""
        drawn: set[int] = set()
        while len(drawn) < len(self._keys):
            place = int(self._random.random() * len(self._keys))
            if place not in drawn:
                drawn.add(place)
                yield self._keys[place]


class NextUse(Generic[Key]):
    """Evicts the key with the furthest next use first. Keys whose next use is unknown go before all others, least recently used first.

    Args:
        next_use: returns when a key will be used next, as a number that no other key gets; None when that is unknown. It is called by
            `insert` and `touch`.
    """

    name: ClassVar[str] = "next-use"

    def __init__(self, next_use: Callable[[Key], int | None]) -> None:
        self._find_next_use = next_use
        self._clock = 0
        self._next_use: dict[Key, int] = {}  # Of the residents.
        self._by_next_use: dict[int, Key] = {}
        self._furthest: list[int] = []  # A heap of negated next uses, some of which are out of date.

    def insert(self, key: Key, size: int = 1) -> None:
        """Adds the key with its next use."""
        self._clock += 1
        next_use = self._find_next_use(key)
        self._place(key, _UNKNOWN - self._clock if next_use is None else next_use)

    def touch(self, key: Key) -> None:
        """Looks up the key's next use anew."""
        self.remove(key)
        self.insert(key)

    def rename(self, old: Key, new: Key) -> None:
        """Replaces the key; its next use stays as it was."""
        next_use = self._next_use[old]
        self.remove(old)
        self._place(new, next_use)

    def remove(self, key: Key) -> None:
        """Forgets the key."""
        del self._by_next_use[self._next_use.pop(key)]

    evict = remove

    def victims(self) -> Iterator[Key]:
        """The keys from the furthest to the nearest next use. The first is cheap to find; the others cost a sort."""
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


_UNKNOWN = 1 << 62  # Further than any known next use.


class Belady(NextUse[Key]):
    """The optimal policy for keys of one size (Belady 1966), against which others are measured: `NextUse` with a known future.

    Args:
        trace: all accesses in order. Each call of `insert` or `touch` must be the next access of the trace.
    """

    name: ClassVar[str] = "belady"

    def __init__(self, trace: Sequence[Key]) -> None:
        super().__init__(self._next_use_in_trace)
        self._trace = trace
        self._next_uses = _next_uses(trace)
        self._num_accesses = 0

    def _next_use_in_trace(self, key: Key) -> int:
        assert self._trace[self._num_accesses] == key, "this is not the next access of the trace"
        self._num_accesses += 1
        return self._next_uses[self._num_accesses - 1]


def _next_uses(trace: Sequence[Key]) -> array[int]:
    """For each access the position of the key's next access. Without one, a position beyond the end, which no other access gets."""
    following: dict[Key, int] = {}
    next_uses = array("q", bytes(8 * len(trace)))
    for position in range(len(trace) - 1, -1, -1):
        next_uses[position] = following.get(trace[position], len(trace) + position)
        following[trace[position]] = position
    return next_uses


_POLICIES: dict[str, Callable[[], EvictionPolicy[Any]]] = {LRU.name: LRU, S3FIFO.name: S3FIFO, Random.name: Random}


def make_policy(name: str) -> EvictionPolicy[Any]:
    """Makes an online policy by its name: "lru", "s3fifo" or "random". Raises InvalidRequest for another name."""
    if name not in _POLICIES:
        raise InvalidRequest(f"policy: {name!r} is not one of {', '.join(_POLICIES)}")
    return _POLICIES[name]()
