"""PushExperts, message by message against a daemon; staged pushes against an engine."""

import asyncio

import grpc
import pytest

from ooc_moe_server.engine import push
from ooc_moe_wire.codec import chunks, verify
from ooc_moe_wire.errors import CorruptRecord, InvalidRequest, NotTheWriter, StaleVersion, UnknownBank, UnknownExpert
from ooc_moe_wire.v1 import expert_pb2
from tests.server.engine_store import LAYOUT, SEEDED, Session, body_of, opened, until


def test_a_push_is_acknowledged_with_a_rising_version_and_read_back(client, bank):
    stream = client.stream(bank)
    first = stream.push(1, client.random_body(1), base_version=0, push_number=1)
    second = stream.push(1, client.random_body(2), base_version=first.version, push_number=2)
    stream.close()
    assert 0 < first.version < second.version
    got = client.fetch(bank, [1])[1]
    assert (got.body, got.header.version) == (client.random_body(2), second.version)


def test_pushes_over_a_unix_socket_are_read_back_over_tcp(shared_daemon, connect, client, bank):
    connect(shared_daemon.unix_target).put(bank, {4: client.random_body(4)})
    assert client.body(bank, 4) == client.random_body(4)


def test_many_pushes_may_be_under_way_at_once(client, bank):
    stream = client.stream(bank)
    for expert in range(8):
        stream.send(header=client.push_header(expert, client.random_body(expert), push_number=expert + 1))
        stream.body(client.random_body(expert))
    outcomes = [stream.outcome() for _ in range(8)]
    stream.close()
    assert len({outcome.version for outcome in outcomes}) == 8
    got = client.fetch(bank, range(8))
    assert all(got[outcome.expert].header.version == outcome.version for outcome in outcomes)
    assert all(got[expert].body == client.random_body(expert) for expert in range(8))


def test_a_repeated_push_gets_its_first_outcome_and_is_not_written_twice(client, bank):
    stream = client.stream(bank)
    first = stream.push(1, client.random_body(1), base_version=0, push_number=5)
    stream.hang_up()
    writes = client.stats().nvme.writes
    again = client.stream(bank).push(1, client.random_body(1), base_version=0, push_number=5)
    assert again == first
    assert client.stats().nvme.writes == writes


def test_a_stale_push_is_refused_naming_both_versions_and_the_stream_goes_on(client, bank):
    stream = client.stream(bank)
    first = stream.push(1, client.random_body(1), base_version=0, push_number=1)
    refused = stream.push(1, client.random_body(2), base_version=0, push_number=2)
    assert refused.error.kind == StaleVersion.__name__
    assert "base_version 0" in refused.error.message
    assert str(first.version) in refused.error.message
    assert (refused.version, refused.push_number) == (0, 2)
    assert stream.push(2, client.random_body(2), base_version=0, push_number=3).version > first.version
    stream.close()
    assert client.body(bank, 1) == client.random_body(1)


def test_a_push_whose_bytes_do_not_match_their_checksums_is_refused_and_not_kept(client, bank):
    stream = client.stream(bank)
    stream.send(header=client.push_header(1, client.random_body(1)))
    stream.body(client.random_body(2))
    assert stream.outcome().error.kind == CorruptRecord.__name__
    stream.close()
    assert client.body(bank, 1) == client.seeded(1)


@pytest.mark.parametrize(
    ("change", "kind", "word"),
    [
        ({"expert": 8}, UnknownExpert, "expert 8"),
        ({"push_number": 0}, InvalidRequest, "push_number"),
        ({"parameter_bytes": 4}, InvalidRequest, "4096"),
        ({"optimizer_bytes": 1 << 60}, InvalidRequest, str(1 << 60)),
    ],
)
def test_a_wrong_header_is_refused_as_an_outcome(client, bank, change, kind, word):
    header = client.push_header(1, client.random_body(1))
    for name, value in change.items():
        setattr(header, name, value)
    stream = client.stream(bank)
    stream.send(header=header)
    outcome = stream.outcome()
    assert outcome.error.kind == kind.__name__
    assert word in outcome.error.message
    stream.hang_up()


def test_the_chunks_of_a_refused_push_are_skipped(client, bank):
    header = client.push_header(8, client.random_body(1))
    stream = client.stream(bank)
    stream.send(header=header)
    stream.body(client.random_body(1))
    assert stream.outcome().error.kind == UnknownExpert.__name__
    assert stream.push(1, client.random_body(1), base_version=0, push_number=2).version > 0
    stream.close()


@pytest.mark.parametrize(
    "breach", ["too much", "out of order", "empty chunk", "chunk first", "header too early", "open twice", "nothing", "oversized chunk"]
)
def test_a_breach_of_the_sequence_ends_the_stream_and_nothing_is_kept(client, bank, breach):
    body = client.random_body(1)
    header = client.push_header(1, body)
    stream = client.stream(bank)
    if breach != "chunk first":
        stream.send(header=header)
    match breach:
        case "too much":
            stream.send(chunk=expert_pb2.Chunk(payload=body + b"x"))
        case "out of order" | "chunk first":
            stream.send(chunk=expert_pb2.Chunk(offset=1, payload=body[1:]))
        case "empty chunk":
            stream.send(chunk=expert_pb2.Chunk())
        case "header too early":
            stream.send(header=header)
        case "open twice":
            stream.send(open=expert_pb2.PushOpen(bank=bank, writer_id="writer"))
        case "nothing":
            stream.send()
        case "oversized chunk":
            stream.send(chunk=expert_pb2.Chunk(payload=bytes((2 << 20) + 1)))
    with client.refused(InvalidRequest):
        stream.outcome()
    assert client.body(bank, 1) == client.seeded(1)
    assert client.stats().dram.pinned_bytes == 0
    client.stream(bank, "another").close()  # The lease is free again.


def test_a_truncated_push_is_refused_and_what_came_before_it_is_kept(client, bank):
    stream = client.stream(bank)
    kept = stream.push(1, client.random_body(1), base_version=0, push_number=1)
    stream.send(header=client.push_header(2, client.random_body(2), push_number=2))
    stream.send(chunk=expert_pb2.Chunk(payload=b"x" * 100))
    with client.refused(InvalidRequest, "expert 2", "100 of"):
        stream.close()
    assert client.fetch(bank, [1, 2])[1].header.version == kept.version
    assert client.body(bank, 2) == client.seeded(2)


def test_a_message_above_the_limit_ends_the_call_and_the_daemon_lives(client, bank):
    stream = client.stream(bank)
    stream.send(chunk=expert_pb2.Chunk(payload=bytes(5 << 20)))
    with pytest.raises(grpc.RpcError) as caught:
        stream.outcome()
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert client.body(bank, 0) == client.seeded(0)


def test_a_stream_must_begin_with_an_open(client, bank):
    stream = client.stream(bank, open_it=False)
    stream.send(header=client.push_header(1, client.random_body(1)))
    with client.refused(InvalidRequest, "PushOpen"):
        stream.outcome()


@pytest.mark.parametrize("writer_id", ["", "w" * 129, "w\0"], ids=["empty", "long", "with-a-zero"])
def test_a_bad_writer_id_is_refused(client, bank, writer_id):
    with client.refused(InvalidRequest, "writer_id"):
        client.stream(bank, writer_id)


def test_an_unknown_bank_cannot_be_opened(client):
    with client.refused(UnknownBank, "nowhere"):
        client.stream("nowhere")


def test_a_bank_has_one_writer_until_that_one_leaves(client, bank):
    first = client.stream(bank, "first")
    with client.refused(NotTheWriter, "'first'"):
        client.stream(bank, "second")
    first.close()
    client.stream(bank, "second").close()


def test_the_same_writer_takes_over_from_its_older_stream(client, bank):
    older = client.stream(bank, "writer")
    assert older.opened.took_over is False
    older.send(header=client.push_header(1, client.random_body(1)))  # Half sent, and never finished.
    newer = client.stream(bank, "writer")
    assert newer.opened.took_over is True
    with client.refused(NotTheWriter, "newer stream"):
        older.outcome()
    assert newer.push(1, client.random_body(2), base_version=0, push_number=1).version > 0
    with client.refused(NotTheWriter):
        client.stream(bank, "stranger")  # The older stream's end did not give the newer one's lease away.
    newer.close()
    assert client.stats().dram.pinned_bytes == 0


def test_two_writers_of_two_banks_do_not_meet(client, bank):
    client.create(bank + "-2")
    one, two = client.stream(bank, "one"), client.stream(bank + "-2", "two")
    assert one.push(1, client.random_body(1), base_version=0, push_number=1).version > 0
    assert two.push(1, client.random_body(2), base_version=0, push_number=1).version > 0
    one.close()
    two.close()
    assert (client.body(bank, 1), client.body(bank + "-2", 1)) == (client.random_body(1), client.random_body(2))


def test_staged_bodies_are_taken_from_the_callers_memory_without_chunks(tmp_path):
    async def scenario():
        async with opened(tmp_path) as store:
            session = Session(4 * LAYOUT.body_bytes)
            writer = store.writer(session)
            for expert, in_memory in enumerate((False, True, False, True)):
                offset = expert * LAYOUT.body_bytes
                session.memory[offset : offset + LAYOUT.body_bytes] = body_of(expert)
                await store.begin(writer, expert, body_of(expert), staged_at=offset, in_memory=in_memory)
            await writer.wait_outcomes()
            writer.close()
            assert all(writer.outcomes.get_nowait().version for _ in range(4))
            assert await store.bodies(0, 1, 2, 3) == {expert: body_of(expert) for expert in range(4)}

    asyncio.run(scenario())


def test_a_caller_that_changes_staged_bytes_is_refused_or_not_heard(tmp_path, monkeypatch):
    """The copy in the arena is what is verified, and what is kept."""

    async def scenario():
        async with opened(tmp_path) as store:
            session = Session(2 * LAYOUT.body_bytes)
            session.memory[:] = body_of(1) + body_of(2)
            writer = store.writer(session)
            await store.begin(writer, 0, body_of(1), staged_at=LAYOUT.body_bytes)  # Bytes that do not match the checksum.
            await writer.wait_outcomes()
            assert writer.outcomes.get_nowait().error.kind == CorruptRecord.__name__
            monkeypatch.setattr(push, "verify", changing(session))
            await store.begin(writer, 0, body_of(1), staged_at=0)
            await writer.wait_outcomes()
            assert writer.outcomes.get_nowait().version
            writer.close()
            assert await store.bodies(0) == {0: body_of(1)}
            store.drop_from_dram(0)
            assert await store.bodies(0) == {0: body_of(1)}

    def changing(session):
        def change_and_verify(*arguments, **options):
            verify(*arguments, **options)
            session.memory[:] = bytes(len(session.memory))

        return change_and_verify

    asyncio.run(scenario())


def test_a_staged_push_without_a_session_or_beyond_its_memory_is_refused_as_an_outcome(tmp_path):
    async def scenario():
        async with opened(tmp_path) as store:
            session = Session(LAYOUT.body_bytes)
            session.memory[:] = body_of(1)
            for staging, offset in ((None, 0), (session, 4096)):
                writer = store.writer(staging)
                await store.begin(writer, 0, body_of(1), staged_at=offset)
                await store.begin(writer, 1, body_of(1))  # The stream goes on.
                for chunk in chunks(memoryview(body_of(1))):
                    writer.add(chunk)
                await writer.wait_outcomes()
                writer.close()
                refused, kept = sorted((writer.outcomes.get_nowait() for _ in range(2)), key=lambda outcome: outcome.expert)
                assert (refused.error.kind, kept.error.kind) == (InvalidRequest.__name__, "")
                assert "staged" in refused.error.message
            assert await store.bodies(0) == {0: SEEDED}
            assert store.stats.dram.pinned_bytes == 0

    asyncio.run(scenario())


def test_the_repeat_of_a_staged_push_and_a_stale_one_wait_for_no_chunks(tmp_path):
    async def scenario():
        async with opened(tmp_path) as store:
            session = Session(LAYOUT.body_bytes)
            session.memory[:] = body_of(1)
            writer = store.writer(session)
            for _ in range(2):
                await store.begin(writer, 0, body_of(1), staged_at=0, push_number=1, base_version=0)
            await store.begin(writer, 0, body_of(1), staged_at=0, push_number=2, base_version=0)
            writer.end()
            await writer.wait_outcomes()
            writer.close()
            outcomes = [writer.outcomes.get_nowait() for _ in range(3)]
            assert sorted(outcome.error.kind for outcome in outcomes) == ["", "", StaleVersion.__name__]
            await until(lambda: store.stats.dram.pinned_bytes == 0)

    asyncio.run(scenario())
