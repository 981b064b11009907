"""Eviction policies: they decide which resident key (an expert in memory, say) is evicted first.

The daemon's DRAM tier, the trainer's HBM cache and simulations use them. A policy only keeps the order of eviction. The caller keeps track
of pins (keys that must stay), changed data and free room:

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
    """The interface of all policies: a policy is told about every use of a key, and gives the order in which to evict the resident keys.

    Resident keys are those that were inserted and have not left. Methods raise KeyError for a key that must be resident and is not.
    """

    name: ClassVar[str]

    def insert(self, key: Key, size: int = 1) -> None:
        """Adds a key that became resident. `size` is how much room it takes, in any unit that the caller uses for all keys."""

    def touch(self, key: Key) -> None:
        """Notes that a resident key was used. This may change its place in the order of eviction."""

    def rename(self, old: Key, new: Key) -> None:
        """Replaces the resident key `old` by `new`, at the same place in the order."""

    def evict(self, key: Key) -> None:
        """Removes a key that the caller evicts to make room; `victims()` no longer yields it. The policy may remember the key."""

    def remove(self, key: Key) -> None:
        """Forgets a key that left memory for a reason other than eviction, for example because its bank was deleted."""

    def victims(self) -> Iterator[Key]:
        """Yields the resident keys in the order of eviction, the next one first. Do not change the policy while you iterate."""


class LRU(Generic[Key]):
    """The least-recently-used policy: evicts the key that was not used for the longest time."""

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
        """Replaces the key `old` by `new`. The time of its last use stays."""
        ticket = self._tickets[new] = self._tickets.pop(old)
        self._order[ticket] = new

    def remove(self, key: Key) -> None:
        """Removes the key from the order of eviction."""
        del self._order[self._tickets.pop(key)]

    evict = remove

    def victims(self) -> Iterator[Key]:
        """Yields the keys, from the least to the most recently used one."""
        return iter(self._order.values())


@dataclass(slots=True, eq=False)
class _Resident(Generic[Key]):
    """A resident key of S3-FIFO: its size, its place in one of the two queues, and its uses there."""

    key: Key
    size: int
    queue: _Fifo[Key]
    ticket: int = 0
    uses: int = 0  # Uses since it entered its queue, at most USES_MAX.


class _Fifo(Generic[Key]):
    """A first-in-first-out queue of resident keys, from which keys can also be removed in the middle."""

    def __init__(self) -> None:
        self.size = 0
        self.waiting: OrderedDict[int, _Resident[Key]] = OrderedDict()
        self._next_ticket = 0

    def enter(self, resident: _Resident[Key], uses: int) -> None:
        """Appends a resident key to the queue, and sets its number of uses."""
        resident.queue, resident.ticket, resident.uses = self, self._next_ticket, uses
        self._next_ticket += 1
        self.waiting[resident.ticket] = resident
        self.size += resident.size

    def leave(self, resident: _Resident[Key]) -> None:
        """Removes a resident key from the queue, wherever it is."""
        del self.waiting[resident.ticket]
        self.size -= resident.size


class S3FIFO(Generic[Key]):
    """The S3-FIFO policy (Yang et al., SOSP 2023, algorithm 1): a small queue for new keys, and a main queue for keys that are used again.

        new key -> small queue (a tenth of the room) --used twice--> main queue --used--> another round in the main queue, at most 3
                              |                                          |
                              v not used twice                           v not used
                            evicted; the key is kept for a while       evicted
                            as a ghost: if it comes back, it
                            enters the main queue at once

    A scan (a pass over many keys, each used once) moves through the small queue only. It evicts nothing from the other nine tenths of the
    room.

    This differs from the paper in two points. The share of a queue is measured against the total size of the resident keys, because the
    policy does not know how much room the caller has; the caller asks for victims only when its room is full. And each eviction takes
    exactly one key, where the paper's may take a second one from a full main queue.
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
        """Adds the key to the small queue, or to the main queue if the key is a ghost (evicted from the small queue not long ago)."""
        queue = self._main if self._drop_ghost(key) else self._small
        resident = self._residents[key] = _Resident(key, size, queue)
        queue.enter(resident, 0)

    def touch(self, key: Key) -> None:
        """Counts a use of the key. The key keeps its place in its queue."""
        resident = self._residents[key]
        if resident.uses < self.USES_MAX:
            resident.uses += 1

    def rename(self, old: Key, new: Key) -> None:
        """Replaces the key `old` by `new`. Its place in the queue and its count of uses stay."""
        resident = self._residents[new] = self._residents.pop(old)
        resident.key = new
        self._drop_ghost(new)

    def evict(self, key: Key) -> None:
        """Removes the key. If the key was in the small queue, remembers it as a ghost.

        Other keys may come before this one in the order. Keys that S3-FIFO would move to the end of the main queue are moved now. Keys that
        S3-FIFO would evict, but that the caller passed over (pinned keys, say), keep their places.
        """
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
        """Removes the key. It does not become a ghost, so it will be a new key if it comes back."""
        resident = self._residents.pop(key)
        resident.queue.leave(resident)

    def victims(self) -> Iterator[Key]:
        """Yields the resident keys in the order in which repeated evictions would take them, if no key were used in between."""
        return (resident.key for resident, leaves in self._walk() if leaves)

    def _moved_before(self, victim: _Resident[Key]) -> list[_Resident[Key]]:
        """Returns the keys that would move to the end of the main queue before the victim's turn to be evicted comes.

        A key that would move several times is in the list as often.
        """
        moved = []
        for resident, leaves in self._walk():
            if leaves and resident is victim:
                break
            if not leaves:
                moved.append(resident)
        return moved

    def _walk(self) -> Iterator[tuple[_Resident[Key], bool]]:
        """Simulates evictions. Yields each key that S3-FIFO decides on, and the decision.

        True: the key is evicted. False: it moves to the end of the main queue.
        """
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
        """Forgets a ghost. Returns whether the key was a ghost."""
        size = self._ghosts.pop(key, 0)
        self._ghosts_size -= size
        return size > 0


class Random(Generic[Key]):
    """A policy that evicts a random key. It is a baseline: a policy that evicts no better has learned nothing from past uses."""

    name: ClassVar[str] = "random"

    def __init__(self, seed: int = 0) -> None:
        self._random = random.Random(seed)
        self._keys: list[Key] = []
        self._places: dict[Key, int] = {}

    def insert(self, key: Key, size: int = 1) -> None:
        """Adds a resident key. Its size does not matter."""
        self._places[key] = len(self._keys)
        self._keys.append(key)

    def touch(self, key: Key) -> None:
        """Does nothing, because uses do not matter to a random order. Raises KeyError for a key that is not resident."""
        self._places[key]

    def rename(self, old: Key, new: Key) -> None:
        """Replaces the key `old` by `new`."""
        place = self._places[new] = self._places.pop(old)
        self._keys[place] = new

    def remove(self, key: Key) -> None:
        """Removes the key. (Its place in the internal list goes to the last key, so that no other keys have to move.)"""
        place, last = self._places.pop(key), self._keys.pop()
        if place < len(self._keys):
            self._keys[place] = last
            self._places[last] = place

    evict = remove

    def victims(self) -> Iterator[Key]:
        """Yields the keys in a random order, a different one at each call."""
        drawn: set[int] = set()
        while len(drawn) < len(self._keys):
            place = int(self._random.random() * len(self._keys))
            if place not in drawn:
                drawn.add(place)
                yield self._keys[place]


class NextUse(Generic[Key]):
    """A policy that evicts the key whose next use is furthest in the future, as the caller predicts it.

    Keys whose next use is unknown are evicted before all others, the least recently used first.

    Args:
        next_use: returns the time of a key's next use, as a number that no other key gets; None when that is unknown. `insert` and `touch`
            call this function.
    """

    name: ClassVar[str] = "next-use"

    def __init__(self, next_use: Callable[[Key], int | None]) -> None:
        self._find_next_use = next_use
        self._clock = 0
        self._next_use: dict[Key, int] = {}  # Of the residents.
        self._by_next_use: dict[int, Key] = {}
        self._furthest: list[int] = []  # A heap of negated next uses, some of which are out of date.

    def insert(self, key: Key, size: int = 1) -> None:
        """Adds the key. Asks `next_use` for the time of its next use, which gives its place in the order."""
        self._clock += 1
        next_use = self._find_next_use(key)
        self._place(key, _UNKNOWN - self._clock if next_use is None else next_use)

    def touch(self, key: Key) -> None:
        """Notes a use of the key: asks `next_use` again, and moves the key to its new place in the order."""
        self.remove(key)
        self.insert(key)

    def rename(self, old: Key, new: Key) -> None:
        """Replaces the key `old` by `new`. The time of the next use stays."""
        next_use = self._next_use[old]
        self.remove(old)
        self._place(new, next_use)

    def remove(self, key: Key) -> None:
        """Removes the key from the order of eviction."""
        del self._by_next_use[self._next_use.pop(key)]

    evict = remove

    def victims(self) -> Iterator[Key]:
        """Yields the keys, from the furthest to the nearest next use. The first one is cheap to find; all others cost a sort."""
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
    """The optimal policy for keys of equal size (Belady 1966): it knows all future accesses, and evicts the key with the furthest next use.

    Simulations compare all other policies with this one.

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
    """For each access in the trace, the position of the next access to the same key.

    If there is none, a position beyond the end of the trace, which no other access gets.
    """
    following: dict[Key, int] = {}
    next_uses = array("q", bytes(8 * len(trace)))
    for position in range(len(trace) - 1, -1, -1):
        next_uses[position] = following.get(trace[position], len(trace) + position)
        following[trace[position]] = position
    return next_uses


_POLICIES: dict[str, Callable[[], EvictionPolicy[Any]]] = {LRU.name: LRU, S3FIFO.name: S3FIFO, Random.name: Random}


def make_policy(name: str) -> EvictionPolicy[Any]:
    """Makes a policy by its name: "lru", "s3fifo" or "random". Raises InvalidRequest for any other name."""
    if name not in _POLICIES:
        raise InvalidRequest(f"policy: {name!r} is not one of {', '.join(_POLICIES)}")
    return _POLICIES[name]()
