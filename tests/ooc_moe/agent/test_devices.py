"""An agent on another device than its caller's tensors, as far as a CPU can show. Tensors on "meta" have a device and no content."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ooc_moe.agent import agent as agent_module
from ooc_moe.agent.agent import Agent
from ooc_moe.config.agent import PRESETS
from ooc_moe.detection.screens import SCREEN, ScreenFeatures, screens_of
from ooc_moe.learning.ewc import ElasticWeights
from ooc_moe.learning.rollout import Rollout
from ooc_moe.moe.layer import TieredExperts
from ooc_moe.moe.router import Router

META = torch.device("meta")
TINY = PRESETS["tiny"]
BATCH = 2
STEPS = (BATCH, TINY.context)
FRAMES = torch.zeros(*STEPS, TINY.frame_stack, TINY.frame_size, TINY.frame_size, dtype=torch.uint8)
ROUTING = torch.zeros(*STEPS, TINY.num_layers, TINY.top_k, dtype=torch.int32)


@pytest.fixture
def agent(world, monkeypatch: pytest.MonkeyPatch) -> Iterator[Agent]:
    """Its device is "meta". What needs content is replaced: the one host read of a layer call, and the experts."""
    agent = world.agent()
    monkeypatch.setattr(Router, "_on_host", lambda router, counts_E, order_M, experts_NK: {router._ids[0]: len(order_M)})
    monkeypatch.setattr(TieredExperts, "__call__", lambda experts, x_ND, routed, read_only: x_ND * routed.gates_NK.sum(1, keepdim=True))
    for cache in agent.caches:
        monkeypatch.setattr(cache, "device", META)
    return agent.to(META)


def devices_in_routers(agent: Agent) -> set[torch.device]:
    """Filled by the agent's next calls: the devices of the tokens and of the replayed experts that its routers are given."""
    found: set[torch.device] = set()

    def note(router, args, options) -> None:
        found.update({args[0].device, options["experts_NK"].device})

    for module in agent.modules():
        if isinstance(module, Router):
            module.register_forward_pre_hook(note, with_kwargs=True)
    return found


def test_replayed_routing_may_come_from_the_cpu(agent: Agent) -> None:
    found = devices_in_routers(agent)
    assert agent(FRAMES, game="a", routing=ROUTING).logits_BTA.device == META
    assert found == {META}


def test_ewc_replays_a_rollouts_routing_on_the_agents_device(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rollout is on the CPU. The agent's first outputs are enough: what follows reads their content."""
    found = devices_in_routers(agent)
    numbers = dict.fromkeys(("log_probs_BT", "values_BT", "advantages_BT"), torch.zeros(STEPS))
    rollout = Rollout(
        **numbers,
        frames_BTSHW=FRAMES,
        starts_BT=torch.zeros(STEPS, dtype=torch.bool),
        actions_BT=torch.zeros(STEPS, dtype=torch.long),
        played_BT=torch.ones(STEPS, dtype=torch.bool),
        experts_BTLK=ROUTING,
        episode_returns=[],
        reward_per_step=0.0,
    )
    monkeypatch.setattr(agent_module, "episode_mask", lambda starts_BT: None)
    with pytest.raises((NotImplementedError, RuntimeError), match="meta tensor"):
        ElasticWeights(agent).leave("a", rollout, torch.Generator())
    assert found == {META}


def test_the_predictor_gets_the_frames_as_the_caller_has_them(agent: Agent) -> None:
    agent.predictor = lambda frames_NSHW: frames_NSHW.device
    assert agent(FRAMES, game="a").prediction == FRAMES.device


@torch.no_grad()
def test_screens_of_frames_on_a_gpu_come_to_the_detectors_device() -> None:
    """Both detectors take their screens from here. A fake tensor on another device than the weights is refused, as a real one is."""
    features = ScreenFeatures()
    with FakeTensorMode(allow_non_fake_inputs=True):
        for size in (SCREEN, 84):
            frames_NSHW = torch.zeros(3, 4, size, size, dtype=torch.uint8, device="cuda:0")
            screens_NHW = screens_of(frames_NSHW, (4, size, size))
            assert features(screens_NHW).device == screens_NHW.device == torch.device("cpu")
