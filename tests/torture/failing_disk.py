"""A failing disk: chosen calls on chosen files raise an error, or do less than they were asked. All other calls work.

    with FailingDisk() as disk:
        ...
        with disk.broken(Fault("slabs/", ["fdatasync"], errno.EIO)) as fault:
            ...
        assert fault.num_hits

For SQLite, faults hit statements: the name of the call is the first word of the statement ("executemany" counts as INSERT).
"""

from __future__ import annotations

import errno
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

_CALLS = ("pwritev", "pwrite", "write", "preadv", "posix_fallocate", "fsync", "fdatasync")
BLOCK_BYTES = 4096


@dataclass(eq=False)
class Fault:
    """An error that chosen calls on chosen files get.

    `files`: a text in the paths of these files. `calls`: the names of these calls. `error`: an errno, a SQLite code, "short" (moves some of
    the bytes) or "none" (moves no byte). `times`: how often it hits; None: always.
    """

    files: str
    calls: Sequence[str]
    error: int | str
    times: int | None = None
    num_hits: int = 0

    def strikes(self, file: str, call: str) -> bool:
        """Whether the fault hits this call on this file; if so, counts the hit."""
        if self.files not in file or call not in self.calls or (self.times is not None and self.num_hits >= self.times):
            return False
        self.num_hits += 1
        return True


class FailingDisk:
    """Makes calls of `os` and sqlite3 fail during its `with` block, as far as faults are active."""

    def __init__(self) -> None:
        self._faults: list[Fault] = []
        self._lock = threading.Lock()
        self._patches = [mock.patch.object(os, name, self._on_descriptor(name, getattr(os, name))) for name in _CALLS]
        self._patches.append(mock.patch.object(os, "replace", self._replace(os.replace)))
        self._patches.append(mock.patch.object(os, "unlink", self._unlink(os.unlink)))
        self._patches.append(mock.patch.object(os, "open", self._open(os.open)))
        self._patches.append(mock.patch.object(sqlite3, "connect", self._connect(sqlite3.connect)))

    def __enter__(self) -> FailingDisk:
        for patch in self._patches:
            patch.start()
        return self

    def __exit__(self, *_: object) -> None:
        for patch in reversed(self._patches):
            patch.stop()

    @contextmanager
    def broken(self, fault: Fault) -> Iterator[Fault]:
        """Makes a fault active inside the block, and yields it."""
        self._faults.append(fault)
        try:
            yield fault
        finally:
            self._faults.remove(fault)

    def struck(self, file: str, call: str) -> Fault | None:
        """Returns the active fault that hits this call on this file, and counts the hit; None if no fault does."""
        with self._lock:
            return next((fault for fault in self._faults if fault.strikes(file, call)), None)

    def _on_descriptor(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(fd: int, *arguments: Any) -> Any:
            fault = self.struck(os.readlink(f"/proc/self/fd/{fd}"), name) if self._faults else None
            if fault is None:
                return real(fd, *arguments)
            if isinstance(fault.error, int):
                raise OSError(fault.error, f"injected: {os.strerror(fault.error)}")
            if fault.error == "none":
                return 0
            return _in_part(real, fd, *arguments)

        return call

    def _replace(self, real: Callable[..., None]) -> Callable[..., None]:
        def replace(source: Any, target: Any) -> None:
            self._raise(self.struck(os.fspath(target), "replace"))
            real(source, target)

        return replace

    def _unlink(self, real: Callable[..., None]) -> Callable[..., None]:
        def unlink(path: Any, **options: Any) -> None:
            self._raise(self.struck(os.fspath(path), "unlink"))
            real(path, **options)

        return unlink

    def _open(self, real: Callable[..., int]) -> Callable[..., int]:
        def opened(path: Any, flags: int, *arguments: Any, **options: Any) -> int:
            if flags & os.O_CREAT and isinstance(path, str | Path):
                self._raise(self.struck(os.fspath(path), "create"))
            return real(path, flags, *arguments, **options)

        return opened

    def _raise(self, fault: Fault | None) -> None:
        if fault:
            assert isinstance(fault.error, int)
            raise OSError(fault.error, f"injected: {os.strerror(fault.error)}")

    def _connect(self, real: Callable[..., sqlite3.Connection]) -> Callable[..., Any]:
        return lambda *arguments, **options: _Connection(self, real(*arguments, **options))


class _Connection:
    """A sqlite3.Connection whose statements fail where a fault hits them."""

    def __init__(self, disk: FailingDisk, db: sqlite3.Connection) -> None:
        self._disk, self._db = disk, db

    def __getattr__(self, name: str) -> Any:
        return getattr(self._db, name)

    def execute(self, statement: str, *parameters: Any) -> Any:
        word = statement.split(maxsplit=1)[0].upper()
        self._strike(word)
        rows = self._db.execute(statement, *parameters)
        self._strike(f"after {word}")
        return rows

    def executemany(self, statement: str, rows: Any) -> Any:
        self._strike("INSERT")
        return self._db.executemany(statement, rows)

    def _strike(self, word: str) -> None:
        fault = self._disk.struck("index.sqlite", word)
        if fault:
            assert isinstance(fault.error, int)
            error = sqlite3.OperationalError("injected: " + _SQLITE_MESSAGES[fault.error])
            error.sqlite_errorcode = fault.error  # type: ignore[misc]
            if fault.error == sqlite3.SQLITE_IOERR and word == "COMMIT" and self._db.in_transaction:
                self._db.execute("ROLLBACK")  # SQLite does so after some errors, but not after all.
            raise error


_SQLITE_MESSAGES = {sqlite3.SQLITE_FULL: "database or disk is full", sqlite3.SQLITE_IOERR: "disk I/O error"}
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, sqlite3.SQLITE_FULL)


def _in_part(real: Callable[..., Any], fd: int, buffers: Any, *arguments: Any) -> Any:
    """Makes a transfer with only the first block of its bytes, the least that direct I/O allows."""
    parts = [buffers] if isinstance(buffers, bytes | memoryview) else buffers
    view = memoryview(parts[0])
    part = view[:BLOCK_BYTES]
    return real(fd, part if isinstance(buffers, bytes | memoryview) else [part], *arguments)
