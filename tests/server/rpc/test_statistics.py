"""StatsService, by plain stubs against a daemon; percentiles and expiry by an injected clock."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ooc_moe_server.stats import LATENCY_SAMPLES, NUM_TRAINERS_MAX, LatencySamples, Stats
from ooc_moe_wire.errors import InvalidRequest
from ooc_moe_wire.v1 import expert_pb2, stats_pb2


def test_accesses_are_counted_in_total_by_bank_and_by_trainer(shared_daemon, connect, bank):
    alice, bob = (connect(shared_daemon.target, trainer=f"{name} of {bank}") for name in ("alice", "bob"))
    before = alice.stats().total
    alice.fetch(bank, [0, 1])
    alice.fetch(bank, [0])
    versions = bob.put(bank, {2: bob.random_body(2)})
    bob.fetch(bank, [2], known_versions=[versions[2]])
    bob.fetch(bank, [3], sections=expert_pb2.SECTIONS_PARAMETERS, priority=expert_pb2.PRIORITY_PREFETCH)
    stats = alice.stats()
    by_trainer = {each.trainer: each.access for each in stats.trainers}
    of_alice, of_bob = by_trainer[f"alice of {bank}"], by_trainer[f"bob of {bank}"]
    body = alice.layout.body_bytes
    assert (of_alice.hits, of_alice.misses, of_alice.seeded, of_alice.fetched_experts, of_alice.fetched_bytes) == (1, 2, 2, 3, 3 * body)
    assert (of_bob.pushed_experts, of_bob.pushed_bytes, of_bob.unchanged) == (1, body, 1)
    assert (of_bob.misses, of_bob.fetched_experts) == (1, 3)  # The prefetch is no demand.
    assert of_bob.fetched_bytes == body + alice.layout.parameter_bytes
    of_bank = next(each for each in stats.banks if each.bank == bank)
    assert (of_bank.access.hits, of_bank.access.misses, of_bank.nvme_bytes) == (1, 3, alice.layout.record_bytes)
    assert of_bank.dram_records == 4
    assert (stats.total.misses - before.misses, stats.total.pushed_experts - before.pushed_experts) == (3, 1)


def test_tiers_queues_and_latencies_are_filled_in(client, bank, shared_daemon):
    client.put(bank, {0: client.random_body(0)})
    client.fetch(bank, [0, 1])
    stats = client.stats()
    assert stats.dram.capacity_bytes == 32 << 20
    assert 0 < stats.dram.used_bytes == stats.dram.capacity_bytes - stats.dram.free_bytes
    assert stats.nvme.io_mode in ("direct", "buffered")
    assert stats.nvme.capacity_bytes > stats.nvme.free_bytes > 0
    assert stats.nvme.used_bytes > 0
    assert set(stats.latency) == {"fetch_dram", "fetch_nvme", "fetch_seed", "push", "nvme_read", "commit"}
    assert 0 < stats.latency["push"].p50_ms <= stats.latency["push"].p99_ms <= stats.latency["push"].max_ms
    assert stats.latency["nvme_read"] == stats_pb2.Latency()
    assert stats.queues.open_streams >= 1
    assert (stats.data_dir, stats.draining) == (str(shared_daemon.data_dir), False)
    assert stats.uptime_s > 0


def test_watching_gives_a_message_now_and_one_per_interval(client):
    watch = client.statistics.WatchStats(stats_pb2.WatchStatsRequest(interval_ms=100), timeout=30)
    first, second = next(watch), next(watch)
    assert second.uptime_s - first.uptime_s >= 0.09
    watch.cancel()
    with client.refused(InvalidRequest, "interval_ms: 99 is not at least 100"):
        list(client.statistics.WatchStats(stats_pb2.WatchStatsRequest(interval_ms=99), timeout=30))


def test_a_trainers_report_is_shown_under_its_name(client):
    report = stats_pb2.ReportTrainerRequest(hbm=[stats_pb2.HbmStats(bank="b", hits=7, stall_s=0.5)], activity="training krull")
    client.call(client.statistics.ReportTrainer, report)
    shown = next(each for each in client.stats().trainers if each.trainer == "tester")
    assert (shown.activity, list(shown.hbm)) == ("training krull", list(report.hbm))


def test_a_report_expires_after_fifteen_seconds_and_the_newest_counts():
    now = [100.0]
    stats = Stats(clock=lambda: now[0])
    for activity in ("first", "second"):
        stats.report("t", stats_pb2.ReportTrainerRequest(hbm=[stats_pb2.HbmStats()], activity=activity))
    now[0] += 14.9
    (shown,) = stats.trainers()
    assert (shown.activity, shown.report_age_s, len(shown.hbm)) == ("second", pytest.approx(14.9), 1)
    now[0] += 0.2
    (shown,) = stats.trainers()
    assert (shown.activity, len(shown.hbm)) == ("", 0)


def test_a_report_too_large_to_keep_is_refused():
    stats = Stats()
    with pytest.raises(InvalidRequest, match="257 banks"):
        stats.report("t", stats_pb2.ReportTrainerRequest(hbm=[stats_pb2.HbmStats()] * 257))
    with pytest.raises(InvalidRequest, match="1025 characters"):
        stats.report("t", stats_pb2.ReportTrainerRequest(activity="x" * 1025))
    assert list(stats.trainers()) == []


def test_counters_go_on_counting_after_they_were_shown():
    stats = Stats()
    access = stats.scopes("t")
    access.count("hits")
    (shown,) = stats.trainers()
    message = stats_pb2.Stats(trainers=[shown], total=stats.total)
    access.count("hits", 2)
    (shown,) = stats.trainers()
    assert (shown.access.hits, stats.total.hits) == (3, 3)
    assert (message.trainers[0].access.hits, message.total.hits) == (1, 1)  # What was sent stays as it was.


def test_trainers_beyond_the_limit_push_the_longest_unheard_of_out():
    stats = Stats()
    for number in range(NUM_TRAINERS_MAX):
        stats.scopes(f"t{number}")
    stats.scopes("t0")
    stats.scopes("new")
    names = {each.trainer for each in stats.trainers()}
    assert len(names) == NUM_TRAINERS_MAX
    assert {"t0", "new"} <= names
    assert "t1" not in names


def test_percentiles_are_of_the_last_operations_and_the_count_is_of_all():
    samples = LatencySamples()
    assert samples.to_proto() == stats_pb2.Latency()
    for _ in range(10):
        samples.add(1000.0)
    for number in range(LATENCY_SAMPLES):
        samples.add(number / LATENCY_SAMPLES)
    latency = samples.to_proto()
    assert latency.count == LATENCY_SAMPLES + 10
    assert (latency.p50_ms, latency.p90_ms) == (pytest.approx(500, abs=1), pytest.approx(900, abs=1))
    assert latency.max_ms < 1000


@given(st.lists(st.floats(0, 10), min_size=1, max_size=300))
def test_percentiles_are_the_smallest_samples_that_so_many_do_not_exceed(seconds):
    samples = LatencySamples()
    for each in seconds:
        samples.add(each)
        latency = samples.to_proto()
    assert latency.count == len(seconds)
    for percent, found in ((50, latency.p50_ms), (90, latency.p90_ms), (99, latency.p99_ms), (100, latency.max_ms)):
        enough = [one for one in seconds if sum(other <= one for other in seconds) * 100 >= percent * len(seconds)]
        assert found == pytest.approx(min(enough) * 1e3)
