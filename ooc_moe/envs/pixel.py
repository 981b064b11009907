"""Small games with known best play on a grid of 10 x 10 cells: fast stand-ins for Atari in tests and studies.

Most games come in conflicting pairs: both games of a pair have the same layout, dynamics and actions, but opposite rewards. Their frames
differ in one lit cell in the top row:

    catch / avoid      balls fall near a paddle; catch them, or let them pass
    toward / away      a lamp lights up on the left or on the right; push the stick toward it, or away from it
    cross              walk up through four lanes of traffic; this game has no partner

blind-toward and blind-away are a pair without the lit cell: no frame shows which of them is played, so no agent can play both well.

A suffix of the name changes the picture, but not what the joystick does:

    @1, @2, ...        a faint background, different for each number
    @flip              the picture upside down
    @turn              rows and columns of the picture exchanged

Everything is vectorised over environments, and all random numbers come from one generator that `reset` seeds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ooc_moe.envs.game import NUM_ACTIONS, Array, Episodes, Step, check_actions, unknown_game
from ooc_moe_wire.errors import InvalidRequest

GRID = 10
"""Cells along each side."""
BRIGHT, MEDIUM, BACKGROUND_MAX = 255, 150, 60

# The stick's direction (to the right, and up) in each of the 18 actions. A diagonal has both; the button does nothing.
_RIGHT_A = np.array([0, 0, 0, 1, -1, 0, 1, -1, 1, -1, 0, 1, -1, 0, 1, -1, 1, -1])
_UP_A = np.array([0, 0, 1, 0, 0, -1, 1, 1, -1, -1, 1, 0, 0, -1, 1, 1, -1, -1])
_NOOP, _UP, _RIGHT, _LEFT = 0, 2, 3, 4

_VIEWS: dict[str, Callable[[Array], Array]] = {
    "": lambda canvas_NYX: canvas_NYX,
    "flip": lambda canvas_NYX: canvas_NYX[:, ::-1],
    "turn": lambda canvas_NYX: canvas_NYX.swapaxes(1, 2),
}
"""Suffix of a game's name -> function that turns the cells as the rules draw them into the cells that are shown."""


class _Rules(Protocol):
    """The rules of one pixel game: its state in N environments, how actions change it, and how it is drawn."""

    def begin(self, rng: np.random.Generator, new_N: Array) -> None:
        """Begins a new episode in the environments where `new_N` is True."""

    def advance(self, rng: np.random.Generator, right_N: Array, up_N: Array) -> tuple[Array, Array, Array]:
        """Moves every game on by one step with its joystick's position; returns rewards, terminated and truncated, each (N,).

        The position is -1, 0 or 1 in each direction: `right_N` (-1 is left) and `up_N` (-1 is down).
        """

    def draw(self, canvas_NYX: Array) -> None:
        """Draws the N games into `canvas_NYX` (rows Y, columns X), which holds the background."""

    def best_actions(self) -> Array:
        """The best action (0..17) in each environment, (N,)."""


class _Falling:
    """The rules of catch and avoid: balls fall within reach of a paddle that is three cells wide.

    The reward is `sign` for a caught ball and -`sign` for a missed one.
    """

    BALLS = 5
    REACH = 7
    TOP, BOTTOM = 1, GRID - 1

    def __init__(self, num_envs: int, sign: int) -> None:
        self._sign = sign
        self._paddle_N, self._x_N, self._y_N, self._left_N = np.zeros((4, num_envs), dtype=np.int64)

    def begin(self, rng: np.random.Generator, new_N: Array) -> None:
        self._paddle_N = np.where(new_N, rng.integers(1, GRID - 1, len(new_N)), self._paddle_N)
        self._left_N = np.where(new_N, self.BALLS, self._left_N)
        self._drop(rng, new_N)

    def _drop(self, rng: np.random.Generator, new_N: Array) -> None:
        """Drops a new ball in the environments where `new_N` is True.

        The ball hits a resting paddle 3 times out of 7, wherever the paddle is, so that resting in a corner gains nothing.
        """
        first_N = np.clip(self._paddle_N - self.REACH // 2, 0, GRID - self.REACH)
        self._x_N = np.where(new_N, first_N + rng.integers(0, self.REACH, len(new_N)), self._x_N)
        self._y_N = np.where(new_N, self.TOP, self._y_N)

    def advance(self, rng: np.random.Generator, right_N: Array, up_N: Array) -> tuple[Array, Array, Array]:
        self._paddle_N = np.clip(self._paddle_N + right_N, 1, GRID - 2)
        self._y_N = self._y_N + 1
        down_N = self._y_N == self.BOTTOM
        caught_N = np.abs(self._paddle_N - self._x_N) <= 1
        rewards_N = np.where(down_N, np.where(caught_N, self._sign, -self._sign), 0)
        self._left_N = self._left_N - down_N
        over_N = self._left_N == 0
        self._drop(rng, down_N & ~over_N)
        return rewards_N, over_N, np.zeros_like(over_N)

    def draw(self, canvas_NYX: Array) -> None:
        rows = np.arange(len(canvas_NYX))
        for offset in (-1, 0, 1):
            canvas_NYX[rows, self.BOTTOM, self._paddle_N + offset] = MEDIUM
        canvas_NYX[rows, self._y_N, self._x_N] = BRIGHT

    def best_actions(self) -> Array:
        offset_N = self._x_N - self._paddle_N
        toward_N = np.where(offset_N > 0, _RIGHT, _LEFT)
        if self._sign > 0:
            return np.where(offset_N == 0, _NOOP, toward_N)
        # Flee to the side away from the ball, unless a wall is there.
        flee_N = np.where(offset_N > 0, _LEFT, _RIGHT)
        cornered_N = np.where(offset_N > 0, self._x_N < 3, self._x_N > GRID - 4)
        return np.where(cornered_N, toward_N, flee_N)


class _Lamp:
    """The rules of toward and away: in each step a lamp lights up in the left or the right half.

    The reward is `sign` for moving the joystick to that side, and -`sign` for the other side.
    """

    LAMPS = 20

    def __init__(self, num_envs: int, sign: int) -> None:
        self._sign = sign
        self._x_N, self._y_N, self._left_N = np.zeros((3, num_envs), dtype=np.int64)

    def begin(self, rng: np.random.Generator, new_N: Array) -> None:
        self._left_N = np.where(new_N, self.LAMPS, self._left_N)
        self._light(rng, new_N)

    def _light(self, rng: np.random.Generator, new_N: Array) -> None:
        self._x_N = np.where(new_N, rng.integers(0, GRID, len(new_N)), self._x_N)
        self._y_N = np.where(new_N, rng.integers(2, GRID, len(new_N)), self._y_N)

    def advance(self, rng: np.random.Generator, right_N: Array, up_N: Array) -> tuple[Array, Array, Array]:
        rewards_N = self._sign * right_N * np.where(self._x_N >= GRID // 2, 1, -1)
        self._left_N = self._left_N - 1
        over_N = self._left_N == 0
        self._light(rng, ~over_N)
        return rewards_N, over_N, np.zeros_like(over_N)

    def draw(self, canvas_NYX: Array) -> None:
        canvas_NYX[np.arange(len(canvas_NYX)), self._y_N, self._x_N] = BRIGHT

    def best_actions(self) -> Array:
        return np.where((self._x_N >= GRID // 2) == (self._sign > 0), _RIGHT, _LEFT)


class _Crossing:
    """The rules of cross: a walker starts at the bottom, and the reward is 1 for each lane that it crosses. A car ends the episode.

    Cars fill half of each lane and move one cell a step.
    """

    LANES_Y = np.array([8, 6, 4, 2])
    DIRECTIONS = np.array([1, -1, 1, -1])
    CAR_LENGTH = GRID // 2
    GOAL_Y = 1
    STEPS_MAX = 60

    def __init__(self, num_envs: int) -> None:
        self._x_N, self._y_N, self._best_y_N, self._steps_N = np.zeros((4, num_envs), dtype=np.int64)
        self._cars_NL = np.zeros((num_envs, len(self.LANES_Y)), dtype=np.int64)

    def begin(self, rng: np.random.Generator, new_N: Array) -> None:
        self._x_N = np.where(new_N, rng.integers(0, GRID, len(new_N)), self._x_N)
        self._cars_NL = np.where(new_N[:, None], rng.integers(0, GRID, self._cars_NL.shape), self._cars_NL)
        self._y_N = np.where(new_N, GRID - 1, self._y_N)
        self._best_y_N = np.where(new_N, GRID - 1, self._best_y_N)
        self._steps_N = np.where(new_N, 0, self._steps_N)

    def advance(self, rng: np.random.Generator, right_N: Array, up_N: Array) -> tuple[Array, Array, Array]:
        self._y_N = np.clip(self._y_N - up_N, self.GOAL_Y, GRID - 1)
        self._cars_NL = (self._cars_NL + self.DIRECTIONS) % GRID
        self._steps_N = self._steps_N + 1
        # Odd rows are pavement. Reaching a new one means that a lane was crossed.
        crossed_N = (self._y_N < self._best_y_N) & (self._y_N % 2 == 1)
        self._best_y_N = np.where(crossed_N, self._y_N, self._best_y_N)
        terminated_N = self._car_at(self._y_N) | (self._y_N == self.GOAL_Y)
        return crossed_N.astype(np.int64), terminated_N, ~terminated_N & (self._steps_N == self.STEPS_MAX)

    def _car_at(self, y_N: Array, ahead: int = 0) -> Array:
        """Whether, in each environment, a car is at row `y_N` of the walker's column, `ahead` steps from now."""
        lane_N = np.clip((GRID - 2 - y_N) // 2, 0, len(self.LANES_Y) - 1)
        first_N = self._cars_NL[np.arange(len(y_N)), lane_N] + ahead * self.DIRECTIONS[lane_N]
        return np.asarray((y_N % 2 == 0) & ((self._x_N - first_N) % GRID < self.CAR_LENGTH))

    def draw(self, canvas_NYX: Array) -> None:
        rows = np.arange(len(canvas_NYX))
        for cell in range(self.CAR_LENGTH):
            canvas_NYX[rows[:, None], self.LANES_Y, (self._cars_NL + cell) % GRID] = MEDIUM
        canvas_NYX[rows, self._y_N, self._x_N] = BRIGHT

    def best_actions(self) -> Array:
        """Goes up into the next lane if it is free in the next step, else waits; and leaves a lane at once, onto the pavement above it."""
        return np.where(self._car_at(self._y_N - 1, ahead=1), _NOOP, _UP)


@dataclass(frozen=True, kw_only=True, slots=True)
class PixelGame:
    """The definition of one pixel game: its rules, the lit cell that identifies it, and the returns of best and of random play."""

    name: str
    cue_x: int | None
    """The column of the lit cell in the top row that identifies the game. None: the game has no such cell."""
    rules: Callable[[int], _Rules]
    """Makes the rules for a given number of environments."""
    optimal_return: float
    """The return of every episode of best play."""
    random_return: float
    """The mean return of uniformly random actions, measured over at least 18,000 episodes."""


_GAMES = {
    game.name: game
    for game in (
        PixelGame(name="pixel/catch", cue_x=0, rules=lambda n: _Falling(n, 1), optimal_return=5.0, random_return=-0.97),
        PixelGame(name="pixel/avoid", cue_x=2, rules=lambda n: _Falling(n, -1), optimal_return=5.0, random_return=0.97),
        PixelGame(name="pixel/toward", cue_x=4, rules=lambda n: _Lamp(n, 1), optimal_return=20.0, random_return=0.0),
        PixelGame(name="pixel/away", cue_x=6, rules=lambda n: _Lamp(n, -1), optimal_return=20.0, random_return=0.0),
        PixelGame(name="pixel/blind-toward", cue_x=None, rules=lambda n: _Lamp(n, 1), optimal_return=20.0, random_return=0.0),
        PixelGame(name="pixel/blind-away", cue_x=None, rules=lambda n: _Lamp(n, -1), optimal_return=20.0, random_return=0.0),
        PixelGame(name="pixel/cross", cue_x=8, rules=_Crossing, optimal_return=4.0, random_return=0.31),
    )
}
PIXEL_GAMES: tuple[str, ...] = tuple(_GAMES)
"""The names of all pixel games, without suffixes."""


def pixel_game(name: str) -> tuple[PixelGame, int, str]:
    """Looks up a pixel game by its name, and splits off the name's suffix.

    Returns:
        The game; the number of its background (0: plain black); and how its picture is turned: "flip", "turn", or "" for neither.

    Raises:
        InvalidRequest: there is no such game.
    """
    base, at, look = name.partition("@")
    background = int(look) if look.isdecimal() else 0
    view = "" if background else look
    if base not in _GAMES or view not in _VIEWS or (at and not look):
        raise unknown_game(name, _GAMES)
    return _GAMES[base], background, view


class PixelEnvs:
    """A batch of environments of one pixel game.

    Args:
        game: one of `PIXEL_GAMES`, with or without a suffix.
        num_envs: the number of environments.
        frame_size: height and width of a frame, in pixels. A cell becomes a square of frame_size // 10 pixels; the rest is a black margin.
        frame_stack: frames in an observation.
        max_episode_steps: a limit for the steps of an episode, in addition to the game's own end. None: there is no such limit.
    """

    def __init__(self, game: str, num_envs: int, *, frame_size: int, frame_stack: int, max_episode_steps: int | None) -> None:
        self._game, background, view = pixel_game(game)
        if frame_size < GRID:
            raise InvalidRequest(f"frame_size: {frame_size} is less than the {GRID} cells of a pixel game")
        self.game = game
        self.num_envs = num_envs
        self.num_actions = NUM_ACTIONS
        self.observation_shape = (frame_stack, frame_size, frame_size)
        self._steps_max = max_episode_steps
        self._view = _VIEWS[view]
        self._background_YX = _background(background, self._game.cue_x)
        self._episodes = Episodes(num_envs)

    def reset(self, seed: int) -> Array:
        """Begins a new episode in each environment and returns the first observations, (N, S, H, W) uint8."""
        self._rng = np.random.default_rng(seed)
        self._rules = self._game.rules(self.num_envs)
        self._rules.begin(self._rng, np.ones(self.num_envs, dtype=bool))
        self._ended_N = np.zeros(self.num_envs, dtype=bool)
        self._steps_N = np.zeros(self.num_envs, dtype=np.int64)
        self._episodes.reset()
        self._stack_NSHW = np.zeros((self.num_envs, *self.observation_shape), dtype=np.uint8)
        self._stack_NSHW[:, -1] = self._frames()
        return self._stack_NSHW

    def step(self, actions: Array) -> Step:
        """Plays one action, an integer in 0..17, in each environment and returns the results."""
        check_actions(actions, self.num_envs)
        played = ~self._ended_N
        rewards, terminated, truncated = self._rules.advance(self._rng, _RIGHT_A[actions], _UP_A[actions])
        self._rules.begin(self._rng, ~played)
        self._steps_N = np.where(played, self._steps_N + 1, 0)
        if self._steps_max is not None:
            truncated |= ~terminated & (self._steps_N == self._steps_max)
        rewards = np.where(played, rewards, 0).astype(np.float32)
        terminated, truncated = terminated & played, truncated & played
        self._ended_N = terminated | truncated
        self._observe(played)
        return self._episodes.step(
            self._stack_NSHW,
            rewards_N=rewards,
            terminated_N=terminated,
            truncated_N=truncated,
            played_N=played,
            ended_N=self._ended_N,
        )

    def best_actions(self) -> Array:
        """The best action in each environment, (N,). It is computed from the game's state, not from its pixels."""
        return self._rules.best_actions()

    def close(self) -> None:
        """Does nothing, because pixel games hold no resources that must be freed."""

    def _observe(self, played_N: Array) -> None:
        """Draws the newest frames and puts them at the end of the stacks.

        Where `played_N` is False, an episode has begun, and the older frames become zero. The stacks are a new array, so that the caller
        may keep the old one.
        """
        stack_NSHW = np.empty_like(self._stack_NSHW)
        stack_NSHW[:, :-1] = self._stack_NSHW[:, 1:]
        stack_NSHW[~played_N] = 0
        stack_NSHW[:, -1] = self._frames()
        self._stack_NSHW = stack_NSHW

    def _frames(self) -> Array:
        """Draws a frame of the present state of each environment, (N, H, W)."""
        canvas_NYX = np.repeat(self._background_YX[None], self.num_envs, axis=0)
        self._rules.draw(canvas_NYX)
        height, cell = self.observation_shape[1], self.observation_shape[1] // GRID
        margin = (height - cell * GRID) // 2
        frames_NHW = np.zeros((self.num_envs, height, height), dtype=np.uint8)
        inside = slice(margin, margin + cell * GRID)
        frames_NHW[:, inside, inside] = self._view(canvas_NYX).repeat(cell, axis=1).repeat(cell, axis=2)
        return frames_NHW


def _background(number: int, cue_x: int | None) -> Array:
    """The picture without anything that moves: faint noise that depends on `number` (black for 0), and the lit cell in column `cue_x`."""
    screen_YX = np.zeros((GRID, GRID), dtype=np.uint8)
    if number:
        screen_YX[1:] = np.random.default_rng(number).integers(0, BACKGROUND_MAX + 1, (GRID - 1, GRID))
    if cue_x is not None:
        screen_YX[0, cue_x] = BRIGHT
    return screen_YX
