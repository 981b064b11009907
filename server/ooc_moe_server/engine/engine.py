"""The store as one object, without gRPC: puts together the catalog, the index, the two tiers (DRAM and NVMe), and the parts that serve
fetches and pushes.

    fetch:  catalog -> DRAM, or else promotion from NVMe or from the seed -> DRAM
    push:   writer -> committer -> NVMe, index, catalog, DRAM

All parts run on one event loop. `Engine.open` reads the data directory; `Engine.close` writes to that directory the records that are only
in memory.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ooc_moe_server.catalog.catalog import Bank
from ooc_moe_server.dram.arena import Arena
from ooc_moe_server.dram.tier import DramTier
from ooc_moe_server.engine.catalog_changes import CatalogChanges
from ooc_moe_server.engine.committer import Committer
from ooc_moe_server.engine.fetch import Fetch
from ooc_moe_server.engine.promotions import Promotions
from ooc_moe_server.engine.writer import Staging, Writer
from ooc_moe_server.index.open_store import StoreFiles, open_files
from ooc_moe_server.nvme.tier import NvmeTier
from ooc_moe_server.stats import Scopes, Stats
from ooc_moe_wire.errors import InvalidRequest
from ooc_moe_wire.policy import make_policy
from ooc_moe_wire.rules import listed_checksums
from ooc_moe_wire.v1 import expert_pb2, stats_pb2

log = logging.getLogger(__name__)

PAGE_EXPERTS_MAX = 1000
# How long a call waits for pins to be released before it gets TierFull.
PATIENCE_S = 2.0


class Engine:
    """An open store: serves fetches, prefetches and pushes, and holds the parts that do the work. Call `Engine.open` to make one."""

    def __init__(
        self,
        data_dir: Path,
        arena: Arena,
        files: StoreFiles,
        index_executor: ThreadPoolExecutor,
        *,
        dram_policy: str,
        nvme_bytes: int | None,
        bank_bytes: int | None,
        patience_s: float,
    ) -> None:
        catalog, index = files.catalog, files.index
        self.catalog, self.stats, self.arena = catalog, Stats(), arena
        self.dram = DramTier(arena, make_policy(dram_policy))
        self.nvme = NvmeTier(data_dir / "slabs", catalog, on_free=self.dram.discard, quota_bytes=nvme_bytes)
        self.nvme.trim()
        self.committer = Committer(catalog, index, index_executor, self.dram, self.nvme, self.stats, bank_bytes=bank_bytes)
        self.promotions = Promotions(self.dram, self.nvme, self.stats, patience_s=patience_s)
        self.changes = CatalogChanges(catalog, self.committer, self.dram, self.nvme, manifests=files.manifests, reserve=files.reserve)
        self._index, self._index_executor, self._patience_s = index, index_executor, patience_s

    @staticmethod
    async def open(
        data_dir: Path,
        dram_bytes: int,
        *,
        dram_policy: str = "lru",
        nvme_bytes: int | None = None,
        bank_bytes: int | None = None,
        patience_s: float = PATIENCE_S,
    ) -> Engine:
        """Opens the store in `data_dir`, or creates it: allocates the memory of the DRAM tier, and reads the index.

        Args:
            data_dir: The data directory, which the caller must have locked.
            dram_bytes: The size of the DRAM tier.
            dram_policy: The eviction policy of the DRAM tier: "lru" or "s3fifo".
            nvme_bytes: The most bytes of all records in files; None: as much as the disk holds.
            bank_bytes: The most bytes of the records of one bank; None: no limit.
            patience_s: How long a call waits for room in DRAM before it gets TierFull.

        Raises:
            TierFull: there is not enough memory, or the disk is full.
            CorruptRecord: the index is damaged.
        """
        loop = asyncio.get_running_loop()
        index_executor = ThreadPoolExecutor(1, thread_name_prefix="index")
        arena = await loop.run_in_executor(None, Arena, dram_bytes)
        files = await loop.run_in_executor(index_executor, open_files, data_dir)
        engine = Engine(
            data_dir,
            arena,
            files,
            index_executor,
            dram_policy=dram_policy,
            nvme_bytes=nvme_bytes,
            bank_bytes=bank_bytes,
            patience_s=patience_s,
        )
        await loop.run_in_executor(index_executor, files.reserve.fill)
        log.info(
            "opened %d banks, %d snapshots; NVMe I/O is %s",
            len(engine.catalog.banks),
            len(engine.catalog.snapshots),
            "direct" if engine.nvme.direct else "buffered",
        )
        return engine

    async def close(self) -> None:
        """Finishes the pushes and changes under way, writes records that are only in memory to the disk, and closes the files."""
        await self.promotions.drain()
        await self.changes.drain()
        await self.committer.drain()
        await self.nvme.drain()
        await asyncio.get_running_loop().run_in_executor(self._index_executor, self._index.close)
        self._index_executor.shutdown()
        self.nvme.close()
        self.arena.close()

    def open_writer(self, bank: str, writer_id: str, scopes: Scopes, *, session: Staging | None = None) -> Writer:
        """Opens a bank for a stream of pushes by one writer. Until the returned `Writer` is closed, no other writer can push to the bank.

        Args:
            bank: The name of the bank.
            writer_id: The name of the writer.
            scopes: The counters that the pushes are added to.
            session: The local session of a caller on this host, in whose memory records may be staged; None: all records come in chunks.

        Raises:
            UnknownBank, NotTheWriter, InvalidRequest: the writer cannot be opened.
        """
        return Writer(
            self.catalog.bank(bank),
            writer_id,
            scopes,
            session=session,
            committer=self.committer,
            dram=self.dram,
            stats=self.stats,
            patience_s=self._patience_s,
        )

    def fetch(
        self, bank: Bank, experts: Sequence[int], *, known_versions: Sequence[int], demand: bool, section_bytes: int, scopes: Scopes
    ) -> Fetch:
        """Checks a fetch request and returns a `Fetch`, which loads and yields the records. Raises UnknownExpert, InvalidRequest.

        Args:
            bank: The bank of the experts.
            experts: The ids of the experts.
            known_versions: For each expert, the version that the caller holds already; empty when the caller holds none.
            demand: Whether the caller waits for the experts now; False for speculation.
            section_bytes: The bytes that are sent of each record, for the counters.
            scopes: The counters that the fetch is added to.
        """
        return Fetch(
            bank,
            experts,
            known_versions=known_versions,
            demand=demand,
            section_bytes=section_bytes,
            scopes=scopes,
            dram=self.dram,
            promotions=self.promotions,
            stats=self.stats,
        )

    def prefetch(
        self, bank: Bank, experts: Sequence[int], *, deadline_s: float | None, priority: int = 0, scopes: Scopes
    ) -> list[expert_pb2.PrefetchState.ValueType]:
        """Queues experts to be loaded into DRAM. Returns at once whether each expert is in DRAM already (resident), queued or rejected.

        Raises UnknownExpert.

        A prefetch that has not started after `deadline_s` seconds is dropped; None: the prefetch waits as long as needed. Higher priorities
        start first. `scopes`: the counters that the prefetches are added to.
        """
        bank.check(experts)
        scopes.count("prefetch_requested", len(experts))
        deadline = None if deadline_s is None else self.stats.clock() + deadline_s
        states = [self._prefetch(bank, expert, deadline, priority, scopes) for expert in experts]
        scopes.count("prefetch_rejected", states.count(expert_pb2.PREFETCH_REJECTED))
        return states

    def _prefetch(
        self, bank: Bank, expert: int, deadline: float | None, priority: int, scopes: Scopes
    ) -> expert_pb2.PrefetchState.ValueType:
        record = bank.record(expert)
        if self.dram.touch(bank.source(expert, record)):
            return expert_pb2.PREFETCH_RESIDENT
        has_room = self.dram.speculative_bytes >= bank.layout.record_bytes
        if has_room and self.promotions.prefetch(bank, expert, record, scopes, deadline, priority):
            return expert_pb2.PREFETCH_QUEUED
        return expert_pb2.PREFETCH_REJECTED

    def list_experts(self, bank: Bank, start: int, page_size: int) -> expert_pb2.ListExpertsResponse:
        """Returns a page of the experts of a bank, from id `start` on. Raises InvalidRequest for a page of more than 1000 experts."""
        if page_size > PAGE_EXPERTS_MAX:
            raise InvalidRequest(f"page_size: {page_size} is more than {PAGE_EXPERTS_MAX}")
        end = min(start + (page_size or PAGE_EXPERTS_MAX), bank.num_experts)
        return expert_pb2.ListExpertsResponse(
            experts=[self._expert_info(bank, expert) for expert in range(start, end)], next_start=end if end < bank.num_experts else 0
        )

    def _expert_info(self, bank: Bank, expert: int) -> expert_pb2.ExpertInfo:
        record = bank.record(expert)
        in_dram = [expert_pb2.TIER_DRAM] if self.dram.holds(bank.source(expert, record)) else []
        on_disk = [expert_pb2.TIER_NVME] if record.slot else []
        checksums = listed_checksums(record.checksums)
        return expert_pb2.ExpertInfo(
            expert=expert,
            version=record.version,
            tiers=in_dram + on_disk or [expert_pb2.TIER_SEED],
            record_bytes=bank.layout.record_bytes,
            parameter_xxh3=checksums.parameters,
            optimizer_xxh3=checksums.optimizer,
        )

    def snapshot_stats(self) -> stats_pb2.Stats:
        """Returns the counters of the store as of now. The caller adds what only the daemon knows, such as its version."""
        banks = [
            stats_pb2.BankStats(
                bank=bank.name,
                access=bank.access,
                dram_records=self.dram.records_by_bank[bank.id],
                nvme_bytes=bank.num_written * bank.layout.record_bytes,
                writer_id=bank.writer.writer_id if bank.writer else "",
            )
            for _, bank in sorted(self.catalog.banks.items())
        ]
        self.dram.stats.dirty_bytes = self.committer.unsaved_bytes
        return stats_pb2.Stats(
            uptime_s=self.stats.uptime_s,
            total=self.stats.total,
            dram=self.dram.snapshot_stats(),
            nvme=self.nvme.snapshot_stats(),
            banks=banks,
            trainers=self.stats.trainers(),
            latency=self.stats.latency(),
            queues=stats_pb2.Queues(
                demand_reads=self.promotions.num_demand,
                prefetch_reads=self.promotions.num_prefetch,
                pushes=self.committer.num_in_flight,
            ),
        )
