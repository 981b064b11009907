"""The protocol behind every score: each environment plays so many whole games, one after another, within a number of steps.

The agent, random play and constant actions are all measured by it. Knows nothing of any of them.

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
"""Frames (N, S, H, W), and where they begin a game (N,) -> actions (N,)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Played:
    """What was played for a score, raw."""

    returns: list[float]
    """Of whole games, environment after environment; of the unfinished game too where an environment ended too few."""
    num_unfinished: int
    """How many of `returns` are of unfinished games."""

    @property
    def return_mean(self) -> float:
        """The score."""
        return float(np.mean(self.returns))


def play(envs: GameEnvs, choose: Choose, *, episodes: int, steps: int, seed: int) -> Played:
    """Plays `episodes` whole games in each environment, in at most `steps` steps; whoever is through plays on, which does not count.

    Where `steps` cuts some games off, what counts leans towards short ones: give it room for all, and a step more, for that a game has
    ended shows at the step after.
    """
    frames_NSHW = torch.from_numpy(envs.reset(seed))
    starts_N = torch.ones(envs.num_envs, dtype=torch.bool)
    returns: list[list[float]] = [[] for _ in range(envs.num_envs)]
    running_N = np.zeros(envs.num_envs)
    for _ in range(steps):
        step = envs.step(choose(frames_NSHW, starts_N))
        for env in np.flatnonzero(~step.played):  # The step after an end begins the next game.
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
    """Chooses each of the 18 actions equally often, whatever the frames show."""
    rng = np.random.default_rng(seed)
    return lambda frames_NSHW, starts_N: rng.integers(0, envs.num_actions, envs.num_envs)


def always(envs: GameEnvs, action: int) -> Choose:
    """Chooses one action for ever."""
    actions_N = np.full(envs.num_envs, action)
    return lambda frames_NSHW, starts_N: actions_N
