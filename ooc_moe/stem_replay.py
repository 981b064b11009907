"""Feature replay: keeps the shared stem from forgetting what it saw in earlier games.

When a game is left, some of its frames are stored with the stem's outputs of that moment; while later games are learned, a small loss
pulls the stem's outputs on those frames back to the stored ones. It touches no expert, so no cold expert is ever fetched for it.
The weight must be small (0.05 on Atari): a heavy one is a frozen stem, which cannot learn the next game.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ooc_moe.rollout import Rollout

FRAMES_PER_GAME = 1000
FRAMES_PER_STEP = 64


class StemReplay:
    """Stored frames (on the CPU) and features (on the stem's device) of the games that were left.

    Args:
        stem: frames (M, S, H, W) -> features (M, D).
        weight: of the loss.
        device: the stem's.
    """

    def __init__(self, stem: Callable[[Tensor], Tensor], *, weight: float = 0.05, device: str = "cpu") -> None:
        self._stem, self._weight, self._device = stem, weight, device
        self.frames_MSHW: Tensor | None = None
        self.features_MD: Tensor | None = None

    def leave(self, game: str, rollout: Rollout, generator: torch.Generator) -> None:
        """Stores some of the frames of a game's last rollout."""
        frames_MSHW = rollout.frames_BTSHW.flatten(0, 1)
        chosen = torch.randperm(len(frames_MSHW), generator=generator)[:FRAMES_PER_GAME]
        self.store(frames_MSHW[chosen])

    @torch.no_grad()
    def store(self, frames_MSHW: Tensor) -> None:
        """Adds a game's frames (uint8, M x stack x height x width) and what the stem makes of them now."""
        features_MD = torch.cat([self._stem(piece.to(self._device)) for piece in torch.split(frames_MSHW, 256)])
        if self.frames_MSHW is not None and self.features_MD is not None:
            frames_MSHW = torch.cat([self.frames_MSHW, frames_MSHW])
            features_MD = torch.cat([self.features_MD, features_MD])
        self._set(frames_MSHW, features_MD)

    def loss(self, game: str, generator: torch.Generator) -> Tensor:
        """Squared distance of the stem's outputs from the stored ones on a random batch, in units of the features' variance."""
        if self.frames_MSHW is None or self.features_MD is None:
            return torch.zeros((), device=self._device)
        rows = torch.randint(len(self.frames_MSHW), (FRAMES_PER_STEP,), generator=generator)
        distance_MD = (self._stem(self.frames_MSHW[rows].to(self._device)) - self.features_MD[rows.to(self._device)]).square()
        return self._weight * (distance_MD / self._variance).mean()

    def correct_gradients(self, game: str) -> None:
        """Nothing to correct: the stem has no experts."""

    def state_dict(self) -> dict[str, Tensor]:
        """For the checkpoint; empty when nothing was stored."""
        if self.frames_MSHW is None or self.features_MD is None:
            return {}
        return {"frames": self.frames_MSHW, "features": self.features_MD}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Reads `state_dict` back."""
        if state:
            self._set(state["frames"], state["features"].to(self._device))

    def _set(self, frames_MSHW: Tensor, features_MD: Tensor) -> None:
        self.frames_MSHW, self.features_MD = frames_MSHW, features_MD
        self._variance = features_MD.var(dim=0).mean().clamp(min=1e-6)
