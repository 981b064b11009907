"""A run with constant disturbances (restarts and kill -9 of its daemon, cut connections, a slow disk) ends bit-equal to an undisturbed one.

python -m pytest tests/torture/test_soak.py -m slow --results tests/bench/results          # 20 minutes
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ooc_moe.config.agent import PRESETS
from ooc_moe.config.run import PPOConfig, RunConfig
from ooc_moe.run.train import Interrupted, Trainer, train
from ooc_moe_client.remote.store import RemoteStore
from tests.conftest import DaemonProcess
from tests.ooc_moe.runs import SILENT, assert_same_end, bodies, end_of, updates, wait_for, without_clock
from tests.torture.proxy import LossyProxy

COMMAND = "python -m pytest tests/torture/test_soak.py -m slow --results tests/bench/results --torture-seed"
SOAK_S, SOAK_S_SLOW = 60.0, 1200.0
PAUSE_S_MAX = 2.5
DISK_S = 0.002
AGENT = dataclasses.replace(PRESETS["tiny"], pool_size=3, hbm_experts=4)
GAMES = ("pixel/catch", "pixel/avoid", "pixel/toward", "pixel/cross")
PPO = PPOConfig(num_envs=4, rollout_steps=4, epochs=2, minibatch_segments=2)


class Trouble:
    """Disturbs a run after its first update, from a thread of its own. At the end it asks the run to stop, as Ctrl-C does."""

    def __init__(self, run_dir: Path, daemon: DaemonProcess, proxy: LossyProxy, seed: int, duration_s: float) -> None:
        self.counts: Counter[str] = Counter()
        self.error: BaseException | None = None
        self._daemon, self._proxy, self._random = daemon, proxy, random.Random(seed)
        self._run_dir, self._duration_s = run_dir, duration_s
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Trouble:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        if self.error is not None:
            raise self.error

    def _run(self) -> None:
        try:
            kinds: list[Callable[[], None]] = [self._kill, self._restart, self._cut, self._lose_answers]
            self._random.shuffle(kinds)
            following = itertools.cycle(kinds)
            wait_for(lambda: self._over.is_set() or updates(self._run_dir))
            ends_at = time.monotonic() + self._duration_s
            while time.monotonic() < ends_at and not self._over.wait(self._random.uniform(0.5, PAUSE_S_MAX)):
                kind = next(following)
                kind()
                self.counts[kind.__name__.removeprefix("_").replace("_", " ")] += 1
        except BaseException as error:
            self.error = error
        if not self._over.is_set():
            os.kill(os.getpid(), signal.SIGINT)

    def _kill(self) -> None:
        self._daemon.restart()

    def _restart(self) -> None:
        self._daemon.stop()
        self._daemon.start()

    def _cut(self) -> None:
        self._proxy.cut()

    def _lose_answers(self) -> None:
        self._proxy.lose_answers()
        self._over.wait(self._random.uniform(0, 0.2))
        self._proxy.cut()


@contextmanager
def stopped_after(update: int) -> Iterator[None]:
    """Makes Ctrl-C arrive in a given update of a run."""
    advance = Trainer._advance

    def advanced(trainer: Trainer) -> None:
        advance(trainer)
        if trainer.at.update == update:
            signal.raise_signal(signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_advance", advanced)
        yield


def soak(daemon: DaemonProcess, tmp_path: Path, seed: int, duration_s: float, *, plane: str, steps_per_game: int) -> dict[str, object]:
    """Runs once with disturbances and once without; returns what happened."""

    def config(run_dir: Path, target: str) -> RunConfig:
        return RunConfig(
            run_dir=run_dir,
            games=GAMES * 10_000,  # More updates than the time allows.
            agent=AGENT,
            ppo=PPO,
            steps_per_game=steps_per_game,
            eval_envs=2,
            eval_steps=4,
            checkpoint_every=2,
            store=target,
            plane=plane,
            seed=seed,
        )

    proxy = LossyProxy(daemon.target)
    shaken, calm = tmp_path / "shaken", tmp_path / "calm"
    with Trouble(shaken, daemon, proxy, seed, duration_s) as trouble, pytest.raises(Interrupted):
        train(config(shaken, proxy.target), SILENT)
    proxy.close()
    assert trouble.counts.keys() == {"kill", "restart", "cut", "lose answers"}
    reached = end_of(shaken, "latest.pt").progress
    began = time.monotonic()
    with stopped_after(reached.update), pytest.raises(Interrupted):
        train(config(calm, daemon.target), SILENT)
    calm_s = time.monotonic() - began
    assert without_clock(shaken) == without_clock(calm)
    assert_same_end(shaken, calm)
    store = RemoteStore(daemon.target)
    experts = bodies(store, "shaken/experts")
    assert experts == bodies(store, "calm/experts")
    store.close()
    last = updates(shaken)[-1]
    return {
        "trouble, s": round(duration_s),
        "the same in peace, s": round(calm_s),
        "daemon killed (kill -9)": trouble.counts["kill"],
        "daemon stopped and started": trouble.counts["restart"],
        "connections cut": trouble.counts["cut"],
        "answers lost, then cut": trouble.counts["lose answers"],
        "at random after, s": f"0.5 to {PAUSE_S_MAX:g}",
        "every read, write and sync of records slower by, ms": f"0 to {2000 * DISK_S:g}",
        "plane": plane,
        "games learned": reached.turn,
        "optimizer steps": reached.update * PPO.epochs * 2,
        "experts evicted from HBM": last["cache"]["evictions"],
        "experts written back": last["cache"]["write_backs"],
        "experts compared, all bytes equal": len(experts),
    }


@pytest.fixture
def daemon(start_daemon: Any) -> DaemonProcess:
    """A daemon with a slow disk, whose DRAM tier holds only some of the experts."""
    return start_daemon(dram_bytes="112KiB", command=(sys.executable, "-m", "tests.torture.slow_disk", str(DISK_S)))


@pytest.mark.timeout(300, method="thread")
def test_a_run_in_trouble_ends_bit_equal_to_the_undisturbed_run(daemon, tmp_path, seed):
    counts = soak(daemon, tmp_path, seed, SOAK_S, plane="stream", steps_per_game=80)
    assert counts["experts evicted from HBM"]


@pytest.mark.slow
@pytest.mark.timeout(7200, method="thread")
def test_20_minutes_of_trouble_change_nothing(daemon, tmp_path, seed, report):
    counts = soak(daemon, tmp_path, seed, SOAK_S_SLOW, plane="auto", steps_per_game=1600)
    report("soak", f"{COMMAND} {seed}", counts)
