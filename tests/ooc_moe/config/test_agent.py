import dataclasses

import pytest

from ooc_moe.agent.agent import Agent
from ooc_moe.config.agent import PRESETS, AgentConfig
from ooc_moe_wire.errors import InvalidRequest

VARIANTS = [
    {},
    {"pools": "shared"},
    {"banks": "per-layer"},
    {"banks": "per-layer", "pools": "shared"},
    {"routing": "token"},
    {"routing": "token", "banks": "per-layer"},
    {"attention": "shared"},
    {"routing": "token", "num_experts": 1, "top_k": 1, "banks": "per-layer"},
    {"num_games": 5, "num_experts": 4},
    {"num_layers": 3, "context": 7, "frame_size": 50, "num_heads": 1},
]


@pytest.mark.parametrize("changes", VARIANTS)
@pytest.mark.parametrize("preset", ["tiny", "demo"])
def test_the_estimate_equals_what_is_allocated(world, preset: str, changes: dict) -> None:
    config = dataclasses.replace(PRESETS[preset], **changes)
    caches = world.caches(config)
    agent = Agent(config, caches, seed=0)
    for game in range(config.num_games):
        agent.add_game(f"game {game}")
    estimate = config.estimate_params()
    layout = caches[0].layout
    assert estimate.dense == sum(parameter.numel() for parameter in agent.parameters())
    assert estimate.num_experts == sum(cache.num_experts for cache in caches)
    elements = sum(cache.views[tensor.name][0].numel() for cache in caches[:1] for tensor in layout.parameters)
    assert estimate.experts == estimate.num_experts * elements
    assert estimate.total == estimate.dense + estimate.experts
    assert estimate.hbm_bytes == config.hbm_experts * layout.body_bytes
    assert estimate.dram_bytes == config.dram_experts * layout.record_bytes
    assert estimate.nvme_bytes == estimate.num_experts * layout.record_bytes


def test_the_attention_estimate_is_the_attention_modules_alone(world) -> None:
    config = PRESETS["demo"]
    agent = Agent(config, world.caches(config), seed=0)
    for game in "abc":
        agent.add_game(game)
    attention = [parameter.numel() for name, parameter in agent.named_parameters() if ".attention." in name]
    assert config.estimate_params().attention == sum(attention)


def test_the_full_preset_is_the_one_that_was_asked_for() -> None:
    config = PRESETS["full"]
    assert (config.num_games, config.num_actions, config.num_experts, config.num_layers) == (57, 18, 256, 6)
    assert (config.dim, config.hidden, config.num_heads, config.top_k, config.context) == (512, 2048, 8, 2, 32)
    assert (config.hbm_experts, config.dram_experts, config.prefetch_experts, config.num_banks) == (32, 128, 32, 1)
    assert 25e6 < config.expert_layout().record_bytes < 26e6
    assert config.estimate_params().num_experts == 256, "57 games fit without growing"


def test_the_demo_keeps_a_quarter_in_hbm_and_half_in_dram() -> None:
    config = PRESETS["demo"]
    assert (4 * config.hbm_experts, 2 * config.dram_experts) == (config.num_experts, config.num_experts)
    assert config.num_games * config.pools_per_game * config.pool_size <= config.num_experts


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"dim": 0}, "dim: 0"),
        ({"num_heads": 3}, "num_heads: 3"),
        ({"hidden": 1.5}, "hidden: 1.5"),
        ({"context": True}, "context: True"),
        ({"top_k": 5}, "top_k: 5"),
        ({"top_k": 17, "routing": "token"}, "top_k: 17"),
        ({"pool_size": 17}, "pool_size: 17"),
        ({"routing": "dense"}, "routing: 'dense'"),
        ({"banks": "many"}, "banks: 'many'"),
        ({"pools": "many"}, "pools: 'many'"),
        ({"attention": "none"}, "attention: 'none'"),
        ({"router_noise": -0.5}, "router_noise: -0.5"),
        ({"router_noise": float("nan")}, "router_noise: nan"),
        ({"balance_weight": -1.0}, "balance_weight: -1.0"),
        ({"dropout": 1.0}, "dropout: 1.0"),
        ({"frame_size": 19}, "frame_size: 19"),
        ({"stem_kernels": (8,)}, "stem_kernels: (8,)"),
        ({"stem_strides": (4, 0)}, "stem_strides: (4, 0)"),
        ({"stem_channels": ()}, "stem_channels: ()"),
        ({"hbm_experts": 0}, "hbm_experts: 0"),
        ({"hbm_experts": 1, "banks": "per-layer"}, "hbm_experts: 1"),
        ({"dram_experts": 0}, "dram_experts: 0"),
        ({"prefetch_experts": -1}, "prefetch_experts: -1"),
    ],
)
def test_a_size_that_makes_no_sense_is_refused_by_name_and_value(changes: dict, named: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        dataclasses.replace(PRESETS["tiny"], **changes)
    assert str(error.value).startswith(named)


def test_the_smallest_frame_the_stem_can_see_is_allowed() -> None:
    assert dataclasses.replace(PRESETS["tiny"], frame_size=20).stem_output_size == 1


def test_initial_experts_depend_on_the_seed_and_the_layer_but_not_on_the_runs_name() -> None:
    config = AgentConfig(banks="per-layer")
    first, again, other = config.bank_specs("a", 1), config.bank_specs("b", 1), config.bank_specs("a", 2)
    assert [spec.seed for spec in first] == [spec.seed for spec in again]
    assert len({spec.seed for spec in first + other}) == 12
    assert [spec.name for spec in first] == config.bank_names("a") == [f"a/layer{layer}" for layer in range(6)]
    assert AgentConfig().bank_names("a") == ["a/experts"]
