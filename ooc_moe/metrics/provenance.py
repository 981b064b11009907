"""Tells where a result comes from: command, commit, date, machine and versions.

The texts contain no directory of the machine, so that results can be published.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import shutil
import subprocess
import sys
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from ooc_moe.display.formats import format_size

PACKAGES = (
    *("ooc-moe", "grpcio", "protobuf", "numpy", "xxhash", "pyarrow", "ray", "lmdb", "rocksdict"),
    *("ale-py", "gymnasium", "stable-baselines3", "opencv-python-headless"),
)


def facts(data_dir: Path, *, command: str) -> dict[str, str]:
    """What a reader needs to judge or repeat a result: the command, commit, date, machine and versions, each as name -> text.

    Args:
        data_dir: a directory on the disk that was used; the facts name its file system and device.
        command: the command line that made the result.
    """
    return {
        "command": f"`{command}`",
        "commit": commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": f"{_processor()}, {os.cpu_count()} cores, {_total_memory()}, Linux {platform.release()}, {_disk(data_dir)}",
        "versions": f"Python {platform.python_version()}, {', '.join(_versions())}",
    }


def command_given() -> str:
    """The command line that started this process, as text. Absolute paths in it are cut to their last part."""
    arguments = [Path(argument).name if Path(argument).is_absolute() else argument for argument in sys.argv[1:]]
    return shlex.join(["ooc-moe", *arguments])


def commit() -> str:
    """The git commit of the running code, and whether files were changed since it. "unknown" if the code is not in a git checkout."""
    if shutil.which("git") is None:
        return "unknown"
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(here.parent), *arguments], capture_output=True, text=True).stdout.strip()

    if not git("ls-files", here.name):  # The package is installed, perhaps into another project's checkout.
        return "unknown"
    return git("rev-parse", "--short", "HEAD") + (" and changes not committed" if git("status", "--porcelain", "-uno") else "")


def available_memory_bytes() -> int:
    """The bytes of memory that can be allocated without swapping, as the kernel estimates them."""
    return _meminfo("MemAvailable")


def _meminfo(field: str) -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name == field:
            return int(rest.split()[0]) << 10
    raise OSError(f"/proc/meminfo has no {field}")


def _total_memory() -> str:
    return f"{format_size(_meminfo('MemTotal'))} of memory"


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def _disk(data_dir: Path) -> str:
    """The kind of file system and the device on which `data_dir` lies."""
    found = ("", "unknown", "unknown")
    for line in Path("/proc/self/mounts").read_text().splitlines():
        device, mount, kind, *_ = line.split()
        if data_dir.resolve().is_relative_to(mount) and len(mount) >= len(found[0]):
            found = (mount, device, kind)
    return f"{found[2]} on {found[1]}"


def _versions() -> list[str]:
    found = []
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{package} {importlib.metadata.version(package)}")
    if shutil.which("fio"):
        found.append(subprocess.run(["fio", "--version"], capture_output=True, text=True).stdout.strip())
    return found
