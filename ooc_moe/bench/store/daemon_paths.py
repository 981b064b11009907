"""Our own benchmark cases of the store benchmark: fetches from and pushes to a real daemon, on each data plane (shared memory, gRPC).

Each measured fetch is meant to read from one tier, DRAM or NVMe. The daemon reports for each expert in which tier it found the expert, and
the fetch raises WrongBytes if that is not the tier meant.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ooc_moe.bench.harness import TimedPath, WrongBytes
from ooc_moe.bench.store.records import Records
from ooc_moe.session.daemon import embedded_daemon
from ooc_moe_client.remote.store import RemoteStore
from ooc_moe_client.store import Plane, Push, Tier
from ooc_moe_wire.layout import BLOCK_BYTES, BankSpec, Layout

BANK, FILLER = "bench", "bench-filler"
# Room in the daemon's arena beyond the records themselves, for pushes and reads in flight.
SPARE_RECORDS = 16


class BenchDaemon:
    """A running daemon that has a bank for the benchmark's records; `tcp` and `unix` are its addresses."""

    def __init__(self, tcp: str, unix: str) -> None:
        self.tcp, self.unix = tcp, unix

    @contextmanager
    def store(self, plane: Plane, *, verify: bool = True, unix: bool = False) -> Iterator[RemoteStore]:
        """Connects a RemoteStore to the daemon for the time of the block, and yields it.

        Args:
            plane: the data plane that the store fetches and pushes over: shared memory (LOCAL) or gRPC (STREAM).
            verify: whether the store verifies the checksums of fetched experts.
            unix: whether the store connects to the Unix socket instead of TCP.
        """
        store = RemoteStore(self.unix if unix else self.tcp, trainer="bench", plane=plane, verify=verify)
        try:
            yield store
        finally:
            store.close()


@contextmanager
def running_daemon(records: Records, directory: Path, *, all_in_dram: bool) -> Iterator[BenchDaemon]:
    """Starts a daemon with an empty bank for the records, yields it, and stops it at the end.

    Args:
        records: the bank has their number and layout.
        directory: holds the daemon's data.
        all_in_dram: whether the DRAM tier holds all records. Otherwise it holds about a quarter of them, so that most fetches read NVMe.
    """
    socket_dir = tempfile.mkdtemp(prefix="ooc-moe-")  # A socket's path is limited to 107 bytes.
    unix = f"unix:{socket_dir}/daemon.sock"
    arena_records = records.count + SPARE_RECORDS if all_in_dram else records.count // 4 + SPARE_RECORDS // 2
    dram_bytes = arena_records * records.layout.record_bytes
    try:
        with embedded_daemon(directory / "store", dram_bytes=dram_bytes, also_listen=(unix,)) as target:
            daemon = BenchDaemon(target, unix)
            with daemon.store(Plane.STREAM) as store:
                store.create_bank(BankSpec(name=BANK, num_experts=records.count, layout=records.layout))
            yield daemon
    finally:
        shutil.rmtree(socket_dir, ignore_errors=True)


def push_records(daemon: BenchDaemon, records: Records) -> None:
    """Pushes all records durably, over gRPC. Afterwards the daemon also has as many of them in DRAM as fit."""
    with daemon.store(Plane.STREAM) as store:
        Pusher(store, records).push()


class Pusher:
    """Pushes all records to the daemon, as often as `push` is called. It remembers each record's version, which the next push must name."""

    def __init__(self, store: RemoteStore, records: Records) -> None:
        self._store, self._records = store, records
        self._versions = [info.version for info in store.list_experts(BANK)]

    def push(self) -> None:
        """Pushes all records in one call of `RemoteStore.push`. The daemon acknowledges each record separately, once it is durable."""
        records = self._records
        pushes = [Push(expert=index, base_version=self._versions[index], body=records.body(index)) for index in records.ids]
        for index, outcome in enumerate(self._store.push(BANK, pushes)):
            if isinstance(outcome, Exception):
                raise outcome
            self._versions[index] = outcome

    def reload_versions(self) -> None:
        """Asks the daemon for the records' versions, which the next push must name. Needed after another writer has pushed."""
        self._versions = [info.version for info in self._store.list_experts(BANK)]


def fetch_path(name: str, store: RemoteStore, records: Records, tier: Tier, *, prepare: Callable[[], None] = lambda: None) -> TimedPath:
    """Makes a benchmark case (path) that fetches all records in one call.

    Args:
        name: the path's name in the results.
        store: what to fetch from.
        records: what to fetch, and the memory that they are fetched into.
        tier: where the daemon must have every record; a run raises WrongBytes if one came from another tier.
        prepare: called before each run, and not timed.
    """

    def run() -> None:
        found = Counter(fetched.served_from for fetched in store.fetch(BANK, records.ids, into=records.into))
        if found != {tier: records.count}:
            raise WrongBytes(f"{name}: the experts were found in {dict(found)}, not all in {tier.name}")

    return TimedPath(name=name, run=run, check=records.check, prepare=prepare)


@contextmanager
def resident_fetches(daemon: BenchDaemon, records: Records, wanted: Sequence[str]) -> Iterator[list[TimedPath]]:
    """Yields benchmark cases (paths) that fetch from DRAM: on each data plane, with and without verifying checksums at the receiver.

    Only paths whose name is in `wanted` are made.
    """
    kinds = {
        "local": lambda: daemon.store(Plane.LOCAL, verify=False),
        "local xxh3": lambda: daemon.store(Plane.LOCAL),
        "stream": lambda: daemon.store(Plane.STREAM),
        "stream unverified": lambda: daemon.store(Plane.STREAM, verify=False),
        "stream unix": lambda: daemon.store(Plane.STREAM, unix=True),
    }
    with ExitStack() as stack:
        yield [fetch_path(name, stack.enter_context(kinds[name]()), records, Tier.DRAM) for name in kinds if name in wanted]


@contextmanager
def durable_pushes(daemon: BenchDaemon, records: Records, wanted: Sequence[str]) -> Iterator[list[TimedPath]]:
    """Yields benchmark cases (paths) that push durably, one for each data plane.

    Only paths whose name is in `wanted` are made. A bank has one writer at a time, so each path takes the right to write (the lease) before
    its run.
    """
    planes = {"local": Plane.LOCAL, "stream": Plane.STREAM}
    with ExitStack() as stack:
        stores = {name: stack.enter_context(daemon.store(planes[name])) for name in planes if name in wanted}
        yield [_push_path(name, stores, records) for name in stores]


def _push_path(name: str, stores: dict[str, RemoteStore], records: Records) -> TimedPath:
    store = stores[name]
    pusher = Pusher(store, records)

    def prepare() -> None:
        for other in stores.values():
            if other is not store:
                other.release(BANK)
        store.open_for_writing(BANK)
        pusher.reload_versions()

    def check() -> None:
        for _ in store.fetch(BANK, records.ids, into=records.into):
            pass
        records.check()

    return TimedPath(name=name, run=pusher.push, check=check, prepare=prepare)


@contextmanager
def nvme_fetches(daemon: BenchDaemon, records: Records, wanted: Sequence[str]) -> Iterator[list[TimedPath]]:
    """Yields benchmark cases (paths) that fetch from NVMe, one for each data plane.

    Only paths whose name is in `wanted` are made. Before each run all records are evicted from DRAM, so that the fetch must read NVMe.
    """
    planes = {"local": Plane.LOCAL, "stream": Plane.STREAM}
    with ExitStack() as stack:
        evict = stack.enter_context(dram_evictor(daemon, records))
        yield [
            fetch_path(name, stack.enter_context(daemon.store(planes[name])), records, Tier.NVME, prepare=evict)
            for name in planes
            if name in wanted
        ]


@contextmanager
def dram_evictor(daemon: BenchDaemon, records: Records) -> Iterator[Callable[[], None]]:
    """Yields a function that evicts all records from DRAM, so that they are on NVMe only.

    The function fetches enough experts of another bank to fill the DRAM tier. These experts were never written: the daemon makes them from
    their seed and does not read the disk.
    """
    with daemon.store(Plane.STREAM, verify=False) as store:
        capacity_bytes = store.stats().dram.capacity_bytes
        layout = Layout(parameters=records.layout.parameters)
        count = math.ceil(capacity_bytes / (layout.body_bytes + BLOCK_BYTES)) + SPARE_RECORDS
        store.create_bank(BankSpec(name=FILLER, num_experts=count, layout=layout))
        scratch = memoryview(bytearray(layout.body_bytes))

        def evict() -> None:
            for _ in store.fetch(FILLER, range(count), into=lambda expert: scratch):
                pass

        yield evict
