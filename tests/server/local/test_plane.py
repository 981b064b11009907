"""The local plane. First on a plane inside the test: leases, expiry, staging. Then with a real daemon: peers, deaths, mappings."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import gc
import mmap
import os
import socket
import subprocess
import sys
import time

import grpc
import numpy as np
import pytest

from ooc_moe_server.engine.engine import Engine
from ooc_moe_server.local import plane
from ooc_moe_server.local.plane import STAGING_BYTES_MAX, LocalPlane
from ooc_moe_server.rpc import replies
from ooc_moe_server.rpc.interceptor import Guard
from ooc_moe_server.rpc.local_fetches import LocalFetches
from ooc_moe_wire.codec import HOLDS_NONE, Checksums
from ooc_moe_wire.errors import CorruptRecord, InvalidRequest, LeaseExpired, TierFull, Unavailable, error_named
from ooc_moe_wire.layout import BLOCK_BYTES, BankSpec, Layout, TensorSpec
from ooc_moe_wire.local import ACK, F_SEAL_FUTURE_WRITE, LEASE_S, PACKET_BYTES_MAX, Welcome, pack_fetch, pack_release, pack_stage
from ooc_moe_wire.v1 import expert_pb2, local_pb2, local_pb2_grpc

LAYOUT = Layout(parameters=(TensorSpec(name="w", shape=(8,)),), optimizer=(TensorSpec(name="m", shape=(8,)),))
RECORD = LAYOUT.record_bytes  # Three blocks.
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


class Caller:
    """The client's end of the socket."""

    def __init__(self, socket_name: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(30)
        self.socket.connect(f"\0{socket_name}")
        packet, descriptors, _, _ = socket.recv_fds(self.socket, 1024, 4)
        self.descriptors = descriptors
        if packet:
            self.welcome = Welcome.unpack(packet)
            self.arena_fd, self.generations_fd = descriptors
            self.arena = mmap.mmap(self.arena_fd, self.welcome.arena_bytes, prot=mmap.PROT_READ)
            words = self.welcome.arena_bytes // BLOCK_BYTES
            self.generations = np.frombuffer(mmap.mmap(self.generations_fd, 8 * words, prot=mmap.PROT_READ), dtype=np.uint64)

    @property
    def session(self) -> int:
        return self.welcome.session

    def body(self, lease: Lease, size: int = LAYOUT.body_bytes) -> bytes:
        return self.arena[lease.offset : lease.offset + size]

    def is_whole(self, lease: Lease) -> bool:
        """Whether the generation is still the one that the lease named."""
        assert lease.generation % 2 == 0
        return int(self.generations[lease.offset // BLOCK_BYTES - 1]) == lease.generation

    def stage(self, size: int, *, seals: int = SEALS, said: int | None = None, descriptors: int = 1) -> int:
        descriptor = os.memfd_create("staging", os.MFD_ALLOW_SEALING)
        os.ftruncate(descriptor, size)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
        socket.send_fds(self.socket, [pack_stage(size if said is None else said)], [descriptor] * descriptors)
        return descriptor

    def ask(self, fetch: local_pb2.LocalFetch) -> None:
        self.socket.send(pack_fetch(fetch))

    def answers(self) -> list[local_pb2.LocalAnswer]:
        """Receives the answers to the fetch, up to and including the end."""
        received = []
        while not received or not received[-1].HasField("end"):
            if not (packet := self.socket.recv(PACKET_BYTES_MAX)):
                raise ConnectionError("the daemon ended the session")
            received.append(local_pb2.LocalAnswer.FromString(packet))
        return received

    def fetch(self, bank: str, *experts: int, pin: bool = False, **options) -> list[local_pb2.LocalAnswer]:
        self.ask(local_pb2.LocalFetch(request=expert_pb2.FetchExpertsRequest(bank=bank, experts=experts, **options), pin=pin))
        return self.answers()

    def release(self, *ids: int) -> None:
        self.socket.send(pack_release(ids))

    def is_closed(self) -> bool:
        """Waits for the daemon's end to close."""
        try:
            return self.socket.recv(1024) == b""
        except ConnectionResetError:
            return True

    def close(self) -> None:
        self.socket.close()
        for descriptor in self.descriptors:
            os.close(descriptor)
        self.descriptors = []


class Lease:
    """One row of a Leases message."""

    def __init__(self, leases: local_pb2.Leases, row: int) -> None:
        self.id, self.expert, self.version = leases.ids[row], leases.experts[row], leases.versions[row]
        self.served_from, self.offset, self.generation = leases.served_from[row], leases.offsets[row], leases.generations[row]
        self.checksums = Checksums(leases.parameter_xxh3[row], leases.optimizer_xxh3[row])


def rows(answer: local_pb2.LocalAnswer) -> list[Lease]:
    return [Lease(answer.leases, row) for row in range(len(answer.leases.ids))]


class Store:
    """An engine with one bank of seeded experts and a plane whose clock is `now`."""

    def __init__(self, engine: Engine, bank) -> None:
        self.engine, self.bank, self.now, self.uid = engine, bank, 100.0, os.geteuid()
        self.guard = Guard()
        self.guard.refusal = None
        self.plane = LocalPlane(
            engine.arena,
            engine.dram,
            LocalFetches(lambda: engine, self.guard).serve,
            patience_s=0.0,
            clock=lambda: self.now,
            uid_of=lambda _: self.uid,
        )
        self.callers: list[Caller] = []

    async def connect(self) -> Caller:
        self.callers.append(await asyncio.to_thread(Caller, self.plane.socket_name))
        return self.callers[-1]

    async def fetch(self, caller: Caller, *experts: int, **options) -> list[local_pb2.LocalAnswer]:
        """Returns the answers to a fetch. Raises the error that ended it."""
        *answers, last = await asyncio.to_thread(caller.fetch, "b", *experts, **options)
        if last.end.HasField("error"):
            raise error_named(last.end.error.kind, last.end.error.message)
        return answers

    async def lease(self, caller: Caller, *experts: int, pin: bool = False) -> list[Lease]:
        return [lease for answer in await self.fetch(caller, *experts, pin=pin) for lease in rows(answer)]

    async def bring(self, *experts: int) -> None:
        """Makes experts resident."""
        scopes = self.engine.stats.scopes("t")
        fetch = self.engine.fetch(self.bank, experts, known_versions=(), demand=True, section_bytes=0, scopes=scopes)
        async for _ in fetch.experts():
            pass

    @property
    def pinned_bytes(self) -> int:
        return self.engine.snapshot_stats().dram.pinned_bytes

    @property
    def num_unchanged(self) -> int:
        return self.engine.snapshot_stats().total.unchanged

    def evict(self, expert: int) -> None:
        self.engine.dram.discard(self.bank.source(expert, self.bank.record(expert)))

    def seeded(self, expert: int) -> bytes:
        body = bytearray(LAYOUT.body_bytes)
        LAYOUT.initialize(body, seed=self.bank.spec.seed, expert=expert)
        return bytes(body)


@contextlib.asynccontextmanager
async def opened(directory, *, records: int = 64):
    engine = await Engine.open(directory, records * RECORD, patience_s=0.0)
    bank = await engine.changes.create_bank(BankSpec(name="b", num_experts=256, layout=LAYOUT))
    store = Store(engine, bank)
    try:
        yield store
    finally:
        for caller in store.callers:
            caller.close()
        store.plane.close()
        await engine.close()


async def until(condition) -> None:
    """Lets other tasks run until the condition holds."""
    for _ in range(10_000):
        if condition():
            return
        await asyncio.sleep(0.001)
    raise AssertionError("it never came to hold")


def run(scenario, directory, **options) -> None:
    async def main() -> None:
        async with opened(directory, **options) as store:
            await scenario(store)

    asyncio.run(main())


def test_leases_tell_where_the_right_bytes_lie(tmp_path):
    async def scenario(store):
        caller = await store.connect()
        for tier in (expert_pb2.TIER_SEED, expert_pb2.TIER_DRAM):
            leases = await store.lease(caller, 3, 1, 2)
            assert sorted(lease.expert for lease in leases) == [1, 2, 3]
            for lease in leases:
                assert (lease.served_from, lease.version) == (tier, 0)
                assert caller.body(lease) == store.seeded(lease.expert)
                assert lease.checksums == Checksums.of(LAYOUT, memoryview(caller.body(lease)))
                assert caller.is_whole(lease)
        assert len({lease.id for lease in leases}) == 3
        access = store.engine.snapshot_stats().total
        assert (access.fetched_bytes, access.leased_bytes) == (6 * LAYOUT.body_bytes, 6 * LAYOUT.body_bytes)

    run(scenario, tmp_path)


def test_a_lease_pins_its_record_until_it_is_released_and_then_its_generation_turns_odd(tmp_path):
    async def scenario(store):
        caller = await store.connect()
        (lease,) = await store.lease(caller, 5)
        assert store.pinned_bytes == store.plane.leased_bytes == RECORD
        store.evict(5)
        assert caller.is_whole(lease)
        caller.release(lease.id)
        await until(lambda: store.pinned_bytes == 0)
        assert store.plane.leased_bytes == 0
        assert not caller.is_whole(lease)
        assert int(caller.generations[lease.offset // BLOCK_BYTES - 1]) % 2 == 1

    run(scenario, tmp_path)


def test_an_expired_lease_is_seen_by_its_generation_once_the_place_is_used_again(tmp_path):
    async def scenario(store):
        caller = await store.connect()
        (lease,) = await store.lease(caller, 5)
        store.now += LEASE_S - 0.1
        store.plane.expire()
        assert store.pinned_bytes == RECORD
        store.now += 0.2
        store.plane.expire()
        assert store.pinned_bytes == 0
        assert caller.is_whole(lease)  # No fetch has used the expert yet.
        store.evict(5)
        (other,) = await store.lease(caller, 6)
        assert other.offset == lease.offset
        assert not caller.is_whole(lease)
        assert caller.is_whole(other)
        caller.release(lease.id, 12345, other.id)  # A lease that has ended, one that was never given, and ours.
        await until(lambda: store.pinned_bytes == 0)
        assert not store.plane.session(caller.session).closed

    run(scenario, tmp_path)


def test_pinned_leases_stay_until_they_are_released(tmp_path):
    async def scenario(store):
        caller = await store.connect()
        leases = await store.lease(caller, 1, 2, pin=True)
        store.now += 1000 * LEASE_S
        store.plane.expire()
        assert store.pinned_bytes == 2 * RECORD
        caller.release(*(lease.id for lease in leases))
        await until(lambda: store.pinned_bytes == 0)

    run(scenario, tmp_path)


def test_a_closed_session_leaves_no_pin_and_is_unknown(tmp_path):
    async def scenario(store):
        caller = await store.connect()
        await store.lease(caller, 1, 2, pin=True)
        assert store.plane.num_sessions == 1
        caller.socket.close()
        await until(lambda: store.plane.num_sessions == 0)
        assert store.pinned_bytes == store.plane.leased_bytes == 0
        with pytest.raises(LeaseExpired):
            store.plane.session(caller.session)

    run(scenario, tmp_path)


def test_leases_come_in_growing_batches_within_the_sessions_room(tmp_path, monkeypatch):
    monkeypatch.setattr(replies, "FIRST_LEASES_BYTES", RECORD)

    async def scenario(store):
        caller = await store.connect()
        await store.bring(*range(24))
        store.plane.patience_s = 30.0

        def copy_all() -> list[int]:
            caller.ask(local_pb2.LocalFetch(request=expert_pb2.FetchExpertsRequest(bank="b", experts=range(24))))
            sizes = []
            while not (answer := local_pb2.LocalAnswer.FromString(caller.socket.recv(PACKET_BYTES_MAX))).HasField("end"):
                leases = rows(answer)
                sizes.append(len(leases))
                assert all(caller.body(lease) == store.seeded(lease.expert) for lease in leases)
                caller.release(*(lease.id for lease in leases))
            return sizes

        assert await asyncio.to_thread(copy_all) == [1, 4, 16, 3]
        await until(lambda: store.plane.leased_bytes == 0)
        store.plane.session_bytes_max = 8 * RECORD
        sizes = await asyncio.to_thread(copy_all)
        assert sum(sizes) == 24
        assert max(sizes) <= 8

    run(scenario, tmp_path)


def test_a_caller_that_releases_nothing_is_refused_and_holds_no_other_up(tmp_path):
    async def scenario(store):
        greedy, modest = await store.connect(), await store.connect()
        with pytest.raises(TierFull, match="leases"):
            await store.lease(greedy, *range(33))  # Half of 64 records is the most.
        assert store.plane.leased_bytes == 32 * RECORD
        store.plane.patience_s = 30.0
        waiting = asyncio.create_task(store.lease(greedy, 100))
        assert len(await store.lease(modest, *range(8))) == 8
        assert not waiting.done()
        store.now += LEASE_S
        store.plane.expire()
        assert [lease.expert for lease in await waiting] == [100]

    run(scenario, tmp_path)


def test_leases_of_all_together_take_at_most_three_quarters_of_the_arena_and_waiting_callers_all_get_on(tmp_path):
    async def scenario(store):
        store.plane.patience_s = 30.0
        callers = [await store.connect() for _ in range(6)]
        await store.bring(*range(180))
        highest = 0

        def copy_all(caller: Caller, first: int) -> int:
            nonlocal highest
            caller.ask(local_pb2.LocalFetch(request=expert_pb2.FetchExpertsRequest(bank="b", experts=range(first, first + 30))))
            num_right = 0
            while not (answer := local_pb2.LocalAnswer.FromString(caller.socket.recv(PACKET_BYTES_MAX))).HasField("end"):
                leases = rows(answer)
                highest = max(highest, store.plane.leased_bytes)
                time.sleep(0.005)
                num_right += sum(caller.body(lease) == store.seeded(lease.expert) and caller.is_whole(lease) for lease in leases)
                caller.release(*(lease.id for lease in leases))
            return num_right

        copying = (asyncio.to_thread(copy_all, caller, 30 * place) for place, caller in enumerate(callers))
        assert await asyncio.gather(*copying) == [30] * 6
        assert 0 < highest <= 150 * RECORD
        await until(lambda: store.pinned_bytes == 0)

    run(scenario, tmp_path, records=200)


def test_a_record_larger_than_the_share_can_still_be_leased(tmp_path):
    async def scenario(store):
        caller = await store.connect()
        (lease,) = await store.lease(caller, 1)
        assert caller.body(lease) == store.seeded(1)

    run(scenario, tmp_path, records=1)


def test_a_session_that_closes_ends_the_fetch_that_waits_for_its_leases(tmp_path):
    async def scenario(store):
        store.plane.patience_s = 30.0
        caller = await store.connect()
        await store.lease(caller, *range(32), pin=True)
        waiting = asyncio.create_task(store.lease(caller, 100))
        await asyncio.sleep(0.01)
        assert not waiting.done()
        caller.socket.shutdown(socket.SHUT_RDWR)
        with pytest.raises(ConnectionError):
            await waiting
        await until(lambda: store.guard.num_open == 0)
        await until(lambda: store.pinned_bytes == 0)

    run(scenario, tmp_path)


def test_a_damaged_expert_comes_as_a_header_and_the_others_as_leases(tmp_path, monkeypatch):
    async def scenario(store):
        caller, promote = await store.connect(), store.engine.promotions.promote

        async def damaged(bank, expert, record, **options):
            if expert == 2:
                raise CorruptRecord("flipped")
            return await promote(bank, expert, record, **options)

        monkeypatch.setattr(store.engine.promotions, "promote", damaged)
        messages = await store.fetch(caller, 1, 2, 3)
        headers = [message.header for message in messages if message.HasField("header")]
        assert [(header.expert, header.error.kind) for header in headers] == [(2, "CorruptRecord")]
        assert sorted(lease.expert for message in messages for lease in rows(message)) == [1, 3]

    run(scenario, tmp_path)


def test_current_experts_come_as_rows_without_a_lease_in_one_message(tmp_path):
    async def scenario(store):
        caller = await store.connect()
        await store.lease(caller, 2)
        messages = await store.fetch(caller, 1, 2, 3, known_versions=[0, HOLDS_NONE, 7])
        assert not any(message.HasField("header") for message in messages)
        assert [lease.expert for lease in rows(messages[0])] == [1]
        assert rows(messages[0])[0].id == 0
        leased = [lease for message in messages[1:] for lease in rows(message)]
        assert sorted(lease.expert for lease in leased) == [2, 3]
        assert all(lease.id for lease in leased)
        assert len(await store.fetch(caller, *range(200), known_versions=[0] * 200)) == 1

    run(scenario, tmp_path)


def test_what_ends_a_fetch_is_said_and_the_session_lives_on(tmp_path, monkeypatch):
    async def scenario(store):
        caller = await store.connect()
        for bank, experts, trainer, refusal in (
            ("b", [256], "", "UnknownExpert"),
            ("nobody", [1], "", "UnknownBank"),
            ("b", [1, 1], "", "InvalidRequest"),
            ("b", [1], "t" * 129, "InvalidRequest"),
        ):
            caller.ask(local_pb2.LocalFetch(trainer=trainer, request=expert_pb2.FetchExpertsRequest(bank=bank, experts=experts)))
            (last,) = await asyncio.to_thread(caller.answers)
            assert last.end.error.kind == refusal
        store.guard.refusal = "the daemon is draining"
        with pytest.raises(Unavailable, match="draining"):
            await store.fetch(caller, 1)
        store.guard.refusal = None
        monkeypatch.setattr(replies, "send_leases", None)  # A bug of the daemon.
        (last,) = await asyncio.to_thread(caller.fetch, "b", 1)
        assert last.end.error.kind == "Internal"
        monkeypatch.undo()
        assert len(await store.lease(caller, 1)) == 1
        access = store.engine.snapshot_stats().total
        assert access.leased_bytes == LAYOUT.body_bytes

    run(scenario, tmp_path)


def test_a_fetch_during_another_closes_the_session(tmp_path):
    async def scenario(store):
        store.plane.patience_s = 30.0
        caller = await store.connect()
        await store.lease(caller, *range(32))
        for _ in range(2):
            caller.ask(local_pb2.LocalFetch(request=expert_pb2.FetchExpertsRequest(bank="b", experts=[100])))
        assert await asyncio.to_thread(caller.is_closed)
        await until(lambda: store.guard.num_open == 0)
        assert store.pinned_bytes == store.plane.num_sessions == 0

    run(scenario, tmp_path)


def test_a_caller_that_reads_no_answer_holds_up_no_other_and_leaves_nothing(tmp_path):
    async def scenario(store):
        deaf, other = await store.connect(), await store.connect()
        ids = list(range(256))
        await store.bring(*ids)
        session, versions = store.plane.session(deaf.session), [0] * 256
        for served in range(300):  # Until its queue is full.
            deaf.ask(local_pb2.LocalFetch(request=expert_pb2.FetchExpertsRequest(bank="b", experts=ids, known_versions=versions)))
            try:
                answered = until(lambda served=served: store.num_unchanged == 256 * (served + 1) and session._fetching is None)
                await asyncio.wait_for(answered, 1.0)
            except TimeoutError:
                break
        assert session._fetching is not None
        assert len(await store.lease(other, 1, 2)) == 2
        deaf.close()
        await until(lambda: session._fetching is None)
        await until(lambda: store.plane.num_sessions == 1)

    run(scenario, tmp_path, records=300)


@pytest.mark.parametrize("packet", [b"X", b"R1234567", b"S", b"Z" * 70_000, b"S" + bytes(8), b"F\xff"])
def test_a_malformed_packet_closes_its_session_and_no_other(tmp_path, packet):
    async def scenario(store):
        bad, good = await store.connect(), await store.connect()
        await store.lease(bad, 1, pin=True)
        (lease,) = await store.lease(good, 2)
        bad.socket.send(packet)
        assert await asyncio.to_thread(bad.is_closed)
        assert store.plane.num_sessions == 1
        assert store.pinned_bytes == RECORD
        assert good.body(lease) == store.seeded(2)

    run(scenario, tmp_path)


def test_staged_bytes_are_seen_within_their_bounds_and_outlive_what_replaces_them(tmp_path):
    async def scenario(store):
        caller = await store.connect()
        session = store.plane.session(caller.session)
        with pytest.raises(InvalidRequest, match="staging"):
            session.staging(0, 1)
        first = caller.stage(8192)
        assert await asyncio.to_thread(caller.socket.recv, 16) == ACK
        os.pwrite(first, b"first", 4096)
        view = session.staging(4096, 5)
        assert view == b"first"
        assert view.readonly
        assert len(session.staging(0, 8192)) == 8192
        for offset, size in ((0, 8193), (8192, 1), (2**64 - 1, 1)):
            with pytest.raises(InvalidRequest, match=str(offset)):
                session.staging(offset, size)
        second = caller.stage(4096)
        assert await asyncio.to_thread(caller.socket.recv, 16) == ACK
        with pytest.raises(InvalidRequest):
            session.staging(4096, 5)
        assert view == b"first"
        caller.socket.close()
        await until(lambda: session.closed)
        assert view == b"first"
        with pytest.raises(LeaseExpired):
            session.staging(0, 1)
        os.close(first)
        os.close(second)

    run(scenario, tmp_path)


@pytest.mark.parametrize(
    "staging",
    [
        {"seals": 0},
        {"seals": fcntl.F_SEAL_SHRINK},
        {"seals": fcntl.F_SEAL_GROW},
        {"said": 4096},
        {"said": 16384},
        {"said": 0},
        {"said": STAGING_BYTES_MAX + 1},
        {"descriptors": 0},
        {"descriptors": 2},
        {"descriptors": 20},
    ],
)
def test_staging_memory_that_could_change_its_size_or_lies_about_it_is_refused(tmp_path, staging):
    async def scenario(store):
        caller = await store.connect()
        descriptor = caller.stage(8192, **staging)
        assert await asyncio.to_thread(caller.is_closed)
        assert store.plane.num_sessions == 0
        os.close(descriptor)

    run(scenario, tmp_path)


def test_descriptors_that_are_no_memory_are_refused(tmp_path):
    async def scenario(store):
        with (tmp_path / "file").open("w+b") as file, socket.socket() as other:
            file.truncate(8192)
            for descriptor in (file.fileno(), other.fileno()):
                caller = await store.connect()
                socket.send_fds(caller.socket, [pack_stage(8192)], [descriptor])
                assert await asyncio.to_thread(caller.is_closed)
            caller = await store.connect()
            socket.send_fds(caller.socket, [pack_release([1])], [file.fileno()])
            assert await asyncio.to_thread(caller.is_closed)

    run(scenario, tmp_path)


def test_another_user_is_refused_without_a_welcome(tmp_path, caplog):
    async def scenario(store):
        store.uid = os.geteuid() + 1
        caller = await store.connect()
        assert caller.descriptors == []
        assert store.plane.num_sessions == 0
        assert "user" in caplog.text
        store.uid -= 1
        assert len(await store.lease(await store.connect(), 1)) == 1

    run(scenario, tmp_path)


def test_sessions_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(plane, "SESSIONS_MAX", 2)

    async def scenario(store):
        first, second = await store.connect(), await store.connect()
        assert first.session != second.session
        assert (await store.connect()).descriptors == []
        first.socket.close()
        await until(lambda: store.plane.num_sessions == 1)
        assert len((await store.connect()).descriptors) == 2

    run(scenario, tmp_path)


def test_no_descriptor_and_no_mapping_is_leaked(tmp_path):
    def num_mapped() -> int:
        with open("/proc/self/maps") as maps:
            return sum("memfd:staging" in line for line in maps)

    async def scenario(store):
        async def session_life() -> None:
            caller = await store.connect()
            for _ in range(2):
                os.close(caller.stage(8192))
                assert await asyncio.to_thread(caller.socket.recv, 16) == ACK
            caller.close()
            refused = await store.connect()
            os.close(refused.stage(8192, seals=0))
            assert await asyncio.to_thread(refused.is_closed)
            refused.close()
            await until(lambda: store.plane.num_sessions == 0)
            store.callers.clear()
            gc.collect()

        await session_life()
        before = set(os.listdir("/proc/self/fd"))
        for _ in range(5):
            await session_life()
        assert set(os.listdir("/proc/self/fd")) == before
        assert num_mapped() == 0

    run(scenario, tmp_path)


# A real daemon.


def plane_of(target: str) -> str:
    with grpc.insecure_channel(target) as channel:
        return local_pb2_grpc.LocalServiceStub(channel).GetLocalPlane(local_pb2.GetLocalPlaneRequest(), timeout=30).socket


def lease_from(caller: Caller, bank: str, *experts: int, **options) -> list[Lease]:
    return [lease for answer in caller.fetch(bank, *experts, **options) for lease in rows(answer)]


def until_stats(client, condition) -> None:
    deadline = time.monotonic() + 30
    while not condition(client.stats()):
        assert time.monotonic() < deadline, client.stats()


@pytest.fixture
def caller(shared_daemon):
    made = Caller(plane_of(shared_daemon.target))
    yield made
    made.close()


def test_a_daemon_leases_what_a_push_wrote_and_counts_it(client, bank, caller):
    body = client.random_body(1)
    versions = client.put(bank, {1: body})
    (lease,) = lease_from(caller, bank, 1, pin=True)
    assert caller.body(lease, client.layout.body_bytes) == body
    assert (lease.version, lease.served_from) == (versions[1], expert_pb2.TIER_DRAM)
    stats = client.stats()
    assert (stats.queues.local_sessions, stats.queues.leased_bytes) == (1, client.layout.record_bytes)
    access = next(each.access for each in stats.banks if each.bank == bank)
    assert access.leased_bytes == client.layout.body_bytes
    caller.release(lease.id)
    until_stats(client, lambda stats: stats.queues.leased_bytes == 0)


def test_an_unknown_session_is_refused(client, bank, caller):
    with client.refused(LeaseExpired, "local_session"):
        stream = client.stream(bank, open_it=False)
        stream.send(open=expert_pb2.PushOpen(bank=bank, writer_id="w", local_session=caller.session ^ 1))
        next(stream.call)


def test_the_arena_and_the_generations_cannot_be_written_or_resized_by_a_caller(caller):
    for descriptor in caller.descriptors:
        size = os.fstat(descriptor).st_size
        assert fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & F_SEAL_FUTURE_WRITE
        with pytest.raises(PermissionError):
            mmap.mmap(descriptor, size, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        with pytest.raises(OSError, match="Bad file descriptor"):  # The descriptor is not open for writing.
            os.pwrite(descriptor, b"x", 0)
        again = os.open(f"/proc/self/fd/{descriptor}", os.O_RDWR)  # The same user may open the memory anew, but the seals stay.
        with pytest.raises(PermissionError):
            mmap.mmap(again, size, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        for change in (lambda again=again: os.pwrite(again, b"x", 0), lambda again=again, size=size: os.ftruncate(again, size - 4096)):
            with pytest.raises(PermissionError):
                change()
        with pytest.raises(PermissionError):
            fcntl.fcntl(again, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
        os.close(again)


CHILD = """
import socket, sys, time
from ooc_moe_wire.local import PACKET_BYTES_MAX, pack_fetch
from ooc_moe_wire.v1 import expert_pb2, local_pb2
name, bank = sys.argv[1:]
connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
connection.connect("\\0" + name)
packet, *_ = socket.recv_fds(connection, 1024, 4)
connection.send(pack_fetch(local_pb2.LocalFetch(request=expert_pb2.FetchExpertsRequest(bank=bank, experts=[1, 2, 3]), pin=True)))
num_leased = 0
while not (answer := local_pb2.LocalAnswer.FromString(connection.recv(PACKET_BYTES_MAX))).HasField("end"):
    num_leased += len(answer.leases.ids)
assert num_leased == 3
print("leased", flush=True)
time.sleep(60)
"""


def test_a_caller_that_is_killed_leaves_no_pin_behind(shared_daemon, client, bank):
    command = [sys.executable, "-c", CHILD, plane_of(shared_daemon.target), bank]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "leased\n"
        until_stats(client, lambda stats: stats.dram.pinned_bytes == stats.queues.leased_bytes == 3 * client.layout.record_bytes)
        child.kill()
    until_stats(client, lambda stats: stats.dram.pinned_bytes == stats.queues.leased_bytes == stats.queues.local_sessions == 0)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_process_of_another_user_gets_neither_a_welcome_nor_descriptors(shared_daemon, client):
    name = plane_of(shared_daemon.target)
    child = os.fork()
    if child == 0:  # Forks instead of starting an interpreter, whose files the other user may not be able to read.
        os.setuid(65534)
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connection.settimeout(30)
        try:
            connection.connect(f"\0{name}")
            packet, descriptors, _, _ = socket.recv_fds(connection, 1024, 4)
        except OSError:
            packet, descriptors = b"", []
        os._exit(7 if not packet and not descriptors else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert client.stats().queues.local_sessions == 0
    deadline = time.monotonic() + 30
    while not any("its user is 65534" in line for line in shared_daemon.log):  # The log arrives through another pipe, perhaps later.
        assert time.monotonic() < deadline


def test_a_daemon_without_the_local_plane_says_so(start_daemon, connect):
    daemon = start_daemon(arguments=("--no-local",))
    assert plane_of(daemon.target) == ""
    client = connect(daemon.target)
    client.create("b")
    with client.refused(LeaseExpired, "no local plane"):
        stream = client.stream("b", open_it=False)
        stream.send(open=expert_pb2.PushOpen(bank="b", writer_id="w", local_session=1))
        next(stream.call)


def test_a_daemon_that_drains_closes_its_sessions(daemon):
    caller = Caller(plane_of(daemon.target))
    assert daemon.stop() == 0
    assert caller.is_closed()
    caller.close()
