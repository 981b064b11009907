"""How every benchmark compares the speed of several ways to do the same work, for example our own way and a peer's.

Each such way is a benchmark case, which the code calls a path. Each path is run and checked once to warm up. Then all paths are timed in
interleaved rounds: each round takes one sample of every path, in shuffled order, so that noise from other processes on the machine affects
all paths alike. The check finds a path that is fast only because it did not do its work.
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
    """A benchmark case to do the work (path) moved wrong bytes or computed a wrong result. Its speed must not be reported."""


def _nothing() -> None:
    pass


@dataclass(frozen=True, kw_only=True, slots=True)
class TimedPath:
    """A benchmark case (path): one of several ways to do the same work, with functions to run it and to check its result.

    For example, one way to move a set of records, called `name` in the results.
    """

    name: str
    run: Callable[[], float | None]
    """Does the work once. May return the seconds that it took by its own clock; these are then used instead of the harness's."""
    check: Callable[[], None]
    """Raises WrongBytes unless the latest run did all of the work."""
    prepare: Callable[[], None] = _nothing
    """Called before each run, and not timed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """The median and the first and third quartile (q1, q3) of one series of measurements, for example the seconds in each round."""

    median: float
    q1: float
    q3: float

    @staticmethod
    def of(samples: Sequence[float]) -> Spread:
        """Computes median and quartiles from at least one sample."""
        if len(samples) == 1:
            return Spread(median=samples[0], q1=samples[0], q3=samples[0])
        q1, median, q3 = statistics.quantiles(samples, n=4, method="inclusive")
        return Spread(median=median, q1=q1, q3=q3)

    @property
    def text(self) -> str:
        """The text of a table's cell: median [first quartile, third quartile]."""
        return f"{self.median:.4g} [{self.q1:.4g}, {self.q3:.4g}]"


def warm_up(paths: Sequence[TimedPath], *, before_each: Callable[[], None]) -> None:
    """Runs each benchmark case (path) once, so that it is warm when it is timed later, and checks its result.

    Args:
        paths: the ways to do the work.
        before_each: called before each path. If the paths write to the same memory, `before_each` must overwrite that memory; otherwise
            bytes that an earlier path left there could pass the check.

    Raises:
        WrongBytes: a check failed; the message names the benchmark case.
    """
    for path in paths:
        before_each()
        path.prepare()
        path.run()
        try:
            path.check()
        except WrongBytes as error:
            raise WrongBytes(f"{path.name}: {error}") from error


def measure(
    paths: Sequence[TimedPath], *, num_bytes: int, calls: int, rounds: int, order: random.Random, on_run: Callable[[], None]
) -> dict[str, list[float]]:
    """Measures the speed of every benchmark case (path) in GB/s (10^9 bytes). Returns, by its name, one sample for each round.

    Args:
        paths: the ways to move the bytes.
        num_bytes: how many bytes one run moves.
        calls: how many runs one sample averages; several where one run is too short to time.
        rounds: how many samples to take of each path.
        order: shuffles the paths in each round.
        on_run: called after every sample.
    """
    seconds = timed_rounds(paths, calls=calls, rounds=rounds, order=order, on_run=on_run)
    return {name: [num_bytes / value / GB for value in values] for name, values in seconds.items()}


def timed_rounds(
    paths: Sequence[TimedPath], *, calls: int, rounds: int, order: random.Random, on_run: Callable[[], None]
) -> dict[str, list[float]]:
    """Measures how many seconds a run of each benchmark case (path) takes. Returns, by its name, one sample for each round.

    A sample is the mean over `calls` runs. The arguments are explained at `measure`.
    """
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
        own_s = path.run()
        return time.perf_counter() - began if own_s is None else own_s
    finally:
        gc.enable()
