"""The daemon's counters: accesses (in total, by bank and by trainer), latencies by kind of operation, and the reports of trainers.

The counters are kept in the protobuf messages that GetStats returns, so that nothing is copied field by field: GetStats must cost the event
loop little. To be used on the event loop only.
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
# Bounds of one report, because it is kept.
REPORT_BANKS_MAX = 256
REPORT_ACTIVITY_CHARS_MAX = 1024
PERCENTILES = (50, 90, 99, 100)
LATENCY_KINDS = ("fetch_dram", "fetch_nvme", "fetch_seed", "push", "nvme_read", "commit")


@dataclass(frozen=True, slots=True)
class Scopes:
    """The counters that one call is added to: the daemon's total, and those of the call's bank and trainer."""

    counters: tuple[stats_pb2.AccessStats, ...]

    def count(self, field_name: str, number: int = 1) -> None:
        """Adds `number` to the field `field_name` ("hits", for example) in the counters of the daemon, the call's bank and its trainer."""
        for access in self.counters:
            setattr(access, field_name, getattr(access, field_name) + number)


class LatencySamples:
    """The durations of the last 4096 operations of one kind, from which percentiles are computed."""

    def __init__(self) -> None:
        self.count = 0
        self._seconds = array("d", bytes(8 * LATENCY_SAMPLES))  # A ring buffer.
        self._shown = stats_pb2.Latency()

    def add(self, seconds: float) -> None:
        """Adds the duration of one operation, in seconds, in place of the oldest one when there are 4096."""
        self._seconds[self.count % LATENCY_SAMPLES] = seconds
        self.count += 1

    def to_proto(self) -> stats_pb2.Latency:
        """Returns percentiles in milliseconds, or zeros when there was no operation.

        Each percentile is one of the samples (nearest rank).
        """
        if self._shown.count != self.count:
            samples = np.frombuffer(self._seconds)[: self.count]
            ranks = [-(-percent * len(samples) // 100) - 1 for percent in PERCENTILES]
            p50, p90, p99, longest = np.partition(samples, ranks)[ranks] * 1e3
            self._shown = stats_pb2.Latency(count=self.count, p50_ms=p50, p90_ms=p90, p99_ms=p99, max_ms=longest)
        return self._shown


@dataclass(slots=True)
class Trainer:
    """What the daemon knows about one trainer: counters of its calls, its last report about itself, and when that report came."""

    shown: stats_pb2.TrainerStats
    reported_at: float | None = None


class Stats:
    """The daemon's counters: total accesses, latencies, and trainers. (The tiers and the banks keep the counters about themselves.)"""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.total = stats_pb2.AccessStats()
        self.clock = clock
        self._started_at = clock()
        self._latency = {kind: LatencySamples() for kind in LATENCY_KINDS}
        self._trainers: OrderedDict[str, Trainer] = OrderedDict()

    @property
    def uptime_s(self) -> float:
        """Seconds since the daemon started."""
        return self.clock() - self._started_at

    def scopes(self, trainer: str, bank: stats_pb2.AccessStats | None = None) -> Scopes:
        """Returns the counters for a call by `trainer`. `bank`: the counters of the bank that the call uses; None if it uses no bank."""
        named = self._trainer(trainer).shown.access
        return Scopes((self.total, named) if bank is None else (self.total, bank, named))

    def add_latency(self, kind: str, since: float) -> None:
        """Records the latency of one operation that ends now. `since`: when it began, as a time of `clock`."""
        self._latency[kind].add(self.clock() - since)

    def report(self, trainer: str, report: stats_pb2.ReportTrainerRequest) -> None:
        """Stores the counters that a trainer reports about itself, in place of its last report.

        Raises:
            InvalidRequest: the report names too many banks, or its text about the trainer's activity is too long.
        """
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
        """Returns the latency percentiles by kind of operation ("push", "commit", ...)."""
        return {kind: samples.to_proto() for kind, samples in self._latency.items()}

    def trainers(self) -> Iterable[stats_pb2.TrainerStats]:
        """Yields all trainers, sorted by name. Reports that are older than 15 s are dropped first."""
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
        """Returns the trainer of that name, and adds it if it is new.

        Beyond NUM_TRAINERS_MAX, the least recently seen trainer is dropped.
        """
        trainer = self._trainers.get(name)
        if trainer is None:
            trainer = self._trainers[name] = Trainer(stats_pb2.TrainerStats(trainer=name))
        self._trainers.move_to_end(name)
        if len(self._trainers) > NUM_TRAINERS_MAX:
            self._trainers.popitem(last=False)
        return trainer
