"""Whole runs whose games share: the second borrows the first one's experts, or both train one dense network."""

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ooc_moe.agent.pools import Layers
from ooc_moe.config.run import RunConfig
from ooc_moe.detection.belief import Prediction
from ooc_moe.metrics.log import MetricsWriter, read_metrics
from ooc_moe.session.daemon import embedded_daemon
from ooc_moe.session.session import LEAST_USEFUL, open_session
from ooc_moe_client.in_memory import InMemoryStore
from ooc_moe_client.remote.store import RemoteStore
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

BANK = "run/experts"
CATCH, AVOID = "pixel/catch", "pixel/avoid"
BORROWER = replace(PIXEL_AGENT, shared_experts=2)
DENSE = replace(PIXEL_AGENT, routing="token", num_experts=1, top_k=1, banks="per-layer", attention="shared", hbm_experts=2, dram_experts=2)


def pools_of(run_dir: Path) -> dict[str, dict[str, Layers]]:
    return end_of(run_dir, "latest.pt").state["agent"]["_extra_state"]


def borrower(run_dir: Path, *, hbm_experts: int, prefetch: str = "detector") -> RunConfig:
    agent = replace(BORROWER, hbm_experts=hbm_experts)
    return pixel_run(run_dir, updates=3, agent=agent, prefetch=prefetch, checkpoint_every=1)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Through a daemon, with HBM for half of what a game can route to: the run, and its experts after the first game and in the end."""
    config = borrower(tmp_path_factory.mktemp("finished") / "run", hbm_experts=6)
    with embedded_daemon(config.run_dir / "store", dram_bytes=1 << 20) as target, closing(RemoteStore(target)) as store:
        play(config, store)
        store.fork_bank(BANK, "first", snapshot_id=end_of(config.run_dir, "0-pixel-catch.pt").snapshot_id)
        return config.run_dir, bodies(store, "first"), bodies(store, BANK)


def test_the_second_game_uses_what_it_borrowed_and_leaves_it_bit_for_bit(finished):
    run_dir, first, last = finished
    pools = pools_of(run_dir)
    assert [len(layer) for layer in pools[AVOID]["borrowed"]] == [2, 2]
    assert all(set(borrowed) < set(owned) for borrowed, owned in zip(pools[AVOID]["borrowed"], pools[CATCH]["owned"], strict=True))
    assert {expert for expert in last if last[expert] != first[expert]} == set(range(8, 16)), "those that the second game owns"
    for layer, borrowed in enumerate(pools[AVOID]["borrowed"]):
        used = [event["usage"][str(layer)] for event in updates(run_dir) if event["game"] == AVOID]
        assert all({str(expert) for expert in borrowed} <= usage.keys() for usage in used)


def test_room_for_one_expert_and_no_prefetch_change_no_bit_of_a_run_that_borrows(finished, tmp_path):
    run_dir, _, last = finished
    config, store = borrower(tmp_path / "run", hbm_experts=1, prefetch="off"), InMemoryStore()
    play(config, store)
    assert without_clock(config.run_dir) == without_clock(run_dir)
    assert bodies(store, BANK) == last


def test_a_run_that_borrows_goes_on_bit_for_bit_from_a_checkpoint_in_the_borrower(finished, tmp_path, monkeypatch):
    run_dir, _, last = finished
    config, store = borrower(tmp_path / "run", hbm_experts=6), InMemoryStore()
    with monkeypatch.context() as patched:
        stop_after(patched, update=4)
        with pytest.raises(KeyboardInterrupt):
            play(config, store)
    assert AVOID in pools_of(config.run_dir)
    resume_in(config, store)
    assert bodies(store, BANK) == last
    assert_same_end(config.run_dir, run_dir)


def stop_after(patched, *, update: int) -> None:
    """Breaks the run off in the update after this one."""
    log = MetricsWriter.log

    def stop(self, event, **fields):
        if event == "update" and fields["update"] > update:
            raise KeyboardInterrupt
        log(self, event, **fields)

    patched.setattr(MetricsWriter, "log", stop)


def test_useful_are_the_older_games_experts_that_the_detector_expects_on_the_new_ones_frames(tmp_path, monkeypatch):
    config = pixel_run(tmp_path / "run", agent=replace(BORROWER, banks="per-layer"))
    store = InMemoryStore()
    for spec in config.agent.bank_specs("run", 0):
        store.create_bank(spec)
    with open_session(config, store, config.agent.bank_names("run")) as session:
        frames_NSHW = torch.zeros(2, 4, 10, 10, dtype=torch.uint8)
        assert session.useful_experts(frames_NSHW) == [[], []], "nobody is older"
        session.agent.add_game("a")  # Owns 0 to 3 in both banks, which the detector numbers 0, 2, 4, 6 and 1, 3, 5, 7.
        expected_NE = torch.full((2, 32), 0.01)
        expected_NE[:, [2, 7, 5, 20]] = torch.tensor([[0.3, 0.5, 0.9, 0.9], [0.5, 0.5, 0.9, 0.9]])
        expected_NE[:, 4], expected_NE[0, 6] = LEAST_USEFUL + 0.01, 2 * LEAST_USEFUL - 0.02
        prediction = Prediction(
            games=("a",),
            probabilities_NG=torch.ones(2, 1),
            unknown_N=torch.ones(2, dtype=torch.bool),
            expert_probabilities_NE=expected_NE,
            experts=[],
        )
        monkeypatch.setattr(session.detector, "predict", lambda frames: prediction)
        useful = session.useful_experts(frames_NSHW)
        assert useful == [[1, 2], [2, 3]], "as a mean over frames; 20 is nobody's"
        pools = session.agent.add_game("b", borrowed=useful)
        assert pools.borrowed == ((1, 2), (2, 3))
        assert session.agent.read_only_set("b") == [2, 4, 5, 7]


def test_what_is_borrowed_is_prefetched_without_its_moments(tmp_path, monkeypatch):
    config = pixel_run(tmp_path / "run", agent=BORROWER)
    store = InMemoryStore()
    for spec in config.agent.bank_specs("run", 0):
        store.create_bank(spec)
    with open_session(config, store, config.agent.bank_names("run")) as session:
        session.agent.add_game("a")
        session.agent.add_game("b", borrowed=[[1, 6]])
        asked = []
        (cache,) = session.caches
        monkeypatch.setattr(cache, "prefetch", lambda experts, *, sections, **options: asked.append((sections.name, experts)))
        session.prefetch(session.agent.prefetch_set("b"), read_only=session.agent.read_only_set("b"))
        assert asked == [("PARAMETERS", [1, 6]), ("ALL", list(range(8, 16)))]


def test_a_dense_network_is_trained_and_evaluated_as_any_other(tmp_path):
    config = pixel_run(tmp_path / "run", updates=1, agent=DENSE, eval_steps=4)
    run = config.run_dir
    play(config, InMemoryStore())
    assert [event["losses"]["balance"] for event in updates(run)] == [1.0] * 2
    assert all(event["usage"] == {"0": {"0": 32}, "1": {"0": 32}} for event in updates(run))
    evaluated = [event["evaluated"] for event in read_metrics(run) if event["event"] == "evaluation"]
    assert evaluated == [CATCH, CATCH, AVOID]
    first, last = (end_of(run, name).state["agent"] for name in ("0-pixel-catch.pt", "latest.pt"))
    moved = [name for name in first if name.startswith("attentions.") and not torch.equal(first[name], last[name])]
    assert len(moved) == 8, "the second game trains the first one's attention"
