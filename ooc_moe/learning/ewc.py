"""Elastic weight consolidation (EWC): keeps shared parameters near the values that they had after earlier games.

The more important a parameter is for earlier games, the more strongly it is kept. When the training in a game ends, the diagonal of the
Fisher information measures how much the game's policy and value depend on each shared parameter. While later games are learned, a quadratic
penalty pulls each parameter back in that proportion (Kirkpatrick et al. 2017). This is the online form of Schwarz et al. 2018, "Progress &
Compress": one decaying sum of the games' Fishers (diagonals of the Fisher information), each normalised to the same mean, and one anchor:
the value of the parameter when the training in the last game ended.

Shared parameters are the stem, attention if all games train it, and with token routing the routers and the experts. The Fishers and anchors
of experts are kept on the host. An expert that a step does not touch does not change, so it needs no pull and is not fetched for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ooc_moe.agent.agent import Agent
from ooc_moe.learning.rollout import Rollout
from ooc_moe_client.store import Sections

FISHER_SAMPLES = 256
"""The largest number of frames from which the Fisher information of a game is estimated."""
DECAY = 0.95
"""The factor by which the Fisher information of the earlier games shrinks whenever the training in another game ends."""


@dataclass(frozen=True, slots=True)
class Spring:
    """Pulls one parameter back towards `anchor`, in proportion to `fisher`."""

    fisher: Tensor
    """How important each element of the parameter is for the earlier games."""
    anchor: Tensor
    """The parameter's value when the training in the last game ended."""

    def force(self, parameter: Tensor) -> Tensor:
        """Computes the gradient of the spring's penalty, 1/2 * sum of fisher * (parameter - anchor)^2."""
        return self.fisher * (parameter - self.anchor)


class ElasticWeights:
    """The method against forgetting that penalises changes of shared parameters: weight / 2 * sum of fisher * (parameter - anchor)^2.

    The penalty of the dense parameters is added to the loss. For experts, the gradient of the penalty is added directly to their gradients,
    so the logged loss does not contain it. For that each step reads the experts once more. The schedule of coming
    uses that lookahead.py gives to the caches does not list this reading.

    Args:
        agent: the agent whose shared parameters are held.
        weight: weight of the penalty. Each game's Fisher is scaled to a mean of 1 over the shared parameters that the game uses.
    """

    def __init__(self, agent: Agent, *, weight: float = 1.0) -> None:
        self._agent, self._weight = agent, weight
        self._dense: list[Spring] = []
        self._experts: dict[tuple[int, int], Spring] = {}
        """The springs of experts, by (bank, expert)."""

    def loss(self, game: str, generator: torch.Generator) -> Tensor:
        """Computes the weighted penalty of the dense parameters; zero until the training in a game has ended. The arguments are ignored."""
        if not self._dense:
            return torch.zeros(())
        pairs = zip(self._agent.shared_parameters(), self._dense, strict=True)
        return self._weight / 2 * torch.stack([(spring.fisher * (p - spring.anchor).square()).sum() for p, spring in pairs]).sum()

    def correct_gradients(self, game: str) -> None:
        """Adds the gradient of the penalty to the gradients of the experts that the step trains."""
        touched = [(bank, expert) for bank, gradients in enumerate(self._agent.gradients) for expert in gradients.experts]
        for (bank, expert), flat in self._read(key for key in touched if key in self._experts):
            force = self._experts[bank, expert].force(flat)
            self._agent.gradients[bank].flat(expert).add_(force.to(self._agent.caches[bank].device), alpha=self._weight)

    def leave(self, game: str, rollout: Rollout, generator: torch.Generator) -> None:
        """Updates the `fisher` and the `anchor` of all shared parameters. Call this when the training in a game ends.

        The Fisher of the game's policy and value is added to the decayed sum of the earlier games' Fishers. The parameters' present values
        become the anchors.
        """
        dense, experts = self._fisher(game, rollout, generator)
        every = [*dense, *experts.values()]
        scale = sum(fisher.numel() for fisher in every) / sum(float(fisher.sum()) for fisher in every)
        older = [spring.fisher for spring in self._dense] or [torch.zeros_like(fisher) for fisher in dense]
        parameters = [parameter.detach().clone() for parameter in self._agent.shared_parameters()]
        self._dense = [Spring(DECAY * before + scale * now, p) for before, now, p in zip(older, dense, parameters, strict=True)]
        for key, flat in self._read(sorted(self._experts.keys() | experts.keys())):
            fisher = scale * experts.get(key, torch.zeros_like(flat))
            self._experts[key] = Spring(fisher + DECAY * self._experts[key].fisher if key in self._experts else fisher, flat)

    def _fisher(self, game: str, rollout: Rollout, generator: torch.Generator) -> tuple[list[Tensor], dict[tuple[int, int], Tensor]]:
        """Estimates the diagonal of a game's Fisher information: for the dense shared parameters, and by (bank, expert) for experts.

        It sums, over sampled frames, the squared gradients of the log-likelihood of an action and of a value that are drawn from the
        agent's own output. The value output counts as the mean of a normal distribution with variance 1.
        """
        agent, shared = self._agent, list(self._agent.shared_parameters())
        dense, experts = [torch.zeros_like(parameter) for parameter in shared], dict[tuple[int, int], Tensor]()
        agent.eval()
        for row, time in self._frames(rollout, generator):
            seen = slice(row, row + 1), slice(time + 1)
            output = agent(rollout.frames_BTSHW[seen], game=game, starts_BT=rollout.starts_BT[seen], routing=rollout.experts_BTLK[seen])
            log_probs_A, value = output.logits_BTA[0, -1].log_softmax(-1), output.value_BT[0, -1]
            action = torch.multinomial(log_probs_A.detach().exp().cpu(), 1, generator=generator).item()
            surprise = torch.randn((), generator=generator).item()
            self._forget_gradients(game)
            (log_probs_A[int(action)] + surprise * value).backward()
            for fisher, parameter in zip(dense, shared, strict=True):
                if parameter.grad is not None:
                    fisher.addcmul_(parameter.grad, parameter.grad)
            if agent.config.routing == "token":
                for bank, gradients in enumerate(agent.gradients):
                    for expert in gradients.experts:
                        square = gradients.flat(expert).cpu().square()
                        experts[bank, expert] = square.add_(experts.get((bank, expert), 0.0))
        self._forget_gradients(game)
        agent.train()
        return dense, experts

    def _frames(self, rollout: Rollout, generator: torch.Generator) -> list[tuple[int, int]]:
        """Draws frames of the rollout in which an action was played. Returns each as (segment, time)."""
        played_M2 = rollout.played_BT.nonzero()
        chosen = torch.randperm(len(played_M2), generator=generator)[:FISHER_SAMPLES]
        return [(row, time) for row, time in played_M2[chosen].tolist()]

    def _forget_gradients(self, game: str) -> None:
        for parameter in (*self._agent.shared_parameters(), *self._agent.game_parameters(game)):
            parameter.grad = None
        for gradients in self._agent.gradients:
            gradients.zero()

    def _read(self, experts: Iterable[tuple[int, int]]) -> Iterator[tuple[tuple[int, int], Tensor]]:
        """Reads the present parameters of these experts, given as (bank, expert).

        Yields:
            Each expert with its parameters as one vector on the host, which has the order of the expert's gradients.
        """
        wanted = list(experts)
        for bank, cache in enumerate(self._agent.caches):
            names = [tensor.name for tensor in cache.layout.parameters]
            for wave in cache.waves([expert for of, expert in wanted if of == bank]):
                with cache.reading(wave, sections=Sections.PARAMETERS, counted=False) as slots:
                    for expert, slot in zip(wave, slots, strict=True):
                        yield (bank, expert), torch.cat([cache.views[name][slot].flatten() for name in names]).cpu()

    def state_dict(self) -> dict[str, Any]:
        """Returns all Fishers and anchors, for a checkpoint."""
        dense = [(spring.fisher, spring.anchor) for spring in self._dense]
        return {"dense": dense, "experts": {key: (spring.fisher, spring.anchor) for key, spring in self._experts.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back the Fishers and anchors from what `state_dict` returned."""
        device = next(self._agent.shared_parameters()).device
        self._dense = [Spring(fisher.to(device), anchor.to(device)) for fisher, anchor in state["dense"]]
        self._experts = {key: Spring(fisher, anchor) for key, (fisher, anchor) in state["experts"].items()}
