"""The one place where calls meet the daemon's state: refused while it starts or drains, counted and bounded, errors translated.

Calls that come through the local plane's socket are counted here too (`counted`).

An `OocMoeError` becomes its status with its name in the trailing metadata; anything else is a fault of ours: INTERNAL, logged once with its
traceback. Health and reflection pass untouched. Streams are coroutines that write to the context, so that a caller who hangs up ends them.
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

# Under way at once; more are asked to come again.
CALLS_MAX = 1024
ERROR_CHARS_MAX = 500
_PREFIX = "/ooc_moe_wire.v1."
# Requests that are parsed by hand.
_DECODERS: dict[str, Callable[[bytes], Any]] = {f"{_PREFIX}ExpertService/PushExperts": decode_push_request}


class Guard(grpc.aio.ServerInterceptor):
    """Wraps every call of our services. `refusal` is why calls are refused now, or None."""

    def __init__(self) -> None:
        self.refusal: str | None = "the daemon is starting"
        self.num_open = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def wait_idle(self) -> None:
        """Returns when no call is under way."""
        await self._idle.wait()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Puts the guard around the method's behaviour."""
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
                if context.done():  # The caller hung up; writing to it failed.
                    raise asyncio.CancelledError from error
                log.exception("%s failed", method)
                await _abort(context, Internal(f"{type(error).__name__}: {error}"))

        return call

    @asynccontextmanager
    async def counted(self) -> AsyncIterator[None]:
        """Counts a call while it is under way. Raises Unavailable, TierFull."""
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
    """Its message, cut: gRPC drops the name of an error when the metadata grow beyond 8 KiB, and it may quote a long name."""
    text = str(error)
    return text if len(text) <= ERROR_CHARS_MAX else f"{text[:ERROR_CHARS_MAX]} ..."


class NotAMessage:
    """What stands for bytes that are no message of the method. Looking into it says so."""

    def __init__(self, error: Exception) -> None:
        self.error = InvalidRequest(f"the request cannot be decoded: {error}")

    def WhichOneof(self, _name: str) -> str:
        """Raises InvalidRequest: what a stream does first with a message."""
        raise self.error


def _or_not_a_message(decode: Callable[[bytes], Any] | None) -> Callable[[bytes], Any]:
    """gRPC itself would answer UNKNOWN or INTERNAL to what cannot be decoded, and log a traceback."""
    assert decode is not None

    def decoded(data: bytes) -> Any:
        try:
            return decode(data)
        except Exception as error:
            return NotAMessage(error)

    return decoded


def _unless_encoded(serialize: Callable[[Any], bytes] | None) -> Callable[[Any], bytes]:
    """Lets messages through that are bytes already (`encoded_chunks`)."""
    assert serialize is not None
    return lambda message: message if isinstance(message, bytes) else serialize(message)
