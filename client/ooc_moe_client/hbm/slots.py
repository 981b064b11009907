"""The slab: one uint8 tensor of slots on the device, its strided views, and the copies in and out of it.

A slot holds an expert's body (parameter section, optimizer section), 4 KiB aligned. On the CPU a fetch writes straight into the slot. On
CUDA it lands in pinned staging and is copied on a stream of its own; events, not the host, order the copies against the compute stream.
Knows nothing of experts, versions or who is in which slot: the caller guarantees that a slot is not given away while it is pinned.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ooc_moe_wire.layout import BLOCK_BYTES, Layout, TensorSpec


class Slab(Protocol):
    """Slots of `body_bytes` on a device."""

    views: dict[str, Tensor]

    def landing(self, slot: int, num_bytes: int) -> memoryview:
        """Writable host memory whose first `num_bytes` become the slot's once `landed` is called."""

    def landed(self, slot: int, num_bytes: int) -> None:
        """The landing memory is filled: bring it to the slot."""

    def abandon(self, slot: int) -> None:
        """Nothing will land: gives the landing memory back."""

    def acquire(self, slots: Sequence[int], *, writing: bool) -> None:
        """The compute stream is about to read (or write) the slots."""

    def release(self, slots: Sequence[int]) -> None:
        """The compute stream was given its last work on the slots."""

    def copy_out(self, slot: int, buffer: Tensor) -> CopyOut:
        """Starts copying the slot to a host `buffer` (body_bytes,) uint8; the copy is done when the returned ticket says so."""

    def host_buffer(self) -> Tensor:
        """A new host buffer (body_bytes,) uint8 for `copy_out`."""

    def close(self) -> None:
        """Waits for the copies under way, so that the memory may be freed."""


class CopyOut(Protocol):
    """A copy to the host under way."""

    def synchronize(self) -> None:
        """Returns when the copy is done."""


class HostSlab:
    """Slots in host memory: landing memory is the slot, and there is nothing to order."""

    def __init__(self, layout: Layout, num_slots: int) -> None:
        self._rows = allocate(num_slots, layout.body_bytes, torch.device("cpu"))
        self._bytes = self._rows.numpy()
        self.views = strided_views(layout, self._rows)

    def landing(self, slot: int, num_bytes: int) -> memoryview:
        """The slot itself."""
        return self._bytes[slot, :num_bytes].data

    def landed(self, slot: int, num_bytes: int) -> None:
        """Nothing to do."""

    def abandon(self, slot: int) -> None:
        """Nothing to do."""

    def acquire(self, slots: Sequence[int], *, writing: bool) -> None:
        """Nothing to do."""

    def release(self, slots: Sequence[int]) -> None:
        """Nothing to do."""

    def copy_out(self, slot: int, buffer: Tensor) -> CopyOut:
        """Copies at once."""
        buffer.copy_(self._rows[slot])
        return _Done()

    def host_buffer(self) -> Tensor:
        """Pageable memory."""
        return torch.empty(self._rows.shape[1], dtype=torch.uint8)

    def close(self) -> None:
        """Nothing to do."""


class _Done:
    def synchronize(self) -> None:
        """Done already."""


def allocate(num_slots: int, slot_bytes: int, device: torch.device) -> Tensor:
    """Zeroed (num_slots, slot_bytes) uint8 whose first byte is 4 KiB aligned."""
    flat = torch.zeros(num_slots * slot_bytes + BLOCK_BYTES, dtype=torch.uint8, device=device)
    start = -flat.data_ptr() % BLOCK_BYTES
    return flat[start : start + num_slots * slot_bytes].view(num_slots, slot_bytes)


def strided_views(layout: Layout, rows: Tensor) -> dict[str, Tensor]:
    """Each tensor of the layout as a view (num_slots, *shape) of `rows` (num_slots, body_bytes)."""
    return {tensor.name: _strided_view(tensor, layout.offsets[tensor.name], rows) for tensor in layout.tensors}


def _strided_view(tensor: TensorSpec, offset: int, rows: Tensor) -> Tensor:
    dtype: torch.dtype = getattr(torch, tensor.dtype)
    elements = rows.view(dtype)  # (num_slots, body_bytes / itemsize)
    inner = [math.prod(tensor.shape[axis + 1 :]) for axis in range(len(tensor.shape))]
    return elements.as_strided(
        (rows.shape[0], *tensor.shape),
        (elements.stride(0), *inner),
        elements.storage_offset() + offset // dtype.itemsize,
    )
