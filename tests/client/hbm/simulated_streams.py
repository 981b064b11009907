"""`SimulatedCuda`: streams and events on the CPU, which run queued work as late and in as bad an order as CUDA's rules allow.

    cuda = SimulatedCuda(seed)                                # in place of `cuda_slots.Cuda`
    slots = CudaSlots(layout, 4, torch.device("cpu"), cuda)
    cuda.launch(lambda: ...)                                  # a kernel on the current stream
    cuda.finish()                                             # runs what is left

A queued operation runs when everything before it on its stream has run, and, if it waits for an event, when that event has been reached.
Nothing else orders two operations. A seeded scheduler runs some operations between the host's calls; all others stay queued until the host
synchronises, which runs exactly what must have run. A copy is two operations, one for each half, so that two copies that are not ordered
tear each other. A wait that is missing in the code under test shows as wrong bytes in some schedule.

`remove` makes one call of the code under test do nothing: a wait, a record, a synchronisation or a query, named by file and line.
"""

from __future__ import annotations

import ast
import random
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import torch
from torch import Tensor

from ooc_moe_client.hbm.slots import allocate

ORDERING = ("wait_event", "wait_stream", "record_event", "synchronize", "query")


@dataclass(frozen=True)
class Site:
    """One call in the code under test that orders operations."""

    file: str
    line: int
    function: str
    method: str

    def __str__(self) -> str:
        return f"{Path(self.file).stem}.{self.function}:{self.line}:{self.method}"


def sites(module: ModuleType) -> list[Site]:
    """All calls of the module that order operations."""
    tree = ast.parse(Path(module.__file__).read_text())
    found = [
        Site(module.__file__, node.lineno, function.name, node.func.attr)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ORDERING
    ]
    assert len({site.line for site in found}) == len(found), "two such calls on one line cannot be told apart"
    return found


class SimulatedEvent:
    """A place on a stream. `done` says whether the stream has come there; an event that was never recorded is always done."""

    def __init__(self, cuda: SimulatedCuda, stream: SimulatedStream | None = None) -> None:
        self._cuda, self.stream, self.done = cuda, stream, stream is None

    def query(self) -> bool:
        with self._cuda.calling(sys._getframe(1)) as is_removed:
            return is_removed or self.done

    def synchronize(self) -> None:
        with self._cuda.calling(sys._getframe(1)) as is_removed:
            if not is_removed:
                self._cuda.check_no_lock_is_held("synchronize")
                self._cuda.reach(self)


@dataclass(eq=False)
class _Operation:
    """One entry of a stream's queue. `after` is what it waits for, `reaches` the event that it completes."""

    run: Callable[[], object] | None = None
    after: SimulatedEvent | None = None
    reaches: SimulatedEvent | None = None


class SimulatedStream:
    """A queue of operations, which run in order."""

    def __init__(self, cuda: SimulatedCuda, name: str) -> None:
        self._cuda, self._name = cuda, name
        self.queue: deque[_Operation] = deque()

    def __repr__(self) -> str:
        return f"<simulated stream {self._name}>"

    def wait_event(self, event: SimulatedEvent) -> None:
        with self._cuda.calling(sys._getframe(1)) as is_removed:
            if not is_removed:
                self.queue.append(_Operation(after=event))

    def wait_stream(self, stream: SimulatedStream) -> None:
        with self._cuda.calling(sys._getframe(1)) as is_removed:
            if not is_removed:
                self.queue.append(_Operation(after=stream.mark()))

    def record_event(self) -> SimulatedEvent:
        with self._cuda.calling(sys._getframe(1)) as is_removed:
            return SimulatedEvent(self._cuda) if is_removed else self.mark()

    def synchronize(self) -> None:
        with self._cuda.calling(sys._getframe(1)) as is_removed:
            if not is_removed:
                self._cuda.check_no_lock_is_held("synchronize")
                self._cuda.reach(self.mark())

    def mark(self) -> SimulatedEvent:
        """An event at the present end of the queue."""
        event = SimulatedEvent(self._cuda, self)
        self.queue.append(_Operation(reaches=event))
        return event


class SimulatedCuda:
    """See the module. May be called from several threads, each of which has its own current stream, as in CUDA.

    Args:
        seed: chooses what runs when.
        eagerness: the probability that the scheduler runs one more operation at a call of the host. None: the seed chooses it.
    """

    def __init__(self, seed: int, *, eagerness: float | None = None) -> None:
        self._random = random.Random(seed)
        self._eagerness = self._random.choice((0.0, 0.2, 0.6, 0.9)) if eagerness is None else eagerness
        self._lock = threading.RLock()
        self._threads = threading.local()
        self._streams: list[SimulatedStream] = []
        self._default = self.new_stream()
        self._pinned: list[Tensor] = []
        self._removed: Site | None = None
        self.locks: list[Any] = []  # while a thread holds one of these (RLock or Condition), it may neither synchronise nor allocate
        self.num_reached_removed = 0  # how often the removed call was made

    def enter_thread(self) -> None:
        """There is one device only."""

    def remove(self, site: Site) -> None:
        """From now on, this call does nothing."""
        self._removed = site

    # What `cuda_slots.Cuda` has

    def zeros(self, num_slots: int, slot_bytes: int) -> Tensor:
        rows = allocate(num_slots, slot_bytes, torch.device("cpu"))
        rows.fill_(0xA5)
        self.launch(lambda: rows.fill_(0))
        return rows

    def pinned(self, num_bytes: int) -> Tensor:
        with self._lock:
            self.check_no_lock_is_held("pinned allocation")
            self._pinned.append(torch.full((num_bytes,), 0x5A, dtype=torch.uint8))
            return self._pinned[-1]

    def new_stream(self) -> SimulatedStream:
        stream = SimulatedStream(self, str(len(self._streams)))
        self._streams.append(stream)
        return stream

    def current_stream(self) -> SimulatedStream:
        return getattr(self._threads, "stream", self._default)

    def copy(self, target: Tensor, source: Tensor, stream: SimulatedStream) -> None:
        with self._lock:
            assert target.shape == source.shape
            assert any(self._is_pinned(side) for side in (target, source)), "a copy from or to pageable memory makes the host wait"
            self._run_some()
            half = len(target) // 2
            for part in (slice(0, half), slice(half, None)):
                stream.queue.append(_Operation(run=lambda part=part: target[part].copy_(source[part])))

    # What a test does besides

    @contextmanager
    def on(self, stream: SimulatedStream) -> Iterator[None]:
        """Makes a stream the calling thread's current one, as torch.cuda.stream does."""
        previous, self._threads.stream = self.current_stream(), stream
        try:
            yield
        finally:
            self._threads.stream = previous

    def launch(self, kernel: Callable[[], object]) -> None:
        """Queues a computation on the current stream."""
        with self._lock:
            self._run_some()
            self.current_stream().queue.append(_Operation(run=kernel))

    def finish(self) -> None:
        """Runs everything, in an order that the seed chooses."""
        with self._lock:
            while ready := self._ready():
                self._run_first(self._random.choice(ready))
            assert not any(stream.queue for stream in self._streams), "operations wait for each other in a circle"

    # For streams and events

    @contextmanager
    def calling(self, frame: FrameType) -> Iterator[bool]:
        """A call of the host from this frame: lets some operations run first. Binds whether the call was removed."""
        with self._lock:
            self._run_some()
            site = self._removed
            is_removed = site is not None and frame.f_lineno == site.line and frame.f_code.co_filename == site.file
            self.num_reached_removed += is_removed
            yield is_removed

    def reach(self, event: SimulatedEvent) -> None:
        """Runs exactly what must have run for the event."""
        while not event.done:
            assert event.stream is not None
            first = event.stream.queue[0]
            if first.after is not None:
                self.reach(first.after)
            self._run_first(event.stream)

    def check_no_lock_is_held(self, what: str) -> None:
        held = [lock for lock in self.locks if lock._is_owned()]
        assert not held, f"{what} while {held} is held"

    def _is_pinned(self, tensor: Tensor) -> bool:
        return any(buffer.data_ptr() <= tensor.data_ptr() < buffer.data_ptr() + buffer.nbytes for buffer in self._pinned)

    def _run_some(self) -> None:
        while self._random.random() < self._eagerness and (ready := self._ready()):
            self._run_first(self._random.choice(ready))

    def _ready(self) -> list[SimulatedStream]:
        return [stream for stream in self._streams if stream.queue and (stream.queue[0].after is None or stream.queue[0].after.done)]

    def _run_first(self, stream: SimulatedStream) -> None:
        operation = stream.queue.popleft()
        if operation.run is not None:
            operation.run()
        if operation.reaches is not None:
            operation.reaches.done = True
