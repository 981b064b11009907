"""Files that are whole or not there, also after a power cut.

Only `os` calls, so that a test can stand in for the disk. Knows nothing of what the files hold.
"""

from __future__ import annotations

import os
from pathlib import Path

from ooc_moe_server.nvme.slab import sync_directory


def write_durably(path: Path, content: bytes) -> None:
    """Makes or replaces a file in one step; what was there stays until then. Raises OSError."""
    temporary = path.with_name(path.name + ".new")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    try:
        rest = memoryview(content)
        while rest:
            rest = rest[os.write(fd, rest) :]
        os.fsync(fd)
    finally:
        os.close(fd)
    os.replace(temporary, path)
    sync_directory(path.parent)


def remove_durably(path: Path) -> None:
    """Removes a file if it is there. Raises OSError."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        return
    sync_directory(path.parent)


def move_aside(path: Path, tag: str = "damaged") -> Path:
    """Renames a file to the first free `<name>.<tag>-<n>`; nothing is ever lost by it. Returns the new path. Raises OSError."""
    number = 1
    while (aside := path.with_name(f"{path.name}.{tag}-{number}")).exists():
        number += 1
    os.rename(path, aside)
    sync_directory(path.parent)
    return aside
