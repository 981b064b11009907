"""Opens the files of a data directory except its slabs: the reserve, the index with COMMITTED, and the manifests, in this order.

The slabs hold the records of experts. The reserve keeps disk space for when the disk is full. COMMITTED holds the number of the index's
last commit. The manifests are JSON copies of the index.

The functions of this module block; the daemon runs them on the index's thread.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ooc_moe_server.catalog.catalog import Catalog
from ooc_moe_server.index.database import Index
from ooc_moe_server.index.index_thread import store_error
from ooc_moe_server.index.manifests import Manifests
from ooc_moe_server.nvme.reserve import Reserve
from ooc_moe_wire.errors import CorruptRecord

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreFiles:
    """The open files of a store except its slabs (the files of records), and the catalog of banks that was read from the index."""

    index: Index
    catalog: Catalog
    manifests: Manifests
    reserve: Reserve


def open_files(data_dir: Path) -> StoreFiles:
    """Opens or creates the files of a data directory except its slabs. Reads the catalog and brings the manifests up to date.

    Raises:
        CorruptRecord: the index cannot be trusted.
        TierFull, Internal: the disk is full, or a file cannot be used.
    """
    reserve = Reserve(data_dir)
    try:
        index = reserve.run(lambda: Index(data_dir / "index.sqlite"))
        catalog = reserve.run(index.load)
    except (OSError, sqlite3.Error) as error:
        raise store_error(error, what="index") from error
    manifests = Manifests(data_dir, base_version=catalog.next_version)
    try:
        reserve.run(lambda: manifests.reconcile(catalog))
    except OSError as error:  # The store can start: the index is sound, and the old manifests still serve a rebuild.
        log.error("manifests were not written; the next change tries again: %s", error)
        manifests.owe_all(catalog)
    return StoreFiles(index=index, catalog=catalog, manifests=manifests, reserve=reserve)


def read_copied_index(data_dir: Path) -> Catalog:
    """Reads and checks the index of a data directory, and returns its catalog.

    Works on a copy of the index, so that no file in the directory is changed.

    Raises:
        CorruptRecord: the index cannot be trusted.
        OSError: a file cannot be read.
    """
    with _copied_index(data_dir) as path, contextlib.closing(Index(path)) as index:
        return index.read()


@contextlib.contextmanager
def _copied_index(data_dir: Path) -> Iterator[Path]:
    """Copies the files of the index to a temporary directory and yields the copy's path, because SQLite changes the files that it opens.

    The message of a CorruptRecord that is raised inside the context names the original directory instead of the temporary one.
    """
    with tempfile.TemporaryDirectory(prefix="ooc-moe-") as directory:
        for name in ("index.sqlite", "index.sqlite-wal", "COMMITTED"):
            if (data_dir / name).exists():
                shutil.copyfile(data_dir / name, Path(directory) / name)
        try:
            yield Path(directory) / "index.sqlite"
        except CorruptRecord as error:
            raise CorruptRecord(str(error).replace(directory, str(data_dir))) from error
