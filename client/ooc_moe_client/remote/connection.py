"""`Connection`: the channel to one daemon, with its options, the caller's name, deadlines and retries.

Two errors are retried, with jitter: Unavailable until the patience ends, and TierFull a limited number of times, each after the pause that
the daemon names. This is the only place where an error of gRPC becomes one of `ooc_moe_wire.errors`.
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

# The patience with a daemon that never answered: its address is more likely wrong than that it is restarting.
FIRST_CONTACT_S = 5.0
TIER_FULL_TRIES_MAX = 10

OPTIONS: list[tuple[str, int]] = [
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    ("grpc.http2.max_frame_size", (1 << 24) - 1),
    ("grpc.http2.lookahead_bytes", 64 << 20),
    ("grpc.http2.write_buffer_size", 64 << 20),
    # A writer's lease lives as long as its connection, so two stores must not share one.
    ("grpc.use_local_subchannel_pool", 1),
    # Experts do not travel through a web proxy that the environment may name.
    ("grpc.enable_http_proxy", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 2000),  # Also the time limit for making a connection.
    ("grpc.max_reconnect_backoff_ms", 500),
]

Request = TypeVar("Request")
Response = TypeVar("Response")
Result = TypeVar("Result")
Message = TypeVar("Message", covariant=True)
_pause = wait_random_exponential(multiplier=0.05, max=2.0)


class Responses(Protocol[Message]):
    """The messages of a streaming call. gRPC's own class for this has no public name."""

    def __iter__(self) -> Iterator[Message]:
        """Iterates over the messages to come."""

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
    """One gRPC channel, and the rules for calls on it.

    Args:
        target: "host:port" or "unix:PATH".
        trainer: the name under which the daemon counts this caller.
        timeout_s: the deadline of a call.
        patience_s: how long a daemon that went away is waited for; at most `FIRST_CONTACT_S` when it never answered.

    Raises:
        InvalidRequest: the target is no address, the trainer's name cannot travel in a header, or a time is not positive.
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
        """How long Unavailable is retried at present."""
        return self._patience_s if self._has_answered else min(self._patience_s, FIRST_CONTACT_S)

    def note_alive(self) -> None:
        """Notes that the daemon answered: from now on it is waited for with the whole patience."""
        self._has_answered = True

    def note_give_up(self) -> None:
        """Notes that the patience ended: the next call waits no longer than for a daemon that never answered."""
        self._has_answered = False

    @contextmanager
    def translated_errors(self) -> Iterator[None]:
        """Translates the errors that gRPC raises inside the block. The error of an absent daemon names its address."""
        try:
            yield
        except grpc.RpcError as error:
            translated = from_rpc_error(error)
            if isinstance(translated, Unavailable | DeadlineExceeded):
                translated = self.with_address(translated)
            else:
                self.note_alive()
            raise translated from error

    def with_address(self, error: Unavailable | DeadlineExceeded) -> OocMoeError:
        """The error, with the daemon's address in its message."""
        return type(error)(f"daemon at {self.target}: {error}")

    def call_once(self, method: grpc.UnaryUnaryMultiCallable[Request, Response], request: Request) -> Response:
        """Makes a call without retries."""
        with self.translated_errors():
            response = method(request, timeout=self.timeout_s, metadata=self.metadata)
        self.note_alive()
        return response

    def call(self, method: grpc.UnaryUnaryMultiCallable[Request, Response], request: Request) -> Response:
        """Makes a call that may be repeated safely, with retries."""
        return self.retry(lambda: self.call_once(method, request))

    def retry(self, attempt: Callable[[], Result]) -> Result:
        """Runs `attempt` until it raises neither Unavailable nor TierFull, or its retries end."""
        return self.retrying(self._gives_up)(attempt)

    def retrying(self, gives_up: Callable[[RetryCallState], bool]) -> Retrying:
        """The retry policy, which ends when `gives_up` says so. `close` ends its pauses early."""
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
        self.note_give_up()
        return True

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed.is_set()

    def close(self) -> None:
        """Ends all pauses between retries, and closes the channel."""
        self._closed.set()
        self.channel.close()


def _error(state: RetryCallState) -> BaseException | None:
    return state.outcome.exception() if state.outcome is not None else None


def _wait(state: RetryCallState) -> float:
    error = _error(state)
    if isinstance(error, TierFull):
        return error.retry_after_ms / 1000 * random.uniform(1.0, 1.5)
    return _pause(state)
