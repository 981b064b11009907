"""An allocator that divides the arena into extents: ranges of bytes, each of which has an owner or is a hole (free).

Each range is allocated from the first hole that is large enough. Neighbouring holes are joined, so that the extents always cover the whole
arena and no two holes touch. The allocator keeps only numbers; it does not hold the memory.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

Owner = TypeVar("Owner")


@dataclass(slots=True, eq=False)
class Extent(Generic[Owner]):
    """A range of bytes in the arena: `size` bytes from `start`. It is a hole (free) when it has no owner."""

    start: int
    size: int
    owner: Owner | None

    @property
    def end(self) -> int:
        """The first byte after the extent."""
        return self.start + self.size


class Extents(Generic[Owner]):
    """Allocates and frees ranges of bytes (extents) in a space of `capacity` bytes. The allocator keeps only numbers, and holds no memory.

    Each extent belongs to an owner, or is a hole (free).
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.free_bytes = 0
        self._by_start: dict[int, Extent[Owner]] = {}
        self._by_end: dict[int, Extent[Owner]] = {}
        self._holes: list[int] = []  # Starts, sorted.
        self._add(Extent(0, capacity, None))

    def __iter__(self) -> Iterator[Extent[Owner]]:
        """Yields all extents in the order of their addresses, holes (free ranges) included."""
        start = 0
        while start < self.capacity:
            extent = self._by_start[start]
            yield extent
            start = extent.end

    def allocate(self, size: int, owner: Owner) -> Extent[Owner] | None:
        """Allocates `size` bytes for an owner, at the front of the first hole that is large enough. Returns None when no hole is large
        enough.
        """
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
        """Frees an extent that has an owner: makes it a hole, and joins it with neighbouring holes."""
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
        """Returns the extents to free so that a hole of at least `size` bytes opens around `victim`; `victim` is one of them.

        The list starts with `victim` and grows over its neighbours, holes first. It never includes an extent for whose owner `movable` is
        false. Returns None when the list cannot grow to `size` bytes.
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
