"""`ooc-moe bench cache --parts steady,oversubscribed`: the time of training steps when HBM is too small for all experts, compared with an
HBM that holds them all.

- steady: HBM has room for one game's experts, and not for those of the other games.
- oversubscribed: HBM has room for half of one game's experts.

All trainers of a part start from equal banks and do the same steps in the same rounds. At the end their losses must be equal bit for bit.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from ooc_moe.bench.cache.results import Ratio, Row
from ooc_moe.bench.cache.testbed import Setting, open_testbed
from ooc_moe.bench.cache.trainer import PPO, Trainer, check_equal
from ooc_moe.bench.harness import Spread, TimedPath, timed_rounds, warm_up
from ooc_moe.config.agent import PRESETS
from ooc_moe.moe.layer import TieredExperts
from ooc_moe_client.hbm.cache import ExpertCache

STEADY_MUST = 0.97  # Of the step rate with everything resident.
OVERSUBSCRIBED_AIM = 1.15  # Times the bound of a step.
STEPS_PER_GAME = 20_480  # Environment steps; the default of `train`.
UPDATE_STEPS = 2  # Optimizer steps of an update that are timed.
# Work of one sample. Where experts are small a sample has several runs, CALLS_MAX at most, because one run would be too short to time.
SAMPLE_FLOPS, CALLS_MAX = 2e9, 8
STEADY_PATHS, OVERSUBSCRIBED_PATHS = 3, 6
RESIDENT = "everything resident"
# By path: how an update tells the cache its schedule, as arguments of Trainer.begin_update.
_SCHEDULES = {
    "schedule, fetched ahead": {"schedule": True, "ahead": True},
    "schedule, prefetch off": {"schedule": True, "ahead": False},
    "no schedule, prefetch off": {"schedule": False},
}


def steps_per_game() -> int:
    """Returns how many optimizer steps the training in one game takes with `train`'s defaults and the full preset.

    Experts are written back once, when training in a game ends. The cost of a write-back is spread over this many steps.
    """
    steps_per_rollout = PPO.num_envs * PPO.rollout_steps
    rollouts = STEPS_PER_GAME // steps_per_rollout
    segments = steps_per_rollout // PRESETS["full"].context
    return rollouts * PPO.epochs * segments // PPO.minibatch_segments


def calls(setting: Setting) -> int:
    """Returns how often the timed work is repeated in one sample. Small experts need several runs, because one is too short to time."""
    config = setting.config
    tokens = PPO.minibatch_segments * config.context
    flops = UPDATE_STEPS * config.num_layers * 3 * 2 * 2 * tokens * config.top_k * config.dim * config.hidden
    return min(CALLS_MAX, max(1, round(SAMPLE_FLOPS / flops)))


def steady(setting: Setting, on_run: Callable[[], None]) -> list[Row]:
    """Measures training steps of one game whose experts fill the HBM, while the bank is 8 times as large. Returns the rows.

    The baseline has the whole bank in HBM. A third case also writes all experts back in every update; the last row is computed from
    it: a write-back once a game. `on_run` is called before the warm-up of each benchmark case (path) and after each of its samples.
    """
    bank_experts = setting.config.num_experts
    with open_testbed(setting, dram_experts=bank_experts + 2 * setting.working_set) as testbed:
        whole = testbed.cache("resident", capacity_experts=bank_experts)
        caches = [whole, *(testbed.cache(name, capacity_experts=setting.working_set) for name in ("cached", "written"))]
        with whole.reading(range(bank_experts)):
            pass
        trainers = [Trainer(setting, TieredExperts(cache)) for cache in caches]
        names = (RESIDENT, "working set resident", "written back every update")
        updates = (_update, _update, _update_and_write_back)
        paths = [
            TimedPath(name=name, run=partial(update, trainer), check=partial(check_equal, trainers))
            for name, update, trainer in zip(names, updates, trainers, strict=True)
        ]
        samples = _measure(setting, paths, trainers, on_run)
    resident, cached, written = (samples[name] for name in names)
    share = UPDATE_STEPS / steps_per_game()
    # A game has one write-back. Its cost, as far as it is not hidden, is spread over all updates of the game.
    once_a_game = [usual + share * max(0.0, with_write - usual) for usual, with_write in zip(cached, written, strict=True)]
    last = f"written back once a game ({steps_per_game()} steps)"
    base = statistics.median(resident)
    rows = [Row(part="steady", size=setting.size, path=names[0], unit="ms a step", spread=_ms_a_step(resident))]
    for name, seconds in ((names[1], cached), (names[2], written), (last, once_a_game)):
        ratio = Ratio(of="its rate", value=base / statistics.median(seconds), must=STEADY_MUST if name == last else None)
        rows.append(Row(part="steady", size=setting.size, path=name, unit="ms a step", spread=_ms_a_step(seconds), ratios=(ratio,)))
    return rows


def _update(trainer: Trainer) -> None:
    trainer.begin_update(UPDATE_STEPS)
    for _ in range(UPDATE_STEPS):
        trainer.step()


def _update_and_write_back(trainer: Trainer) -> None:
    """Does an update while the experts that the previous update changed are written back, then makes this update's experts durable."""
    trainer.cache.write_back()
    _update(trainer)
    trainer.cache.flush()


def oversubscribed(setting: Setting, on_run: Callable[[], None]) -> list[Row]:
    """Measures steps that use twice as many experts as fit in HBM, so that every step moves all its experts. Returns the rows.

    A step cannot be faster than its computation with all experts in HBM, nor than the fetch of the bytes that it fetches. The first ratio
    compares the step's time with the larger of these two times. The second ratio also takes into account the time to push the bytes that
    the step pushes, and compares with the largest of the three times. `on_run` is called before the warm-up of each benchmark case and
    after each of its samples.
    """
    capacity = setting.working_set // 2
    with open_testbed(setting, dram_experts=5 * setting.working_set) as testbed:
        resident = Trainer(setting, TieredExperts(testbed.cache("resident", capacity_experts=setting.working_set)))
        trainers = {
            name: Trainer(setting, TieredExperts(testbed.cache(f"order{number}", capacity_experts=capacity)))
            for number, name in enumerate(_SCHEDULES)
        }
        probe = testbed.cache("probe", capacity_experts=capacity)
        caches = [resident.cache, probe, *(trainer.cache for trainer in trainers.values())]
        moved: dict[str, list[tuple[int, int]]] = {name: [] for name in _SCHEDULES}
        check = partial(check_equal, [resident, *trainers.values()])
        paths = [_oversubscribed_path(RESIDENT, resident, {}, caches, [], check)]
        paths += [_oversubscribed_path(name, trainers[name], schedule, caches, moved[name], check) for name, schedule in _SCHEDULES.items()]
        paths += [_fetch_path(probe, caches), _push_path(probe, caches)]
        samples = _measure(setting, paths, [resident, *trainers.values()], on_run)
    return _oversubscribed_rows(setting, samples, moved)


def _oversubscribed_rows(
    setting: Setting, samples: Mapping[str, Sequence[float]], moved: Mapping[str, Sequence[tuple[int, int]]]
) -> list[Row]:
    """Makes the rows of the result table.

    Args:
        setting: the preset and its experts' size.
        samples: by benchmark case (path), the seconds of each run.
        moved: by benchmark case, how many bytes each run moved into and out of HBM.
    """
    compute = statistics.median(samples[RESIDENT]) / UPDATE_STEPS
    probe_bytes = setting.working_set // 2 * setting.config.expert_layout().body_bytes
    in_s, out_s = (statistics.median(samples[name]) / probe_bytes for name in ("fetch", "push"))
    rows = [Row(part="oversubscribed", size=setting.size, path=RESIDENT, unit="ms a step", spread=_ms_a_step(samples[RESIDENT]))]
    for name, schedule in _SCHEDULES.items():
        seconds = statistics.median(samples[name]) / UPDATE_STEPS
        bytes_in, bytes_out = (statistics.mean(column) / UPDATE_STEPS for column in zip(*moved[name], strict=True))
        fetching, pushing = bytes_in * in_s, bytes_out * out_s
        ratios = (
            Ratio(
                of=f"max(compute, fetches {1e3 * fetching:.3g} ms)",
                value=seconds / max(compute, fetching),
                aim=OVERSUBSCRIBED_AIM if schedule.get("ahead") else None,
                at_most=True,
            ),
            Ratio(of=f"max(these, pushes {1e3 * pushing:.3g} ms)", value=seconds / max(compute, fetching, pushing), at_most=True),
        )
        rows.append(
            Row(
                part="oversubscribed",
                size=setting.size,
                path=f"{name} (in {bytes_in / 1e6:.3g} MB, out {bytes_out / 1e6:.3g} MB)",
                unit="ms a step",
                spread=_ms_a_step(samples[name]),
                ratios=ratios,
            )
        )
    return rows


def _oversubscribed_path(
    name: str,
    trainer: Trainer,
    schedule: dict[str, bool],
    caches: Sequence[ExpertCache],
    moved: list[tuple[int, int]],
    check: Callable[[], None],
) -> TimedPath:
    """Makes the benchmark case (path) that times an update's steps.

    The first step is not timed; after it the cache is as every step leaves it.

    Args:
        name: the name of the benchmark case.
        trainer: does the steps.
        schedule: arguments for `Trainer.begin_update`.
        caches: all caches of the part. Before each run they write back what has changed, so that no other cache uses the daemon meanwhile.
        moved: each run appends how many bytes it moved into and out of HBM.
        check: raises WrongBytes if a run's result is wrong.
    """

    def prepare() -> None:
        _flush(caches)
        trainer.begin_update(1 + UPDATE_STEPS, **schedule)
        trainer.step()

    def run() -> None:
        before = trainer.cache.stats()
        for _ in range(UPDATE_STEPS):
            trainer.step()
        during = trainer.cache.stats() - before
        moved.append((during.bytes_in, during.bytes_out))

    return TimedPath(name=name, run=run, check=check, prepare=prepare)


def _fetch_path(probe: ExpertCache, caches: Sequence[ExpertCache]) -> TimedPath:
    experts = range(probe.capacity_experts)

    def prepare() -> None:
        _flush(caches)
        probe.forget()

    def run() -> None:
        with probe.reading(experts):
            pass

    return TimedPath(name="fetch", run=run, check=lambda: None, prepare=prepare)


def _push_path(probe: ExpertCache, caches: Sequence[ExpertCache]) -> TimedPath:
    def prepare() -> None:
        _flush(caches)
        with probe.updating(range(probe.capacity_experts)):
            pass

    return TimedPath(name="push", run=probe.flush, check=lambda: None, prepare=prepare)


def _flush(caches: Sequence[ExpertCache]) -> None:
    """Writes back what has changed in any of the caches and waits for it, so that no write-back runs while another trainer is timed."""
    for cache in caches:
        cache.flush()


def _measure(
    setting: Setting, paths: Sequence[TimedPath], trainers: Sequence[Trainer], on_run: Callable[[], None]
) -> dict[str, list[float]]:
    """Measures the seconds of one run in each round, by benchmark case (path), and checks that all trainers had equal losses."""
    warm_up(paths, before_each=on_run)
    samples = timed_rounds(paths, calls=calls(setting), rounds=setting.rounds, order=random.Random(0), on_run=on_run)
    check_equal(trainers)
    return samples


def _ms_a_step(seconds: Sequence[float]) -> Spread:
    return Spread.of([1e3 * value / UPDATE_STEPS for value in seconds])
