"""The guard, a gRPC interceptor around every call of the daemon's services: refuses calls, limits the calls under way, translates errors.

Calls are refused while the daemon starts or drains (finishes the calls under way before it stops). The health and reflection services are
not guarded. Fetches through the local plane's Unix socket, which is not gRPC, use the same limit (`Guard.counted`).

An `OocMoeError` that a call raises becomes a gRPC status, with the name of the error class in the trailing metadata. Any other exception is
a bug of the daemon: the caller gets the status INTERNAL, and the daemon logs the traceback once.

A method that streams its answers is a coroutine that writes to the call's context, so that the method ends when the caller hangs up.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio

from ooc_moe_wire.codec import decode_push_request
from ooc_moe_wire.errors import STATUS, Internal, InvalidRequest, OocMoeError, TierFull, Unavailable, trailing_metadata

log = logging.getLogger(__name__)

# Calls under way at once. Further calls get TierFull, and may be retried.
CALLS_MAX = 1024
ERROR_CHARS_MAX = 500
_PREFIX = "/ooc_moe_wire.v1."
# Requests that are parsed by hand, because it is faster.
_DECODERS: dict[str, Callable[[bytes], Any]] = {f"{_PREFIX}ExpertService/PushExperts": decode_push_request}


class Guard(grpc.aio.ServerInterceptor):
    """A gRPC interceptor that wraps every call of the daemon's services: it refuses or counts calls, and translates errors.

    Set `refusal` to the reason why new calls are refused, or to None to admit them. `num_open`: the number of calls under way.
    """

    def __init__(self) -> None:
        self.refusal: str | None = "the daemon is starting"
        self.num_open = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def wait_idle(self) -> None:
        """Waits until no call is under way (`num_open` is 0)."""
        await self._idle.wait()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Returns the handler of a gRPC method, wrapped by the guard.

        Handlers of services that are not the daemon's own, such as health checks, are returned unchanged.
        """
        handler = await continuation(details)
        if handler is None or not details.method.startswith(_PREFIX):
            return handler
        kind = {
            (False, False): grpc.unary_unary_rpc_method_handler,
            (False, True): grpc.unary_stream_rpc_method_handler,
            (True, True): grpc.stream_stream_rpc_method_handler,
        }[handler.request_streaming, handler.response_streaming]
        behaviour: Any = handler.unary_unary or handler.unary_stream or handler.stream_stream
        decode = _DECODERS.get(details.method, handler.request_deserializer)
        return kind(self._guarded(behaviour, details.method), _or_not_a_message(decode), _unless_encoded(handler.response_serializer))

    def _guarded(self, behaviour: Callable[..., Awaitable[Any]], method: str) -> Callable[..., Awaitable[Any]]:
        async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            try:
                async with self.counted():
                    if isinstance(request, NotAMessage):
                        raise request.error
                    return await behaviour(request, context)
            except OocMoeError as error:
                await _abort(context, error)
            except grpc.aio.AbortError:
                raise
            except Exception as error:
                if context.done():  # The caller hung up, so that a write to it failed.
                    raise asyncio.CancelledError from error
                log.exception("%s failed", method)
                await _abort(context, Internal(f"{type(error).__name__}: {error}"))

        return call

    @asynccontextmanager
    async def counted(self) -> AsyncIterator[None]:
        """Admits a call, and counts it in `num_open` while the context is open.

        Raises Unavailable while `refusal` is set, and TierFull when too many calls are under way.
        """
        if self.refusal is not None:
            raise Unavailable(self.refusal)
        if self.num_open >= CALLS_MAX:
            raise TierFull(f"{CALLS_MAX} calls are under way")
        self.num_open += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.num_open -= 1
            if self.num_open == 0:
                self._idle.set()


async def _abort(context: grpc.aio.ServicerContext[Any, Any], error: OocMoeError) -> None:
    await context.abort(STATUS[type(error)], shown(error), trailing_metadata(error))


def shown(error: OocMoeError) -> str:
    """Returns the message of an error, cut to 500 characters: gRPC drops an error's name when the metadata of a reply grow beyond 8 KiB."""
    text = str(error)
    return text if len(text) <= ERROR_CHARS_MAX else f"{text[:ERROR_CHARS_MAX]} ..."


class NotAMessage:
    """Takes the place of a request that cannot be decoded, so that the guard can answer with InvalidRequest instead of gRPC's own error."""

    def __init__(self, error: Exception) -> None:
        self.error = InvalidRequest(f"the request cannot be decoded: {error}")

    def WhichOneof(self, _name: str) -> str:
        """Raises InvalidRequest. A stream calls this method first on every message that it receives."""
        raise self.error


def _or_not_a_message(decode: Callable[[bytes], Any] | None) -> Callable[[bytes], Any]:
    """Wraps the decoder of a request so that it returns a NotAMessage instead of raising.

    If it raised, gRPC would answer UNKNOWN or INTERNAL, and log a traceback.
    """
    assert decode is not None

    def decoded(data: bytes) -> Any:
        try:
            return decode(data)
        except Exception as error:
            return NotAMessage(error)

    return decoded


def _unless_encoded(serialize: Callable[[Any], bytes] | None) -> Callable[[Any], bytes]:
    """Wraps the serializer of replies so that it passes on `bytes`, which are serialized already (see `encoded_chunks`)."""
    assert serialize is not None
    return lambda message: message if isinstance(message, bytes) else serialize(message)
