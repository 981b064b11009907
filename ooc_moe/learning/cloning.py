"""Output cloning: while later games are learned, the agent is trained to keep its outputs for stored frames of earlier games.

When the training in a game ends, segments of its last rollout are stored with the agent's logits and values at that time. Each later
optimizer step computes the outputs for some stored segments of one such game again, and pulls them back to the stored ones. This is the
behaviour and value cloning of CLEAR (Rolnick et al. 2019) without its off-policy reinforcement learning. It protects everything that games
share; with token routing that includes the experts.

That computation needs the experts of the earlier game. With token routing all games use the same experts. With pools (each game's own
experts) they are experts that the game in training does not use: they are usually not in the cache, and every step fetches them only to
read them. That is accepted, because measuring this cost is the purpose.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from ooc_moe.agent.agent import Agent
from ooc_moe.learning.rollout import Rollout

FRAMES_PER_GAME = 1500
"""The largest number of frames stored of a game, in whole segments. All come from one rollout."""
FRAMES_PER_STEP = 256
"""The number of stored frames that each optimizer step uses."""


class OutputCloning:
    """The method against forgetting that stores segments of earlier games with the agent's outputs, and trains the agent to keep these.

    The loss is KL(old policy || new policy) + squared error of the value / variance of the old values. Each step takes segments of one
    stored game other than the one in training, drawn at random. Segments are routed anew, without noise. They are stored on the CPU.

    Args:
        agent: the agent in training.
        weight: weight of the loss.
    """

    def __init__(self, agent: Agent, *, weight: float = 1.0) -> None:
        self._agent, self._weight = agent, weight
        self._stored: dict[str, dict[str, Tensor]] = {}

    def loss(self, game: str, generator: torch.Generator) -> Tensor:
        """Computes the weighted loss on some stored segments of one game other than `game`; zero while no other game is stored.

        `generator` draws the other game and its segments.
        """
        games = [name for name in self._stored if name != game]
        if not games:
            return torch.zeros(())
        cloned = games[int(torch.randint(len(games), (), generator=generator))]
        stored = self._stored[cloned]
        num_rows = max(1, FRAMES_PER_STEP // self._agent.config.context)
        rows = torch.randint(len(stored["frames"]), (num_rows,), generator=generator)
        logits_BTA, value_BT = self._outputs(cloned, stored["frames"][rows], stored["starts"][rows])
        device = value_BT.device
        old_BTA = stored["logits"][rows].to(device).log_softmax(-1)
        kl = kl_div(logits_BTA.log_softmax(-1), old_BTA, reduction="none", log_target=True).sum(-1).mean()
        variance = stored["values"].var().clamp(min=1e-3).to(device)
        return self._weight * (kl + (value_BT - stored["values"][rows].to(device)).square().mean() / variance)

    def correct_gradients(self, game: str) -> None:
        """Drops the gradients of parameters and experts that belong to other games than `game`.

        Without this, the loss on other games' stored segments would change the parameters of those games.
        """
        for name in self._stored:
            if name != game:
                for parameter in self._agent.game_parameters(name):
                    parameter.grad = None
        if self._agent.config.routing == "pool":
            pools, num_banks = self._agent.pools(game), len(self._agent.caches)
            used, borrowed = pools.by_bank(num_banks), pools.borrowed_by_bank(num_banks)
            for gradients, all_used, not_owned in zip(self._agent.gradients, used, borrowed, strict=True):
                gradients.keep(set(all_used).difference(not_owned))

    @torch.no_grad()
    def leave(self, game: str, rollout: Rollout, generator: torch.Generator) -> None:
        """Stores up to `FRAMES_PER_GAME` frames of a game's last rollout, with the agent's outputs for them.

        Call this when the training in the game ends. The frames replace those that were stored when the game was trained before.
        """
        context = self._agent.config.context
        rows = torch.randperm(len(rollout.frames_BTSHW), generator=generator)[: max(1, FRAMES_PER_GAME // context)]
        frames_BTSHW, starts_BT = rollout.frames_BTSHW[rows], rollout.starts_BT[rows]
        pieces = zip(torch.split(frames_BTSHW, 16), torch.split(starts_BT, 16), strict=True)
        outputs = [self._outputs(game, *piece) for piece in pieces]
        logits_BTA, value_BT = (torch.cat(parts).cpu() for parts in zip(*outputs, strict=True))
        self._stored[game] = {"frames": frames_BTSHW, "starts": starts_BT, "logits": logits_BTA, "values": value_BT}

    def _outputs(self, game: str, frames_BTSHW: Tensor, starts_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Computes logits and values without router noise."""
        self._agent.eval()
        output = self._agent(frames_BTSHW, game=game, starts_BT=starts_BT)
        self._agent.train()
        return output.logits_BTA, output.value_BT

    def state_dict(self) -> dict[str, Any]:
        """Returns the stored segments, by game, for a checkpoint."""
        return self._stored

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back the stored segments from what `state_dict` returned."""
        self._stored = dict(state)
