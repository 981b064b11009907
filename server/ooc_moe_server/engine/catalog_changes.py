"""Changes of banks and snapshots: create, grow, delete and fork a bank; create, restore and delete a snapshot.

    one index transaction, between two commit rounds -> the manifests -> visible in the catalog, acknowledged

A change is completed even when the caller hangs up. A fork, a snapshot or a restore copies no bytes: its records share slots with the
original ones.

The index transaction decides whether the change happens. If the manifests (JSON copies of the index) cannot be written after it, the change
stands, but the caller gets an error. Until these manifests are written, no other change that adds something begins.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from ooc_moe_server.catalog.catalog import UNWRITTEN, Bank, BankState, Catalog, Record, Snapshot, unix_ms
from ooc_moe_server.dram.tier import DramTier
from ooc_moe_server.engine.committer import Committer
from ooc_moe_server.index.database import Index
from ooc_moe_server.index.manifests import Manifests
from ooc_moe_server.index.tables import Write
from ooc_moe_server.nvme.reserve import Reserve
from ooc_moe_server.nvme.tier import NvmeTier
from ooc_moe_wire.errors import InvalidRequest
from ooc_moe_wire.layout import BankSpec
from ooc_moe_wire.rules import (
    check_new_name,
    check_same_bank,
    check_same_snapshot,
    check_snapshot_banks,
    check_snapshot_name,
    check_writer,
    forked_records,
    grown,
    restored_records,
    snapshot_id_and_name,
    snapshot_part,
)

log = logging.getLogger(__name__)
Result = TypeVar("Result")


class CatalogChanges:
    """Creates, grows, forks and deletes banks, and takes, restores and deletes snapshots.

    Each change is one transaction of the index (the SQLite file). Then the manifests (JSON copies of the index) and the catalog in memory
    follow.
    """

    def __init__(
        self, catalog: Catalog, committer: Committer, dram: DramTier, nvme: NvmeTier, *, manifests: Manifests, reserve: Reserve
    ) -> None:
        self._catalog, self._committer, self._dram, self._nvme = catalog, committer, dram, nvme
        self._manifests, self._reserve = manifests, reserve
        self._released: list[Record] = []  # Deleted records, whose slots must stay until no manifest names them.
        self._tasks: set[asyncio.Task[Any]] = set()

    async def create_bank(self, spec: BankSpec) -> Bank:
        """Creates a bank, or returns the existing one if its spec is equal.

        Raises:
            BankExists: a bank of this name has another spec.
            InvalidRequest: a record of the bank is larger than the DRAM tier.
        """
        return await self._to_the_end(self._create_bank(spec))

    async def grow_bank(self, name: str, num_experts: int) -> Bank:
        """Raises the number of experts of bank `name` to at least `num_experts`. Raises UnknownBank, InvalidRequest."""
        return await self._to_the_end(self._grow_bank(name, num_experts))

    async def delete_bank(self, name: str) -> None:
        """Removes a bank and its part of every snapshot. Raises UnknownBank, NotTheWriter (a writer has it open)."""
        await self._to_the_end(self._delete_bank(name))

    async def fork_bank(self, source: str, name: str, snapshot_id: int) -> Bank:
        """Creates bank `name` with the experts of bank `source`, as they were in a snapshot, or as they are now if `snapshot_id` is 0.

        Raises BankExists, UnknownBank, UnknownSnapshot.
        """
        return await self._to_the_end(self._fork_bank(source, name, snapshot_id))

    async def create_snapshot(self, names: Sequence[str], name: str) -> Snapshot:
        """Takes a snapshot of the banks `names`, all as of one moment. Records that are only in memory are written to the disk first.

        `name`: the name of the snapshot. Raises UnknownBank, SnapshotExists, InvalidRequest.
        """
        return await self._to_the_end(self._create_snapshot(names, name))

    async def restore_snapshot(self, snapshot_id: int, writer_id: str) -> Snapshot:
        """Sets every expert of a snapshot's banks back to the record that it had in the snapshot, under a new version.

        Experts that the snapshot lacks get their initial values. `writer_id`: the writer that asks for the change; no other writer may have
        one of the banks open. Raises UnknownSnapshot, NotTheWriter.
        """
        return await self._to_the_end(self._restore_snapshot(snapshot_id, writer_id))

    async def delete_snapshot(self, snapshot_id: int) -> None:
        """Removes a snapshot. Disk space that only its records used becomes free. Raises UnknownSnapshot."""
        await self._to_the_end(self._delete_snapshot(snapshot_id))

    async def drain(self) -> None:
        """Waits until no change of banks or snapshots is running."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def _to_the_end(self, change: Coroutine[Any, Any, Result]) -> Result:
        """Runs a change in a task of its own, so that a caller who hangs up does not stop it between index and catalog.

        Returns its result.
        """
        task = asyncio.create_task(self._exclusively(change))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return await asyncio.shield(task)

    async def _exclusively(self, change: Coroutine[Any, Any, Result]) -> Result:
        async with self._committer.exclusive():
            return await change

    async def _create_bank(self, spec: BankSpec) -> Bank:
        if spec.name in self._catalog.banks:
            bank = self._catalog.banks[spec.name]
            check_same_bank(bank.spec, spec)
            await self._write_owed_manifests()
            return bank
        capacity = self._dram.stats.capacity_bytes
        if spec.layout.record_bytes > capacity:
            raise InvalidRequest(
                f"bank {spec.name!r}: a record of {spec.layout.record_bytes} bytes exceeds the DRAM tier of {capacity} bytes"
            )
        return await self._add_bank(_new_bank(spec))

    async def _grow_bank(self, name: str, num_experts: int) -> Bank:
        bank = self._catalog.bank(name)
        num_experts = grown(replace(bank.spec, num_experts=bank.num_experts), num_experts).num_experts
        if num_experts > bank.num_experts:
            await self._add_to_index(lambda index: index.grow_bank(bank.id, num_experts))
            try:
                await self._write_manifests(banks=[bank])
            finally:
                bank.num_experts = num_experts
            log.info("bank %r grown to %d experts", name, num_experts)
        else:
            await self._write_owed_manifests()
        return bank

    async def _delete_bank(self, name: str) -> None:
        bank = self._catalog.bank(name)
        check_writer(name, bank.writer_id)
        snapshots = [snapshot for snapshot in self._catalog.snapshots.values() if bank.id in snapshot.banks]
        await self._remove_from_index(lambda index: index.delete_bank(bank.id))
        try:
            await self._write_manifests(banks=[bank], snapshots=snapshots)
        finally:
            bank.deleted = True
            del self._catalog.banks[name]
            released = list(bank.records.values())
            for snapshot in snapshots:
                released += snapshot.banks.pop(bank.id).records.values()
                if not snapshot.banks:
                    del self._catalog.snapshots[snapshot.id]
            self._release(released)
        self._dram.discard_seeds(bank.id)
        log.info("bank %r deleted", name)

    async def _fork_bank(self, source: str, name: str, snapshot_id: int) -> Bank:
        origin = self._catalog.bank(source)
        check_new_name(name, self._catalog.banks)
        await self._committer.write_back([origin])
        state = self._state(origin, snapshot_id)
        bank = _new_bank(replace(origin.spec, name=name, num_experts=state.num_experts))
        bank.forked_from = source
        for expert, record in forked_records(state.records).items():
            bank.put(expert, self._renewed(record))
        return await self._add_bank(bank)

    async def _create_snapshot(self, names: Sequence[str], name: str) -> Snapshot:
        check_snapshot_banks(names)
        check_snapshot_name(name)
        banks = [self._catalog.bank(bank) for bank in names]
        known = {snapshot.name: snapshot for snapshot in self._catalog.snapshots.values()}
        if name in known:
            check_same_snapshot(name, known[name].banks, [bank.id for bank in banks])
            await self._write_owed_manifests()
            return known[name]
        await self._committer.write_back(banks)
        snapshot_id, name = snapshot_id_and_name(name, self._catalog.next_snapshot_id, known)
        states = {bank.id: BankState(num_experts=bank.num_experts, records=dict(bank.records)) for bank in banks}
        snapshot = Snapshot(id=snapshot_id, name=name, created_unix_ms=unix_ms(), banks=states)
        await self._add_to_index(lambda index: index.create_snapshot(snapshot))
        try:
            await self._write_manifests(snapshots=[snapshot])
        finally:
            self._catalog.next_snapshot_id = snapshot_id + 1
            self._catalog.snapshots[snapshot_id] = snapshot
            self._hold(record for state in states.values() for record in state.records.values())
        log.info("snapshot %d %r taken of %s", snapshot_id, snapshot.name, ", ".join(names))
        return snapshot

    async def _restore_snapshot(self, snapshot_id: int, writer_id: str) -> Snapshot:
        snapshot = self._catalog.snapshot(snapshot_id)
        banks = {self._catalog.bank_by_id(bank_id): state for bank_id, state in snapshot.banks.items()}
        for bank in banks:
            check_writer(bank.name, bank.writer_id, writer_id)
        restored = [
            (bank, expert, self._renewed(record))
            for bank, state in banks.items()
            for expert, record in restored_records(bank.records.keys() | bank.pushing.keys(), state.records, UNWRITTEN).items()
        ]
        writes = [Write(bank_id=bank.id, expert=expert, record=record) for bank, expert, record in restored]
        # What older versions are on the disk is no candidate of a rebuild any more; versions taken from here on may still be committed.
        next_version = self._catalog.next_version
        await self._add_to_index(lambda index: index.restore_banks([bank.id for bank in banks], writes, next_version))
        try:
            await self._write_manifests(banks=banks)
        finally:
            self._hold(record for _, _, record in restored)
            self._let_go([bank.put(expert, record) for bank, expert, record in restored])
        log.info("snapshot %d %r restored", snapshot_id, snapshot.name)
        return snapshot

    async def _delete_snapshot(self, snapshot_id: int) -> None:
        snapshot = self._catalog.snapshot(snapshot_id)
        await self._remove_from_index(lambda index: index.delete_snapshot(snapshot_id))
        try:
            await self._write_manifests(snapshots=[snapshot])
        finally:
            del self._catalog.snapshots[snapshot_id]
            self._release([record for state in snapshot.banks.values() for record in state.records.values()])
        log.info("snapshot %d %r deleted", snapshot_id, snapshot.name)

    async def _add_bank(self, bank: Bank) -> Bank:
        next_version = self._catalog.next_version
        bank.id = await self._add_to_index(lambda index: index.create_bank(bank, next_version))
        try:
            await self._write_manifests(banks=[bank])
        finally:
            self._catalog.banks[bank.name] = bank
            self._hold(bank.records.values())
        log.info("bank %r created: %d experts of %d bytes", bank.name, bank.num_experts, bank.layout.record_bytes)
        return bank

    async def _add_to_index(self, work: Callable[[Index], Result]) -> Result:
        """Runs `work`, an index transaction that needs disk space, after writing the manifests that are out of date.

        Raises TierFull if the disk is too full to fill the file RESERVE, which keeps disk space for deletions.
        """
        await self._write_owed_manifests()

        def add(index: Index) -> Result:
            self._reserve.require()
            return work(index)

        return await self._committer.on_index(add)

    async def _remove_from_index(self, work: Callable[[Index], None]) -> None:
        """Runs `work`, an index transaction that frees disk space. On a full disk it uses the space that the file RESERVE keeps."""
        await self._committer.on_index(lambda index: self._reserve.run(lambda: work(index)))

    async def _write_manifests(self, *, banks: Iterable[Bank] = (), snapshots: Iterable[Snapshot] = ()) -> None:
        """Writes the manifests of changed banks and snapshots. Raises TierFull, Internal; they then stay marked as out of date."""
        for bank in banks:
            self._manifests.owe_bank(bank.uuid)
        for snapshot in snapshots:
            self._manifests.owe_snapshot(snapshot.id)
        await self._write_owed_manifests()

    async def _write_owed_manifests(self) -> None:
        """Writes the manifests that are out of date, if any, and then releases the slots of deleted records. Raises TierFull, Internal."""
        if self._manifests.is_owing:
            await self._committer.on_index(lambda index: self._reserve.run(lambda: self._manifests.write_owed(index)))
        released, self._released = self._released, []
        self._let_go(released)

    def _release(self, records: Iterable[Record]) -> None:
        """Releases the slots of deleted records, but only when no manifest names them any more.

        Otherwise a rebuild could find other records in these slots.
        """
        if self._manifests.is_owing:
            self._released += records
        else:
            self._let_go(records)

    def _state(self, bank: Bank, snapshot_id: int) -> BankState:
        if not snapshot_id:
            return BankState(num_experts=bank.num_experts, records=bank.records)
        parts = self._catalog.snapshot(snapshot_id).banks
        return snapshot_part(parts, bank.id, snapshot_id=snapshot_id, bank_name=bank.name)

    def _renewed(self, record: Record) -> Record:
        """Returns a record with the same bytes and a new version number.

        It names no writer and no push, so that no later push is mistaken for a repeat of the one that wrote these bytes.
        """
        return Record(version=self._catalog.take_version(), slot=record.slot, checksums=record.checksums)

    def _hold(self, records: Iterable[Record]) -> None:
        for record in records:
            if record.slot:
                self._nvme.hold(record.slot)

    def _let_go(self, records: Iterable[Record]) -> None:
        for record in records:
            if record.slot:
                self._nvme.let_go(record.slot)


def _new_bank(spec: BankSpec) -> Bank:
    return Bank(id=0, uuid=uuid.uuid4().bytes, spec=spec, num_experts=spec.num_experts, created_unix_ms=unix_ms(), forked_from="")
