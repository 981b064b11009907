"""Writes and reads traces. A trace records which experts a run asked its caches for, in order, and which game was played.

    ooc-moe train --games krull,boxing --trace krull.trace         # records one
    ooc-moe simulate krull.trace --hbm 8,16                        # replays it

An access is the use of one expert in one call of a layer. Acting, the forward passes of learning, and evaluation make accesses. Backward
passes and the optimizer use the same experts again, and are not recorded. (The cache counts its hits in the same way.) An access is written
as a key, the number expert x banks + bank. This is the detector's numbering, and it stays valid when a bank grows. If each layer has its
own bank, the bank's number is the layer's. Marks between the accesses say which game begins there, and whether it is evaluated or trained.

The file begins with 8 bytes of magic. Chunks follow, each with a head "<IIQ": kind, payload bytes, xxh3 of the payload seeded with the
kind.

    | magic, 8 bytes | head | info, JSON | head | accesses, uint32 each | head | mark, JSON | head | accesses | ...

The first chunk describes the run. A chunk is appended as a whole, so a killed writer leaves at most one incomplete chunk, at the end.
Readers skip it with a warning, and `TraceWriter.truncate` removes it. Ten million accesses need 40 MB.
"""

from __future__ import annotations

import json
import logging
import os
import struct
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from ooc_moe_wire.errors import InvalidRequest

log = logging.getLogger(__name__)

MAGIC = b"OOCTRAC\x01"  # Its last byte is the version.
CHUNK_ACCESSES = 1 << 16
_HEAD = struct.Struct("<IIQ")
_INFO, _ACCESSES, _MARK = range(3)


@dataclass(frozen=True, kw_only=True, slots=True)
class TraceInfo:
    """Describes the run whose accesses a trace records: its name, its banks, and the sizes of its experts and caches."""

    source: str
    """The run's name, or how the trace was made."""
    num_banks: int
    expert_bytes: int
    """Bytes of one expert in HBM."""
    hbm_experts: int | None = None
    """Capacity of the recorded caches, in experts of all banks together."""


@dataclass(frozen=True, slots=True)
class Mark:
    """A mark in a trace: from access number `position` on, `game` is played, in training or, if `evaluating`, in evaluation."""

    position: int
    game: str
    evaluating: bool


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of a trace in which one game is trained, or evaluated: the accesses from number `start` to before number `stop`."""

    game: str
    evaluating: bool
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Trace:
    """A whole trace in memory: the accesses to experts in order, and the marks that say which game the accesses belong to.

    Attributes:
        info: describes the recorded run.
        keys_A: the expert of each access as a key, expert x banks + bank, (accesses,) uint32.
        marks: the beginnings of games, in order of position. Accesses before the first mark belong to no game.
        torn_bytes: bytes at the end of the file that were skipped, because the writer was stopped while it wrote them.
    """

    info: TraceInfo
    keys_A: NDArray[np.uint32]
    marks: tuple[Mark, ...]
    torn_bytes: int = 0

    @property
    def num_experts(self) -> int:
        """The number of different experts in the trace."""
        return len(np.unique(self.keys_A))

    def spans(self) -> list[Span]:
        """Splits the trace into spans, each of one game in training or in evaluation, in order.

        No span is empty. No new span begins at a mark with the same game and the same kind (training or evaluation) as the mark before.
        """
        ends = [*self.marks, Mark(len(self.keys_A), "", False)]
        if ends[0].position:
            ends.insert(0, Mark(0, "", False))
        spans: list[Span] = []
        for mark, following in pairwise(ends):
            if mark.position == following.position:
                continue
            if spans and (spans[-1].game, spans[-1].evaluating) == (mark.game, mark.evaluating):
                spans[-1] = Span(mark.game, mark.evaluating, spans[-1].start, following.position)
            else:
                spans.append(Span(mark.game, mark.evaluating, mark.position, following.position))
        return spans


class TraceWriter:
    """Appends accesses and marks to a trace file. Only one thread may use it.

    Args:
        path: a new file, or an existing trace to be continued (see `truncate`).
        info: describes the run; written only to a new file.

    Raises:
        InvalidRequest: the file cannot be created, or is not a trace.
    """

    def __init__(self, path: Path, info: TraceInfo) -> None:
        self._path, self._num_banks = path, info.num_banks
        self._buffer = array("I")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("r+b" if path.exists() else "x+b")
        except OSError as error:
            raise InvalidRequest(f"trace: {path} cannot be written: {error.strerror}") from error
        if self._file.seek(0, os.SEEK_END):
            self._file.seek(0)
            _check_magic(self._file.read(len(MAGIC)), path)
            self._file.seek(0, os.SEEK_END)
        else:
            self._file.write(MAGIC)
            self._append(_INFO, _json(asdict(info)))

    def access(self, bank: int, experts: Sequence[int]) -> None:
        """Records that the cache of bank number `bank` was asked for these experts: one access for each."""
        num_banks = self._num_banks
        self._buffer.extend([expert * num_banks + bank for expert in experts])
        if len(self._buffer) >= CHUNK_ACCESSES:
            self._write_accesses()

    def mark(self, game: str, *, evaluating: bool) -> None:
        """Records that `game` is played from here on: in evaluation if `evaluating`, else in training."""
        self._write_accesses()
        self._append(_MARK, _json({"game": game, "evaluating": evaluating}))

    def position(self) -> int:
        """Makes all accesses so far durable on disk, and returns the file's length in bytes.

        A checkpoint stores this length, so that a resumed run can `truncate` the file to it.
        """
        self._write_accesses()
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()

    def truncate(self, position: int) -> None:
        """Removes what was recorded after a checkpoint, incomplete chunks included.

        These are all bytes after `position`, the length of the file that `position()` returned for the checkpoint.

        Raises:
            InvalidRequest: the file is shorter than `position`.
        """
        if (length := self._file.seek(0, os.SEEK_END)) < position:
            raise InvalidRequest(f"trace: {self._path} has {length} bytes, but the checkpoint was made at {position}; it was cut or moved")
        self._buffer = array("I")
        self._file.truncate(position)
        self._file.seek(position)

    def close(self) -> None:
        """Writes the accesses that are still buffered, and closes the file."""
        self._write_accesses()
        self._file.close()

    def _write_accesses(self) -> None:
        if self._buffer:
            self._append(_ACCESSES, np.asarray(self._buffer, dtype="<u4").tobytes())
            self._buffer = array("I")

    def _append(self, kind: int, payload: bytes) -> None:
        self._file.write(_HEAD.pack(kind, len(payload), _checksum(kind, payload)) + payload)
        self._file.flush()


def check_new(path: Path) -> None:
    """Raises InvalidRequest if the file `path` exists already, so that a new trace does not continue an old one."""
    if path.exists():
        raise InvalidRequest(f"trace: {path} exists; name a new file, or delete it first")


def read_trace(path: Path) -> Trace:
    """Reads a whole trace from a file.

    An incomplete end, left by a writer that was killed, is skipped with a warning in the log; `Trace.torn_bytes` is its length.

    Raises:
        InvalidRequest: the file does not exist, is not a trace, has another version, or is damaged before its end.
    """
    try:
        content = memoryview(path.read_bytes())
    except OSError as error:
        raise InvalidRequest(f"trace: {path} cannot be read: {error.strerror}") from error
    _check_magic(bytes(content[: len(MAGIC)]), path)
    info: TraceInfo | None = None
    pieces: list[NDArray[np.uint32]] = []
    marks: list[Mark] = []
    num_accesses, end = 0, len(MAGIC)
    for kind, payload in _chunks(content, path):
        end += _HEAD.size + len(payload)
        if kind == _ACCESSES:
            pieces.append(np.frombuffer(payload, dtype="<u4"))
            num_accesses += len(pieces[-1])
        elif kind == _MARK:
            marks.append(Mark(num_accesses, **json.loads(bytes(payload))))
        else:
            info = TraceInfo(**json.loads(bytes(payload)))
    if info is None:
        raise InvalidRequest(f"trace: {path} is torn in its first chunk; nothing was recorded")
    if torn := len(content) - end:
        log.warning("%s: %d bytes at the end are skipped, because the writer was stopped while it wrote them", path, torn)
    keys = np.concatenate(pieces) if pieces else np.empty(0, np.uint32)
    return Trace(info=info, keys_A=keys, marks=tuple(marks), torn_bytes=torn)


def write_trace(path: Path, trace: Trace) -> None:
    """Writes a whole trace to a new file. Raises InvalidRequest if the file exists already."""
    check_new(path)
    writer = TraceWriter(path, trace.info)
    for span in trace.spans():
        writer.mark(span.game, evaluating=span.evaluating)
        for start in range(span.start, span.stop, CHUNK_ACCESSES):
            writer._append(_ACCESSES, trace.keys_A[start : min(start + CHUNK_ACCESSES, span.stop)].astype("<u4").tobytes())
    writer.close()


def _chunks(content: memoryview, path: Path) -> Iterator[tuple[int, memoryview]]:
    """Yields the kind and payload of each chunk of a trace file, up to its end or to an incomplete last chunk."""
    start = len(MAGIC)
    while start + _HEAD.size <= len(content):
        kind, length, checksum = _HEAD.unpack_from(content, start)
        payload = content[start + _HEAD.size : start + _HEAD.size + length]
        end = start + _HEAD.size + length
        if end > len(content):
            return
        if kind > _MARK or _checksum(kind, payload) != checksum:
            if end == len(content):
                return
            raise InvalidRequest(f"trace: {path} is damaged at byte {start}: the chunk's checksum does not match")
        yield kind, payload
        start = end


def _check_magic(found: bytes, path: Path) -> None:
    if found[:-1] != MAGIC[:-1]:
        raise InvalidRequest(
            f"trace: {path} is not a trace; record one with ooc-moe train --trace, or make one with ooc-moe simulate --make"
        )
    if found != MAGIC:
        raise InvalidRequest(f"trace: {path} has version {found[-1]}, this program reads {MAGIC[-1]}")


def _checksum(kind: int, payload: bytes | memoryview) -> int:
    return xxhash.xxh3_64_intdigest(payload, seed=kind)


def _json(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields).encode()
