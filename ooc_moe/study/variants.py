"""What a study compares: each variant is a change of the full recipe's configuration.

Heads, norms and position embeddings belong to a game in every variant; the comparison would measure them otherwise. Every variant is
evaluated without being told the game. Knows nothing of games, seeds and directories.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from ooc_moe.config.run import RunConfig


@dataclass(frozen=True, slots=True)
class Variant:
    """One row of a table. `change` makes its configuration from the full recipe's."""

    name: str
    says: str
    change: Callable[[RunConfig], RunConfig]
    alone: bool = False
    """Whether each game is learned by a network of its own."""


def _full(config: RunConfig) -> RunConfig:
    return config


def _full_share(config: RunConfig) -> RunConfig:
    return replace(config, agent=replace(config.agent, shared_experts=2))


def _pools(config: RunConfig) -> RunConfig:
    return replace(config, protection="none", protection_weight=None)


def _pools_freeze(config: RunConfig) -> RunConfig:
    return replace(config, protection="freeze", protection_weight=None)


def _moe_token_out(config: RunConfig) -> RunConfig:
    agent = replace(config.agent, routing="token", attention="shared", shared_experts=0)
    return replace(config, agent=agent, protection="none", protection_weight=None)


def _moe_token(config: RunConfig) -> RunConfig:
    """With HBM for all experts: every minibatch uses nearly all of them, and half of them in HBM, which changes no bit, takes several times
    as long."""
    config = _moe_token_out(config)
    num_experts = config.agent.num_banks * config.agent.num_experts
    return replace(config, agent=replace(config.agent, hbm_experts=num_experts, dram_experts=num_experts))


def _dense(config: RunConfig, *, hidden: int | None = None) -> RunConfig:
    """One expert in each layer, through which every token goes; as wide as the experts of one token are together."""
    agent = config.agent
    agent = replace(
        agent,
        routing="token",
        banks="per-layer",
        pools="per-layer",
        num_experts=1,
        pool_size=1,
        top_k=1,
        shared_experts=0,
        hidden=hidden or agent.top_k * agent.hidden,
        attention="shared",
        hbm_experts=agent.num_layers,
        dram_experts=agent.num_layers,
    )
    return replace(config, agent=agent, protection="none", protection_weight=None, prefetch="off")


def _dense_total(config: RunConfig) -> RunConfig:
    agent = config.agent
    return _dense(config, hidden=agent.num_banks * agent.num_experts * agent.hidden // agent.num_layers)


def _dense_replay(config: RunConfig) -> RunConfig:
    dense = _dense(config)
    agent = replace(dense.agent, attention=config.agent.attention)
    return replace(dense, agent=agent, protection=config.protection, protection_weight=config.protection_weight)


def _moe_untrained(config: RunConfig) -> RunConfig:
    """Ten updates a game in which nothing but the detector learns."""
    steps = min(config.steps_per_game, 10 * config.steps_per_update)
    return replace(_moe_token(config), ppo=replace(config.ppo, learning_rate=1e-12), steps_per_game=steps)


# Of the weights 0.1 (consolidation only), 0.3, 1, 3 and 10 (cloning only), 1 left the best average at the end for either of these two on
# seed 0 of the synthetic games, crossing first, where the weight of the recipe's own replay was chosen.
def _dense_clone(config: RunConfig) -> RunConfig:
    return replace(_dense(config), protection="clone")


def _dense_ewc(config: RunConfig) -> RunConfig:
    return replace(_dense(config), protection="ewc")


def _joint(config: RunConfig) -> RunConfig:
    return replace(_dense(config), switch_every=1)


VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("full", "pools, each game's own attention, stem with feature replay", _full),
        Variant("pools", "full, but the stem unprotected", _pools),
        Variant("pools-freeze", "full, but the stem frozen after the first game", _pools_freeze),
        Variant("moe-token", "tokens routed over all experts, shared attention, unprotected; HBM for all experts", _moe_token),
        Variant("moe-token-out", "moe-token with full's HBM: the same scores bit for bit, at another price", _moe_token_out),
        Variant("moe-untrained", "moe-token before anything is learned: what its routers do by themselves", _moe_untrained),
        Variant("dense", "one FFN, as many active parameters, unprotected", _dense),
        Variant("dense-replay", "dense with full's attention and stem replay: full without pools", _dense_replay),
        Variant("dense-total", "one FFN, as many parameters as all experts, unprotected", _dense_total),
        Variant("dense-clone", "dense with output cloning", _dense_clone),
        Variant("dense-ewc", "dense with elastic weight consolidation", _dense_ewc),
        Variant("joint", "dense, all games in turns of one update", _joint),
        Variant("full-share", "full, and each pool borrows up to two older experts, read-only", _full_share),
        Variant("single", "dense, one network for each game", _dense, alone=True),
    )
}
"""By name. Random play and the best constant action need no runs of their own: every evaluation plays the one, baselines.py the other."""
