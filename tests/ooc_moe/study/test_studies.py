"""A study's runs are those that its definition names."""

from pathlib import Path

import pytest

from ooc_moe.study.studies import STUDIES, find_study
from ooc_moe.study.variants import VARIANTS
from ooc_moe_wire.errors import InvalidRequest
from tests.ooc_moe.study.made_up_studies import SYNTHETIC


def test_the_synthetic_study_has_the_seeds_and_orders_that_the_verdicts_want() -> None:
    runs = SYNTHETIC.runs(Path("runs"))
    count: dict[tuple[str, str], int] = {}
    for run in runs:
        count[run.variant, run.order] = count.get((run.variant, run.order), 0) + 1
    assert set(SYNTHETIC.seeds) == set(VARIANTS)
    for (variant, _), seeds in count.items():
        want = 5 if variant in ("full", "moe-token", "dense", "dense-clone") else 1 if variant == "moe-token-out" else 3
        assert seeds == want
    assert {order for variant, order in count if variant == "full"} == {"catch-first", "cross-first"}
    assert {order for variant, order in count if variant == "single"} == {game.replace("/", "-") for game in SYNTHETIC.games}
    assert len({run.config.run_dir for run in runs}) == len(runs)


def test_the_work_goes_seed_by_seed_with_the_most_important_variants_first() -> None:
    runs = SYNTHETIC.runs(Path("runs"))
    assert [run.config.seed for run in runs] == sorted(run.config.seed for run in runs)
    assert list(dict.fromkeys(run.variant for run in runs)) == list(SYNTHETIC.seeds)
    assert runs[0].config.run_dir == Path("runs/synthetic/full/catch-first/seed-0")


def test_a_part_of_a_study_is_some_of_its_runs_unchanged() -> None:
    part = SYNTHETIC.runs(Path("runs"), variants=["dense", "full"], seeds=2)
    assert len(part) == 2 * 2 * 2
    assert set(part) < set(SYNTHETIC.runs(Path("runs")))
    with pytest.raises(InvalidRequest, match="variants: 'densest' is not one of full, "):
        SYNTHETIC.runs(Path("runs"), variants=["densest"])


def test_hbm_holds_a_fraction_of_the_experts_but_for_plain_token_routing() -> None:
    for study in STUDIES.values():
        for run in study.runs(Path("runs")):
            agent = run.config.agent
            everything = run.variant in ("moe-token", "moe-untrained") or agent.num_experts == 1
            assert (agent.hbm_experts == agent.num_banks * agent.num_experts) is everything, run


def test_the_caching_study_has_blocks_and_three_intervals_at_three_sizes_that_hold_a_pool_and_at_one_that_does_not() -> None:
    runs = find_study("caching").runs(Path("runs"))
    assert len({(run.config.agent.hbm_experts, run.config.switch_every) for run in runs}) == 4 * 4
    (traced,) = (run for run in runs if run.config.trace)
    assert traced.config.switch_every == 0
    assert Path(traced.config.trace or "").parent == traced.config.run_dir
