"""An ordinary dense network is a case of the tiered one: one expert a layer, for all games."""

import pytest
import torch
from torch import nn

from ooc_moe.moe.expert_adam import ExpertAdam

DENSE = {"routing": "token", "num_experts": 1, "top_k": 1, "banks": "per-layer", "attention": "shared"}


class DenseLayer(nn.Module):
    """`x + ffn(norm(x))` of plain torch layers, begun as a tiered layer's only expert."""

    def __init__(self, cache) -> None:
        super().__init__()
        dim, hidden = cache.views["w1"].shape[1:]
        self.ffn = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))
        with torch.no_grad(), cache.reading([0]) as (slot,):
            for name, parameter in self.named().items():
                parameter.copy_(cache.views[name][slot].t() if parameter.ndim == 2 else cache.views[name][slot])

    def named(self) -> dict[str, nn.Parameter]:
        """By the experts' names of them; torch's linear layers hold the transposes."""
        return {"w1": self.ffn[1].weight, "b1": self.ffn[1].bias, "w2": self.ffn[3].weight, "b2": self.ffn[3].bias}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.ffn(x)


def test_one_expert_a_layer_is_a_dense_ffn_in_its_outputs_gradients_and_adam_steps(world) -> None:
    agent = world.agent(capacity=1, **DENSE).train()
    cache, layer = agent.caches[1], next(iter(agent.networks.values())).blocks[1].moe
    dense = DenseLayer(cache)
    adam, expert_adam = torch.optim.Adam(dense.named().values(), lr=0.01, eps=1e-5), ExpertAdam(agent.caches, agent.gradients, lr=0.01)
    for step in range(4):
        x_BTD = torch.randn(3, 4, 16, generator=torch.Generator().manual_seed(step))
        x_BTD, y_BTD = x_BTD.clone().requires_grad_(), x_BTD.clone().requires_grad_()
        adam.zero_grad()
        expert_adam.zero_grad()
        output = layer(x_BTD, noisy=True)
        torch.testing.assert_close(output.y, dense(y_BTD))
        assert torch.equal(output.routed.gates_NK, torch.ones(12, 1))
        output.y.square().sum().backward()
        dense(y_BTD).square().sum().backward()
        torch.testing.assert_close(x_BTD.grad, y_BTD.grad)
        torch.testing.assert_close(layer.norm.weight.grad, dense.ffn[0].weight.grad)
        for name, gradient in agent.gradients[1].of(0).items():
            expected = dense.named()[name].grad
            torch.testing.assert_close(gradient, expected.t() if expected.ndim == 2 else expected)
        layer.norm.zero_grad()
        dense.ffn[0].zero_grad()
        adam.step()
        expert_adam.step()
    with cache.reading([0]) as (slot,):
        for name, parameter in dense.named().items():
            torch.testing.assert_close(cache.views[name][slot], parameter.t() if parameter.ndim == 2 else parameter, rtol=1e-5, atol=1e-5)


def test_where_there_is_no_choice_the_router_learns_nothing_and_the_balance_is_even(world, frames) -> None:
    agent = world.agent(**DENSE)
    output = agent(frames(agent, 2, 4), game="a")
    assert float(output.aux_loss) == 1.0
    (output.value_BT.sum() + output.aux_loss).backward()
    assert all(parameter.grad is None for parameter in agent.routers.parameters())
    assert all(parameter.grad.any() for parameter in agent.attentions.parameters() if parameter.ndim == 2)


@pytest.mark.parametrize("game", ["a", "b"])
def test_every_game_trains_the_same_experts(world, frames, game: str) -> None:
    agent = world.agent(games=("a", "b"), **DENSE)
    agent(frames(agent, 2, 4), game=game).value_BT.sum().backward()
    assert [gradients.experts for gradients in agent.gradients] == [[0], [0]]
