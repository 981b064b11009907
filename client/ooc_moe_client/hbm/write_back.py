"""`WriteBack`: the thread that pushes changed experts to the store, and the host buffers that hold the experts' bytes meanwhile.

    dirty resident --copy out--> PendingWrite in a host buffer --push--> acknowledged: clean, unless it was updated again

There is at most one `PendingWrite` per expert, so two pushes of one expert never overtake each other. If an expert is evicted and asked for
again while its `PendingWrite` exists, its bytes come from the buffer, because the store has an older version. When the push of an evicted
expert fails, the buffer is kept: it has the only copy of the new bytes.

A slot is not copied out while the optimizer writes it (`Resident.updating`), and the optimizer waits while a slot is copied out
(`Resident.copying`). The lock is released during the copy.

A push has a limited number of experts and bytes, so that it delays a fetch only a little. While the training thread waits for a fetch no
push begins, unless the fetch waits for a slot or buffer that a push would free.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor

from ooc_moe_client.hbm.shared_state import SharedState
from ooc_moe_client.hbm.slots import CopyOut
from ooc_moe_client.hbm.table import LoadState, Resident
from ooc_moe_client.store import Push, Sections
from ooc_moe_wire.errors import InvalidRequest

log = logging.getLogger(__name__)

BATCH_EXPERTS_MAX = 8  # of one push call, which the daemon commits as one group
BATCH_BYTES_MAX = 32 << 20  # of one push call; an expert that is larger goes alone
BUFFERS_MAX = 2 * BATCH_EXPERTS_MAX  # one batch in flight, one being copied


@dataclass(slots=True, eq=False)
class PendingWrite:
    """A copy of one expert's changed bytes in a host buffer, kept until the store acknowledges their push."""

    expert: int
    base_version: int
    generation: int
    buffer: Tensor | None  # (body_bytes,) uint8, on the host; None until it is allocated
    copied: CopyOut | None = None  # the copy to the buffer; None until it has begun
    queued: bool = False  # it is to be pushed, and the push has not begun
    error: Exception | None = None  # why the last push failed; only for an expert that was evicted

    def to_push(self) -> Push:
        """Makes the `Push` (the argument of `ExpertStore.push`) of this write. The copy to the buffer must be done."""
        assert self.buffer is not None
        return Push(expert=self.expert, base_version=self.base_version, body=self.buffer.numpy())


class WriteBack:
    """Pushes dirty (changed) experts to the store in the background. Callers of every method but `join` hold the cache's lock."""

    def __init__(self, shared: SharedState) -> None:
        self._shared = shared
        self._pending: dict[int, PendingWrite] = {}
        self._requested: dict[int, None] = {}  # dirty residents that are to be copied out, in this order
        self._spare: list[Tensor] = []
        self._num_buffers = 0
        self._batch_max = max(1, min(BATCH_EXPERTS_MAX, BATCH_BYTES_MAX // shared.layout.body_bytes))
        self._thread = threading.Thread(target=self._run, name=f"write-back {shared.bank}", daemon=True)
        self._thread.start()

    def join(self) -> None:
        """Waits for the thread to end. Call this after `shared.closed` was set, which makes it end."""
        self._thread.join()

    @property
    def busy(self) -> bool:
        """Whether a write is queued or being pushed. Writes whose push failed do not count."""
        return any(write.error is None for write in self._pending.values())

    @property
    def idle(self) -> bool:
        """Whether there is no pending write at all: none queued, none being pushed, and none whose push failed."""
        return not self._pending

    def pending(self, expert: int) -> PendingWrite | None:
        """The pending write of this expert, which the store has not acknowledged. None: there is none."""
        return self._pending.get(expert)

    def failed(self) -> Exception | None:
        """The error because of which an evicted expert could not be pushed. None: there is no such expert."""
        return next((write.error for write in self._pending.values() if write.error is not None), None)

    @property
    def has_requests(self) -> bool:
        """Whether an expert that `request` named is still to be copied out, now or when its update is over."""
        return bool(self._requested)

    def request(self, experts: Iterable[int]) -> None:
        """Queues experts to be pushed to the store soon. Experts that are not in a slot, or not dirty, are ignored."""
        for expert in experts:
            resident = self._shared.table.residents.get(expert)
            if resident is not None and resident.dirty and not self._is_leaving(resident):
                self._requested[expert] = None
        self._shared.changed.notify_all()

    def retry(self) -> None:
        """Queues all failed pushes of evicted experts again, so that they are tried once more."""
        for write in self._pending.values():
            if write.error is not None:
                write.queued, write.error = True, None
        self._shared.changed.notify_all()

    def make_room(self, may_leave: Callable[[Resident], bool]) -> bool:
        """Evicts one expert: the next in the order of eviction for which `may_leave` returns True.

        A dirty expert is not evicted at once, but only copied to a buffer, to be pushed; the next call can evict it. The lock is released
        during the copy.

        Returns:
            True: an expert was evicted, or copied to a buffer. The caller looks again whether a slot is free.
            False: nothing can be evicted now.
        """
        for resident in self._shared.table.evictable():
            if not may_leave(resident):
                continue
            if not resident.dirty or self._is_leaving(resident):
                self._shared.table.evict(resident)
                return True
            if self._has_buffer_for(resident.expert):
                self._copy_out(resident).queued = True
                self.clean_next_victims()
                return True
        return False

    @property
    def next_victim_is_dirty(self) -> bool:
        """Whether the next expert to be evicted has changes that must first be copied to a buffer."""
        resident = next(iter(self._shared.table.evictable()), None)
        return resident is not None and resident.dirty and not self._is_leaving(resident)

    def bring_back(self, expert: int) -> Resident:
        """Copies an evicted expert, whose push is pending, from its buffer to a free slot, and returns the expert's `Resident`.

        If the push failed, raises the push's error instead.
        """
        write = self._pending[expert]
        if write.error is not None:
            raise write.error
        assert write.buffer is not None
        resident = self._shared.table.insert(expert, Sections.ALL)
        self._shared.slots.copy_back(resident.slot, write.buffer)
        resident.state, resident.version, resident.generation = LoadState.READY, write.base_version, write.generation
        self._shared.table.set_dirty(resident, True)
        self._shared.counters.count_fetched("write-back")
        return resident

    def clean_next_victims(self) -> None:
        """Queues pushes of the dirty experts that will be evicted next, so that later fetches find clean experts to evict.

        Called when a fetch had to wait while a dirty expert was saved.
        """
        num_next = max(1, self._shared.table.capacity // 4)
        dirty = [resident.expert for resident in self._shared.table.evictable() if resident.dirty and not self._is_leaving(resident)]
        self.request(dirty[:num_next])

    def _is_leaving(self, resident: Resident) -> bool:
        """Whether the expert's newest changes are already in a pending write, so that its slot may be freed."""
        write = self._pending.get(resident.expert)
        return write is not None and write.generation == resident.generation

    def _copy_out(self, resident: Resident) -> PendingWrite:
        """Copies a dirty expert to a buffer, and returns its new pending write. After an error the expert stays dirty.

        `_has_buffer_for` must be true. The lock is held on entry and exit, and released to allocate a buffer and during the copy.
        """
        older = self._pending.get(resident.expert)
        buffer = older.buffer if older is not None else self._spare.pop() if self._spare else None
        self._num_buffers += buffer is None
        write = self._pending[resident.expert] = PendingWrite(
            expert=resident.expert, base_version=resident.version, generation=resident.generation, buffer=buffer
        )
        self._requested.pop(resident.expert, None)
        resident.copying = True
        self._shared.changed.release()
        try:
            if write.buffer is None:
                write.buffer = self._shared.slots.host_buffer()
            write.copied = self._shared.slots.copy_out(resident.slot, write.buffer)
        finally:
            self._shared.changed.acquire()
            resident.copying = False
            if write.copied is None:
                self._free(write)
            self._shared.changed.notify_all()
        return write

    def _free(self, write: PendingWrite) -> None:
        """Deletes a pending write, and keeps its buffer for another one."""
        del self._pending[write.expert]
        if write.buffer is None:  # Its allocation failed.
            self._num_buffers -= 1
        else:
            self._spare.append(write.buffer)

    def _has_buffer_for(self, expert: int) -> bool:
        """Whether the expert can be copied out: to a spare buffer, or to that of its own pending write, if the push of it has not begun.

        In the second case the older change in it is overwritten.
        """
        write = self._pending.get(expert)
        return self._has_spare_buffer if write is None else write.queued

    @property
    def _has_spare_buffer(self) -> bool:
        """Whether there is an unused buffer, or another one may be allocated."""
        return bool(self._spare) or self._num_buffers < BUFFERS_MAX

    def _try_next(self) -> PendingWrite | None:
        """Returns the next write to push: first those of evicted experts, then requested experts, which are copied out now.

        None when there is none, or while the training thread waits for a fetch, which a push would slow down.
        """
        if self._shared.fetching:
            return None
        for write in self._pending.values():
            if write.queued:
                write.queued = False
                return write
        for expert in list(self._requested):
            resident = self._shared.table.residents.get(expert)
            if resident is None or not resident.dirty:
                del self._requested[expert]
            elif resident.state is LoadState.READY and not resident.updating and expert not in self._pending:
                if not self._has_spare_buffer:
                    return None
                self._copy_out(resident).queued = True
                return self._try_next()
        return None

    # The thread

    def _run(self) -> None:
        self._shared.slots.enter_thread()
        while batch := self._next_batch():
            outcomes = self._push(batch)
            with self._shared.changed:
                for write, outcome in zip(batch, outcomes, strict=True):
                    self._finish(write, outcome)
                self._shared.changed.notify_all()

    def _next_batch(self) -> list[PendingWrite]:
        """Waits for pending writes, and returns them, to be pushed in one call. Empty when the cache is closed.

        The lock is taken anew for each expert, so that the training thread can take it in between.
        """
        batch: list[PendingWrite] = []
        while len(batch) < self._batch_max:
            with self._shared.changed:
                try:
                    following = self._try_next()
                except Exception as error:  # No buffer, or the copy failed: the experts stay dirty until the next request.
                    following = None
                    self._requested.clear()
                    self._shared.fail(error)
                if following is None and not batch:
                    if self._shared.closed:
                        return []
                    self._shared.changed.wait()
                    continue
            if following is None:
                break
            batch.append(following)
        return batch

    def _push(self, batch: list[PendingWrite]) -> list[int | Exception]:
        """Pushes a batch of experts to the store. Returns one outcome per expert: its new version, or an error.

        An error of the whole call becomes the outcome of each expert. When the call is refused because of one bad expert, each is pushed
        alone.
        """
        try:
            for write in batch:
                assert write.copied is not None
                write.copied.synchronize()
            pushes = [write.to_push() for write in batch]
            return self._shared.store.push(self._shared.bank, pushes)
        except InvalidRequest as error:
            if len(batch) == 1:
                return [error]
            return [outcome for write in batch for outcome in self._push([write])]
        except Exception as error:
            log.info("bank %s: pushing %d experts failed: %s", self._shared.bank, len(batch), error)
            return [error] * len(batch)

    def _finish(self, write: PendingWrite, outcome: int | Exception) -> None:
        """Updates the table, counters and pending writes after the push of one expert. A failed write of an evicted expert is kept."""
        resident = self._shared.table.residents.get(write.expert)
        if isinstance(outcome, Exception):
            self._shared.fail(outcome)
            if resident is None:
                write.error = outcome
                return
        else:
            self._shared.own_versions[write.expert] = outcome
            self._shared.counters.write_backs += 1
            self._shared.counters.bytes_out += self._shared.layout.body_bytes
            if resident is not None:
                resident.version = outcome
                self._shared.table.set_dirty(resident, resident.generation != write.generation)
        self._free(write)
