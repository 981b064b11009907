"""What a game is worth to those who do not look: each of the 18 constant actions, and random play, by the protocol of evaluation.

Learning and forgetting can only show where an agent beats the best constant action: in some games one button held for ever is nearly the
best play (Freeway's is up). Knows nothing of agents.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from ooc_moe import envs
from ooc_moe.config.run import RunConfig
from ooc_moe.config.seeds import derived_seed, evaluation_seed
from ooc_moe.evaluation.episodes import Choose, always, play, uniformly_random

DIRECTORY = "baselines"
"""In a run's directory, or a study's."""
PROTOCOL = ("eval_envs", "eval_episodes", "eval_steps", "seed")
"""The settings of a run that its scores and its baselines must have in common."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Baselines:
    """Mean raw returns of one game."""

    game: str
    random_mean: float
    """Of uniformly random actions, in the environments that a run of the same seed is evaluated in."""
    constant_means: list[float]
    """Of each action held for ever, by its number; in the same environments."""
    best_action: int
    """The best of them there."""
    best_constant_mean: float
    """What that action is worth in other environments of the game: the best of 18 noisy means flatters itself."""
    best_constant_returns: list[float]
    """The returns behind it."""


def baselines(
    game: str,
    directory: Path,
    *,
    eval_envs: int,
    eval_episodes: int,
    eval_steps: int,
    seed: int,
    on_progress: Callable[[int, int], object] = lambda done, of: None,
) -> Baselines:
    """Plays random and constant actions, or reads from `directory` what was played there before for equal arguments.

    Args:
        game: as `envs.make` takes it.
        directory: holds one JSON file for each set of arguments; made where it is missing.
        eval_envs: environments side by side.
        eval_episodes: whole games of each.
        eval_steps: the most steps of each.
        seed: of the run that is compared with.
        on_progress: told after each of the 20 scores how many are done, of how many.

    Raises:
        InvalidRequest: an unknown game, or ale-py is missing.
    """
    envs.check_name(game)
    before = kept(game, directory, eval_envs=eval_envs, eval_episodes=eval_episodes, eval_steps=eval_steps, seed=seed)
    if before is not None:
        on_progress(1, 1)
        return before
    # What frames show is of no account here: the smallest that every game can draw.
    made = envs.make(game, eval_envs, frame_size=10, frame_stack=1)
    total, done = envs.NUM_ACTIONS + 2, 0

    def returns(choose: Choose, seed: int) -> list[float]:
        nonlocal done
        played = play(made, choose, episodes=eval_episodes, steps=eval_steps, seed=seed)
        done += 1
        on_progress(done, total)
        return played.returns

    same, other = evaluation_seed(seed, game), derived_seed(seed, "baselines", game) % 2**31
    constant_means = [_mean(returns(always(made, action), same)) for action in range(envs.NUM_ACTIONS)]
    best_action = constant_means.index(max(constant_means))
    best_returns = returns(always(made, best_action), other)
    found = Baselines(
        game=game,
        random_mean=_mean(returns(uniformly_random(made, same), same)),
        constant_means=constant_means,
        best_action=best_action,
        best_constant_mean=_mean(best_returns),
        best_constant_returns=best_returns,
    )
    made.close()
    directory.mkdir(parents=True, exist_ok=True)
    path = _path(game, directory, eval_envs, eval_episodes, eval_steps, seed)
    half_written = path.with_suffix(f".{os.getpid()}")  # Two seeds' runs may ask at once.
    half_written.write_text(json.dumps(asdict(found)))
    half_written.replace(path)
    return found


def kept(game: str, directory: Path, *, eval_envs: int, eval_episodes: int, eval_steps: int, seed: int) -> Baselines | None:
    """What `baselines` kept in `directory` for these arguments and no others; None if nothing."""
    path = _path(game, directory, eval_envs, eval_episodes, eval_steps, seed)
    return Baselines(**json.loads(path.read_text())) if path.exists() else None


def play_constants(
    games: Sequence[str], config: RunConfig, directory: Path, on_progress: Callable[[str, int, int], object] = lambda game, done, of: None
) -> dict[str, float]:
    """The best constant action's mean return in each game, by the protocol of a run's evaluations; kept in `directory`.

    Empty where the run is not evaluated. `on_progress` is told the game, how many of its scores are known, and of how many.
    """
    if not config.eval_steps:
        return {}
    protocol = {name: getattr(config, name) for name in PROTOCOL}
    return {game: baselines(game, directory, **protocol, on_progress=partial(on_progress, game)).best_constant_mean for game in games}


def _path(game: str, directory: Path, eval_envs: int, eval_episodes: int, eval_steps: int, seed: int) -> Path:
    return directory / f"{game.replace('/', '-')}-{eval_envs}x{eval_episodes}-{eval_steps}-seed{seed}.json"


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
