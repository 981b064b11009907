"""The README is short, and all that it tells people to type works."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.project.pages import PAGES, blocks, code

README = PAGES["README.md"]
ADDRESS = "127.0.0.1:50051"
# The commands in its sentences; the last one takes hours, and tests/ooc_moe/study runs smaller ones.
RESUME, PLAN, STUDY = "ooc-moe train --resume --name first", "ooc-moe plan", "ooc-moe study synthetic"
MODULES = {"ooc-moe": "ooc_moe.cli.main", "ooc-moe-server": "ooc_moe_server.daemon.cli"}


def test_it_has_at_most_150_lines():
    assert len(README.splitlines()) <= 150


def test_both_commands_stand_in_the_first_25_lines():
    beginning = README.splitlines()[:25]
    for command in ("make demo", "make test"):
        assert any(line.strip().startswith(command) for line in beginning)


def test_every_make_target_that_is_named_exists():
    targets = re.findall(r"^([a-z]+):", PAGES["Makefile"], flags=re.MULTILINE)
    written = [line for page in PAGES.values() for line in code(page)]
    written += [match for page in PAGES.values() for match in re.findall(r"`(make [^`]*)`", page)]
    named = {match[1] for line in written if (match := re.match(r"make ([a-z]+)", line))}
    assert named >= {"demo", "test", "docs"}
    assert named <= set(targets)


def test_the_ten_lines_run_and_their_loss_falls(capsys: pytest.CaptureFixture[str]):
    (block,) = blocks(README, "python")
    statements = [line for line in block.splitlines() if line.strip() and not re.match(r"#|import|from", line)]
    assert len(statements) <= 15
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", capsys.readouterr().out)]
    assert len(losses) == 20
    assert losses[-1] < losses[0] / 2


@pytest.fixture
def address() -> str:
    """A free address, which stands in for the README's."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{listening.getsockname()[1]}"


def program(line: str, address: str) -> list[str]:
    """A command of the README, run by this interpreter and with a free address."""
    name, *words = shlex.split(line.replace(ADDRESS, address), comments=True)
    return [sys.executable, "-c", f"from {MODULES[name]} import main; main()", *words]


@pytest.fixture
def daemon(tmp_path: Path, address: str) -> Iterator[None]:
    """The README's daemon, while it is ready."""
    (line,) = (line for line in code(README) if line.startswith("ooc-moe-server"))
    process = subprocess.Popen(program(line, address), cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    ready = tmp_path / "store" / "daemon.json"
    while not ready.exists() and process.poll() is None:
        time.sleep(0.02)
    assert json.loads(ready.read_text())["addresses"] == [address], process.stderr.read()
    yield
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    process.stderr.close()


def run(line: str, directory: Path, address: str) -> str:
    """Runs a command of the README, and returns what it printed."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "160"}
    ran = subprocess.run(program(line, address), cwd=directory, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_the_commands_in_its_sentences_are_those_that_run_here():
    assert set(re.findall(r"`(ooc-moe(?:-server)? [^`]*)`", README)) == {RESUME, PLAN, STUDY}


def test_plan_runs_as_shown(tmp_path: Path, address: str):
    assert "experts" in run(PLAN, tmp_path, address)


@pytest.mark.usefixtures("daemon")
def test_a_daemon_and_a_trainer_work_as_shown(tmp_path: Path, address: str):
    (shown,) = (block for block in blocks(README, "") if "ooc-moe train" in block)
    printed = "".join(run(line, tmp_path, address) for line in shown.splitlines())
    assert "first/experts" in printed
    report = tmp_path / "runs" / "first" / "report" / "index.html"
    assert report.exists()
    report.unlink()
    run(RESUME, tmp_path, address)
    assert report.exists()


def test_the_licence_of_ale_py_is_told():
    assert re.search(r"ale-py[^.]*GPL-2\.0", README)
