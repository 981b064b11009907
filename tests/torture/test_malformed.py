"""Thousands of malformed messages: each gets a typed status, the daemon survives, leaks nothing, and logs no traceback.

python -m pytest tests/torture/test_malformed.py -m slow
"""

from __future__ import annotations

import array
import contextlib
import os
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ooc_moe_client.remote.store import RemoteStore
from ooc_moe_client.store import Plane, Push
from ooc_moe_wire.codec import MESSAGE_BYTES_MAX, TRAINER_KEY
from ooc_moe_wire.errors import ERROR_KEY, STATUS, Internal
from ooc_moe_wire.local import PACKET_BYTES_MAX, Welcome, pack_fetch, pack_release, pack_stage
from ooc_moe_wire.v1 import bank_pb2, expert_pb2, local_pb2, local_pb2_grpc, stats_pb2, stats_pb2_grpc
from tests.conftest import DaemonProcess
from tests.server.conftest import Client, layout_of
from tests.torture.bodies import Tag, body_of, spec_of
from tests.torture.bodies import layout_of as layout_of_bytes
from tests.torture.fuzz import Fuzzer, Method, message_of, methods
from tests.torture.load import fetch

NUM_MESSAGES, NUM_MESSAGES_SLOW = 2400, 50_000
NUM_THREADS = 4
CALL_S = 20
RESPONSES_MAX = 64
KINDS = {kind.__name__: kind for kind in STATUS}
WATCH = "/ooc_moe_wire.v1.StatsService/WatchStats"
QUIET_S = 15


class Victim:
    """A daemon that holds known data while it gets malformed messages, and that is checked before and after."""

    def __init__(self, daemon: DaemonProcess) -> None:
        self.daemon = daemon
        self.log_start = 0
        self.client = Client(daemon.target, layout=layout_of())
        self._process = psutil.Process(daemon.pid)
        self._pid = daemon.pid
        self._layout = layout_of_bytes(12_000)
        self._versions, self._round = [0] * 4, 0
        self._keeper = RemoteStore(daemon.target, plane=Plane.STREAM)
        self._keeper.create_bank(spec_of("precious", self._layout, 1, len(self._versions)))
        self._keeper.open_for_writing("precious")  # No other caller may write, restore or delete the bank from now on.

    def remake_banks(self) -> None:
        """Deletes and recreates the banks that the malformed messages may change."""
        for bank in "bc":
            with contextlib.suppress(grpc.RpcError):
                self.client.create(bank)

    def vitals(self) -> dict[str, int]:
        """File descriptors (those of data files aside: a record size has its own) and threads, once nothing is under way."""
        self._wait_until_quiet()
        fds = [os.readlink(link.path) for link in os.scandir(f"/proc/{self._pid}/fd") if os.path.islink(link.path)]
        return {
            "descriptors": sum(str(self.daemon.data_dir) not in target for target in fds),
            "threads": self._process.num_threads(),
        }

    def check(self) -> None:
        """Checks that the process is the same, its log has no traceback, the known data is intact, and a push and a fetch work."""
        assert self._process.is_running()
        assert self.daemon.pid == self._pid
        health = health_pb2_grpc.HealthStub(self.client.channel).Check(health_pb2.HealthCheckRequest(), timeout=CALL_S)
        assert health.status == health_pb2.HealthCheckResponse.SERVING
        assert self._found() == {expert: (version, Tag(1, expert, self._round)) for expert, version in enumerate(self._versions)}
        self._round += 1
        bodies = [body_of(self._layout, Tag(1, expert, self._round)) for expert in range(len(self._versions))]
        pushes = [Push(expert=e, base_version=version, body=bodies[e]) for e, version in enumerate(self._versions)]
        outcomes = self._keeper.push("precious", pushes)
        assert all(isinstance(outcome, int) for outcome in outcomes), outcomes
        self._versions = [int(str(outcome)) for outcome in outcomes]
        assert self._found() == {expert: (version, Tag(1, expert, self._round)) for expert, version in enumerate(self._versions)}
        self.check_log()

    def check_log(self) -> None:
        """Checks that the daemon logged no bug of its own."""
        log = "".join(self.daemon.log[self.log_start :])
        assert "Traceback" not in log, log[max(0, log.index("Traceback") - 300) :][:3000]

    def _found(self) -> dict[int, tuple[int, Tag]]:
        return fetch(self._keeper, "precious", self._layout, 1, range(len(self._versions)))

    def _wait_until_quiet(self) -> None:
        until = time.monotonic() + QUIET_S
        while (busy := self._busy()) and time.monotonic() < until:
            time.sleep(0.02)
        assert not busy, f"left behind: {busy}"

    def _busy(self) -> dict[str, int]:
        stats = self.client.stats()
        queues = stats.queues
        left = {
            "streams": queues.open_streams - 2,  # This call, and the stream that keeps the precious bank.
            "pushes": queues.pushes,
            "reads": queues.demand_reads + queues.prefetch_reads,
            "sessions": queues.local_sessions,
            "leased_bytes": queues.leased_bytes,
            "pinned_bytes": stats.dram.pinned_bytes,
            "writers": sum(bank.writer_id != "" for bank in stats.banks) - 1,
        }
        return {what: number for what, number in left.items() if number}

    def close(self) -> None:
        self._keeper.close()
        self.client.channel.close()


@pytest.fixture(scope="module")
def shared_victim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victim]:
    """One daemon for all tests of this file, as a real daemon serves many callers."""
    daemon = DaemonProcess(tmp_path_factory.mktemp("victim") / "store", dram_bytes="24MiB").start()
    victim = Victim(daemon)
    yield victim
    victim.close()
    daemon.close()


@pytest.fixture
def victim(shared_victim: Victim) -> Victim:
    """The shared daemon. Its log is read up to now, so that a test sees only the lines that it caused."""
    shared_victim.log_start = len(shared_victim.daemon.log)
    return shared_victim


def attempt(channel: grpc.Channel, method: Method, requests: list[bytes], **options: Any) -> str:
    """Makes one call and checks its status; returns the name of the status."""
    try:
        if method.client_streams:
            call = channel.stream_stream(method.path)(iter(requests), timeout=CALL_S, **options)
        else:
            call = channel.unary_stream(method.path)(requests[0], timeout=CALL_S, **options)
        for number, response in enumerate(call):
            _judge_response(method, response)
            if number == RESPONSES_MAX or method.path == WATCH:
                call.cancel()
                return "OK"
    except grpc.RpcError as error:
        _judge(method, requests, error)
        return str(error.code().name)  # type: ignore[attr-defined]
    return "OK"


def _judge(method: Method, requests: list[bytes], error: Any) -> None:
    """Checks that a status is typed, with matching name and number, or gRPC's own status for a message that is too long."""
    what = f"{method.path}: {error.code()} {error.details()!r} for {[message_of(method.request, each) for each in requests]}"
    kind = dict(error.trailing_metadata() or ()).get(ERROR_KEY)
    if kind is None:
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED, what
        assert "larger than max" in error.details(), what
    else:
        assert STATUS[KINDS[kind]] is error.code(), what
        assert KINDS[kind] is not Internal, what
        assert error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.DATA_LOSS), what


def _judge_response(method: Method, response: bytes) -> None:
    """Checks that errors inside streams are typed too."""
    if method.path.endswith("PushExperts"):
        error = expert_pb2.PushExpertsResponse.FromString(response).outcome.error
    elif method.path.endswith("FetchExperts"):
        error = expert_pb2.FetchExpertsResponse.FromString(response).header.error
    else:
        return
    assert error.kind in ("", *KINDS), error
    assert error.kind != "Internal", error


def torture(victim: Victim, seed: int, num_messages: int) -> Counter[str]:
    """Sends a number of messages from several threads, each with its own connection. Returns the count of each status."""
    statuses: Counter[str] = Counter()
    lock = threading.Lock()

    def send(number: int) -> None:
        chosen = random.Random(seed + number)
        fuzzer = Fuzzer(chosen, banks=("b", "c", "precious"))
        everything = methods()
        with grpc.insecure_channel(victim.daemon.target, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
            for _ in range(num_messages // NUM_THREADS):
                method = chosen.choice(everything)
                status = attempt(channel, method, list(fuzzer.requests(method)))
                with lock:
                    statuses[f"{method.path.rpartition('/')[2]} {status}"] += 1
                    if sum(statuses.values()) % 40 == 0:
                        victim.remake_banks()

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        for future in [pool.submit(send, number) for number in range(NUM_THREADS)]:
            future.result()
    return statuses


def torture_and_compare(victim: Victim, seed: int, num_messages: int) -> None:
    """Checks that the daemon has the same descriptors and threads as after a warm-up."""
    victim.remake_banks()
    torture(victim, seed, num_messages // 4)
    before = victim.vitals()
    statuses = torture(victim, seed + NUM_THREADS, num_messages)
    for status, number in sorted(statuses.items()):
        print(f"{number:6} {status}")
    victim.check()
    after = victim.vitals()
    assert after["descriptors"] <= before["descriptors"], (before, after)
    assert after["threads"] <= before["threads"] + 4, (before, after)
    assert len({status.split()[1] for status in statuses}) >= 5  # Not all failed for the same reason.


@pytest.mark.timeout(120)
def test_wrong_messages_get_typed_statuses_and_leave_nothing_behind(victim: Victim, seed: int) -> None:
    torture_and_compare(victim, seed, NUM_MESSAGES)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_50_000_wrong_messages_get_typed_statuses_and_leave_nothing_behind(victim: Victim, seed: int) -> None:
    torture_and_compare(victim, seed, NUM_MESSAGES_SLOW)


@pytest.mark.parametrize("method", methods(), ids=lambda method: method.path.rpartition("/")[2])
def test_bytes_that_are_no_message_are_an_invalid_request(victim: Victim, method: Method) -> None:
    with grpc.insecure_channel(victim.daemon.target) as channel:
        assert attempt(channel, method, [b"\xff\xff\xff"]) == "INVALID_ARGUMENT"
    victim.check_log()


def test_an_error_about_a_very_long_name_keeps_its_status(victim: Victim) -> None:
    by_name = {method.path.rpartition("/")[2]: method for method in methods()}
    request = bank_pb2.GetBankRequest(bank="y" * 100_000).SerializeToString()
    with grpc.insecure_channel(victim.daemon.target) as channel:
        assert attempt(channel, by_name["GetBank"], [request]) == "NOT_FOUND"
    victim.check()


def test_oversized_messages_are_refused_and_the_daemon_goes_on(victim: Victim) -> None:
    options = [("grpc.max_send_message_length", -1)]
    by_name = {method.path.rpartition("/")[2]: method for method in methods()}
    with grpc.insecure_channel(victim.daemon.target, options=options) as channel:
        for method in (by_name[name] for name in ("CreateBank", "FetchExperts", "PushExperts")):
            field = b"\xfa\x3f"  # Number 127, bytes: unknown to every message.
            request = field + b"\x81\x80\x80\x02" + bytes(MESSAGE_BYTES_MAX + 1)
            assert attempt(channel, method, [request]) == "RESOURCE_EXHAUSTED"
    victim.check()


@pytest.mark.parametrize("trainer", ["x" * 129, "x" * 6000, "~" * 128, ""])
def test_wild_metadata_gets_a_typed_status(victim: Victim, trainer: str) -> None:
    victim.remake_banks()
    request = expert_pb2.FetchExpertsRequest(bank="b", experts=[1]).SerializeToString()
    method = next(method for method in methods() if method.path.endswith("FetchExperts"))
    metadata = ((TRAINER_KEY, trainer), ("ooc-moe-error", "Internal"), ("x-bin", b"\0\xff"))
    with grpc.insecure_channel(victim.daemon.target) as channel:
        assert attempt(channel, method, [request], metadata=metadata) == ("INVALID_ARGUMENT" if len(trainer) > 128 else "OK")
    victim.check()


def test_noise_on_the_port_does_no_harm(victim: Victim, seed: int) -> None:
    chosen = random.Random(seed)
    host, _, port = victim.daemon.target.rpartition(":")
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    before = victim.vitals()
    for number in range(200):
        with socket.create_connection((host, int(port))) as noise, contextlib.suppress(OSError):
            noise.sendall((preface if number % 2 else b"") + chosen.randbytes(chosen.randint(0, 3000)))
    victim.check()
    assert victim.vitals()["descriptors"] <= before["descriptors"]


# The local plane's socket


def open_session(victim: Victim) -> tuple[socket.socket, Welcome]:
    """Opens a session of the local plane, and closes the descriptors that come with it."""
    plane = local_pb2_grpc.LocalServiceStub(victim.client.channel).GetLocalPlane(local_pb2.GetLocalPlaneRequest(), timeout=CALL_S)
    if not plane.socket:
        pytest.skip("this daemon has no local plane")
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.settimeout(CALL_S)
    connection.connect(b"\0" + plane.socket.encode())
    packet, descriptors, _, _ = socket.recv_fds(connection, 4096, 4)
    for descriptor in descriptors:
        os.close(descriptor)
    return connection, Welcome.unpack(packet)


def some_packet(chosen: random.Random) -> bytes:
    match chosen.randrange(7):
        case 0:
            return chosen.randbytes(chosen.choice((1, 2, 9, 100, 5000)))
        case 1:
            return pack_release([chosen.getrandbits(64) for _ in range(chosen.choice((0, 1, 5, 4096)))])
        case 2:
            return pack_stage(chosen.choice((0, 1, 4096, 1 << 20, 1 << 40, 2**64 - 1)))
        case 3:
            return pack_release(range(5000))
        case 4:
            ids = [chosen.choice((0, 1, 7, 2**63, 2**64 - 1)) for _ in range(chosen.randrange(5))]
            request = expert_pb2.FetchExpertsRequest(bank=chosen.choice(("b", "c", "", "?")), experts=ids, sections=chosen.randrange(3))
            return pack_fetch(local_pb2.LocalFetch(trainer="t" * chosen.choice((0, 1, 500)), request=request, pin=chosen.random() < 0.5))
        case 5:
            return b"F" + chosen.randbytes(chosen.randrange(40))
        case _:
            return b"S" + chosen.randbytes(chosen.randrange(12))


def some_descriptors(chosen: random.Random) -> list[int]:
    """Descriptors that are no staging memory: none, no memfd, a memfd without seals, too many."""
    match chosen.randrange(5):
        case 0:
            return [os.open("/dev/zero", os.O_RDWR)]
        case 1:
            return [os.memfd_create("unsealed") for _ in range(chosen.choice((1, 2, 5)))]
        case 2:
            return list(os.pipe())
        case _:
            return []


@pytest.mark.timeout(120)
def test_wrong_packets_end_at_most_their_own_session(victim: Victim, seed: int) -> None:
    chosen = random.Random(seed)
    open_session(victim)[0].close()
    before = victim.vitals()
    for _ in range(300):
        connection, _ = open_session(victim)
        with connection, contextlib.suppress(OSError):  # The daemon closes the connection after a malformed packet.
            for _ in range(chosen.randint(1, 4)):
                descriptors = some_descriptors(chosen)
                ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
                try:
                    connection.sendmsg([some_packet(chosen)], ancillary)
                finally:
                    for descriptor in descriptors:
                        os.close(descriptor)
    victim.check()
    after = victim.vitals()
    assert after["descriptors"] <= before["descriptors"], (before, after)
    assert after["threads"] <= before["threads"] + 4, (before, after)


def test_a_packet_that_is_too_long_ends_at_most_its_own_session(victim: Victim) -> None:
    connection, _ = open_session(victim)
    with connection, contextlib.suppress(OSError):
        connection.sendall(b"R" + bytes(2 * PACKET_BYTES_MAX))
    victim.check()
    victim.vitals()


def test_many_idle_sessions_and_dying_ones_leave_nothing_behind(victim: Victim) -> None:
    open_session(victim)[0].close()
    before = victim.vitals()
    victim.remake_banks()
    sessions = [open_session(victim) for _ in range(20)]
    for connection, _ in sessions:
        connection.send(pack_fetch(local_pb2.LocalFetch(request=expert_pb2.FetchExpertsRequest(bank="b", experts=range(8)), pin=True)))
        num_leased = 0
        while not (answer := local_pb2.LocalAnswer.FromString(connection.recv(PACKET_BYTES_MAX))).HasField("end"):
            num_leased += len(answer.leases.ids)
        assert num_leased == 8
    stats = stats_pb2_grpc.StatsServiceStub(victim.client.channel).GetStats(stats_pb2.GetStatsRequest(), timeout=CALL_S)
    assert stats.queues.local_sessions == 20
    assert stats.queues.leased_bytes > 0
    for connection, _ in sessions:
        connection.close()
    after = victim.vitals()  # Waits until no session, lease or pin is left.
    assert after["descriptors"] <= before["descriptors"], (before, after)
    victim.check()


@pytest.mark.parametrize("session", [1, 2**63, 2**64 - 1])
def test_a_session_that_does_not_exist_is_lease_expired(victim: Victim, session: int) -> None:
    open_session(victim)[0].close()
    victim.remake_banks()
    by_name = {method.path.rpartition("/")[2]: method for method in methods()}
    push = expert_pb2.PushExpertsRequest(open=expert_pb2.PushOpen(bank="b", writer_id="w", local_session=session)).SerializeToString()
    with grpc.insecure_channel(victim.daemon.target) as channel:
        assert attempt(channel, by_name["PushExperts"], [push]) == "FAILED_PRECONDITION"
    victim.check()


def test_staged_pushes_beyond_the_staging_memory_are_refused_one_by_one(victim: Victim) -> None:
    connection, welcome = open_session(victim)
    victim.client.create("staged")  # Fuzzed pushes may have given the other banks' experts new versions.
    with connection:
        stream = victim.client.stream("staged", open_it=False)
        stream.send(open=expert_pb2.PushOpen(bank="staged", writer_id="w", local_session=welcome.session))
        next(stream.call)
        for number, offset in enumerate((0, 1, 4095, 2**40, 2**63, 2**64 - 1), start=1):
            header = victim.client.push_header(0, victim.client.random_body(1), push_number=number)
            header.staged_at = offset
            stream.send(header=header)
            assert stream.outcome().error.kind == "InvalidRequest"
        stream.close()
    victim.check()
