"""What only a store across a wire must survive: daemons that are away, die in the middle, or send damaged bytes."""

import itertools
import queue
import threading
import time
from collections.abc import Iterator
from concurrent import futures

import pytest

from ooc_moe_client.hbm.cache import ExpertCache
from ooc_moe_client.remote.store import RemoteStore
from ooc_moe_client.store import Plane, Push
from ooc_moe_wire.codec import Checksums
from ooc_moe_wire.errors import (
    CorruptRecord,
    DeadlineExceeded,
    InvalidRequest,
    LostUpdate,
    NotTheWriter,
    TierFull,
    Unavailable,
)
from ooc_moe_wire.v1 import expert_pb2
from tests.client.conftest import LAYOUT, NUM_EXPERTS, body, read, spec, write
from tests.client.scripted import ScriptedDaemon, abort, acknowledge, fetch_into, served
from tests.conftest import DaemonProcess

ABSENT = "127.0.0.1:1"


def test_a_daemon_that_was_given_up_on_is_not_waited_for_again(daemon, monkeypatch):
    monkeypatch.setattr("ooc_moe_client.remote.connection.FIRST_CONTACT_S", 0.0)
    store = RemoteStore(daemon.target, patience_s=1.0)
    store.stats()
    daemon.kill()
    waited_s = []
    for _ in range(2):
        began = time.monotonic()
        with pytest.raises(Unavailable):
            store.stats()
        waited_s.append(time.monotonic() - began)
    assert waited_s[0] >= 1.0 > waited_s[1]
    monkeypatch.undo()
    daemon.start()
    store.stats()
    store.close()


def test_a_daemon_that_is_away_at_the_start_is_named():
    store = RemoteStore(ABSENT, patience_s=0.2)
    with pytest.raises(Unavailable, match=ABSENT):
        store.list_banks()
    with pytest.raises(Unavailable, match=ABSENT):
        list(store.fetch("b", [0], into=lambda _: pytest.fail("asked for memory")))
    with pytest.raises(Unavailable, match=ABSENT):
        store.open_for_writing("b")
    with pytest.raises(Unavailable, match=ABSENT):
        store.report_trainer([], "")
    store.close()


@pytest.mark.parametrize("name", ["a\nb", "ö", "x" * 129])
def test_a_trainers_name_that_cannot_travel_is_refused(name: str):
    with pytest.raises(InvalidRequest, match="trainer"):
        RemoteStore(ABSENT, trainer=name)


@pytest.mark.parametrize("plane", [Plane.LOCAL, Plane.STREAM])
def test_calls_wait_for_a_daemon_that_restarts(daemon: DaemonProcess, plane: Plane):
    store = RemoteStore(daemon.target, plane=plane)
    store.create_bank(spec("b"))
    versions = write(store, "b", {0: 1.0})
    daemon.kill()
    with futures.ThreadPoolExecutor() as pool:
        calls = [
            pool.submit(lambda: read(store, "b", range(NUM_EXPERTS))),
            pool.submit(lambda: write(store, "b", {0: 2.0, 1: 2.0}, versions)),
            pool.submit(lambda: store.fork_bank("b", "fork")),
            pool.submit(lambda: store.create_snapshot(["b"])),
        ]
        daemon.start()
        fetched, pushed, forked, taken = [call.result(timeout=60) for call in calls]
    assert len(fetched) == NUM_EXPERTS
    assert all(isinstance(outcome, int) for outcome in pushed.values())
    assert forked.forked_from == "b"
    assert taken.banks == ("b",)
    assert read(store, "b", [0])[0] == (pushed[0], body(2.0))
    store.close()


@pytest.mark.parametrize("plane", [Plane.LOCAL, Plane.STREAM])
def test_a_push_loop_goes_on_through_kills_and_loses_nothing(daemon: DaemonProcess, plane: Plane):
    store = RemoteStore(daemon.unix_target, plane=plane)
    store.create_bank(spec("b"))
    model = dict.fromkeys(range(NUM_EXPERTS), (0, 0.0))  # expert -> version and value
    kills = iter([False, True, False, True])
    rounds = itertools.count(1)

    def push_round() -> None:
        value = float(next(rounds))
        outcomes = write(store, "b", dict.fromkeys(model, value), {expert: version for expert, (version, _) in model.items()})
        for expert, outcome in outcomes.items():
            assert isinstance(outcome, int), outcome
            assert outcome > model[expert][0]
            model[expert] = (outcome, value)

    for kill in kills:
        if kill:
            killer = threading.Thread(target=daemon.restart)
            killer.start()
            while killer.is_alive():
                push_round()
            killer.join()
        push_round()
        assert read(store, "b", range(NUM_EXPERTS)) == {expert: (version, body(value)) for expert, (version, value) in model.items()}
    store.close()


def test_a_lease_is_taken_again_after_a_restart(daemon: DaemonProcess):
    first, second = RemoteStore(daemon.target), RemoteStore(daemon.target)
    first.create_bank(spec("b"))
    first.open_for_writing("b")
    daemon.restart()
    assert isinstance(write(first, "b", {0: 1.0})[0], int)
    with pytest.raises(NotTheWriter):
        second.open_for_writing("b")
    first.close()
    second.close()


def test_statistics_are_followed_through_a_restart(daemon: DaemonProcess):
    store = RemoteStore(daemon.target)
    store.create_bank(spec("b"))
    read(store, "b", [0])
    watching = store.watch_stats(0.1)
    assert next(watching).total.fetched_experts == 1
    daemon.restart()
    assert next(stats for stats in watching if stats.total.fetched_experts == 0).data_dir == str(daemon.data_dir)
    watching.close()
    store.close()


def test_a_dead_writers_lease_is_free(daemon: DaemonProcess):
    first, second = RemoteStore(daemon.target), RemoteStore(daemon.target)
    first.create_bank(spec("b"))
    first.open_for_writing("b")
    first._connection.close()  # As when its process dies: nothing is said.
    deadline = threading.Event()
    for _ in range(200):
        try:
            second.open_for_writing("b")
            break
        except NotTheWriter:
            deadline.wait(0.05)
    assert isinstance(write(second, "b", {0: 1.0})[0], int)
    second.close()


@pytest.fixture
def scripted() -> Iterator[ScriptedDaemon]:
    daemon = ScriptedDaemon()
    yield daemon
    daemon.stop()


def test_a_broken_fetch_goes_on_with_what_has_not_come(scripted: ScriptedDaemon):
    def breaking(experts, context):
        yield from served(experts[1])
        yield next(served(experts[0]))  # A header without its chunks.
        abort(context, Unavailable("draining"))

    scripted.fetch_scripts = [breaking, breaking, lambda experts, context: (message for expert in experts for message in served(expert))]
    bodies: dict[int, bytearray] = {}
    store = RemoteStore(scripted.target)
    assert [item.expert for item in fetch_into(bodies, store, [0, 1, 2, 3])] == [1, 2, 0, 3]
    assert scripted.fetches == [[0, 1, 2, 3], [0, 2, 3], [0, 3]]
    assert bodies == {expert: body(float(expert)) for expert in range(4)}
    store.close()


def test_damaged_bytes_are_never_yielded_and_the_sound_experts_are(scripted: ScriptedDaemon):
    scripted.fetch_scripts = [lambda experts, context: (message for expert in experts for message in served(expert, damaged=expert == 1))]
    store = RemoteStore(scripted.target)
    got = []
    with pytest.raises(CorruptRecord, match=r"bank 'b', expert 1: the optimizer section"):
        got.extend(item.expert for item in fetch_into({}, store, [0, 1, 2]))
    fetching = fetch_into({}, store, [0, 1, 2])
    assert [next(fetching).expert, next(fetching).expert] == [0, 2]
    with pytest.raises(CorruptRecord):
        next(fetching)
    store.close()


def test_an_expert_that_the_daemon_cannot_serve_comes_as_an_error_after_the_others(scripted: ScriptedDaemon):
    def damaged_on_disk(experts, context):
        error = expert_pb2.ErrorInfo(kind="CorruptRecord", message="expert 0 is damaged")
        yield expert_pb2.FetchExpertsResponse(header=expert_pb2.ExpertHeader(expert=0, error=error))
        yield from served(1)

    scripted.fetch_scripts = [damaged_on_disk]
    store = RemoteStore(scripted.target)
    fetching = fetch_into({}, store, [0, 1])
    assert next(fetching).expert == 1
    with pytest.raises(CorruptRecord, match="expert 0 is damaged"):
        next(fetching)
    store.close()


def test_a_full_tier_is_tried_again_a_bounded_number_of_times(scripted: ScriptedDaemon):
    def full(experts, context):
        abort(context, TierFull("everything is pinned", retry_after_ms=1))
        yield

    scripted.fetch_scripts = [full, full, lambda experts, context: served(experts[0])]
    store = RemoteStore(scripted.target)
    assert [item.expert for item in fetch_into({}, store, [3])] == [3]
    scripted.fetch_scripts, scripted.fetches = [full], []
    with pytest.raises(TierFull, match="everything is pinned"):
        list(fetch_into({}, store, [3]))
    assert 1 < len(scripted.fetches) < 50
    store.close()


def test_a_silent_daemon_is_a_missed_deadline(scripted: ScriptedDaemon):
    finish = threading.Event()

    def silent(experts, context):
        finish.wait(30)
        yield from ()

    scripted.fetch_scripts = [silent]
    store = RemoteStore(scripted.target, timeout_s=0.2)
    with pytest.raises(DeadlineExceeded, match=scripted.target):
        list(fetch_into({}, store, [0]))
    finish.set()
    store.close()


def answers_one_then_dies(headers, context):
    yield from acknowledge([next(headers)], context)
    next(headers)
    abort(context, Unavailable("killed"))


def stays_away(headers, context):
    abort(context, Unavailable("away"))
    yield


def swallows_one_and_dies(headers, context):
    next(headers)
    abort(context, Unavailable("killed"))
    yield


def listed(expert: int, *, version: int, value: float) -> expert_pb2.ExpertInfo:
    written = Checksums.of(LAYOUT, memoryview(body(value)))
    return expert_pb2.ExpertInfo(expert=expert, version=version, parameter_xxh3=written.parameters, optimizer_xxh3=written.optimizer)


def test_pushes_without_an_answer_are_sent_again_under_their_numbers(scripted: ScriptedDaemon):
    scripted.push_scripts = [answers_one_then_dies, acknowledge]
    store = RemoteStore(scripted.target)
    assert write(store, "b", {0: 1.0, 1: 1.0, 2: 1.0}) == {0: 101, 1: 102, 2: 103}
    assert scripted.pushes[1] == [(1, 2), (2, 3)]
    store.close()


def test_a_daemon_that_is_silent_on_a_push_is_connected_to_anew(scripted: ScriptedDaemon):
    def swallows(headers, context):
        for _ in headers:
            pass
        yield from ()

    scripted.push_scripts = [swallows, acknowledge]
    store = RemoteStore(scripted.target, timeout_s=0.3)
    assert write(store, "b", {4: 1.0}) == {4: 101}
    assert [stream for stream in scripted.pushes if stream] == [[(4, 1)], [(4, 1)]]
    store.close()


def test_an_expert_without_room_is_pushed_again(scripted: ScriptedDaemon):
    refusals = iter([True, True, False])

    def full_twice(headers, context):
        for header in headers:
            outcome = expert_pb2.PushOutcome(expert=header.expert, push_number=header.push_number, version=50)
            if header.expert == 1 and next(refusals):
                error = expert_pb2.ErrorInfo(kind="TierFull", message="no room")
                outcome = expert_pb2.PushOutcome(expert=header.expert, push_number=header.push_number, error=error)
            yield expert_pb2.PushExpertsResponse(outcome=outcome)

    scripted.push_scripts = [full_twice]
    store = RemoteStore(scripted.target)
    assert write(store, "b", {0: 1.0, 1: 1.0}) == {0: 50, 1: 50}
    assert scripted.pushes == [[(0, 1), (1, 2), (1, 3), (1, 4)]]
    store.close()


def test_a_push_given_up_on_but_written_is_the_base_of_the_next(scripted: ScriptedDaemon):
    scripted.push_scripts = [swallows_one_and_dies]
    store = RemoteStore(scripted.target, patience_s=0.3)
    with pytest.raises(Unavailable):
        write(store, "b", {3: 1.0}, {3: 17})
    scripted.listed = listed(3, version=18, value=1.0)
    scripted.push_scripts, scripted.headers = [acknowledge], []
    assert isinstance(write(store, "b", {3: 2.0}, {3: 17})[3], int)
    assert isinstance(write(store, "b", {3: 3.0}, {3: 17})[3], int)
    assert [header.base_version for header in scripted.headers] == [18, 17]
    store.close()


def test_of_several_pushes_given_up_on_the_one_that_was_written_is_the_base_of_the_next(scripted: ScriptedDaemon):
    scripted.push_scripts = [swallows_one_and_dies]
    store = RemoteStore(scripted.target, patience_s=0.3)
    for value in (1.0, 2.0):
        with pytest.raises(Unavailable):
            write(store, "b", {3: value}, {3: 17})
    scripted.listed = listed(3, version=18, value=1.0)
    scripted.push_scripts, scripted.headers = [acknowledge], []
    write(store, "b", {3: 3.0}, {3: 17})
    assert [header.base_version for header in scripted.headers] == [18]
    store.close()


def test_a_push_given_up_on_is_remembered_while_the_daemon_cannot_be_asked_about_it(scripted: ScriptedDaemon):
    scripted.push_scripts = [swallows_one_and_dies]
    store = RemoteStore(scripted.target, patience_s=0.3)
    with pytest.raises(Unavailable):
        write(store, "b", {3: 1.0}, {3: 17})
    scripted.list_errors = 1
    with pytest.raises(InvalidRequest, match="as the test wants"):
        write(store, "b", {3: 2.0}, {3: 17})
    scripted.listed = listed(3, version=18, value=1.0)
    scripted.push_scripts, scripted.headers = [acknowledge], []
    write(store, "b", {3: 2.0}, {3: 17})
    assert [header.base_version for header in scripted.headers] == [18]
    store.close()


def test_what_was_answered_before_the_daemon_went_away_for_good_is_told(scripted: ScriptedDaemon):
    scripted.push_scripts = [answers_one_then_dies, stays_away]
    store = RemoteStore(scripted.target, patience_s=0.3)
    outcomes = write(store, "b", {0: 1.0, 1: 1.0, 2: 1.0})
    assert outcomes[0] == 101
    assert isinstance(outcomes[1], Unavailable)
    assert isinstance(outcomes[2], Unavailable)
    scripted.fetch_scripts = [lambda experts, context: served(0)]
    with pytest.raises(LostUpdate, match="gave version 1, but had acknowledged 101"):
        list(fetch_into({}, store, [0]))
    scripted.listed = listed(1, version=102, value=1.0)
    scripted.push_scripts, scripted.headers = [acknowledge], []
    write(store, "b", {0: 2.0, 1: 2.0}, {0: 101})
    assert [(header.expert, header.base_version) for header in scripted.headers] == [(0, 101), (1, 102)]
    store.close()


def test_a_cache_pushes_again_only_what_was_not_answered(scripted: ScriptedDaemon):
    scripted.fetch_scripts = [lambda experts, context: (message for expert in experts for message in served(expert))]
    scripted.push_scripts = [answers_one_then_dies, stays_away]
    store = RemoteStore(scripted.target, patience_s=0.3)
    with ExpertCache(store, "b", capacity_experts=3) as cache:
        with cache.updating([0, 1, 2]):
            pass
        with pytest.raises(Unavailable):
            cache.flush()
        assert cache.stats().dirty == 2
        scripted.push_scripts, scripted.headers = [acknowledge], []
        cache.flush()
        assert [(header.expert, header.base_version) for header in scripted.headers] == [(1, 2), (2, 3)]
    store.close()


def test_several_threads_push_through_one_stream(scripted: ScriptedDaemon):
    scripted.push_scripts = [acknowledge]
    store = RemoteStore(scripted.target)
    with futures.ThreadPoolExecutor(4) as pool:
        pushing = [pool.submit(store.push, "b", [Push(expert=n % 3, base_version=0, body=body(1.0))]) for n in range(24)]
        versions = [call.result(timeout=30)[0] for call in pushing]
    assert len(set(versions)) == 24
    assert len(scripted.pushes) == 1
    numbers = [number for _, number in scripted.pushes[0]]
    assert numbers == sorted(numbers)
    store.close()


def test_an_expert_has_at_most_one_push_in_flight(scripted: ScriptedDaemon):
    received: queue.Queue[int] = queue.Queue()

    def answers_two_by_two(headers, context):
        for first in headers:
            received.put(first.expert)
            second = next(headers)
            received.put(second.expert)
            yield from acknowledge([first, second], context)

    scripted.push_scripts = [answers_two_by_two]
    store = RemoteStore(scripted.target)
    with futures.ThreadPoolExecutor(4) as pool:
        pushing = []
        for expert in (0, 0, 1, 2):  # The second 0 waits for the first one's answer, which waits for 1.
            pushing.append(pool.submit(store.push, "b", [Push(expert=expert, base_version=0, body=body(1.0))]))
            if len(pushing) == 1:
                assert received.get(timeout=30) == 0
        assert received.get(timeout=30) in (1, 2)
        assert len({call.result(timeout=30)[0] for call in pushing}) == 4
    store.close()
