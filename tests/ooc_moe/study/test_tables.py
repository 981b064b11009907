"""The tables of a study show every run and every variant, and say what is uncertain."""

import json
from pathlib import Path

import numpy as np
import pytest

from ooc_moe.display.formats import DASH
from ooc_moe.envs import REFERENCE_SCORES
from ooc_moe.metrics.log import read_metrics
from ooc_moe.study.tables import tables
from tests.ooc_moe.study.made_up_studies import GAMES, SINGLE, change_evaluations, points, scores_of, small_study, write_finished_runs


def test_tables_show_every_run_and_every_variant_beside_the_baselines(tmp_path: Path) -> None:
    study = small_study()
    runs = write_finished_runs(study, tmp_path, {"full": 0.98, "dense": 0.5}, seeds=2)
    by_title = {table.title: table for table in tables(scores_of(study, runs), {}, [], points((0.9, 1.0), (0.5, 3.0)))}
    main = by_title["Learning and forgetting"]
    assert [row[0] for row in main.rows] == ["random", "best constant action", "full", "dense", "single"]
    # (0 - -1) / (4 - -1), (2 - 1) / (4 - 1) and 0.
    assert main.rows[1][3] == f"{(0.2 + 1 / 3 + 0) / 3:.2f}"
    assert len(by_title["All runs"].rows) == len(runs)
    assert len(by_title["Hits and stalls"].rows) == 4
    assert all(len(row) == len(table.columns) for table in by_title.values() for row in table.rows)
    name, learning, average, dormant = by_title["Beside a human, and dormant units"].rows[-1]
    floors = {game: REFERENCE_SCORES[game][0] for game in GAMES}
    beside = 100 * np.mean([(SINGLE[game] - floors[game]) / (best - floors[game]) for game, best in zip(GAMES, (5, 5, 20), strict=True)])
    assert (name, learning, dormant) == ("single", average, DASH)
    assert float(learning.removesuffix(" %")) == pytest.approx(beside, abs=0.3)


def test_games_that_nothing_tells_apart_are_named_in_the_table(tmp_path: Path) -> None:
    study = small_study()
    runs = write_finished_runs(study, tmp_path, {"full": 1.0}, seeds=2)
    clear = next(table for table in tables(scores_of(study, runs), {}) if table.title == "Recognising games")
    assert "Ambiguous" not in clear.note
    half = {"probabilities": {"pixel/catch": 0.5, "pixel/avoid": 0.5, "pixel/toward": 0.0}}
    sure = {"probabilities": {"pixel/catch": 0.0, "pixel/avoid": 0.0, "pixel/toward": 1.0}}
    for run in runs:
        events = [event | (sure if event.get("evaluated") == "pixel/toward" else half) for event in read_metrics(run.config.run_dir)]
        (run.config.run_dir / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    twins = next(table for table in tables(scores_of(study, runs), {}) if table.title == "Recognising games")
    assert "**Ambiguous: pixel/avoid and pixel/catch**, confusion 1.00 in 4 runs" in twins.note
    assert "pixel/toward" not in twins.note


def test_steps_to_detect_leave_out_the_first_game_and_environments_that_never_detect_are_counted(tmp_path: Path) -> None:
    study = small_study(orders={"forth": GAMES})
    runs = write_finished_runs(study, tmp_path, {"full": 1.0}, seeds=1)
    for game, steps in zip(GAMES, ([0, None, 0], [3, 5, None], [4, None, None]), strict=True):
        change_evaluations(runs, "full", game, steps_to_detect_by_env=steps)
    table = next(table for table in tables(scores_of(study, runs), {}) if table.title == "Recognising games")
    cells = dict(zip(table.columns, table.rows[0], strict=True))
    assert (cells["steps to detect"], cells["never"]) == ("4.00", "4 of 9")
