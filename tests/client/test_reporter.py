import threading
from collections.abc import Sequence

from ooc_moe_client.cache import ExpertCache
from ooc_moe_client.reporter import Reporter
from ooc_moe_wire.errors import Internal, InvalidRequest, OocMoeError, Unavailable
from ooc_moe_wire.v1 import stats_pb2
from tests.client.conftest import GatedStore


class Listener:
    """Takes reports; those at the start may fail."""

    def __init__(self, *errors: OocMoeError, wanted: int) -> None:
        self.reports: list[tuple[Sequence[stats_pb2.HbmStats], str]] = []
        self.done = threading.Event()
        self._errors = list(errors)
        self._wanted = wanted

    def report_trainer(self, hbm: Sequence[stats_pb2.HbmStats], activity: str) -> None:
        self.reports.append((hbm, activity))
        if len(self.reports) >= self._wanted:
            self.done.set()
        if self._errors:
            raise self._errors.pop(0)


def test_the_caches_are_reported_again_and_again_with_the_activity_of_the_moment(gated: GatedStore, bank: str):
    listener = Listener(wanted=2)
    with ExpertCache(gated, bank, capacity_experts=3) as cache:
        with cache.reading([0, 1]), Reporter(listener, [cache, cache], activity="training krull", interval_s=0.001) as reporter:
            assert listener.done.wait(30)
            reporter.activity = "evaluating"
            listener.done.clear()
            assert listener.done.wait(30)
            assert listener.done.wait(30)
        (first, second), activity = listener.reports[-1]
        assert (first.bank, first.capacity_experts, first.resident_experts, first.misses) == (bank, 3, 2, 2)
        assert second == first
        assert listener.reports[0][1] == "training krull"
        assert activity == "evaluating"


def test_a_daemon_that_is_away_or_refuses_disturbs_nobody(gated: GatedStore, bank: str):
    listener = Listener(Unavailable("away"), InvalidRequest("no"), Internal("broken"), wanted=4)
    with ExpertCache(gated, bank, capacity_experts=1) as cache, Reporter(listener, [cache], interval_s=0.001):
        assert listener.done.wait(30)
