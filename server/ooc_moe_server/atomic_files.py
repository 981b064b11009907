"""Files that are complete or absent, even after a power cut.

Calls nothing but `os`, so that a test can stand in for the disk.
"""

from __future__ import annotations

import os
from pathlib import Path


def write_durably(path: Path, content: bytes) -> None:
    """Creates or replaces a file in one step: a crash leaves the old content or the new one. Raises OSError."""
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
    """Removes a file if it exists. Raises OSError."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        return
    sync_directory(path.parent)


def move_aside(path: Path, tag: str = "damaged") -> Path:
    """Renames a file to the first free `<name>.<tag>-<n>`, and overwrites nothing. Returns the new path. Raises OSError."""
    number = 1
    while (aside := path.with_name(f"{path.name}.{tag}-{number}")).exists():
        number += 1
    os.rename(path, aside)
    sync_directory(path.parent)
    return aside


def sync_directory(path: Path) -> None:
    """Makes the names in a directory durable. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
