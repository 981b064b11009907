"""`WriteBack`: the thread that pushes changed experts to the store, and the buffers that hold them on the way.

    dirty resident --copy out--> PendingWrite in a host buffer --push--> acknowledged: clean, unless it was updated again

There is at most one `PendingWrite` per expert, so two pushes of one expert never overtake each other. While it exists, a demand for the
evicted expert is served from its buffer and not from the store, which has an older version. When a push fails after its expert was
evicted, the buffer is kept, because it is the only copy.

A slot is not copied out while the optimizer writes it (`Resident.updating`), and the optimizer waits while a slot is copied out
(`Resident.copying`). The lock is released during the copy.

A push is bounded in experts and bytes, so that it delays a fetch only a little. While the training thread waits for a fetch no push
begins, unless the fetch waits for room that a push would free.
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
    """A copy of one expert's bytes that the store has not acknowledged."""

    expert: int
    base_version: int
    generation: int
    buffer: Tensor  # (body_bytes,) uint8, on the host
    copied: CopyOut | None = None  # the copy to the buffer; None until it has begun
    queued: bool = False  # it is to be pushed, and the push has not begun
    error: Exception | None = None  # why the last push failed; only for an expert that was evicted


class WriteBack:
    """Pushes dirty experts in the background. Every method but `join` needs the cache's lock."""

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
        """Waits for the end of the thread, once `shared.closed` is set."""
        self._thread.join()

    @property
    def busy(self) -> bool:
        """Whether a write is queued or being pushed. Failed ones do not count."""
        return any(write.error is None for write in self._pending.values())

    @property
    def idle(self) -> bool:
        """Whether no write is pending, neither in flight nor failed."""
        return not self._pending

    def pending(self, expert: int) -> PendingWrite | None:
        """The write of this expert that the store has not acknowledged."""
        return self._pending.get(expert)

    def failed(self) -> Exception | None:
        """Why an evicted expert could not be written; None when there is no such expert."""
        return next((write.error for write in self._pending.values() if write.error is not None), None)

    @property
    def has_requests(self) -> bool:
        """Whether a resident is to be written, now or when its update is over."""
        return bool(self._requested)

    def request(self, experts: Iterable[int]) -> None:
        """Asks for those of these experts that are resident and dirty to be written soon."""
        for expert in experts:
            resident = self._shared.table.residents.get(expert)
            if resident is not None and resident.dirty and not self._is_leaving(resident):
                self._requested[expert] = None
        self._shared.changed.notify_all()

    def retry(self) -> None:
        """Queues again the writes of evicted experts that failed."""
        for write in self._pending.values():
            if write.error is not None:
                write.queued, write.error = True, None
        self._shared.changed.notify_all()

    def make_room(self, may_leave: Callable[[Resident], bool]) -> bool:
        """Evicts the next victim that `may_leave` allows. A dirty victim is first only copied to a buffer, with the lock released.

        Returns:
            True: something changed, and the caller is to look again. Either a slot is free, or a victim was saved.
            False: nothing can be evicted now.
        """
        for resident in self._shared.table.evictable():
            if not may_leave(resident):
                continue
            if not resident.dirty or self._is_leaving(resident):
                self._shared.table.evict(resident)
                return True
            if (buffer := self._buffer_for(resident.expert)) is not None:
                self._copy_out(resident, buffer).queued = True
                self.clean_next_victims()
                return True
        return False

    @property
    def next_victim_is_dirty(self) -> bool:
        """Whether the next victim must be saved before it can be evicted."""
        resident = next(iter(self._shared.table.evictable()), None)
        return resident is not None and resident.dirty and not self._is_leaving(resident)

    def bring_back(self, expert: int) -> Resident:
        """Copies an evicted expert, whose write is pending, from its buffer to a free slot. If the write failed, raises why."""
        write = self._pending[expert]
        if write.error is not None:
            raise write.error
        assert write.copied is not None
        write.copied.synchronize()
        resident = self._shared.table.insert(expert, Sections.ALL)
        self._shared.slots.landing(resident.slot, resident.num_bytes)[:] = write.buffer.numpy().data
        self._shared.slots.landed(resident.slot, resident.num_bytes)
        resident.state, resident.version, resident.generation = LoadState.READY, write.base_version, write.generation
        self._shared.table.set_dirty(resident, True)
        self._shared.counters.count_fetched("write-back")
        return resident

    def clean_next_victims(self) -> None:
        """Asks for the next dirty victims to be written before their slots are needed, because one had to be saved while a fetch waited."""
        num_next = max(1, self._shared.table.capacity // 4)
        dirty = [resident.expert for resident in self._shared.table.evictable() if resident.dirty and not self._is_leaving(resident)]
        self.request(dirty[:num_next])

    def _is_leaving(self, resident: Resident) -> bool:
        """Whether the resident's newest change is in a pending write."""
        write = self._pending.get(resident.expert)
        return write is not None and write.generation == resident.generation

    def _copy_out(self, resident: Resident, buffer: Tensor) -> PendingWrite:
        """Copies a dirty expert to a buffer. The lock is held on entry and exit, and released to copy. An error leaves the expert dirty."""
        write = self._pending[resident.expert] = PendingWrite(
            expert=resident.expert, base_version=resident.version, generation=resident.generation, buffer=buffer
        )
        self._requested.pop(resident.expert, None)
        resident.copying = True
        self._shared.changed.release()
        try:
            write.copied = self._shared.slots.copy_out(resident.slot, buffer)
        finally:
            self._shared.changed.acquire()
            resident.copying = False
            if write.copied is None:
                self._free(write)
            self._shared.changed.notify_all()
        return write

    def _free(self, write: PendingWrite) -> None:
        """Ends a pending write, and keeps its buffer for the next one."""
        del self._pending[write.expert]
        self._spare.append(write.buffer)

    def _buffer_for(self, expert: int) -> Tensor | None:
        """A spare buffer, or the expert's own: an older change whose push has not begun may be overwritten. None when neither is left."""
        write = self._pending.get(expert)
        if write is None:
            return self._spare_buffer()
        return write.buffer if write.queued else None

    def _spare_buffer(self) -> Tensor | None:
        if self._spare:
            return self._spare.pop()
        if self._num_buffers == BUFFERS_MAX:
            return None
        buffer = self._shared.slots.host_buffer()
        self._num_buffers += 1
        return buffer

    def _try_next(self) -> PendingWrite | None:
        """The next write to push: evicted experts first, then requested residents, which this copies out.

        None when there is none, and while the training thread waits for a fetch, which a push would slow down.
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
                if (buffer := self._spare_buffer()) is None:
                    return None
                self._copy_out(resident, buffer).queued = True
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
        """Waits for writes to push; empty when the cache is closed.

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
        """Pushes a batch; returns one outcome per expert.

        An error of the whole call is the outcome of each expert. When the call is refused for one bad body, each expert is pushed alone.
        """
        try:
            for write in batch:
                assert write.copied is not None
                write.copied.synchronize()
            pushes = [Push(expert=item.expert, base_version=item.base_version, body=item.buffer.numpy()) for item in batch]
            return self._shared.store.push(self._shared.bank, pushes)
        except InvalidRequest as error:
            if len(batch) == 1:
                return [error]
            return [outcome for write in batch for outcome in self._push([write])]
        except Exception as error:
            log.info("bank %s: pushing %d experts failed: %s", self._shared.bank, len(batch), error)
            return [error] * len(batch)

    def _finish(self, write: PendingWrite, outcome: int | Exception) -> None:
        """Takes in the outcome of a push."""
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
