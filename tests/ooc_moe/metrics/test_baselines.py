"""Scores of baselines on disk: found again by exactly their game and protocol."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

from ooc_moe.metrics.baselines import DIRECTORY, Baselines, Protocol, best_constants, read_baselines, write_baselines
from ooc_moe.metrics.run import RunRecord

PROTOCOL = Protocol(eval_envs=2, eval_episodes=1, eval_steps=20, seed=3)


def scores_of(game: str, best: float) -> Baselines:
    return Baselines(
        game=game, random_mean=0.0, constant_means=[best] * 18, best_action=0, best_constant_mean=best, best_constant_returns=[best]
    )


def test_scores_are_read_back_for_their_game_and_protocol_only(tmp_path: Path) -> None:
    found = scores_of("pixel/toward", 1.5)
    write_baselines(found, tmp_path / "new", PROTOCOL)
    assert read_baselines("pixel/toward", tmp_path / "new", PROTOCOL) == found
    assert read_baselines("pixel/away", tmp_path / "new", PROTOCOL) is None
    for changed in asdict(PROTOCOL):
        assert read_baselines("pixel/toward", tmp_path / "new", replace(PROTOCOL, **{changed: 9})) is None
    assert [path.suffix for path in (tmp_path / "new").iterdir()] == [".json"]


def test_a_record_has_the_best_constants_of_its_own_protocol_and_an_old_record_has_none(tmp_path: Path) -> None:
    write_baselines(scores_of("pixel/toward", 1.5), tmp_path / DIRECTORY, PROTOCOL)
    config = {"games": ["pixel/toward", "pixel/away"], **asdict(PROTOCOL)}
    record = RunRecord(run_dir=tmp_path, config=config, events=[])
    assert best_constants(record) == {"pixel/toward": 1.5}
    assert best_constants(replace(record, config=config | {"seed": 4})) == {}
    assert best_constants(replace(record, config={"games": ["pixel/toward"]})) == {}
