"""Write-back: the thread that brings changed experts to the store, and the buffers of those that had to leave their slots first.

An expert on its way is an `Outgoing`: a host copy and the version it started from. There is at most one per expert, so pushes of one expert
never overtake each other. While it exists the expert is not fetched again, but comes back from the buffer; when it fails after the expert
was evicted it stays, because its buffer is then the only copy. Nothing leaves a slot while the optimizer writes it (`Resident.updating`),
and the optimizer waits while it is copied out (`Resident.copying`); the lock is let go meanwhile.

A push is bounded in experts and in bytes: a demand is slowed by one at most, and while it is under way none begins, but where it waits for
room.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor

from ooc_moe_client.hbm.shared_state import Core
from ooc_moe_client.hbm.slots import CopyOut
from ooc_moe_client.hbm.table import Resident, State
from ooc_moe_client.store import Push, Sections
from ooc_moe_wire.errors import InvalidRequest

log = logging.getLogger(__name__)

BATCH_EXPERTS_MAX = 8  # in one push call: one group commit
BATCH_BYTES_MAX = 32 << 20  # likewise, but one expert at least
BUFFERS_MAX = 2 * BATCH_EXPERTS_MAX  # one batch in flight, one being copied


@dataclass(slots=True, eq=False)
class Outgoing:
    """One expert's bytes on their way to the store."""

    expert: int
    base_version: int
    generation: int
    buffer: Tensor  # (body_bytes,) uint8, on the host
    copied: CopyOut | None = None  # None until the copy has begun
    queued: bool = False  # to be pushed
    error: Exception | None = None  # why the last try was refused; only of an expert that was evicted


class WriteBack:
    """Pushes dirty experts behind the training thread. All but `join` needs the cache's lock."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._outgoing: dict[int, Outgoing] = {}
        self._wanted: dict[int, None] = {}  # dirty residents to be copied out, in order
        self._spare: list[Tensor] = []
        self._num_buffers = 0
        self._batch_max = max(1, min(BATCH_EXPERTS_MAX, BATCH_BYTES_MAX // core.layout.body_bytes))
        self._thread = threading.Thread(target=self._run, name=f"write-back {core.bank}", daemon=True)
        self._thread.start()

    def join(self) -> None:
        """Waits for the thread, after `core.closed` was set."""
        self._thread.join()

    @property
    def busy(self) -> bool:
        """Something is queued or being pushed (not counting what failed)."""
        return any(outgoing.error is None for outgoing in self._outgoing.values())

    @property
    def idle(self) -> bool:
        """Nothing is on its way, and nothing has failed."""
        return not self._outgoing

    def pending(self, expert: int) -> Outgoing | None:
        """The expert's bytes that the store has not acknowledged."""
        return self._outgoing.get(expert)

    def failed(self) -> Exception | None:
        """Why an evicted expert could not be written, if one could not."""
        return next((outgoing.error for outgoing in self._outgoing.values() if outgoing.error is not None), None)

    @property
    def waiting(self) -> bool:
        """A resident is to be written, perhaps as soon as its update is over."""
        return bool(self._wanted)

    def request(self, experts: Iterable[int]) -> None:
        """Asks for these residents, where they are dirty, to be written soon."""
        for expert in experts:
            resident = self._core.table.residents.get(expert)
            if resident is not None and resident.dirty and not self._is_leaving(resident):
                self._wanted[expert] = None
        self._core.changed.notify_all()

    def retry(self) -> None:
        """Tries once more what failed after it was evicted."""
        for outgoing in self._outgoing.values():
            if outgoing.error is not None:
                outgoing.queued, outgoing.error = True, None
        self._core.changed.notify_all()

    def make_room(self, may_leave: Callable[[Resident], bool]) -> bool:
        """Evicts the next to leave among those that are idle and `may_leave`; what is dirty is first copied to a buffer, without the lock.

        True: look again, a slot is free, or something was saved and others had the lock meanwhile. False: nobody can leave now.
        """
        for resident in self._core.table.idle():
            if not may_leave(resident):
                continue
            if not resident.dirty or self._is_leaving(resident):
                self._core.table.evict(resident)
                return True
            if (buffer := self._buffer_for(resident.expert)) is not None:
                self._copy_out(resident, buffer).queued = True
                self.clean_ahead()
                return True
        return False

    @property
    def must_save(self) -> bool:
        """Whether the next to leave must be copied first."""
        resident = next(iter(self._core.table.idle()), None)
        return resident is not None and resident.dirty and not self._is_leaving(resident)

    def bring_back(self, expert: int) -> Resident:
        """Gives an evicted expert that is still pending a free slot, filled from its buffer; its push goes on. Raises why that failed."""
        outgoing = self._outgoing[expert]
        if outgoing.error is not None:
            raise outgoing.error
        assert outgoing.copied is not None
        outgoing.copied.synchronize()
        resident = self._core.table.insert(expert, Sections.ALL)
        self._core.slab.landing(resident.slot, resident.num_bytes)[:] = outgoing.buffer.numpy().data
        self._core.slab.landed(resident.slot, resident.num_bytes)
        resident.state, resident.version, resident.generation = State.READY, outgoing.base_version, outgoing.generation
        self._core.table.mark(resident, dirty=True)
        self._core.counters.count_fetched("write-back")
        return resident

    def clean_ahead(self) -> None:
        """A dirty victim had to be saved while somebody waited: has the next ones written before they are needed."""
        ahead = max(1, self._core.table.capacity // 4)
        dirty = [resident.expert for resident in self._core.table.idle() if resident.dirty and not self._is_leaving(resident)]
        self.request(dirty[:ahead])

    def _is_leaving(self, resident: Resident) -> bool:
        """Its last change is on its way."""
        outgoing = self._outgoing.get(resident.expert)
        return outgoing is not None and outgoing.generation == resident.generation

    def _copy_out(self, resident: Resident, buffer: Tensor) -> Outgoing:
        """Enters and leaves with the lock, and lets go of it to copy. After an error the expert is as dirty as before."""
        outgoing = self._outgoing[resident.expert] = Outgoing(
            expert=resident.expert, base_version=resident.version, generation=resident.generation, buffer=buffer
        )
        self._wanted.pop(resident.expert, None)
        resident.copying = True
        self._core.changed.release()
        try:
            outgoing.copied = self._core.slab.copy_out(resident.slot, buffer)
        finally:
            self._core.changed.acquire()
            resident.copying = False
            if outgoing.copied is None:
                self._free(outgoing)
            self._core.changed.notify_all()
        return outgoing

    def _free(self, outgoing: Outgoing) -> None:
        """It is no longer on its way."""
        del self._outgoing[outgoing.expert]
        self._spare.append(outgoing.buffer)

    def _buffer_for(self, expert: int) -> Tensor | None:
        """One that holds nothing, or what was changed since: an older change whose push has not begun need not be pushed."""
        outgoing = self._outgoing.get(expert)
        if outgoing is None:
            return self._take_buffer()
        return outgoing.buffer if outgoing.queued else None

    def _take_buffer(self) -> Tensor | None:
        if self._spare:
            return self._spare.pop()
        if self._num_buffers == BUFFERS_MAX:
            return None
        buffer = self._core.slab.host_buffer()
        self._num_buffers += 1
        return buffer

    def _try_next(self) -> Outgoing | None:
        """The next expert to push: those without a slot first. None while the training thread waits for a fetch: it would be slowed."""
        if self._core.fetching:
            return None
        for outgoing in self._outgoing.values():
            if outgoing.queued:
                outgoing.queued = False
                return outgoing
        for expert in list(self._wanted):
            resident = self._core.table.residents.get(expert)
            if resident is None or not resident.dirty:
                del self._wanted[expert]
            elif resident.state is State.READY and not resident.updating and expert not in self._outgoing:
                if (buffer := self._take_buffer()) is None:
                    return None
                self._copy_out(resident, buffer).queued = True
                return self._try_next()
        return None

    # The thread

    def _run(self) -> None:
        while batch := self._next_batch():
            outcomes = self._push(batch)
            with self._core.changed:
                for outgoing, outcome in zip(batch, outcomes, strict=True):
                    self._settle(outgoing, outcome)
                self._core.changed.notify_all()

    def _next_batch(self) -> list[Outgoing]:
        """Waits for something to push. Takes the lock anew for each copy, so that the training thread gets in between. Empty at the end."""
        batch: list[Outgoing] = []
        while len(batch) < self._batch_max:
            with self._core.changed:
                try:
                    following = self._try_next()
                except Exception as error:  # A buffer or a copy failed: the experts stay dirty, until the next request.
                    following = None
                    self._wanted.clear()
                    self._core.fail(error)
                if following is None and not batch:
                    if self._core.closed:
                        return []
                    self._core.changed.wait()
                    continue
            if following is None:
                break
            batch.append(following)
        return batch

    def _push(self, batch: list[Outgoing]) -> list[int | Exception]:
        """One outcome per expert. An error of the whole call becomes everyone's; when one body spoils the call, each is tried alone."""
        try:
            for outgoing in batch:
                assert outgoing.copied is not None
                outgoing.copied.synchronize()
            pushes = [Push(expert=item.expert, base_version=item.base_version, body=item.buffer.numpy()) for item in batch]
            return self._core.store.push(self._core.bank, pushes)
        except InvalidRequest as error:
            if len(batch) == 1:
                return [error]
            return [outcome for outgoing in batch for outcome in self._push([outgoing])]
        except Exception as error:
            log.info("bank %s: pushing %d experts failed: %s", self._core.bank, len(batch), error)
            return [error] * len(batch)

    def _settle(self, outgoing: Outgoing, outcome: int | Exception) -> None:
        resident = self._core.table.residents.get(outgoing.expert)
        if isinstance(outcome, Exception):
            self._core.fail(outcome)
            if resident is None:
                outgoing.error = outcome
                return
        else:
            self._core.acknowledged[outgoing.expert] = outcome
            self._core.counters.write_backs += 1
            self._core.counters.bytes_out += self._core.layout.body_bytes
            if resident is not None:
                resident.version = outcome
                self._core.table.mark(resident, dirty=resident.generation != outgoing.generation)
        self._free(outgoing)
