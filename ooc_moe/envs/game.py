"""What every game looks like to the agent: `GameEnvs`, a batch of environments of one game, and the `Step` it answers with.

Atari games (atari.py) and pixel games (pixel.py) both follow it, autoreset included: the step after the end of a game ignores its action
and returns the first observation of the next game. Knows nothing of either.

Letters: N environments, S stacked frames, H height, W width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ooc_moe_wire.errors import InvalidRequest

NUM_ACTIONS = 18
"""Actions of every game, in the order of the Arcade Learning Environment: 0 does nothing, 1 fires, 2-5 are up, right, left, down, ..."""

Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """The outcome of one action in each environment. All arrays are the caller's to keep."""

    observations: Array
    """(N, S, H, W) uint8, the newest frame last. After a reset the older frames of the stack are zero."""
    rewards: Array
    """(N,) float32, raw."""
    terminated: Array
    """(N,) bool: the game is over, or a life was lost and the game goes on. Either way what follows has no part in this step's value."""
    truncated: Array
    """(N,) bool: cut off at the step limit; bootstrap from the value of `observations`."""
    played: Array
    """(N,) bool: False where the step began a new game: the action was ignored, the reward is 0, the observation is its first."""
    episode_returns: list[float]
    """Raw returns of the whole games that ended at this step, lost lives notwithstanding; in the order of the environments."""
    episode_lengths: list[int]
    """Their lengths in actions played."""


class GameEnvs(Protocol):
    """A batch of environments of one game. Not safe to share between threads."""

    @property
    def game(self) -> str:
        """The game's name, as given to `make`."""

    @property
    def num_envs(self) -> int:
        """N."""

    @property
    def num_actions(self) -> int:
        """Always `NUM_ACTIONS`."""

    @property
    def observation_shape(self) -> tuple[int, int, int]:
        """(S, H, W)."""

    def reset(self, seed: int) -> Array:
        """Starts all games anew and returns their first observations; equal seeds and equal actions give equal steps, bit for bit."""

    def step(self, actions: Array) -> Step:
        """Plays one action, an integer in 0..17, in each environment.

        Raises:
            InvalidRequest: the actions have another shape or dtype, or one is out of range; nothing was played.
        """

    def close(self) -> None:
        """Frees what the environments hold; they cannot be used afterwards."""


class Episodes:
    """Adds up the game that each environment is in."""

    def __init__(self, num_envs: int) -> None:
        self._returns_N = np.zeros(num_envs)
        self._lengths_N = np.zeros(num_envs, dtype=np.int64)

    def reset(self) -> None:
        """Forgets all games in progress."""
        self._returns_N[:] = 0
        self._lengths_N[:] = 0

    def add(self, rewards_N: Array, played_N: Array, ended_N: Array) -> tuple[list[float], list[int]]:
        """Counts a step; gives the returns and lengths of the games that ended with it."""
        self._returns_N += rewards_N
        self._lengths_N += played_N
        returns, lengths = self._returns_N[ended_N].tolist(), self._lengths_N[ended_N].tolist()
        self._returns_N[ended_N] = 0
        self._lengths_N[ended_N] = 0
        return returns, lengths


def check_actions(actions: Array, num_envs: int) -> None:
    """Raises InvalidRequest unless there is one integer in 0..17 for each environment."""
    if actions.shape != (num_envs,):
        raise InvalidRequest(f"actions: shape {actions.shape}, but there are {num_envs} environments")
    if not np.issubdtype(actions.dtype, np.integer):
        raise InvalidRequest(f"actions: dtype {actions.dtype} is not an integer")
    outside = (actions < 0) | (actions >= NUM_ACTIONS)
    if outside.any():
        env = int(outside.argmax())
        raise InvalidRequest(f"actions: {actions[env]} for environment {env} is not in 0..{NUM_ACTIONS - 1}")
