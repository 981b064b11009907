"""`ooc-moe bench cache --parts bandwidth`: the speed of a demand fetch into the cache's slots, from the daemon's DRAM and from NVMe.

The baseline for DRAM is a plain copy of the same bytes to the same device (memcpy; on a GPU, cudaMemcpy from pinned memory). The baseline
for NVMe is raw O_DIRECT reads. The bytes in the slots are compared with those that were pushed, and the cache's statistics must show that
all experts came from the tier that is being measured.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch

from ooc_moe.bench.cache.results import Ratio, Row
from ooc_moe.bench.cache.testbed import Setting
from ooc_moe.bench.harness import Spread, TimedPath, WrongBytes, measure, warm_up
from ooc_moe.bench.store import daemon_paths, peers_disk, peers_memory
from ooc_moe.bench.store.records import Records, filled_records
from ooc_moe_client.hbm.cache import ExpertCache
from ooc_moe_client.store import Plane

COPY_AIM = 0.9  # Of the speed of a plain copy.
COUNT = 8  # Experts of one fetch: as many as a game has, which is what the cache asks for at a time.
DRAM_CALLS = {"full": 1, "demo": 16, "tiny": 16}  # Fetches in one sample; several where one fetch of small experts is too short to time.
BANDWIDTH_PATHS = 7
# Trainers use "local" and "stream". "local unverified" leaves the receiver's checksums out, to show what they cost.
_PLANES = {"local": (Plane.LOCAL, True), "local unverified": (Plane.LOCAL, False), "stream": (Plane.STREAM, True)}


def bandwidth(setting: Setting, on_run: Callable[[], None]) -> list[Row]:
    """Measures the GB/s of fetches into the cache from the daemon's DRAM, then from NVMe, and returns the rows of the result table.

    Several ways to move the bytes (paths) are measured. `on_run` is called after the warm-up of each path, and after each sample of a path.
    """
    with filled_records(setting.config.expert_layout().body_bytes, COUNT) as records:
        return _rows(setting, "DRAM", _from_dram(setting, records, on_run), peer="copy", aims={"local": COPY_AIM}) + _rows(
            setting, "NVMe", _from_nvme(setting, records, on_run), peer="raw", aims={}
        )


def _rows(setting: Setting, tier: str, samples: Mapping[str, list[float]], *, peer: str, aims: Mapping[str, float]) -> list[Row]:
    spreads = {name: Spread.of(values) for name, values in samples.items()}
    return [
        Row(
            part="bandwidth",
            size=setting.size,
            path=f"{tier}, {name}",
            unit="GB/s",
            spread=spread,
            ratios=() if name == peer else (Ratio(of=peer, value=spread.median / spreads[peer].median, aim=aims.get(name)),),
        )
        for name, spread in spreads.items()
    ]


def _from_dram(setting: Setting, records: Records, on_run: Callable[[], None]) -> dict[str, list[float]]:
    with ExitStack() as stack:
        daemon = stack.enter_context(daemon_paths.running_daemon(records, setting.directory, all_in_dram=True))
        daemon_paths.push_records(daemon, records)
        paths = [stack.enter_context(_fetches(name, setting, daemon, records, tier="dram")) for name in _PLANES]
        paths.append(_copy(setting, records) if setting.device.type == "cuda" else stack.enter_context(_memcpy(records)))
        return _measure(setting, records, paths, on_run, calls=DRAM_CALLS[setting.size])


def _from_nvme(setting: Setting, records: Records, on_run: Callable[[], None]) -> dict[str, list[float]]:
    with ExitStack() as stack:
        place = setting.directory / "nvme"
        place.mkdir()
        daemon = stack.enter_context(daemon_paths.running_daemon(records, place, all_in_dram=False))
        daemon_paths.push_records(daemon, records)
        evict = stack.enter_context(daemon_paths.dram_evictor(daemon, records))
        paths = [stack.enter_context(_fetches(name, setting, daemon, records, tier="nvme", prepare=evict)) for name in ("local", "stream")]
        paths += stack.enter_context(peers_disk.raw_reads(records, place))
        return _measure(setting, records, paths, on_run, calls=1)


@contextmanager
def _fetches(
    name: str,
    setting: Setting,
    daemon: daemon_paths.BenchDaemon,
    records: Records,
    *,
    tier: str,
    prepare: Callable[[], None] = lambda: None,
) -> Iterator[TimedPath]:
    """Yields the benchmark case (path) in which an empty cache fetches all records.

    Args:
        name: the name of this way, a key of `_PLANES`: over which data plane it fetches, and whether checksums are verified.
        setting: the device and the rounds.
        daemon: holds the records.
        records: what to fetch.
        tier: where the daemon must find all of them, "dram" or "nvme"; otherwise a run raises WrongBytes.
        prepare: called before each run, after the cache was emptied.
    """
    plane, verify = _PLANES[name]
    with (
        daemon.store(plane, verify=verify) as store,
        ExpertCache(store, daemon_paths.BANK, capacity_experts=records.count, device=setting.device) as cache,
    ):

        def empty() -> None:
            cache.forget()
            prepare()

        def run() -> None:
            before = cache.stats()
            with cache.reading(records.ids):
                setting.synchronize()
            found = {found: count for found, count in (cache.stats() - before).fetched_from.items() if count}
            if found != {tier: records.count}:
                raise WrongBytes(f"{name}: the experts were found in {found}, not all in {tier}")

        def check() -> None:
            with cache.reading(records.ids) as slots:
                for index, slot in zip(records.ids, slots, strict=True):
                    body = torch.cat([cache.views[tensor.name][slot].flatten() for tensor in cache.layout.tensors])
                    records.check_body(index, body.cpu().numpy().tobytes())

        yield TimedPath(name=name, run=run, check=check, prepare=empty)


@contextmanager
def _memcpy(records: Records) -> Iterator[TimedPath]:
    with peers_memory.memcpy(records) as (path,):
        yield TimedPath(name="copy", run=path.run, check=path.check)


def _copy(setting: Setting, records: Records) -> TimedPath:
    """Makes the baseline for a GPU, which copies the records from pinned host memory to the GPU, one call for each record."""
    pinned = torch.from_numpy(records.source.copy()).view(records.count, -1).pin_memory()
    copies = torch.empty_like(pinned, device=setting.device)

    def run() -> None:
        for index in records.ids:
            copies[index].copy_(pinned[index], non_blocking=True)
        setting.synchronize()

    def check() -> None:
        for index in records.ids:
            records.check_body(index, copies[index].cpu().numpy().tobytes())

    return TimedPath(name="copy", run=run, check=check)


def _measure(
    setting: Setting, records: Records, paths: list[TimedPath], on_run: Callable[[], None], *, calls: int
) -> dict[str, list[float]]:
    """Checks the bytes that each benchmark case (path) moves, then times all. Returns the GB/s of each round, by name.

    A round's value is the mean of `calls` runs.
    """
    for path in paths:
        warm_up([path], before_each=records.blank)
        on_run()
    return measure(paths, num_bytes=records.num_bytes, calls=calls, rounds=setting.rounds, order=random.Random(0), on_run=on_run)
