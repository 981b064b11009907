"""What `Agent.act` remembers of a segment between two calls: the attention keys and values of the frames that it has seen.

A segment is at most `context + 1` consecutive frames of several environments of one game. Acting on it frame by frame gives the same
numbers, up to rounding, as one forward pass over all its frames.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ooc_moe.agent.transformer import KeysValues
from ooc_moe.config.agent import AgentConfig


@dataclass(slots=True)
class Segment:
    """What `Agent.act` remembers of one segment: the attention keys and values, in each layer, of the frames that it has seen so far.

    A segment is at most `context + 1` consecutive frames of several environments of one game.
    """

    game: str
    num_envs: int
    memories: list[KeysValues] = field(repr=False)
    """The keys and values of each layer, with room for `context + 1` frames."""
    length: int = 0
    """Number of frames seen."""
    episode_from_N: Tensor | None = None
    """For each environment, the frame at which its present episode began. None: no episode has begun inside this segment."""

    def begin_episodes(self, starts_N: Tensor | None) -> Tensor | None:
        """Notes in which environments the next frame begins a new episode, and returns the attention mask of that frame.

        Args:
            starts_N: True where the next frame begins an episode. None: it begins none.

        Returns:
            The mask (envs, 1, 1, frames), True for the frames to which the next frame may attend: those of its own episode. None: it may
            attend to all frames of the segment.
        """
        if starts_N is not None and self.length > 0 and starts_N.any():
            before_N = torch.zeros_like(starts_N, dtype=torch.long) if self.episode_from_N is None else self.episode_from_N
            self.episode_from_N = before_N.masked_fill(starts_N, self.length)
        if self.episode_from_N is None:
            return None
        frames_T = torch.arange(self.length + 1, device=self.episode_from_N.device)
        return (frames_T >= self.episode_from_N.unsqueeze(1))[:, None, None].to(self.memories[0].keys.device)

    def of_environments(self, rows: list[int]) -> Segment:
        """Returns a segment that holds only the environments in these rows (their positions in this segment)."""
        if len(rows) == self.num_envs:
            return self
        memories = [KeysValues(memory.keys[rows], memory.values[rows]) for memory in self.memories]
        episode_from_N = None if self.episode_from_N is None else self.episode_from_N[rows]
        return dataclasses.replace(self, num_envs=len(rows), memories=memories, episode_from_N=episode_from_N)

    @staticmethod
    def empty(config: AgentConfig, game: str, num_envs: int, *, device: torch.device) -> Segment:
        """Makes a segment that has seen no frame yet."""
        shape = (num_envs, config.num_heads, config.context + 1, config.dim // config.num_heads)
        memories = [KeysValues(torch.zeros(shape, device=device), torch.zeros(shape, device=device)) for _ in range(config.num_layers)]
        return Segment(game, num_envs, memories)

    @staticmethod
    def joined(segments: Sequence[Segment]) -> Segment:
        """Joins segments into one that holds the environments of all of them, in order. All must have the same game and length."""
        memories = [
            KeysValues(torch.cat([memory.keys for memory in layer]), torch.cat([memory.values for memory in layer]))
            for layer in zip(*(segment.memories for segment in segments), strict=True)
        ]
        starts = [segment.episode_from_N for segment in segments]
        known = [torch.zeros(segment.num_envs, dtype=torch.long) if N is None else N for N, segment in zip(starts, segments, strict=True)]
        return Segment(
            game=segments[0].game,
            num_envs=sum(segment.num_envs for segment in segments),
            memories=memories,
            length=segments[0].length,
            episode_from_N=None if all(N is None for N in starts) else torch.cat(known),
        )
