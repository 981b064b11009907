"""The benchmark of learning gives both learners the same network, and its tables say which rows have targets."""

from __future__ import annotations

import json
import math
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import pytest
import torch

from ooc_moe.bench.harness import Spread, WrongBytes
from ooc_moe.bench.learning import benchmark
from ooc_moe.bench.learning.benchmark import OurPPO, check_same_network
from ooc_moe.bench.learning.options import ATARI_AGENT, PIXEL_AGENT, LearningBench
from ooc_moe.bench.learning.results import NOTES, Returns, Speed, save
from ooc_moe.config.agent import PRESETS
from ooc_moe.config.run import PPOConfig
from tests.ooc_moe.commands import exit_code

SMALL_PPO = PPOConfig(num_envs=4, rollout_steps=16, epochs=2, minibatch_segments=32)


@pytest.fixture
def small(monkeypatch):
    pytest.importorskip("stable_baselines3")
    monkeypatch.setattr(benchmark, "PIXEL_PPO", SMALL_PPO)


def test_a_small_run_measures_both_and_saves_its_tables(small, tmp_path, capsys):
    words = ["--games", "pixel/catch", "--returns", "pixel/catch", "--steps", "512", "--seeds", "1", "--rounds", "1", "--json"]
    assert exit_code("bench", "learning", *words, "--results", str(tmp_path)) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(row["game"], row["peer_envs"]) for row in found["speed"]] == [("pixel/catch", "its own"), ("pixel/catch", "ours")]
    assert found["speed"][0]["ours"] == found["speed"][1]["ours"]
    assert all(row[who]["median"] > 0 for row in found["speed"] for who in ("ours", "peer"))
    (returns,) = found["returns"]
    assert returns["steps"] == 512
    # Of five balls each is worth 1 or -1.
    assert all(-5 <= value <= 5 for who in ("ours", "peer") for value in returns[who])
    saved = (tmp_path / "learning.md").read_text()
    assert "| pixel/catch | its own |" in saved
    assert "| pixel/catch | 512 |" in saved
    assert str(tmp_path) not in saved


@pytest.fixture
def both(small):
    from ooc_moe.bench.learning import peers

    config = LearningBench(steps=64).run_config("pixel/catch", seed=3)
    with ExitStack() as stack:
        model = peers.make_ppo(config, peers.sb3_envs(config))
        stack.callback(model.env.close)
        yield OurPPO(config, stack), model, config


def test_sb3_with_another_network_is_not_measured(both):
    ours, model, _ = both
    check_same_network(ours.agent, model)
    model.policy.features_extractor.blocks[0].attention.num_heads = 1
    with torch.no_grad():  # Attention to one frame has nothing to weigh: the heads make no difference. The FFN's residual does.
        check_same_network(ours.agent, model)
    forward = model.policy.features_extractor.norm.forward
    model.policy.features_extractor.norm.forward = lambda x: 1.1 * forward(x)
    with pytest.raises(WrongBytes, match=r"SB3's (log probabilities|values) are up to \d.\de-\d+ away"):
        check_same_network(ours.agent, model)


def test_both_learn_with_the_same_settings(both):
    ours, model, config = both
    ppo = config.ppo
    assert (model.n_steps, model.n_epochs, model.n_envs) == (ppo.rollout_steps, ppo.epochs, ppo.num_envs)
    assert model.batch_size == ppo.minibatch_segments * config.agent.context
    assert (model.gamma, model.gae_lambda, model.ent_coef) == (ppo.gamma, ppo.gae_lambda, ppo.entropy_coef)
    assert model.clip_range(1.0) == ppo.clip
    # One update in all: SB3 asks for its rate when no steps remain.
    assert config.updates_per_game == 1
    assert model.lr_schedule(0.0) == ppo.learning_rate
    cache_parameters = sum(
        view[0].numel() for cache in ours.agent.caches for name, view in cache.views.items() if name in ("w1", "b1", "w2", "b2")
    )
    dense = sum(parameter.numel() for parameter in ours.agent.parameters())
    # Our router to one expert, and the second position (of the frame after a segment), have no part in SB3's.
    extra = sum(router.weight.numel() for router in ours.agent.routers) + config.agent.dim
    assert sum(parameter.numel() for parameter in model.policy.parameters()) == dense + cache_parameters - extra


def test_sb3_sees_our_environments_frames_and_clipped_rewards(small):
    from ooc_moe.bench.learning import peers

    config = LearningBench().run_config("pixel/toward")
    with ExitStack() as stack:
        inner, same = benchmark.make_envs(config, stack), benchmark.make_envs(config, stack)
        shared = peers.SharedEnvs(inner, seed=5)
        np.testing.assert_array_equal(shared.reset(), same.reset(5))
        for action in (3, 4, 0):
            actions = np.full(SMALL_PPO.num_envs, action)
            observations, rewards, dones, _ = shared.step(actions)
            step = same.step(actions)
            np.testing.assert_array_equal(observations, step.observations)
            np.testing.assert_array_equal(rewards, step.rewards.clip(-1, 1))
            np.testing.assert_array_equal(dones, step.terminated | step.truncated)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--games", "krul"], "game: 'krul' is unknown; did you mean 'krull'? (`ooc-moe games` lists all games)"),
        (["--returns", "pixel/none"], "game: 'pixel/none' is unknown"),
        (["--rounds", "0"], "rounds: 0 is not at least 1"),
        (["--seeds", "0"], "seeds: 0 is not at least 1"),
        (["--steps", "0"], "steps: 0 is not at least 1"),
        (["--threads", "0"], "threads: 0 is not at least 1"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(capsys, words, said):
    assert exit_code("bench", "learning", *words) == 2
    assert said in capsys.readouterr().err


def test_the_dense_variant_is_as_wide_as_the_experts_of_a_token():
    for agent in (ATARI_AGENT, PIXEL_AGENT):
        assert (agent.num_experts, agent.top_k, agent.context) == (1, 1, 1)
        assert agent.hidden == PRESETS["demo"].top_k * PRESETS["demo"].hidden


def test_ratios_are_judged_against_sb3_as_it_comes_and_notes_are_kept(tmp_path):
    def spread(median):
        return Spread(median=median, q1=median, q3=median)

    row = Speed(game="krull", peer_envs="its own", ours=spread(600.0), peer=spread(200.0))
    for rate, reached in ((200.0, "aim"), (201.0, "must"), (300.0, "must"), (301.0, "no")):
        assert replace(row, peer=spread(rate)).reached == reached
    assert replace(row, peer_envs="ours").reached == ""
    path = tmp_path / "learning.md"
    for _ in range(2):
        save([row], [], {}, path)
        assert "| krull | its own | 600 [600, 600] | 200 [200, 200] | 3.00 | >= 2 | >= 3 | aim |" in path.read_text()
        path.write_text(path.read_text().partition(NOTES)[0] + f"{NOTES}\n\nThe emulator does.\n")
    save([row], [], {}, path)
    assert path.read_text().endswith(f"{NOTES}\n\nThe emulator does.\n")


def test_returns_are_worse_only_where_their_interval_lies_below_zero():
    row = Returns(game="krull", steps=1, ours=(1.0, 2.0, 3.0), peer=(2.0, 2.5, 3.0))
    assert row.difference[0] == pytest.approx(-0.5)
    assert row.difference[1] < 0 < row.difference[2]
    assert row.not_worse
    assert not replace(row, ours=(0.0, 0.1, 0.2)).not_worse
    nothing = replace(row, ours=(math.nan,))
    assert not nothing.not_worse
