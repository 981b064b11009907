"""The interface of every game: `GameEnvs` is a batch of environments of one game, `Step` holds the results of one action in each of them.

Atari games (atari.py) and pixel games (pixel.py) both have this interface. Environments reset themselves: the step after the end of an
episode ignores its action and returns the first observation of the next episode.

Letters: N environments, S stacked frames, H height, W width.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ooc_moe_wire.errors import InvalidRequest

NUM_ACTIONS = 18
"""The number of actions of every game, in the order of the Arcade Learning Environment: 0 does nothing, 1 fires, 2 to 5 are up, right, left
and down, and so on."""

Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """The results of playing one action in each of the N environments. The caller may keep the arrays: later steps do not change them."""

    observations: Array
    """(N, S, H, W) uint8, the newest frame last. After a reset the older frames of the stack are zero."""
    rewards: Array
    """(N,) float32, not clipped."""
    terminated: Array
    """(N,) bool: the episode ended; or a life was lost, and the episode goes on. Either way, a learner must not credit this step with later
    rewards."""
    truncated: Array
    """(N,) bool: the step limit cut the episode off. In place of the missing rewards, the learner takes its value of `observations`."""
    played: Array
    """(N,) bool: whether the action was played. False where the step began an episode instead: there the action was ignored, the reward is
    0, and the observation is the episode's first."""
    episode_returns: list[float]
    """The sum of rewards of each episode that ended at this step, in the order of the environments. A lost life does not end an episode."""
    episode_lengths: list[int]
    """The lengths of these episodes, in actions played."""


class GameEnvs(Protocol):
    """A batch of environments of one game, which are stepped together. Only one thread may use it."""

    @property
    def game(self) -> str:
        """The game's name, as given to `make`."""

    @property
    def num_envs(self) -> int:
        """The number of environments, N."""

    @property
    def num_actions(self) -> int:
        """The number of actions, which is always `NUM_ACTIONS`."""

    @property
    def observation_shape(self) -> tuple[int, int, int]:
        """The shape (S, H, W) of one environment's observation."""

    def reset(self, seed: int) -> Array:
        """Begins a new episode in each environment and returns the first observations, (N, S, H, W) uint8.

        Equal seeds and equal actions give equal steps, bit for bit.
        """

    def step(self, actions: Array) -> Step:
        """Plays one action, an integer in 0..17, in each environment and returns the results.

        Raises:
            InvalidRequest: `actions` has not the shape (N,) or no integer dtype, or an action is out of range. No action was played then.
        """

    def close(self) -> None:
        """Frees the memory and threads of the environments. They cannot be used afterwards."""


class Episodes:
    """Adds up the rewards and the steps of the episode that each environment is playing, to report the two sums when the episode ends."""

    def __init__(self, num_envs: int) -> None:
        self._returns_N = np.zeros(num_envs)
        self._lengths_N = np.zeros(num_envs, dtype=np.int64)

    def reset(self) -> None:
        """Sets the sums of rewards and steps of all environments to 0."""
        self._returns_N[:] = 0
        self._lengths_N[:] = 0

    def step(
        self, observations: Array, *, rewards_N: Array, terminated_N: Array, truncated_N: Array, played_N: Array, ended_N: Array
    ) -> Step:
        """Adds the rewards of one action in each environment to the sums, and makes the `Step` that the environments return.

        Where `ended_N` is True, an episode has ended: its return and length go into the `Step`, and its sums begin again at 0. The other
        arguments are the fields of the `Step`.
        """
        self._returns_N += rewards_N
        self._lengths_N += played_N
        returns, lengths = self._returns_N[ended_N].tolist(), self._lengths_N[ended_N].tolist()
        self._returns_N[ended_N] = 0
        self._lengths_N[ended_N] = 0
        return Step(
            observations=observations,
            rewards=rewards_N,
            terminated=terminated_N,
            truncated=truncated_N,
            played=played_N,
            episode_returns=returns,
            episode_lengths=lengths,
        )


def check_actions(actions: Array, num_envs: int) -> None:
    """Raises InvalidRequest unless `actions` has one integer in 0..17 for each of `num_envs` environments."""
    if actions.shape != (num_envs,):
        raise InvalidRequest(f"actions: shape {actions.shape}, but there are {num_envs} environments")
    if not np.issubdtype(actions.dtype, np.integer):
        raise InvalidRequest(f"actions: dtype {actions.dtype} is not an integer")
    outside = (actions < 0) | (actions >= NUM_ACTIONS)
    if outside.any():
        env = int(outside.argmax())
        raise InvalidRequest(f"actions: {actions[env]} for environment {env} is not in 0..{NUM_ACTIONS - 1}")


def unknown_game(name: str, known: Iterable[str]) -> InvalidRequest:
    """Makes the error for the name of a game that does not exist. It names the most similar game of `known`."""
    from ooc_moe_wire.command_line import closest

    return InvalidRequest(f"game: {name!r} is unknown{closest(name.lower(), known)} (`ooc-moe games` lists all games)")
