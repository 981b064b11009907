"""`Connection`: the gRPC channel to one daemon, with its options, deadlines and retries. Every call carries the caller's name.

Two errors are retried after random pauses. Unavailable is retried for `patience_s` seconds. TierFull is retried a limited number of times,
each time after the pause that the daemon names. Errors of gRPC are translated to those of `ooc_moe_wire.errors` in this file only.
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
    """The iterator over the messages of a streaming call. (gRPC's own class for this has no public name.)"""

    def __iter__(self) -> Iterator[Message]:
        """Returns the iterator itself, over the messages that have not been read."""

    def __next__(self) -> Message:
        """Waits for the next message, and returns it."""

    def cancel(self) -> bool:
        """Ends the call before its last message."""


def check_target(target: str) -> None:
    """Raises InvalidRequest unless `target` is an address of the form "host:port" or "unix:PATH"."""
    host, _, port = target.rpartition(":")
    is_path = len(target) > len("unix:") and target.startswith("unix:")
    is_port = host != "" and port.isdecimal() and 0 < int(port) < 1 << 16
    if not is_path and not is_port:
        raise InvalidRequest(f"store: {target!r} is neither HOST:PORT nor unix:PATH")


class Connection:
    """One gRPC channel to a daemon, and methods that make calls with deadlines, retries and translated errors.

    Args:
        target: "host:port" or "unix:PATH".
        trainer: the caller's name, under which the daemon counts its calls.
        timeout_s: the deadline of a call, in seconds.
        patience_s: for how many seconds a call is retried after Unavailable, if the daemon has answered before. If the daemon never
            answered, for at most `FIRST_CONTACT_S`.

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
        """For how many seconds a call that meets Unavailable is retried now.

        This time is shorter while the daemon has never answered, and after retries have ended without success.
        """
        return self._patience_s if self._has_answered else min(self._patience_s, FIRST_CONTACT_S)

    def note_alive(self) -> None:
        """Notes that the daemon has answered. From now on `patience_s` has its full length."""
        self._has_answered = True

    def note_give_up(self) -> None:
        """Shortens `patience_s` to its length for a daemon that never answered. Call this when retries ended without success."""
        self._has_answered = False

    @contextmanager
    def translated_errors(self) -> Iterator[None]:
        """A context manager that translates gRPC's errors from its block to this project's errors, and raises those.

        The message of Unavailable and DeadlineExceeded gets the daemon's address.
        """
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
        """Returns a copy of the error whose message begins with the daemon's address."""
        return type(error)(f"daemon at {self.target}: {error}")

    def call_once(self, method: grpc.UnaryUnaryMultiCallable[Request, Response], request: Request) -> Response:
        """Makes a call without retries, and returns the response."""
        with self.translated_errors():
            response = method(request, timeout=self.timeout_s, metadata=self.metadata)
        self.note_alive()
        return response

    def call(self, method: grpc.UnaryUnaryMultiCallable[Request, Response], request: Request) -> Response:
        """Makes a call with retries, and returns the response. Only for calls that may safely reach the daemon more than once."""
        return self.retry(lambda: self.call_once(method, request))

    def retry(self, attempt: Callable[[], Result]) -> Result:
        """Calls `attempt`, and returns its result.

        If it raises Unavailable or TierFull, calls it again after a pause, until the retries end.
        """
        return self.retrying(self._gives_up)(attempt)

    def retrying(self, gives_up: Callable[[RetryCallState], bool]) -> Retrying:
        """Makes a retry policy for Unavailable and TierFull. Call the result with the function to retry.

        `gives_up` is called after each failure; when it returns True, the retries stop and the error is raised. `close` ends the pauses
        between the tries early.
        """
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
        """Whether the connection was closed."""
        return self._closed.is_set()

    def close(self) -> None:
        """Closes the channel, and ends all pauses between retries."""
        self._closed.set()
        self.channel.close()


def _error(state: RetryCallState) -> BaseException | None:
    return state.outcome.exception() if state.outcome is not None else None


def _wait(state: RetryCallState) -> float:
    error = _error(state)
    if isinstance(error, TierFull):
        return error.retry_after_ms / 1000 * random.uniform(1.0, 1.5)
    return _pause(state)
