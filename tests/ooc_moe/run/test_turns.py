"""Games that take turns, games that come back, and what each turn leaves alone: whole tiny runs in memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from ooc_moe.config.run import RunConfig
from ooc_moe.learning.rollout import Collector
from ooc_moe.metrics.log import Event, read_metrics
from ooc_moe.metrics.run import RunRecord
from ooc_moe.session import checkpoint
from ooc_moe_client.in_memory import InMemoryStore
from ooc_moe_wire.errors import InvalidRequest
from tests.ooc_moe.runs import (
    PIXEL_AGENT,
    assert_same_end,
    bodies,
    end_of,
    pixel_run,
    play,
    resume_in,
    updates,
    without_clock,
)

CATCH, AVOID = "pixel/catch", "pixel/avoid"
STEPS_PER_UPDATE = 4  # Optimizer steps.


def _events(config: RunConfig, kind: str) -> list[Event]:
    return [event for event in read_metrics(config.run_dir) if event["event"] == kind]


def test_games_take_turns_until_each_had_all_its_updates(tmp_path):
    config = pixel_run(tmp_path / "run", updates=3, switch_every=2, eval_steps=4)
    play(config, InMemoryStore())
    assert [event["game"] for event in updates(config.run_dir)] == [CATCH] * 2 + [AVOID] * 2 + [CATCH, AVOID]
    rates = {game: [event["losses"]["lr"] for event in updates(config.run_dir) if event["game"] == game] for game in (CATCH, AVOID)}
    assert rates[CATCH] == rates[AVOID] == pytest.approx([config.ppo.learning_rate * share for share in (1, 2 / 3, 1 / 3)])
    switches = [(event["from"], event["to"], event["phase"], event["update"]) for event in _events(config, "switch")]
    assert switches == [(None, CATCH, 0, 0), (CATCH, AVOID, 1, 2), (AVOID, CATCH, 0, 4), (CATCH, AVOID, 1, 5)]
    assert [(event["phase"], event["evaluated"], event["update"]) for event in _events(config, "evaluation")] == [
        (1, CATCH, 6),
        (1, AVOID, 6),
    ]
    assert sorted(path.name for path in (config.run_dir / "checkpoints").iterdir()) == ["1-pixel-avoid.pt", "latest.pt"]


def test_momentum_and_environments_outlast_a_turn_and_one_optimizer_moves_what_games_share(tmp_path, monkeypatch):
    resets = []
    reset = Collector.reset
    monkeypatch.setattr(Collector, "reset", lambda self, seed: (resets.append(self.envs.game), reset(self, seed)))
    config = pixel_run(tmp_path / "run", updates=3, switch_every=1)
    play(config, InMemoryStore())
    assert resets == [CATCH, AVOID]
    state = end_of(config.run_dir, "latest.pt").state
    steps = {game: _steps(optimizer) for game, optimizer in state["optimizers"].items()}
    assert steps == {CATCH: {3 * STEPS_PER_UPDATE}, AVOID: {3 * STEPS_PER_UPDATE}}
    assert _steps(state["shared_optimizers"]["dense"]) == {6 * STEPS_PER_UPDATE}


def test_one_game_after_another_leaves_no_momentum(tmp_path):
    config = pixel_run(tmp_path / "run", updates=2, checkpoint_every=3)
    play(config, InMemoryStore())
    assert end_of(config.run_dir, "0-pixel-catch.pt").state["optimizers"] == {}


def _steps(optimizer: dict[str, Any]) -> set[int]:
    return {int(moments["step"]) for moments in optimizer["state"].values()}


class Stopped(Exception):
    pass


WITHIN_A_TURN, BETWEEN_TURNS = 3, 4
REPLAY, NONE = {}, {"protection": "none", "prefetch": "schedule"}


@pytest.mark.parametrize(
    ("last", "changes"),
    [
        pytest.param(WITHIN_A_TURN, REPLAY, id="within-replay"),
        pytest.param(BETWEEN_TURNS, NONE, id="between-none"),
        pytest.param(WITHIN_A_TURN, NONE, id="within-none", marks=pytest.mark.slow),
        pytest.param(BETWEEN_TURNS, REPLAY, id="between-replay", marks=pytest.mark.slow),
    ],
)
def test_turns_are_taken_up_bit_for_bit(tmp_path, monkeypatch, last, changes):
    """`last`: the update after whose checkpoint the run stops."""
    undisturbed = pixel_run(tmp_path / "a" / "run", updates=3, switch_every=2, checkpoint_every=1, **changes)
    stopped = replace(undisturbed, run_dir=tmp_path / "b" / "run")
    stores = InMemoryStore(), InMemoryStore()
    play(undisturbed, stores[0])
    collect = Collector.collect

    def stop_after_last(collector: Collector) -> Any:
        if end_of(stopped.run_dir, "latest.pt").progress.update == last:
            raise Stopped
        return collect(collector)

    with monkeypatch.context() as patch:
        patch.setattr(Collector, "collect", stop_after_last)
        with pytest.raises(Stopped):
            play(stopped, stores[1])
    resume_in(stopped, stores[1])
    assert without_clock(undisturbed.run_dir) == without_clock(stopped.run_dir)
    assert_same_end(undisturbed.run_dir, stopped.run_dir)
    assert bodies(stores[0], "run/experts") == bodies(stores[1], "run/experts")


@pytest.mark.parametrize(
    "changes",
    [pytest.param({"switch_every": 1}, marks=pytest.mark.slow), {"protection": "none", "eval_unseen": True, "eval_steps": 4}],
    ids=["in turns", "unprotected"],
)
def test_one_seed_played_twice_is_one_run(tmp_path, changes):
    first, second = (pixel_run(tmp_path / name / "run", updates=2, **changes) for name in "ab")
    stores = InMemoryStore(), InMemoryStore()
    for config, store in zip((first, second), stores, strict=True):
        play(config, store)
    assert without_clock(first.run_dir) == without_clock(second.run_dir)
    assert_same_end(first.run_dir, second.run_dir)
    assert bodies(stores[0], "run/experts") == bodies(stores[1], "run/experts")


def test_turns_of_all_updates_end_where_one_game_after_another_does(tmp_path):
    """Unprotected, and with one game, there is no difference at all."""
    blocks = pixel_run(tmp_path / "a" / "run", games=(CATCH,), updates=2)
    turns = replace(blocks, run_dir=tmp_path / "b" / "run", switch_every=2)
    stores = InMemoryStore(), InMemoryStore()
    for config, store in zip((blocks, turns), stores, strict=True):
        play(config, store)
    assert without_clock(blocks.run_dir) == without_clock(turns.run_dir)
    assert bodies(stores[0], "run/experts") == bodies(stores[1], "run/experts")


def test_a_game_that_comes_back_among_turns_is_refused(tmp_path):
    with pytest.raises(InvalidRequest, match=r"games: .* is not different games"):
        pixel_run(tmp_path / "run", games=(CATCH, AVOID, CATCH), switch_every=1)


@pytest.fixture(scope="module")
def came_back(tmp_path_factory) -> tuple[RunConfig, InMemoryStore]:
    """Catch, avoid, catch."""
    config, store = pixel_run(tmp_path_factory.mktemp("came-back") / "run", games=(CATCH, AVOID, CATCH), updates=2), InMemoryStore()
    play(config, store)
    return config, store


def test_leaving_a_game_freezes_what_it_owns_and_coming_back_unlocks_that_alone(came_back):
    """Experts, routers, norms, attention, heads and embedding of the game that is away stay equal bit for bit."""
    config, store = came_back
    ends = [end_of(config.run_dir, f"{phase}-{game.replace('/', '-')}.pt") for phase, game in enumerate(config.games)]
    dense = [{game: _own(end, game) for game in (CATCH, AVOID) if _own(end, game)} for end in ends]
    assert _unequal(dense[0][CATCH], dense[1][CATCH]) == set()
    assert _unequal(dense[1][AVOID], dense[2][AVOID]) == set()
    for part in ("router", "norm", "attention", "policy", "value", "embedding"):
        changed = _unequal(dense[1][CATCH], dense[2][CATCH])
        assert any(part in name for name in changed), f"catch came back, but none of its {part}s changed"
    pools = ends[-1].state["agent"]["_extra_state"]
    owned = {game: sorted({expert for layer in layers["owned"] for expert in layer}) for game, layers in pools.items()}
    experts = []
    for end, logged in zip(ends, _events(config, "checksums"), strict=True):
        store.fork_bank("run/experts", f"look-{end.snapshot_id}", snapshot_id=end.snapshot_id)
        experts.append(bodies(store, f"look-{end.snapshot_id}"))
        written = [info for info in store.list_experts(f"look-{end.snapshot_id}") if info.version]
        checksums = {str(info.expert): [f"{info.parameter_xxh3:016x}", f"{info.optimizer_xxh3:016x}"] for info in written}
        assert logged["experts"] == {"0": checksums}
    equal, cold = RunRecord.read(config.run_dir).cold_unchanged
    assert equal == cold > 0
    assert [e for e in owned[CATCH] if experts[0][e] != experts[1][e]] == []
    assert [e for e in owned[AVOID] if experts[1][e] != experts[2][e]] == []
    assert [e for e in owned[CATCH] if experts[1][e] == experts[2][e]] == []
    assert [e for e in owned[AVOID] if experts[0][e] == experts[1][e]] == []


def test_each_update_says_which_experts_were_fetched_for_it(tmp_path):
    """HBM holds half of a pool: all that are used have to come, and no others do."""
    config = pixel_run(tmp_path / "run", agent=replace(PIXEL_AGENT, hbm_experts=2), prefetch="off")
    play(config, InMemoryStore())
    record = RunRecord.read(config.run_dir)
    fetched_from = [record.increments("cache", "fetched_from", tier).sum() for tier in ("dram", "nvme", "seed")]
    assert sum(sum(event["fetches"]["0"].values()) for event in record.updates) == sum(fetched_from)
    for event in record.updates:
        assert event["fetches"]["0"].keys() == event["usage"]["0"].keys() | event["usage"]["1"].keys()


def _own(saved: checkpoint.Checkpoint, game: str) -> dict[str, torch.Tensor]:
    """The game's network in a checkpoint."""
    key = "networks.game:" + game.replace("/", "%2F")
    return {name: value for name, value in saved.state["agent"].items() if name.startswith(key)}


def _unequal(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_a_game_that_comes_back_begins_its_annealing_anew(came_back):
    config, _ = came_back
    rate = config.ppo.learning_rate
    assert [event["losses"]["lr"] for event in updates(config.run_dir)] == [rate, rate / 2] * 3
