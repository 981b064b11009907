"""The Arrow Flight server that the store benchmark compares our daemon with. Needs pyarrow.

peers_memory.py runs it as a process: python -m ooc_moe.bench.store.flight_server FD NUM_BYTES RECORD_BYTES
"""

from __future__ import annotations

import mmap
from typing import Any

import pyarrow
import pyarrow.flight
import xxhash

from ooc_moe.bench.child_process import report_ready, run_as_child
from ooc_moe.bench.store.records import map_source


def record_table(memory: memoryview | mmap.mmap, record_bytes: int) -> Any:
    """Wraps the records in `memory` as a pyarrow table, without a copy. Each record becomes one batch of the table."""
    view = memoryview(memory)
    batches = []
    for start in range(0, len(view), record_bytes):
        buffer = pyarrow.py_buffer(view[start : start + record_bytes])
        array = pyarrow.Array.from_buffers(pyarrow.uint8(), record_bytes, [None, buffer])
        batches.append(pyarrow.record_batch([array], names=["record"]))
    return pyarrow.Table.from_batches(batches)


def record_bodies(received: Any) -> list[memoryview]:
    """Returns the bytes of each record of a table that was received over Flight, without a copy."""
    return [memoryview(batch.column(0).buffers()[1])[: batch.num_rows] for batch in received.to_batches()]


class Server(pyarrow.flight.FlightServerBase):  # type: ignore[misc]
    """A Flight server that sends the records as a table (DoGet) and receives tables (DoPut).

    It keeps the last received table in memory. The action "digests" returns the checksums of that table's records.
    """

    def __init__(self, served: Any) -> None:
        super().__init__("grpc://127.0.0.1:0")
        self._served = served
        self._received: Any = None

    def do_get(self, context: Any, ticket: Any) -> Any:
        """Sends the table of all records."""
        return pyarrow.flight.RecordBatchStream(self._served)

    def do_put(self, context: Any, descriptor: Any, reader: Any, writer: Any) -> None:
        """Receives a table and keeps it in memory until the next one arrives."""
        self._received = None
        self._received = reader.read_all()

    def do_action(self, context: Any, action: Any) -> list[bytes]:
        """Returns the xxh3 checksum of each record of the last received table, whatever the action's name is."""
        return [str(xxhash.xxh3_64_intdigest(body)).encode() for body in record_bodies(self._received)]


def serve(fd: str, num_bytes: str, record_bytes: str) -> None:
    """Serves the records in the shared memory `fd` until the process is ended; reports its port to the parent when it listens.

    The arguments come from the command line, as text.
    """
    server = Server(record_table(map_source(fd, num_bytes), int(record_bytes)))
    report_ready(server.port)
    server.serve()


if __name__ == "__main__":
    run_as_child(serve)
