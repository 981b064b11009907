"""The data directory of a daemon: what it contains, and the lock that lets only one daemon use it at a time.

FORMAT                names the format in which all other files are written
LOCK                  locked while a daemon, `rebuild` or `verify` runs
daemon.json           the process id of the running daemon, and its addresses
index.sqlite          which banks, records and snapshots exist (index/database.py)
COMMITTED             the number of the index's last transaction; shows whether the index lost transactions (index/commit_witness.py)
slabs/                the records of experts (nvme/slab.py)
banks/, snapshots/    JSON copies of the index (manifests), from which `rebuild` makes a lost index anew (index/manifests.py)
RESERVE               a file that keeps disk space for when the disk is full (nvme/reserve.py)
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
    """Locks a data directory while the context is open. Creates the directory if it does not exist.

    Raises:
        InvalidRequest: another daemon has locked it, its files are not of this format, or it cannot be used.
    """
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
    """Writes the file daemon.json, which tells other programs the daemon's process id and addresses. Nobody sees a half-written file."""
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
