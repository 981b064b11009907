"""`Pusher`: sends the pushes of one store, to all its banks.

A `Pusher` keeps one `BankWriter` for each bank that is open for writing. It also remembers pushes whose answer never came, because such a
push may have been written. Then the next push of the expert from the same version would be refused as stale, although the caller did
nothing wrong. So before that next push, the pusher compares checksums to find out whether the daemon wrote the push whose answer was lost.
If so, it pushes from the version that this lost push made.
"""

from __future__ import annotations

import itertools
import threading
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field

from ooc_moe_client.remote.connection import Connection
from ooc_moe_client.remote.plane_choice import PlaneChoice
from ooc_moe_client.remote.push_stream import BankWriter, PendingPush
from ooc_moe_client.remote.read_floor import ReadFloor
from ooc_moe_client.store import Durability, Push
from ooc_moe_client.validation import checked_bodies
from ooc_moe_wire.codec import Checksums
from ooc_moe_wire.errors import OocMoeError, TierFull
from ooc_moe_wire.layout import Layout
from ooc_moe_wire.v1 import expert_pb2, expert_pb2_grpc


@dataclass(slots=True)
class _Unanswered:
    """Pushes of one expert from one base version, whose answers never came. Each of them may have been written."""

    base_version: int
    checksums: set[Checksums] = field(default_factory=set)


class Pusher:
    """Sends the pushes of one `RemoteStore` to its daemon, for any number of banks. Thread-safe.

    The daemon knows the pusher as one writer, by `writer_id`.
    """

    def __init__(self, connection: Connection, planes: PlaneChoice, read_floor: ReadFloor) -> None:
        self.writer_id = uuid.uuid4().hex
        self._connection = connection
        self._planes = planes
        self._read_floor = read_floor
        self._experts = expert_pb2_grpc.ExpertServiceStub(connection.channel)
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._writers: dict[str, BankWriter] = {}
        self._unanswered: dict[tuple[str, int], _Unanswered] = {}  # by bank and expert

    def push(self, bank: str, layout: Layout, pushes: Sequence[Push], durability: Durability) -> list[int | Exception]:
        """Writes experts to the daemon's store, and returns one outcome per push. Contract: `ExpertStore.push`."""
        bodies = checked_bodies(bank, layout, pushes)
        items = [
            PendingPush(
                expert=push.expert,
                base_version=self._base_version(bank, push),
                body=body,
                layout=layout,
                durability=durability,
            )
            for push, body in zip(pushes, bodies, strict=True)
        ]
        error: OocMoeError | None = None  # the outcome of pushes without an answer
        try:
            self._connection.retry(lambda: self._push_once(bank, items))
        except OocMoeError as raised:
            if all(item.outcome is None for item in items):
                raise
            error = raised
        finally:
            for push, item in zip(pushes, items, strict=True):
                self._remember_unanswered(bank, push, item)
        outcomes: list[int | Exception] = []
        for item in items:
            outcome = error if item.outcome is None else item.outcome
            assert outcome is not None
            if isinstance(outcome, int):
                self._read_floor.raise_to(bank, item.expert, outcome)
            outcomes.append(outcome)
        return outcomes

    def _push_once(self, bank: str, items: Sequence[PendingPush]) -> None:
        """Sends the pushes that have no outcome yet, and those refused with TierFull.

        Raises TierFull when one is refused again, for a retry.
        """
        unfinished = [item for item in items if item.outcome is None or isinstance(item.outcome, TierFull)]
        for item in unfinished:
            item.outcome = None
        self._writer(bank).push(unfinished)
        full = next((item.outcome for item in unfinished if isinstance(item.outcome, TierFull)), None)
        if full is not None:
            raise full

    def _base_version(self, bank: str, push: Push) -> int:
        """The version that this push is sent with: the caller's base version, except after a lost answer.

        If an earlier push from that base version was written although its answer was lost, returns the version that it made.
        """
        lost = self._unanswered.get((bank, push.expert))
        if lost is None or lost.base_version != push.base_version:
            return push.base_version
        request = expert_pb2.ListExpertsRequest(bank=bank, start=push.expert, page_size=1)
        present = self._connection.call(self._experts.ListExperts, request).experts[0]
        was_written = Checksums(present.parameter_xxh3, present.optimizer_xxh3) in lost.checksums
        return present.version if was_written else push.base_version

    def _remember_unanswered(self, bank: str, push: Push, item: PendingPush) -> None:
        key = (bank, push.expert)
        if isinstance(item.outcome, int):
            self._unanswered.pop(key, None)
        elif item.outcome is None and item.checksums is not None:
            lost = self._unanswered.get(key)
            if lost is None or lost.base_version != push.base_version:
                lost = self._unanswered[key] = _Unanswered(push.base_version)
            lost.checksums.add(item.checksums)

    def _writer(self, bank: str) -> BankWriter:
        with self._lock:
            writer = self._writers.get(bank)
            if writer is None or writer.ended:
                writer = self._writers[bank] = BankWriter(self._connection, self._planes, bank, self.writer_id, self._numbers)
            return writer

    def open_for_writing(self, bank: str) -> None:
        """Takes the sole right to write the bank. Contract: `ExpertStore.open_for_writing`."""
        self._writer(bank).wait_until_open()

    def release(self, bank: str) -> None:
        """Gives back the right to write the bank. Contract: `ExpertStore.release`."""
        with self._lock:
            writer = self._writers.pop(bank, None)
        if writer is not None:
            writer.release()

    def close(self) -> None:
        """Gives back the right to write every bank that is open."""
        for bank in list(self._writers):
            self.release(bank)
