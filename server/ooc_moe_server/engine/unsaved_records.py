"""Keeps track of unsaved records: acknowledged in memory and not in the index yet. At most one per expert, the newest.

    add -> committed by a round
        -> replaced by a newer push of the expert, or dropped because the bank was restored or deleted

For each unsaved record, this module also remembers the older record of the expert that the index still holds. The slot of that record must
stay untouched, because a crash brings that record back.

To be used on the event loop only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field

from ooc_moe_server.catalog.catalog import Bank, Record
from ooc_moe_server.engine.push import Push, PushState
from ooc_moe_wire.errors import OocMoeError


def new_attempt() -> asyncio.Future[OocMoeError | None]:
    """Makes a future for the result of one try to write a record to the disk and commit it: None, or the error."""
    return asyncio.get_running_loop().create_future()


@dataclass(slots=True, kw_only=True, eq=False)
class UnsavedRecord:
    """The newest record of an expert, while it is acknowledged but in memory only, and the task that writes it to the disk."""

    push: Push  # The push that brought it.
    indexed: Record  # The record of the expert that the index holds meanwhile.
    task: asyncio.Task[None]  # Writes the record back.
    attempt: asyncio.Future[OocMoeError | None] = field(default_factory=new_attempt)  # The try under way, or the next one.
    retry_now: asyncio.Event = field(default_factory=asyncio.Event)  # Ends the delay before the next try.

    def abandon(self) -> None:
        """Stops the task that writes this record to the disk, because the record was replaced.

        If the task is writing or committing the record just now, it stops after that step; otherwise at once.
        """
        if self.push.state is PushState.UNSAVED:
            self.task.cancel()


@dataclass(slots=True, eq=False)
class UnsavedRecords:
    """Keeps all records that were acknowledged but are in memory only (unsaved), at most one per expert, and counts their bytes."""

    capacity_bytes: int
    num_bytes: int = 0  # What the pushes hold in the arena. Replaced records count until their write-back has ended.
    _newest: dict[tuple[Bank, int], UnsavedRecord] = field(default_factory=dict)

    def __contains__(self, push: Push) -> bool:
        """Whether the record of `push` is unsaved and still the newest of its expert."""
        unsaved = self._newest.get((push.bank, push.expert))
        return unsaved is not None and unsaved.push is push

    def __iter__(self) -> Iterator[UnsavedRecord]:
        """Yields all unsaved records."""
        return iter(self._newest.values())

    def reserve(self, num_bytes: int) -> bool:
        """Counts `num_bytes` for one more unsaved record. Returns False, and counts nothing, if all unsaved records together would then
        exceed the capacity.
        """
        if self.num_bytes + num_bytes > self.capacity_bytes:
            return False
        self.num_bytes += num_bytes
        return True

    def release(self, num_bytes: int) -> None:
        """Subtracts what `reserve` added to the count of bytes."""
        self.num_bytes -= num_bytes

    def indexed(self, bank: Bank, expert: int) -> Record:
        """Returns the record of an expert that the index holds, and that a crash would bring back. Raises UnknownExpert, UnknownBank."""
        current = bank.record(expert)
        unsaved = self._newest.get((bank, expert))
        return unsaved.indexed if unsaved else current

    def add(self, unsaved: UnsavedRecord) -> None:
        """Adds an unsaved record, in place of an older one of the same expert."""
        self._newest[unsaved.push.bank, unsaved.push.expert] = unsaved

    def newest(self, bank: Bank, expert: int) -> UnsavedRecord | None:
        """Returns the unsaved record of an expert, or None when the expert has none."""
        return self._newest.get((bank, expert))

    def pop(self, bank: Bank, expert: int) -> UnsavedRecord | None:
        """Removes and returns the unsaved record of an expert. Returns None when it has none."""
        return self._newest.pop((bank, expert), None)
