"""Feature replay: keeps the shared stem's outputs for earlier games while later games are learned.

When the training in a game ends, some of its frames are stored with the stem's outputs at that time. While later games are learned, a small
loss pulls the stem's outputs for those frames back to the stored ones. The loss uses no expert, so none is fetched for it. Its
weight must be small (0.05 on Atari): a large one freezes the stem, which then cannot learn the next game.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, TensorDataset

from ooc_moe.learning.rollout import Rollout

FRAMES_PER_GAME = 1000
"""The largest number of frames stored of a game. All come from one rollout."""
FRAMES_PER_STEP = 64
"""The number of stored frames in the loss of each optimizer step."""


class StemReplay:
    """The method against forgetting that stores frames of earlier games with the stem's outputs, and trains the stem to keep these outputs.

    The stem's outputs are called features. The loss grows with their distance from the stored features. The frames are stored on the CPU,
    the features on the stem's device. While a game is trained again, the loss leaves out its own frames.

    Args:
        stem: turns frames (M, S, H, W) into features (M, D).
        weight: weight of the loss.
        device: the stem's device.
    """

    def __init__(self, stem: Callable[[Tensor], Tensor], *, weight: float = 0.05, device: str = "cpu") -> None:
        self._stem, self._weight, self._device = stem, weight, device
        self._stored: dict[str, TensorDataset] = {}

    def leave(self, game: str, rollout: Rollout, generator: torch.Generator) -> None:
        """Stores some frames of a game's last rollout, with their features. Call this when the training in the game ends."""
        frames_MSHW = rollout.frames_BTSHW.flatten(0, 1)
        chosen = torch.randperm(len(frames_MSHW), generator=generator)[:FRAMES_PER_GAME]
        self.store(game, frames_MSHW[chosen])

    @torch.no_grad()
    def store(self, game: str, frames_MSHW: Tensor) -> None:
        """Stores frames (M, S, H, W), uint8, with the stem's present features. They replace what was stored for the game before."""
        features_MD = torch.cat([self._stem(piece.to(self._device)) for piece in torch.split(frames_MSHW, 256)])
        self._set(self._stored | {game: TensorDataset(frames_MSHW, features_MD)})

    def loss(self, game: str, generator: torch.Generator) -> Tensor:
        """Computes the weighted distance between the present and the stored features of random stored frames; zero while there are none.

        It is the mean squared distance, divided by the variance of all stored features. Frames of `game` itself are left out. `generator`
        draws the frames.
        """
        others = [stored for name, stored in self._stored.items() if name != game]
        if not others:
            return torch.zeros((), device=self._device)
        replayed = ConcatDataset[tuple[Tensor, ...]](others)
        rows = torch.randint(len(replayed), (FRAMES_PER_STEP,), generator=generator)
        frames_MSHW, features_MD = (torch.stack(drawn) for drawn in zip(*(replayed[row] for row in rows.tolist()), strict=True))
        distance_MD = (self._stem(frames_MSHW.to(self._device)) - features_MD).square()
        return self._weight * (distance_MD / self._variance).mean()

    def correct_gradients(self, game: str) -> None:
        """Does nothing: the loss uses no experts, so their gradients need no correction."""

    def state_dict(self) -> dict[str, tuple[Tensor, ...]]:
        """Returns the stored frames and features, by game, for a checkpoint."""
        return {game: stored.tensors for game, stored in self._stored.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back the stored frames and features from what `state_dict` returned."""
        self._set({game: TensorDataset(frames, features.to(self._device)) for game, (frames, features) in state.items()})

    def _set(self, stored: dict[str, TensorDataset]) -> None:
        self._stored = stored
        if stored:
            features_MD = torch.cat([features for _, features in (each.tensors for each in stored.values())])
            self._variance = features_MD.var(dim=0).mean().clamp(min=1e-6)
