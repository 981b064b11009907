"""Fixtures of the torture tests: a seed that a failure shows, a directory in memory, small store files, and result files.

python -m pytest tests/torture/test_kills.py -m slow --results tests/bench/results
"""

from __future__ import annotations

import os
import platform
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.torture.workload import ram_directory, small_files

Report = Callable[[str, str, Mapping[str, object]], None]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("torture")
    group.addoption("--results", metavar="DIR", help="write what the slow torture tests counted to DIR/torture_*.md")
    group.addoption("--torture-seed", type=int, metavar="N", help="repeat a run's random choices (not its timing)")


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A random seed, different in every run unless --torture-seed gives one; pytest shows it with a failure."""
    given = request.config.getoption("--torture-seed", default=None)
    chosen = random.SystemRandom().randrange(1 << 32) if given is None else int(given)
    print(f"repeat with --torture-seed {chosen}")
    return chosen


@pytest.fixture
def ram_path() -> Iterator[Path]:
    """A new directory for the test, in memory if the machine allows it; see `ram_directory`."""
    with ram_directory() as path:
        yield path


@pytest.fixture
def with_small_files() -> Iterator[None]:
    """Makes the engine's files grow and shrink in small steps during the test; see `small_files`."""
    with small_files():
        yield


@pytest.fixture
def report(request: pytest.FixtureRequest) -> Report:
    """A function `report(name, command, counts)` that prints the counts; with --results it also writes them to DIR/torture_<name>.md."""
    directory = request.config.getoption("--results", default=None)

    def write(name: str, command: str, counts: Mapping[str, object]) -> None:
        rows = {**counts, "commit": _commit(), "machine": _machine(), "versions": _versions()}
        table = "\n".join(["| what | |", "|---|---|", *(f"| {what} | {value} |" for what, value in rows.items())])
        print(table)
        if directory is not None:
            path = Path(directory) / f"torture_{name}.md"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"# Torture: {name.replace('_', ' ')}\n\n    {command}\n\n{table}\n")

    return write


def _commit() -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=False).stdout.strip()

    changed = (
        " (with uncommitted changes)" if git("status", "--porcelain", "--untracked-files=no", "--", "../../server", "../../client") else ""
    )
    return (git("rev-parse", "--short", "HEAD") or "unknown") + changed


def _machine() -> str:
    cpu = next((line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "")
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{os.cpu_count()} cores {cpu or platform.machine()}, {memory_gib:.0f} GiB, Linux {platform.release()}"


def _versions() -> str:
    return f"Python {sys.version.split()[0]}, grpcio {version('grpcio')}, protobuf {version('protobuf')}"
