"""A made-up run, without training: its metrics are written through MetricsWriter, as training writes those of a real run."""

import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from ooc_moe.metrics.log import MetricsWriter
from ooc_moe_client.hbm.stats import PrefetchCount

GAMES = ("krull", "road_runner", "crazy_climber")
RANDOM = {"krull": 1000.0, "road_runner": 50.0, "crazy_climber": 3000.0}
# The score of each known game after each phase: krull falls from 2600 to 2200, road_runner keeps what it has.
SCORES = [{"krull": 2600.0}, {"krull": 2400.0, "road_runner": 1250.0}, {"krull": 2200.0, "road_runner": 1250.0, "crazy_climber": 6000.0}]
UPDATES_PER_GAME = 20
STEPS_PER_UPDATE = 1024
EXPERT_BYTES = 3 * 132 * 1024


class MadeUpRun:
    """Writes the metrics of a run, one phase of training or evaluation at a call.

    The logged counters of the tiers are those of a cache of 8 experts over a daemon with room for 16 in DRAM.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.rng = np.random.default_rng(0)
        self.step = self.update = 0
        self.cache: dict[str, Any] = {
            "bank": run_dir.name,
            "capacity": 8,
            "resident": 0,
            "dirty": 0,
            "expert_bytes": EXPERT_BYTES,
            **dict.fromkeys(("accesses", "hits", "misses", "refetches", "evictions", "write_backs", "bytes_in", "bytes_out"), 0),
            **{f"prefetch_{what}{unit}": 0 for what in get_args(PrefetchCount) for unit in ("", "_bytes")},
            "stall_s": 0.0,
            "fetched_from": {},
            "ahead": {},
        }
        run_dir.mkdir(parents=True)
        config = {
            "games": GAMES,
            "steps_per_game": UPDATES_PER_GAME * STEPS_PER_UPDATE,
            "store": None,
            "prefetch": "detector",
            "agent": {"num_experts": 32, "hbm_experts": 8, "dram_experts": 16, "banks": "shared", "num_layers": 2},
        }
        (run_dir / "config.json").write_text(json.dumps(config))
        self.writer = MetricsWriter(run_dir, tensorboard=False)

    def train(self, phase: int, updates: int = UPDATES_PER_GAME) -> None:
        game = GAMES[phase]
        where = {"step": self.step, "update": self.update, "game": game}
        self.writer.log("switch", **where, phase=phase, **{"from": GAMES[phase - 1] if phase else None, "to": game})
        for index in range(updates):
            self.step, self.update = self.step + STEPS_PER_UPDATE, self.update + 1
            self._count(misses=4 if index == 0 else int(self.rng.integers(0, 2)), accesses=200, first=index == 0)
            progress = index / UPDATES_PER_GAME
            self.writer.log(
                "update",
                step=self.step,
                update=self.update,
                game=game,
                losses={"policy": -0.01, "value": 0.5},
                episode_return_mean=RANDOM[game] * (1 + progress) if index % 3 == 2 else None,
                episodes=index % 3,
                reward_per_step=RANDOM[game] / 1000 * (1 + 1.5 * progress) + self.rng.normal(0, 0.05),
                steps_per_s=1200.0,
                cache=self.cache,
                store=self._store(),
                usage={layer: {4 * phase + e: int(n) for e, n in enumerate((900, 600, 400, 148))} for layer in (0, 1)},
                detector={"accuracy": min(1.0, 0.5 + index / 10), "loss": 0.3, "confidence": 0.9},
            )

    def evaluate(self, phase: int) -> None:
        for game, score in SCORES[phase].items():
            others = [name for name in GAMES[: phase + 1] if name != game]
            column = GAMES.index(game)
            self.writer.log(
                "evaluation",
                step=self.step,
                update=self.update,
                game=GAMES[phase],
                phase=phase,
                evaluated=game,
                returns=[0.9 * score, score, 1.1 * score],
                return_mean=score,
                random_mean=RANDOM[game],
                episodes_truncated=3,
                believed={game: 0.96, **{name: 0.04 / len(others) for name in others}} if others else {game: 1.0},
                steps_to_detect=12.5,
                detector_accuracy=0.99,
                nearest_mean_accuracy=0.88,
                false_switches=1.5,
                prefetch_recall=0.75,
                usage={"0": {4 * column: 300, 4 * column + 1: 100}, "1": {4 * column: 80, (4 * column + 4) % 12: 20}},
                cache={"accesses": 0, "hits": 0},
            )

    def finish(self) -> None:
        self.writer.log("done", step=self.step, update=self.update)

    def _count(self, *, misses: int, accesses: int, first: bool) -> None:
        cache = self.cache
        prefetched = 4 if first else 0
        cache["accesses"] += accesses
        cache["misses"] += misses
        cache["hits"] += accesses - misses
        cache["resident"] = min(8, cache["resident"] + misses + prefetched)
        for fate, count in (("issued", prefetched), ("useful", prefetched // 2), ("late", prefetched // 4), ("wasted", prefetched // 4)):
            cache[f"prefetch_{fate}"] += count
            cache[f"prefetch_{fate}_bytes"] += count * EXPERT_BYTES
        ahead = 2 * self.update
        cache["ahead"] = {"issued": ahead, "issued_bytes": ahead * EXPERT_BYTES, "useful": ahead, "useful_bytes": ahead * EXPERT_BYTES}
        cache["bytes_in"] += (misses + prefetched) * EXPERT_BYTES
        cache["bytes_out"] += 2 * EXPERT_BYTES
        cache["stall_s"] += 0.01 * misses
        tier = "seed" if first else "dram"
        cache["fetched_from"] = {**cache["fetched_from"], tier: cache["fetched_from"].get(tier, 0) + misses + prefetched}

    def _store(self) -> dict[str, dict[str, int]]:
        written = 2 * self.update * EXPERT_BYTES
        held = min(self.update, 16) * EXPERT_BYTES
        return {
            "dram": {"capacity_bytes": 16 * EXPERT_BYTES, "used_bytes": held, "read_bytes": written, "written_bytes": held},
            "nvme": {"capacity_bytes": 10**12, "used_bytes": held, "read_bytes": written // 4, "written_bytes": written},
            "total": {"hits": self.update, "misses": self.update // 4},
        }


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a made-up run that trained and evaluated all three games. Tests read it, and write nothing but its report."""
    return _made_up(tmp_path_factory.mktemp("finished"), phases=3)


@pytest.fixture
def half_a_run(tmp_path: Path) -> Path:
    """The directory of a made-up run that stopped after the first of three games, which is trained and evaluated."""
    return _made_up(tmp_path, phases=1)


def _made_up(directory: Path, *, phases: int) -> Path:
    run = MadeUpRun(directory / "made-up")
    for phase in range(phases):
        run.train(phase)
        run.evaluate(phase)
    if phases == len(GAMES):
        run.finish()
    return run.run_dir
