"""`ooc-moe bench store`: the daemon's fetches and pushes compared with other systems (peers), in one run on one machine.

The daemon has two data planes, shared memory ("local") and gRPC ("stream"); both are measured. A "path" is one benchmark case to move the
records, our own or a peer's. Paths that do comparable work form a group: fetch, push, nvme. For each record size and each group the
benchmark starts a real daemon and the peers, runs every path once and checks its bytes, measures all paths in interleaved rounds
(harness.py), and stops everything again. A time ends, or for a push begins, with the bytes in the caller's memory. The caller uses one
thread, apart from threads that a library starts by itself and the READ_THREADS of the raw reads. No process is bound to a core, because
that would hurt servers with several threads most.
"""

from __future__ import annotations

import importlib.util
import logging
import random
import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

from rich.console import Console

from ooc_moe.bench.harness import TimedPath, measure, warm_up
from ooc_moe.bench.store import daemon_paths, peers_disk, peers_memory
from ooc_moe.bench.store.plain_grpc import plain_client
from ooc_moe.bench.store.records import SAMPLE_BYTES, Records, check_record_bytes, count_of, filled_records
from ooc_moe.bench.store.results import Latency, Results, Row, StatsRow, with_ratios
from ooc_moe.bench.store.stats_load import STREAMS, stats_latencies, streaming_clients
from ooc_moe.display.formats import format_size
from ooc_moe.display.progress import passing_bar
from ooc_moe.metrics import provenance
from ooc_moe_wire.command_line import Flag
from ooc_moe_wire.errors import InvalidRequest

log = logging.getLogger(__name__)

SIZES = (256 << 10, 8 << 20, 24 << 20)
ROUNDS, QUICK_ROUNDS = 15, 3
STATS_ROUND_S, QUICK_STATS_ROUND_S = 2.0, 0.5
STATS_RECORD_BYTES = 8 << 20

TITLES = {
    "fetch": "fetch from DRAM",
    "push": "durable push",
    "nvme": "fetch from NVMe",
    "stats": "under load",
}
# The paths of each group, our own first. The puts of Flight and Ray, which are not durable, are in the group of the fetches because they
# use the same servers.
PATHS: dict[str, tuple[str, ...]] = {
    "fetch": (
        "local",
        "local xxh3",
        "stream",
        "stream unverified",
        "stream unix",
        "memcpy",
        "ray",
        "flight",
        "tcp",
        "grpc",
        "flight put",
        "ray put",
    ),
    "push": ("local", "stream", "raw", "fio", "lmdb", "rocksdb"),
    "nvme": ("local", "stream", "raw", "fio", "lmdb", "buffered file"),
    "stats": ("getstats",),
}
OURS = {"local", "local xxh3", "stream", "stream unverified", "stream unix"}
# The Python module that a path needs and that may not be installed, and how to install it.
MODULES = {"ray": "ray", "ray put": "ray", "flight": "pyarrow", "flight put": "pyarrow", "lmdb": "lmdb", "rocksdb": "rocksdict"}
EXTRA = "pip install 'ooc-moe[bench]'"
# How many copies of the largest set of records are in memory at once (source, destination, arena, the stores of Ray and Flight with what
# was put into them), and how many are on the disk.
MEMORY_SETS, DISK_SETS = 9, 10
HEADROOM_BYTES = 1 << 30
# Roughly how long a run takes, relative to a fetch of the same bytes. Only the progress bar uses this.
_WEIGHT = {"fetch": 1, "push": 10, "nvme": 6}

Peer = Callable[[Records, Path], AbstractContextManager[list[TimedPath]]]


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreBench:
    """The options of `ooc-moe bench store`: which ways to move records to measure, with which record sizes, how often, and on which disk.

    `paths` names these ways, our own and the peers'; they are not files.

    Raises:
        InvalidRequest: a size cannot be moved by O_DIRECT, `rounds` is out of range, or a name in `paths` is unknown.
    """

    rounds: Annotated[int | None, Flag(default=f"{ROUNDS}; {QUICK_ROUNDS} with --quick")] = None
    """Interleaved rounds."""
    sizes: Annotated[tuple[int, ...], Flag(is_size=True, default="256KiB,8MiB,24MiB")] = SIZES
    """Sizes of a record."""
    paths: tuple[str, ...] = ()
    """Measure only these: fetch, push, nvme, stats, or a path with dashes for spaces, such as fetch/memcpy or push/local."""
    data_dir: Annotated[Path, Flag(metavar="DIR")] = Path()
    """A directory on the disk to measure. A new directory is made in it, and removed at the end."""
    quick: bool = False
    """A first look: few records, 3 rounds. Do not quote its figures."""

    def __post_init__(self) -> None:
        for size in self.sizes:
            check_record_bytes(size)
        if not self.sizes or len(set(self.sizes)) != len(self.sizes):
            raise InvalidRequest("sizes: name at least one size, and each size once")
        if self.rounds is not None and not 1 <= self.rounds <= 1000:
            raise InvalidRequest(f"rounds: {self.rounds} is not 1 to 1000")
        for path in self.paths:
            if path not in _all_names():
                raise InvalidRequest(f"paths: {path!r} is not one of {', '.join(_all_names())}")

    @property
    def num_rounds(self) -> int:
        """How often each benchmark case is timed with records of each size: `rounds`, or the default for quick or full benchmarks."""
        return self.rounds or (QUICK_ROUNDS if self.quick else ROUNDS)

    @property
    def wanted(self) -> dict[str, tuple[str, ...]]:
        """Which ways to move records (paths) to measure: by group, a key of PATHS, their names."""
        return {
            group: tuple(path for path in paths if not self.paths or group in self.paths or _name(group, path) in self.paths)
            for group, paths in PATHS.items()
        }


def run(bench: StoreBench, console: Console, *, command: str = "ooc-moe bench store") -> Results:
    """Does the measurements that `bench` asks for and returns the results; draws a progress bar on `console`.

    `command` is the command line that the result page shows.

    Raises:
        InvalidRequest: the records do not fit in memory or on the disk, or the file system of `data_dir` has no O_DIRECT.
        WrongBytes: a benchmark case moved wrong bytes, so that its speed would be meaningless.
    """
    bench.data_dir.mkdir(parents=True, exist_ok=True)
    missing = _missing(bench.wanted)
    wanted = {group: tuple(path for path in paths if (group, path) not in missing) for group, paths in bench.wanted.items()}
    sets = {size: count_of(size, quick=bench.quick) for size in bench.sizes}
    _check_room(bench, max(size * count for size, count in sets.items()))
    order = random.Random(0)
    rows: list[Row] = []
    stats: StatsRow | None = None
    with _scratch(bench.data_dir) as directory, passing_bar(console) as progress:
        peers_disk.check_direct_io(directory)
        ahead = {
            (group, size): (bench.num_rounds + 1) * len(wanted[group]) * size * count * _WEIGHT[group]
            for size, count in sets.items()
            for group in _WEIGHT
        }
        task = progress.add_task("", total=sum(ahead.values()))
        for size, count in sets.items():
            with filled_records(size, count) as records:
                for group in _WEIGHT:
                    progress.update(task, description=f"{group} {format_size(size)}")
                    step = size * count * _WEIGHT[group]
                    rows += _measure_group(
                        bench,
                        group,
                        wanted[group],
                        records,
                        directory,
                        order,
                        missing,
                        partial(progress.advance, task, step),
                    )
        if wanted["stats"]:
            progress.update(task, description="stats")
            stats = _measure_stats(bench, directory)
    rows.sort(key=lambda row: (list(PATHS).index(row.group), PATHS[row.group].index(row.path)))
    facts = provenance.facts(bench.data_dir, command=command) | {"rounds": f"{bench.num_rounds}, interleaved"}
    return Results(rows=tuple(rows), stats=stats, missing=tuple(dict.fromkeys(missing.values())), facts=facts, rounds=bench.num_rounds)


def _measure_group(
    bench: StoreBench,
    group: str,
    wanted: Sequence[str],
    records: Records,
    directory: Path,
    order: random.Random,
    missing: dict[tuple[str, str], str],
    on_run: Callable[[], None],
) -> list[Row]:
    """Measures the wanted ways (paths) of one group with records of one size, and returns their rows of the result table.

    Args:
        bench: the rounds.
        group: a key of PATHS.
        wanted: the names of the ways to measure.
        records: what they move.
        directory: on the disk to measure; the daemon and the peers get a directory in it.
        order: shuffles the ways in each round.
        missing: a peer that does not start is added to it, and has no row.
        on_run: called after the warm-up of each benchmark case and after each of its samples.
    """
    if not wanted:
        return []
    with _scratch(directory) as scratch, ExitStack() as stack:
        paths = [path for path in _start_group(group, wanted, records, scratch, stack, missing) if path.name in wanted]
        for path in paths:
            warm_up([path], before_each=records.blank)
            on_run()
        calls = max(1, SAMPLE_BYTES // records.num_bytes) if group == "fetch" and not bench.quick else 1
        samples = measure(paths, num_bytes=records.num_bytes, calls=calls, rounds=bench.num_rounds, order=order, on_run=on_run)
    return with_ratios(group, records.record_bytes, samples)


def _start_group(
    group: str, wanted: Sequence[str], records: Records, directory: Path, stack: ExitStack, missing: dict[tuple[str, str], str]
) -> Iterator[TimedPath]:
    """Starts the daemon and the peers that one group needs, and yields its benchmark cases (paths); `stack` stops daemon and peers.

    A peer that does not start is added to `missing`. The daemon comes first, because a process should fork while it has few threads.
    """
    if OURS & set(wanted):
        yield from _start_daemon(group, wanted, records, directory, stack)
    for names, peer in _PEERS[group]:
        if set(names) & set(wanted):
            place = directory / names[0].replace(" ", "-")
            place.mkdir()
            try:
                paths = stack.enter_context(peer(records, place))
            except Exception as error:  # Any error of the peer's library. The other peers are measured all the same.
                log.warning("%s did not start", names[0], exc_info=error)
                missing[group, names[0]] = f"{names[0]} with {format_size(records.record_bytes)} records: {str(error).splitlines()[0]}"
                continue
            yield from paths


def _start_daemon(group: str, wanted: Sequence[str], records: Records, directory: Path, stack: ExitStack) -> Iterator[TimedPath]:
    daemon = stack.enter_context(daemon_paths.running_daemon(records, directory, all_in_dram=group != "nvme"))
    daemon_paths.push_records(daemon, records)
    planes = {"fetch": daemon_paths.resident_fetches, "push": daemon_paths.durable_pushes, "nvme": daemon_paths.nvme_fetches}
    yield from stack.enter_context(planes[group](daemon, records, wanted))


def _in_memory(peer: Callable[[Records], AbstractContextManager[list[TimedPath]]]) -> Peer:
    return lambda records, directory: peer(records)


_PEERS: dict[str, tuple[tuple[tuple[str, ...], Peer], ...]] = {
    "fetch": (
        (("memcpy",), _in_memory(peers_memory.memcpy)),
        (("tcp",), _in_memory(peers_memory.tcp)),
        (("grpc",), _in_memory(peers_memory.grpc)),
        (("flight", "flight put"), _in_memory(peers_memory.flight)),
        (("ray", "ray put"), _in_memory(peers_memory.ray)),
    ),
    "push": (
        (("raw",), peers_disk.raw_writes),
        (("fio",), peers_disk.fio_writes),
        (("lmdb",), peers_disk.lmdb_writes),
        (("rocksdb",), peers_disk.rocksdb_writes),
    ),
    "nvme": (
        (("raw",), peers_disk.raw_reads),
        (("fio",), peers_disk.fio_reads),
        (("lmdb",), peers_disk.lmdb_reads),
        (("buffered file",), peers_disk.buffered_reads),
    ),
}


def _measure_stats(bench: StoreBench, directory: Path) -> StatsRow:
    size = STATS_RECORD_BYTES if STATS_RECORD_BYTES in bench.sizes else max(bench.sizes)
    seconds = QUICK_STATS_ROUND_S if bench.quick else STATS_ROUND_S
    latencies: list[float] = []
    echoes: list[float] = []
    served: list[float] = []
    with ExitStack() as stack:
        records = stack.enter_context(filled_records(size, count_of(size, quick=bench.quick)))
        scratch = stack.enter_context(_scratch(directory))
        daemon = stack.enter_context(daemon_paths.running_daemon(records, scratch, all_in_dram=True))
        daemon_paths.push_records(daemon, records)
        echo = stack.enter_context(plain_client(records.fd, records.record_bytes)).echo
        stack.enter_context(streaming_clients(daemon))
        for _ in range(bench.num_rounds):
            stats_ms, echoes_ms, gb_per_s = stats_latencies(daemon, echo, seconds=seconds)
            latencies += stats_ms
            echoes += echoes_ms
            served.append(gb_per_s)
    return StatsRow(
        record_bytes=size,
        calls=len(latencies),
        latency=Latency.of(latencies),
        echo=Latency.of(echoes),
        streams=STREAMS,
        served=statistics.median(served),
    )


def _missing(wanted: Mapping[str, Sequence[str]]) -> dict[tuple[str, str], str]:
    """Returns the wanted ways (paths) that cannot be measured on this machine: (group, name) -> what must be installed for it."""
    missing = {}
    for group, paths in wanted.items():
        for path in paths:
            if path in MODULES and importlib.util.find_spec(MODULES[path]) is None:
                missing[group, path] = f"{MODULES[path]} ({EXTRA})"
            elif path == "fio" and shutil.which("fio") is None:
                missing[group, path] = "fio (apt install fio)"
    return missing


def _check_room(bench: StoreBench, largest_set: int) -> None:
    """Raises InvalidRequest if memory or disk would run out during the benchmark. `largest_set`: bytes of the largest set of records."""
    for what, needed, free in (
        ("memory", MEMORY_SETS * largest_set + HEADROOM_BYTES, provenance.available_memory_bytes()),
        (f"disk at {bench.data_dir}", DISK_SETS * largest_set + HEADROOM_BYTES, shutil.disk_usage(bench.data_dir).free),
    ):
        if free < needed:
            sets = format_size(largest_set)
            raise InvalidRequest(
                f"{what}: {format_size(needed)} are needed for sets of {sets}, {format_size(free)} are free; smaller --sizes need less"
            )


@contextmanager
def _scratch(parent: Path) -> Iterator[Path]:
    """Makes a directory in `parent` for the time of the block, and removes it with everything in it afterwards. Yields its path."""
    directory = tempfile.mkdtemp(prefix="bench-", dir=parent)
    try:
        yield Path(directory)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _name(group: str, path: str) -> str:
    return f"{group}/{path.replace(' ', '-')}"


def _all_names() -> list[str]:
    return [*PATHS, *(_name(group, path) for group, paths in PATHS.items() for path in paths)]
