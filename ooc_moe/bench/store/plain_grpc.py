"""Bare gRPC for Python, the floor that ours stands on: a stream of bytes made beforehand, and an echo. Run in processes of their own.

Nothing is looked up, checked or serialized; the options of channel and server are those of our channels.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import grpc.aio

from ooc_moe_client.remote.connection import OPTIONS
from ooc_moe_wire.codec import CHUNK_BYTES_MAX

_SERVICE = "bare.Bare"


def serve(memory: memoryview, ready: Callable[[int], None]) -> None:
    """Serves until it is ended; says its port when ready."""
    asyncio.run(_serve([bytes(memory[start : start + CHUNK_BYTES_MAX]) for start in range(0, len(memory), CHUNK_BYTES_MAX)], ready))


async def _serve(messages: list[bytes], ready: Callable[[int], None]) -> None:
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
    ready(port)
    await server.wait_for_termination()


class Client:
    """Calls the two methods."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._stream: grpc.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(f"/{_SERVICE}/Stream")
        self._echo: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(f"/{_SERVICE}/Echo")

    def stream_into(self, memory: memoryview) -> None:
        """Copies each message to its place, as it comes."""
        done = 0
        for message in self._stream(b""):
            memory[done : done + len(message)] = message
            done += len(message)

    def echo(self) -> None:
        """There and back."""
        self._echo(b"x")


@contextmanager
def connected(port: str) -> Iterator[Client]:
    """A client with a channel of its own."""
    with grpc.insecure_channel(f"127.0.0.1:{port}", options=OPTIONS) as channel:
        client = Client(channel)
        client.echo()
        yield client
