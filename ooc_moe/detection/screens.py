"""The parts of which the detector (detector.py) and its baseline (nearest_mean.py) are made.

The detector and the baseline recognise games by screens: single frames in a small size. The parts make screens from frames, turn them into
features, keep a sample of them, and compare them with earlier screens.

Letters: N frames, S stacked frames, H height, W width, M stored screens, P patches, C their pixels, D features.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ooc_moe_wire.errors import InvalidRequest

SCREEN = 42
"""Height and width of a screen. Frames of another size are averaged to it."""
UNKNOWN_RADIUS = 2.0
"""How far a screen may be from a game before it counts as of no known game: this many times the usual distance between a stored screen and
its nearest neighbour (detector), or this many standard deviations from the mean (nearest_mean.py)."""
USUAL = 0.95
"""The quantile that counts as the usual distance. The maximum would be the distance of a rare screen, such as a title or a blackout."""


def screens_of(frames_NSHW: Tensor, frame_shape: tuple[int, int, int]) -> Tensor:
    """Reduces the newest frame of each stack to a small uint8 screen (N, SCREEN, SCREEN) on the CPU.

    Detectors live on the CPU: frames are made there, and a detector's result becomes a list of experts to prefetch there. Every detector
    gets its screens from this function, so frames on other devices are moved here and nowhere else.

    Args:
        frames_NSHW: uint8 observations, on any device.
        frame_shape: the (S, H, W) that they must have.

    Raises:
        InvalidRequest: the frames are not uint8 (N, *frame_shape), or there are none.
    """
    if frames_NSHW.dtype != torch.uint8 or frames_NSHW.shape[1:] != frame_shape or not len(frames_NSHW):
        found = f"{str(frames_NSHW.dtype).removeprefix('torch.')} {tuple(frames_NSHW.shape)}"
        raise InvalidRequest(f"frames: {found}, but the detector takes uint8 (N, {', '.join(map(str, frame_shape))})")
    newest_NHW = frames_NSHW.select(1, -1).cpu()
    if newest_NHW.shape[1:] == (SCREEN, SCREEN):
        return newest_NHW
    return F.adaptive_avg_pool2d(newest_NHW.float(), SCREEN).round().to(torch.uint8)


class ScreenFeatures(nn.Module):
    """A small convolutional network that turns uint8 screens (N, SCREEN, SCREEN) into features (N, DIM).

    It computes the same in training and evaluation mode.
    """

    DIM = 64
    PATCH, CHANNELS = 6, 16

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Linear(self.PATCH**2, self.CHANNELS)
        self.whole = nn.Linear(self.CHANNELS * (SCREEN // self.PATCH) ** 2, self.DIM)

    def forward(self, screens_NHW: Tensor) -> Tensor:
        """Computes the features (N, DIM) of screens. No feature is negative."""
        # A convolution whose kernels do not overlap is one matrix product. The backward pass of `nn.Conv2d` took most of the learning time.
        side = SCREEN // self.PATCH
        patches_NPC = screens_NHW.reshape(-1, side, self.PATCH, side, self.PATCH).transpose(2, 3).reshape(-1, side**2, self.PATCH**2)
        return F.relu(self.whole(F.relu(self.patches(patches_NPC / 255)).flatten(1)))


class Reservoir:
    """Keeps a uniform random sample, of at most `capacity` screens, of all screens that were added (algorithm R of Vitter 1985).

    Attributes:
        screens_MHW: the screens in the sample, uint8.
        num_seen: the number of screens added so far.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self.screens_MHW = torch.zeros(0, SCREEN, SCREEN, dtype=torch.uint8)
        self.num_seen = 0

    def add(self, screens_NHW: Tensor, generator: torch.Generator) -> None:
        """Adds screens one after another. Once the sample is full, each takes the place of an earlier screen or is dropped, at random."""
        free = self._capacity - len(self.screens_MHW)
        self.screens_MHW = torch.cat([self.screens_MHW, screens_NHW[:free]])
        self.num_seen += len(screens_NHW[:free])
        late_NHW = screens_NHW[free:]
        order_N = self.num_seen + 1 + torch.arange(len(late_NHW))
        slots_N = (torch.rand(len(late_NHW), generator=generator, dtype=torch.float64) * order_N).long()
        for screen_HW, slot in zip(late_NHW, slots_N.tolist(), strict=True):
            if slot < self._capacity:
                self.screens_MHW[slot] = screen_HW
        self.num_seen += len(late_NHW)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Draws `count` screens from the sample, with replacement."""
        return self.screens_MHW[torch.randint(len(self.screens_MHW), (count,), generator=generator)]


class Neighbourhood:
    """Tells whether a screen is too far from one game's stored screens to belong to that game.

    A screen is far when the distance of its features to those of the nearest stored screen is more than UNKNOWN_RADIUS times the usual
    distance between a stored screen and its nearest neighbour. `features_MD` are the features of the M stored screens.
    """

    def __init__(self, features_MD: Tensor) -> None:
        self._features_MD = features_MD
        distances_MM = torch.cdist(features_MD, features_MD).fill_diagonal_(torch.inf)
        self._radius = UNKNOWN_RADIUS * float(distances_MM.amin(1).quantile(USUAL))

    def is_far(self, features_ND: Tensor) -> Tensor:
        """Marks, in a bool tensor (N,), the screens that are far from all stored ones. A screen is given by its features."""
        return torch.cdist(features_ND, self._features_MD).amin(1) > self._radius
