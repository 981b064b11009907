"""The peer "plain gRPC" of the benchmarks: a Python server that only streams prepared bytes and echoes a message, and its client.

Our own streams cannot be faster than this one: its server looks nothing up, checks nothing and serializes nothing. Channel and server have
the options of our own channels.

`plain_client` runs the server as a process: python -m ooc_moe.bench.store.plain_grpc FD NUM_BYTES
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import grpc.aio

from ooc_moe.bench.child_process import child_process, report_ready, run_as_child
from ooc_moe.bench.store.records import map_source
from ooc_moe_client.remote.connection import OPTIONS
from ooc_moe_wire.codec import CHUNK_BYTES_MAX

_SERVICE = "bare.Bare"


def serve(fd: str, num_bytes: str) -> None:
    """Serves the bytes in the shared memory `fd` until the process is ended; reports its port to the parent when it listens.

    The arguments come from the command line, as text.
    """
    memory = memoryview(map_source(fd, num_bytes))
    asyncio.run(_serve([bytes(memory[start : start + CHUNK_BYTES_MAX]) for start in range(0, len(memory), CHUNK_BYTES_MAX)]))


async def _serve(messages: list[bytes]) -> None:
    async def stream(request: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        for message in messages:
            await context.write(message)

    async def echo(request: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> bytes:
        return request

    methods: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        "Stream": grpc.unary_stream_rpc_method_handler(stream),
        "Echo": grpc.unary_unary_rpc_method_handler(echo),
    }
    server = grpc.aio.server(options=OPTIONS)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE, methods),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    report_ready(port)
    await server.wait_for_termination()


class PlainClient:
    """The client of the plain gRPC server: calls its two methods, the stream and the echo, over `channel`."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._stream: grpc.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(f"/{_SERVICE}/Stream")
        self._echo: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(f"/{_SERVICE}/Echo")

    def stream_into(self, memory: memoryview) -> None:
        """Receives the whole stream and copies each message to its place in `memory`."""
        done = 0
        for message in self._stream(b""):
            memory[done : done + len(message)] = message
            done += len(message)

    def echo(self) -> None:
        """Makes one unary call that sends and returns one byte."""
        self._echo(b"x")


@contextmanager
def plain_client(fd: int, num_bytes: int) -> Iterator[PlainClient]:
    """Starts a server process that streams the first `num_bytes` of the shared memory `fd`, and yields a client connected to it.

    The server ends with the block.
    """
    server = child_process("ooc_moe.bench.store.plain_grpc", fd, num_bytes, pass_fds=(fd,))
    with server as port, grpc.insecure_channel(f"127.0.0.1:{port}", options=OPTIONS) as channel:
        client = PlainClient(channel)
        client.echo()
        yield client


if __name__ == "__main__":
    run_as_child(serve)
