"""The channel to one daemon: its options, the caller's name, deadlines, retries, and the one place where a failed call becomes our error.

Retried, with jitter: Unavailable for as long as the patience lasts, and TierFull a bounded number of times, when the daemon says. Knows
nothing of what is called.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

import grpc
from tenacity import RetryCallState, Retrying, retry_if_exception_type, sleep_using_event, wait_random_exponential

from ooc_moe_wire.allocator import keep_large_buffers
from ooc_moe_wire.codec import MESSAGE_BYTES_MAX, TRAINER_BYTES_MAX, TRAINER_KEY
from ooc_moe_wire.errors import DeadlineExceeded, InvalidRequest, OocMoeError, TierFull, Unavailable, from_rpc_error

# A daemon that was never seen is more likely mistyped or not started than restarting.
FIRST_CONTACT_S = 5.0
TIER_FULL_TRIES_MAX = 10

OPTIONS: list[tuple[str, int]] = [
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    ("grpc.http2.max_frame_size", (1 << 24) - 1),
    ("grpc.http2.lookahead_bytes", 64 << 20),
    ("grpc.http2.write_buffer_size", 64 << 20),
    # A lease lives as long as its connection: stores do not share one.
    ("grpc.use_local_subchannel_pool", 1),
    # Experts do not travel through a web proxy that the environment names.
    ("grpc.enable_http_proxy", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 2000),  # Also the time that a connection may take to be made.
    ("grpc.max_reconnect_backoff_ms", 500),
]

Request = TypeVar("Request")
Response = TypeVar("Response")
Result = TypeVar("Result")
Message = TypeVar("Message", covariant=True)
_pause = wait_random_exponential(multiplier=0.05, max=2.0)


class Responses(Protocol[Message]):
    """The answers of a streaming call (gRPC's own class has no public name)."""

    def __iter__(self) -> Iterator[Message]:
        """Itself."""

    def __next__(self) -> Message:
        """Waits for the next message."""

    def cancel(self) -> bool:
        """Ends the call."""


def check_target(target: str) -> None:
    """Raises InvalidRequest unless it is "host:port" or "unix:PATH"."""
    host, _, port = target.rpartition(":")
    is_path = len(target) > len("unix:") and target.startswith("unix:")
    is_port = host != "" and port.isdecimal() and 0 < int(port) < 1 << 16
    if not is_path and not is_port:
        raise InvalidRequest(f"store: {target!r} is neither HOST:PORT nor unix:PATH")


class Connection:
    """One gRPC channel and how it is used.

    Args:
        target: "host:port" or "unix:PATH".
        trainer: the name under which the daemon counts this caller.
        timeout_s: the deadline of a call.
        patience_s: how long a daemon that went away is waited for; `FIRST_CONTACT_S` at most before it ever answered.

    Raises:
        InvalidRequest: a target that is no address, a trainer's name that cannot travel in a header, or a time that is not positive.
    """

    def __init__(self, target: str, *, trainer: str, timeout_s: float, patience_s: float) -> None:
        if len(trainer) > TRAINER_BYTES_MAX or not trainer.isascii() or not (trainer.isprintable() or not trainer):
            raise InvalidRequest(f"trainer: {trainer!r} is not at most {TRAINER_BYTES_MAX} printable ASCII characters")
        check_target(target)
        if timeout_s <= 0 or patience_s < 0:
            raise InvalidRequest(f"timeout_s {timeout_s} must be positive and patience_s {patience_s} not negative")
        self.target = target
        self.timeout_s = timeout_s
        self.trainer = trainer
        self.metadata = ((TRAINER_KEY, trainer),)
        keep_large_buffers()
        self.channel = grpc.insecure_channel(target, options=OPTIONS)
        self._patience_s = patience_s
        self._has_answered = False
        self._closed = threading.Event()

    @property
    def patience_s(self) -> float:
        """How long Unavailable is retried now."""
        return self._patience_s if self._has_answered else min(self._patience_s, FIRST_CONTACT_S)

    def answered(self) -> None:
        """Notes that the daemon exists."""
        self._has_answered = True

    def gave_up(self) -> None:
        """Notes that patience ended: what is called next waits no longer than for a daemon that was never there."""
        self._has_answered = False

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Translates what gRPC raises inside; an absent daemon is named."""
        try:
            yield
        except grpc.RpcError as error:
            translated = from_rpc_error(error)
            if isinstance(translated, Unavailable | DeadlineExceeded):
                translated = self.named(translated)
            else:
                self.answered()
            raise translated from error

    def named(self, error: Unavailable | DeadlineExceeded) -> OocMoeError:
        """The error, with the daemon's address."""
        return type(error)(f"daemon at {self.target}: {error}")

    def once(self, method: grpc.UnaryUnaryMultiCallable[Request, Response], request: Request) -> Response:
        """One call, not retried."""
        with self.errors():
            response = method(request, timeout=self.timeout_s, metadata=self.metadata)
        self.answered()
        return response

    def call(self, method: grpc.UnaryUnaryMultiCallable[Request, Response], request: Request) -> Response:
        """One call that may be repeated."""
        return self.retry(lambda: self.once(method, request))

    def retry(self, attempt: Callable[[], Result]) -> Result:
        """Runs `attempt` until it raises neither Unavailable nor TierFull, or patience ends."""
        return self.retrying(self._gives_up)(attempt)

    def retrying(self, gives_up: Callable[[RetryCallState], bool]) -> Retrying:
        """The retry policy, with a stop of the caller's choice. `close` ends its pauses."""
        return Retrying(
            retry=retry_if_exception_type((Unavailable, TierFull)),
            wait=_wait,
            stop=gives_up,
            sleep=sleep_using_event(self._closed),
            reraise=True,
        )

    def _gives_up(self, state: RetryCallState) -> bool:
        if self._closed.is_set():
            return True
        if isinstance(_error(state), TierFull):
            return state.attempt_number >= TIER_FULL_TRIES_MAX
        if (state.seconds_since_start or 0.0) < self.patience_s:
            return False
        self.gave_up()
        return True

    @property
    def closed(self) -> bool:
        """`close` was called."""
        return self._closed.is_set()

    def close(self) -> None:
        """Ends what waits, and the channel."""
        self._closed.set()
        self.channel.close()


def _error(state: RetryCallState) -> BaseException | None:
    return state.outcome.exception() if state.outcome is not None else None


def _wait(state: RetryCallState) -> float:
    error = _error(state)
    if isinstance(error, TierFull):
        return error.retry_after_ms / 1000 * random.uniform(1.0, 1.5)
    return _pause(state)
