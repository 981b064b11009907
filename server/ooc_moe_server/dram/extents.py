"""A first-fit allocator for the arena: extents in address order, each with an owner, or a hole.

Neighbouring holes are joined. So the extents always cover the whole space, and no two holes touch. Holds no memory itself.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

Owner = TypeVar("Owner")


@dataclass(slots=True, eq=False)
class Extent(Generic[Owner]):
    """A range of bytes; a hole when it has no owner."""

    start: int
    size: int
    owner: Owner | None

    @property
    def end(self) -> int:
        """The first byte after the extent."""
        return self.start + self.size


class Extents(Generic[Owner]):
    """The extents that divide `capacity` bytes."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.free_bytes = 0
        self._by_start: dict[int, Extent[Owner]] = {}
        self._by_end: dict[int, Extent[Owner]] = {}
        self._holes: list[int] = []  # Starts, sorted.
        self._add(Extent(0, capacity, None))

    def __iter__(self) -> Iterator[Extent[Owner]]:
        """Yields all extents in address order, holes included."""
        start = 0
        while start < self.capacity:
            extent = self._by_start[start]
            yield extent
            start = extent.end

    def allocate(self, size: int, owner: Owner) -> Extent[Owner] | None:
        """Allocates the front of the first hole that holds `size` bytes; returns None when no hole does."""
        if size > self.free_bytes:
            return None
        for start in self._holes:
            hole = self._by_start[start]
            if hole.size >= size:
                self._drop(hole)
                if hole.size > size:
                    self._add(Extent(hole.start + size, hole.size - size, None))
                return self._add(Extent(hole.start, size, owner))
        return None

    def free(self, extent: Extent[Owner]) -> None:
        """Turns an owned extent into a hole, and joins it with neighbouring holes."""
        assert self._by_start.get(extent.start) is extent, "freed twice"
        self._drop(extent)
        start, end = extent.start, extent.end
        before, after = self._by_end.get(start), self._by_start.get(end)
        if before is not None and before.owner is None:
            self._drop(before)
            start = before.start
        if after is not None and after.owner is None:
            self._drop(after)
            end = after.end
        self._add(Extent(start, end - start, None))

    def window(self, victim: Extent[Owner], size: int, movable: Callable[[Owner], bool]) -> list[Extent[Owner]] | None:
        """Returns the owned extents to free so that a hole of `size` bytes opens around `victim`.

        The window starts at `victim` and grows over its neighbours, holes first. It stops at owners that are not movable. Returns None when
        it cannot grow to `size`.
        """
        assert victim.owner is not None
        first = last = victim
        owned = [victim]
        while last.end - first.start < size:
            sides = (self._by_start.get(last.end), self._by_end.get(first.start))
            usable = [side for side in sides if side is not None and (side.owner is None or movable(side.owner))]
            if not usable:
                return None
            chosen = min(usable, key=lambda side: side.owner is not None)
            if chosen.owner is not None:
                owned.append(chosen)
            if chosen.start >= last.end:
                last = chosen
            else:
                first = chosen
        return owned

    def _add(self, extent: Extent[Owner]) -> Extent[Owner]:
        self._by_start[extent.start] = extent
        self._by_end[extent.end] = extent
        if extent.owner is None:
            insort(self._holes, extent.start)
            self.free_bytes += extent.size
        return extent

    def _drop(self, extent: Extent[Owner]) -> None:
        del self._by_start[extent.start]
        del self._by_end[extent.end]
        if extent.owner is None:
            del self._holes[bisect_left(self._holes, extent.start)]
            self.free_bytes -= extent.size
