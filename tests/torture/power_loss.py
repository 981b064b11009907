"""Simulated power loss: a recorder notes every change of a directory, and computes what a power loss at any moment could leave of it.

    with Recorder(directory) as recorder:                # os.* and SQLite
        ...                                    # a real engine works in it
    recorder.survivors(moment, choose)         # what the disk may hold after a power loss at `moment`

Changes that were synced before the moment survive. Of all other changes any subset may survive: each write, truncation, allocation or name
separately, and of a write any of its 512-byte sectors. The sync of a file covers its bytes but not its name; the sync of a directory covers
the names in it.
"""

from __future__ import annotations

import os
import random
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Any
from unittest import mock

import apsw

from ooc_moe_server.nvme import slab

SECTOR_BYTES = 512


@dataclass(eq=False, slots=True)
class Change:
    """One change of a file's bytes or of a directory's names. Its times are numbers of the recorder's events; infinity: not yet."""

    began: int
    apply: Callable[[Any], None]  # Changes a bytearray, or a dict of names.
    num_bytes: int = 0  # More than 0 for a write, which can be torn.
    offset: int = 0
    data: bytes = b""
    done: float = inf
    durable: float = inf


@dataclass(eq=False, slots=True)
class Node:
    """A recorded file or directory: its content when recording began, all changes since, and its present content."""

    is_directory: bool
    base: Any
    now: Any = None
    changes: list[Change] = field(default_factory=list)
    sync_names: bool = False  # SQLite's journals: the first sync of a new one also syncs its directory.

    def __post_init__(self) -> None:
        self.now = self.base.copy()


# Says for the changes of one node that may or may not have survived, oldest first, what became of each: True, False,
# or the sectors of a write that were written.
Choice = Callable[[list[Change]], list[bool | set[int]]]


class Recorder:
    """Records all changes below the directory `root` during its `with` block.

    `lying`: files whose path contains one of these texts are recorded as if their syncs did nothing, to test the tests.
    """

    def __init__(self, root: Path, *, lying: tuple[str, ...] = ()) -> None:
        self.root, self.lying = os.path.realpath(root), lying
        self.clock = 0
        self._lock = threading.RLock()
        self._nodes: dict[str, Node] = {}
        self._fds: dict[int, str] = {}
        self._unlinked: dict[int, Node] = {}
        self._patches = [mock.patch.object(os, name, self._shim(name)) for name in _SHIMS]
        self._patches.append(mock.patch.object(sqlite3, "connect", self._connect))
        self._patches.append(mock.patch.object(slab, "_punch", self._punch))
        self._import(self.root)
        self._vfs = _RecordingVFS(self)

    def __enter__(self) -> Recorder:
        for patch in self._patches:
            patch.start()
        return self

    def __exit__(self, *_: object) -> None:
        for patch in reversed(self._patches):
            patch.stop()
        self._vfs.unregister()

    def tick(self) -> int:
        """Counts one event and returns its number, which stands for the present moment."""
        with self._lock:
            self.clock += 1
            return self.clock

    _real_connect = staticmethod(sqlite3.connect)

    def _connect(self, path: Any, **options: Any) -> Any:
        if self.covers(path) is None:
            return self._real_connect(path, **options)
        return Connection(apsw.Connection(os.fspath(path), vfs=self._vfs.name))

    # What remains after a power loss.

    def survivors(self, moment: float, choose: Choice) -> dict[str, bytes | None]:
        """Returns what a power loss at `moment` may leave: relative path -> bytes, or None for a directory. Parents come first.

        `choose` decides which of the changes that were not synced survive.
        """
        found: dict[str, bytes | None] = {}
        self._collect(self.root, "", moment, choose, found)
        return found

    def _collect(self, path: str, name: str, moment: float, choose: Choice, found: dict[str, bytes | None]) -> None:
        node = self._nodes[path]
        for child, survivor in _survived(node, moment, choose).items():
            relative = os.path.join(name, child)
            if survivor.is_directory:
                found[relative] = None
                self._collect(os.path.join(path, child), relative, moment, choose, found)
            else:
                found[relative] = bytes(_survived(survivor, moment, choose))

    def check_complete(self) -> None:
        """Asserts that all recorded changes together give the present content of the directory, so that the recorder missed none."""
        found = self.survivors(inf, lambda changes: [True] * len(changes))
        ignored = {name for name in _files(self.root) if name.endswith("-shm")}
        assert _files(self.root) - ignored == {name for name, content in found.items() if content is not None}
        for name, content in found.items():
            if content is not None:
                actual = Path(self.root, name).read_bytes()
                assert actual == content, f"{name}: {len(actual)} bytes, {len(content)} were recorded"

    # Called by the patched functions and by SQLite.

    def change(self, path: str, apply: Callable[[Any], None], *, offset: int = 0, data: bytes = b"") -> Change:
        """Notes that a call begins to change a file's bytes, or a directory's names. Call `finish` when that call has returned.

        Args:
            path: the file or the directory.
            apply: makes the change in a bytearray of the content, or in a dict of the names.
            offset: where a write begins.
            data: the bytes of a write.
        """
        with self._lock:
            change = Change(self.tick(), apply, len(data), offset, data)
            node = self._nodes[path]
            node.changes.append(change)
            apply(node.now)
            return change

    def finish(self, change: Change) -> None:
        """Notes that the call that made a change has returned. A sync that begins now covers the change."""
        change.done = self.tick()

    def write(self, path: str, offset: int, data: bytes) -> None:
        """Records a write to a file, as begun and finished."""
        self.finish(self.change(path, lambda content: _write(content, offset, data), offset=offset, data=data))

    def truncate(self, path: str, size: int) -> None:
        """Records that a file was cut to `size` bytes, or extended to it with zeros."""
        self.finish(self.change(path, lambda content: _resize(content, size)))

    def created(self, path: str, *, is_directory: bool = False, sync_names: bool = False) -> None:
        """Records that a file or directory was made. `sync_names`: its first sync also syncs the directory that it is in."""
        folder, name = os.path.split(path)
        with self._lock:
            node = Node(is_directory, {} if is_directory else bytearray(), sync_names=sync_names)
            self._nodes[path] = node
            self.finish(self.change(folder, lambda names: names.update({name: node})))

    def unlinked(self, path: str) -> None:
        """Records that a file's name was removed from its directory."""
        folder, name = os.path.split(path)
        with self._lock:
            self._nodes.pop(path, None)
            self.finish(self.change(folder, lambda names: names.pop(name, None)))

    def renamed(self, source: str, target: str) -> None:
        """Records a rename within one directory, as a single change: after a power loss either the old name is there or the new one."""
        (folder, old), (other, new) = os.path.split(source), os.path.split(target)
        assert folder == other
        with self._lock:
            node = self._nodes[target] = self._nodes.pop(source)

            def rename(names: dict[str, Node]) -> None:
                names.pop(old, None)
                names[new] = node

            self.finish(self.change(folder, rename))

    @contextmanager
    def syncing(self, path: str) -> Iterator[None]:
        """Records a sync of a file or directory, which is made inside the block.

        The changes that were finished before the block began are durable after it.
        """
        with self._lock:
            node = self._nodes[path]
            began = self.tick()
        yield
        relative = os.path.relpath(path, self.root)
        if any(part in relative for part in self.lying):
            return
        with self._lock:
            now = self.tick()
            for change in node.changes:
                if change.done <= began:
                    change.durable = min(change.durable, now)
        if node.sync_names:
            node.sync_names = False
            with self.syncing(os.path.dirname(path)):
                pass

    def covers(self, path: object) -> str | None:
        """Returns the absolute path of a file if it is below the recorded directory; otherwise None."""
        if not isinstance(path, str | os.PathLike):
            return None
        absolute = os.path.abspath(os.fspath(path))  # type: ignore[type-var]
        return absolute if (absolute + "/").startswith(self.root + "/") else None

    def knows(self, path: str) -> bool:
        """Whether a file or directory is among those recorded."""
        return path in self._nodes

    # os.*

    def _shim(self, name: str) -> Callable[..., Any]:
        real, record = getattr(os, name), getattr(self, f"_os_{name}")
        return lambda *arguments, **options: record(real, *arguments, **options)

    def _os_open(self, real: Any, path: Any, flags: int, *arguments: Any, **options: Any) -> int:
        where = self.covers(path)
        fd: int = real(path, flags, *arguments, **options)
        if where is None or where.endswith("-shm"):
            return fd
        with self._lock:
            if not self.knows(where):
                self.created(where)
            elif flags & os.O_TRUNC:
                self.truncate(where, 0)
            self._fds[fd] = where
        return fd

    def _os_close(self, real: Any, fd: int) -> None:
        self._fds.pop(fd, None)
        real(fd)

    def _os_pwritev(self, real: Any, fd: int, buffers: Any, offset: int, *flags: int) -> int:
        data = b"".join(bytes(buffer) for buffer in buffers)
        return self._os_pwrite(lambda *_: real(fd, buffers, offset, *flags), fd, data, offset)

    def _os_pwrite(self, real: Any, fd: int, data: Any, offset: int) -> int:
        path = self._fds.get(fd)
        if path is None:
            return int(real(fd, data, offset))
        data = bytes(data)
        change = self.change(path, lambda content: _write(content, offset, data), offset=offset, data=data)
        count = int(real(fd, data, offset))
        assert count == len(data)
        self.finish(change)
        return count

    def _os_write(self, real: Any, fd: int, data: Any) -> int:
        path = self._fds.get(fd)
        if path is None:
            return int(real(fd, data))
        return self._os_pwrite(lambda *_: real(fd, data), fd, data, os.lseek(fd, 0, os.SEEK_CUR))

    def _os_ftruncate(self, real: Any, fd: int, size: int) -> None:
        real(fd, size)
        if path := self._fds.get(fd):
            self.truncate(path, size)

    def _os_posix_fallocate(self, real: Any, fd: int, offset: int, length: int) -> None:
        real(fd, offset, length)
        if path := self._fds.get(fd):
            self.finish(self.change(path, lambda content: _resize(content, max(len(content), offset + length))))

    def _os_fsync(self, real: Any, fd: int) -> None:
        path = self._fds.get(fd)
        if path is None:
            real(fd)
            return
        with self.syncing(path):
            real(fd)

    _os_fdatasync = _os_fsync

    def _os_replace(self, real: Any, source: Any, target: Any) -> None:
        covered, to = self.covers(source), self.covers(target)
        real(source, target)
        if covered and to:
            self.renamed(covered, to)

    _os_rename = _os_replace

    def _os_unlink(self, real: Any, path: Any, **options: Any) -> None:
        real(path, **options)
        covered = self.covers(path)
        if covered and self.knows(covered):
            self.unlinked(covered)

    _os_remove = _os_unlink

    def _os_mkdir(self, real: Any, path: Any, *arguments: Any, **options: Any) -> None:
        real(path, *arguments, **options)
        if covered := self.covers(path):
            self.created(covered, is_directory=True)

    _real_punch = staticmethod(slab._punch)

    def _punch(self, fd: int, offset: int, size: int) -> None:
        self._real_punch(fd, offset, size)
        if path := self._fds.get(fd):
            self.finish(self.change(path, lambda content: _zero(content, offset, size)))

    def _import(self, path: str) -> Node:
        """Reads a file, or a directory and all below it, as recording begins. This content counts as durable."""
        if os.path.isdir(path):
            names = {name: self._import(os.path.join(path, name)) for name in sorted(os.listdir(path)) if not name.endswith("-shm")}
            self._nodes[path] = Node(True, names)
        else:
            self._nodes[path] = Node(False, bytearray(Path(path).read_bytes()))
        return self._nodes[path]


_SHIMS = [name.removeprefix("_os_") for name in vars(Recorder) if name.startswith("_os_")]


def materialise(survivors: dict[str, bytes | None], directory: Path) -> None:
    """Writes the files that survived a power loss into a new directory."""
    directory.mkdir()
    for name, content in survivors.items():
        if content is None:
            (directory / name).mkdir()
        else:
            (directory / name).write_bytes(content)


# How much of the unsynced changes survived.


def nothing(changes: list[Change]) -> list[bool | set[int]]:
    """A choice for `Recorder.survivors`: no change survives that was not synced."""
    return [False] * len(changes)


def everything(changes: list[Change]) -> list[bool | set[int]]:
    """A choice for `Recorder.survivors`: every change survives that was begun."""
    return [True] * len(changes)


def prefix(rng: random.Random) -> Choice:
    """A choice for `Recorder.survivors`: of each file and directory the first changes survive, up to a random one.

    If the last of these is a write, it is torn: only its first sectors survive.
    """

    def choose(changes: list[Change]) -> list[bool | set[int]]:
        kept = rng.randint(0, len(changes))
        chosen: list[bool | set[int]] = [index < kept for index in range(len(changes))]
        if kept and changes[kept - 1].num_bytes:
            sectors = _sectors(changes[kept - 1])
            chosen[kept - 1] = set(sectors[: rng.randint(0, len(sectors))])
        return chosen

    return choose


def any_part(rng: random.Random) -> Choice:
    """A choice for `Recorder.survivors`: a random subset of the changes survives, and of a write perhaps only some sectors."""

    def choose(changes: list[Change]) -> list[bool | set[int]]:
        likely = rng.choice((0.1, 0.5, 0.9))
        return [_part(rng, change, likely) for change in changes]

    return choose


def _part(rng: random.Random, change: Change, likely: float) -> bool | set[int]:
    if not change.num_bytes or rng.random() < 0.7:
        return rng.random() < likely
    return {sector for sector in _sectors(change) if rng.random() < likely}


def _sectors(change: Change) -> range:
    return range(change.offset // SECTOR_BYTES, (change.offset + change.num_bytes - 1) // SECTOR_BYTES + 1)


def _survived(node: Node, moment: float, choose: Choice) -> Any:
    content = node.base.copy()
    begun = [change for change in node.changes if change.began <= moment]
    open_ones = [change for change in begun if change.durable > moment]
    chosen = dict(zip(open_ones, choose(open_ones), strict=True))
    for change in begun:
        kept = chosen.get(change, True)
        if kept is True:
            change.apply(content)
        elif kept:
            _write_sectors(content, change, kept)
    return content


def _write_sectors(content: bytearray, change: Change, sectors: set[int]) -> None:
    for sector in sorted(sectors):
        start = max(sector * SECTOR_BYTES, change.offset)
        end = min((sector + 1) * SECTOR_BYTES, change.offset + change.num_bytes)
        _write(content, start, change.data[start - change.offset : end - change.offset])


def _write(content: bytearray, offset: int, data: bytes) -> None:
    if len(content) < offset:
        content.extend(bytes(offset - len(content)))
    content[offset : offset + len(data)] = data


def _zero(content: bytearray, offset: int, size: int) -> None:
    size = max(0, min(size, len(content) - offset))
    content[offset : offset + size] = bytes(size)


def _resize(content: bytearray, size: int) -> None:
    del content[size:]
    content.extend(bytes(size - len(content)))


def _files(root: str) -> set[str]:
    return {str(path.relative_to(root)) for path in Path(root).rglob("*") if path.is_file()}


class _RecordingVFS(apsw.VFS):
    def __init__(self, recorder: Recorder) -> None:
        self.name, self.recorder = f"recording-{id(recorder)}", recorder
        super().__init__(self.name, "")

    def xOpen(self, name: Any, flags: list[int]) -> _RecordingFile:
        path = self.recorder.covers(name if isinstance(name, str) or name is None else name.filename())
        if path and not self.recorder.knows(path):
            journal = flags[0] & (apsw.SQLITE_OPEN_MAIN_JOURNAL | apsw.SQLITE_OPEN_WAL)
            self.recorder.created(path, sync_names=bool(journal))
        return _RecordingFile(self.recorder, path, name, flags)

    def xDelete(self, name: str, syncdir: bool) -> None:
        super().xDelete(name, syncdir)
        path = self.recorder.covers(name)
        if path and self.recorder.knows(path):
            self.recorder.unlinked(path)
            if syncdir:
                with self.recorder.syncing(os.path.dirname(path)):
                    pass


class _RecordingFile(apsw.VFSFile):
    def __init__(self, recorder: Recorder, path: str | None, name: Any, flags: list[int]) -> None:
        self._recorder, self._path = recorder, path
        super().__init__("", name, flags)

    def xWrite(self, data: bytes, offset: int) -> None:
        if self._path is None:
            super().xWrite(data, offset)
            return
        content = bytes(data)
        change = self._recorder.change(self._path, lambda now: _write(now, offset, content), offset=offset, data=content)
        super().xWrite(data, offset)
        self._recorder.finish(change)

    def xTruncate(self, size: int) -> None:
        super().xTruncate(size)
        if self._path:
            self._recorder.truncate(self._path, size)

    def xSync(self, flags: int) -> None:
        if self._path is None:
            super().xSync(flags)
            return
        with self._recorder.syncing(self._path):
            super().xSync(flags)


class Connection:
    """A stand-in for sqlite3.Connection on top of apsw, with the methods that the index uses.

    It checkpoints often, so that power losses hit checkpoints too.
    """

    CHECKPOINT_PAGES = 12

    def __init__(self, connection: apsw.Connection) -> None:
        self._db = connection
        connection.wal_autocheckpoint(self.CHECKPOINT_PAGES)

    @property
    def in_transaction(self) -> bool:
        return bool(self._db.in_transaction)

    def execute(self, statement: str, parameters: Any = ()) -> _Rows:
        rows = list(self._db.execute(statement, parameters))
        return _Rows(rows, self._db.last_insert_rowid())

    def executemany(self, statement: str, rows: Any) -> None:
        self._db.executemany(statement, rows)

    def executescript(self, statements: str) -> None:
        self._db.execute(statements)

    def close(self) -> None:
        self._db.close()


class _Rows:
    def __init__(self, rows: list[Any], lastrowid: int) -> None:
        self._rows, self.lastrowid = iter(rows), lastrowid

    def __iter__(self) -> Iterator[Any]:
        return self._rows

    def fetchone(self) -> Any:
        return next(self._rows, None)

    def fetchall(self) -> list[Any]:
        return list(self._rows)
