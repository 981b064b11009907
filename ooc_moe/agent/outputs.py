"""The results of the agent's calls: `AgentOutput` of `Agent.forward` and `ActOutput` of `Agent.act`.

Their properties `cache_stats` and `prediction` are computed when they are read, so calls that do not read them pay nothing for them.

Letters: B segments, T frames, N environments, A actions, L layers, K experts a token, D width of a token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ooc_moe_client.hbm.cache import ExpertCache
from ooc_moe_client.hbm.stats import CacheStats


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentOutput:
    """The result of `Agent.forward` over B segments of T frames: logits, values, the load-balancing loss, and the experts used."""

    logits_BTA: Tensor
    value_BT: Tensor
    aux_loss: Tensor
    """The load-balancing loss, averaged over the layers and not yet weighted by `balance_weight`; 1 when the load is even."""
    experts_used: list[dict[int, int]]
    """For each layer: the number of tokens that each expert got, by expert id. Experts without tokens are left out."""
    routing_BTLK: Tensor
    """The ids of the chosen experts, int32. `forward(routing=...)` sends the tokens to the same experts again."""
    caches: Sequence[ExpertCache] = field(repr=False)
    """The agent's caches, which `cache_stats` reads."""
    predict: Callable[[], Any] = field(repr=False)
    """Asks the agent's predictor about the last frame of each segment; `prediction` calls it."""

    @property
    def cache_stats(self) -> list[CacheStats]:
        """The counters of each expert cache at the moment of reading this property. They may include work that came after the forward pass.

        Each read locks each cache briefly.
        """
        return [cache.stats() for cache in self.caches]

    @property
    def prediction(self) -> Any:
        """What the agent's predictor (usually the detector, which recognises games) says about the last frame of each segment.

        Each read runs the predictor again.

        Raises:
            InvalidRequest: the agent has no predictor.
        """
        return self.predict()


@dataclass(frozen=True, slots=True, kw_only=True)
class ActOutput:
    """The result of `Agent.act` for one frame of each of N environments: actions, their log-probabilities, values and experts."""

    actions_N: Tensor
    log_probs_N: Tensor
    values_N: Tensor
    experts_NLK: Tensor
    """The ids of the chosen experts, int32."""
    tokens_ND: Tensor
    """The stem's outputs for the frames. `Agent.values` takes them."""
    predict: Callable[[], Any] = field(repr=False)
    """Asks the agent's predictor about the frames; `prediction` calls it."""

    @property
    def prediction(self) -> Any:
        """What the agent's predictor (usually the detector, which recognises games) says about these frames.

        Each read runs the predictor again.

        Raises:
            InvalidRequest: the agent has no predictor.
        """
        return self.predict()
