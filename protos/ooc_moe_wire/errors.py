"""All errors of this project, and the table that gives each its gRPC status code.

    OocMoeError
      InvalidRequest      the call itself is wrong: shape, dtype, size, layout, name     fix the call
      NotFound
        UnknownBank       no bank of that name                                           create it
        UnknownExpert     the id is not in the bank                                      grow the bank
        UnknownSnapshot   no snapshot of that id
      AlreadyExists
        BankExists        the name belongs to a bank with another spec                   use it, or another name
        SnapshotExists    the name belongs to a snapshot of other banks
      StaleVersion        the update started from a version that is no longer current    re-read, redo the update
      LostUpdate          an acknowledged version is gone from the store                 restore a snapshot
      LeaseExpired        the daemon does not know the local session (any more)          open another, fetch again
      NotTheWriter        another writer has the bank open                               wait, or stop it
      TierFull            no room: everything pinned, or the disk is full                back off, unpin, add space
      CorruptRecord       a checksum does not match                                      restore a snapshot; never retry
      Unavailable         the daemon is starting, shutting down or away                  retry after a random pause
      DeadlineExceeded    the daemon did not answer in time                              retry, or allow more time
      Internal            a bug in the daemon; its log has the traceback                 report it

The middle column says when the error occurs, the right one what the caller should do. `STATUS` must have a row for each class, or
`tests/wire/test_errors.py` fails.
"""

from __future__ import annotations

import grpc

ERROR_KEY = "ooc-moe-error"
RETRY_AFTER_KEY = "ooc-moe-retry-after-ms"


class OocMoeError(Exception):
    """The base class of all errors that this project raises on purpose. The message names what is wrong and its value."""


class InvalidRequest(OocMoeError):
    """The call has a wrong argument: a shape, dtype, size, layout or name. A repeat would fail too."""


class NotFound(OocMoeError):
    """The bank, expert or snapshot that the call names does not exist."""


class UnknownBank(NotFound):
    """No bank has that name."""


class UnknownExpert(NotFound):
    """The bank has no expert with that id."""


class UnknownSnapshot(NotFound):
    """No snapshot has that id."""


class AlreadyExists(OocMoeError):
    """The name in the call is taken by a different bank or snapshot."""


class BankExists(AlreadyExists):
    """A bank of that name exists, with another spec (layout or seed)."""


class SnapshotExists(AlreadyExists):
    """A snapshot of that name exists, with other banks in it."""


class StaleVersion(OocMoeError):
    """The expert has a newer version than the one that the update started from."""


class LostUpdate(OocMoeError):
    """The store has an older version of an expert than it had acknowledged. A client that ignored this would train on old values."""


class LeaseExpired(OocMoeError):
    """The client's session on the local plane (shared memory) is gone, with all its leases (rights to read experts in that memory): the
    daemon restarted, or closed the session."""


class NotTheWriter(OocMoeError):
    """Another client has the bank open for writing."""


class TierFull(OocMoeError):
    """A tier (DRAM or NVMe) has no room: everything in it is pinned, or the disk is full. `retry_after_ms`: how long to wait before a
    retry.
    """

    def __init__(self, message: str, *, retry_after_ms: int = 100) -> None:
        super().__init__(message)
        self.retry_after_ms = retry_after_ms


class CorruptRecord(OocMoeError):
    """An expert's checksum does not match its bytes: the bytes read are not the bytes that were written."""


class Unavailable(OocMoeError):
    """The daemon cannot be reached, is still starting, or is shutting down."""


class DeadlineExceeded(OocMoeError):
    """The daemon did not answer in time."""


class Internal(OocMoeError):
    """A bug in the daemon; the daemon's log has the traceback."""


STATUS: dict[type[OocMoeError], grpc.StatusCode] = {
    InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    NotFound: grpc.StatusCode.NOT_FOUND,
    UnknownBank: grpc.StatusCode.NOT_FOUND,
    UnknownExpert: grpc.StatusCode.NOT_FOUND,
    UnknownSnapshot: grpc.StatusCode.NOT_FOUND,
    AlreadyExists: grpc.StatusCode.ALREADY_EXISTS,
    BankExists: grpc.StatusCode.ALREADY_EXISTS,
    SnapshotExists: grpc.StatusCode.ALREADY_EXISTS,
    StaleVersion: grpc.StatusCode.ABORTED,
    LostUpdate: grpc.StatusCode.FAILED_PRECONDITION,
    LeaseExpired: grpc.StatusCode.FAILED_PRECONDITION,
    NotTheWriter: grpc.StatusCode.FAILED_PRECONDITION,
    TierFull: grpc.StatusCode.RESOURCE_EXHAUSTED,
    CorruptRecord: grpc.StatusCode.DATA_LOSS,
    Unavailable: grpc.StatusCode.UNAVAILABLE,
    DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    Internal: grpc.StatusCode.INTERNAL,
}

_BY_NAME = {kind.__name__: kind for kind in STATUS}
# What a status means when no error name came with it, because gRPC itself made it.
_BY_STATUS: dict[grpc.StatusCode, type[OocMoeError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.ALREADY_EXISTS: AlreadyExists,
    grpc.StatusCode.RESOURCE_EXHAUSTED: InvalidRequest,  # A message is larger than allowed; waiting would not help.
    grpc.StatusCode.DATA_LOSS: CorruptRecord,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.CANCELLED: Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
}


def require_at_least(least: float, **values: float | None) -> None:
    """Raises InvalidRequest "NAME: VALUE is not at least LEAST" for the first value that is too small or NaN. None is no value."""
    for name, value in values.items():
        if value is not None and not value >= least:
            raise InvalidRequest(f"{name}: {value} is not at least {least}")


def error_named(kind: str, message: str) -> OocMoeError:
    """Makes the error of the class named `kind`.

    If there is no such class (a newer daemon may have more), makes an Internal, with the name in its message.
    """
    if kind in _BY_NAME:
        return _BY_NAME[kind](message)
    return Internal(f"{kind}: {message}")


def trailing_metadata(error: OocMoeError) -> tuple[tuple[str, str], ...]:
    """Makes the gRPC metadata that tells the caller the error's class, and, for TierFull, when to try again."""
    pairs: tuple[tuple[str, str], ...] = ((ERROR_KEY, type(error).__name__),)
    if isinstance(error, TierFull):
        pairs += ((RETRY_AFTER_KEY, str(error.retry_after_ms)),)
    return pairs


def from_rpc_error(error: grpc.RpcError) -> OocMoeError:
    """Converts a gRPC error to an error of this project: by the class name in its metadata, or else by its status code."""
    if not isinstance(error, grpc.Call):
        return Internal(str(error))
    status, message = error.code(), error.details() or ""
    metadata = dict(error.trailing_metadata() or ())
    kind = metadata.get(ERROR_KEY)
    if kind is None:
        return _BY_STATUS.get(status, Internal)(message or status.name)
    translated = error_named(str(kind), message)
    if isinstance(translated, TierFull) and RETRY_AFTER_KEY in metadata:
        translated.retry_after_ms = int(metadata[RETRY_AFTER_KEY])
    return translated
