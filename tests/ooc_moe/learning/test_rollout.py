"""What a rollout records, against environments whose every step is scripted."""

import dataclasses

import numpy as np
import pytest
import torch

from ooc_moe.agent.agent import Agent
from ooc_moe.config.agent import PRESETS
from ooc_moe.config.run import PPOConfig
from ooc_moe.envs import Step
from ooc_moe.learning.ppo import advantages
from ooc_moe.learning.rollout import Collector
from ooc_moe_client.hbm.cache import ExpertCache
from ooc_moe_client.in_memory import InMemoryStore

CONFIG = dataclasses.replace(PRESETS["tiny"], router_noise=0.0)
PPO = PPOConfig(num_envs=2, rollout_steps=8)
# Environment 0 loses a life at step 1 and ends at step 3 (step 4 resets it); environment 1 is cut off at step 5 (step 6 resets it).
TERMINATED = {(1, 0), (3, 0)}
TRUNCATED = {(5, 1)}
RESETS = {(4, 0), (6, 1)}


class ScriptedEnvs:
    """Step t shows frames full of t + 1 and rewards t, in environment 1 as a loss of ten times that; nothing on a reset."""

    game, num_envs, num_actions = "scripted", 2, 18
    observation_shape = (CONFIG.frame_stack, CONFIG.frame_size, CONFIG.frame_size)

    def __init__(self) -> None:
        self.t = 0

    def _frames(self, value: int) -> np.ndarray:
        return np.full((2, *self.observation_shape), value, dtype=np.uint8)

    def reset(self, seed: int) -> np.ndarray:
        self.t = 0
        return self._frames(0)

    def step(self, actions: np.ndarray) -> Step:
        def happens(cases):
            return np.array([(self.t, env) in cases for env in range(2)])

        played = ~happens(RESETS)
        step = Step(
            observations=self._frames(self.t + 1),
            rewards=np.where(played, np.array([self.t, -10 * self.t]), 0).astype(np.float32),
            terminated=happens(TERMINATED),
            truncated=happens(TRUNCATED),
            played=played,
            episode_returns=[6.0] if (self.t, 0) == (3, 0) else [],
            episode_lengths=[4] if (self.t, 0) == (3, 0) else [],
        )
        self.t += 1
        return step

    def close(self) -> None: ...


@pytest.fixture
def played():
    store = InMemoryStore()
    (spec,) = CONFIG.bank_specs("run", 0)
    store.create_bank(spec)
    with ExpertCache(store, spec.name, capacity_experts=8) as cache:
        agent = Agent(CONFIG, [cache], seed=0)
        agent.add_game("scripted")
        seen: list[torch.Tensor] = []
        collector = Collector(agent, ScriptedEnvs(), PPO, generator=torch.Generator().manual_seed(0), on_segment=seen.append)
        collector.reset(0)
        rollout = collector.collect()
        yield agent, rollout, seen


def by_step(rows: torch.Tensor) -> torch.Tensor:
    """(segments * environments, context, ...) -> (steps, environments, ...)."""
    return rows.unflatten(0, (-1, 2)).transpose(1, 2).flatten(0, 1)


def test_rows_are_segments_of_single_environments_in_order(played):
    _, rollout, seen = played
    assert rollout.frames_BTSHW[:, :, 0, 0, 0].tolist() == [[0, 1, 2, 3], [0, 1, 2, 3], [4, 5, 6, 7], [4, 5, 6, 7]]
    assert [int(frames[0, 0, 0, 0]) for frames in seen] == [0, 4]


def test_an_episode_starts_with_the_frame_after_the_step_that_was_not_played(played):
    _, rollout, _ = played
    starts_TN, played_TN = by_step(rollout.starts_BT), by_step(rollout.played_BT)
    assert {(t, n) for t in range(8) for n in range(2) if starts_TN[t, n]} == {(0, 0), (0, 1), (5, 0), (7, 1)}
    assert {(t, n) for t in range(8) for n in range(2) if not played_TN[t, n]} == RESETS


def test_raw_returns_are_kept_and_rewards_are_clipped_for_the_learner_alone(played):
    _, rollout, _ = played
    assert rollout.episode_returns == [6.0]
    raw = [(0 if (t, n) in RESETS else t * (-10 if n else 1)) for t in range(8) for n in range(2)]
    assert rollout.reward_per_step == pytest.approx(sum(raw) / 16)


def test_advantages_bootstrap_each_segment_with_its_own_context_and_cut_at_ends(played):
    agent, rollout, _ = played
    values_TN = by_step(rollout.values_BT)
    # What follows a segment's last step is valued as its context + 1st frame.
    with torch.no_grad():
        after = [4, 8]
        ends = []
        for index, value in enumerate(after):
            rows = slice(2 * index, 2 * index + 2)
            last = torch.full_like(rollout.frames_BTSHW[rows, :1], value)
            starts = torch.zeros(2, 1, dtype=torch.bool)  # Steps 3 and 7 were both played: their frames go on.
            seen = agent(
                torch.cat([rollout.frames_BTSHW[rows], last], dim=1),
                game="scripted",
                starts_BT=torch.cat([rollout.starts_BT[rows], starts], dim=1),
            )
            ends.append(seen.value_BT[:, -1])
    next_TN = torch.cat([values_TN[1:4], ends[0][None], values_TN[5:8], ends[1][None]])

    def flags(cases):
        return torch.tensor([[(t, n) in cases for n in range(2)] for t in range(8)])

    expected = advantages(
        rewards_TN=torch.tensor([[0.0 if (t, n) in RESETS or t == 0 else (1.0, -1.0)[n] for n in range(2)] for t in range(8)]),
        values_TN=values_TN,
        next_values_TN=next_TN,
        terminated_TN=flags(TERMINATED),
        truncated_TN=flags(TRUNCATED),
        played_TN=~flags(RESETS),
        gamma=PPO.gamma,
        gae_lambda=PPO.gae_lambda,
    )
    torch.testing.assert_close(by_step(rollout.advantages_BT), expected, atol=1e-5, rtol=0)
