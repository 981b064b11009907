"""`CudaSlots`: the cache's slots on a GPU, and the copies between them and the host.

The copies run on one CUDA stream of their own. They use page-locked ("pinned") host buffers as staging memory. CUDA events order the copies
and the computation, so that the host rarely has to wait. In the diagram, a copy starts after the computation that last used the slot, and
the event makes whoever is named after it wait for the copy:

    fetch:    staging buffer --copy stream, after the slot's last use--> slot --event--> compute stream
    copy out: slot --copy stream, after the slot's last use--> pinned buffer --event--> host, and the next writer of the slot

The host waits in two cases only: when all staging buffers are in use, and before it pushes a buffer that was copied out.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from ooc_moe_client.hbm.slots import CopyOut, allocate, strided_views
from ooc_moe_wire.layout import Layout

# Two fetches (demand and prefetch), each with one expert arriving and one being copied.
STAGING_BUFFERS = 4


class CudaSlots:
    """The cache's slots (each is memory for one expert) in the memory of a GPU. `ExpertSlots` documents the methods."""

    def __init__(self, layout: Layout, num_slots: int, device: torch.device) -> None:
        self._device = device
        self._rows = allocate(num_slots, layout.body_bytes, device)
        self.views = strided_views(layout, self._rows)
        self._copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._copies.wait_stream(torch.cuda.current_stream(device))
        self._used: dict[int, torch.cuda.Event] = {}  # by slot: the compute stream's last use
        self._copied_in: dict[int, torch.cuda.Event] = {}
        self._copied_out: dict[int, torch.cuda.Event] = {}
        self._lock = threading.Lock()  # guards the staging buffers
        self._staging: list[tuple[Tensor, torch.cuda.Event | None]] = []  # unused buffers, and the copy that still reads each
        self._num_staging = 0
        self._landing: dict[int, Tensor] = {}  # by slot

    def landing(self, slot: int, num_bytes: int) -> memoryview:
        """Returns a page-locked staging buffer, into which a fetch writes the bytes for the slot.

        When the connection breaks and the fetch is repeated, the slot gets the same buffer again.
        """
        with self._lock:
            if slot not in self._landing:
                self._landing[slot] = self._free_staging()
            return self._landing[slot].numpy()[:num_bytes].data

    def _free_staging(self) -> Tensor:
        for index, (buffer, copied) in enumerate(self._staging):
            if copied is None or copied.query():  # type: ignore[no-untyped-call]
                del self._staging[index]
                return buffer
        if self._num_staging < STAGING_BUFFERS or not self._staging:
            self._num_staging += 1
            return self.host_buffer()
        buffer, copied = self._staging.pop(0)
        assert copied is not None
        copied.synchronize()
        return buffer

    def landed(self, slot: int, num_bytes: int) -> None:
        """Starts the copy from the staging buffer to the slot. On the GPU it runs after the last computation that used the slot."""
        with self._lock:
            buffer = self._landing.pop(slot)
            with torch.cuda.stream(self._copies):
                if slot in self._used:
                    self._copies.wait_event(self._used.pop(slot))
                self._rows[slot, :num_bytes].copy_(buffer[:num_bytes], non_blocking=True)
            self._copied_in[slot] = copied = self._copies.record_event()
            self._staging.append((buffer, copied))

    def abandon(self, slot: int) -> None:
        """Gives back the slot's staging buffer unused, because its fetch failed."""
        with self._lock:
            buffer = self._landing.pop(slot, None)
            if buffer is not None:
                self._staging.append((buffer, None))

    def acquire(self, slots: Sequence[int], *, writing: bool) -> None:
        """Makes the compute stream wait for unfinished copies into the slots, and, if it will write them, also for copies out of them."""
        compute = torch.cuda.current_stream(self._device)
        for slot in slots:
            if slot in self._copied_in:
                compute.wait_event(self._copied_in[slot])
            if writing and slot in self._copied_out:
                compute.wait_event(self._copied_out.pop(slot))

    def release(self, slots: Sequence[int]) -> None:
        """Makes later copies of these slots wait for the work that was queued on the compute stream until now (by a CUDA event)."""
        used = torch.cuda.current_stream(self._device).record_event()
        self._used.update((slot, used) for slot in slots)

    def copy_out(self, slot: int, buffer: Tensor) -> CopyOut:
        """Starts the copy from the slot to a page-locked host buffer. On the GPU it runs after the last computation that used the slot."""
        with torch.cuda.stream(self._copies):
            if slot in self._used:
                self._copies.wait_event(self._used[slot])
            buffer.copy_(self._rows[slot], non_blocking=True)
        copied: torch.cuda.Event = self._copies.record_event()
        self._copied_out[slot] = copied
        return copied

    def host_buffer(self) -> Tensor:
        """Allocates a page-locked host buffer for one slot's bytes."""
        return torch.empty(self._rows.shape[1], dtype=torch.uint8, pin_memory=True)

    def close(self) -> None:
        """Waits until all copies are done, so that the slots may be freed. torch's allocator does not know that the copies use them."""
        self._copies.synchronize()
