"""Plays the episodes from which every score is computed: a fixed number of whole episodes in each environment, within a limit of steps.

The agent, random play and constant actions are all measured in this way.

Letters: N environments, S stacked frames, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ooc_moe.envs import GameEnvs
from ooc_moe.envs.game import Array

Choose = Callable[[Tensor, Tensor], Array]
"""A function that chooses actions (N,) from frames (N, S, H, W) and from a bool tensor (N,) that marks frames which begin an episode."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Played:
    """The returns of the episodes that were played for one score."""

    returns: list[float]
    """Raw returns, environment after environment. An environment that ended too few episodes adds its unfinished one."""
    num_unfinished: int
    """How many of `returns` belong to unfinished episodes."""

    @property
    def return_mean(self) -> float:
        """The score that the episodes give: the mean of `returns`."""
        return float(np.mean(self.returns))


def play(envs: GameEnvs, choose: Choose, *, episodes: int, steps: int, seed: int) -> Played:
    """Plays `episodes` whole episodes in each environment, within a limit of `steps` steps, and returns the sum of rewards of each.

    An environment that has played its episodes goes on until all have, but its further episodes do not count. If `steps` cuts episodes
    off, the score favours short ones. So `steps` should leave room for all episodes and one step more, because the end of an episode only
    shows in the step after it.

    Args:
        envs: the environments. They are reset first.
        choose: chooses the actions of each step.
        episodes: how many episodes each environment plays.
        steps: the most steps in each environment.
        seed: seed of the reset.
    """
    frames_NSHW = torch.from_numpy(envs.reset(seed))
    starts_N = torch.ones(envs.num_envs, dtype=torch.bool)
    returns: list[list[float]] = [[] for _ in range(envs.num_envs)]
    running_N = np.zeros(envs.num_envs)
    for _ in range(steps):
        step = envs.step(choose(frames_NSHW, starts_N))
        for env in np.flatnonzero(~step.played):  # The step after the end of an episode begins the next one.
            returns[env].append(float(running_N[env]))
            running_N[env] = 0.0
        running_N += step.rewards
        frames_NSHW, starts_N = torch.from_numpy(step.observations), torch.from_numpy(~step.played)
        if min(map(len, returns)) >= episodes:
            break
    unfinished_N = [len(ended) < episodes for ended in returns]
    for ended, running, unfinished in zip(returns, running_N, unfinished_N, strict=True):
        if unfinished:
            ended.append(float(running))
    return Played(returns=[value for ended in returns for value in ended[:episodes]], num_unfinished=sum(unfinished_N))


def uniformly_random(envs: GameEnvs, seed: int) -> Choose:
    """Returns a function for `play` that chooses each of the 18 actions with equal probability, whatever the frames show."""
    rng = np.random.default_rng(seed)
    return lambda frames_NSHW, starts_N: rng.integers(0, envs.num_actions, envs.num_envs)


def always(envs: GameEnvs, action: int) -> Choose:
    """Returns a function for `play` that chooses `action` in every step, whatever the frames show."""
    actions_N = np.full(envs.num_envs, action)
    return lambda frames_NSHW, starts_N: actions_N
