"""Our own paths: a real daemon process, and `RemoteStore` on each of its planes.

A fetch says where each expert was found; a path that finds one elsewhere than it is meant to measure fails.
"""

from __future__ import annotations

import math
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ooc_moe.bench.child_process import child
from ooc_moe.bench.harness import TimedPath, WrongBytes
from ooc_moe.bench.store.records import Records
from ooc_moe.session.daemon import embedded_daemon
from ooc_moe_client.remote.store import RemoteStore
from ooc_moe_client.store import Plane, Push, Tier
from ooc_moe_wire.layout import BLOCK_BYTES, BankSpec, Layout

BANK, FILLER = "bench", "bench-filler"
# In the arena of a daemon beyond the records of a set: what pushes and reads have under way.
SPARE_RECORDS = 16
# What is measured with four streams: GetStats at this pace.
STREAMS = 4
STATS_INTERVAL_S = 0.01


class Daemon:
    """A daemon with a bank for the records, and its addresses."""

    def __init__(self, tcp: str, unix: str) -> None:
        self.tcp, self.unix = tcp, unix

    @contextmanager
    def store(self, plane: Plane, *, verify: bool = True, unix: bool = False) -> Iterator[RemoteStore]:
        """A store on a plane, closed in the end."""
        store = RemoteStore(self.unix if unix else self.tcp, trainer="bench", plane=plane, verify=verify)
        try:
            yield store
        finally:
            store.close()


@contextmanager
def daemon(records: Records, directory: Path, *, arena_records: int) -> Iterator[Daemon]:
    """A daemon with room for so many records in DRAM, and an empty bank for them."""
    socket_dir = tempfile.mkdtemp(prefix="ooc-moe-")  # Socket paths are limited to 107 bytes.
    unix = f"unix:{socket_dir}/daemon.sock"
    dram_bytes = arena_records * records.layout.record_bytes
    try:
        with embedded_daemon(directory / "store", dram_bytes=dram_bytes, also_listen=(unix,)) as target:
            started = Daemon(target, unix)
            with started.store(Plane.STREAM) as store:
                store.create_bank(BankSpec(name=BANK, num_experts=records.count, layout=records.layout))
            yield started
    finally:
        shutil.rmtree(socket_dir, ignore_errors=True)


def fill(daemon: Daemon, records: Records) -> None:
    """Pushes the records; they are then in DRAM as well, as far as it goes."""
    with daemon.store(Plane.STREAM) as store:
        Pusher(store, records).push()


class Pusher:
    """Pushes all records durably in one call, again and again."""

    def __init__(self, store: RemoteStore, records: Records) -> None:
        self._store, self._records = store, records
        self._versions = [info.version for info in store.list_experts(BANK)]

    def push(self) -> None:
        """One call; every record is acknowledged durable on its own."""
        records = self._records
        pushes = [Push(expert=index, base_version=self._versions[index], body=records.body(index)) for index in records.ids]
        for index, outcome in enumerate(self._store.push(BANK, pushes)):
            if isinstance(outcome, Exception):
                raise outcome
            self._versions[index] = outcome

    def renew(self) -> None:
        """Learns the versions, where another writer was here meanwhile."""
        self._versions = [info.version for info in self._store.list_experts(BANK)]


def fetch_path(name: str, store: RemoteStore, records: Records, tier: Tier, *, prepare: Callable[[], None] = lambda: None) -> TimedPath:
    """A fetch of all records in one call, each found in `tier`."""

    def run() -> None:
        found = Counter(fetched.served_from for fetched in store.fetch(BANK, records.ids, into=records.into))
        if found != {tier: records.count}:
            raise WrongBytes(f"{name}: the experts were found in {dict(found)}, not all in {tier.name}")

    return TimedPath(name=name, run=run, check=records.check, prepare=prepare)


@contextmanager
def resident_fetches(daemon: Daemon, records: Records, wanted: Sequence[str]) -> Iterator[list[TimedPath]]:
    """Fetches of what is in DRAM, on every plane, with the checksums of the receiver on and off."""
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
def durable_pushes(daemon: Daemon, records: Records, wanted: Sequence[str]) -> Iterator[list[TimedPath]]:
    """Durable pushes on both planes. A bank has one writer at a time: each takes the lease before its run."""
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
        pusher.renew()

    def check() -> None:
        for _ in store.fetch(BANK, records.ids, into=records.into):
            pass
        records.check()

    return TimedPath(name=name, run=pusher.push, check=check, prepare=prepare)


@contextmanager
def nvme_fetches(daemon: Daemon, records: Records, wanted: Sequence[str]) -> Iterator[list[TimedPath]]:
    """Fetches of what lies on NVMe only."""
    planes = {"local": Plane.LOCAL, "stream": Plane.STREAM}
    with ExitStack() as stack:
        flush = stack.enter_context(flusher(daemon, records))
        yield [
            fetch_path(name, stack.enter_context(daemon.store(planes[name])), records, Tier.NVME, prepare=flush)
            for name in planes
            if name in wanted
        ]


@contextmanager
def flusher(daemon: Daemon, records: Records) -> Iterator[Callable[[], None]]:
    """What leaves the records on NVMe only: it fills the DRAM tier with experts of another bank that were never written."""
    with daemon.store(Plane.STREAM, verify=False) as store:
        capacity_bytes = store.stats().dram.capacity_bytes
        layout = Layout(parameters=records.layout.parameters)
        count = math.ceil(capacity_bytes / (layout.body_bytes + BLOCK_BYTES)) + SPARE_RECORDS
        store.create_bank(BankSpec(name=FILLER, num_experts=count, layout=layout))
        scratch = memoryview(bytearray(layout.body_bytes))

        def flush() -> None:
            for _ in store.fetch(FILLER, range(count), into=lambda expert: scratch):
                pass

        yield flush


# GetStats under load


@contextmanager
def streams(daemon: Daemon) -> Iterator[None]:
    """Client processes that fetch all the bank's records over the stream, flat out."""
    with ExitStack() as stack:
        for _ in range(STREAMS):
            stack.enter_context(child("stream", daemon.tcp, BANK))
        yield


def stream_for_ever(target: str, bank: str, ready: Callable[[], None]) -> None:
    """What each of them does; says so after the first time."""
    store = RemoteStore(target, trainer="bench-stream", plane=Plane.STREAM)
    spec = store.get_bank(bank).spec
    memory = memoryview(bytearray(spec.num_experts * spec.layout.body_bytes))

    def into(expert: int) -> memoryview:
        return memory[expert * spec.layout.body_bytes : (expert + 1) * spec.layout.body_bytes]

    for _ in store.fetch(bank, range(spec.num_experts), into=into):
        pass
    ready()
    while True:
        for _ in store.fetch(bank, range(spec.num_experts), into=into):
            pass


def stats_latencies(daemon: Daemon, echo: Callable[[], None], *, seconds: float) -> tuple[list[float], list[float], float]:
    """The milliseconds of each GetStats and of each echo of an idle server in that time; the GB/s that the daemon served meanwhile."""
    with daemon.store(Plane.STREAM) as store:
        before = store.stats()
        began = time.perf_counter()
        latencies: list[float] = []
        echoes: list[float] = []
        while time.perf_counter() - began < seconds:
            for call, taken in ((store.stats, latencies), (echo, echoes)):
                asked = time.perf_counter()
                call()
                taken.append((time.perf_counter() - asked) * 1e3)
                time.sleep(STATS_INTERVAL_S)
        now = store.stats()
        served = (now.total.fetched_bytes - before.total.fetched_bytes) / (time.perf_counter() - began) / 1e9
    return latencies, echoes, served
