"""A run's configuration: what it refuses before anything is trained, and files of older runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ooc_moe.config.agent import PRESETS
from ooc_moe.config.run import PPOConfig, RunConfig
from ooc_moe_wire.errors import InvalidRequest

TINY = PRESETS["tiny"]  # 16 experts; a game owns two pools of four in the one bank.
GAMES = ("krull", "boxing", "pong")


def run_of(**changes: Any) -> RunConfig:
    return RunConfig(**({"run_dir": Path("run"), "games": GAMES, "agent": TINY} | changes))


def test_a_file_of_an_older_run_which_lacks_the_switches_says_that_all_is_on() -> None:
    fields = json.loads(run_of().to_json())
    for name in ("exemplars_per_game", "detect_unknown", "belief_smoothing", "belief_switch_at"):
        del fields[name]
    del fields["ppo"]["anneal"], fields["ppo"]["replay_routing"], fields["agent"]["grow"]
    read = RunConfig.from_json(json.dumps(fields), Path("run"))
    assert read == run_of()
    assert (read.ppo.anneal, read.ppo.replay_routing, read.agent.grow, read.detect_unknown) == (True,) * 4
    assert (read.exemplars_per_game, read.belief_smoothing, read.belief_switch_at) == (200, 0.7, 0.7)


def test_a_file_of_an_older_run_which_names_no_arithmetic_computes_in_float32() -> None:
    fields = json.loads(run_of(games=GAMES[:2]).to_json())
    del fields["compute"], fields["deterministic"]
    read = RunConfig.from_json(json.dumps(fields), Path("run"))
    assert (read.compute, read.deterministic) == ("float32", False)
    chosen = run_of(games=GAMES[:2], compute="bfloat16", deterministic=True)
    assert RunConfig.from_json(chosen.to_json(), Path("run")) == chosen


@pytest.mark.parametrize(("sizes", "named"), [({"dim": 12, "num_heads": 3}, "dim: 12"), ({"hidden": 36}, "hidden: 36")])
def test_widths_that_have_no_product_in_bfloat16_are_refused_where_it_is_asked_for(sizes: dict[str, int], named: str) -> None:
    agent = replace(TINY, **sizes)
    assert run_of(games=GAMES[:2], agent=agent).compute == "float32"
    with pytest.raises(InvalidRequest, match=f"{named} is not a multiple of 8, which experts in bfloat16 need"):
        run_of(games=GAMES[:2], agent=agent, compute="bfloat16")


def test_another_arithmetic_is_refused_by_name() -> None:
    with pytest.raises(InvalidRequest, match="compute: 'float16' is not one of float32, bfloat16"):
        run_of(games=GAMES[:2], compute="float16")


def test_a_file_of_an_older_run_with_attention_that_is_gone_is_refused_by_name() -> None:
    fields = json.loads(RunConfig(run_dir=Path("run"), games=("pixel/catch",), agent=PRESETS["tiny"]).to_json())
    fields["agent"]["attention"] = "first-game"
    with pytest.raises(InvalidRequest, match="attention: 'first-game' of run is no longer supported"):
        RunConfig.from_json(json.dumps(fields), Path("run"))


def test_the_switches_survive_the_file() -> None:
    off = run_of(
        games=GAMES[:2],
        agent=replace(TINY, grow=False),
        ppo=PPOConfig(anneal=False, replay_routing=False),
        exemplars_per_game=0,
        detect_unknown=False,
        belief_smoothing=0.0,
        belief_switch_at=0.0,
    )
    assert RunConfig.from_json(off.to_json(), Path("run")) == off


@pytest.mark.parametrize(
    ("changes", "needed"),
    [
        ({}, "num_experts: 16 is not at least 24, which 3 games need (8 each, by pool_size 4) where grow is off"),
        ({"pool_size": 6, "banks": "per-layer"}, "num_experts: 16 is not at least 18, which 3 games need (6 each, by pool_size 6)"),
        ({"pool_size": 6, "pools": "shared"}, "num_experts: 16 is not at least 18, which 3 games need (6 each, by pool_size 6)"),
        ({"shared_experts": 4}, "num_experts: 16 is not at least 24"),
    ],
)
def test_more_games_than_a_bank_that_may_not_grow_has_pools_for_are_refused(changes: dict[str, Any], needed: str) -> None:
    agent = replace(TINY, **changes)
    run_of(agent=agent)
    with pytest.raises(InvalidRequest) as error:
        run_of(agent=replace(agent, grow=False))
    assert str(error.value).startswith(needed)


@pytest.mark.parametrize(
    ("changes", "games"),
    [
        ({}, ("krull", "boxing", "krull", "boxing")),  # Who comes back has a pool.
        ({"pool_size": 5, "banks": "per-layer"}, GAMES),
        ({"pool_size": 5, "pools": "shared"}, GAMES),
        ({"routing": "token"}, GAMES),
        ({"shared_experts": 4}, GAMES[:2]),  # What is borrowed has its owner.
    ],
)
def test_games_that_find_pools_in_a_bank_that_may_not_grow_are_taken(changes: dict[str, Any], games: tuple[str, ...]) -> None:
    run_of(games=games, agent=replace(TINY, grow=False, **changes))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"exemplars_per_game": -1, "detect_unknown": False}, "exemplars_per_game: -1 is not at least 0"),
        ({"exemplars_per_game": 1}, "exemplars_per_game: 1 is not at least 2, which detect_unknown"),
        ({"belief_smoothing": 1.0}, "belief_smoothing: 1.0"),
        ({"belief_smoothing": -0.1}, "belief_smoothing: -0.1"),
        ({"belief_switch_at": 1.0}, "belief_switch_at: 1.0"),
        ({"belief_switch_at": float("nan")}, "belief_switch_at: nan"),
    ],
)
def test_what_no_detector_can_do_is_refused_by_name_and_value(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        run_of(**changes)
    assert str(error.value).startswith(named)
