"""The costs of a variant are computed from what its runs logged."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ooc_moe.display.formats import DASH
from ooc_moe.metrics.log import CONFIG_FILE, MetricsWriter
from ooc_moe.metrics.run import RunRecord
from ooc_moe.report import summary
from ooc_moe.session import checkpoint
from ooc_moe.study.costs import cold_fetched, cold_share, costs_by_variant, costs_of
from ooc_moe.study.scores import StudyScores
from ooc_moe.study.tables import tables
from tests.ooc_moe.study.made_up_studies import CONSTANT, GAMES, scores_of, small_study, write_finished_runs, write_run


def test_cold_experts_are_those_that_an_earlier_game_had_used(tmp_path: Path) -> None:
    (run, *_) = small_study().runs(tmp_path)
    run.config.run_dir.mkdir(parents=True)
    (run.config.run_dir / CONFIG_FILE).write_text(run.config.to_json())
    writer = MetricsWriter(run.config.run_dir, tensorboard=False)
    for number, (game, usage) in enumerate(zip(GAMES, ({0: 10, 1: 10}, {1: 5, 2: 15}, {0: 2, 1: 2, 2: 4}), strict=True)):
        writer.log("update", step=number, update=number, game=game, usage={"0": usage})
    writer.close()
    assert cold_share(RunRecord.read(run.config.run_dir)) == pytest.approx((5 / 20 + 1) / 2)
    (run.config.run_dir / CONFIG_FILE).write_text(replace(run.config, switch_every=1).to_json())
    assert math.isnan(cold_share(RunRecord.read(run.config.run_dir)))


def test_cold_experts_fetched_and_left_equal_are_counted(tmp_path: Path) -> None:
    """The second game fetches an expert of the first and trains expert 2. The third borrows expert 1 and, wrongly, changes it and 2."""
    (run, *_) = small_study().runs(tmp_path)
    run.config.run_dir.mkdir(parents=True)
    (run.config.run_dir / CONFIG_FILE).write_text(run.config.to_json())
    writer = MetricsWriter(run.config.run_dir, tensorboard=False)
    usages = ({0: 10, 1: 10}, {2: 20}, {1: 2})
    fetches = ({0: 1, 1: 1}, {2: 3, 0: 1}, {1: 2, 3: 9})
    checksums = ({0: "ab", 1: "cd"}, {0: "ab", 1: "cd", 2: "ef"}, {0: "ab", 1: "xx", 2: "yy"})
    for number, game in enumerate(GAMES):
        writer.log("update", step=number, update=number, game=game, usage={"0": usages[number]}, fetches={"0": fetches[number]})
        writer.log("checksums", step=number, update=number, game=game, experts={"0": {e: list(s) for e, s in checksums[number].items()}})
    writer.close()
    record = RunRecord.read(run.config.run_dir)
    # The second game leaves experts 0 and 1 equal. The third owns none of 0, 1 and 2, and leaves only 0 equal.
    assert record.cold_unchanged == (3, 5)
    assert cold_fetched(record) == 1 + 2
    assert ("cold experts equal bit for bit", "3 of 5") in summary.facts(record)
    older = replace(run, config=replace(run.config, run_dir=tmp_path / "older"))
    write_run(older.config, with_checkpoint=False)
    found = StudyScores(small_study(), {run: record, older: RunRecord.read(older.config.run_dir)}, {}, CONSTANT)
    costs = next(table for table in tables(found, costs_by_variant(found)) if table.title == "Costs in bytes moved and time")
    assert dict(zip(costs.columns, costs.rows[0], strict=True))["cold and equal"] == "3 of 5 in 1 of 2 runs"


def test_with_token_routing_every_expert_that_a_game_uses_is_its_to_change(tmp_path: Path) -> None:
    (run, *_) = small_study().runs(tmp_path)
    run.config.run_dir.mkdir(parents=True)
    config = replace(run.config, agent=replace(run.config.agent, routing="token"))
    (run.config.run_dir / CONFIG_FILE).write_text(config.to_json())
    writer = MetricsWriter(run.config.run_dir, tensorboard=False)
    for number, (usage, sums) in enumerate((({0: 1, 1: 1}, {0: "ab", 1: "cd"}), ({1: 1}, {0: "ab", 1: "xx"}))):
        writer.log("update", step=number, update=number, game=GAMES[number], usage={"0": usage})
        writer.log("checksums", step=number, update=number, game=GAMES[number], experts={"0": {e: list(s) for e, s in sums.items()}})
    writer.close()
    assert RunRecord.read(run.config.run_dir).cold_unchanged == (1, 1)


def test_what_protection_keeps_is_counted_in_the_last_checkpoint(tmp_path: Path) -> None:
    study = small_study()
    runs = write_finished_runs(study, tmp_path, {"full": 1.0}, seeds=1)
    stored = [{"screens": torch.zeros(200, 42, 42, dtype=torch.uint8), "num_seen": 3200}] * 3
    springs = {"dense": [(torch.zeros(4, 5), torch.zeros(4, 5))], "experts": {(0, 1): (torch.zeros(10), torch.zeros(10))}}
    state = {"protection": springs, "detector": {"_extra_state": {"stored": stored}}}
    for run in runs:
        path = run.config.run_dir / checkpoint.DIRECTORY / checkpoint.LATEST
        checkpoint.save(path, checkpoint.Checkpoint(progress=checkpoint.Progress(), snapshot_id=1, state=state))
    found = scores_of(study, runs)
    assert (costs_of(found, "full").protection_bytes, costs_of(found, "full").exemplar_bytes) == (4 * (40 + 20), 3 * 200 * 42 * 42)
    assert costs_of(found, "single").protection_bytes == 3 * 4 * 60  # Three networks.
    costs = next(table for table in tables(found, costs_by_variant(found)) if table.title == "Costs in memory")
    assert dict(zip(costs.columns, costs.rows[0], strict=True))["kept for protection"] == "240 Bytes + 1.0 MiB"


def test_costs_of_one_network_for_each_game_are_added_up_but_hbm_holds_only_one(tmp_path: Path) -> None:
    study = small_study()
    runs = write_finished_runs(study, tmp_path, {"full": 1.0}, seeds=1)
    for run in runs:
        writer = MetricsWriter(run.config.run_dir, tensorboard=False)
        writer.log("update", step=1, update=1, cache={"capacity": 8, "expert_bytes": 100, "bytes_in": 70, "bytes_out": 30})
        writer.close()
    full, single = (costs_of(scores_of(study, runs), name) for name in ("full", "single"))
    assert (full.hbm_bytes, single.hbm_bytes) == (800, 800)
    assert (full.moved_bytes, single.moved_bytes) == (100, 3 * 100)
    estimates = {run.variant: run.config.agent.estimate_params() for run in runs}
    assert full.parameters - full.dense_parameters == estimates["full"].experts
    assert single.parameters - single.dense_parameters == 3 * estimates["single"].experts


def test_an_older_run_says_nothing_of_what_it_did_not_log(tmp_path: Path) -> None:
    study = small_study()
    found = scores_of(study, write_finished_runs(study, tmp_path, {"full": 1.0}, seeds=1))
    costs = next(table for table in tables(found, costs_by_variant(found)) if table.title == "Costs in bytes moved and time")
    cells = dict(zip(costs.columns, costs.rows[0], strict=True))
    assert (cells["of them cold"], cells["cold and equal"]) == (DASH, DASH)
