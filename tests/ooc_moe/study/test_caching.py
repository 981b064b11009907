"""Hits and stalls of games in blocks and in turns, as the trainer counted them and as a replay of its trace gives them."""

from dataclasses import replace
from pathlib import Path

import pytest

from ooc_moe.metrics.log import CONFIG_FILE, MetricsWriter
from ooc_moe.metrics.run import RunRecord
from ooc_moe.metrics.trace import TraceWriter
from ooc_moe.study.caching import Way, caching_points
from ooc_moe.study.scores import StudyScores
from ooc_moe.study.study import StudyRun
from tests.ooc_moe.study.made_up_studies import TINY, small_study


def caching_run(directory: Path, *, switch_every: int, hits: int, traced: bool) -> StudyRun:
    """Writes a run with HBM for two experts. Each of its two games uses two experts; each of its updates accesses them four times."""
    trace = str(directory / "accesses.trace") if traced else None
    agent = replace(TINY.agent, hbm_experts=2)
    config = replace(TINY, run_dir=directory, agent=agent, switch_every=switch_every, trace=trace)
    directory.mkdir()
    (directory / CONFIG_FILE).write_text(config.to_json())
    writer = MetricsWriter(directory, tensorboard=False)
    writer.log("update", step=128, update=4, cache={"accesses": 16, "hits": hits, "stall_s": 0.25})
    writer.close()
    if trace is not None:
        accesses = TraceWriter(Path(trace), config.trace_info())
        for game, experts in zip(config.games, ([0, 1], [2, 3]), strict=True):
            accesses.mark(game, evaluating=False)
            accesses.access(0, experts * 4)
            accesses.mark(game, evaluating=True)
            accesses.access(0, [7] * 100)
        accesses.close()
    return StudyRun(variant=directory.name, order="forth", config=config)


def test_a_trace_is_reordered_into_turns_and_replayed_for_comparison_with_what_was_measured(tmp_path: Path) -> None:
    runs = [
        caching_run(tmp_path / "blocks", switch_every=0, hits=13, traced=True),
        caching_run(tmp_path / "turns", switch_every=1, hits=9, traced=False),
    ]
    records = {run: RunRecord.read(run.config.run_dir) for run in runs}
    found = {(point.way, point.switch_every): point for point in caching_points(StudyScores(small_study(), records, {}, {}))}
    assert len(found) == 4
    assert {key: point.accesses for key, point in found.items()} == dict.fromkeys(found, 16)  # Evaluation left out.
    assert (found[Way.TRAINER, None].hit_rate, found[Way.TRAINER, 1].hit_rate) == (13 / 16, 9 / 16)
    assert found[Way.TRAINER, 1].stall_s == pytest.approx(0.25)
    # In blocks each of the four experts misses once; in turns of one update it misses in every turn. No policy could do better.
    assert (found[Way.SIMULATOR, None].hit_rate, found[Way.SIMULATOR, 1].hit_rate) == (12 / 16, 8 / 16)
    assert (found[Way.SIMULATOR, None].belady, found[Way.SIMULATOR, 1].belady) == (12 / 16, 8 / 16)
    assert found[Way.SIMULATOR, 1].stall_s > found[Way.SIMULATOR, None].stall_s > 0


def test_a_study_without_a_trace_has_no_points(tmp_path: Path) -> None:
    run = caching_run(tmp_path / "turns", switch_every=1, hits=9, traced=False)
    assert caching_points(StudyScores(small_study(), {run: RunRecord.read(run.config.run_dir)}, {}, {})) == []
