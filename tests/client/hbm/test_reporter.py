import threading
from collections.abc import Callable, Sequence

from ooc_moe_client.hbm.cache import ExpertCache
from ooc_moe_client.hbm.reporter import Reporter
from ooc_moe_wire.errors import Internal, InvalidRequest, OocMoeError, Unavailable
from ooc_moe_wire.v1 import stats_pb2
from tests.client.conftest import GatedStore

Report = tuple[Sequence[stats_pb2.HbmStats], str]


class Listener:
    """Takes reports; the first ones fail."""

    def __init__(self, *errors: OocMoeError) -> None:
        self.reports: list[Report] = []
        self._errors = list(errors)
        self._came = threading.Condition()

    def report_trainer(self, hbm: Sequence[stats_pb2.HbmStats], activity: str) -> None:
        with self._came:
            self.reports.append((hbm, activity))
            self._came.notify_all()
        if self._errors:
            raise self._errors.pop(0)

    def wait_for(self, condition: Callable[[], bool]) -> None:
        with self._came:
            assert self._came.wait_for(condition, timeout=30)


def test_the_caches_are_reported_again_and_again_with_the_activity_of_the_moment(gated: GatedStore, bank: str):
    listener = Listener()
    with ExpertCache(gated, bank, capacity_experts=3) as cache:
        with cache.reading([0, 1]), Reporter(listener, [cache, cache], activity="training krull", interval_s=0.001) as reporter:
            listener.wait_for(lambda: len(listener.reports) >= 2)
            reporter.activity = "evaluating"
            listener.wait_for(lambda: listener.reports[-1][1] == "evaluating")
        (first, second), _ = listener.reports[-1]
        assert (first.bank, first.capacity_experts, first.resident_experts, first.misses) == (bank, 3, 2, 2)
        assert second == first
        assert listener.reports[0][1] == "training krull"


def test_a_daemon_that_is_away_or_refuses_disturbs_nobody(gated: GatedStore, bank: str):
    listener = Listener(Unavailable("away"), InvalidRequest("no"), Internal("broken"))
    with ExpertCache(gated, bank, capacity_experts=1) as cache, Reporter(listener, [cache], interval_s=0.001):
        listener.wait_for(lambda: len(listener.reports) >= 4)
