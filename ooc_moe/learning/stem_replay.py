"""Feature replay: keeps the shared stem from forgetting what it saw in earlier games.

When a game is left, some of its frames are stored with the stem's outputs of that moment; while later games are learned, a small loss
pulls the stem's outputs on those frames back to the stored ones. It touches no expert, so no cold expert is ever fetched for it.
The weight must be small (0.05 on Atari): a heavy one is a frozen stem, which cannot learn the next game.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, TensorDataset

from ooc_moe.learning.rollout import Rollout

FRAMES_PER_GAME = 1000  # At most: those of one rollout.
FRAMES_PER_STEP = 64


class StemReplay:
    """Frames (on the CPU) and features (on the stem's device) of the games that were left. A game that comes back is not held to its own.

    Args:
        stem: frames (M, S, H, W) -> features (M, D).
        weight: of the loss.
        device: the stem's.
    """

    def __init__(self, stem: Callable[[Tensor], Tensor], *, weight: float = 0.05, device: str = "cpu") -> None:
        self._stem, self._weight, self._device = stem, weight, device
        self._stored: dict[str, TensorDataset] = {}

    def leave(self, game: str, rollout: Rollout, generator: torch.Generator) -> None:
        """Stores some of the frames of a game's last rollout."""
        frames_MSHW = rollout.frames_BTSHW.flatten(0, 1)
        chosen = torch.randperm(len(frames_MSHW), generator=generator)[:FRAMES_PER_GAME]
        self.store(game, frames_MSHW[chosen])

    @torch.no_grad()
    def store(self, game: str, frames_MSHW: Tensor) -> None:
        """Keeps a game's frames (uint8, M x stack x height x width) and what the stem makes of them now, instead of an earlier visit's."""
        features_MD = torch.cat([self._stem(piece.to(self._device)) for piece in torch.split(frames_MSHW, 256)])
        self._set(self._stored | {game: TensorDataset(frames_MSHW, features_MD)})

    def loss(self, game: str, generator: torch.Generator) -> Tensor:
        """Squared distance of the stem's outputs from the stored ones on a random batch, in units of all stored features' variance."""
        others = [stored for name, stored in self._stored.items() if name != game]
        if not others:
            return torch.zeros((), device=self._device)
        replayed = ConcatDataset[tuple[Tensor, ...]](others)
        rows = torch.randint(len(replayed), (FRAMES_PER_STEP,), generator=generator)
        frames_MSHW, features_MD = (torch.stack(drawn) for drawn in zip(*(replayed[row] for row in rows.tolist()), strict=True))
        distance_MD = (self._stem(frames_MSHW.to(self._device)) - features_MD).square()
        return self._weight * (distance_MD / self._variance).mean()

    def correct_gradients(self, game: str) -> None:
        """Nothing to correct: the stem has no experts."""

    def state_dict(self) -> dict[str, tuple[Tensor, ...]]:
        """Frames and features, by game."""
        return {game: stored.tensors for game, stored in self._stored.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Reads `state_dict` back."""
        self._set({game: TensorDataset(frames, features.to(self._device)) for game, (frames, features) in state.items()})

    def _set(self, stored: dict[str, TensorDataset]) -> None:
        self._stored = stored
        if stored:
            features_MD = torch.cat([features for _, features in (each.tensors for each in stored.values())])
            self._variance = features_MD.var(dim=0).mean().clamp(min=1e-6)
