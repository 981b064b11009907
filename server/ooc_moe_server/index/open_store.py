"""Opens what a data directory holds beside its slabs: index, COMMITTED, manifests and reserve, each trusting the ones before it.

Synchronous, for the index's thread.
"""

from __future__ import annotations

import logging
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
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
    """An open store without its slabs."""

    index: Index
    catalog: Catalog
    manifests: Manifests
    reserve: Reserve


def open_files(data_dir: Path) -> StoreFiles:
    """Opens them, or makes them. Raises CorruptRecord (the index cannot be trusted), TierFull, Internal."""
    reserve = Reserve(data_dir)
    try:
        index = reserve.run(lambda: Index(data_dir / "index.sqlite"))
        catalog = reserve.run(index.load)
    except (OSError, sqlite3.Error) as error:
        raise store_error(error, what="index") from error
    manifests = Manifests(data_dir, base_version=catalog.next_version)
    try:
        reserve.run(lambda: manifests.reconcile(catalog))
    except OSError as error:  # The index is sound, and the manifests of the last start still say most of it.
        log.error("manifests were not written, to be tried again with the next change: %s", error)
        manifests.owe_all(catalog)
    return StoreFiles(index=index, catalog=catalog, manifests=manifests, reserve=reserve)


@contextmanager
def copied_index(data_dir: Path) -> Iterator[Path]:
    """A copy of the index's files to read, for SQLite changes what it opens. CorruptRecord raised inside names the original."""
    with tempfile.TemporaryDirectory(prefix="ooc-moe-") as directory:
        for name in ("index.sqlite", "index.sqlite-wal", "COMMITTED"):
            if (data_dir / name).exists():
                shutil.copyfile(data_dir / name, Path(directory) / name)
        try:
            yield Path(directory) / "index.sqlite"
        except CorruptRecord as error:
            raise CorruptRecord(str(error).replace(directory, str(data_dir))) from error
