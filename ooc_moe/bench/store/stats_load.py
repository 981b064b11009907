"""GetStats under load: how long the daemon takes to answer while client processes fetch at full speed.

Each client process is: python -m ooc_moe.bench.store.stats_load TARGET BANK
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from ooc_moe.bench.child_process import child_process, report_ready, run_as_child
from ooc_moe.bench.store.daemon_paths import BANK, BenchDaemon
from ooc_moe_client.remote.store import RemoteStore
from ooc_moe_client.store import Plane

STREAMS = 4
STATS_INTERVAL_S = 0.01


@contextmanager
def streaming_clients(daemon: BenchDaemon) -> Iterator[None]:
    """Runs `STREAMS` client processes during the block; each fetches the whole bank over gRPC again and again."""
    with ExitStack() as stack:
        for _ in range(STREAMS):
            stack.enter_context(child_process("ooc_moe.bench.store.stats_load", daemon.tcp, BANK))
        yield


def stats_latencies(daemon: BenchDaemon, echo: Callable[[], None], *, seconds: float) -> tuple[list[float], list[float], float]:
    """Measures for `seconds` how long the daemon takes to answer GetStats. Calls GetStats and `echo` in turn, every `STATS_INTERVAL_S`.

    Args:
        daemon: the daemon under load.
        echo: calls another, idle server once; its latency shows how much of the time is due to the busy processors alone.
        seconds: how long to measure.

    Returns:
        The milliseconds of each GetStats, those of each echo, and the GB/s that the daemon served meanwhile.
    """
    with daemon.store(Plane.STREAM) as store:
        before = store.stats()
        began = time.perf_counter()
        stats_ms: list[float] = []
        echoes_ms: list[float] = []
        while time.perf_counter() - began < seconds:
            for call, samples_ms in ((store.stats, stats_ms), (echo, echoes_ms)):
                called = time.perf_counter()
                call()
                samples_ms.append((time.perf_counter() - called) * 1e3)
                time.sleep(STATS_INTERVAL_S)
        now = store.stats()
        served = (now.total.fetched_bytes - before.total.fetched_bytes) / (time.perf_counter() - began) / 1e9
    return stats_ms, echoes_ms, served


def _fetch_forever(target: str, bank: str) -> None:
    """Fetches the whole bank over gRPC until the process is ended; reports ready to the parent after the first fetch."""
    store = RemoteStore(target, trainer="bench-stream", plane=Plane.STREAM)
    spec = store.get_bank(bank).spec
    memory = memoryview(bytearray(spec.num_experts * spec.layout.body_bytes))

    def into(expert: int) -> memoryview:
        return memory[expert * spec.layout.body_bytes : (expert + 1) * spec.layout.body_bytes]

    def fetch() -> None:
        for _ in store.fetch(bank, range(spec.num_experts), into=into):
            pass

    fetch()
    report_ready()
    while True:
        fetch()


if __name__ == "__main__":
    run_as_child(_fetch_forever)
