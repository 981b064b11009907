"""`ExpertSlots`: the cache's memory, divided into slots of one expert each, and the copies into and out of these slots.

The memory is one uint8 tensor on the device. A slot holds an expert's body (parameter section, optimizer section) and is 4 KiB aligned:

    slot 0 | w1 | b1 | padding | moments | padding |
    slot 1 | w1 | b1 | padding | moments | padding |

`views` has one tensor for each named part: `views["w1"][0]` is w1 in slot 0.

On the CPU (`HostSlots`) a fetch writes straight into the slot. On CUDA (`CudaSlots`, cuda_slots.py) it writes into page-locked staging
memory, which is copied to the slot on a separate stream; CUDA events order these copies and the computation, so the host rarely waits. Only
the caller knows which expert is in which slot, and which slots are pinned. It must not reuse a pinned slot.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ooc_moe_wire.layout import BLOCK_BYTES, Layout, TensorSpec


class ExpertSlots(Protocol):
    """The interface of the cache's memory: a fixed number of slots for one expert each, `body_bytes` long.

    `views` has for each tensor name a view (num_slots, *shape) of all slots. A fetch calls `landing` to get the memory that it fills, and
    then `landed`. A computation on slots calls `acquire` before and `release` after it.
    """

    views: dict[str, Tensor]

    def enter_thread(self) -> None:
        """To be called once at the start of each background thread that uses the slots."""

    def landing(self, slot: int, num_bytes: int) -> memoryview:
        """Returns host memory of `num_bytes`, the landing memory, into which a fetch writes the bytes for the slot. Then call `landed`."""

    def landed(self, slot: int, num_bytes: int) -> None:
        """Brings the first `num_bytes` of the landing memory, which a fetch has filled, into the slot.

        The copy may still run when this returns.
        """

    def abandon(self, slot: int) -> None:
        """Gives back the slot's landing memory (from `landing`) unused. Call this when the fetch failed."""

    def check_stream(self) -> None:
        """Raises InvalidRequest when the caller's current stream is not the compute stream, against which the copies are ordered."""

    def acquire(self, slots: Sequence[int], *, writing: bool) -> None:
        """Makes computation that is queued after this call wait for unfinished copies into or out of the slots.

        Call it before the compute stream reads the slots, or, with `writing`, before it writes the slots.
        """

    def release(self, slots: Sequence[int]) -> None:
        """Makes later copies into and out of the slots wait for the computation that is queued so far.

        Call it when all computation that uses the slots since `acquire` is queued.
        """

    def copy_out(self, slot: int, buffer: Tensor) -> CopyOut:
        """Starts copying the slot to a host `buffer` (body_bytes,) uint8. The result's `synchronize` waits until the copy is done."""

    def copy_back(self, slot: int, buffer: Tensor) -> None:
        """Starts copying a host `buffer` to the slot. `copy_out` was called before to fill the buffer; its copy may still run."""

    def host_buffer(self) -> Tensor:
        """Allocates a host buffer (body_bytes,) uint8 for `copy_out`."""

    def close(self) -> None:
        """Waits until all copies are done, so that the memory may be freed."""


class CopyOut(Protocol):
    """A copy from a slot to the host that may still be running."""

    def synchronize(self) -> None:
        """Waits until the copy is done."""


class HostSlots:
    """The cache's slots in host memory. A fetch writes straight into the slot, and every copy is done when its call returns.

    `ExpertSlots` documents the methods.
    """

    def __init__(self, layout: Layout, num_slots: int) -> None:
        self._rows = allocate(num_slots, layout.body_bytes, torch.device("cpu"))
        self._bytes = self._rows.numpy()
        self.views = strided_views(layout, self._rows)

    def enter_thread(self) -> None:
        """Nothing to do."""

    def landing(self, slot: int, num_bytes: int) -> memoryview:
        """Returns the first `num_bytes` of the slot's memory, so that a fetch writes straight into the slot."""
        return self._bytes[slot, :num_bytes].data

    def landed(self, slot: int, num_bytes: int) -> None:
        """Does nothing: the bytes are in the slot already."""

    def abandon(self, slot: int) -> None:
        """Does nothing: a fetch writes straight into the slot, so there is no other memory to give back."""

    def check_stream(self) -> None:
        """Does nothing: the CPU has no streams."""

    def acquire(self, slots: Sequence[int], *, writing: bool) -> None:
        """Does nothing: no copy is ever unfinished."""

    def release(self, slots: Sequence[int]) -> None:
        """Does nothing: computation on the CPU is done when its call returns."""

    def copy_out(self, slot: int, buffer: Tensor) -> CopyOut:
        """Copies the slot to `buffer`. The copy is done when this returns."""
        buffer.copy_(self._rows[slot])
        return _DONE

    def copy_back(self, slot: int, buffer: Tensor) -> None:
        """Copies `buffer` to the slot before it returns."""
        self._bytes[slot].data[:] = buffer.numpy().data

    def host_buffer(self) -> Tensor:
        """Allocates an ordinary (not page-locked) buffer for one slot's bytes."""
        return torch.empty(self._rows.shape[1], dtype=torch.uint8)

    def close(self) -> None:
        """Does nothing: no copy is ever unfinished."""


class _Done:
    def synchronize(self) -> None:
        """Does nothing: the copy is done already."""


_DONE = _Done()


def allocate(num_slots: int, slot_bytes: int, device: torch.device) -> Tensor:
    """Allocates a zeroed tensor (num_slots, slot_bytes) uint8 whose first byte is 4 KiB aligned."""
    flat = torch.zeros(num_slots * slot_bytes + BLOCK_BYTES, dtype=torch.uint8, device=device)
    start = -flat.data_ptr() % BLOCK_BYTES
    return flat[start : start + num_slots * slot_bytes].view(num_slots, slot_bytes)


def strided_views(layout: Layout, rows: Tensor) -> dict[str, Tensor]:
    """Makes a view of each tensor of the layout in all slots, of shape (num_slots, *shape). Returns the views by tensor name.

    `rows` is the memory of the slots, (num_slots, body_bytes), one row per slot.
    """
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
