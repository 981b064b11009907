"""`CudaSlots`: slots on a GPU, with pinned staging memory, one copy stream, and events that order copies without stopping the host.

    fetch:    landing memory --copy stream, after the slot's last use--> slot --event--> compute stream
    copy out: slot --copy stream, after the slot's last use--> pinned buffer --event--> host, and the next writer of the slot

The host waits only when all staging buffers are in use, and before a buffer that was copied out is pushed.
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
    """Slots in the memory of a GPU. See `ExpertSlots` for the methods."""

    def __init__(self, layout: Layout, num_slots: int, device: torch.device) -> None:
        # "cuda" is the device that is current in this thread. It need not be current in the threads that fetch and push.
        self._device = device if device.index is not None else torch.device("cuda", torch.cuda.current_device())
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

    def enter_thread(self) -> None:
        """Makes the slots' GPU the thread's current one. A new thread begins with GPU 0, whatever its parent used."""
        torch.cuda.set_device(self._device)

    def landing(self, slot: int, num_bytes: int) -> memoryview:
        """A pinned staging buffer. When a broken fetch is started anew, the slot keeps its buffer."""
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
        """Starts the copy to the slot. It runs after the slot's last use."""
        with self._lock:
            buffer = self._landing.pop(slot)
            with torch.cuda.stream(self._copies):
                if slot in self._used:
                    self._copies.wait_event(self._used.pop(slot))
                self._rows[slot, :num_bytes].copy_(buffer[:num_bytes], non_blocking=True)
            self._copied_in[slot] = copied = self._copies.record_event()
            self._staging.append((buffer, copied))

    def abandon(self, slot: int) -> None:
        """Gives the staging buffer back."""
        with self._lock:
            buffer = self._landing.pop(slot, None)
            if buffer is not None:
                self._staging.append((buffer, None))

    def acquire(self, slots: Sequence[int], *, writing: bool) -> None:
        """Makes the compute stream wait for copies into the slots, and before writing also for copies out of them."""
        compute = torch.cuda.current_stream(self._device)
        for slot in slots:
            if slot in self._copied_in:
                compute.wait_event(self._copied_in[slot])
            if writing and slot in self._copied_out:
                compute.wait_event(self._copied_out.pop(slot))

    def release(self, slots: Sequence[int]) -> None:
        """Records the compute stream's last use of the slots."""
        used = torch.cuda.current_stream(self._device).record_event()
        self._used.update((slot, used) for slot in slots)

    def copy_out(self, slot: int, buffer: Tensor) -> CopyOut:
        """Starts the copy to pinned memory. It runs after the slot's last use."""
        with torch.cuda.stream(self._copies):
            if slot in self._used:
                self._copies.wait_event(self._used[slot])
            buffer.copy_(self._rows[slot], non_blocking=True)
        copied: torch.cuda.Event = self._copies.record_event()
        self._copied_out[slot] = copied
        return copied

    def host_buffer(self) -> Tensor:
        """A new buffer in pinned memory."""
        # Pinned memory is allocated through the current GPU, and opens a context there (some hundred MB) if there is none yet.
        with torch.cuda.device(self._device):
            return torch.empty(self._rows.shape[1], dtype=torch.uint8, pin_memory=True)

    def close(self) -> None:
        """Waits for the copy stream: torch's allocator does not know that it uses the slots."""
        self._copies.synchronize()
