"""`CudaSlots`: the cache's slots on a GPU, and the copies between these slots and host memory.

Copies to the GPU run on one stream, copies to the host on another. All these copies use page-locked ("pinned") host buffers. Events order
the copies and the computation, so that the host rarely has to wait:

    fetch:     staging buffer --in stream, after the slot's last use and copy out--> slot --event--> compute stream
    copy out:  slot --out stream, after the slot's last use or copy in--> pinned buffer --event--> host, and the next writer of the slot
    copy back: pinned buffer --in stream, after the copy out that fills it--> slot --event--> compute stream, and the buffer's next writer

The host waits in two cases only: when all staging buffers are in use, and before it pushes a buffer that was copied out. It holds no lock
then, nor when it allocates pinned memory, for which the driver may wait for the whole GPU.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from ooc_moe_client.hbm.slots import CopyOut, allocate, strided_views
from ooc_moe_wire.errors import InvalidRequest
from ooc_moe_wire.layout import Layout

# Two fetches (demand and prefetch), each with one expert arriving and one being copied.
STAGING_BUFFERS = 4


class Cuda:
    """The calls of torch.cuda that `CudaSlots` makes, for one device. Tests pass simulated streams instead."""

    def __init__(self, device: torch.device) -> None:
        # "cuda" is the device that is current in this thread. It need not be current in the threads that fetch and push.
        self._device = device if device.index is not None else torch.device("cuda", torch.cuda.current_device())

    def enter_thread(self) -> None:
        """Makes this device the calling thread's current device."""
        torch.cuda.set_device(self._device)

    def zeros(self, num_slots: int, slot_bytes: int) -> Tensor:
        """Allocates the memory of the slots. The device sets it to zero on the current stream."""
        return allocate(num_slots, slot_bytes, self._device)

    def pinned(self, num_bytes: int) -> Tensor:
        """Allocates page-locked host memory."""
        # It is allocated through the current GPU, and opens a context there (some hundred MB) if there is none yet.
        with torch.cuda.device(self._device):
            return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def new_stream(self) -> torch.cuda.Stream:
        """Makes a new stream."""
        return torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

    def current_stream(self) -> torch.cuda.Stream:
        """Returns the stream on which the calling thread queues its computation."""
        return torch.cuda.current_stream(self._device)

    def copy(self, target: Tensor, source: Tensor, stream: torch.cuda.Stream) -> None:
        """Queues a copy on `stream`, and returns at once."""
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)


class CudaSlots:
    """The cache's slots in the memory of a GPU. `ExpertSlots` documents the methods.

    The compute stream is the stream that is current when the slots are made. All computation on the slots must be queued on it.
    """

    def __init__(self, layout: Layout, num_slots: int, device: torch.device, cuda: Cuda | None = None) -> None:
        self._cuda = Cuda(device) if cuda is None else cuda
        self._rows = self._cuda.zeros(num_slots, layout.body_bytes)
        self.views = strided_views(layout, self._rows)
        self._compute = self._cuda.current_stream()
        self._in = self._cuda.new_stream()  # copies from the host to slots
        self._out = self._cuda.new_stream()  # copies from slots to the host
        self._in.wait_stream(self._compute)
        # By slot: the last copy in or the last use by the compute stream, whichever came later. Each of the two waits for the one before.
        self._last: dict[int, torch.cuda.Event] = {}
        self._copied_out: dict[int, torch.cuda.Event] = {}  # by slot: the last copy out that no later writer of the slot waits for yet
        self._buffer_copies: dict[int, torch.cuda.Event] = {}  # by address of a buffer: the last copy to it or from it
        self._lock = threading.Lock()  # guards the staging buffers
        self._staging: list[tuple[Tensor, torch.cuda.Event | None]] = []  # unused buffers, and the copy that still reads each
        self._num_staging = 0
        self._landing: dict[int, Tensor] = {}  # by slot

    def enter_thread(self) -> None:
        """Makes the slots' GPU the calling thread's current device. A new thread begins with GPU 0, whatever its parent used."""
        self._cuda.enter_thread()

    def landing(self, slot: int, num_bytes: int) -> memoryview:
        """Returns a page-locked staging buffer, into which a fetch writes the bytes for the slot.

        When the connection breaks and the fetch is repeated, the slot gets the same buffer again.
        """
        with self._lock:
            buffer = self._landing.get(slot)
        if buffer is None:
            buffer = self._free_staging()
            with self._lock:
                self._landing[slot] = buffer
        return buffer.numpy()[:num_bytes].data

    def _free_staging(self) -> Tensor:
        """Returns a staging buffer that no copy reads any more. The lock is free while this waits for a copy, or allocates a buffer."""
        with self._lock:
            if (buffer := self._unread_staging()) is not None:
                return buffer
            if is_new := self._num_staging < STAGING_BUFFERS or not self._staging:
                self._num_staging += 1
            else:
                buffer, copied = self._staging.pop(0)
        if is_new:
            return self.host_buffer()
        assert buffer is not None
        assert copied is not None
        copied.synchronize()
        return buffer

    def _unread_staging(self) -> Tensor | None:
        for index, (buffer, copied) in enumerate(self._staging):
            if copied is None or copied.query():  # type: ignore[no-untyped-call]
                del self._staging[index]
                return buffer
        return None

    def landed(self, slot: int, num_bytes: int) -> None:
        """Starts the copy from the staging buffer to the slot. It runs after the slot's last use, and after copies out of the slot."""
        with self._lock:
            buffer = self._landing.pop(slot)
        copied = self._copy_in(slot, buffer, num_bytes)
        with self._lock:
            self._staging.append((buffer, copied))

    def _copy_in(self, slot: int, buffer: Tensor, num_bytes: int) -> torch.cuda.Event:
        if slot in self._last:
            self._in.wait_event(self._last[slot])
        if slot in self._copied_out:
            self._in.wait_event(self._copied_out.pop(slot))
        self._cuda.copy(self._rows[slot, :num_bytes], buffer[:num_bytes], self._in)
        copied: torch.cuda.Event = self._in.record_event()
        self._last[slot] = copied
        return copied

    def abandon(self, slot: int) -> None:
        """Gives back the slot's staging buffer unused, because its fetch failed."""
        with self._lock:
            buffer = self._landing.pop(slot, None)
            if buffer is not None:
                self._staging.append((buffer, None))

    def check_stream(self) -> None:
        """Raises InvalidRequest unless the calling thread's current stream is the compute stream."""
        current = self._cuda.current_stream()
        if current != self._compute:
            raise InvalidRequest(
                f"current stream: {current} is not the compute stream of this cache, {self._compute}, which was current when the cache"
                " was made; a cache is read and updated on one stream"
            )

    def acquire(self, slots: Sequence[int], *, writing: bool) -> None:
        """Makes the compute stream wait for unfinished copies into the slots, and, with `writing`, for copies out of the slots too."""
        for slot in slots:
            if slot in self._last:
                self._compute.wait_event(self._last[slot])
            if writing and slot in self._copied_out:
                self._compute.wait_event(self._copied_out.pop(slot))

    def release(self, slots: Sequence[int]) -> None:
        """Makes later copies into and out of these slots wait for the work that is queued on the compute stream until now."""
        used = self._compute.record_event()
        self._last.update((slot, used) for slot in slots)

    def copy_out(self, slot: int, buffer: Tensor) -> CopyOut:
        """Starts the copy from the slot to the host buffer. It runs after the slot's last use and earlier copies from that buffer."""
        if slot in self._last:
            self._out.wait_event(self._last[slot])
        if buffer.data_ptr() in self._buffer_copies:
            self._out.wait_event(self._buffer_copies[buffer.data_ptr()])
        self._cuda.copy(buffer, self._rows[slot], self._out)
        copied: torch.cuda.Event = self._out.record_event()
        self._copied_out[slot] = self._buffer_copies[buffer.data_ptr()] = copied
        return copied

    def copy_back(self, slot: int, buffer: Tensor) -> None:
        """Starts the copy from the host buffer to the slot. It runs after `copy_out` has filled the buffer; the host does not wait."""
        self._in.wait_event(self._buffer_copies[buffer.data_ptr()])
        self._buffer_copies[buffer.data_ptr()] = self._copy_in(slot, buffer, len(buffer))

    def host_buffer(self) -> Tensor:
        """Allocates a page-locked host buffer for one slot's bytes."""
        return self._cuda.pinned(self._rows.shape[1])

    def close(self) -> None:
        """Waits until all copies are done, so that the slots may be freed. torch's allocator does not know that the copies use them."""
        self._in.synchronize()
        self._out.synchronize()
