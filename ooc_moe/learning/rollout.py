"""Lets the agent play in the environments of one game, and returns the rollout that PPO learns from.

A rollout consists of segments: `context` consecutive steps of every environment. While it acts, the agent attends only to frames of the
same segment, so that training can repeat exactly what acting computed.

Letters: B segments, T steps of a segment (or of the rollout, in TN), N environments, S stacked frames, H height, W width, L layers,
K experts of a token, D width of a token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ooc_moe.agent.agent import Agent
from ooc_moe.agent.segment import Segment
from ooc_moe.config.run import PPOConfig
from ooc_moe.envs import GameEnvs
from ooc_moe.learning.lookahead import schedule_acting
from ooc_moe.learning.ppo import advantages


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """What the agent saw and did in `rollout_steps` steps of all environments: the data for one update.

    The tensors have one row for each segment of each environment, so B = segments * environments and T = context.
    """

    frames_BTSHW: Tensor
    """The frames before each step."""
    starts_BT: Tensor
    """True where the frame begins an episode."""
    actions_BT: Tensor
    log_probs_BT: Tensor
    """The log-probabilities of the actions when they were chosen."""
    values_BT: Tensor
    """The values that the agent gave the frames."""
    advantages_BT: Tensor
    played_BT: Tensor
    """False where the environment ignored the action and reset itself."""
    experts_BTLK: Tensor
    """The experts to which the routers sent each frame."""
    episode_returns: list[float]
    """The raw returns of the episodes that ended in these steps."""
    reward_per_step: float
    """The mean of the unclipped reward over all steps of all environments."""

    @property
    def returns_BT(self) -> Tensor:
        """The targets that the value function learns: advantages plus the values at the time of acting."""
        return self.advantages_BT + self.values_BT


class Collector:
    """Lets the agent play one game and collects rollouts. `frames_NSHW` are the frames that the game's environments show now.

    Args:
        agent: plays. Its `context` is the length of a segment.
        envs: the game's environments.
        config: rollout length, discount and lambda.
        generator: draws actions and router noise.
        on_segment: called with the observations (N, S, H, W) at the start of each segment, before the agent acts on them.
        ahead: whether the experts that the next step will probably use are fetched in advance, where HBM has no room for all experts.
    """

    def __init__(
        self,
        agent: Agent,
        envs: GameEnvs,
        config: PPOConfig,
        *,
        generator: torch.Generator,
        on_segment: Callable[[Tensor], None],
        ahead: bool = True,
    ) -> None:
        self.agent, self.envs, self.config = agent, envs, config
        self._generator, self._on_segment, self._ahead = generator, on_segment, ahead

    def reset(self, seed: int) -> None:
        """Begins new episodes in all environments, which draw their randomness from `seed`."""
        self.frames_NSHW = torch.from_numpy(self.envs.reset(seed))
        self._starts_N = torch.ones(self.envs.num_envs, dtype=torch.bool)

    @torch.no_grad()
    def collect(self) -> Rollout:
        """Plays `rollout_steps` steps in every environment and returns them as a rollout."""
        segments: list[Segment] = []
        steps: list[dict[str, Tensor]] = []
        episode_returns: list[float] = []
        for t in range(self.config.rollout_steps):
            if t % self.agent.config.context == 0:
                self._on_segment(self.frames_NSHW)
                segments.append(self.agent.segment(self.envs.game, self.envs.num_envs))
            steps.append(self._step(segments[-1], episode_returns))
        time_first = {name: torch.stack([step[name] for step in steps]) for name in steps[0]}
        rewards_TN = time_first.pop("rewards")
        advantages_TN = advantages(
            rewards_TN=rewards_TN.clamp(-1.0, 1.0),
            values_TN=time_first["values"],
            next_values_TN=self._next_values(segments, time_first["values"], time_first["starts"], time_first.pop("tokens")),
            terminated_TN=time_first.pop("terminated"),
            truncated_TN=time_first.pop("truncated"),
            played_TN=time_first["played"],
            gamma=self.config.gamma,
            gae_lambda=self.config.gae_lambda,
        )
        rows = {name: self._as_rows(x) for name, x in (time_first | {"advantages": advantages_TN}).items()}
        return Rollout(
            frames_BTSHW=rows["frames"],
            starts_BT=rows["starts"],
            actions_BT=rows["actions"],
            log_probs_BT=rows["log_probs"],
            values_BT=rows["values"],
            advantages_BT=rows["advantages"],
            played_BT=rows["played"],
            experts_BTLK=rows["experts"],
            episode_returns=episode_returns,
            reward_per_step=float(rewards_TN.mean()),
        )

    def _step(self, segment: Segment, episode_returns: list[float]) -> dict[str, Tensor]:
        """Plays one step in every environment; adds the raw returns of the episodes that ended with it to `episode_returns`."""
        acted = self.agent.act(self.frames_NSHW, segment, starts_N=self._starts_N, generator=self._generator)
        experts_NLK = acted.experts_NLK.cpu()
        if any(cache.num_experts > cache.capacity_experts for cache in self.agent.caches):
            schedule_acting(self.agent.caches, [experts_NLK], ahead=self._ahead)
        step = self.envs.step(acted.actions_N.cpu().numpy())
        episode_returns += step.episode_returns
        now = {
            "frames": self.frames_NSHW,
            "tokens": acted.tokens_ND,
            "starts": self._starts_N,
            "actions": acted.actions_N.cpu(),
            "log_probs": acted.log_probs_N.cpu(),
            "values": acted.values_N.cpu(),
            "experts": experts_NLK,
            "rewards": torch.from_numpy(step.rewards),
            "terminated": torch.from_numpy(step.terminated),
            "truncated": torch.from_numpy(step.truncated),
            "played": torch.from_numpy(step.played),
        }
        self.frames_NSHW = torch.from_numpy(step.observations)
        self._starts_N = ~now["played"]
        return now

    def _next_values(self, segments: list[Segment], values_TN: Tensor, starts_TN: Tensor, tokens_TND: Tensor) -> Tensor:
        """Computes the value of the observation after each step (T, N), from the frames of that step's segment.

        Within a segment it is the value of the next step. After a segment's last step, the first frame of the next segment is added to the
        old segment and its value is computed there.
        """
        context = self.agent.config.context
        tokens_MND = torch.cat([tokens_TND[context::context], self.agent.encode(self.frames_NSHW).unsqueeze(0)])
        starts_MN = torch.cat([starts_TN[context::context], self._starts_N.unsqueeze(0)])
        ends_B = self.agent.values(tokens_MND.flatten(0, 1), Segment.joined(segments), starts_N=starts_MN.flatten())
        next_values_TN = values_TN.roll(-1, dims=0)
        next_values_TN[context - 1 :: context] = ends_B.view_as(starts_MN).cpu()
        return next_values_TN

    def _as_rows(self, x_TN: Tensor) -> Tensor:
        """Turns time-first data (segments * T, N, ...) into one row for each segment of each environment: (segments * N, T, ...)."""
        context = self.agent.config.context
        return x_TN.reshape(-1, context, *x_TN.shape[1:]).transpose(1, 2).reshape(-1, context, *x_TN.shape[2:])
