"""Counting what the daemon does: accesses by scope, latencies by kind, trainers by name.

The counters are the wire's own messages, so that nothing is copied field by field. Event loop only. Knows nothing of what it counts.
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np

from ooc_moe_wire.v1 import stats_pb2

LATENCY_SAMPLES = 4096
NUM_TRAINERS_MAX = 1024
REPORT_LIFETIME_S = 15.0
LATENCY_KINDS = ("fetch_dram", "fetch_nvme", "fetch_seed", "push", "nvme_read", "commit")


@dataclass(frozen=True, slots=True)
class Scopes:
    """The counters one access belongs to: the total, its bank's, its trainer's."""

    counters: tuple[stats_pb2.AccessStats, ...]

    def count(self, field_name: str, number: int = 1) -> None:
        """Adds to one field of each."""
        for access in self.counters:
            setattr(access, field_name, getattr(access, field_name) + number)


class LatencySamples:
    """The last operations of one kind."""

    def __init__(self) -> None:
        self.count = 0
        self._seconds: deque[float] = deque(maxlen=LATENCY_SAMPLES)

    def add(self, seconds: float) -> None:
        """One operation took so long."""
        self.count += 1
        self._seconds.append(seconds)

    def to_proto(self) -> stats_pb2.Latency:
        """Percentiles in milliseconds; zeros when there was no operation."""
        if not self._seconds:
            return stats_pb2.Latency()
        p50, p90, p99, longest = np.percentile(np.fromiter(self._seconds, np.float64) * 1e3, (50, 90, 99, 100))
        return stats_pb2.Latency(count=self.count, p50_ms=p50, p90_ms=p90, p99_ms=p99, max_ms=longest)


@dataclass(slots=True)
class Trainer:
    """One caller, as it names itself."""

    access: stats_pb2.AccessStats = field(default_factory=stats_pb2.AccessStats)
    report: stats_pb2.ReportTrainerRequest = field(default_factory=stats_pb2.ReportTrainerRequest)
    reported_at: float | None = None


class Stats:
    """Everything counted that no tier or bank counts itself."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.total = stats_pb2.AccessStats()
        self.clock = clock
        self._started_at = clock()
        self._latency = {kind: LatencySamples() for kind in LATENCY_KINDS}
        self._trainers: OrderedDict[str, Trainer] = OrderedDict()

    @property
    def uptime_s(self) -> float:
        """Seconds since the start."""
        return self.clock() - self._started_at

    def scopes(self, trainer: str, bank: stats_pb2.AccessStats | None = None) -> Scopes:
        """The counters of a call by `trainer`, on a bank or on none."""
        named = self._trainer(trainer).access
        return Scopes((self.total, named) if bank is None else (self.total, bank, named))

    def took(self, kind: str, since: float) -> None:
        """An operation of `kind` that began at `since` (of the clock) is done."""
        self._latency[kind].add(self.clock() - since)

    def report(self, trainer: str, report: stats_pb2.ReportTrainerRequest) -> None:
        """Keeps a trainer's own counters, in place of its former ones."""
        named = self._trainer(trainer)
        named.report, named.reported_at = report, self.clock()

    def latency(self) -> dict[str, stats_pb2.Latency]:
        """By kind."""
        return {kind: samples.to_proto() for kind, samples in self._latency.items()}

    def trainers(self) -> Iterable[stats_pb2.TrainerStats]:
        """In order of names; reports older than 15 s are left out."""
        now = self.clock()
        for name, trainer in sorted(self._trainers.items()):
            message = stats_pb2.TrainerStats(trainer=name, access=trainer.access)
            if trainer.reported_at is not None and now - trainer.reported_at < REPORT_LIFETIME_S:
                message.hbm.extend(trainer.report.hbm)
                message.activity = trainer.report.activity
                message.report_age_s = now - trainer.reported_at
            yield message

    def _trainer(self, name: str) -> Trainer:
        """The trainer of that name; the longest unheard-of makes place for a new one."""
        trainer = self._trainers.setdefault(name, Trainer())
        self._trainers.move_to_end(name)
        if len(self._trainers) > NUM_TRAINERS_MAX:
            self._trainers.popitem(last=False)
        return trainer
