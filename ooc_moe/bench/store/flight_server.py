"""The Arrow Flight server of the benchmark. Runs in a process of its own (child.py); needs pyarrow."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from typing import Any

import pyarrow
import pyarrow.flight
import xxhash


def table(memory: memoryview | mmap.mmap, record_bytes: int) -> Any:
    """The records as a table with a batch each, without a copy."""
    view = memoryview(memory)
    batches = []
    for start in range(0, len(view), record_bytes):
        buffer = pyarrow.py_buffer(view[start : start + record_bytes])
        array = pyarrow.Array.from_buffers(pyarrow.uint8(), record_bytes, [None, buffer])
        batches.append(pyarrow.record_batch([array], names=["record"]))
    return pyarrow.Table.from_batches(batches)


def bodies(received: Any) -> list[memoryview]:
    """The records of a received table."""
    return [memoryview(batch.column(0).buffers()[1])[: batch.num_rows] for batch in received.to_batches()]


class Server(pyarrow.flight.FlightServerBase):  # type: ignore[misc]
    """DoGet answers the table, DoPut takes one, the action "digests" tells what it took."""

    def __init__(self, served: Any) -> None:
        super().__init__("grpc://127.0.0.1:0")
        self._served = served
        self._taken: Any = None

    def do_get(self, context: Any, ticket: Any) -> Any:
        """All records."""
        return pyarrow.flight.RecordBatchStream(self._served)

    def do_put(self, context: Any, descriptor: Any, reader: Any, writer: Any) -> None:
        """Holds what came in memory, until the next comes."""
        self._taken = None
        self._taken = reader.read_all()

    def do_action(self, context: Any, action: Any) -> list[bytes]:
        """The xxh3 of each record that was put."""
        return [str(xxhash.xxh3_64_intdigest(body)).encode() for body in bodies(self._taken)]


def serve(memory: mmap.mmap, record_bytes: int, ready: Callable[[int], None]) -> None:
    """Serves until it is ended; says its port when ready."""
    server = Server(table(memory, record_bytes))
    ready(server.port)
    server.serve()
