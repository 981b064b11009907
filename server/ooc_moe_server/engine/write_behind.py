"""What was acknowledged in memory and is not in the index yet: at most one record per expert, the newest.

    add -> saved (in the index, by its own round)
        -> replaced by a newer push of the expert, or dropped because its bank was restored or deleted

Each remembers what the index holds of its expert meanwhile, whose slot must stay as it is: a crash brings that record back. Event loop
only; knows nothing of how records are written.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from ooc_moe_server.catalog.catalog import Bank, Record


class Held(Protocol):
    """What an unsaved record is known by: the push that brought it."""

    bank: Bank
    expert: int
    version: int


Push = TypeVar("Push", bound=Held)


@dataclass(slots=True, eq=False)
class _Unsaved(Generic[Push]):
    push: Push
    indexed: Record


@dataclass(slots=True, eq=False)
class UnsavedRecords(Generic[Push]):
    """The pushes, by bank and expert. `num_bytes` counts what they hold in the arena, those replaced and still being written included."""

    capacity_bytes: int
    num_bytes: int = 0
    _newest: dict[tuple[Bank, int], _Unsaved[Push]] = field(default_factory=dict)

    def __contains__(self, push: Push) -> bool:
        """Whether it is still the newest, and unsaved."""
        held = self._newest.get((push.bank, push.expert))
        return held is not None and held.push is push

    def __iter__(self) -> Iterator[Push]:
        """All of them."""
        return (held.push for held in self._newest.values())

    def reserve(self, num_bytes: int) -> bool:
        """Counts bytes in, unless that exceeds the capacity."""
        if self.num_bytes + num_bytes > self.capacity_bytes:
            return False
        self.num_bytes += num_bytes
        return True

    def release(self, num_bytes: int) -> None:
        """Counts bytes out."""
        self.num_bytes -= num_bytes

    def indexed(self, bank: Bank, expert: int) -> Record:
        """What the index holds of an expert. Raises UnknownExpert, UnknownBank."""
        current = bank.record(expert)
        held = self._newest.get((bank, expert))
        return held.indexed if held else current

    def add(self, push: Push, indexed: Record) -> None:
        """`push` is the newest of its expert from now on."""
        self._newest[push.bank, push.expert] = _Unsaved(push, indexed)

    def set_indexed(self, push: Push, record: Record) -> Record:
        """The index took an older push than this one, the newest, and holds `record` now; returns what it held."""
        held = self._newest[push.bank, push.expert]
        former, held.indexed = held.indexed, record
        return former

    def newest(self, bank: Bank, expert: int) -> Push | None:
        """The unsaved push of an expert."""
        held = self._newest.get((bank, expert))
        return held.push if held else None

    def pop(self, bank: Bank, expert: int) -> Record | None:
        """Forgets the unsaved record of an expert; returns what the index held, None when there was none."""
        held = self._newest.pop((bank, expert), None)
        return held.indexed if held else None
