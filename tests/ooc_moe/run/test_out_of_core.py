"""Out-of-core training is exact: room for all experts, or for one, gives the same losses, parameters, moments and step counts, bit for bit.

A real daemon process, the real learner and agent, pixel games. The whole matrix:

    python -m pytest -m slow tests/ooc_moe/run/test_out_of_core.py
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_args
from unittest import mock

import pytest
import torch

from ooc_moe.config.agent import PRESETS, AgentConfig
from ooc_moe.config.run import PPOConfig, PrefetchSource, RunConfig
from ooc_moe.learning import learner, ppo
from ooc_moe.learning.ppo import clipped_loss
from ooc_moe_client.hbm.stats import CacheStats
from ooc_moe_client.remote.store import RemoteStore
from ooc_moe_client.store import Plane
from tests.conftest import DaemonProcess
from tests.ooc_moe.runs import assert_same_end, bodies, play, without_clock

# Not by a signal: a cache that waits for ever would wait again while it is closed.
pytestmark = pytest.mark.timeout(120, method="thread")

# Two layers with a pool of three each: a step needs six experts, a layer three.
AGENT = dataclasses.replace(PRESETS["tiny"], num_experts=16, pool_size=3)
PER_LAYER = dataclasses.replace(AGENT, banks="per-layer", num_experts=8)
TOKEN = dataclasses.replace(AGENT, routing="token", num_experts=6)
ALL, QUARTER, ONE_LAYER, LESS, ONE = 16, 4, 3, 2, 1
OPTIMIZER_STEPS = 64
PPO = PPOConfig(num_envs=4, rollout_steps=8, epochs=4, minibatch_segments=2)  # 16 optimizer steps from each of 4 rollouts.


@dataclass(frozen=True)
class Variant:
    """What may differ between two runs without making a difference."""

    hbm_experts: int
    plane: str
    prefetch: str
    device: str = "cpu"


EVERYTHING_RESIDENT = Variant(ALL, "stream", "off")


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one run computed."""

    run_dir: Path
    losses: list[dict[str, float]]
    """Of each optimizer step."""
    experts: list[dict[int, bytes]]
    """Of each bank: parameters, moments and step count of every expert."""
    stats: CacheStats


def assert_equal(one: Result, other: Result) -> None:
    assert one.losses == other.losses
    assert one.experts == other.experts
    assert without_clock(one.run_dir) == without_clock(other.run_dir)
    assert_same_end(one.run_dir, other.run_dir)


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """Its DRAM holds a part of the experts."""
    daemon = DaemonProcess(tmp_path_factory.mktemp("daemon") / "store", dram_bytes="192KiB").start()
    yield daemon
    daemon.close()


@pytest.fixture(scope="module")
def train(daemon: DaemonProcess, tmp_path_factory: pytest.TempPathFactory) -> Callable[[AgentConfig, Variant], Result]:
    """Trains two games, evaluates after each, and gives what came out. Asked again for the same, it gives the same result."""

    @cache
    def run(agent: AgentConfig, variant: Variant) -> Result:
        config = RunConfig(
            run_dir=tmp_path_factory.mktemp("run"),
            games=("pixel/catch", "pixel/avoid"),
            agent=dataclasses.replace(agent, hbm_experts=variant.hbm_experts),
            ppo=PPO,
            steps_per_game=64,
            eval_envs=2,
            eval_steps=6,
            plane=variant.plane,
            prefetch=variant.prefetch,  # type: ignore[arg-type]
            device=variant.device,
        )
        store = RemoteStore(daemon.target, plane=Plane(variant.plane))
        assert store.plane is Plane(variant.plane)
        with losses_of_each_step() as losses:
            stats = play(config, store)
        experts = [bodies(store, bank) for bank in agent.bank_names(config.name)]
        store.close()
        return Result(run_dir=config.run_dir, losses=losses, experts=experts, stats=stats)

    return run


@contextmanager
def losses_of_each_step() -> Iterator[list[dict[str, float]]]:
    losses: list[dict[str, float]] = []

    def observed(*arguments: Any, **options: Any) -> ppo.Loss:
        loss = clipped_loss(*arguments, **options)
        losses.append({field.name: float(getattr(loss, field.name).detach()) for field in dataclasses.fields(loss)})
        return loss

    with mock.patch.object(learner, "clipped_loss", observed):
        yield losses


def step_counts(agent: AgentConfig, result: Result) -> list[int]:
    layout = agent.expert_layout()
    return [int(layout.arrays(body)["step"][0]) for bank in result.experts for body in bank.values()]


def check(train: Callable[[AgentConfig, Variant], Result], agent: AgentConfig, variant: Variant) -> None:
    """The variant computes what training with everything resident computes, and had to move experts for it."""
    whole, part = train(agent, dataclasses.replace(EVERYTHING_RESIDENT, device=variant.device)), train(agent, variant)
    assert len(whole.losses) == OPTIMIZER_STEPS
    assert max(step_counts(agent, whole)) > OPTIMIZER_STEPS // 4
    assert whole.stats.evictions == 0
    assert_equal(part, whole)
    if variant.hbm_experts < ALL:
        assert part.stats.refetches > OPTIMIZER_STEPS, "backward found all that it needed: this capacity tests nothing"
        assert part.stats.write_backs > OPTIMIZER_STEPS


@pytest.mark.parametrize(
    ("agent", "variant"),
    [
        pytest.param(AGENT, Variant(QUARTER, "local", "detector"), id="quarter"),
        pytest.param(AGENT, Variant(ONE_LAYER, "stream", "off"), id="one layer"),
        pytest.param(AGENT, Variant(ONE, "stream", "schedule"), id="one"),
        pytest.param(PER_LAYER, Variant(LESS, "local", "schedule"), id="one in each of two banks"),
    ],
)
def test_training_with_room_for_few_experts_computes_the_same_bits(train, agent, variant):
    check(train, agent, variant)


@pytest.mark.gpu
@pytest.mark.parametrize("plane", ["stream", "local"])
@pytest.mark.parametrize("hbm_experts", [QUARTER, ONE])
def test_on_a_gpu_too(train, monkeypatch, hbm_experts, plane):
    """From the daemon through pinned staging into the slab, and back."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        check(train, AGENT, Variant(hbm_experts, plane, "schedule", device="cuda"))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.slow
@pytest.mark.parametrize("prefetch", get_args(PrefetchSource))
@pytest.mark.parametrize("plane", ["stream", "local"])
@pytest.mark.parametrize("hbm_experts", [ALL, QUARTER, ONE_LAYER, LESS, ONE])
@pytest.mark.parametrize("agent", [AGENT, PER_LAYER, TOKEN], ids=["shared", "per-layer", "token"])
def test_every_capacity_plane_and_prefetch_computes_the_same_bits(train, agent, hbm_experts, plane, prefetch):
    hbm_experts = max(hbm_experts, agent.num_banks)  # One slot in each cache.
    check(train, agent, Variant(hbm_experts, plane, prefetch))
