"""Small whole runs for tests, and helpers that compare what two runs have written, bit for bit."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ooc_moe.config.agent import PRESETS
from ooc_moe.config.run import PPOConfig, RunConfig
from ooc_moe.metrics.log import Event, MetricsWriter, read_metrics
from ooc_moe.run.trainer import Trainer
from ooc_moe.session import checkpoint
from ooc_moe.session.daemon import embedded_daemon
from ooc_moe.session.session import open_session
from ooc_moe_client.hbm.stats import CacheStats
from ooc_moe_client.remote.store import RemoteStore
from ooc_moe_client.store import ExpertStore

# As tiny as "tiny", for the pixel games' own 10 x 10 frames.
PIXEL_AGENT = replace(PRESETS["tiny"], frame_size=10, stem_channels=(8,), stem_kernels=(4,), stem_strides=(2,))
SILENT = Console(quiet=True)
PPO = PPOConfig(num_envs=4, rollout_steps=8, epochs=2, minibatch_segments=4)


def tiny_run(run_dir: Path, **changes: Any) -> RunConfig:
    """Returns the configuration of a run with two updates in each of two Atari games. HBM and DRAM each hold half of the experts.

    So experts move through all tiers. `changes` overwrites fields.
    """
    fields = {"games": ("krull", "road_runner"), "steps_per_game": 64, "eval_envs": 2, "eval_steps": 12, "seed": 7}
    return RunConfig(run_dir=run_dir, **({"agent": PRESETS["tiny"], "ppo": PPO} | fields | changes))


def pixel_run(run_dir: Path, *, updates: int = 2, **changes: Any) -> RunConfig:
    """Returns the configuration of a run of two pixel games; an update takes a fraction of a second. `changes` overwrites fields."""
    fields = {"games": ("pixel/catch", "pixel/avoid"), "agent": PIXEL_AGENT, "ppo": PPO, "eval_envs": 2, "eval_steps": 0, "seed": 7}
    return RunConfig(run_dir=run_dir, steps_per_game=updates * PPO.num_envs * PPO.rollout_steps, **(fields | changes))


def play(config: RunConfig, store: ExpertStore) -> CacheStats:
    """Makes a new run in an open store, without writing the report. Returns what its caches counted."""
    for spec in config.agent.bank_specs(config.name, config.seed):
        store.create_bank(spec)
    return resume_in(config, store, new=True)


def resume_in(config: RunConfig, store: ExpertStore, *, new: bool = False) -> CacheStats:
    """Resumes a run in an open store from its last checkpoint, or begins it if `new`. Returns what its caches counted."""
    saved = None if new else end_of(config.run_dir, checkpoint.LATEST)
    if saved is not None:
        store.restore_snapshot(saved.snapshot_id)
    with open_session(config, store, config.agent.bank_names(config.name)) as session:
        writer = MetricsWriter(config.run_dir, tensorboard=False)
        trainer = Trainer(session, writer, SILENT)
        if saved is not None:
            trainer.load(saved)
        trainer.run()
        writer.close()
        return session.cache_stats()


def bodies(store: ExpertStore, bank: str) -> dict[int, bytes]:
    """Returns, by expert, all bytes of a bank's experts: parameters, moments and step counts."""
    spec = store.get_bank(bank).spec
    landing = {expert: bytearray(spec.layout.body_bytes) for expert in range(spec.num_experts)}
    for _ in store.fetch(bank, list(landing), into=lambda expert: memoryview(landing[expert])):
        pass
    return {expert: bytes(body) for expert, body in landing.items()}


@contextmanager
def run_store(run_dir: Path) -> Iterator[tuple[RemoteStore, str]]:
    """Opens the store of a finished run for the time of the block; yields it and the name of the run's bank."""
    config = RunConfig.read(run_dir)
    (bank,) = config.agent.bank_names(config.name)
    with embedded_daemon(run_dir / "store", dram_bytes=1 << 20) as target:
        store = RemoteStore(target)
        yield store, bank
        store.close()


def stored_experts(run_dir: Path, *, snapshot_id: int | None = None) -> dict[int, tuple[int, int]]:
    """Returns, for each written expert in a run's store, the checksums of its parameters and of its optimizer state.

    `snapshot_id`: of a snapshot's experts, instead of the bank's present ones.
    """
    with run_store(run_dir) as (store, bank):
        if snapshot_id is not None:
            store.fork_bank(bank, "look", snapshot_id=snapshot_id)
            bank = "look"
        found = {info.expert: (info.parameter_xxh3, info.optimizer_xxh3) for info in store.list_experts(bank) if info.version}
        if bank == "look":
            store.delete_bank(bank)
    return found


def end_of(run_dir: Path, name: str) -> checkpoint.Checkpoint:
    return checkpoint.load(run_dir / "checkpoints" / name)


def without_clock(run_dir: Path) -> list[Event]:
    """Returns the run's events, without the fields that depend on time or on the order in which background work happened to run."""
    kept = ("event", "step", "update", "game", "losses", "usage", "detector", "returns", "evaluated", "episode_return_mean", "believed")
    events = [event for event in read_metrics(run_dir) if event["event"] not in ("begun", "resumed")]
    return [{key: event[key] for key in kept if key in event} for event in events]


def assert_same_run(first: Path, second: Path) -> None:
    assert without_clock(first) == without_clock(second)
    assert stored_experts(first) == stored_experts(second)
    assert_same_end(first, second)


def assert_same_end(first: Path, second: Path, name: str = "latest.pt") -> None:
    """Asserts that two runs have equal checkpoint files `name`, apart from the noted length of the metrics file.

    These files hold what is outside the store: progress, dense parameters and moments, the detector, and the state of the random generator.
    """
    a, b = end_of(first, name), end_of(second, name)
    assert a.progress == b.progress
    assert_same_state(a.state | {"metrics_position": 0}, b.state | {"metrics_position": 0})


def assert_same_state(a: Any, b: Any, where: str = "state") -> None:
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same_state(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same_state(x, y, f"{where}[{index}]")
    else:
        assert a == b, where


def updates(run_dir: Path) -> list[Event]:
    return [event for event in read_metrics(run_dir) if event["event"] == "update"]


def wait_for(condition: Callable[[], object], timeout_s: float = 90) -> None:
    """Waits until `condition` holds, for example until another process has written a file. Fails after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the run made no progress"
        time.sleep(0.05)
