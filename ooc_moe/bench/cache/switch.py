"""`ooc-moe bench cache --parts switch`: a switch from one game, all of whose experts have changed, to the next game.

Two things are measured:

1. How long it takes until the new game's experts are in HBM, which has room for the experts of one game. The old experts must be
   written back first. The baseline is a fetch of as many experts into an HBM in which nothing must be written back.
2. How long the steps after the switch take, in an HBM that holds the experts of three games. The new game is on the screen, but the agent
   plays with the old game's experts until its segment (its window of frames) ends, as in an evaluation. Meanwhile a prefetch may bring the
   new game's experts. The rows differ in when the prefetch starts: "schedule's prefetch" at once, "detector's prefetch" DETECTOR_STEPS
   steps later, "no prefetch" never, so that the first learning step fetches the experts on demand.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass

from ooc_moe.bench.cache.results import Ratio, Row
from ooc_moe.bench.cache.testbed import Setting, open_testbed
from ooc_moe.bench.cache.trainer import Trainer
from ooc_moe.bench.harness import Spread, TimedPath, WrongBytes, timed_rounds, warm_up
from ooc_moe.moe.layer import TieredExperts
from ooc_moe_client.hbm.cache import ExpertCache

WARM_MUST = 1.5  # Times the fetch of as many bytes.
DETECTOR_STEPS = 4
LEARNING_STEPS = 1
SWITCH_PATHS = 8
POLL_S, PREFETCH_TIMEOUT_S = 0.0005, 10.0
OLD, NEW = 0, 1
RESIDENT = "everything resident"
# By path: the acting step at which the new game's experts are prefetched; None: never.
PREFETCH_AT = {RESIDENT: None, "schedule's prefetch": 0, "detector's prefetch": DETECTOR_STEPS, "no prefetch": None}


def switch(setting: Setting, on_run: Callable[[], None]) -> list[Row]:
    """Measures a switch to another game: the time until its experts are resident, then the steps after the switch. Returns the rows.

    Each of the two has interleaved rounds of its own. `on_run` is called before the warm-up of each benchmark case, and after each of
    its samples.
    """
    with open_testbed(setting, dram_experts=2 * setting.config.num_experts) as testbed:
        one_game = testbed.cache("tight", capacity_experts=setting.working_set)
        three_games = testbed.cache("roomy", capacity_experts=3 * setting.working_set)
        return _time_until_resident(setting, one_game, on_run) + _time_steps_after(setting, three_games, on_run)


def _leave_game(cache: ExpertCache) -> None:
    """Tells the cache that the old game is left, as `train` does: it starts to write the old game's experts back."""
    cache.write_back()
    cache.new_working_set()


@dataclass(frozen=True)
class _Arrivals:
    """The ways to bring the new game's experts into an HBM that holds one game's: `fetch`, `demand`, `prefetch`, `prefetch_and_demand`.

    Each of these methods is one benchmark case (path). The other methods set up the cache before it, or check the result.
    """

    setting: Setting
    cache: ExpertCache

    @property
    def new(self) -> list[int]:
        return self.setting.experts_of(NEW)

    def make_clean(self) -> None:
        """Empties the cache, after writing back its changed experts."""
        self.cache.flush()
        self.cache.forget()

    def make_dirty(self) -> None:
        """Fills the cache with the old game's experts and marks all of them changed."""
        self.make_clean()
        with self.cache.updating(self.setting.experts_of(OLD)):
            pass

    def fetch(self) -> None:
        with self.cache.reading(self.new):
            self.setting.synchronize()

    def demand(self) -> None:
        _leave_game(self.cache)
        self.fetch()

    def prefetch(self) -> None:
        before = self.cache.stats()
        _leave_game(self.cache)
        self.cache.prefetch(self.new)
        deadline = time.monotonic() + PREFETCH_TIMEOUT_S
        while (self.cache.stats() - before).bytes_in < len(self.new) * self.cache.layout.body_bytes:
            if time.monotonic() > deadline:
                late = self.cache.stats() - before
                raise WrongBytes(f"a prefetch of {len(self.new)} experts did not end within {PREFETCH_TIMEOUT_S:g} s: {late}")
            time.sleep(POLL_S)
        self.setting.synchronize()

    def prefetch_and_demand(self) -> None:
        _leave_game(self.cache)
        self.cache.prefetch(self.new)
        self.fetch()

    def check(self) -> None:
        """Raises WrongBytes unless all experts of the new game are resident."""
        before = self.cache.stats()
        with self.cache.reading(self.new):
            pass
        if missed := (self.cache.stats() - before).misses:
            raise WrongBytes(f"{missed} of {len(self.new)} experts of the new game are not resident")


def _time_until_resident(setting: Setting, cache: ExpertCache, on_run: Callable[[], None]) -> list[Row]:
    arrivals = _Arrivals(setting, cache)
    ways = {
        "demand": arrivals.demand,
        "prefetch": arrivals.prefetch,
        "prefetch, and demand at once": arrivals.prefetch_and_demand,
    }
    paths = [TimedPath(name="fetch", run=arrivals.fetch, check=arrivals.check, prepare=arrivals.make_clean)]
    paths += [TimedPath(name=name, run=run, check=arrivals.check, prepare=arrivals.make_dirty) for name, run in ways.items()]
    warm_up(paths, before_each=on_run)
    ms = _measure_ms(setting, paths, on_run)
    rows = [_row(setting, "fetch into a clean HBM", ms["fetch"])]
    for name in ways:
        ratio = Ratio(of="the fetch", value=ms[name].median / ms["fetch"].median, must=WARM_MUST, at_most=True)
        rows.append(_row(setting, f"dirty pool to warm, by {name}", ms[name], ratio))
    return rows


class _StepsAfter:
    """Makes the benchmark cases (paths) that time the steps after a switch, in an HBM that holds three games.

    `stalls_s`: by name of the way, how many seconds each of its runs waited for experts.
    """

    def __init__(self, setting: Setting, cache: ExpertCache) -> None:
        self._setting, self._cache = setting, cache
        experts = TieredExperts(cache)
        self._old, self._new = Trainer(setting, experts, game=OLD), Trainer(setting, experts, game=NEW)
        self.stalls_s: dict[str, list[float]] = {name: [] for name in PREFETCH_AT}

    def path(self, name: str) -> TimedPath:
        """Makes the benchmark case called `name`, a key of PREFETCH_AT, which says when it prefetches.

        A run plays a segment with the old game's experts, then does a learning step with the new game's.
        """
        prefetch_at = PREFETCH_AT[name]

        def run() -> None:
            before = self._cache.stats()
            if name != RESIDENT:
                _leave_game(self._cache)
            for step in range(self._setting.config.context):
                if step == prefetch_at:
                    self._cache.prefetch(self._setting.experts_of(NEW))
                self._old.act()
            self._new.begin_update(LEARNING_STEPS, ahead=prefetch_at is not None)
            for _ in range(LEARNING_STEPS):
                self._new.step()
            self.stalls_s[name].append((self._cache.stats() - before).stall_s)

        prepare = self._make_both_resident if name == RESIDENT else self._make_new_absent
        return TimedPath(name=name, run=run, check=lambda: None, prepare=prepare)

    def _make_both_resident(self) -> None:
        self._cache.flush()
        self._read(OLD, NEW)

    def _make_new_absent(self) -> None:
        """Makes the new game's experts absent from the cache, and the old game's experts present and changed.

        All other slots are filled with the experts of a third and a fourth game.
        """
        self._cache.flush()
        self._cache.forget()
        self._read(NEW + 1, NEW + 2)
        with self._cache.updating(self._setting.experts_of(OLD)):
            pass

    def _read(self, *games: int) -> None:
        for game in games:
            with self._cache.reading(self._setting.experts_of(game)):
                pass


def _time_steps_after(setting: Setting, cache: ExpertCache, on_run: Callable[[], None]) -> list[Row]:
    steps_after = _StepsAfter(setting, cache)
    paths = [steps_after.path(name) for name in PREFETCH_AT]
    warm_up(paths, before_each=on_run)
    for stalls_s in steps_after.stalls_s.values():
        stalls_s.clear()
    ms = _measure_ms(setting, paths, on_run)
    steps = f"{setting.config.context} acting + {LEARNING_STEPS} learning step"
    rows = []
    for name, spread in ms.items():
        ratio = Ratio(of=RESIDENT, value=spread.median / ms[RESIDENT].median, at_most=True)
        rows.append(_row(setting, f"{steps}, {name}", spread, *(() if name == RESIDENT else (ratio,))))
        stall_ms = Spread.of([1e3 * value for value in steps_after.stalls_s[name]])
        rows.append(_row(setting, f"of these, waited for experts, {name}", stall_ms))
    return rows


def _measure_ms(setting: Setting, paths: list[TimedPath], on_run: Callable[[], None]) -> dict[str, Spread]:
    """Times all benchmark cases in interleaved rounds. Returns, by name, the median and quartiles of a run's milliseconds."""
    samples = timed_rounds(paths, calls=1, rounds=setting.rounds, order=random.Random(0), on_run=on_run)
    return {name: Spread.of([1e3 * value for value in values]) for name, values in samples.items()}


def _row(setting: Setting, path: str, spread: Spread, *ratios: Ratio) -> Row:
    return Row(part="switch", size=setting.size, path=path, unit="ms", spread=spread, ratios=ratios)
