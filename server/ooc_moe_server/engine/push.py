"""One write of one expert on its way from a trainer to the disk: what the committer carries."""

import asyncio
from dataclasses import dataclass, field

import numpy as np

from ooc_moe_server.catalog.catalog import Bank, Record, Slot
from ooc_moe_server.dram.tier import Entry
from ooc_moe_wire.codec import Checksums, RecordHeader, compare, copy_hashed, verify
from ooc_moe_wire.errors import OocMoeError
from ooc_moe_wire.rules import check_base_version


def future() -> asyncio.Future[OocMoeError | None]:
    """Of the end of one step."""
    return asyncio.get_running_loop().create_future()


@dataclass(slots=True, kw_only=True, eq=False)
class Push:
    """One write on its way. `outcome` becomes the version, or the error that refused it."""

    bank: Bank
    expert: int
    base_version: int
    writer_id: str
    push_number: int
    checksums: Checksums
    entry: Entry  # Filled by the receiver, or from `staged`; the receiver's pin passes to `submit`.
    staged: memoryview | None = None
    in_memory: bool = False  # To be acknowledged before it is on the disk.
    version: int = 0
    slot: Slot | None = None  # Taken for it; None again once a record refers to it.
    epoch: int = 0  # Of the slab when the write began.
    durable: bool = False
    outcome: asyncio.Future[int | OocMoeError] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    in_round: asyncio.Future[OocMoeError | None] = field(default_factory=future)  # The round's answer; a new one for each try.
    tried: asyncio.Future[OocMoeError | None] = field(default_factory=future)  # The end of a try to write it back, likewise.
    hurry: asyncio.Event = field(default_factory=asyncio.Event)  # Ends the wait before the next try.
    task: asyncio.Task[None] | None = None  # That carries it.
    is_waiting: bool = False  # For its turn to be written back: nothing of it is under way.

    @property
    def name(self) -> str:
        """For messages."""
        return f"bank {self.bank.name!r}, expert {self.expert}, push {self.push_number}"

    @property
    def acknowledged(self) -> bool:
        """Whether it was acknowledged in memory."""
        return self.in_memory and self.outcome.done()

    def record(self) -> Record:
        """What becomes current."""
        return Record(
            version=self.version, slot=self.slot, checksums=self.checksums, writer_id=self.writer_id, push_number=self.push_number
        )

    def header(self) -> RecordHeader:
        """The header block's content."""
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
        """Brings staged bytes over and checks what lies in the arena, where nobody else can change it; any thread. Raises CorruptRecord."""
        layout = self.bank.layout
        if self.staged is None:
            verify(layout, self.entry.body, self.checksums, what=self.name)
        else:
            source, body = np.frombuffer(self.staged, np.uint8), np.frombuffer(self.entry.body, np.uint8)
            self.staged = None
            compare(copy_hashed(source, body, layout.parameter_bytes), self.checksums, whole=layout.optimizer_bytes > 0, what=self.name)

    def verify_and_pack(self) -> None:
        """As `verify`, and writes the header block."""
        self.verify()
        self.header().pack_into(self.entry.record)


def check_base(bank: Bank, expert: int, base: int) -> None:
    """Refuses an update that started from another version than the current one.

    Raises:
        StaleVersion: there is a newer one.
        LostUpdate: there is only an older one: a crash took what was acknowledged in memory.
        UnknownExpert, UnknownBank: there is none.
    """
    check_base_version(bank.name, expert, base_version=base, current=bank.record(expert).version)
