"""Which resident leaves first: the eviction policies that the daemon's DRAM tier and the trainer's HBM cache share.

A policy orders keys and owns nothing else: pins, dirty bits and room are its caller's.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator
from typing import Generic, Protocol, TypeVar

Key = TypeVar("Key", bound=Hashable)


class EvictionPolicy(Protocol[Key]):
    """The order in which residents leave."""

    def insert(self, key: Key) -> None:
        """A key becomes resident."""

    def touch(self, key: Key) -> None:
        """A resident key was used."""

    def remove(self, key: Key) -> None:
        """A key is resident no longer."""

    def victims(self) -> Iterator[Key]:
        """Residents, the next to leave first. The caller skips what is pinned, and removes nothing while it iterates."""


class LRU(Generic[Key]):
    """The least recently used leaves first."""

    def __init__(self) -> None:
        self._order: OrderedDict[Key, None] = OrderedDict()

    def insert(self, key: Key) -> None:
        """Enters as the most recently used."""
        self._order[key] = None

    def touch(self, key: Key) -> None:
        """Becomes the most recently used."""
        self._order.move_to_end(key)

    def remove(self, key: Key) -> None:
        """Forgets the key."""
        del self._order[key]

    def victims(self) -> Iterator[Key]:
        """From the least to the most recently used."""
        return iter(self._order)
