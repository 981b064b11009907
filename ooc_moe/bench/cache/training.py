"""`ooc-moe bench cache --parts steady,oversubscribed`: steps of a trainer whose experts do not all fit, beside one that holds all.

All trainers of a part start from equal banks and take the same steps in the same rounds; in the end their losses must be equal bit for bit.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from functools import partial

from ooc_moe.bench.cache.results import Ratio, Row
from ooc_moe.bench.cache.testbed import Setting, open_testbed
from ooc_moe.bench.cache.trainer import PPO, Trainer, check_equal
from ooc_moe.bench.harness import Spread, TimedPath, timed_rounds, warm_up
from ooc_moe.config.agent import PRESETS
from ooc_moe.moe.layer import TieredExperts
from ooc_moe_client.hbm.cache import ExpertCache

STEADY_MUST = 0.97  # of the step rate of everything resident
OVERSUBSCRIBED_AIM = 1.15  # times what bounds a step
STEPS_PER_GAME = 20_480  # of the environments, as `train` has it by default
UPDATE_STEPS = 2  # timed ones of an update
SAMPLE_FLOPS, CALLS_MAX = 2e9, 8  # work of one sample, so that small experts are not lost in the clock, in at most so many runs
STEADY_PATHS, OVERSUBSCRIBED_PATHS = 3, 6


def steps_per_game() -> int:
    """Optimizer steps between two write-backs of a game, which come at its end: by default, with the full preset."""
    steps_per_rollout = PPO.num_envs * PPO.rollout_steps
    rollouts = STEPS_PER_GAME // steps_per_rollout
    segments = steps_per_rollout // PRESETS["full"].context
    return rollouts * PPO.epochs * segments // PPO.minibatch_segments


def calls(setting: Setting) -> int:
    """Runs in one sample."""
    config = setting.config
    tokens = PPO.minibatch_segments * config.context
    flops = UPDATE_STEPS * config.num_layers * 3 * 2 * 2 * tokens * config.top_k * config.dim * config.hidden
    return min(CALLS_MAX, max(1, round(SAMPLE_FLOPS / flops)))


def steady(setting: Setting, on_run: Callable[[], None]) -> list[Row]:
    """One game's steady state: its experts fill the HBM, the bank is 8 x as large; beside an HBM that holds the bank."""
    bank_experts = setting.config.num_experts
    with open_testbed(setting, dram_experts=bank_experts + 2 * setting.working_set) as testbed:
        whole = testbed.cache("resident", capacity_experts=bank_experts)
        caches = [whole, *(testbed.cache(name, capacity_experts=setting.working_set) for name in ("cached", "written"))]
        with whole.reading(range(bank_experts)):
            pass
        trainers = [Trainer(setting, TieredExperts(cache)) for cache in caches]
        names = ("everything resident", "working set resident", "written back every update")
        works = (_update, _update, _update_written_back)
        paths = [
            TimedPath(name=name, run=partial(work, trainer), check=partial(check_equal, trainers))
            for name, work, trainer in zip(names, works, trainers, strict=True)
        ]
        samples = _measured(setting, paths, trainers, on_run)
    resident, cached, written = (samples[name] for name in names)
    share = UPDATE_STEPS / steps_per_game()
    # One update of a game pays for the write-back, as far as it is not hidden.
    product = [usual + share * max(0.0, paying - usual) for usual, paying in zip(cached, written, strict=True)]
    last = f"written back once a game ({steps_per_game()} steps)"
    base = statistics.median(resident)
    rows = [Row(part="steady", size=setting.size, path=names[0], unit="ms a step", spread=_ms_a_step(resident))]
    for name, seconds in ((names[1], cached), (names[2], written), (last, product)):
        ratio = Ratio(of="its rate", value=base / statistics.median(seconds), must=STEADY_MUST if name == last else None)
        rows.append(Row(part="steady", size=setting.size, path=name, unit="ms a step", spread=_ms_a_step(seconds), ratios=(ratio,)))
    return rows


def _update(trainer: Trainer) -> None:
    trainer.begin_update(UPDATE_STEPS)
    for _ in range(UPDATE_STEPS):
        trainer.step()


def _update_written_back(trainer: Trainer) -> None:
    """An update while the experts as they were before it are written, and what it leaves made durable at its end."""
    trainer.cache.write_back()
    _update(trainer)
    trainer.cache.flush()


def oversubscribed(setting: Setting, on_run: Callable[[], None]) -> list[Row]:
    """A working set twice the HBM, every step of which moves all of it; beside what bounds a step: its work, or the bytes it moves."""
    capacity = setting.working_set // 2
    orders = {
        "schedule, fetched ahead": {"schedule": True, "ahead": True},
        "schedule, prefetch off": {"schedule": True, "ahead": False},
        "no schedule, prefetch off": {"schedule": False},
    }
    with open_testbed(setting, dram_experts=5 * setting.working_set) as testbed:
        resident = Trainer(setting, TieredExperts(testbed.cache("resident", capacity_experts=setting.working_set)))
        trainers = {
            name: Trainer(setting, TieredExperts(testbed.cache(f"order{number}", capacity_experts=capacity)))
            for number, name in enumerate(orders)
        }
        probe = testbed.cache("probe", capacity_experts=capacity)
        caches = [resident.cache, probe, *(trainer.cache for trainer in trainers.values())]
        moved: dict[str, list[tuple[int, int]]] = {name: [] for name in orders}
        check = partial(check_equal, [resident, *trainers.values()])
        paths = [_oversubscribed_path("everything resident", resident, {}, caches, [], check)]
        paths += [_oversubscribed_path(name, trainers[name], order, caches, moved[name], check) for name, order in orders.items()]
        paths += [_fetch_path(probe, caches), _push_path(probe, caches)]
        samples = _measured(setting, paths, [resident, *trainers.values()], on_run)
    compute = statistics.median(samples["everything resident"]) / UPDATE_STEPS
    in_s, out_s = (statistics.median(samples[name]) / capacity / setting.config.expert_layout().body_bytes for name in ("fetch", "push"))
    rows = [Row(part="oversubscribed", size=setting.size, path=paths[0].name, unit="ms a step", spread=_ms_a_step(samples[paths[0].name]))]
    for name in orders:
        seconds = statistics.median(samples[name]) / UPDATE_STEPS
        bytes_in, bytes_out = (statistics.mean(column) / UPDATE_STEPS for column in zip(*moved[name], strict=True))
        fetching, pushing = bytes_in * in_s, bytes_out * out_s
        ratios = (
            Ratio(
                of=f"max(compute, fetches {1e3 * fetching:.3g} ms)",
                value=seconds / max(compute, fetching),
                aim=OVERSUBSCRIBED_AIM if orders[name].get("ahead") else None,
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
    order: dict[str, bool],
    caches: Sequence[ExpertCache],
    moved: list[tuple[int, int]],
    check: Callable[[], None],
) -> TimedPath:
    """The steps of an update but its first, which brings the cache to the state that it then returns to."""

    def prepare() -> None:
        _flush(caches)
        trainer.begin_update(1 + UPDATE_STEPS, **order)
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
    """So that nobody's write-back runs in the time of another."""
    for cache in caches:
        cache.flush()


def _measured(
    setting: Setting, paths: Sequence[TimedPath], trainers: Sequence[Trainer], on_run: Callable[[], None]
) -> dict[str, list[float]]:
    """Seconds of a run of each path, one sample a round, after the losses of all were seen to be equal."""
    warm_up(paths, before_each=on_run)
    samples = timed_rounds(paths, calls=calls(setting), rounds=setting.rounds, order=random.Random(0), on_run=on_run)
    check_equal(trainers)
    return samples


def _ms_a_step(seconds: Sequence[float]) -> Spread:
    return Spread.of([1e3 * value / UPDATE_STEPS for value in seconds])
