"""A storage host has the base install: no torch, no gymnasium, no ale-py. Here whatever else is installed is blocked.

The daemon runs there, and so do the commands that ask it (stats, bank, snapshot) and those that only reckon (simulate, plan, study's list).
Any other says which extra is missing.
"""

import json
import signal
import subprocess
import sys
from importlib.metadata import distribution, packages_distributions

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

BLOCK = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

sys.meta_path.insert(0, Blocker())
"""


def brought_in(name: str, seen: set[str]) -> set[str]:
    """The distributions that installing `name` without extras brings in, itself included."""
    if name not in seen:
        seen.add(name)
        for requirement in map(Requirement, distribution(name).requires or []):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                brought_in(canonicalize_name(requirement.name), seen)
    return seen


def blocked() -> set[str]:
    """The modules that are installed here but not on a storage host."""
    base = brought_in("ooc-moe", set())
    return {module for module, owners in packages_distributions().items() if not base & set(map(canonicalize_name, owners))}


def python(code: str) -> list[str]:
    return [sys.executable, "-c", f"BLOCKED = {blocked()!r}\n{BLOCK}\n{code}"]


def test_the_blocker_blocks():
    assert {"torch", "gymnasium", "ale_py", "matplotlib", "psutil"} <= blocked()
    assert {"grpc", "numpy", "google", "tyro", "ooc_moe_wire"} & blocked() == set()
    run = subprocess.run(python("import torch"), capture_output=True, text=True, check=False)
    assert "torch is blocked" in run.stderr


def test_every_module_of_the_daemon_and_the_wire_imports_without_torch():
    code = """
import importlib, pkgutil, ooc_moe_server, ooc_moe_wire
names = [module.name for package in (ooc_moe_server, ooc_moe_wire)
         for module in pkgutil.walk_packages(package.__path__, package.__name__ + ".") if not module.name.endswith("__main__")]
for name in names:
    importlib.import_module(name)
assert {"ooc_moe_server.daemon.cli", "ooc_moe_wire.codec", "ooc_moe_wire.v1.expert_pb2_grpc"} <= set(names), names
"""
    run = subprocess.run(python(code), capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_a_command_that_needs_an_extra_says_which_in_one_line(tmp_path):
    commands = (
        "train --games pixel/catch",
        "eval r",
        "report r",
        "branch r s",
        "study synthetic --tables-only",
        "bench cache",
        "bench learning",
    )
    code = f"""
from ooc_moe.cli.main import main
for command in {commands!r}:
    try:
        main(command.split())
    except SystemExit as end:
        assert end.code == 2
"""
    run = subprocess.run(python(code), capture_output=True, text=True, check=False, cwd=tmp_path)
    lines = run.stderr.splitlines()
    assert len(lines) == len(commands), run.stderr
    assert all("is not installed" in line and "pip install 'ooc-moe[train]'" in line for line in lines), run.stderr


def test_a_run_is_planned_and_studies_are_listed_without_torch():
    code = """
from ooc_moe.cli.main import main
for command in (["plan", "--preset", "demo"], ["study"]):
    try:
        main(command)
    except SystemExit as end:
        assert end.code == 0
"""
    run = subprocess.run(python(code), capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "a switch moves" in run.stdout
    assert "synthetic-twins" in run.stdout


def test_the_daemon_starts_serves_and_stops_without_torch(tmp_path):
    socket = f"unix:{tmp_path}/daemon.sock"
    flags = ["--data-dir", str(tmp_path / "store"), "--dram-bytes", "16MiB", "--listen", socket]
    daemon = subprocess.Popen([*python("from ooc_moe_server.daemon.cli import main; main()"), *flags])
    try:
        with grpc.insecure_channel(socket) as channel:
            answers = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=30, wait_for_ready=True)
            serving = health_pb2.HealthCheckResponse.SERVING
            assert next(answer.status for answer in answers if answer.status == serving) == serving
        statistics = python(f"from ooc_moe.cli.main import main; main(['stats', '--json', '--store', {socket!r}])")
        assert "uptime_s" in json.loads(subprocess.run(statistics, capture_output=True, text=True, check=True).stdout)
        daemon.send_signal(signal.SIGTERM)
        assert daemon.wait(timeout=60) == 0
    finally:
        daemon.kill()
