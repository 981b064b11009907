"""One push of one expert, and the states it passes through on its way to the disk.

    DURABLE   RECEIVED -> WRITING -> IN_ROUND -> COMMITTED
              RECEIVED, WRITING, IN_ROUND -> REFUSED

    MEMORY    RECEIVED -> UNSAVED -> WRITING_BACK -> SAVING -> COMMITTED
              RECEIVED -> REFUSED
              WRITING_BACK, SAVING -> UNSAVED             a try failed; the next one follows
              UNSAVED, WRITING_BACK, SAVING -> DROPPED    a newer record replaced it, or the daemon ended

In WRITING and WRITING_BACK the record is written to a slot on the disk. In IN_ROUND and SAVING it waits for its commit round, in which
several records are synced and entered in the index together.

A push with durability DURABLE is acknowledged on COMMITTED. A push with durability MEMORY is acknowledged on UNSAVED: it is visible from
then on, and a crash loses it until it is COMMITTED. `Push.enter` is the only place where the state changes, and asserts these arrows.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from enum import Enum, auto

import numpy as np

from ooc_moe_server.catalog.catalog import Bank, Record, Slot
from ooc_moe_server.dram.tier import Entry
from ooc_moe_wire.codec import Checksums, RecordHeader, compare, copy_hashed, verify
from ooc_moe_wire.errors import OocMoeError


class PushState(Enum):
    """How far a push has come. The docstring of the module push.py draws which state may follow which.

    RECEIVED        all bytes have arrived, and are verified
    WRITING         the record is being written to its slot on the disk
    IN_ROUND        the record is written, and waits for the round that commits it
    UNSAVED         acknowledged while only in memory; waits to be written
    WRITING_BACK    as WRITING, after the acknowledgement
    SAVING          as IN_ROUND, after the acknowledgement
    COMMITTED       the record is in the index; final
    REFUSED         the push failed, and nothing of it became visible; final
    DROPPED         acknowledged and never committed, because a newer record replaced it or the daemon ended; final
    """

    RECEIVED = auto()  # All bytes have arrived. They are verified; a slot and a version are taken.
    WRITING = auto()  # The record is written to its slot.
    IN_ROUND = auto()  # The record waits for a commit round, or the round is under way.
    UNSAVED = auto()  # Acknowledged and visible. The push waits for its turn to be written: no step of it is under way.
    WRITING_BACK = auto()  # As WRITING, after the acknowledgement.
    SAVING = auto()  # As IN_ROUND, after the acknowledgement.
    COMMITTED = auto()  # The record is in the index.
    REFUSED = auto()  # Nothing of the push became visible.
    DROPPED = auto()  # Acknowledged and never committed: a newer record replaced it first, or the daemon ended and could not write it.


_NEXT_STATES = {
    PushState.RECEIVED: {PushState.WRITING, PushState.UNSAVED, PushState.REFUSED},
    PushState.WRITING: {PushState.IN_ROUND, PushState.REFUSED},
    PushState.IN_ROUND: {PushState.COMMITTED, PushState.REFUSED},
    PushState.UNSAVED: {PushState.WRITING_BACK, PushState.DROPPED},
    PushState.WRITING_BACK: {PushState.SAVING, PushState.UNSAVED, PushState.DROPPED},
    PushState.SAVING: {PushState.COMMITTED, PushState.UNSAVED, PushState.DROPPED},
    PushState.COMMITTED: set(),
    PushState.REFUSED: set(),
    PushState.DROPPED: set(),
}
_ACKNOWLEDGED_UNSAVED = {PushState.UNSAVED, PushState.WRITING_BACK, PushState.SAVING}


@dataclass(slots=True, kw_only=True, eq=False)
class Push:
    """One push of one expert that is under way: its record, its state, and its slot on the disk.

    `outcome` becomes the new version, or the error that refused the push.
    """

    bank: Bank
    expert: int
    base_version: int
    writer_id: str
    push_number: int
    checksums: Checksums
    entry: Entry  # Filled by the receiver, or from `staged`. `Committer.submit` takes over the receiver's pin.
    staged: memoryview | None = None  # The sender's memory; None once its bytes are copied into `entry`.
    in_memory: bool = False  # The sender asked for an acknowledgement before the record is on the disk.
    state: PushState = PushState.RECEIVED
    version: int = 0  # 0 until one is taken.
    slot: Slot | None = None  # The slot that this push holds; None before it is taken, and once a record refers to it.
    epoch: int = 0  # The slab's epoch when the last write of this record began.
    outcome: asyncio.Future[int | OocMoeError] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    @property
    def name(self) -> str:
        """The text by which messages name this push: its bank, its expert and its number."""
        return f"bank {self.bank.name!r}, expert {self.expert}, push {self.push_number}"

    @property
    def is_durable(self) -> bool:
        """Whether the pushed record is in the index, so that it survives a crash."""
        return self.state is PushState.COMMITTED

    @property
    def is_acknowledged_unsaved(self) -> bool:
        """Whether the push was acknowledged while its record is only in memory, and is not in the index yet."""
        return self.state in _ACKNOWLEDGED_UNSAVED

    def enter(self, state: PushState) -> None:
        """Moves the push to `state`. The first time that `state` is UNSAVED or COMMITTED, `outcome` becomes the new version."""
        assert state in _NEXT_STATES[self.state], f"{self.name}: {self.state.name} -> {state.name}"
        self.state = state
        if state in (PushState.UNSAVED, PushState.COMMITTED) and not self.outcome.done():
            self._resolve(self.version)

    def refuse(self, error: OocMoeError) -> None:
        """Ends the push in the state REFUSED, with an error as its outcome."""
        self.enter(PushState.REFUSED)
        self._resolve(error)

    def record(self) -> Record:
        """Returns the record that becomes the expert's current one when the push is committed."""
        return Record(
            version=self.version, slot=self.slot, checksums=self.checksums, writer_id=self.writer_id, push_number=self.push_number
        )

    def header(self) -> RecordHeader:
        """Returns the content of the record's header block."""
        return RecordHeader(
            bank_id=self.bank.uuid,
            expert=self.expert,
            version=self.version,
            parameter_bytes=self.bank.layout.parameter_bytes,
            optimizer_bytes=self.bank.layout.optimizer_bytes,
            checksums=self.checksums,
            writer_id=self.writer_id,
            push_number=self.push_number,
            base_version=self.base_version,
        )

    def verify(self) -> None:
        """Compares the record in the arena with its checksums. Bytes that the sender staged in its own memory are first copied into the
        arena.

        May run on any thread.

        Raises:
            CorruptRecord: the checksums do not match.
        """
        layout = self.bank.layout
        if self.staged is None:
            verify(layout, self.entry.body, self.checksums, what=self.name)
        else:
            source, body = np.frombuffer(self.staged, np.uint8), np.frombuffer(self.entry.body, np.uint8)
            self.staged = None
            compare(copy_hashed(source, body, layout.parameter_bytes), self.checksums, whole=layout.optimizer_bytes > 0, what=self.name)

    def verify_and_pack(self) -> None:
        """Verifies the bytes as `verify` does, and writes the record's header block in front of them."""
        self.verify()
        self.header().pack_into(self.entry.record)

    def _resolve(self, outcome: int | OocMoeError) -> None:
        del self.bank.pushing[self.expert]
        self.outcome.set_result(outcome)
