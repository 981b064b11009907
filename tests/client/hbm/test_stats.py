from dataclasses import fields

from ooc_moe_client.hbm.stats import CacheStats, Counters
from ooc_moe_wire.v1 import stats_pb2

GAUGES = {"bank": "a", "capacity": 4, "resident": 3, "dirty": 2, "expert_bytes": 100}
# The keys of metrics.jsonl, in order: runs of the past are read by them.
COUNTS = [
    "accesses",
    "hits",
    "misses",
    "refetches",
    "prefetch_issued",
    "prefetch_useful",
    "prefetch_late",
    "prefetch_wasted",
    "prefetch_cancelled",
    "evictions",
    "write_backs",
    "bytes_in",
    "bytes_out",
    "stall_s",
    "prefetch_refused",
    "prefetch_issued_bytes",
    "prefetch_useful_bytes",
    "prefetch_late_bytes",
    "prefetch_wasted_bytes",
    "prefetch_cancelled_bytes",
    "prefetch_refused_bytes",
    "fetched_from",
    "ahead",
]


def stats(start: int = 1, **gauges: object) -> CacheStats:
    """Stats whose every count is another number."""
    counts: dict = {name: start + number for number, name in enumerate(COUNTS)}
    return CacheStats(**GAUGES | gauges | counts | {"fetched_from": {"dram": start}, "ahead": {"issued": start}})


def test_the_keys_of_metrics_files_are_as_ever():
    assert [item.name for item in fields(Counters)] == COUNTS
    assert list(stats().to_dict()) == [*GAUGES, *COUNTS]
    assert CacheStats(**stats().to_dict()) == stats()


def test_the_message_has_every_field_that_the_daemon_shows():
    message = stats().to_proto()
    assert (message.bank, message.capacity_experts, message.resident_experts, message.dirty_experts, message.expert_bytes) == (
        "a",
        4,
        3,
        2,
        100,
    )
    counts = {field.name: getattr(message, field.name) for field in stats_pb2.HbmStats.DESCRIPTOR.fields} | {"accesses": stats().accesses}
    assert {name: counts[name] for name in COUNTS[:-2]} == {name: getattr(stats(), name) for name in COUNTS[:-2]}


def test_stats_add_up_and_their_difference_keeps_the_gauges():
    one, other = stats(1), stats(10, bank="b", expert_bytes=50)
    total = one + other
    assert (total.bank, total.capacity, total.expert_bytes) == ("a+b", 8, 100)
    assert (total.accesses, total.ahead, total.fetched_from) == (11, {"issued": 11}, {"dram": 11})
    since = stats(10, resident=4) - one
    assert (since.resident, since.accesses, since.fetched_from) == (4, 9, {"dram": 9})
