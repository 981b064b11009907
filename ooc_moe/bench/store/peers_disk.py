"""Peers of the store benchmark that store records on the disk: plain O_DIRECT, fio, LMDB, RocksDB.

Each function is a context manager that starts one peer, yields one or more benchmark cases to move the records (paths), and stops the peer
again; its docstring says what a run does. Writes make each record durable before the next one is written, and go into space that was
written before, as in a store in its steady state. Reads find nothing in the page cache: they use O_DIRECT, or their file is dropped from
the page cache before each run.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ooc_moe.bench.harness import TimedPath, WrongBytes
from ooc_moe.bench.store.records import Records
from ooc_moe_wire.errors import InvalidRequest, Unavailable

# As many threads as the daemon reads with.
READ_THREADS = 4


def check_direct_io(directory: Path) -> None:
    """Raises InvalidRequest if files in `directory` cannot be opened with O_DIRECT, because the page cache would be measured there."""
    path = directory / "direct"
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600))
    except OSError as error:
        raise InvalidRequest(f"data_dir: {directory} is on a file system without O_DIRECT ({error.strerror})") from error
    finally:
        with suppress(OSError):
            path.unlink()


@contextmanager
def raw_writes(records: Records, directory: Path) -> Iterator[list[TimedPath]]:
    """Yields the benchmark case (path) "raw": one thread writes a record with O_DIRECT, calls fdatasync, and goes on to the next record."""
    with _direct_file(records, directory) as fd:

        def run() -> None:
            for index in records.ids:
                _write(fd, records.body(index), index * records.record_bytes)
                os.fdatasync(fd)

        def check() -> None:
            _read_all(fd, records)
            records.check()

        yield [TimedPath(name="raw", run=run, check=check)]


@contextmanager
def raw_reads(records: Records, directory: Path) -> Iterator[list[TimedPath]]:
    """Yields the benchmark case (path) "raw": READ_THREADS threads read whole records with O_DIRECT into the caller's memory."""
    with _direct_file(records, directory) as fd, ThreadPoolExecutor(READ_THREADS) as threads:

        def read(index: int) -> None:
            _read(fd, records.into(index), index * records.record_bytes)

        def run() -> None:
            list(threads.map(read, records.ids))

        yield [TimedPath(name="raw", run=run, check=records.check)]


@contextmanager
def buffered_reads(records: Records, directory: Path) -> Iterator[list[TimedPath]]:
    """Yields the benchmark case (path) "buffered file": one thread reads an ordinary file.

    The file was dropped from the page cache before the run.
    """
    path = directory / "buffered"
    path.write_bytes(records.source.data)
    fd = os.open(path, os.O_RDONLY)
    try:

        def run() -> None:
            for index in records.ids:
                _read(fd, records.into(index), index * records.record_bytes)

        yield [TimedPath(name="buffered file", run=run, check=records.check, prepare=lambda: _drop_from_cache(path))]
    finally:
        os.close(fd)


@contextmanager
def fio_writes(records: Records, directory: Path) -> Iterator[list[TimedPath]]:
    """Yields the benchmark case (path) "fio": fio writes as `raw_writes` does. The time is the one that fio reports."""
    with _direct_file(records, directory) as fd:
        job = ["--rw=write", f"--size={records.num_bytes}", "--fdatasync=1", "--overwrite=1"]
        yield [_fio_path(records, directory, fd, job, "write")]


@contextmanager
def fio_reads(records: Records, directory: Path) -> Iterator[list[TimedPath]]:
    """Yields the benchmark case (path) "fio": fio reads as `raw_reads` does. The time is the one that fio reports."""
    with _direct_file(records, directory) as fd:
        part = records.num_bytes // READ_THREADS
        job = ["--rw=read", f"--size={part}", f"--offset_increment={part}", f"--numjobs={READ_THREADS}", "--thread", "--group_reporting"]
        yield [_fio_path(records, directory, fd, job, "read")]


def _fio_path(records: Records, directory: Path, fd: int, job: list[str], kind: str) -> TimedPath:
    command = [
        "fio",
        "--name=bench",
        f"--filename=/proc/{os.getpid()}/fd/{fd}",
        "--direct=1",
        "--ioengine=psync",
        f"--bs={records.record_bytes}",
        "--output-format=json",
        *job,
    ]
    moved = {"bytes": 0}

    def run() -> float:
        ran = subprocess.run(command, capture_output=True, text=True, cwd=directory)
        if ran.returncode:
            raise Unavailable(f"fio ended with {ran.returncode}: {ran.stderr.strip()}")
        result = json.loads(ran.stdout[ran.stdout.index("{") :])["jobs"][0][kind]
        moved["bytes"] = result["io_bytes"]
        return float(result["runtime"]) / 1000 or 1e-3  # fio counts in whole milliseconds.

    def check() -> None:
        if moved["bytes"] != records.num_bytes:
            raise WrongBytes(f"fio moved {moved['bytes']} of {records.num_bytes} bytes")

    return TimedPath(name="fio", run=run, check=check)


@contextmanager
def lmdb_writes(records: Records, directory: Path) -> Iterator[list[TimedPath]]:
    """Yields the benchmark case (path) "lmdb": one LMDB transaction for each record. Each commit is synced, which is LMDB's default."""
    with _lmdb(records, directory) as environment:

        def check() -> None:
            with environment.begin(buffers=True) as transaction:
                for index in records.ids:
                    records.check_body(index, transaction.get(_key(index)))

        yield [TimedPath(name="lmdb", run=lambda: _lmdb_put(environment, records), check=check)]


@contextmanager
def lmdb_reads(records: Records, directory: Path) -> Iterator[list[TimedPath]]:
    """Yields the benchmark case (path) "lmdb": one thread copies each record out of LMDB's memory map into the caller's memory.

    LMDB's file was dropped from the page cache before the run.
    """
    with _lmdb(records, directory) as environment:
        _lmdb_put(environment, records)
    import lmdb

    opened: list[Any] = []

    def prepare() -> None:
        while opened:
            opened.pop().close()
        _drop_from_cache(directory / "lmdb" / "data.mdb")
        opened.append(lmdb.open(str(directory / "lmdb"), readonly=True))

    def run() -> None:
        with opened[0].begin(buffers=True) as transaction:
            for index in records.ids:
                records.into(index)[:] = transaction.get(_key(index))

    yield [TimedPath(name="lmdb", run=run, check=records.check, prepare=prepare)]
    while opened:
        opened.pop().close()


@contextmanager
def _lmdb(records: Records, directory: Path) -> Iterator[Any]:
    import lmdb

    with lmdb.open(str(directory / "lmdb"), map_size=4 * records.num_bytes + (64 << 20)) as environment:
        yield environment


def _lmdb_put(environment: Any, records: Records) -> None:
    for index in records.ids:
        with environment.begin(write=True) as transaction:
            transaction.put(_key(index), records.body(index))


@contextmanager
def rocksdb_writes(records: Records, directory: Path) -> Iterator[list[TimedPath]]:
    """Yields the benchmark case (path) "rocksdb": one put with `sync` for each record.

    Compression is off, because it cannot shrink random bytes and costs time.
    """
    import rocksdict

    options = rocksdict.Options(raw_mode=True)
    options.set_compression_type(rocksdict.DBCompressionType.none())
    synced = rocksdict.WriteOptions()
    synced.sync = True
    database = rocksdict.Rdict(str(directory / "rocksdb"), options)
    # RocksDB takes only bytes. The copies are made here, so that they are not timed.
    bodies = [bytes(records.body(index)) for index in records.ids]
    try:

        def run() -> None:
            for index, body in enumerate(bodies):
                database.put(_key(index), body, synced)

        def check() -> None:
            for index in records.ids:
                records.check_body(index, database.get(_key(index)) or b"")

        yield [TimedPath(name="rocksdb", run=run, check=check)]
    finally:
        database.close()


def _key(index: int) -> bytes:
    return b"%08d" % index


@contextmanager
def _direct_file(records: Records, directory: Path) -> Iterator[int]:
    """Writes all records to a file in `directory` and yields its descriptor, open with O_DIRECT."""
    fd = os.open(directory / "records", os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
    try:
        os.posix_fallocate(fd, 0, records.num_bytes)
        for index in records.ids:
            _write(fd, records.body(index), index * records.record_bytes)
        os.fdatasync(fd)
        yield fd
    finally:
        os.close(fd)


def _write(fd: int, body: memoryview, offset: int) -> None:
    done = 0
    while done < len(body):
        done += os.pwritev(fd, [body[done:]], offset + done)


def _read(fd: int, into: memoryview, offset: int) -> None:
    done = 0
    while done < len(into):
        count = os.preadv(fd, [into[done:]], offset + done)
        if not count:
            raise WrongBytes(f"the file ends after {offset + done} bytes")
        done += count


def _read_all(fd: int, records: Records) -> None:
    for index in records.ids:
        _read(fd, records.into(index), index * records.record_bytes)


def _drop_from_cache(path: Path) -> None:
    """Drops a file from the page cache, so that its next read comes from the disk. Syncs it first, because unwritten pages would stay."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fdatasync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)
