"""The client's end of the local plane: what is copied is whole or comes again, leases go back, sessions are replaced, streams step in."""

import contextlib
import fcntl
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from concurrent import futures

import numpy as np
import pytest

from ooc_moe_client.local.plane import LocalPlane
from ooc_moe_client.local.staging import Staging
from ooc_moe_client.remote.fetch import OVERWRITTEN_CALLS_MAX
from ooc_moe_client.remote.plane_choice import REFUSED_S, PlaneChoice
from ooc_moe_client.remote.store import RemoteStore
from ooc_moe_client.store import Durability, Plane, Push, Sections
from ooc_moe_wire.codec import Checksums
from ooc_moe_wire.errors import (
    CorruptRecord,
    DeadlineExceeded,
    Internal,
    InvalidRequest,
    LeaseExpired,
    LostUpdate,
    TierFull,
    Unavailable,
    UnknownExpert,
)
from ooc_moe_wire.layout import BLOCK_BYTES
from ooc_moe_wire.local import PROTOCOL, Welcome
from ooc_moe_wire.v1 import expert_pb2, local_pb2
from tests.client.conftest import LAYOUT, body, write
from tests.client.scripted import ScriptedArena, ScriptedDaemon, abort, acknowledge, fetch_into, served

WELCOME = Welcome(session=1, arena_bytes=4096)


@pytest.fixture
def arena() -> Iterator[ScriptedArena]:
    made = ScriptedArena()
    for expert in range(8):
        made.put(expert, float(expert))
    yield made
    made.close()


@pytest.fixture
def scripted(arena: ScriptedArena) -> Iterator[ScriptedDaemon]:
    arena.daemon = daemon = ScriptedDaemon(arena.name)
    yield daemon
    daemon.stop()


@pytest.fixture
def connect() -> Iterator[Callable[..., RemoteStore]]:
    """Stores that are closed after the test."""
    with contextlib.ExitStack() as stack:

        def connecting(daemon: ScriptedDaemon, **options) -> RemoteStore:
            return stack.enter_context(contextlib.closing(RemoteStore(daemon.target, **options)))

        yield connecting


def bodies_of(experts) -> dict[int, bytearray]:
    return {expert: body(float(expert)) for expert in experts}


# Reading


@pytest.mark.parametrize("verify", [True, False])
def test_leased_records_are_copied_and_their_leases_go_back(arena, scripted, connect, verify: bool):
    scripted.fetch_scripts = [lambda experts, context: iter([arena.leases(experts[:2]), arena.leases(experts[2:])])]
    bodies: dict[int, bytearray] = {}
    fetched = list(fetch_into(bodies, connect(scripted, verify=verify), [3, 0, 1, 7]))
    assert [(item.expert, item.version) for item in fetched] == [(3, 4), (0, 1), (1, 2), (7, 8)]
    assert bodies == bodies_of([3, 0, 1, 7])
    assert (scripted.sessions, arena.sessions) == ([1001], [1000, 1001])
    arena.wait_released(4)
    assert sorted(arena.released) == [1, 2, 3, 4]


def test_the_parameters_alone_are_copied(arena, scripted, connect):
    scripted.fetch_scripts = [lambda experts, context: iter([arena.leases(experts)])]
    memory = bytearray(LAYOUT.parameter_bytes)
    list(connect(scripted).fetch("b", [5], into=lambda _: memoryview(memory), sections=Sections.PARAMETERS))
    assert memory == body(5.0)[: LAYOUT.parameter_bytes]


def test_what_moves_no_bytes_comes_between_leases(arena, scripted, connect):
    def script(experts, context):
        yield local_pb2.LocalAnswer(header=expert_pb2.ExpertHeader(expert=2, version=9, served_from=expert_pb2.TIER_DRAM, unchanged=True))
        yield arena.leases([1])

    scripted.fetch_scripts = [script]
    fetched = connect(scripted).fetch("b", [1, 2], into=lambda _: memoryview(bytearray(LAYOUT.body_bytes)), known_versions=[None, 9])
    assert [(item.expert, item.unchanged) for item in fetched] == [(2, True), (1, False)]


def test_a_header_that_promises_bytes_is_an_error_of_the_daemon(arena, scripted, connect):
    header = expert_pb2.ExpertHeader(expert=2, version=9, served_from=expert_pb2.TIER_DRAM)
    scripted.fetch_scripts = [lambda experts, context: iter([local_pb2.LocalAnswer(header=header)])]
    with pytest.raises(Internal, match="expert 2: a header without a lease"):
        list(fetch_into({}, connect(scripted), [2]))


@pytest.mark.parametrize("verify", [True, False])
def test_a_record_overwritten_before_its_copy_comes_again(arena, scripted, connect, verify: bool):
    def overwritten(experts, context):
        message = arena.leases(experts)
        arena.put(1, 71.0)  # Another record, whole, in the same place.
        arena.generations[2 * LAYOUT.record_bytes // BLOCK_BYTES] |= np.uint64(1)  # And one that is being written.
        yield message

    scripted.fetch_scripts = [overwritten, lambda experts, context: (arena.put(2, 2.0), iter([arena.leases(experts)]))[1]]
    bodies: dict[int, bytearray] = {}
    assert [item.expert for item in fetch_into(bodies, connect(scripted, verify=verify), [0, 1, 2, 3])] == [0, 3, 1, 2]
    assert scripted.fetches == [[0, 1, 2, 3], [1, 2]]
    assert bodies == bodies_of([0, 2, 3]) | {1: body(71.0)}
    arena.wait_released(6)


def test_records_that_are_overwritten_again_and_again_come_in_chunks(arena, scripted, connect):
    def script(experts, context):
        if scripted.sessions[-1]:
            yield arena.leases(experts, older=2)
        else:
            yield from (message for expert in experts for message in served(expert))

    scripted.fetch_scripts = [script]
    bodies: dict[int, bytearray] = {}
    list(fetch_into(bodies, connect(scripted), [0, 1]))
    assert bodies == bodies_of([0, 1])
    assert scripted.sessions == [1001] * OVERWRITTEN_CALLS_MAX + [0]


def test_a_copy_torn_by_a_writer_is_never_taken_for_whole():
    record, size = ScriptedArena(num_records=100), 96 * LAYOUT.record_bytes
    plane = LocalPlane.connect(record.name)
    stop, value = threading.Event(), 0

    def overwrite() -> None:
        nonlocal value
        while not stop.is_set():
            record.generations[0] |= np.uint64(1)
            value = (value + 1) % 256
            record.bytes[BLOCK_BYTES : BLOCK_BYTES + size] = value
            record.generations[0] += np.uint64(1)

    writer = threading.Thread(target=overwrite)
    writer.start()
    memory, outcomes = bytearray(size), []
    try:
        for _ in range(400):
            generation = int(record.generations[0])
            outcomes.append(plane.arena.copy(BLOCK_BYTES, generation, memoryview(memory)))
            if outcomes[-1]:
                assert np.ptp(np.frombuffer(memory, np.uint8)) == 0
    finally:
        stop.set()
        writer.join()
        plane.close()
        record.close()
    assert False in outcomes


def test_damaged_bytes_are_an_error_of_that_expert_and_only_verified_ones_are_noticed(arena, scripted, connect):
    def damaged(experts, context):
        message = arena.leases(experts)
        arena.bytes[2 * LAYOUT.record_bytes - 1] ^= 1  # The last byte of expert 1.
        yield message

    scripted.fetch_scripts = [damaged]
    fetching = fetch_into({}, connect(scripted), [0, 1, 2])
    assert [next(fetching).expert, next(fetching).expert] == [0, 2]
    with pytest.raises(CorruptRecord, match=r"bank 'b', expert 1: the optimizer section"):
        next(fetching)
    assert [item.expert for item in fetch_into({}, connect(scripted, verify=False), [0, 1, 2])] == [0, 1, 2]


def test_a_fetch_that_is_dropped_ends_its_session_and_with_it_its_leases(arena, scripted, connect):
    scripted.fetch_scripts = [lambda experts, context: iter([arena.leases(experts)])]
    fetching = fetch_into({}, connect(scripted), [0, 1, 2, 3])
    next(fetching)
    fetching.close()
    arena.wait_ended(1)

    def refuse(_: int) -> memoryview:
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError):
        list(connect(scripted).fetch("b", [4, 5], into=refuse))
    arena.wait_ended(2)
    assert arena.sessions == [1000, 1001, 1002, 1003]


def test_an_older_version_than_was_acknowledged_is_a_lost_update(arena, scripted, connect):
    scripted.push_scripts = [acknowledge]
    scripted.fetch_scripts = [lambda experts, context: iter([arena.leases(experts)])]
    for plane in (Plane.LOCAL, Plane.STREAM):
        if plane is Plane.STREAM:
            scripted.fetch_scripts = [lambda experts, context: (message for expert in experts for message in served(expert))]
        store = connect(scripted, plane=plane)
        write(store, "b", {1: 5.0})  # Acknowledged as version 101 or later.
        fetching = fetch_into({}, store, [0, 1, 2])
        assert [next(fetching).expert, next(fetching).expert] == [0, 2]
        with pytest.raises(LostUpdate, match=r"bank 'b', expert 1: .* version 2, .* acknowledged 101"):
            next(fetching)
        assert len(list(fetch_into({}, connect(scripted, plane=plane), [0, 1, 2]))) == 3  # Another store was promised nothing.


def test_a_push_acknowledged_after_a_fetch_began_is_no_lost_update(arena, scripted, connect):
    store = connect(scripted)

    def pushed_meanwhile(experts, context):
        write(store, "b", {1: 5.0})
        yield arena.leases(experts)

    scripted.push_scripts, scripted.fetch_scripts = [acknowledge], [pushed_meanwhile]
    assert [item.version for item in fetch_into({}, store, [1])] == [2]


# Which plane


def test_a_session_that_ended_is_replaced_by_another(arena, scripted, connect):
    scripted.fetch_scripts = [lambda experts, context: iter([arena.leases(experts)])]
    store = connect(scripted, plane=Plane.LOCAL)
    list(fetch_into({}, store, [0]))
    arena.hang_up()
    list(fetch_into({}, store, [1]))
    list(fetch_into({}, store, [2]))
    assert scripted.sessions == [1001, 1003, 1003]


def test_fetches_at_once_have_a_session_each_and_idle_ones_are_used_again(arena, scripted, connect):
    scripted.fetch_scripts = [lambda experts, context: iter([arena.leases(experts)])]
    store = connect(scripted)
    fetches = [fetch_into({}, store, [0, 1]) for _ in range(3)]
    assert [next(fetching).expert for fetching in fetches] == [0, 0, 0]
    assert [len(list(fetching)) for fetching in fetches] == [1, 1, 1]
    list(fetch_into({}, store, [2]))
    assert arena.sessions == [1000, 1001, 1002, 1003]
    assert scripted.sessions == [1001, 1002, 1003, 1003]


def test_what_is_more_than_a_packet_holds_is_asked_for_in_parts(arena, scripted, connect, monkeypatch):
    monkeypatch.setattr("ooc_moe_client.remote.fetch.FETCHED_MAX", 3)
    scripted.fetch_scripts = [lambda experts, context: iter([arena.leases(experts)])]
    bodies: dict[int, bytearray] = {}
    assert len(list(fetch_into(bodies, connect(scripted), list(range(8))))) == 8
    assert bodies == bodies_of(range(8))
    assert scripted.fetches == [[0, 1, 2], [3, 4, 5], [6, 7]]
    scripted.fetch_scripts = [lambda experts, context: iter([arena.leases(experts[:2])])]
    with pytest.raises(Internal, match="without 1 of the experts"):
        list(fetch_into({}, connect(scripted), list(range(8))))


@pytest.mark.parametrize(
    ("sent", "error", "reason"),
    [
        (UnknownExpert("expert 9"), UnknownExpert, "expert 9"),
        (TierFull("leases"), TierFull, "leases"),
        (Unavailable("draining"), Unavailable, r"daemon at 127\.0\.0\.1:\d+: draining"),
    ],
)
def test_what_ends_a_fetch_is_the_callers_error(arena, scripted, connect, monkeypatch, sent, error, reason):
    monkeypatch.setattr("ooc_moe_client.remote.connection.TIER_FULL_TRIES_MAX", 2)
    scripted.fetch_scripts = [lambda experts, context: abort(context, sent)]
    with pytest.raises(error, match=reason):
        list(fetch_into({}, connect(scripted, patience_s=0.2), [0]))


def test_a_daemon_that_does_not_answer_in_time_is_named(arena, scripted, connect, monkeypatch):
    silent = threading.Event()
    scripted.fetch_scripts = [lambda experts, context: iter([silent.wait(30)][:0])]
    with pytest.raises(DeadlineExceeded, match=f"daemon at {scripted.target}: .*in time"):
        list(fetch_into({}, connect(scripted, timeout_s=0.3), [0]))
    silent.set()


def test_a_session_that_ends_in_the_middle_loses_nothing(arena, scripted, connect):
    def dies(experts, context):
        yield arena.leases(experts[:2])
        arena.hang_up()
        abort(context, Unavailable("killed"))

    scripted.fetch_scripts = [dies, lambda experts, context: iter([arena.leases(experts)])]
    bodies: dict[int, bytearray] = {}
    assert len(list(fetch_into(bodies, connect(scripted), [0, 1, 2, 3]))) == 4
    assert bodies == bodies_of(range(4))
    assert scripted.fetches == [[0, 1, 2, 3], [2, 3]]


@pytest.mark.parametrize(("name", "reason"), [(None, "has no local plane"), ("", "has no local plane"), ("nobody", "Connection refused")])
def test_where_there_is_no_local_plane_streams_are_used_or_its_absence_is_an_error(connect, name, reason):
    daemon = ScriptedDaemon(name)
    daemon.fetch_scripts = [lambda experts, context: (message for expert in experts for message in served(expert))]
    store = connect(daemon)
    bodies: dict[int, bytearray] = {}
    list(fetch_into(bodies, store, [0, 1]))
    list(fetch_into(bodies, store, [0, 1]))
    assert bodies == bodies_of([0, 1])
    assert (store.plane, set(daemon.sessions)) == (Plane.STREAM, {0})
    assert daemon.num_asked <= 2  # Not before every call.
    forced = connect(daemon, plane=Plane.LOCAL)
    for call in (lambda: list(fetch_into({}, forced, [0])), lambda: write(forced, "b", {0: 1.0}), lambda: forced.plane):
        with pytest.raises(InvalidRequest, match=f"(?s)plane.*{daemon.target}.*{reason}|{daemon.target}.*{reason}"):
            call()
    daemon.stop()


def test_a_store_told_to_stream_never_asks(scripted, connect):
    store = connect(scripted, plane=Plane.STREAM)
    assert store.plane is Plane.STREAM
    assert scripted.num_asked == 0


def test_a_refusal_is_asked_about_again_after_a_while(arena, scripted, connect):
    now = 0.0
    planes = PlaneChoice(connect(scripted)._connection, Plane.AUTO, clock=lambda: now)
    scripted.socket_name = ""
    assert planes.local() is None
    scripted.socket_name = arena.name
    assert planes.local() is None
    now = REFUSED_S
    assert planes.local() is not None
    planes.close()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"seals": 0}, "sealed against shrinking"),
        ({"welcome": b"hello"}, "is no welcome"),
        ({"welcome": Welcome(session=1, arena_bytes=1 << 40).pack()}, "sealed against shrinking"),
        (
            {"welcome": Welcome(session=1, arena_bytes=4096).pack().replace(struct.pack("<I", PROTOCOL), struct.pack("<I", 9), 1)},
            "protocol 9",
        ),
    ],
)
def test_a_daemon_whose_memory_cannot_be_trusted_is_refused(options: dict, reason: str):
    arena = ScriptedArena(**options)
    with pytest.raises(InvalidRequest, match=reason):
        LocalPlane.connect(arena.name)
    arena.close()


def test_a_socket_of_another_user_is_refused(arena, monkeypatch):
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    monkeypatch.setattr(socket.socket, "getsockopt", lambda *_: struct.pack("3i", 1, 54321, 0))
    with pytest.raises(InvalidRequest, match="user 54321, not 12345"):
        LocalPlane.connect(arena.name)


def test_a_daemon_that_hangs_up_before_its_welcome_is_unavailable():
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    name = f"ooc-moe-test-{os.urandom(8).hex()}"
    listener.bind(f"\0{name}")
    listener.listen()
    closer = threading.Thread(target=lambda: listener.accept()[0].close())
    closer.start()
    with pytest.raises(Unavailable, match="refuses"):
        LocalPlane.connect(name)
    closer.join()
    listener.close()


def test_planes_that_come_and_go_leave_no_descriptor_open(arena):
    def use() -> int:
        plane = LocalPlane.connect(arena.name)
        assert plane.staging_for(4096) is not None
        plane.close()
        arena.staged.clear()
        return _num_memory_descriptors()

    assert use() == use() == use()


def _num_memory_descriptors() -> int:
    """Descriptors of memfds in this process."""
    num = 0
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            num += "memfd:" in os.readlink(f"/proc/self/fd/{fd}")
    return num


# Pushing


def test_bodies_are_staged_and_their_places_used_again(arena, scripted, connect):
    staged = []

    def copies(headers, context):
        for header in headers:
            place = arena.staged[0][header.staged_at : header.staged_at + LAYOUT.body_bytes]
            staged.append((header.expert, header.staged_at, place))
            sums = Checksums.of(LAYOUT, memoryview(place))
            assert (header.parameter_xxh3, header.optimizer_xxh3) == (sums.parameters, sums.optimizer)
            yield from acknowledge([header], context)

    scripted.push_scripts = [copies]
    store = connect(scripted)
    for value in (1.0, 2.0):
        assert all(isinstance(outcome, int) for outcome in write(store, "b", {0: value, 1: value + 0.5}).values())
    assert [(expert, bytes(place)) for expert, _, place in staged] == [
        (expert, bytes(body(value))) for expert, value in ((0, 1.0), (1, 1.5), (0, 2.0), (1, 2.5))
    ]
    assert max(at for _, at, _ in staged) <= LAYOUT.body_bytes
    store.release("b")
    assert scripted.num_chunks == 0


def test_more_bodies_than_fit_wait_for_places(arena, scripted, connect, monkeypatch):
    monkeypatch.setattr("ooc_moe_client.local.plane.STAGING_BYTES_MIN", 0)
    monkeypatch.setattr("ooc_moe_client.local.plane.STAGED_RECORDS", 2)
    scripted.push_scripts = [acknowledge]
    store = connect(scripted)
    with futures.ThreadPoolExecutor(3) as pool:
        pushing = [
            pool.submit(store.push, bank, [Push(expert=n, base_version=0, body=body(1.0)) for n in range(6)]) for bank in ("b", "c", "d")
        ]
        assert all(isinstance(outcome, int) for call in pushing for outcome in call.result(timeout=30))
    for bank in "bcd":
        store.release(bank)
    assert {header.staged_at for header in scripted.headers} == {0, LAYOUT.body_bytes}
    assert scripted.num_chunks == 0


def test_a_body_beyond_the_staging_memory_travels_in_chunks(arena, scripted, connect, monkeypatch):
    monkeypatch.setattr("ooc_moe_client.local.plane.STAGING_BYTES_MAX", LAYOUT.body_bytes - 1)
    scripted.push_scripts = [acknowledge]
    store = connect(scripted)
    assert isinstance(write(store, "b", {0: 1.0})[0], int)
    store.release("b")
    assert [header.HasField("staged_at") for header in scripted.headers] == [False]
    assert scripted.num_chunks == 1


def test_after_a_new_session_bodies_are_staged_anew(arena, scripted, connect):
    def dies(headers, context):
        next(headers)
        arena.hang_up()
        abort(context, Unavailable("killed"))
        yield

    scripted.push_scripts = [dies, acknowledge]
    assert isinstance(write(connect(scripted), "b", {3: 1.0})[3], int)
    assert scripted.pushes == [[(3, 1)], [(3, 1)]]
    assert scripted.sessions == arena.sessions == [1000, 1001]
    assert arena.staged[1][: LAYOUT.body_bytes] == bytes(body(1.0))


def test_after_a_broken_stream_a_body_keeps_its_place_in_the_session(arena, scripted, connect):
    def dies(headers, context):
        next(headers)
        next(headers)
        abort(context, Unavailable("killed"))
        yield

    scripted.push_scripts = [dies, acknowledge]
    write(connect(scripted), "b", {0: 1.0, 1: 2.0})
    assert [(header.expert, header.staged_at) for header in scripted.headers] == [(0, 0), (1, LAYOUT.body_bytes)] * 2
    assert len(arena.staged) == 1


@pytest.mark.parametrize("on", ["stream", "outcome"])
def test_a_push_in_a_session_that_the_daemon_forgot_is_made_in_another(arena, scripted, connect, on: str):
    def forgot(headers, context):
        header = next(headers)
        if on == "stream":
            abort(context, LeaseExpired("who?"))
        error = expert_pb2.ErrorInfo(kind="LeaseExpired", message="who?")
        yield expert_pb2.PushExpertsResponse(outcome=expert_pb2.PushOutcome(expert=0, push_number=header.push_number, error=error))
        list(headers)

    scripted.push_scripts = [forgot, acknowledge]
    assert write(connect(scripted), "b", {0: 1.0}) == {0: 101}
    assert scripted.sessions == [1000, 1001]


@pytest.mark.parametrize("durability", list(Durability))
@pytest.mark.parametrize("plane", [Plane.LOCAL, Plane.STREAM])
def test_the_callers_durability_travels(scripted, connect, durability: Durability, plane: Plane):
    scripted.push_scripts = [acknowledge]
    connect(scripted, plane=plane).push("b", [Push(expert=0, base_version=0, body=body(1.0))], durability=durability)
    assert [header.durability for header in scripted.headers] == [durability.value]


def test_places_in_staging_memory_never_overlap():
    staging, rng = Staging(64 << 10), np.random.default_rng(0)
    taken: dict[int, int] = {}
    for _ in range(2000):
        if taken and rng.random() < 0.5:
            start = int(rng.choice(list(taken)))
            assert (staging.bytes_at(start) == start % 251).all()
            staging.free(start)
            del taken[start]
            continue
        size, tries = int(rng.integers(1, 9)) << 10, iter([True, False])
        gaps = np.ones(64, bool)
        for start, length in taken.items():
            gaps[start >> 10 : start + length >> 10] = False
        largest = max(map(len, "".join("x" if free else " " for free in gaps).split()), default=0) << 10
        found = staging.allocate(size, wanted=lambda tries=tries: next(tries, False)) if size <= largest else None
        assert (found is not None) == (size <= largest)
        if found is not None:
            taken[found] = size
            staging.bytes_at(found)[:] = found % 251


def test_a_wait_for_a_place_ends_when_it_is_no_longer_wanted():
    staging, wanted = Staging(4096), threading.Event()
    wanted.set()
    assert staging.allocate(4096, wanted=wanted.is_set) == 0
    with futures.ThreadPoolExecutor() as pool:
        waiting = pool.submit(staging.allocate, 1, wanted=wanted.is_set)
        wanted.clear()
        staging.wake()
        assert waiting.result(timeout=30) is None


def test_staging_memory_keeps_its_size():
    staging = Staging(8192)
    for num_bytes in (4096, 16384):
        with pytest.raises(OSError, match="not permitted"):
            os.ftruncate(staging.fd, num_bytes)
    assert fcntl.fcntl(staging.fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
