"""The files that are written for a study, finished or not."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from ooc_moe.metrics.log import METRICS_FILE
from ooc_moe.study.result_files import write
from ooc_moe.study.results import results_of
from tests.ooc_moe.study.made_up_studies import CONSTANT, GAMES, SYNTHETIC, small_study, write_finished_runs, write_run


def test_a_study_that_is_not_finished_is_written_with_what_is_missing(tmp_path: Path) -> None:
    study = small_study()
    write_finished_runs(study, tmp_path / "runs", {"full": 0.98, "moe-token": 0.6, "dense": 0.5}, seeds=3)
    results = results_of(study, study.runs(tmp_path / "runs"), CONSTANT)
    page, numbers, *pictures = write(results, tmp_path / "results", command="ooc-moe study small")
    text = page.read_text()
    # 2 seeds of three variants in two orders, and one of joint in two, are not there.
    assert len(results.found.missing) == 2 * 3 * 2 + 1 * 2
    assert f"- runs: {len(results.found.records)} of {len(results.found.records) + 14} are done" in text
    assert "- full, forth, seed 4: new, 0 of 6,144 steps" in text
    assert "**protection: no verdict.**" in text
    assert str(tmp_path) not in text + numbers.read_text()
    written = json.loads(numbers.read_text())
    assert len(written["runs"]) == len(results.found.records)
    (first, *_) = results.found.cells("dense", "retention")
    assert written["measures"]["dense"]["retention"][first.order][str(first.seed)][first.game] == pytest.approx(first.value, rel=1e-5)
    assert {path.name for path in pictures} == {"small_measures.png", "small_games.png"}
    assert all(f"({path.name})" in text for path in pictures)


def test_runs_shorter_than_the_study_are_said_to_be_and_shown_as_they_were_made(tmp_path: Path) -> None:
    # The untrained variant is shorter than the recipe by itself.
    seeds = dict.fromkeys(("full", "moe-token", "dense", "moe-untrained", "single"), 1)
    study = small_study(recipe=replace(SYNTHETIC.recipe, steps_per_game=51_200), seeds=seeds)
    whole = results_of(study, write_finished_runs(study, tmp_path / "whole", {"full": 1.0, "moe-untrained": 1.0}, seeds=1), CONSTANT)
    assert {run.config.steps_per_game for run in whole.found.of("moe-untrained")} == {10_240}
    short_study = replace(study, recipe=replace(study.recipe, steps_per_game=20_480))
    results = results_of(study, write_finished_runs(short_study, tmp_path / "short", {"full": 1.0}, seeds=1), CONSTANT)
    assert not any("shorter" in verdict.says for verdict in whole.verdicts)
    assert results.verdicts
    assert all("shorter than the study's own: 20,480 steps in each game, not 51,200." in verdict.says for verdict in results.verdicts)
    page, *_ = write(results, tmp_path / "results", command="ooc-moe study small")
    _, _, configured = page.read_text().partition("## The configuration of full, forth, seed 0\n")
    assert json.loads(configured.split("```")[1].removeprefix("json"))["steps_per_game"] == 20_480


def test_a_study_that_never_evaluated_has_no_tables_of_scores(tmp_path: Path) -> None:
    study = small_study(orders={"forth": GAMES}, seeds={"full": 1})
    (run,) = write_finished_runs(study, tmp_path / "runs", {"full": 1.0})
    write_run(replace(run.config, run_dir=tmp_path / "bare"), with_checkpoint=True, done=True)
    (run.config.run_dir / METRICS_FILE).write_text((tmp_path / "bare" / METRICS_FILE).read_text())
    titles = [table.title for table in results_of(study, [run], {}).tables]
    assert "Costs in memory" in titles
    assert not {"Games, raw returns", "All runs"} & set(titles)


def test_notes_stay_when_the_results_are_written_again(tmp_path: Path) -> None:
    study = small_study()
    results = results_of(study, study.runs(tmp_path), CONSTANT)
    page, *_ = write(results, tmp_path / "results", command="ooc-moe study small")
    page.write_text(page.read_text().replace("(to be written: what it means)", "It means little."))
    write(results, tmp_path / "results", command="ooc-moe study small")
    assert "## Notes\n\nIt means little.\n\n## Variants\n" in page.read_text()
    older = page.read_text().replace("## Notes\n\nIt means little.\n\n", "")  # Pages of older versions end with them.
    page.write_text(f"{older}\n## Notes\n\nIt means little.\n")
    write(results, tmp_path / "results", command="ooc-moe study small")
    assert page.read_text().count("It means little.") == 1
    assert "## Notes\n\nIt means little.\n\n## Variants\n" in page.read_text()
