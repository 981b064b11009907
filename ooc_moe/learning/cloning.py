"""Output cloning: earlier games are played on paper while later ones are learned.

When a game is left, segments of its last rollout are stored with the agent's logits and values of that moment; every later optimizer step
sees some of one such game again and is pulled to say the same (as the behaviour and value cloning of CLEAR, Rolnick et al. 2019, but
without its off-policy reinforcement learning). It guards all that games share: with token routing the experts, too.

It needs the experts of the games it clones. With token routing they are everybody's. With pools they are cold ones, needed in every step:
allowed, because what that costs is a result; they are only read.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from ooc_moe.agent.agent import Agent
from ooc_moe.learning.rollout import Rollout

FRAMES_PER_GAME = 1500  # At most, in whole segments: those of one rollout.
FRAMES_PER_STEP = 256


class OutputCloning:
    """KL(old policy || new policy) + squared error of the value, in units of the old values' variance, on stored segments (on the CPU).

    A step clones one game, drawn among all that were left but the one in training. Segments are routed anew, without noise.

    Args:
        agent: what is trained.
        weight: of the loss.
    """

    def __init__(self, agent: Agent, *, weight: float = 1.0) -> None:
        self._agent, self._weight = agent, weight
        self._stored: dict[str, dict[str, Tensor]] = {}

    def loss(self, game: str, generator: torch.Generator) -> Tensor:
        """How much the agent says otherwise now."""
        games = [name for name in self._stored if name != game]
        if not games:
            return torch.zeros(())
        cloned = games[int(torch.randint(len(games), (), generator=generator))]
        stored = self._stored[cloned]
        num_rows = max(1, FRAMES_PER_STEP // self._agent.config.context)
        rows = torch.randint(len(stored["frames"]), (num_rows,), generator=generator)
        logits_BTA, value_BT = self._say(cloned, stored["frames"][rows], stored["starts"][rows])
        device = value_BT.device
        old_BTA = stored["logits"][rows].to(device).log_softmax(-1)
        kl = kl_div(logits_BTA.log_softmax(-1), old_BTA, reduction="none", log_target=True).sum(-1).mean()
        variance = stored["values"].var().clamp(min=1e-3).to(device)
        return self._weight * (kl + (value_BT - stored["values"][rows].to(device)).square().mean() / variance)

    def correct_gradients(self, game: str) -> None:
        """Drops what backward left for the parameters and experts that other games own."""
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
        """Stores up to `FRAMES_PER_GAME` frames of a game's last rollout, instead of those of an earlier visit."""
        context = self._agent.config.context
        rows = torch.randperm(len(rollout.frames_BTSHW), generator=generator)[: max(1, FRAMES_PER_GAME // context)]
        frames_BTSHW, starts_BT = rollout.frames_BTSHW[rows], rollout.starts_BT[rows]
        said = [self._say(game, *piece) for piece in zip(torch.split(frames_BTSHW, 16), torch.split(starts_BT, 16), strict=True)]
        logits_BTA, value_BT = (torch.cat(pieces).cpu() for pieces in zip(*said, strict=True))
        self._stored[game] = {"frames": frames_BTSHW, "starts": starts_BT, "logits": logits_BTA, "values": value_BT}

    def _say(self, game: str, frames_BTSHW: Tensor, starts_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and values, without noise."""
        self._agent.eval()
        output = self._agent(frames_BTSHW, game=game, starts_BT=starts_BT)
        self._agent.train()
        return output.logits_BTA, output.value_BT

    def state_dict(self) -> dict[str, Any]:
        """What was stored, by game."""
        return self._stored

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Reads `state_dict` back."""
        self._stored = dict(state)
