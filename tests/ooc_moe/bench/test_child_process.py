"""A child process of a benchmark reports when it is ready, and is gone after the block that started it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import psutil
import pytest

from ooc_moe.bench.child_process import child_process
from ooc_moe_wire.errors import Unavailable

_CHILD = """
import os, signal
from ooc_moe.bench.child_process import report_ready, run_as_child

def role(word, *rest):
    if word == "fail":
        raise SystemExit(3)
    report_ready(f"{word} {os.getpid()} {len(rest)}")
    signal.pause()

run_as_child(role)
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module that a child process can run."""
    (tmp_path / "a_benchs_child.py").write_text(_CHILD)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *filter(None, sys.path)]))
    return "a_benchs_child"


def test_a_child_gets_its_arguments_reports_and_ends_with_the_block(module: str) -> None:
    with child_process(module, "hello", 1, 2) as reported:
        word, pid, number = reported.split()
        assert (word, number) == ("hello", "2")
        assert psutil.pid_exists(int(pid))
    assert not psutil.pid_exists(int(pid))


def test_a_child_that_ends_before_it_is_ready_is_an_error_that_names_it(module: str) -> None:
    with pytest.raises(Unavailable, match="a_benchs_child ended with 3 before it was ready"), child_process(module, "fail"):
        pass
