"""Measures the scores of random play and of constant actions in a game, in the same way as the agent is evaluated.

Random play and constant actions are the baselines: they need no look at the screen.

Learning and forgetting can only show where an agent beats the best constant action. In some games one button held for ever is nearly the
best play: in Freeway it is "up". Each score is measured only once, because metrics/baselines.py stores it on disk.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from ooc_moe import envs
from ooc_moe.config.run import RunConfig
from ooc_moe.config.seeds import derived_seed, evaluation_seed
from ooc_moe.envs import GameEnvs
from ooc_moe.evaluation.episodes import Choose, always, play, uniformly_random
from ooc_moe.metrics.baselines import Baselines, Protocol, read_baselines, write_baselines

NUM_SCORES = envs.NUM_ACTIONS + 2
"""How many scores are measured in one game: each constant action, the best of them again in other environments, and random play."""


def play_baselines(
    game: str, directory: Path, protocol: Protocol, *, on_progress: Callable[[int, int], object] = lambda done, of: None
) -> Baselines:
    """Measures what random play and each constant action score in a game. Scores that `directory` already has are read instead.

    Args:
        game: a name as `envs.make` takes it.
        directory: where the scores are stored, one JSON file for each game and protocol.
        protocol: how the game is played: environments, episodes, step limit and seed.
        on_progress: called after each score with two numbers: how many scores are done, and how many there are in all.

    Raises:
        InvalidRequest: the game is unknown, or ale-py is missing.
    """
    envs.check_name(game)
    known = read_baselines(game, directory, protocol)
    if known is not None:
        on_progress(1, 1)
        return known
    # Actions do not depend on the frames, so the smallest frames that every game can draw will do.
    game_envs = envs.make(game, protocol.eval_envs, frame_size=10, frame_stack=1)
    found = _play(game_envs, protocol, on_progress)
    game_envs.close()
    write_baselines(found, directory, protocol)
    return found


def _play(game_envs: GameEnvs, protocol: Protocol, on_progress: Callable[[int, int], object]) -> Baselines:
    game, num_played = game_envs.game, 0

    def returns(choose: Choose, seed: int) -> list[float]:
        nonlocal num_played
        played = play(game_envs, choose, episodes=protocol.eval_episodes, steps=protocol.eval_steps, seed=seed)
        num_played += 1
        on_progress(num_played, NUM_SCORES)
        return played.returns

    same_envs = evaluation_seed(protocol.seed, game)
    other_envs = derived_seed(protocol.seed, "baselines", game) % 2**31
    constant_means = [_mean(returns(always(game_envs, action), same_envs)) for action in range(envs.NUM_ACTIONS)]
    best_action = constant_means.index(max(constant_means))
    best_returns = returns(always(game_envs, best_action), other_envs)
    return Baselines(
        game=game,
        random_mean=_mean(returns(uniformly_random(game_envs, same_envs), same_envs)),
        constant_means=constant_means,
        best_action=best_action,
        best_constant_mean=_mean(best_returns),
        best_constant_returns=best_returns,
    )


def play_constants(
    games: Sequence[str], config: RunConfig, directory: Path, on_progress: Callable[[str, int, int], object] = lambda game, done, of: None
) -> dict[str, float]:
    """Measures the mean return of the best constant action in each game, in the same way as the run's evaluations.

    Args:
        games: names as `envs.make` takes them.
        config: the run's configuration, which says how games are evaluated.
        directory: where the scores are stored, so that each is measured only once.
        on_progress: called after each score with the game, how many of its scores are done, and how many there are.

    Returns:
        Game -> mean return. Empty if the configuration turns evaluations off.
    """
    protocol = Protocol.of({field.name: getattr(config, field.name) for field in dataclasses.fields(config)})
    if protocol is None or not config.eval_steps:
        return {}
    return {game: play_baselines(game, directory, protocol, on_progress=partial(on_progress, game)).best_constant_mean for game in games}


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
