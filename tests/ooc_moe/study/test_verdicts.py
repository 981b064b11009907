"""The verdicts follow their rules."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ooc_moe.metrics.log import read_metrics
from ooc_moe.study import verdicts
from ooc_moe.study.caching import CachingPoint
from ooc_moe.study.study import StudyRun
from ooc_moe.study.tables import pair_table
from tests.ooc_moe.study.made_up_studies import GAMES, points, scores_of, small_study, write_finished_runs


def test_protection_holds_only_with_enough_runs_a_clear_gap_and_learning(tmp_path: Path) -> None:
    study = small_study()

    def judged(name: str, final: dict[str, float], **changes: float) -> verdicts.Verdict:
        verdict = verdicts.protection(scores_of(study, write_finished_runs(study, tmp_path / name, final, **changes)))  # type: ignore[arg-type]
        assert verdict is not None
        return verdict

    good = {"full": 0.98, "moe-token": 0.6, "dense": 0.5}
    assert judged("good", good).holds is True
    assert "retention(full) - retention(dense) = +0.48 [+0.4" in judged("good", good).says
    assert judged("no better than dense", good | {"dense": 0.98}).holds is False
    assert judged("did not learn", good, learned=0.8).holds is False
    few = judged("few seeds", good, seeds=4)
    assert few.holds is None
    assert "needs 5 seeds in 2 orders" in few.says
    assert "retention(moe-token) = +0.38 [" in few.says
    assert "retention(moe-token) = +0.38; " in judged("one seed", good, seeds=1).says


def test_protection_does_not_hold_where_an_interval_reaches_zero_whatever_the_means_say(tmp_path: Path) -> None:
    """In one seed of dense everything was forgotten, in the others nothing."""
    study = small_study()
    most = write_finished_runs(study, tmp_path / "most", {"full": 0.98, "moe-token": 0.6, "dense": 1.0})
    one = write_finished_runs(study, tmp_path / "one", {"dense": 0.0}, seeds=1)
    runs = [run for run in most if (run.variant, run.config.seed) != ("dense", 0)] + [run for run in one if run.variant == "dense"]
    verdict = verdicts.protection(scores_of(study, runs))
    assert verdict is not None
    assert verdict.holds is False
    assert "retention(full) - retention(dense) = +0.18 [-0.0" in verdict.says


def test_protection_wants_its_seeds_in_every_order_of_every_variant(tmp_path: Path) -> None:
    study = small_study()
    runs = write_finished_runs(study, tmp_path, {"full": 0.98, "moe-token": 0.6, "dense": 0.5})
    verdict = verdicts.protection(scores_of(study, [run for run in runs if (run.variant, run.order) != ("dense", "back")]))
    assert verdict is not None
    assert verdict.holds is None
    assert "needs 5 seeds in 2 orders; of dense there are 5 in forth." in verdict.says


def test_protection_says_nothing_without_single_task_runs_or_a_rival(tmp_path: Path) -> None:
    study = small_study()
    runs = write_finished_runs(study, tmp_path, {"full": 1.0})
    alone = verdicts.protection(scores_of(study, runs))
    unscaled = verdicts.protection(scores_of(study, [run for run in runs if run.variant != "single"]))
    assert alone is not None
    assert unscaled is not None
    assert (alone.holds, unscaled.holds) == (None, None)
    assert "nothing to compare yet for moe-token, dense" in alone.says
    assert "single-task runs are missing" in unscaled.says


@pytest.mark.parametrize(("usage", "holds"), [(0.5, True), (0.02, True), (0.0, False)])
def test_separation_holds_where_games_use_experts_of_their_own(tmp_path: Path, usage: float, holds: bool) -> None:
    study = small_study(verdict_seeds=2)
    found = scores_of(study, write_finished_runs(study, tmp_path, {"moe-token": 0.5}, seeds=2, usage=usage))
    runs = verdicts.separations(found)
    assert len(runs) == 4
    assert runs[0].within == pytest.approx(1)
    assert runs[0].between == pytest.approx(1 - usage)
    assert runs[0].gap == pytest.approx(usage)
    verdict = verdicts.separation(found, runs)
    assert verdict is not None
    assert verdict.holds is holds
    assert ("The difference is not chance, but it is small" in verdict.says) is (usage == 0.02)


def test_separation_wants_enough_seeds_and_a_small_p_in_every_run(tmp_path: Path) -> None:
    study = small_study(verdict_seeds=2)
    found = scores_of(study, write_finished_runs(study, tmp_path, {"moe-token": 0.5}, seeds=2, usage=0.5))
    first, *others = verdicts.separations(found)
    for runs in ([replace(first, p=0.2), *others], [*others, replace(first, p=0.2)]):
        verdict = verdicts.separation(found, runs)
        assert verdict is not None
        assert verdict.holds is False
    few = verdicts.separation(replace(found, study=small_study(verdict_seeds=3)), [first, *others])
    assert few is not None
    assert few.holds is None
    assert few.says.endswith("The rule needs 3 seeds.")


def with_usage(runs: list[StudyRun], usage_of: Callable[[str, np.random.Generator], Sequence[int]]) -> None:
    """Gives each environment of the evaluations tokens by expert."""
    rng = np.random.default_rng(0)
    for run in runs:
        events = read_metrics(run.config.run_dir)
        for event in events:
            if "usage_by_env" in event:
                drawn = [usage_of(event["evaluated"], rng) for _ in range(8)]
                event["usage_by_env"] = [{"0": {str(e): int(count) for e, count in enumerate(row) if count}} for row in drawn]
        (run.config.run_dir / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))


def test_games_of_different_length_with_one_routing_do_not_separate(tmp_path: Path) -> None:
    runs = write_finished_runs(small_study(), tmp_path, {"moe-token": 0.5})
    tokens = dict(zip(GAMES, (1000, 150, 30), strict=True))
    with_usage(runs, lambda game, rng: rng.multinomial(tokens[game], [1 / 20] * 20))
    found = verdicts.separations(scores_of(small_study(), runs))
    assert len(found) == 10
    assert sum(each.p < 0.1 for each in found) <= 3
    assert np.mean([each.gap for each in found]) == pytest.approx(0, abs=0.01)


def test_two_games_that_do_not_separate_are_named_beside_one_that_does(tmp_path: Path) -> None:
    study = small_study(verdict_seeds=2)
    runs = write_finished_runs(study, tmp_path, {"moe-token": 0.5}, seeds=2)
    with_usage(runs, lambda game, rng: [0, 50, 50] if game == "pixel/toward" else [50, 50, 0])
    found = scores_of(study, runs)
    separated = verdicts.separations(found)
    verdict = verdicts.separation(found, separated)
    assert verdict is not None
    assert verdict.holds is True
    assert "Less than 0.05 apart: pixel/avoid and pixel/catch (1.00 and 1.00)." in verdict.says
    rows = pair_table(separated).rows
    assert rows[0] == ["moe-token", "pixel/avoid, pixel/catch", "1.000", "1.000", "0.000"]
    assert [row[2:] for row in rows[1:]] == [["1.000", "0.500", "0.500"]] * 2


@pytest.mark.parametrize(
    ("usage", "words"),
    [(0.1, ": 1.00 and 0.90 (4 runs)."), (0.6, ". That is at least as far apart, so the separation comes from the pictures")],
)
def test_what_an_untrained_network_separates_is_said_beside(tmp_path: Path, usage: float, words: str) -> None:
    study = small_study(verdict_seeds=2)
    runs = write_finished_runs(study, tmp_path, {"moe-token": 0.5}, seeds=2, usage=0.5)
    separated = verdicts.separations(scores_of(study, runs))
    untrained = [replace(each, run=replace(each.run, variant="moe-untrained"), within=1.0, between=1 - usage) for each in separated]
    verdict = verdicts.separation(scores_of(study, runs), [*separated, *untrained])
    assert verdict is not None
    assert verdict.holds is True
    assert "of two games 0.50 (4 runs," in verdict.says
    assert "An untrained network of the same kind: 1.00 and" in verdict.says
    assert words in verdict.says


def test_a_run_that_cannot_be_compared_leaves_no_verdict_wherever_it_stands(tmp_path: Path) -> None:
    study = small_study(verdict_seeds=2)
    found = scores_of(study, write_finished_runs(study, tmp_path, {"moe-token": 0.5}, seeds=2, usage=0.5))
    first, *others = verdicts.separations(found)
    for runs in ([replace(first, p=float("nan")), *others], [*others, replace(first, p=float("nan"))]):
        verdict = verdicts.separation(found, runs)
        assert verdict is not None
        assert verdict.holds is None


def test_caching_is_judged_wherever_hbm_holds_a_pool() -> None:
    better, alike = ((0.9, 1.0), (0.5, 3.0)), ((0.5, 3.0), (0.5, 3.0))
    longer, fewer_hits = ((0.9, 3.0), (0.5, 1.0)), ((0.5, 1.0), (0.9, 3.0))

    def grid(*, two: object, four: object, eight: object) -> list[CachingPoint]:
        rows = [points(*pair, hbm=hbm) for hbm, pair in ((2, two), (4, four), (8, eight), (12, better))]  # type: ignore[misc]
        between = [replace(point, switch_every=every) for row in rows for point in row if point.switch_every == 1 for every in (4, 16)]
        return [*(point for row in rows for point in row), *between]

    whole = grid(two=alike, four=better, eight=better)
    without_blocks = [point for point in whole if (point.hbm_experts, point.switch_every) != (8, None)]
    for given, holds in (
        (whole, True),
        (grid(two=better, four=better, eight=longer), False),
        (grid(two=better, four=fewer_hits, eight=better), False),
        (grid(two=better, four=alike, eight=better), False),
        (without_blocks, None),
        ([point for point in whole if point.hbm_experts != 2], True),
        ([point for point in whole if point.hbm_experts != 12], None),
        ([point for point in whole if point.switch_every != 16], None),
    ):
        verdict = verdicts.caching(given, pool_experts=4)
        assert verdict is not None
        assert verdict.holds is holds
    assert verdicts.caching([], pool_experts=4) is None


def test_an_hbm_that_holds_no_pool_is_outside_the_rule_and_said_in_words() -> None:
    better, longer = ((0.9, 1.0), (0.5, 3.0)), ((0.49, 33.3), (0.48, 22.5))
    verdict = verdicts.caching([*points(*longer, hbm=2), *points(*better, hbm=4)], pool_experts=4)
    assert verdict is not None
    inside, _, outside = verdict.says.partition("Outside the rule, with HBM for less than a game's pool of 4: ")
    assert "HBM 2" not in inside
    assert "NOT SO" not in inside
    assert "one seed: one pair of wall-clock stalls" in inside
    assert "trainer, HBM 2: hits 49.00 %" in outside
    assert "stall 33.3 s and 22.5 s, which is longer in blocks" in outside
