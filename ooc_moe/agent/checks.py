"""Checks of the arguments of `Agent`. Each raises InvalidRequest that says what was given and what was expected."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ooc_moe.agent.segment import Segment
from ooc_moe.config.agent import AgentConfig
from ooc_moe_client.hbm.cache import ExpertCache
from ooc_moe_wire.errors import InvalidRequest


def check_caches(config: AgentConfig, caches: Sequence[ExpertCache]) -> None:
    """Checks that there is one cache for each bank, and that each bank has the layout of the configured experts."""
    if len(caches) != config.num_banks:
        raise InvalidRequest(f"caches: {len(caches)} given, but banks {config.banks!r} needs {config.num_banks}")
    for cache in caches:
        if cache.layout != config.expert_layout():
            raise InvalidRequest(f"bank {cache.bank!r}: its layout is not that of dim {config.dim}, hidden {config.hidden}")


def check_segments(config: AgentConfig, frames_BTSHW: Tensor, starts_BT: Tensor | None, routing: Tensor | None) -> tuple[int, int]:
    """Checks the arguments of `Agent.forward`. Returns the number of segments and the number of frames in each."""
    _check_frames(config, frames_BTSHW, "(batch, time, stack, height, width)", 5)
    batch, time = frames_BTSHW.shape[:2]
    if not 1 <= time <= config.context + 1:
        raise InvalidRequest(f"frames: {time} in each segment, but a segment has 1 to {config.context + 1} (context + 1)")
    _check_shape("starts", starts_BT, (batch, time), torch.bool)
    _check_shape("routing", routing, (batch, time, config.num_layers, config.top_k))
    return batch, time


def check_step(config: AgentConfig, frames_NSHW: Tensor, segment: Segment, starts_N: Tensor | None) -> None:
    """Checks the arguments of `Agent.act`, and that the segment has room for one more frame."""
    _check_frames(config, frames_NSHW, "(envs, stack, height, width)", 4)
    if len(frames_NSHW) != segment.num_envs:
        raise InvalidRequest(f"frames: of {len(frames_NSHW)} environments, but the segment has {segment.num_envs}")
    if segment.length > config.context:
        raise InvalidRequest(f"segment: full after {segment.length} frames (context + 1); begin another")
    _check_shape("starts", starts_N, (segment.num_envs,), torch.bool)


def _check_frames(config: AgentConfig, frames: Tensor, names: str, num_axes: int) -> None:
    want = (config.frame_stack, config.frame_size, config.frame_size)
    if frames.dtype != torch.uint8 or frames.ndim != num_axes or frames.shape[-3:] != want:
        raise InvalidRequest(f"frames: got {frames.dtype} {tuple(frames.shape)}, expected torch.uint8 {names} ending in {want}")


def _check_shape(name: str, value: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> None:
    if value is not None and (value.shape != shape or value.dtype != (dtype or value.dtype)):
        raise InvalidRequest(f"{name}: got {value.dtype} {tuple(value.shape)}, expected {dtype or 'whole numbers'} {shape}")
