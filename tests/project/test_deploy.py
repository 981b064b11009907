import re
import shutil
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
UNIT = DEPLOY / "ooc-moe-server.service"
INSTALLED = "/opt/ooc-moe/bin/ooc-moe-server"


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile as (instruction, rest) in order."""
    lines = re.sub(r"\\\n", " ", (DEPLOY / "Dockerfile").read_text()).splitlines()
    return [tuple(line.split(maxsplit=1)) for line in lines if line and not line.startswith("#")]


def copied() -> list[tuple[list[str], str]]:
    """(sources, destination) of every COPY from the build context."""
    words = [rest.split() for name, rest in instructions() if name == "COPY" and not rest.startswith("--from")]
    return [(rest[:-1], rest[-1]) for rest in words]


def rest_of(instruction: str) -> list[str]:
    return [rest for name, rest in instructions() if name == instruction]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """The wheel as the Dockerfile builds it: from nothing but what it copies before the build."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheels")
    for names, _ in copied():
        for name in names:
            path = ROOT / name
            target = source / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(path, target, ignore=shutil.ignore_patterns("__pycache__")) if path.is_dir() else shutil.copy(path, target)
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", out], cwd=source, check=True, capture_output=True)
    (built,) = out.glob("*.whl")
    with zipfile.ZipFile(built) as opened:
        yield opened


def test_the_wheel_holds_every_file_of_the_four_packages(wheel):
    held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    expected = set()
    for parent in ("protos/ooc_moe_wire", "server/ooc_moe_server", "client/ooc_moe_client", "ooc_moe"):
        package = ROOT / parent
        expected |= {
            str(path.relative_to(package.parent)) for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts
        }
    assert held == expected
    assert {"ooc_moe_wire/v1/bank.proto", "ooc_moe_wire/v1/expert.proto", "ooc_moe_wire/v1/expert_pb2.pyi"} <= held


def test_the_wheel_names_both_commands_and_its_licence(wheel):
    (scripts,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    assert re.findall(r"^([\w-]+) =", wheel.read(scripts).decode(), flags=re.MULTILINE) == ["ooc-moe", "ooc-moe-server"]
    assert any(name.endswith("licenses/LICENSE") for name in wheel.namelist())


def verify(unit: Path) -> str:
    """What `systemd-analyze verify` finds wrong: nothing, when it is content."""
    checked = subprocess.run(["systemd-analyze", "verify", "--man=no", unit], capture_output=True, text=True, check=False)
    return checked.stdout + checked.stderr if checked.returncode else "".join(re.findall(rf".*{unit.name}:.*\n?", checked.stderr))


@pytest.fixture
def unit(tmp_path) -> Path:
    """The unit, its program exchanged for the one installed here: `verify` wants to find it."""
    program = Path(sys.executable).parent / "ooc-moe-server"
    path = tmp_path / UNIT.name
    path.write_text(UNIT.read_text().replace(INSTALLED, str(program)))
    return path


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_is_content_with_the_unit(unit):
    assert verify(unit) == ""


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
@pytest.mark.parametrize(
    ("sound", "broken"),
    [("ProtectSystem=strict", "ProtectSystem=stricter"), ("ExecStart=", "ExecStart=/nonexistent"), ("Restart=", "Restrat=")],
)
def test_systemd_would_notice_a_fault(unit, sound, broken):
    unit.write_text(unit.read_text().replace(sound, broken, 1))
    assert verify(unit) != ""


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_the_units_exposure_is_low(unit):
    command = ["systemd-analyze", "security", "--offline=yes", "--threshold=20", unit]  # 2.0 of 10
    judged = subprocess.run(command, capture_output=True, text=True, check=False)
    assert judged.returncode == 0, judged.stdout.splitlines()[-1]


def test_the_unit_and_the_image_start_the_daemon_with_flags_it_knows():
    known = subprocess.run([Path(sys.executable).parent / "ooc-moe-server", "--help"], capture_output=True, text=True, check=True).stdout
    started = re.findall(r"--[a-z-]+", re.search(r"^ExecStart=.*", UNIT.read_text(), flags=re.MULTILINE)[0])
    started += re.findall(r"--[a-z-]+", " ".join(rest_of("ENTRYPOINT") + rest_of("CMD")))
    assert {"--data-dir", "--dram-bytes", "--listen", "--insecure"} <= set(started)
    assert [flag for flag in started if flag not in known] == []


def test_the_image_copies_only_what_exists_and_is_not_ignored():
    sources = [name for names, _ in copied() for name in names]
    assert [name for name in sources if not (ROOT / name).exists()] == []
    ignore = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    assert ignore.index("*") < min(ignore.index(f"!{name}") for name in sources)


def test_the_image_installs_the_base_only():
    installs = [rest for rest in rest_of("RUN") if "pip install" in rest]
    assert installs
    for install in installs:
        assert "-c constraints.txt" in install
        assert "[" not in install  # No extra.
        assert "torch" not in install


def test_the_image_runs_as_nobody_in_particular_and_stops_on_sigterm():
    names = [name for name, _ in instructions()]
    assert rest_of("USER") == ["ooc-moe"]
    assert names.index("USER") > len(names) - 1 - names[::-1].index("RUN")
    assert rest_of("STOPSIGNAL") == ["SIGTERM"]
    assert rest_of("VOLUME") == ["/data"]
    assert rest_of("EXPOSE") == ["50051"]


@pytest.mark.parametrize(
    ("status", "code"),
    [(health_pb2.HealthCheckResponse.SERVING, 0), (health_pb2.HealthCheckResponse.NOT_SERVING, 1), (None, 1)],
)
def test_the_health_check_answers_by_its_exit_code(tmp_path, status, code):
    target = f"unix:{tmp_path}/daemon.sock"
    server = grpc.server(ThreadPoolExecutor(1))
    if status is not None:
        servicer = health.HealthServicer()
        servicer.set("", status)
        health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
        server.add_insecure_port(target)
    server.start()
    asked = subprocess.run([sys.executable, DEPLOY / "healthcheck.py", target], capture_output=True, text=True, check=False)
    server.stop(None).wait()
    assert (asked.returncode, asked.stderr) == (code, "")
