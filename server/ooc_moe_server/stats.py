"""Counting what the daemon does: accesses by scope, latencies by kind, trainers by name.

The counters are the wire's own messages, so that nothing is copied field by field: showing them all must cost the event loop little. Event
loop only. Knows nothing of what it counts.
"""

from __future__ import annotations

import time
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from ooc_moe_wire.errors import InvalidRequest
from ooc_moe_wire.v1 import stats_pb2

LATENCY_SAMPLES = 4096
NUM_TRAINERS_MAX = 1024
REPORT_LIFETIME_S = 15.0
# Of one report, which is kept.
REPORT_BANKS_MAX = 256
REPORT_ACTIVITY_CHARS_MAX = 1024
PERCENTILES = (50, 90, 99, 100)
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
        self._seconds = array("d", bytes(8 * LATENCY_SAMPLES))  # A ring.
        self._shown = stats_pb2.Latency()

    def add(self, seconds: float) -> None:
        """One operation took so long."""
        self._seconds[self.count % LATENCY_SAMPLES] = seconds
        self.count += 1

    def to_proto(self) -> stats_pb2.Latency:
        """Percentiles (the smallest sample that so many are not above) in milliseconds; zeros when there was no operation."""
        if self._shown.count != self.count:
            samples = np.frombuffer(self._seconds)[: self.count]
            ranks = [-(-percent * len(samples) // 100) - 1 for percent in PERCENTILES]
            p50, p90, p99, longest = np.partition(samples, ranks)[ranks] * 1e3
            self._shown = stats_pb2.Latency(count=self.count, p50_ms=p50, p90_ms=p90, p99_ms=p99, max_ms=longest)
        return self._shown


@dataclass(slots=True)
class Trainer:
    """One caller, as it names itself, and what it says of itself."""

    shown: stats_pb2.TrainerStats
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
        named = self._trainer(trainer).shown.access
        return Scopes((self.total, named) if bank is None else (self.total, bank, named))

    def took(self, kind: str, since: float) -> None:
        """An operation of `kind` that began at `since` (of the clock) is done."""
        self._latency[kind].add(self.clock() - since)

    def report(self, trainer: str, report: stats_pb2.ReportTrainerRequest) -> None:
        """Keeps a trainer's own counters, in place of its former ones. Raises InvalidRequest for too many."""
        if len(report.hbm) > REPORT_BANKS_MAX or len(report.activity) > REPORT_ACTIVITY_CHARS_MAX:
            raise InvalidRequest(
                f"report: {len(report.hbm)} banks and {len(report.activity)} characters of activity; "
                f"at most {REPORT_BANKS_MAX} and {REPORT_ACTIVITY_CHARS_MAX} are kept"
            )
        named = self._trainer(trainer)
        del named.shown.hbm[:]
        named.shown.hbm.extend(report.hbm)
        named.shown.activity, named.reported_at = report.activity, self.clock()

    def latency(self) -> dict[str, stats_pb2.Latency]:
        """By kind."""
        return {kind: samples.to_proto() for kind, samples in self._latency.items()}

    def trainers(self) -> Iterable[stats_pb2.TrainerStats]:
        """In order of names; reports older than 15 s are left out."""
        now = self.clock()
        for _, trainer in sorted(self._trainers.items()):
            if trainer.reported_at is not None:
                trainer.shown.report_age_s = now - trainer.reported_at
                if trainer.shown.report_age_s >= REPORT_LIFETIME_S:
                    trainer.reported_at = None
                    for field_name in ("hbm", "activity", "report_age_s"):
                        trainer.shown.ClearField(field_name)
            yield trainer.shown

    def _trainer(self, name: str) -> Trainer:
        """The trainer of that name; the longest unheard-of makes place for a new one."""
        trainer = self._trainers.get(name)
        if trainer is None:
            trainer = self._trainers[name] = Trainer(stats_pb2.TrainerStats(trainer=name))
        self._trainers.move_to_end(name)
        if len(self._trainers) > NUM_TRAINERS_MAX:
            self._trainers.popitem(last=False)
        return trainer
