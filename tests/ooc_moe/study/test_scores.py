"""Scores are on one scale, and the rules decide which games count."""

import json
from pathlib import Path

import numpy as np
import pytest

from ooc_moe.metrics.log import read_metrics
from ooc_moe.study.scores import strata
from tests.ooc_moe.study.made_up_studies import (
    CONSTANT,
    change_evaluations,
    mean,
    scores_of,
    small_study,
    write_finished_runs,
)


def test_scores_are_zero_at_random_play_and_one_at_single_task(tmp_path: Path) -> None:
    study = small_study()
    found = scores_of(study, write_finished_runs(study, tmp_path, {"full": 0.9, "dense": 0.5, "joint": 0.7}, learned=0.8, seeds=2))
    assert mean(found, "single", "average") == pytest.approx(1, abs=0.01)
    assert mean(found, "full", "learning") == pytest.approx(0.8, abs=0.01)
    assert mean(found, "dense", "retention") == pytest.approx(0.5, abs=0.01)
    assert mean(found, "dense", "forgetting") == pytest.approx(0.4, abs=0.01)
    assert mean(found, "dense", "average without the last game") == pytest.approx(0.4, abs=0.01)
    assert mean(found, "dense", "average") == pytest.approx((0.4 + 0.4 + 0.8) / 3, abs=0.01)
    assert found.worst("dense")[0].value == pytest.approx(0.4, abs=0.02)
    # Games in turns are evaluated once; nothing can be said of what was learned before it was forgotten.
    assert mean(found, "joint", "average") == pytest.approx((0.56 + 0.56 + 0.8) / 3, abs=0.01)
    assert not found.cells("joint", "learning")
    assert not found.cells("joint", "retention")


def test_a_game_that_can_be_played_blindly_or_was_not_learned_is_left_out_with_the_reason(tmp_path: Path) -> None:
    study = small_study()
    runs = write_finished_runs(study, tmp_path, {"full": 1.0}, seeds=2)
    assert not any(facts.left_out for facts in scores_of(study, runs).facts.values())
    constant = scores_of(study, runs, CONSTANT | {"pixel/avoid": 4.0})
    assert constant.counted == {"pixel/catch", "pixel/toward"}
    assert "best constant action" in constant.facts["pixel/avoid"].left_out
    assert {cell.game for cell in constant.cells("full", "learning")} == constant.counted
    for run in runs:  # The lamp's single-task score falls to 3 of 20.
        if run.variant == "single" and run.config.games == ("pixel/toward",):
            path = run.config.run_dir / "metrics.jsonl"
            events = [event | {"return_mean": 3.0} if "return_mean" in event else event for event in read_metrics(run.config.run_dir)]
            path.write_text("".join(json.dumps(event) + "\n" for event in events))
    assert "0.150 of the way" in scores_of(study, runs).facts["pixel/toward"].left_out


def test_a_game_that_evaluation_cut_counts_when_what_was_seen_is_enough(tmp_path: Path) -> None:
    study = small_study()
    runs = write_finished_runs(study, tmp_path, {"full": 1.0}, seeds=2)
    change_evaluations(runs, "single", "pixel/toward", episodes_truncated=3)
    assert scores_of(study, runs).facts["pixel/toward"].left_out == ""
    change_evaluations(runs, "single", "pixel/toward", return_mean=3.94)
    left_out = scores_of(study, runs).facts["pixel/toward"].left_out
    assert left_out == "evaluation cut its games; at least 0.197 of the way from random play to the reference, 0.2 wanted"


def test_a_game_counts_only_when_it_is_clearly_above_random_play_too(tmp_path: Path) -> None:
    study = small_study()
    runs = write_finished_runs(study, tmp_path, {"full": 1.0}, seeds=2)
    change_evaluations(runs, "single", "pixel/catch", returns=[-20.0, 4.0, 28.0])
    assert "not above the best constant action" in scores_of(study, runs).facts["pixel/catch"].left_out
    below = scores_of(study, runs, CONSTANT | {"pixel/catch": -100.0})  # As in Atari games: every constant action gets less.
    assert "not above random play" in below.facts["pixel/catch"].left_out


def test_a_stratum_is_the_runs_of_an_order_and_the_games_of_a_run_stay_together(tmp_path: Path) -> None:
    study = small_study()
    found = scores_of(study, write_finished_runs(study, tmp_path, {"full": 1.0}, seeds=2))
    assert [group.shape for group in strata(found.cells("full", "learning"))] == [(2, 3), (2, 3)]
    retention = strata(found.cells("full", "retention"))
    assert [np.isnan(group).all(axis=0).tolist() for group in retention] == [[False, False, True], [True, False, False]]
    assert len(strata(found.cells("single", "average"))) == 3
    assert [group.shape for group in strata(found.worst("full"))] == [(2, 1), (2, 1)]


def test_what_was_hardly_learned_says_nothing_about_retention(tmp_path: Path) -> None:
    study = small_study()
    found = scores_of(study, write_finished_runs(study, tmp_path, {"full": 1.0, "dense": 1.0}, learned=0.15, seeds=1))
    assert strata(found.cells("dense", "retention")) == []
    assert mean(found, "dense", "learning") == pytest.approx(0.15, abs=0.01)
