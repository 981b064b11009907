"""The one way in which every path is measured: warmed up and checked once, then interleaved rounds in shuffled order.

A path that is fast because it moves nothing fails its check. A round runs every path once, so that a neighbour's noise meets all of them.
Knows nothing of what a path is.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

GB = 1e9


class WrongBytes(Exception):
    """A path did not move what it was asked to move: its number would be a lie."""


def _nothing() -> None:
    pass


@dataclass(frozen=True, kw_only=True, slots=True)
class TimedPath:
    """One way to move a set of records.

    `run` moves the set once; it may return the seconds that count, where the clock of the caller would measure something else too.
    `prepare` comes before each run and is not measured. `check` raises WrongBytes unless the run before it moved every byte.
    """

    name: str
    run: Callable[[], float | None]
    check: Callable[[], None]
    prepare: Callable[[], None] = _nothing


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """Median and quartiles of the rounds."""

    median: float
    q1: float
    q3: float

    @staticmethod
    def of(samples: Sequence[float]) -> Spread:
        """Of at least one sample."""
        if len(samples) == 1:
            return Spread(median=samples[0], q1=samples[0], q3=samples[0])
        q1, median, q3 = statistics.quantiles(samples, n=4, method="inclusive")
        return Spread(median=median, q1=q1, q3=q3)

    @property
    def text(self) -> str:
        """For a table: median [quartiles]."""
        return f"{self.median:.4g} [{self.q1:.4g}, {self.q3:.4g}]"


def warm_up(paths: Sequence[TimedPath], *, blank: Callable[[], None]) -> None:
    """Runs each path once over a destination made blank, and checks it. Raises WrongBytes, naming the path."""
    for path in paths:
        blank()
        path.prepare()
        path.run()
        try:
            path.check()
        except WrongBytes as error:
            raise WrongBytes(f"{path.name}: {error}") from error


def measure(
    paths: Sequence[TimedPath], *, num_bytes: int, calls: int, rounds: int, order: random.Random, on_run: Callable[[], None]
) -> dict[str, list[float]]:
    """GB/s of every path, one sample a round.

    Args:
        paths: what to measure.
        num_bytes: what one run of a path moves.
        calls: runs in one sample, so that a small set is not lost in the clock.
        rounds: samples of each path.
        order: shuffles each round.
        on_run: called after every sample.
    """
    seconds = timed_rounds(paths, calls=calls, rounds=rounds, order=order, on_run=on_run)
    return {name: [num_bytes / value / GB for value in values] for name, values in seconds.items()}


def timed_rounds(
    paths: Sequence[TimedPath], *, calls: int, rounds: int, order: random.Random, on_run: Callable[[], None]
) -> dict[str, list[float]]:
    """Seconds of one run of every path, one sample a round, each the mean of `calls` runs. As `measure` otherwise."""
    samples: dict[str, list[float]] = {path.name: [] for path in paths}
    for _ in range(rounds):
        gc.collect()
        for path in order.sample(paths, len(paths)):
            samples[path.name].append(sum(_timed(path) for _ in range(calls)) / calls)
            on_run()
    return samples


def _timed(path: TimedPath) -> float:
    path.prepare()
    gc.disable()
    try:
        began = time.perf_counter()
        own = path.run()
        return time.perf_counter() - began if own is None else own
    finally:
        gc.enable()
