"""Makes environments of games by name: Atari games and small pixel games, with one interface for the two kinds.

    envs = make("krull", 16, frame_size=42)
    observations = envs.reset(seed=1)
    step = envs.step(actions)

game.py has the interface and says what a step means; atari.py and pixel.py are the two kinds of games.
"""

from __future__ import annotations

from ooc_moe.envs.atari import ATARI_GAMES, ATARI_SCORES, AtariEnvs
from ooc_moe.envs.game import NUM_ACTIONS, GameEnvs, Step, unknown_game
from ooc_moe.envs.pixel import PIXEL_GAMES, PixelEnvs, pixel_game
from ooc_moe_wire.errors import InvalidRequest, require_at_least

__all__ = ["ATARI_GAMES", "NUM_ACTIONS", "PIXEL_GAMES", "REFERENCE_SCORES", "GameEnvs", "Step", "check_name", "check_playable", "make"]

REFERENCE_SCORES: dict[str, tuple[float, float]] = ATARI_SCORES | {
    name: (pixel_game(name)[0].random_return, pixel_game(name)[0].optimal_return) for name in PIXEL_GAMES
}
"""Raw returns of random play and of a human for Atari games; of random play and of best play for pixel games."""


def make(
    game: str,
    num_envs: int,
    *,
    frame_size: int = 84,
    frame_stack: int = 4,
    num_threads: int = 2,
    max_episode_steps: int | None = None,
) -> GameEnvs:
    """Makes a batch of environments of one game. Call its `reset(seed)` before the first step.

    Args:
        game: a name of `ATARI_GAMES` or `PIXEL_GAMES`. A pixel game's picture changes with a suffix: @1, @2, ..., @flip or @turn.
        num_envs: the number of environments.
        frame_size: height and width of a frame, in pixels.
        frame_stack: the number of frames in an observation: the newest and those before it.
        num_threads: threads that emulate Atari. Results do not depend on their number.
        max_episode_steps: the step limit of an episode, in the agent's steps. None: the game's own limit.

    Raises:
        InvalidRequest: the game is unknown, a size is below 1 or too small for the game, or ale-py is missing.
    """
    check_playable(game)
    sizes = {"num_envs": num_envs, "frame_size": frame_size, "frame_stack": frame_stack, "num_threads": num_threads}
    require_at_least(1, **sizes, max_episode_steps=max_episode_steps)
    if game in ATARI_GAMES:
        return AtariEnvs(
            game,
            num_envs,
            frame_size=frame_size,
            frame_stack=frame_stack,
            num_threads=num_threads,
            max_episode_steps=max_episode_steps,
        )
    return PixelEnvs(game, num_envs, frame_size=frame_size, frame_stack=frame_stack, max_episode_steps=max_episode_steps)


def check_playable(game: str) -> None:
    """Raises InvalidRequest if the game is unknown, or if it is an Atari game and the package ale-py is not installed."""
    check_name(game)
    if game in ATARI_GAMES:
        try:
            import ale_py.vector_env  # noqa: F401
        except ImportError as missing:
            raise InvalidRequest(f'game: {game!r} needs ale-py; install it with: pip install "ooc-moe[atari]"') from missing


def check_name(game: str) -> None:
    """Raises InvalidRequest if no game has this name. The message names the game with the most similar name."""
    if game in ATARI_GAMES:
        return
    if game.startswith("pixel/"):
        pixel_game(game)
        return
    raise unknown_game(game, ATARI_GAMES + PIXEL_GAMES)
