"""`ooc-moe bench store`: the daemon's data planes beside their peers, in one run on one machine.

For each record size and each group of paths: the peers and a real daemon are started, every path is run once and its bytes are checked,
then all are measured in interleaved rounds (harness.py), then everything is taken down. What counts is the time from the caller's memory,
or into it. Threads: one in the caller, but for what a library starts by itself and the READ_THREADS of the raw reads; no process is bound
to a core, as servers that use several threads would lose most.
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
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from ooc_moe.bench.harness import TimedPath, measure, warm_up
from ooc_moe.bench.store import daemon_paths, peers_disk, peers_memory
from ooc_moe.bench.store.plain_grpc import plain_client
from ooc_moe.bench.store.records import SAMPLE_BYTES, Records, check_record_bytes, count_of, filled_records
from ooc_moe.bench.store.results import Latency, Results, Row, StatsRow, size_text, with_ratios
from ooc_moe.bench.store.stats_load import STREAMS, stats_latencies, streaming_clients
from ooc_moe.metrics import provenance
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
# What each group measures, ours first. Puts into memory that is not durable stand with the fetches, whose servers they share.
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
# What a path needs that may be missing here, and how to get it.
MODULES = {"ray": "ray", "ray put": "ray", "flight": "pyarrow", "flight put": "pyarrow", "lmdb": "lmdb", "rocksdb": "rocksdict"}
EXTRA = "pip install 'ooc-moe[bench]'"
# Of the largest set, at once: source, destination, arena, the stores of Ray and Flight with what was put into them.
MEMORY_SETS, DISK_SETS = 9, 10
HEADROOM_BYTES = 1 << 30
# How long a run takes, about, relative to a fetch of the same bytes: for the remaining time only.
_WEIGHT = {"fetch": 1, "push": 10, "nvme": 6}

Peer = Callable[[Records, Path], AbstractContextManager[list[TimedPath]]]


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreBench:
    """What to measure. `paths` are names of groups, or group/path with dashes for spaces: fetch, push/local, fetch/local-xxh3.

    Raises:
        InvalidRequest: for a size, a number of rounds or a path that cannot be.
    """

    data_dir: Path  # On the disk to measure; a directory is made in it, and removed.
    sizes: tuple[int, ...] = SIZES
    rounds: int | None = None
    paths: tuple[str, ...] = ()
    quick: bool = False

    def __post_init__(self) -> None:
        for size in self.sizes:
            check_record_bytes(size)
        if not self.sizes or len(set(self.sizes)) != len(self.sizes):
            raise InvalidRequest("sizes: give at least one, each once")
        if self.rounds is not None and not 1 <= self.rounds <= 1000:
            raise InvalidRequest(f"rounds: {self.rounds} is not 1 to 1000")
        for path in self.paths:
            if path not in _all_names():
                raise InvalidRequest(f"paths: {path!r} is not one of {', '.join(_all_names())}")

    @property
    def num_rounds(self) -> int:
        """Of each path and size."""
        return self.rounds or (QUICK_ROUNDS if self.quick else ROUNDS)

    @property
    def wanted(self) -> dict[str, tuple[str, ...]]:
        """The paths to measure, by group."""
        return {
            group: tuple(path for path in paths if not self.paths or group in self.paths or _name(group, path) in self.paths)
            for group, paths in PATHS.items()
        }


def run(bench: StoreBench, console: Console, *, command: str = "ooc-moe bench store") -> Results:
    """Measures. A progress bar is drawn on `console`.

    Raises:
        InvalidRequest: the disk or the memory cannot hold it.
        WrongBytes: a path did not move what it was asked to.
    """
    bench.data_dir.mkdir(parents=True, exist_ok=True)
    missing = _missing(bench.wanted)
    wanted = {group: tuple(path for path in paths if (group, path) not in missing) for group, paths in bench.wanted.items()}
    sets = {size: count_of(size, quick=bench.quick) for size in bench.sizes}
    _check_room(bench, max(size * count for size, count in sets.items()))
    order = random.Random(0)
    rows: list[Row] = []
    stats: StatsRow | None = None
    with _scratch(bench.data_dir) as directory, _progress(console) as progress:
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
                    progress.update(task, description=f"{group} {size_text(size)}")
                    step = size * count * _WEIGHT[group]
                    rows += _measure_group(
                        bench,
                        group,
                        wanted[group],
                        records,
                        directory,
                        order,
                        missing,
                        lambda: progress.advance(task, step),  # noqa: B023
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
    """One group with records of one size; a peer that does not start is added to `missing`."""
    if not wanted:
        return []
    with _scratch(directory) as scratch, ExitStack() as stack:
        paths = [path for path in _enter(group, wanted, records, scratch, stack, missing) if path.name in wanted]
        for path in paths:
            warm_up([path], before_each=records.blank)
            on_run()
        calls = max(1, SAMPLE_BYTES // records.num_bytes) if group == "fetch" and not bench.quick else 1
        samples = measure(paths, num_bytes=records.num_bytes, calls=calls, rounds=bench.num_rounds, order=order, on_run=on_run)
    return with_ratios(group, records.record_bytes, samples)


def _enter(
    group: str, wanted: Sequence[str], records: Records, directory: Path, stack: ExitStack, missing: dict[tuple[str, str], str]
) -> Iterator[TimedPath]:
    """Starts what a group needs; `stack` ends it. The daemon comes first: a fork is best made by a process with few threads."""
    if OURS & set(wanted):
        yield from _enter_ours(group, wanted, records, directory, stack)
    for names, peer in _PEERS[group]:
        if set(names) & set(wanted):
            place = directory / names[0].replace(" ", "-")
            place.mkdir()
            try:
                paths = stack.enter_context(peer(records, place))
            except Exception as error:  # A peer's own; the others are measured all the same.
                log.warning("%s did not start", names[0], exc_info=error)
                missing[group, names[0]] = f"{names[0]} with {size_text(records.record_bytes)} records: {str(error).splitlines()[0]}"
                continue
            yield from paths


def _enter_ours(group: str, wanted: Sequence[str], records: Records, directory: Path, stack: ExitStack) -> Iterator[TimedPath]:
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
            taken, echoed, rate = stats_latencies(daemon, echo, seconds=seconds)
            latencies += taken
            echoes += echoed
            served.append(rate)
    return StatsRow(
        record_bytes=size,
        calls=len(latencies),
        latency=Latency.of(latencies),
        echo=Latency.of(echoes),
        streams=STREAMS,
        served=statistics.median(served),
    )


def _missing(wanted: Mapping[str, Sequence[str]]) -> dict[tuple[str, str], str]:
    """The wanted paths that cannot be measured here, and what would help."""
    missing = {}
    for group, paths in wanted.items():
        for path in paths:
            if path in MODULES and importlib.util.find_spec(MODULES[path]) is None:
                missing[group, path] = f"{MODULES[path]} ({EXTRA})"
            elif path == "fio" and shutil.which("fio") is None:
                missing[group, path] = "fio (apt install fio)"
    return missing


def _check_room(bench: StoreBench, largest_set: int) -> None:
    """Raises InvalidRequest when memory or disk would run out on the way."""
    for what, needed, free in (
        ("memory", MEMORY_SETS * largest_set + HEADROOM_BYTES, provenance.available_memory_bytes()),
        (f"disk at {bench.data_dir}", DISK_SETS * largest_set + HEADROOM_BYTES, shutil.disk_usage(bench.data_dir).free),
    ):
        if free < needed:
            sets = size_text(largest_set)
            raise InvalidRequest(
                f"{what}: {size_text(needed)} are needed for sets of {sets}, {size_text(free)} are free; smaller --sizes need less"
            )


@contextmanager
def _scratch(parent: Path) -> Iterator[Path]:
    """A new directory, removed with all in it."""
    directory = tempfile.mkdtemp(prefix="bench-", dir=parent)
    try:
        yield Path(directory)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True)


def _name(group: str, path: str) -> str:
    return f"{group}/{path.replace(' ', '-')}"


def _all_names() -> list[str]:
    return [*PATHS, *(_name(group, path) for group, paths in PATHS.items() for path in paths)]
