"""The life of a daemon, seen from outside: starting, ready, draining, stopped, refused."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from ooc_moe_server.daemon import cli, lifecycle
from ooc_moe_server.daemon.config import ServerConfig
from ooc_moe_server.engine.engine import Engine
from ooc_moe_wire.errors import NotTheWriter, Unavailable
from ooc_moe_wire.v1 import stats_pb2, stats_pb2_grpc

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture
def refused(monkeypatch, capsys):
    """Runs the command in this process; returns the one line that it prints when it cannot start."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["ooc-moe-server", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        assert caught.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        return line

    return run


def health(target):
    with grpc.insecure_channel(target) as channel:
        return health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10).status


def test_health_and_reflection_answer_on_both_addresses(shared_daemon):
    for target in (shared_daemon.target, shared_daemon.unix_target):
        assert health(target) == SERVING
        with grpc.insecure_channel(target) as channel:
            request = reflection_pb2.ServerReflectionRequest(list_services="")
            (answer,) = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([request]))
        names = {service.name.rpartition(".")[2] for service in answer.list_services_response.service}
        assert {"BankService", "ExpertService", "SnapshotService", "StatsService", "Health"} <= names


def test_who_runs_and_where_stands_in_the_data_directory_until_it_stops(daemon):
    announced = json.loads((daemon.data_dir / "daemon.json").read_text())
    assert announced == {"pid": daemon.pid, "addresses": [daemon.target, daemon.unix_target]}
    assert daemon.stop() == 0
    assert not (daemon.data_dir / "daemon.json").exists()


def test_before_it_is_ready_health_says_not_serving_and_calls_are_refused(tmp_path, monkeypatch):
    real_open = Engine.open

    async def scenario():
        may_open = asyncio.Event()

        async def slow_open(*arguments, **options):
            await may_open.wait()
            return await real_open(*arguments, **options)

        monkeypatch.setattr(Engine, "open", slow_open)
        config = ServerConfig(data_dir=tmp_path, dram_bytes=4096, listen=("127.0.0.1:0",))
        running = asyncio.create_task(lifecycle.Daemon(config).run())
        while not (tmp_path / "daemon.json").exists():
            await asyncio.sleep(0)
        (address,) = json.loads((tmp_path / "daemon.json").read_text())["addresses"]
        async with grpc.aio.insecure_channel(address) as channel:
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            assert (await watch.read()).status == NOT_SERVING
            with pytest.raises(grpc.aio.AioRpcError, match="starting") as caught:
                await stats_pb2_grpc.StatsServiceStub(channel).GetStats(stats_pb2.GetStatsRequest())
            assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
            may_open.set()
            assert (await watch.read()).status == SERVING
            os.kill(os.getpid(), signal.SIGTERM)
            assert (await watch.read()).status == NOT_SERVING
        await running

    asyncio.run(scenario())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_with_zero_after_one_line_per_change_of_state(daemon, number):
    assert daemon._end(number) == 0
    daemon.close()
    states = [
        word
        for line in daemon.log
        for word in ("starting", "ready", "draining", "stopped")
        if f" {word}" in line.partition("lifecycle:")[2]
    ]
    assert states == ["starting", "ready", "draining", "stopped"]


def test_draining_finishes_the_push_that_has_begun_and_refuses_new_calls(daemon, connect):
    client = connect(daemon.target)
    client.create("b")
    body = client.random_body(1)
    stream = client.stream("b")
    stream.send(header=client.push_header(1, body))
    while not client.stats().dram.pinned_bytes:
        pass
    watch = client.statistics.WatchStats(stats_pb2.WatchStatsRequest())
    next(watch)
    os.kill(daemon.pid, signal.SIGTERM)
    with client.refused(Unavailable, "drain"):
        list(watch)
    assert health(daemon.target) == NOT_SERVING
    with client.refused(Unavailable, "drain"):
        client.stats()
    stream.body(body)
    version = stream.outcome().version
    with client.refused(Unavailable, "drain"):
        stream.outcome()
    assert daemon.stop() == 0
    daemon.start()
    assert connect(daemon.target).fetch("b", [1])[1].header.version == version


def test_a_push_that_never_ends_does_not_outlive_the_grace(start_daemon, connect):
    daemon = start_daemon(arguments=("--grace-s", "0.2"))
    client = connect(daemon.target)
    client.create("b")
    stream = client.stream("b")
    stream.send(header=client.push_header(1, client.random_body(1)))
    while not client.stats().dram.pinned_bytes:
        pass
    assert daemon.stop() == 0


def test_a_second_daemon_on_the_same_directory_or_addresses_is_refused(daemon, tmp_path, refused):
    assert "held by another daemon" in refused("--data-dir", str(daemon.data_dir), "--dram-bytes", "1MiB", "--listen", "127.0.0.1:0")
    elsewhere = ("--data-dir", str(tmp_path / "other"), "--dram-bytes", "1MiB")
    assert daemon.target in refused(*elsewhere, "--listen", daemon.target)
    assert "in use" in refused(*elsewhere, "--listen", daemon.unix_target)
    assert health(daemon.unix_target) == SERVING


def test_a_writer_that_hangs_up_gives_its_lease_back(daemon, connect):
    client = connect(daemon.target)
    client.create("b")
    doomed = connect(daemon.target)
    held = doomed.stream("b", "doomed")
    with client.refused(NotTheWriter):
        client.stream("b", "heir")
    held.hang_up()
    while next(bank.writer_id for bank in client.stats().banks):
        pass
    client.stream("b", "heir").close()


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--dram-bytes", "some"], "dram_bytes"),
        (["--dram-bytes", "900TiB"], "memory are available"),
        (["--dram-bytes", "4097"], "4097"),
        (["--listen", "0.0.0.0:0"], "--insecure"),
        (["--listen", "storage-host:50051"], "--insecure"),
        (["--listen", "nonsense"], "nonsense"),
        (["--listen", "127.0.0.1:70000"], "70000"),
        (["--listen", "unix:/nowhere/at/all"], "does not exist"),
        (["--listen", "unix:" + "x" * 108], "107"),
        (["--grace-s", "-1"], "grace"),
    ],
)
def test_a_daemon_that_cannot_start_says_why_in_one_line(tmp_path, refused, arguments, word):
    defaults = [] if "--dram-bytes" in arguments else ["--dram-bytes", "1MiB"]
    assert word in refused("--data-dir", str(tmp_path / "store"), *defaults, *arguments)


def test_the_command_itself_exits_with_two_and_without_a_traceback(tmp_path):
    command = [sys.executable, "-m", "ooc_moe_server.daemon.cli", "--data-dir", str(tmp_path), "--dram-bytes", "1MiB"]
    run = subprocess.run([*command, "--listen", "unix:/nowhere/at/all"], capture_output=True, text=True, check=False, timeout=60)
    assert (run.returncode, run.stdout) == (2, "")
    assert [line[:7] for line in run.stderr.splitlines() if " INFO " not in line] == ["error: "]


def test_a_directory_of_an_unknown_format_or_of_other_things_is_refused_and_left_alone(tmp_path, refused):
    (tmp_path / "FORMAT").write_text("ooc-moe store 99\n")
    assert "ooc-moe store 99" in refused("--data-dir", str(tmp_path), "--dram-bytes", "1MiB")
    (tmp_path / "FORMAT").unlink()
    (tmp_path / "thesis.txt").write_text("precious")
    assert "thesis.txt" in refused("--data-dir", str(tmp_path), "--dram-bytes", "1MiB")
    assert not (tmp_path / "FORMAT").exists()


def test_a_damaged_index_is_refused_in_one_line(daemon, refused):
    daemon.stop()
    for path in daemon.data_dir.glob("index.sqlite*"):
        path.write_bytes(b"damage" * 10_000)
    assert "index" in refused("--data-dir", str(daemon.data_dir), "--dram-bytes", "1MiB", "--listen", "127.0.0.1:0")


def test_a_stale_socket_of_a_killed_daemon_is_no_obstacle(daemon):
    daemon.kill()
    assert os.path.exists(daemon.unix_target.removeprefix("unix:"))
    daemon.start()
    assert health(daemon.unix_target) == SERVING


def test_a_file_in_the_sockets_place_is_not_replaced(tmp_path, refused):
    path = tmp_path / "file"
    path.write_text("precious")
    assert "no socket" in refused("--data-dir", str(tmp_path / "s"), "--dram-bytes", "1MiB", "--listen", f"unix:{path}")
    assert path.read_text() == "precious"


def test_localhost_and_ipv6_loopback_need_no_permission(tmp_path):
    ServerConfig(data_dir=tmp_path, dram_bytes=4096, listen=("localhost:0", "[::1]:0", "127.8.8.8:1"))
    ServerConfig(data_dir=tmp_path, dram_bytes=4096, listen=("0.0.0.0:0", "[::]:0"), insecure=True)


def test_the_probe_of_a_port_does_not_keep_it(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    lifecycle._check_port(f"127.0.0.1:{port}")
    lifecycle._check_port(f"127.0.0.1:{port}")
