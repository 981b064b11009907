"""The data directory: one daemon at a time, one format.

FORMAT        what the rest is written in
LOCK          held while a daemon runs, or `rebuild` or `verify`
daemon.json   who runs, and where it listens
index.sqlite  what is committed (index.py)             COMMITTED   up to where (committed.py)
slabs/        the records (nvme.py)                    RESERVE     room for a full disk (reserve.py)
banks/  snapshots/  what exists, for a rebuild (manifests.py)
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ooc_moe_server.atomic_files import write_durably
from ooc_moe_server.nvme.reserve import Reserve
from ooc_moe_wire.errors import InvalidRequest

FORMAT = "ooc-moe store 2\n"


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Makes the directory if need be and holds it. Raises InvalidRequest when it is held, foreign, or cannot be used."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = os.open(path / "LOCK", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise InvalidRequest(f"data_dir: {path}: {error.strerror}") from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InvalidRequest(f"data_dir: {path} is held by another daemon") from error
        _check_format(path)
        (path / "daemon.json").unlink(missing_ok=True)
        Reserve(path).make_room()
        yield
        (path / "daemon.json").unlink(missing_ok=True)
    finally:
        os.close(lock)


def announce(path: Path, addresses: Sequence[str]) -> None:
    """Writes daemon.json in one step: the process id and the addresses that are bound."""
    temporary = path / "daemon.json.new"
    temporary.write_text(json.dumps({"pid": os.getpid(), "addresses": list(addresses)}))
    temporary.replace(path / "daemon.json")


def _check_format(path: Path) -> None:
    marker = path / "FORMAT"
    if marker.exists():
        found = marker.read_text(errors="replace")
        if found != FORMAT:
            raise InvalidRequest(f"data_dir: {path} has format {found.strip()[:40]!r}, this daemon knows {FORMAT.strip()!r}")
    elif others := sorted(entry.name for entry in path.iterdir() if entry.name not in ("LOCK", "FORMAT.new")):
        raise InvalidRequest(f"data_dir: {path} is not a store (no FORMAT), but holds {others[0]!r}")
    else:
        write_durably(marker, FORMAT.encode())
