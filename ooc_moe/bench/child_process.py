"""The other processes of the benchmark: one that makes the records, and one each that serves them (TCP, bare gRPC, Flight) or streams.

`child(role, ...)` starts one, waits for the line in which it says that it is ready, and ends it. Each holds the records by the file
descriptor that it inherits, so none makes a copy.

Run by the benchmark itself: python -m ooc_moe.bench.child_process ROLE ARGUMENTS
"""

from __future__ import annotations

import mmap
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from ooc_moe.session.daemon import stop_with_parent
from ooc_moe_wire.errors import Unavailable

STOP_TIMEOUT_S = 10.0


@contextmanager
def child(role: str, *arguments: str, pass_fds: Sequence[int] = ()) -> Iterator[str]:
    """A process in a role; yields what it said when it was ready.

    Raises:
        Unavailable: it ended before it was ready.
    """
    command = [sys.executable, "-m", "ooc_moe.bench.child_process", role, *arguments]
    # A session of its own: Ctrl-C reaches the benchmark alone, which then ends its children in order.
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, pass_fds=pass_fds, start_new_session=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise Unavailable(f"the benchmark's {role} process ended with {process.wait()} before it was ready")
        yield line.strip()
    finally:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _ready(what: object = "ready") -> None:
    print(what, flush=True)


def _fill(fd: str, num_bytes: str) -> None:
    """Fills shared memory with finite float32 values that do not compress."""
    words = np.frombuffer(mmap.mmap(int(fd), int(num_bytes)), np.uint64)
    generator = np.random.default_rng(0)
    for start in range(0, len(words), 1 << 20):
        part = words[start : start + (1 << 20)]
        part[:] = generator.integers(0, 1 << 64, size=len(part), dtype=np.uint64)
        part &= np.uint64(0xBFFFFFFF_BFFFFFFF)  # The exponent stays below its last value, which means NaN or infinity.
    _ready()


def _tcp(fd: str, num_bytes: str) -> None:
    """Sends all records whenever it is sent a byte."""
    source = memoryview(mmap.mmap(int(fd), int(num_bytes), prot=mmap.PROT_READ))
    with socket.create_server(("127.0.0.1", 0)) as server:
        _ready(server.getsockname()[1])
        connection, _ = server.accept()
        with connection:
            while connection.recv(1):
                connection.sendall(source)


def _flight(fd: str, num_bytes: str, record_bytes: str) -> None:
    """Serves the records as a table, one batch each; keeps the digests of what it is sent."""
    from ooc_moe.bench.store.flight_server import serve

    serve(mmap.mmap(int(fd), int(num_bytes), prot=mmap.PROT_READ), int(record_bytes), _ready)


def _bare(fd: str, num_bytes: str) -> None:
    """Serves the records, and echoes, by bare gRPC."""
    from ooc_moe.bench.store.plain_grpc import serve

    serve(memoryview(mmap.mmap(int(fd), int(num_bytes), prot=mmap.PROT_READ)), _ready)


def _stream(target: str, bank: str) -> None:
    """Fetches a whole bank over the stream, again and again."""
    from ooc_moe.bench.store.daemon_paths import stream_for_ever

    stream_for_ever(target, bank, _ready)


ROLES: dict[str, Callable[..., None]] = {"fill": _fill, "tcp": _tcp, "flight": _flight, "bare": _bare, "stream": _stream}

if __name__ == "__main__":
    stop_with_parent()
    ROLES[sys.argv[1]](*sys.argv[2:])
