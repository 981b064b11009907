"""A study: its runs are what the issue asks for, the runner goes on where it was stopped, and what is judged is judged by the rules."""

import importlib.metadata
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ooc_moe import checkpoint, statistics, summary
from ooc_moe.cli import main
from ooc_moe.envs import REFERENCE_SCORES
from ooc_moe.metrics import CONFIG_FILE, MetricsWriter, read_metrics
from ooc_moe.run_config import PPOConfig, RunConfig
from ooc_moe.run_record import RunRecord
from ooc_moe.session import open_session
from ooc_moe.study import home, runner, verdicts
from ooc_moe.study.caching import CachingPoint, Way
from ooc_moe.study.costs import cold_fetched, cold_share, costs_of
from ooc_moe.study.definitions import STUDIES, Study, StudyRun, find_study
from ooc_moe.study.runner import LOG_FILE, State, Status, run_all, state_of, steps_done, steps_of
from ooc_moe.study.scores import StudyScores, strata
from ooc_moe.study.tables import tables
from ooc_moe.study.variants import VARIANTS
from ooc_moe_client.in_memory import InMemoryStore
from ooc_moe_wire.errors import InvalidRequest
from tests.ooc_moe.runs import assert_same_run, wait_for

SYNTHETIC = find_study("synthetic")
GAMES = ("pixel/catch", "pixel/avoid", "pixel/toward")
# Raw returns; the scale is that of the pixel games: best play is 5, 5 and 20.
RANDOM = {"pixel/catch": -1.0, "pixel/avoid": 1.0, "pixel/toward": 0.0}
SINGLE = {"pixel/catch": 4.0, "pixel/avoid": 4.0, "pixel/toward": 16.0}
CONSTANT = {"pixel/catch": 0.0, "pixel/avoid": 2.0, "pixel/toward": 0.0}


def small_study(**changes: object) -> Study:
    """Three games, two orders, the variants that verdicts need."""
    fields = {
        "name": "small",
        "asks": "Does it work?",
        "limits": "Everything.",
        "recipe": replace(SYNTHETIC.recipe, steps_per_game=2048),
        "orders": {"forth": GAMES, "back": GAMES[::-1]},
        "seeds": {"full": 5, "moe-token": 5, "dense": 5, "joint": 1, "single": 3},
    }
    return Study(**(fields | changes))  # type: ignore[arg-type]


# What is run


@pytest.mark.parametrize("name", VARIANTS)
def test_in_every_variant_heads_norms_and_embedding_belong_to_a_game(name: str, tmp_path: Path) -> None:
    config = replace(VARIANTS[name].change(SYNTHETIC.recipe), run_dir=tmp_path / "run")
    store = InMemoryStore()
    for spec in config.agent.bank_specs(config.name, config.seed):
        store.create_bank(spec)
    with open_session(config, store, config.agent.bank_names(config.name)) as session:
        agent = session.agent
        for game in GAMES[:2]:
            agent.add_game(game)
        own = [set(agent.game_parameters(game)) for game in GAMES[:2]]
        assert own[0].isdisjoint(own[1])
        for parameters in own:
            names = {name.split(".", 2)[2] for name, parameter in agent.named_parameters() if parameter in parameters}
            assert names >= {
                "policy.weight",
                "value.weight",
                "embedding_TD",
                "norm.weight",
                "blocks.0.norm.weight",
                "blocks.0.moe.norm.weight",
            }


@pytest.mark.parametrize("study", ["synthetic", "atari-cpu"])
def test_dense_has_the_active_and_dense_total_all_of_the_experts_parameters(study: str) -> None:
    recipe = find_study(study).recipe
    active = recipe.agent.num_layers * recipe.agent.top_k * recipe.agent.dim * recipe.agent.hidden * 2
    total = recipe.agent.estimate_params().experts
    dense, all_of_it = (VARIANTS[name].change(recipe).agent.estimate_params().experts for name in ("dense", "dense-total"))
    assert dense == pytest.approx(active, rel=0.02)
    assert all_of_it == pytest.approx(total, rel=0.02)


def test_only_the_full_recipe_and_cloning_and_consolidation_protect_what_is_shared() -> None:
    protection = {name: variant.change(SYNTHETIC.recipe).protection for name, variant in VARIANTS.items()}
    assert protection == dict.fromkeys(VARIANTS, "none") | {
        "full": SYNTHETIC.recipe.protection,
        "full-share": SYNTHETIC.recipe.protection,
        "dense-replay": SYNTHETIC.recipe.protection,
        "pools-freeze": "freeze",
        "dense-clone": "clone",
        "dense-ewc": "ewc",
    }
    assert protection["full"] == "replay"


def test_a_rival_is_not_weighed_by_what_was_chosen_for_the_recipe() -> None:
    weights = {
        name: variant.change(replace(SYNTHETIC.recipe, protection_weight=0.3)).protection_weight for name, variant in VARIANTS.items()
    }
    assert weights == dict.fromkeys(VARIANTS) | {"full": 0.3, "full-share": 0.3, "dense-replay": 0.3}


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


def test_the_caching_study_has_blocks_and_three_intervals_at_three_sizes_and_one_trace() -> None:
    runs = find_study("caching").runs(Path("runs"))
    assert len({(run.config.agent.hbm_experts, run.config.switch_every) for run in runs}) == 3 * 4
    (traced,) = (run for run in runs if run.config.trace)
    assert traced.config.switch_every == 0
    assert Path(traced.config.trace or "").parent == traced.config.run_dir


# The runner

TINY = RunConfig(
    run_dir=Path("unused"),
    games=("pixel/catch", "pixel/toward"),
    agent=replace(SYNTHETIC.recipe.agent, num_experts=8, pool_size=2, hbm_experts=4, dram_experts=6),
    ppo=PPOConfig(num_envs=4, rollout_steps=8, epochs=1, minibatch_segments=4),
    steps_per_game=64,
    eval_envs=2,
    eval_steps=12,
)


def begun(config: RunConfig, *, with_checkpoint: bool, done: bool = False) -> RunConfig:
    """A directory as a run leaves it."""
    config.run_dir.mkdir(parents=True)
    (config.run_dir / CONFIG_FILE).write_text(config.to_json())
    writer = MetricsWriter(config.run_dir, tensorboard=False)
    writer.log("update", step=32, update=1)
    if done:
        writer.log("done", step=128, update=4)
    writer.close()
    if with_checkpoint:
        saved = config.run_dir / checkpoint.DIRECTORY / checkpoint.LATEST
        saved.parent.mkdir()
        saved.touch()
    return config


def test_how_far_a_run_came_is_read_from_its_directory(tmp_path: Path) -> None:
    configs = {name: replace(TINY, run_dir=tmp_path / name) for name in ("new", "broken", "begun", "done")}
    begun(configs["broken"], with_checkpoint=False)
    begun(configs["begun"], with_checkpoint=True)
    begun(configs["done"], with_checkpoint=True, done=True)
    assert {name: state_of(config) for name, config in configs.items()} == {state.value: state for state in State}
    assert steps_of(configs["new"]) == 128
    assert [steps_done(configs[name].run_dir) for name in ("new", "begun", "done")] == [0, 32, 128]


def test_a_run_of_another_configuration_is_not_taken_for_this_one(tmp_path: Path) -> None:
    begun(replace(TINY, run_dir=tmp_path / "run"), with_checkpoint=True, done=True)
    for changed, words in (
        (replace(TINY, steps_per_game=96), "steps_per_game 64, not 96"),
        (replace(TINY, agent=replace(TINY.agent, top_k=1)), "agent.top_k 2, not 1"),
    ):
        with pytest.raises(InvalidRequest, match=words):
            state_of(replace(changed, run_dir=tmp_path / "run"))


# What the runner sees of a run, without its agent: it ends at once, or fails for an unknown game.
_CHILD = """
import json, pathlib, sys
run_dir, config = pathlib.Path(sys.argv[1]), sys.stdin.read()
if "pixel/nothing" in config:
    print("InvalidRequest: game: 'pixel/nothing'")
    raise SystemExit(2)
(run_dir / "config.json").write_text(config)
(run_dir / "metrics.jsonl").write_text('{"event":"done","step":64}\\n')
"""


@pytest.mark.parametrize("real", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_runs_are_made_begun_ones_anew_and_a_failure_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, real: bool
) -> None:
    if not real:
        monkeypatch.setattr(runner, "CHILD", ("-c", _CHILD))
    good, bad, done = (replace(TINY, run_dir=tmp_path / name, games=("pixel/catch",)) for name in ("good", "bad", "done"))
    bad = replace(bad, games=("pixel/nothing",))
    begun(good, with_checkpoint=False)
    begun(done, with_checkpoint=True, done=True)
    seen: list[Status] = []
    outcome = run_all([done, bad, good], jobs=2, watch=seen.append)
    assert not outcome.interrupted
    assert list(outcome.failed) == [bad.run_dir]
    assert "ended with 2: InvalidRequest: game: 'pixel/nothing'" in outcome.failed[bad.run_dir]
    assert state_of(good) is State.DONE
    if real:
        record = RunRecord.read(good.run_dir)
        assert record.scores.mean_PG.shape == (1, 1)
        assert record.made_by.startswith(importlib.metadata.version("ooc-moe"))
    (aside,) = tmp_path.glob("good.broken-*")
    assert [event["event"] for event in read_metrics(aside)] == ["update"]
    assert not (done.run_dir / LOG_FILE).exists()
    assert (seen[-1].done, seen[-1].total, seen[-1].failed) == (2, 3, 1)
    assert {run_dir for status in seen for run_dir in status.running} <= {good.run_dir, bad.run_dir}


_RUNNER = """
import sys
from pathlib import Path
from ooc_moe.run_config import RunConfig
from ooc_moe.study.runner import run_all
run_dir = Path(sys.argv[1])
outcome = run_all([RunConfig.from_json(sys.stdin.read(), run_dir)], jobs=1)
print(outcome.interrupted, len(outcome.failed))
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_runner_saves_and_goes_on_to_the_same_end(tmp_path: Path, number: int) -> None:
    # checkpoint_every is one update: where a checkpoint falls resets the environments, and a run stopped elsewhere would differ.
    config = replace(TINY, steps_per_game=32 * 40, checkpoint_every=1, run_dir=tmp_path / "stopped" / "run")
    undisturbed = replace(config, run_dir=tmp_path / "undisturbed" / "run")
    command = [sys.executable, "-c", _RUNNER, str(config.run_dir)]
    runner = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=os.getcwd())
    assert runner.stdin is not None
    runner.stdin.write(config.to_json())
    runner.stdin.close()
    wait_for(lambda: steps_done(config.run_dir) > 0)
    runner.send_signal(number)
    assert runner.stdout is not None
    assert runner.stdout.read().split() == ["True", "0"]
    runner.wait()
    assert state_of(config) is State.BEGUN
    assert run_all([config, undisturbed], jobs=2).failed == {}
    assert "resumed" in [event["event"] for event in read_metrics(config.run_dir)]
    assert_same_run(config.run_dir, undisturbed.run_dir)


# What is read


def made_up(
    study: Study, directory: Path, final: Mapping[str, float], *, learned: float = 1.0, seeds: int = 5, usage: float = 0.0
) -> list[StudyRun]:
    """Finished runs: each game is learned to `learned` of single-task; what is left at the end is `final[variant]` of that.

    `usage`: how much of its mass an environment puts on experts of its game, the rest on one that all use.
    """
    runs = [run for run in study.runs(directory) if run.config.seed < seeds and (run.variant in final or run.variant == "single")]
    for run in runs:
        config = run.config
        config.run_dir.mkdir(parents=True, exist_ok=True)
        (config.run_dir / CONFIG_FILE).write_text(config.to_json())
        writer = MetricsWriter(config.run_dir, tensorboard=False)
        rng = np.random.default_rng(config.seed)
        phases = [len(config.games) - 1] if config.switch_every else range(len(config.games))
        for phase in phases:
            for column, game in enumerate(config.games):
                kept = 1.0 if run.variant == "single" else learned * (final[run.variant] if column < phase else 1.0)
                score = RANDOM[game] + (kept if column <= phase else 0.0) * (SINGLE[game] - RANDOM[game])
                score += rng.normal(0, 0.01)
                by_env = [{"0": {str(column): round(1000 * usage), "9": 1000 - round(1000 * usage)}} for _ in range(6)]
                writer.log(
                    "evaluation",
                    step=phase,
                    update=phase,
                    game=config.games[phase],
                    phase=phase,
                    evaluated=game,
                    known=column <= phase,
                    returns=[score - 0.1, score, score + 0.1],
                    return_mean=score,
                    random_mean=RANDOM[game],
                    episodes_truncated=0,
                    believed={game: 1.0},
                    detector_accuracy=0.99,
                    steps_to_detect=4.0,
                    usage={"0": {str(column): 10}},
                    **({"usage_by_env": by_env} if run.variant == "moe-token" else {}),
                )
        writer.log("done", step=steps_of(config), update=3)
        writer.close()
    return runs


def scores_of(study: Study, runs: list[StudyRun], constants: Mapping[str, float] = CONSTANT) -> StudyScores:
    return home.collect(study, runs, constants)


def mean(found: StudyScores, variant: str, name: str) -> float:
    return float(statistics.mean(statistics.pooled(strata(found.cells(variant, name)))))


def test_scores_are_zero_at_random_play_and_one_at_single_task(tmp_path: Path) -> None:
    study = small_study()
    found = scores_of(study, made_up(study, tmp_path, {"full": 0.9, "dense": 0.5, "joint": 0.7}, learned=0.8, seeds=2))
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


def test_a_game_that_needs_no_looking_or_was_not_learned_is_left_out_by_name(tmp_path: Path) -> None:
    study = small_study()
    runs = made_up(study, tmp_path, {"full": 1.0}, seeds=2)
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


def change_evaluations(runs: list[StudyRun], variant: str, game: str, **fields: object) -> None:
    """Overwrites fields of what the runs of a variant found of a game."""
    for run in runs:
        if run.variant == variant:
            events = [event | (fields if event.get("evaluated") == game else {}) for event in read_metrics(run.config.run_dir)]
            (run.config.run_dir / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))


def test_a_game_that_evaluation_cut_counts_when_what_was_seen_is_enough(tmp_path: Path) -> None:
    study = small_study()
    runs = made_up(study, tmp_path, {"full": 1.0}, seeds=2)
    change_evaluations(runs, "single", "pixel/toward", episodes_truncated=3)
    assert scores_of(study, runs).facts["pixel/toward"].left_out == ""
    change_evaluations(runs, "single", "pixel/toward", return_mean=3.94)
    left_out = scores_of(study, runs).facts["pixel/toward"].left_out
    assert left_out == "evaluation cut its games; at least 0.197 of the way from random play to the reference, 0.2 wanted"


def test_a_game_counts_only_when_it_is_clearly_above_random_play_too(tmp_path: Path) -> None:
    study = small_study()
    runs = made_up(study, tmp_path, {"full": 1.0}, seeds=2)
    change_evaluations(runs, "single", "pixel/catch", returns=[-20.0, 4.0, 28.0])
    assert "not above the best constant action" in scores_of(study, runs).facts["pixel/catch"].left_out
    below = scores_of(study, runs, CONSTANT | {"pixel/catch": -100.0})  # As in Atari games: every constant action gets less.
    assert "not above random play" in below.facts["pixel/catch"].left_out


def test_a_stratum_is_the_runs_of_an_order_and_the_games_of_a_run_stay_together(tmp_path: Path) -> None:
    study = small_study()
    found = scores_of(study, made_up(study, tmp_path, {"full": 1.0}, seeds=2))
    assert [group.shape for group in strata(found.cells("full", "learning"))] == [(2, 3), (2, 3)]
    retention = strata(found.cells("full", "retention"))
    assert [np.isnan(group).all(axis=0).tolist() for group in retention] == [[False, False, True], [True, False, False]]
    assert len(strata(found.cells("single", "average"))) == 3
    assert [group.shape for group in strata(found.worst("full"))] == [(2, 1), (2, 1)]


def test_what_was_hardly_learned_says_nothing_about_retention(tmp_path: Path) -> None:
    study = small_study()
    found = scores_of(study, made_up(study, tmp_path, {"full": 1.0, "dense": 1.0}, learned=0.15, seeds=1))
    assert strata(found.cells("dense", "retention")) == []
    assert mean(found, "dense", "learning") == pytest.approx(0.15, abs=0.01)


def test_protection_holds_only_with_enough_runs_a_clear_gap_and_learning(tmp_path: Path) -> None:
    study = small_study()

    def judged(name: str, final: dict[str, float], **changes: float) -> verdicts.Verdict:
        verdict = verdicts.protection(scores_of(study, made_up(study, tmp_path / name, final, **changes)))  # type: ignore[arg-type]
        assert verdict is not None
        return verdict

    good = {"full": 0.98, "moe-token": 0.6, "dense": 0.5}
    assert judged("good", good).holds is True
    assert "retention(full) - retention(dense) = +0.48 [+0.4" in judged("good", good).says
    assert judged("no better than dense", good | {"dense": 0.98}).holds is False
    assert judged("did not learn", good, learned=0.8).holds is False
    few = judged("few seeds", good, seeds=4)
    assert few.holds is None
    assert "wants 5 seeds in 2 orders" in few.says
    assert "retention(moe-token) = +0.38 [" in few.says
    assert "retention(moe-token) = +0.38; " in judged("one seed", good, seeds=1).says


def test_protection_says_nothing_without_single_task_runs_or_a_rival(tmp_path: Path) -> None:
    study = small_study()
    runs = made_up(study, tmp_path, {"full": 1.0})
    alone = verdicts.protection(scores_of(study, runs))
    unscaled = verdicts.protection(scores_of(study, [run for run in runs if run.variant != "single"]))
    assert alone is not None
    assert unscaled is not None
    assert (alone.holds, unscaled.holds) == (None, None)
    assert "nothing to compare yet of moe-token, dense" in alone.says
    assert "single-task runs are missing" in unscaled.says


@pytest.mark.parametrize(("usage", "holds"), [(0.5, True), (0.02, True), (0.0, False)])
def test_separation_holds_where_games_use_experts_of_their_own(tmp_path: Path, usage: float, holds: bool) -> None:
    study = small_study(verdict_seeds=2)
    found = scores_of(study, made_up(study, tmp_path, {"moe-token": 0.5}, seeds=2, usage=usage))
    runs = verdicts.separations(found)
    assert len(runs) == 4
    assert runs[0].within == pytest.approx(1)
    assert runs[0].between == pytest.approx(1 - usage)
    assert runs[0].gap == pytest.approx(usage)
    verdict = verdicts.separation(found, runs)
    assert verdict is not None
    assert verdict.holds is holds
    assert ("It is not chance, but little" in verdict.says) is (usage == 0.02)


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
    runs = made_up(small_study(), tmp_path, {"moe-token": 0.5})
    tokens = dict(zip(GAMES, (1000, 150, 30), strict=True))
    with_usage(runs, lambda game, rng: rng.multinomial(tokens[game], [1 / 20] * 20))
    found = verdicts.separations(scores_of(small_study(), runs))
    assert len(found) == 10
    assert sum(each.p < 0.1 for each in found) <= 3
    assert np.mean([each.gap for each in found]) == pytest.approx(0, abs=0.01)


def test_two_games_that_do_not_separate_are_named_beside_one_that_does(tmp_path: Path) -> None:
    study = small_study(verdict_seeds=2)
    runs = made_up(study, tmp_path, {"moe-token": 0.5}, seeds=2)
    with_usage(runs, lambda game, rng: [0, 50, 50] if game == "pixel/toward" else [50, 50, 0])
    found = scores_of(study, runs)
    separated = verdicts.separations(found)
    verdict = verdicts.separation(found, separated)
    assert verdict is not None
    assert verdict.holds is True
    assert "Not 0.05 apart: pixel/avoid and pixel/catch (1.00 and 1.00)." in verdict.says
    rows = next(table for table in tables(found, separated, []) if table.title == "Separation of every two games").rows
    assert rows[0] == ["moe-token", "pixel/avoid, pixel/catch", "1.000", "1.000", "0.000"]
    assert [row[2:] for row in rows[1:]] == [["1.000", "0.500", "0.500"]] * 2


@pytest.mark.parametrize(("usage", "words"), [(0.1, ": 1.00 and 0.90 (4 runs)."), (0.6, ", which is the pictures' and the per-game ")])
def test_what_an_untrained_network_separates_is_said_beside(tmp_path: Path, usage: float, words: str) -> None:
    study = small_study(verdict_seeds=2)
    runs = made_up(study, tmp_path, {"moe-token": 0.5}, seeds=2, usage=0.5)
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
    found = scores_of(study, made_up(study, tmp_path, {"moe-token": 0.5}, seeds=2, usage=0.5))
    first, *others = verdicts.separations(found)
    for runs in ([replace(first, p=float("nan")), *others], [*others, replace(first, p=float("nan"))]):
        verdict = verdicts.separation(found, runs)
        assert verdict is not None
        assert verdict.holds is None


def points(blocks: tuple[float, float], turns: tuple[float, float], *, hbm: int = 4) -> list[CachingPoint]:
    """(hit rate, stall) of games in blocks and in turns, alike for trainer and simulator."""
    return [
        CachingPoint(
            way=way,
            hbm_experts=hbm,
            bank_experts=20,
            switch_every=every,
            accesses=100,
            hit_rate=rate,
            belady=0.99,
            stall_s=stall,
        )
        for way in Way
        for every, (rate, stall) in ((None, blocks), (1, turns))
    ]


def test_caching_is_judged_wherever_hbm_holds_a_pool() -> None:
    better, worse, alike = ((0.9, 1.0), (0.5, 3.0)), ((0.9, 3.0), (0.5, 1.0)), ((0.5, 3.0), (0.5, 3.0))

    def grid(*, two: object, four: object, eight: object) -> list[CachingPoint]:
        rows = [points(*pair, hbm=hbm) for hbm, pair in ((2, two), (4, four), (8, eight))]  # type: ignore[misc]
        between = [replace(point, switch_every=every) for row in rows for point in row if point.switch_every == 1 for every in (4, 16)]
        return [*(point for row in rows for point in row), *between]

    whole = grid(two=alike, four=better, eight=better)
    without_blocks = [point for point in whole if (point.hbm_experts, point.switch_every) != (8, None)]
    for given, holds in (
        (whole, True),
        (grid(two=better, four=better, eight=worse), False),
        (grid(two=better, four=alike, eight=better), False),
        (without_blocks, None),
        ([point for point in whole if point.hbm_experts != 2], None),
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
    assert "trainer, HBM 2: hits 49.00%" in outside
    assert "stall 33.3 s and 22.5 s, which is longer in blocks" in outside


def test_cold_experts_are_those_that_an_earlier_game_had_used(tmp_path: Path) -> None:
    (run, *_) = small_study().runs(tmp_path)
    run.config.run_dir.mkdir(parents=True)
    (run.config.run_dir / CONFIG_FILE).write_text(run.config.to_json())
    writer = MetricsWriter(run.config.run_dir, tensorboard=False)
    for number, (game, usage) in enumerate(zip(GAMES, ({0: 10, 1: 10}, {1: 5, 2: 15}, {0: 2, 1: 2, 2: 4}), strict=True)):
        writer.log("update", step=number, update=number, game=game, usage={"0": usage})
    writer.close()
    assert cold_share(RunRecord.read(run.config.run_dir)) == pytest.approx((5 / 20 + 1) / 2)


def test_cold_experts_fetched_and_left_equal_are_counted(tmp_path: Path) -> None:
    """The second game fetches an expert of the first and trains expert 2; the third uses expert 1 and, wrongly, changes expert 2."""
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
    # 0 and 1 outlast the second game; of 0 and 2, which the third does not use, 0.
    assert record.cold_unchanged == (3, 4)
    assert cold_fetched(record) == 1 + 2
    assert ("cold experts equal bit for bit", "3 of 4") in summary.facts(record)
    older = replace(run, config=replace(run.config, run_dir=tmp_path / "older"))
    begun(older.config, with_checkpoint=False)
    found = StudyScores(small_study(), {run: record, older: RunRecord.read(older.config.run_dir)}, {}, CONSTANT)
    costs = next(table for table in tables(found, [], []) if table.title == "Costs")
    assert dict(zip(costs.columns, costs.rows[0], strict=True))["cold and equal"] == "3 of 4 in 1 of 2 runs"


def test_what_protection_keeps_is_counted_in_the_last_checkpoint(tmp_path: Path) -> None:
    study = small_study()
    runs = made_up(study, tmp_path, {"full": 1.0}, seeds=1)
    stored = [{"screens": torch.zeros(200, 42, 42, dtype=torch.uint8), "num_seen": 3200}] * 3
    springs = {"dense": [(torch.zeros(4, 5), torch.zeros(4, 5))], "experts": {(0, 1): (torch.zeros(10), torch.zeros(10))}}
    state = {"protection": springs, "detector": {"_extra_state": {"stored": stored}}}
    for run in runs:
        path = run.config.run_dir / checkpoint.DIRECTORY / checkpoint.LATEST
        checkpoint.save(path, checkpoint.Checkpoint(progress=checkpoint.Progress(), snapshot_id=1, state=state))
    found = scores_of(study, runs)
    assert (costs_of(found, "full").protection_bytes, costs_of(found, "full").exemplar_bytes) == (4 * (40 + 20), 3 * 200 * 42 * 42)
    assert costs_of(found, "single").protection_bytes == 3 * 4 * 60  # Three networks.
    costs = next(table for table in tables(found, [], []) if table.title == "Costs")
    assert dict(zip(costs.columns, costs.rows[0], strict=True))["kept for protection"] == "240 Bytes + 1.0 MiB"


def test_an_older_run_says_nothing_of_what_it_did_not_log(tmp_path: Path) -> None:
    study = small_study()
    found = scores_of(study, made_up(study, tmp_path, {"full": 1.0}, seeds=1))
    costs = next(table for table in tables(found, [], []) if table.title == "Costs")
    cells = dict(zip(costs.columns, costs.rows[0], strict=True))
    assert (cells["of them cold"], cells["cold and equal"]) == (summary.DASH, summary.DASH)


def test_a_study_that_is_not_finished_is_written_with_what_is_missing(tmp_path: Path) -> None:
    study = small_study()
    made_up(study, tmp_path / "runs", {"full": 0.98, "moe-token": 0.6, "dense": 0.5}, seeds=3)
    results = home.results_of(study, study.runs(tmp_path / "runs"), CONSTANT)
    page, numbers, *pictures = home.write(results, tmp_path / "home", command="ooc-moe study small")
    text = page.read_text()
    # 2 seeds of three variants in two orders, and one of joint in two, are not there.
    assert len(results.found.missing) == 2 * 3 * 2 + 1 * 2
    assert f"- runs: {len(results.found.records)} of {len(results.found.records) + 14} are done" in text
    assert "- full, forth, seed 4: new, 0 of 6,144 steps" in text
    assert "**protection: no verdict.**" in text
    assert str(tmp_path) not in text + numbers.read_text()
    written = json.loads(numbers.read_text())
    assert len(written["runs"]) == len(results.found.records)
    assert {path.name for path in pictures} == {"small_measures.png", "small_games.png"}
    assert all(f"({path.name})" in text for path in pictures)


def test_runs_shorter_than_the_study_are_said_to_be_and_shown_as_they_were_made(tmp_path: Path) -> None:
    # The untrained variant is shorter than the recipe by itself.
    seeds = dict.fromkeys(("full", "moe-token", "dense", "moe-untrained", "single"), 1)
    study = small_study(recipe=replace(SYNTHETIC.recipe, steps_per_game=51_200), seeds=seeds)
    whole = home.results_of(study, made_up(study, tmp_path / "whole", {"full": 1.0, "moe-untrained": 1.0}, seeds=1), CONSTANT)
    assert {run.config.steps_per_game for run in whole.found.of("moe-untrained")} == {10_240}
    short_study = replace(study, recipe=replace(study.recipe, steps_per_game=20_480))
    results = home.results_of(study, made_up(short_study, tmp_path / "short", {"full": 1.0}, seeds=1), CONSTANT)
    assert not any("shorter" in verdict.says for verdict in whole.verdicts)
    assert results.verdicts
    assert all("shorter than the study's own: 20,480 steps in each game, not 51,200." in verdict.says for verdict in results.verdicts)
    page, *_ = home.write(results, tmp_path / "home", command="ooc-moe study small")
    _, _, configured = page.read_text().partition("## The configuration of full, forth, seed 0\n")
    assert '"steps_per_game": 20480' in configured


def test_notes_stay_when_the_results_are_written_again(tmp_path: Path) -> None:
    study = small_study()
    results = home.results_of(study, study.runs(tmp_path), CONSTANT)
    page, *_ = home.write(results, tmp_path / "home", command="ooc-moe study small")
    page.write_text(page.read_text().replace("(to be written: what it means)", "It means little."))
    home.write(results, tmp_path / "home", command="ooc-moe study small")
    assert page.read_text().endswith("## Notes\n\nIt means little.\n")


def test_tables_show_every_run_and_every_variant_beside_the_baselines(tmp_path: Path) -> None:
    study = small_study()
    runs = made_up(study, tmp_path, {"full": 0.98, "dense": 0.5}, seeds=2)
    by_title = {table.title: table for table in tables(scores_of(study, runs), [], points((0.9, 1.0), (0.5, 3.0)))}
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
    assert (name, learning, dormant) == ("single", average, summary.DASH)
    assert float(learning.removesuffix(" %")) == pytest.approx(beside, abs=0.3)


def test_games_that_nothing_tells_apart_are_named_in_the_table(tmp_path: Path) -> None:
    study = small_study()
    runs = made_up(study, tmp_path, {"full": 1.0}, seeds=2)
    clear = next(table for table in tables(scores_of(study, runs), [], []) if table.title == "Recognising games")
    assert "Ambiguous" not in clear.note
    half = {"probabilities": {"pixel/catch": 0.5, "pixel/avoid": 0.5, "pixel/toward": 0.0}}
    sure = {"probabilities": {"pixel/catch": 0.0, "pixel/avoid": 0.0, "pixel/toward": 1.0}}
    for run in runs:
        events = [event | (sure if event.get("evaluated") == "pixel/toward" else half) for event in read_metrics(run.config.run_dir)]
        (run.config.run_dir / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    twins = next(table for table in tables(scores_of(study, runs), [], []) if table.title == "Recognising games")
    assert "**Ambiguous: pixel/avoid and pixel/catch**, confusion 1.00 in 4 runs" in twins.note
    assert "pixel/toward" not in twins.note


def test_steps_to_detect_leave_out_the_first_game_and_count_whoever_never_does(tmp_path: Path) -> None:
    study = small_study(orders={"forth": GAMES})
    runs = made_up(study, tmp_path, {"full": 1.0}, seeds=1)
    for game, steps in zip(GAMES, ([0, None, 0], [3, 5, None], [4, None, None]), strict=True):
        change_evaluations(runs, "full", game, steps_to_detect_by_env=steps)
    table = next(table for table in tables(scores_of(study, runs), [], []) if table.title == "Recognising games")
    cells = dict(zip(table.columns, table.rows[0], strict=True))
    assert (cells["steps to detect"], cells["never"]) == ("4.00", "4 of 9")


# The command


def test_the_command_lists_what_there_is_and_names_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*arguments: str) -> str:
        with pytest.raises(SystemExit):
            main(["study", *arguments])
        captured = capsys.readouterr()
        return " ".join((captured.out + captured.err).split())

    assert all(name in said() for name in ("synthetic", "atari-cpu", "caching"))
    assert "study: 'nothing' is not one of synthetic, " in said("nothing")
    assert "seeds: 0 is not at least 1" in said("synthetic", "--seeds", "0")
    assert "jobs: 0 is not at least 1" in said("synthetic", "--jobs", "0", "--runs", str(tmp_path))
    assert "new" in said("synthetic-twins", "--dry-run", "--runs", str(tmp_path))
