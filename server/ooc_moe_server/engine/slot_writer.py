"""Manages the slot of each push (the place of its record on the disk), until the committed record takes the slot over."""

from __future__ import annotations

from collections.abc import Callable

from ooc_moe_server.catalog.catalog import Record, Slot
from ooc_moe_server.engine.push import Push
from ooc_moe_server.engine.unsaved_records import UnsavedRecords
from ooc_moe_server.index.index_thread import IndexThread
from ooc_moe_server.nvme.reserve import is_disk_full
from ooc_moe_server.nvme.tier import NvmeTier


class SlotWriter:
    """Allocates the slots of pushes (places for one record on the disk), writes to these slots, and gives a slot up after a failed write.

    Keeps `Push.slot` up to date, and `Push.epoch`, the number of failed syncs before the last write.
    """

    def __init__(self, index: IndexThread, nvme: NvmeTier, unsaved: UnsavedRecords) -> None:
        self._index, self._nvme, self._unsaved = index, nvme, unsaved

    async def allocate(self, push: Push) -> None:
        """Allocates a slot (a place on the disk) for the record of a push. Raises TierFull, Internal, OSError."""
        await self._index.clear_quarantine()
        replaced = self._unsaved.indexed(push.bank, push.expert).slot
        push.slot = await self._nvme.allocate(push.bank.layout.record_bytes, replaced=replaced)

    async def write(self, push: Push, prepare: Callable[[], None] | None = None) -> None:
        """Runs `prepare`, and then writes the record of a push to the slot that the push holds.

        Raises:
            OSError: the write failed. The slot is then not used again in this run, unless the disk was full: then the push keeps it.
            Exception: whatever `prepare` raises.
        """
        assert push.slot is not None
        try:
            push.epoch = await self._nvme.write(push.slot, push.entry.record, prepare)
        except OSError as error:
            if not is_disk_full(error):
                self.condemn(push)
            raise

    def condemn(self, push: Push) -> None:
        """Gives up the slot of a push because its content is unknown. The slot is not used again in this run."""
        assert push.slot is not None
        slot, push.slot = push.slot, None
        self._nvme.condemn(slot)

    def hand_over(self, push: Push, replaced: Record) -> Slot:
        """Returns the slot of a push, for its committed record to refer to: the push itself gives the slot up.

        Releases the slot of `replaced`, the record of the expert that the index held before.
        """
        assert push.slot is not None
        slot, push.slot = push.slot, None
        if replaced.slot:
            self._nvme.let_go(replaced.slot)
        self._nvme.end_replacing(slot)
        return slot
