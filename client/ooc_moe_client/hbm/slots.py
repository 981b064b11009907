"""`ExpertSlots`: the memory of a cache, one uint8 tensor of slots on the device, and the copies in and out of it.

A slot holds an expert's body (parameter section, optimizer section) and is 4 KiB aligned:

    slot 0 | w1 | b1 | padding | moments | padding |       views["w1"][0] is this part of slot 0
    slot 1 | w1 | b1 | padding | moments | padding |

On the CPU (`HostSlots`) a fetch writes straight into the slot. On CUDA (`CudaSlots`, cuda_slots.py) it writes into pinned staging memory,
which is copied to the slot on a stream of its own; events, not the host, order the copies against the compute stream. Which expert is in
which slot is known to the caller alone, who guarantees that a slot is not reused while it is pinned.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ooc_moe_wire.layout import BLOCK_BYTES, Layout, TensorSpec


class ExpertSlots(Protocol):
    """Slots of `body_bytes` each. `views` has, for each tensor name, a strided view (num_slots, *shape) of all slots."""

    views: dict[str, Tensor]

    def enter_thread(self) -> None:
        """To be called once at the start of each background thread that uses the slots."""

    def landing(self, slot: int, num_bytes: int) -> memoryview:
        """Writable host memory of `num_bytes`, whose content becomes the slot's when `landed` is called."""

    def landed(self, slot: int, num_bytes: int) -> None:
        """Brings the content of the landing memory, which is filled now, to the slot."""

    def abandon(self, slot: int) -> None:
        """Gives the landing memory back unused."""

    def acquire(self, slots: Sequence[int], *, writing: bool) -> None:
        """To be called before the compute stream reads the slots, or, with `writing`, writes them."""

    def release(self, slots: Sequence[int]) -> None:
        """To be called when all work of the compute stream on the slots has been queued."""

    def copy_out(self, slot: int, buffer: Tensor) -> CopyOut:
        """Starts copying the slot to a host `buffer` (body_bytes,) uint8. `synchronize` of the result waits for the end of the copy."""

    def host_buffer(self) -> Tensor:
        """A new host buffer (body_bytes,) uint8 for `copy_out`."""

    def close(self) -> None:
        """Waits for copies in flight, so that the memory may be freed."""


class CopyOut(Protocol):
    """A copy to the host in flight."""

    def synchronize(self) -> None:
        """Returns when the copy is done."""


class HostSlots:
    """Slots in host memory. The landing memory is the slot itself, and there are no streams to order."""

    def __init__(self, layout: Layout, num_slots: int) -> None:
        self._rows = allocate(num_slots, layout.body_bytes, torch.device("cpu"))
        self._bytes = self._rows.numpy()
        self.views = strided_views(layout, self._rows)

    def enter_thread(self) -> None:
        """Nothing to do."""

    def landing(self, slot: int, num_bytes: int) -> memoryview:
        """Returns the memory of the slot itself."""
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
        """Makes the copy at once."""
        buffer.copy_(self._rows[slot])
        return _DONE

    def host_buffer(self) -> Tensor:
        """A new buffer in pageable memory."""
        return torch.empty(self._rows.shape[1], dtype=torch.uint8)

    def close(self) -> None:
        """Nothing to do."""


class _Done:
    def synchronize(self) -> None:
        """Nothing to do: the copy was made at once."""


_DONE = _Done()


def allocate(num_slots: int, slot_bytes: int, device: torch.device) -> Tensor:
    """A zeroed tensor (num_slots, slot_bytes) uint8 whose first byte is 4 KiB aligned."""
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
