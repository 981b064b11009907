"""The comments of the .proto files suffice to write a client: `stranger.py` and `stranger_on_the_host.py` are two."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

STRANGER, ON_THE_HOST = (Path(__file__).with_name(name) for name in ("stranger.py", "stranger_on_the_host.py"))
FACES = ("ooc_moe", "ooc_moe_client", "ooc_moe_server", "ooc_moe_wire")
# Ends the program when it imports a module of this project, directly or through another.
BLOCKED = f"""
import runpy, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {FACES!r}:
            raise ModuleNotFoundError(name + " is blocked", name=name)

sys.meta_path.insert(0, Blocker())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", BLOCKED, program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=program.parent)


@pytest.mark.parametrize("program", [STRANGER, ON_THE_HOST], ids=lambda program: program.stem)
def test_a_stranger_creates_reads_pushes_and_is_refused_as_the_comments_say(daemon, program):
    ended = run(program, daemon.target)
    assert (ended.returncode, ended.stdout) == (0, "all as specified\n"), ended.stderr


def test_the_strangers_import_nothing_of_ours():
    imported = set()
    for node in [node for program in (STRANGER, ON_THE_HOST) for node in ast.walk(ast.parse(program.read_text()))]:
        imported |= {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
        imported |= {node.module} if isinstance(node, ast.ImportFrom) else set()
    others = {name.partition(".")[0] for name in imported} - sys.stdlib_module_names
    assert others == {"grpc", "grpc_reflection", "google", "numpy", "stranger", "xxhash"}


def test_the_blocker_blocks(tmp_path):
    program = tmp_path / "friend.py"
    for face in FACES:
        program.write_text(f"import {face}\n")
        ended = run(program)
        assert ended.returncode != 0
        assert f"{face} is blocked" in ended.stderr
