"""`ooc-moe bench cache --parts switch`: from one game's experts, all changed, to the next one's.

Two things are measured. How long until the new experts are there, in an HBM that holds one game: beside a fetch of as many into an HBM with
nothing to save. And what the steps after the switch take, in an HBM that holds three games: the next game is on the screen, but the agent
plays the old pool until its segment ends, as in an evaluation; meanwhile a prefetch may bring the new one. The schedule knows of the switch
when it comes, the detector DETECTOR_STEPS later; without either the first learning step asks.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence

from ooc_moe.bench.cache.results import Ratio, Row
from ooc_moe.bench.cache.trainer import Setting, Trainer, experts_of, opened
from ooc_moe.bench.harness import Spread, TimedPath, WrongBytes, timed_rounds, warm_up
from ooc_moe.moe.layer import TieredExperts
from ooc_moe_client.hbm.cache import ExpertCache

WARM_MUST = 1.5  # times the fetch of as many bytes
DETECTOR_STEPS = 4
LEARNING_STEPS = 1
SWITCH_PATHS = 8
POLL_S, PATIENCE_S = 0.0005, 10.0
OLD, NEW = 0, 1


def switch(setting: Setting, on_run: Callable[[], None]) -> list[Row]:
    """Both measurements, each in rounds of its own."""
    with opened(setting, dram_experts=2 * setting.config.num_experts) as bench:
        tight = bench.cache("tight", capacity_experts=setting.working_set)
        roomy = bench.cache("roomy", capacity_experts=3 * setting.working_set)
        return _until_warm(setting, tight, on_run) + _steps_after(setting, roomy, on_run)


def _leave(cache: ExpertCache) -> None:
    """As `train` leaves a game."""
    cache.write_back()
    cache.new_working_set()


def _dirty(cache: ExpertCache, experts: Sequence[int]) -> None:
    """Empties the cache, then brings the experts and changes them."""
    cache.flush()
    cache.forget()
    with cache.updating(experts):
        pass


def _until_warm(setting: Setting, cache: ExpertCache, on_run: Callable[[], None]) -> list[Row]:
    old, new = experts_of(setting, OLD), experts_of(setting, NEW)

    def fetch() -> None:
        with cache.reading(new):
            setting.synchronize()

    def from_clean() -> None:
        cache.flush()
        cache.forget()

    def demanded() -> None:
        _leave(cache)
        fetch()

    def prefetched() -> None:
        before = cache.stats()
        _leave(cache)
        cache.prefetch(new)
        give_up = time.monotonic() + PATIENCE_S
        while (cache.stats() - before).bytes_in < len(new) * cache.layout.body_bytes:
            if time.monotonic() > give_up:
                raise WrongBytes(f"after {PATIENCE_S:g} s a prefetch of {len(new)} experts was not there: {cache.stats() - before}")
            time.sleep(POLL_S)
        setting.synchronize()

    def prefetched_and_demanded() -> None:
        _leave(cache)
        cache.prefetch(new)
        fetch()

    def check() -> None:
        before = cache.stats()
        with cache.reading(new):
            pass
        if missed := (cache.stats() - before).misses:
            raise WrongBytes(f"{missed} of {len(new)} experts of the new game are not resident")

    ways = {"demand": demanded, "prefetch": prefetched, "prefetch, and demand at once": prefetched_and_demanded}
    paths = [TimedPath(name="fetch", run=fetch, check=check, prepare=from_clean)]
    paths += [TimedPath(name=name, run=run, check=check, prepare=lambda: _dirty(cache, old)) for name, run in ways.items()]
    warm_up(paths, blank=on_run)
    samples = timed_rounds(paths, calls=1, rounds=setting.rounds, order=random.Random(0), on_run=on_run)
    ms = {name: Spread.of([1e3 * value for value in values]) for name, values in samples.items()}
    rows = [Row(part="switch", size=setting.size, path="fetch into a clean HBM", unit="ms", spread=ms["fetch"])]
    return rows + [
        Row(
            part="switch",
            size=setting.size,
            path=f"dirty pool to warm, by {name}",
            unit="ms",
            spread=ms[name],
            ratios=(Ratio(of="the fetch", value=ms[name].median / ms["fetch"].median, must=WARM_MUST, at_most=True),),
        )
        for name in ways
    ]


def _steps_after(setting: Setting, cache: ExpertCache, on_run: Callable[[], None]) -> list[Row]:
    experts = TieredExperts(cache)
    before, after = Trainer(setting, experts, game=OLD), Trainer(setting, experts, game=NEW)
    old, new, other = (experts_of(setting, game) for game in (OLD, NEW, NEW + 1))
    # By name: the acting step at which the new game's experts are prefetched, if ever.
    ways = {"schedule's prefetch": 0, "detector's prefetch": DETECTOR_STEPS, "no prefetch": None}
    stalls: dict[str, list[float]] = {name: [] for name in ("everything resident", *ways)}

    def all_resident() -> None:
        cache.flush()
        for game in (old, new):
            with cache.reading(game):
                pass

    def not_resident() -> None:
        """The old game's experts are changed; all other slots hold a third and a fourth game's."""
        cache.flush()
        cache.forget()
        for game in (other, experts_of(setting, NEW + 2)):
            with cache.reading(game):
                pass
        with cache.updating(old):
            pass

    def path(name: str, prefetch_at: int | None) -> TimedPath:
        def run() -> None:
            counted = cache.stats()
            if name != "everything resident":
                _leave(cache)
            for step in range(setting.config.context):
                if step == prefetch_at:
                    cache.prefetch(new)
                before.act()
            after.begin_update(LEARNING_STEPS, ahead=prefetch_at is not None)
            for _ in range(LEARNING_STEPS):
                after.step()
            stalls[name].append((cache.stats() - counted).stall_s)

        prepare = all_resident if name == "everything resident" else not_resident
        return TimedPath(name=name, run=run, check=lambda: None, prepare=prepare)

    paths = [path("everything resident", None), *(path(name, at) for name, at in ways.items())]
    warm_up(paths, blank=on_run)
    for stalled in stalls.values():
        stalled.clear()
    samples = timed_rounds(paths, calls=1, rounds=setting.rounds, order=random.Random(0), on_run=on_run)
    steps = f"{setting.config.context} acting + {LEARNING_STEPS} learning step"
    ms = {name: Spread.of([1e3 * value for value in values]) for name, values in samples.items()}
    rows = []
    for name, spread in ms.items():
        ratio = Ratio(of="everything resident", value=spread.median / ms["everything resident"].median, at_most=True)
        shown = () if name == "everything resident" else (ratio,)
        rows.append(Row(part="switch", size=setting.size, path=f"{steps}, {name}", unit="ms", spread=spread, ratios=shown))
        waited = Spread.of([1e3 * value for value in stalls[name]])
        rows.append(Row(part="switch", size=setting.size, path=f"of these, waited for experts, {name}", unit="ms", spread=waited))
    return rows
