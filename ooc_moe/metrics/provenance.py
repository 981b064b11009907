"""What a benchmark ran on: the machine, the versions, the commit. Names no path of the machine."""

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
    """What a reader needs to judge or repeat a result."""
    return {
        "command": f"`{command}`",
        "commit": commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": f"{_processor()}, {os.cpu_count()} cores, {_total_memory()}, Linux {platform.release()}, {_disk(data_dir)}",
        "versions": f"Python {platform.python_version()}, {', '.join(_versions())}",
    }


def command_given() -> str:
    """The command line of `ooc-moe`, without places of this machine."""
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    return shlex.join(["ooc-moe", *words])


def commit() -> str:
    """The commit that this code is at, and whether it was changed since; "unknown" where it is no checkout."""
    if shutil.which("git") is None:
        return "unknown"
    here = Path(__file__).resolve()

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(here.parent), *words], capture_output=True, text=True).stdout.strip()

    if not git("ls-files", here.name):  # Installed, if anything, beside somebody else's work.
        return "unknown"
    return git("rev-parse", "--short", "HEAD") + (" and changes not committed" if git("status", "--porcelain", "-uno") else "")


def available_memory_bytes() -> int:
    """What the kernel says can be had without swapping."""
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
    """The file system that holds `data_dir`, and its device."""
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
