"""Peers of the store benchmark that move records between processes in memory: memcpy, TCP, plain gRPC, Arrow Flight, Ray.

Each function is a context manager that starts one peer, yields one or more benchmark cases to move the records (paths), and stops the peer
again; its docstring says what a run does. Modules of the `bench` extra are imported only when their peer is used.
"""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import xxhash

from ooc_moe.bench.child_process import child_process
from ooc_moe.bench.harness import TimedPath, WrongBytes
from ooc_moe.bench.store.plain_grpc import plain_client
from ooc_moe.bench.store.records import Records


@contextmanager
def memcpy(records: Records) -> Iterator[list[TimedPath]]:
    """Yields the benchmark case (path) "memcpy": one thread copies record after record.

    The thread copies the records out of shared memory that another process has filled.
    """

    def run() -> None:
        for index in records.ids:
            records.into(index)[:] = records.body(index)

    yield [TimedPath(name="memcpy", run=run, check=records.check)]


@contextmanager
def tcp(records: Records) -> Iterator[list[TimedPath]]:
    """Yields the benchmark case (path) "tcp": another process sends all records over one loopback connection.

    That process sends the records from shared memory. The caller receives the records into its own memory.
    """
    sender = child_process("ooc_moe.bench.store.tcp_sender", records.fd, records.num_bytes, pass_fds=(records.fd,))
    with sender as port, socket.create_connection(("127.0.0.1", int(port))) as connection:

        def run() -> None:
            connection.sendall(b"!")
            _receive(connection, records.destination.data)

        yield [TimedPath(name="tcp", run=run, check=records.check)]


def _receive(connection: socket.socket, into: memoryview) -> None:
    done = 0
    while done < len(into):
        count = connection.recv_into(into[done:])
        if not count:
            raise WrongBytes(f"the sender ended after {done} of {len(into)} bytes")
        done += count


@contextmanager
def grpc(records: Records) -> Iterator[list[TimedPath]]:
    """Yields the benchmark case (path) "grpc": a plain gRPC server (plain_grpc.py) sends all records as one stream.

    The server's messages are as large as our daemon's. The caller copies each message into its memory.
    """
    with plain_client(records.fd, records.num_bytes) as client:
        yield [TimedPath(name="grpc", run=lambda: client.stream_into(records.destination.data), check=records.check)]


@contextmanager
def flight(records: Records) -> Iterator[list[TimedPath]]:
    """Yields two benchmark cases, "flight" (fetch) and "flight put": an Arrow Flight server sends or receives all records as a table.

    The fetch is DoGet with `read_all`, as Flight's users call it: the records arrive in Flight's memory, not the caller's. The put is
    DoPut; the server then has the records in memory, not durably.
    """
    import pyarrow.flight

    from ooc_moe.bench.store.flight_server import record_bodies, record_table

    received: list[Any] = []
    sent = record_table(records.source.data, records.record_bytes)
    arguments = (records.fd, records.num_bytes, records.record_bytes)
    server = child_process("ooc_moe.bench.store.flight_server", *arguments, pass_fds=(records.fd,))

    with server as port, pyarrow.flight.connect(f"grpc://127.0.0.1:{port}") as client:

        def get() -> None:
            received.append(client.do_get(pyarrow.flight.Ticket(b"")).read_all())

        def check_get() -> None:
            for index, body in enumerate(_all_of(records, record_bodies(received.pop()))):
                records.check_body(index, body)

        def put() -> None:
            writer, _ = client.do_put(pyarrow.flight.FlightDescriptor.for_path("records"), sent.schema)
            with writer:
                writer.write_table(sent)

        def check_put() -> None:
            digests = [int(result.body.to_pybytes()) for result in client.do_action("digests")]
            if digests != [xxhash.xxh3_64_intdigest(records.body(index)) for index in records.ids]:
                raise WrongBytes("the server did not receive the records that were put")

        yield [
            TimedPath(name="flight", run=get, check=check_get, prepare=received.clear),
            TimedPath(name="flight put", run=put, check=check_put),
        ]


def _all_of(records: Records, bodies: list[memoryview]) -> list[memoryview]:
    if len(bodies) != records.count:
        raise WrongBytes(f"{len(bodies)} of {records.count} records arrived")
    return bodies


@contextmanager
def ray(records: Records) -> Iterator[list[TimedPath]]:
    """Yields two benchmark cases (paths), "ray" (fetch) and "ray put", both on Ray's object store.

    The fetch is `ray.get` of all records; each record is then copied into the caller's memory. The put is `ray.put` of each record.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_raylet_start_wait_time_s"] = "120"  # noqa: SIM112  Ray spells it so. Long, for a busy machine.
    import ray as ray_

    # Ray puts its sockets there, and a socket's path is limited to 107 bytes.
    directory = tempfile.mkdtemp(prefix="ooc-moe-ray-")
    # Room for the records twice, because `put` makes new objects while the old ones are still being freed.
    store_bytes = max(128 << 20, round(2.5 * records.num_bytes))
    try:
        ray_.init(
            address="local",
            num_cpus=1,
            include_dashboard=False,
            object_store_memory=store_bytes,
            log_to_driver=False,
            logging_level="ERROR",
            _temp_dir=directory,
        )
        yield _ray_paths(ray_, records)
    finally:
        ray_.shutdown()
        shutil.rmtree(directory, ignore_errors=True)


def _ray_paths(ray_: Any, records: Records) -> list[TimedPath]:
    def arrays() -> list[Any]:
        return [np.frombuffer(records.body(index), np.uint8) for index in records.ids]

    kept = [ray_.put(array) for array in arrays()]
    newly: list[Any] = []

    def get() -> None:
        for index, array in enumerate(ray_.get(kept)):
            records.into(index)[:] = array.data

    def put() -> None:
        newly.extend(ray_.put(array) for array in arrays())

    def check_put() -> None:
        for index, array in enumerate(ray_.get(newly)):
            records.check_body(index, array.data)

    return [TimedPath(name="ray", run=get, check=records.check), TimedPath(name="ray put", run=put, check=check_put, prepare=newly.clear)]
