"""Writes, removes and renames files so that a power cut leaves each file either complete or absent, never half written.

Calls nothing but `os`, so that a test can replace the disk with a simulated one.
"""

from __future__ import annotations

import os
from pathlib import Path


def write_durably(path: Path, content: bytes) -> None:
    """Creates or replaces the file at `path` in one step. After a crash it has either its old content or all of `content`.

    Raises OSError.
    """
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
    """Removes a file if it exists. When the call returns, the removal survives a power cut. Raises OSError."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        return
    sync_directory(path.parent)


def move_aside(path: Path, tag: str = "damaged") -> Path:
    """Renames a file to `<name>.<tag>-<n>`, with the first number that no file has yet, so that nothing is overwritten.

    Returns the new path. Raises OSError.
    """
    number = 1
    while (aside := path.with_name(f"{path.name}.{tag}-{number}")).exists():
        number += 1
    os.rename(path, aside)
    sync_directory(path.parent)
    return aside


def sync_directory(path: Path) -> None:
    """Syncs a directory to the disk, so that files that were created, renamed or removed in it stay so after a power cut.

    Raises OSError.
    """
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
