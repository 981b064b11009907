import pytest
import torch

from ooc_moe.evaluation.dormant import dormant_share
from ooc_moe_wire.errors import InvalidRequest

HIDDEN = 32


def silence(cache, expert: int, units: slice) -> None:
    """Makes an expert's hidden units answer nothing to anything."""
    with cache.updating([expert]) as (slot,):
        cache.views["w1"][slot][:, units] = 0.0
        cache.views["b1"][slot][units] = -20.0


@pytest.mark.parametrize("capacity", [1, 16])
def test_the_share_is_that_of_the_silent_units_of_the_experts_in_use(world, frames, capacity: int) -> None:
    agent = world.agent(games=("a", "b"), capacity=capacity, router_noise=0.0, top_k=4).train()
    frames_NSHW = frames(agent, 40, 1)[:, 0]
    assert dormant_share(agent, frames_NSHW, "a") < 0.05
    (cache,) = agent.caches
    for expert in range(8):  # Game a's: four in each of two layers.
        silence(cache, expert, slice(0, 8 if expert % 2 else 24))
    assert dormant_share(agent, frames_NSHW, "a") == pytest.approx(0.5, abs=0.05)
    for expert in range(8):
        silence(cache, expert, slice(0, HIDDEN))
    assert dormant_share(agent, frames_NSHW, "a") == 1.0
    assert dormant_share(agent, frames_NSHW, "b") < 0.05, "another game's experts are not asked"
    assert agent.training


def test_a_score_is_the_mean_absolute_activation_over_the_layers_mean(world, frames) -> None:
    """By hand: one expert, so that the layer is dense, whose units are as loud as their biases say."""
    agent = world.agent(games=("a",), routing="token", num_experts=1, top_k=1, num_layers=1)
    (cache,) = agent.caches
    biases_H = torch.full((HIDDEN,), 10.0)
    biases_H[:6] = torch.tensor(
        [0.3, 0.36, 0.2, 0.5, -1.0, -20.0]
    )  # |GELU|: 0.185, 0.231, 0.116, 0.346, 0.159, 0.000; 8.16 is the mean of all.
    with cache.updating([0]) as (slot,):
        cache.views["w1"][slot].zero_()
        cache.views["b1"][slot].copy_(biases_H)
    assert dormant_share(agent, frames(agent, 3, 1)[:, 0], "a") == 4 / HIDDEN  # Those at most 0.025 x 8.16 = 0.204.


def test_an_unknown_game_is_refused_and_leaves_no_hook_behind(world, frames) -> None:
    agent = world.agent()
    with pytest.raises(InvalidRequest, match="game: 'zelda'"):
        dormant_share(agent, frames(agent, 1, 1)[:, 0], "zelda")
    assert not any(module._forward_hooks for module in agent.modules())
    assert agent.training
