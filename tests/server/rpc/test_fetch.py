"""FetchExperts, ListExperts and the prefetch calls, by plain stubs against a daemon."""

import pytest

from ooc_moe_wire.codec import CHUNK_BYTES_MAX, Checksums
from ooc_moe_wire.errors import InvalidRequest, UnknownBank, UnknownExpert
from ooc_moe_wire.v1 import bank_pb2, expert_pb2

HOLDS_NONE = 2**64 - 1


def test_an_untouched_expert_is_its_seeded_value_and_costs_no_disk(client, bank):
    used = client.stats().nvme.used_bytes
    got = client.fetch(bank, [3])[3]
    assert got.body == client.seeded(3)
    assert (got.header.version, got.header.served_from) == (0, expert_pb2.TIER_SEED)
    assert client.stats().nvme.used_bytes == used
    assert client.fetch(bank, [3])[3].header.served_from == expert_pb2.TIER_DRAM


def test_headers_carry_lengths_and_checksums_of_what_follows(client, bank):
    header, body = (got := client.fetch(bank, [2])[2]).header, memoryview(got.body)
    sums = Checksums.of(client.layout, body)
    assert (header.parameter_xxh3, header.optimizer_xxh3) == (sums.parameters, sums.optimizer)
    assert (header.parameter_bytes, header.optimizer_bytes) == (client.layout.parameter_bytes, client.layout.optimizer_bytes)


def test_parameters_alone_are_a_prefix_with_a_checksum_of_its_own(client, bank):
    whole = client.fetch(bank, [2])[2]
    part = client.fetch(bank, [2], sections=expert_pb2.SECTIONS_PARAMETERS)[2]
    assert part.body == whole.body[: client.layout.parameter_bytes]
    assert part.header.parameter_xxh3 == whole.header.parameter_xxh3
    assert (part.header.optimizer_bytes, part.header.optimizer_xxh3) == (0, 0)


def test_a_current_known_version_moves_no_bytes(client, bank):
    versions = client.put(bank, {1: client.random_body(1)})
    got = client.fetch(bank, [0, 1, 2, 3], known_versions=[0, versions[1], 17, HOLDS_NONE])
    assert {expert: each.header.unchanged for expert, each in got.items()} == {0: True, 1: True, 2: False, 3: False}
    whole = client.layout.body_bytes
    assert {expert: len(each.body) for expert, each in got.items()} == {0: 0, 1: 0, 2: whole, 3: whole}


def test_residents_come_first_and_every_expert_once(client, bank):
    client.fetch(bank, [5, 6])
    assert list(client.fetch(bank, [0, 1, 5, 2, 6, 3]))[:2] == [5, 6]
    assert sorted(client.fetch(bank, range(8))) == list(range(8))


def test_chunks_are_of_a_bounded_size(client):
    spec = bank_pb2.BankSpec(name="large", num_experts=1, parameters=[bank_pb2.Tensor(name="w", shape=[5 << 20], dtype="uint8")])
    client.call(client.banks.CreateBank, bank_pb2.CreateBankRequest(spec=spec))
    request = expert_pb2.FetchExpertsRequest(bank="large", experts=[0])
    sizes = [len(message.chunk.payload) for message in client.call(client.experts.FetchExperts, request)]
    assert sizes == [0, CHUNK_BYTES_MAX, CHUNK_BYTES_MAX, 1 << 20]


@pytest.mark.parametrize(
    ("request_fields", "kind", "word"),
    [
        ({"experts": []}, InvalidRequest, "experts"),
        ({"experts": [1, 2, 1]}, InvalidRequest, "experts"),
        ({"experts": [1, 2], "known_versions": [0]}, InvalidRequest, "known_versions"),
        ({"experts": [1, 8]}, UnknownExpert, "expert 8"),
        ({"experts": [2**63]}, UnknownExpert, str(2**63)),
    ],
)
def test_a_bad_fetch_is_refused_before_anything_is_sent(client, bank, request_fields, kind, word):
    with client.refused(kind, word):
        next(client.call(client.experts.FetchExperts, expert_pb2.FetchExpertsRequest(bank=bank, **request_fields)))


def test_calls_on_an_unknown_bank_are_refused(client):
    with client.refused(UnknownBank, "nowhere"):
        client.fetch("nowhere", [0])
    with client.refused(UnknownBank, "nowhere"):
        client.call(client.experts.PrefetchExperts, expert_pb2.PrefetchExpertsRequest(bank="nowhere", experts=[0]))
    with client.refused(UnknownBank, "nowhere"):
        client.call(client.experts.ListExperts, expert_pb2.ListExpertsRequest(bank="nowhere"))
    with client.refused(UnknownBank, "nowhere"):
        client.call(client.experts.CancelPrefetch, expert_pb2.CancelPrefetchRequest(bank="nowhere"))


def test_an_overlong_trainer_name_is_refused(shared_daemon, connect, bank):
    client = connect(shared_daemon.target, trainer="x" * 129)
    with client.refused(InvalidRequest, "ooc-moe-trainer"):
        client.fetch(bank, [0])


def test_listing_pages_by_id_and_tells_versions_tiers_and_checksums(client, bank):
    body = client.random_body(3)
    versions = client.put(bank, {3: body})
    client.fetch(bank, [1])
    request = expert_pb2.ListExpertsRequest(bank=bank, start=1, page_size=3)
    page = client.call(client.experts.ListExperts, request)
    assert [info.expert for info in page.experts] == [1, 2, 3]
    assert page.next_start == 4
    assert [list(info.tiers) for info in page.experts] == [
        [expert_pb2.TIER_DRAM],
        [expert_pb2.TIER_SEED],
        [expert_pb2.TIER_DRAM, expert_pb2.TIER_NVME],
    ]
    written = page.experts[2]
    assert (written.version, written.record_bytes) == (versions[3], client.layout.record_bytes)
    assert written.parameter_xxh3 == Checksums.of(client.layout, memoryview(body)).parameters
    last = client.call(client.experts.ListExperts, expert_pb2.ListExpertsRequest(bank=bank, start=4))
    assert ([info.expert for info in last.experts], last.next_start) == ([4, 5, 6, 7], 0)
    with client.refused(InvalidRequest, "page_size"):
        client.call(client.experts.ListExperts, expert_pb2.ListExpertsRequest(bank=bank, page_size=1001))


def test_a_prefetch_answers_each_expert_and_makes_it_a_hit(client, bank):
    client.fetch(bank, [0])
    request = expert_pb2.PrefetchExpertsRequest(bank=bank, experts=[0, 1])
    states = client.call(client.experts.PrefetchExperts, request).states
    assert list(states) == [expert_pb2.PREFETCH_RESIDENT, expert_pb2.PREFETCH_QUEUED]
    while client.call(client.experts.PrefetchExperts, request).states[1] != expert_pb2.PREFETCH_RESIDENT:
        pass
    client.fetch(bank, [1])
    client.fetch(bank, [1])
    access = next(each.access for each in client.stats().banks if each.bank == bank)
    assert (access.prefetch_promoted, access.hits, access.prefetch_hits, access.misses) == (1, 2, 1, 1)


def test_a_prefetch_of_an_unknown_expert_is_refused(client, bank):
    with client.refused(UnknownExpert, "expert 8"):
        client.call(client.experts.PrefetchExperts, expert_pb2.PrefetchExpertsRequest(bank=bank, experts=[0, 8]))
