"""`LeasedCall`: one call of a fetch on the local plane, that is, through shared memory.

The daemon leases records in its DRAM to the client, which copies them from shared memory. A lease is the right to read a record for a
limited time. Each record has a generation, a number that changes when the daemon overwrites the record.

    daemon: sends leases (ids, experts, offsets, generations, ...)
    client: copies each record, checks that its generation did not change meanwhile, gives the leases back
    daemon: sends more leases, or a header for an expert that needs no copy ... end

If a record's generation changed, the daemon has overwritten it: the copy is dropped, and another call asks for the expert again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ooc_moe_client.local.plane import LocalCall
from ooc_moe_client.remote.connection import Connection
from ooc_moe_client.remote.pending_experts import PendingExperts
from ooc_moe_client.store import Fetched
from ooc_moe_wire.codec import Checksums
from ooc_moe_wire.errors import DeadlineExceeded, Internal, Unavailable, error_named
from ooc_moe_wire.v1 import expert_pb2, local_pb2

# Leases go back when this many bytes were copied.
RELEASED_BYTES = 16 << 20

# id, expert, version, tier, offset, generation, checksums of both sections
_Lease = tuple[int, int, int, int, int, int, int, int]


class LeasedCall:
    """One call on the local plane (shared memory) that fetches the experts in `asked`. `PlaneCall` documents the methods.

    Attributes:
        num_overwritten: how many records the daemon overwrote before they were copied. Another call must fetch those experts.
    """

    def __init__(self, connection: Connection, call: LocalCall, pending: PendingExperts, asked: Sequence[int], *, verify: bool) -> None:
        self.num_overwritten = 0
        self._connection = connection
        self._call = call
        self._pending = pending
        self._asked = asked
        self._verify = verify
        self._copied: list[int] = []  # leases whose records were copied, to be given back

    def next(self) -> Iterator[Fetched] | tuple[Fetched] | None:
        """Waits for the next experts, and returns them. None: the call has ended. Contract: `PlaneCall.next`.

        The call is read to its end even when all experts have come, so that its session can be used again.
        """
        while True:
            try:
                answer = self._call.next()
            except (Unavailable, DeadlineExceeded) as error:
                raise self._connection.with_address(error) from error
            self._connection.note_alive()
            if answer is None:
                self._check_end()
                return None
            if answer.HasField("leases"):
                return self._copy_all(answer.leases)
            if (fetched := self._receive(answer.header)) is not None:
                return (fetched,)

    def cancel(self) -> None:
        """Ends the call, and all its leases. Contract: `PlaneCall.cancel`."""
        self._call.cancel()
        self._copied = []

    def _check_end(self) -> None:
        """Raises Internal when more experts are missing at the end of the call than were overwritten."""
        num_missing = sum(expert in self._pending.experts for expert in self._asked)
        if num_missing > self.num_overwritten:
            raise Internal(f"bank {self._pending.bank!r}: the call ended without {num_missing} of the experts")

    def _receive(self, header: expert_pb2.ExpertHeader) -> Fetched | None:
        """Processes the header of an expert that comes without a lease. Returns the expert if it is unchanged, None if it failed."""
        self._pending.check_wanted(header.expert)
        if header.HasField("error"):
            self._pending.fail(header.expert, error_named(header.error.kind, header.error.message))
            return None
        if not header.unchanged:
            raise Internal(f"{self._pending.what(header.expert)}: a header without a lease")
        return self._pending.arrive(header.expert, header.version, header.served_from, unchanged=True)

    def _copy_all(self, leases: local_pb2.Leases) -> Iterator[Fetched]:
        """Copies leased records one at a time, and yields each expert. Gives the leases back in groups."""
        # Slices of the message's columns are lists, which are walked faster.
        ids, sums = leases.ids[:], (leases.parameter_xxh3[:], leases.optimizer_xxh3[:])
        columns = leases.experts[:], leases.versions[:], leases.served_from[:], leases.offsets[:], leases.generations[:], *sums
        if any(len(column) != len(ids) for column in columns):
            raise Internal(f"bank {self._pending.bank!r}: leases with columns of different lengths")
        # They go back in four parts or more: a daemon with a small arena needs the room of some for the next leases.
        num_kept = max(1, min(RELEASED_BYTES // self._pending.num_bytes, len(ids) // 4))
        for lease in zip(ids, *columns, strict=True):
            lease_id, expert, version, tier, *_ = lease
            self._pending.check_wanted(expert)
            if not lease_id:
                if (unchanged := self._pending.arrive(expert, version, tier, unchanged=True)) is not None:
                    yield unchanged
                continue
            self._copied.append(lease_id)
            fetched = self._copy(lease)
            if len(self._copied) >= num_kept:
                self._release_copied()
            if fetched is not None:
                yield fetched
        self._release_copied()

    def _copy(self, lease: _Lease) -> Fetched | None:
        """Copies one leased record to the caller's memory. None: it was overwritten (and will be asked for again), or it failed a check."""
        _, expert, version, tier, offset, generation, *expected = lease
        arena, memory = self._call.plane.arena, self._pending.memory_for(expert)
        if self._verify:
            received = arena.copy_hashed(offset, generation, memory, self._pending.layout.parameter_bytes)
            is_whole = received is not None
        else:
            received, is_whole = None, arena.copy(offset, generation, memory)
        if not is_whole:
            self.num_overwritten += 1
            return None
        if received is not None and not self._pending.is_sound(expert, received, Checksums(*expected)):
            return None
        return self._pending.arrive(expert, version, tier)

    def _release_copied(self) -> None:
        if self._copied:
            self._call.release(self._copied)
        self._copied = []
