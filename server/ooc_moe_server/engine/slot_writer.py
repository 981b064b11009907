"""The slot of a push (its place on the disk): allocated, written, given up after a failed write, and handed to the committed record."""

from __future__ import annotations

from collections.abc import Callable

from ooc_moe_server.catalog.catalog import Record, Slot
from ooc_moe_server.engine.push import Push
from ooc_moe_server.engine.unsaved_records import UnsavedRecords
from ooc_moe_server.index.index_thread import IndexThread
from ooc_moe_server.nvme.reserve import is_disk_full
from ooc_moe_server.nvme.tier import NvmeTier


class SlotWriter:
    """Allocates, writes and gives up the slots of pushes, and keeps `Push.slot` and `Push.epoch` up to date.

    A slot is the place of one record on the disk.
    """

    def __init__(self, index: IndexThread, nvme: NvmeTier, unsaved: UnsavedRecords) -> None:
        self._index, self._nvme, self._unsaved = index, nvme, unsaved

    async def allocate(self, push: Push) -> None:
        """Allocates a slot (a place on the disk) for the record of a push. Raises TierFull, Internal, OSError."""
        await self._index.clear_quarantine()
        replaced = self._unsaved.indexed(push.bank, push.expert).slot
        push.slot = await self._nvme.allocate(push.bank.layout.record_bytes, replaced=replaced)

    async def write(self, push: Push, prepare: Callable[[], None] | None = None) -> None:
        """Runs `prepare`, and then writes the record to the slot of the push.

        Raises:
            OSError: the write failed. Unless the disk is full, the slot is then given up.
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
        """Hands the slot of a push over to its committed record. Releases the slot of `replaced`, the record that the index held before.

        Returns the slot that was handed over.
        """
        assert push.slot is not None
        slot, push.slot = push.slot, None
        if replaced.slot:
            self._nvme.let_go(replaced.slot)
        self._nvme.end_replacing(slot)
        return slot
