"""The variants that a study compares: the full recipe, and configurations that leave out or replace a part of it.

In every variant each game has its own heads, norms and position embedding, so that variants differ only in the parts that are compared.
Every variant is evaluated without being told which game it plays.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from ooc_moe.config.run import RunConfig


@dataclass(frozen=True, slots=True)
class Variant:
    """A configuration that a study compares with others, made from the full recipe's; one row of the study's tables."""

    name: str
    says: str
    """A phrase that describes the variant to people."""
    change: Callable[[RunConfig], RunConfig]
    """Makes the variant's configuration from the full recipe's."""
    alone: bool = False
    """Whether each game is learned by a network of its own."""


def _unprotected(config: RunConfig) -> RunConfig:
    return replace(config, protection="none", protection_weight=None)


def _full(config: RunConfig) -> RunConfig:
    return config


def _full_share(config: RunConfig) -> RunConfig:
    return replace(config, agent=replace(config.agent, shared_experts=2))


def _pools_freeze(config: RunConfig) -> RunConfig:
    return replace(config, protection="freeze", protection_weight=None)


def _moe_token_out(config: RunConfig) -> RunConfig:
    return _unprotected(replace(config, agent=replace(config.agent, routing="token", attention="shared", shared_experts=0)))


def _moe_token(config: RunConfig) -> RunConfig:
    """Makes the variant "moe-token": plain token routing, with HBM for all experts, because every minibatch uses nearly all experts.

    With HBM for half of the experts the results would be the same bit for bit, but training would take several times as long.
    """
    config = _moe_token_out(config)
    num_experts = config.agent.num_banks * config.agent.num_experts
    return replace(config, agent=replace(config.agent, hbm_experts=num_experts, dram_experts=num_experts))


def _dense(config: RunConfig, *, hidden: int | None = None) -> RunConfig:
    """Makes a dense variant: one expert in each layer, which every token goes to.

    It is `hidden` wide; if that is None, as wide as the experts of one token together.
    """
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
    return _unprotected(replace(config, agent=agent, prefetch="off"))


def _dense_total(config: RunConfig) -> RunConfig:
    agent = config.agent
    return _dense(config, hidden=agent.num_banks * agent.num_experts * agent.hidden // agent.num_layers)


def _dense_replay(config: RunConfig) -> RunConfig:
    dense = _dense(config)
    agent = replace(dense.agent, attention=config.agent.attention)
    return replace(dense, agent=agent, protection=config.protection, protection_weight=config.protection_weight)


def _moe_untrained(config: RunConfig) -> RunConfig:
    """Makes the variant "moe-untrained": at most ten updates in each game, with so small a learning rate that only the detector learns."""
    steps = min(config.steps_per_game, 10 * config.steps_per_update)
    return replace(_moe_token(config), ppo=replace(config.ppo, learning_rate=1e-12), steps_per_game=steps)


# Cloning and consolidation keep their own default weight, 1. It was compared with others on seed 0 of the synthetic games, crossing first,
# where the weight of the recipe's replay was chosen as well. Of 0.1 (consolidation only), 0.3, 1, 3 and 10 (cloning only), 1 gave the best
# average at the end for both.
def _dense_clone(config: RunConfig) -> RunConfig:
    return replace(_dense(config), protection="clone")


def _dense_ewc(config: RunConfig) -> RunConfig:
    return replace(_dense(config), protection="ewc")


def _joint(config: RunConfig) -> RunConfig:
    return replace(_dense(config), switch_every=1)


VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("full", "pools; each game has its own attention; the stem is protected by feature replay", _full),
        Variant("pools", "full, but the stem is not protected", _unprotected),
        Variant("pools-freeze", "full, but the stem is frozen after the first game", _pools_freeze),
        Variant("moe-token", "tokens are routed over all experts; shared attention, no protection; HBM for all experts", _moe_token),
        Variant("moe-token-out", "moe-token with full's HBM: the same scores bit for bit, with more fetches", _moe_token_out),
        Variant("moe-untrained", "moe-token without learning: how far its routers separate games by themselves", _moe_untrained),
        Variant("dense", "one FFN with as many active parameters as full; no protection", _dense),
        Variant("dense-replay", "dense with full's attention and full's feature replay: full without pools", _dense_replay),
        Variant("dense-total", "one FFN with as many parameters as all experts together; no protection", _dense_total),
        Variant("dense-clone", "dense with output cloning", _dense_clone),
        Variant("dense-ewc", "dense with elastic weight consolidation", _dense_ewc),
        Variant("joint", "dense; the games take turns of one update", _joint),
        Variant("full-share", "full, but each pool also borrows up to two older experts, which it reads and never changes", _full_share),
        Variant("single", "dense, with a network of its own for each game", _dense, alone=True),
    )
}
"""By name. Random play and the best constant action need no runs of their own: every evaluation also plays at random, and
evaluation/baselines.py plays the constant actions."""
