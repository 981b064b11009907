"""Random play and constant actions: what they are worth, and that they are played once."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest

from ooc_moe.config.agent import PRESETS
from ooc_moe.config.run import RunConfig
from ooc_moe.envs.pixel import pixel_game
from ooc_moe.evaluation import baselines
from ooc_moe.evaluation.baselines import play_baselines, play_constants
from ooc_moe.metrics.baselines import Protocol, read_baselines
from ooc_moe_wire.errors import InvalidRequest

PROTOCOL = Protocol(eval_envs=16, eval_episodes=2, eval_steps=200, seed=0)


def test_each_action_is_played_by_the_protocol_and_the_best_one_again_elsewhere(tmp_path: Path):
    told: list[tuple[int, int]] = []
    found = play_baselines("pixel/cross", tmp_path, PROTOCOL, on_progress=lambda done, of: told.append((done, of)))
    assert told == [(done, 20) for done in range(1, 21)]
    assert len(found.constant_means) == 18
    # Only the actions that push the stick up cross anything (2: up, 6 and 7 with it; 10, 14 and 15 with the button).
    assert {action for action, mean in enumerate(found.constant_means) if mean > 0} == {2, 6, 7, 10, 14, 15}
    assert found.constant_means[found.best_action] == max(found.constant_means)
    assert len(found.best_constant_returns) == 16 * 2
    assert found.best_constant_mean == sum(found.best_constant_returns) / 32
    assert found.random_mean == pytest.approx(pixel_game("pixel/cross")[0].random_return, abs=0.5)


def test_the_best_constant_action_of_a_game_that_must_be_looked_at_is_worth_little(tmp_path: Path):
    found = play_baselines("pixel/toward", tmp_path, PROTOCOL)
    assert abs(found.best_constant_mean) < 0.3 * pixel_game("pixel/toward")[0].optimal_return


def test_what_was_played_before_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first = play_baselines("pixel/toward", tmp_path / "new", PROTOCOL)
    other_seed = play_baselines("pixel/toward", tmp_path / "new", replace(PROTOCOL, seed=1))
    assert other_seed != first
    monkeypatch.setattr(baselines, "play", None)  # Playing fails from here on.
    assert play_baselines("pixel/toward", tmp_path / "new", PROTOCOL) == first
    for changed in ({"seed": 2}, {"eval_envs": 8}, {"eval_episodes": 1}, {"eval_steps": 100}):
        with pytest.raises(TypeError):
            play_baselines("pixel/toward", tmp_path / "new", replace(PROTOCOL, **changed))


def test_constant_actions_of_a_run_are_played_as_the_run_is_evaluated_and_found_by_no_other(tmp_path: Path):
    protocol = Protocol(eval_envs=2, eval_episodes=1, eval_steps=20, seed=3)
    games = ("pixel/toward", "pixel/away")
    config = RunConfig(run_dir=tmp_path, games=games, agent=PRESETS["tiny"], **asdict(protocol))
    told: list[tuple[str, int, int]] = []
    found = play_constants(games, config, tmp_path / "run", lambda game, done, of: told.append((game, done, of)))
    assert found == {game: play_baselines(game, tmp_path / "plain", protocol).best_constant_mean for game in games}
    assert told[0] == ("pixel/toward", 1, 20)
    assert told[-1] == ("pixel/away", 20, 20)
    again = read_baselines("pixel/away", tmp_path / "run", protocol)
    assert again is not None
    assert again.best_constant_mean == found["pixel/away"]
    for changed in ({"seed": 2}, {"eval_envs": 8}, {"eval_episodes": 2}, {"eval_steps": 100}):
        assert read_baselines("pixel/away", tmp_path / "run", replace(protocol, **changed)) is None


def test_a_run_that_is_not_evaluated_has_no_constant_actions_to_compare_with(tmp_path: Path):
    config = RunConfig(run_dir=tmp_path, games=("pixel/away",), agent=PRESETS["tiny"], eval_steps=0)
    assert play_constants(config.games, config, tmp_path) == {}


def test_an_unknown_game_is_refused(tmp_path: Path):
    with pytest.raises(InvalidRequest, match="pixel/chess"):
        play_baselines("pixel/chess", tmp_path, PROTOCOL)
