"""Who owns which bytes of the arena: a first-fit allocator over extents in address order.

Free neighbours coalesce, so the extents always tile the whole space and no two holes touch. Pure bookkeeping: it holds no memory, and knows
nothing of records or policies beyond the caller's word on which owners may be moved out.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

Owner = TypeVar("Owner")


@dataclass(slots=True, eq=False)
class Extent(Generic[Owner]):
    """A run of bytes; a hole when nobody owns it."""

    start: int
    size: int
    owner: Owner | None

    @property
    def end(self) -> int:
        """The first byte past it."""
        return self.start + self.size


class Extents(Generic[Owner]):
    """Divides `capacity` bytes."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.free_bytes = 0
        self._by_start: dict[int, Extent[Owner]] = {}
        self._by_end: dict[int, Extent[Owner]] = {}
        self._holes: list[int] = []  # Starts, sorted.
        self._add(Extent(0, capacity, None))

    def __iter__(self) -> Iterator[Extent[Owner]]:
        """All extents, holes too, in address order."""
        start = 0
        while start < self.capacity:
            extent = self._by_start[start]
            yield extent
            start = extent.end

    def allocate(self, size: int, owner: Owner) -> Extent[Owner] | None:
        """Gives the front of the first hole that holds `size` bytes, or None when no hole does."""
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
        """Turns an owned extent into a hole, joined with the holes beside it."""
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
        """The owned extents to free so that a hole of `size` bytes opens around `victim`.

        The window grows over neighbours, holes before owned ones, and stops at what is not movable; None when it cannot grow to `size`.
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
