"""The notebook "your own model in forty lines" runs, and shows what its texts say."""

from typing import Any

import pytest

from tests.examples.notebooks import execute, result

pytestmark = pytest.mark.timeout(300)  # 10 s of CPU time; more where other work shares the cores.

# Runs after the last cell: what the notebook's own variables hold by then.
RESULT = """
import json
print(json.dumps({
    "losses": losses,
    "same_with_a_daemon": losses_with_daemon == losses,
    "capacity": counters["zen"].capacity,
    "num_experts": BANK.num_experts,
    "zen": [zen.accesses, zen.misses, zen.evictions],
    "rot13": [rot13.accesses, rot13.misses, rot13.evictions, rot13.write_backs],
    "written": sorted(written),
}))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return result(execute("your_own_model.ipynb", tmp_path_factory.mktemp("notebook"), then=RESULT))


def test_the_loss_falls_to_a_third_in_both_texts(found: dict[str, Any]) -> None:
    for losses in found["losses"].values():
        assert sum(losses[-10:]) < sum(losses[:10]) / 3


def test_a_daemon_changes_no_bit_of_the_losses(found: dict[str, Any]) -> None:
    assert found["same_with_a_daemon"]


def test_the_cache_is_smaller_than_the_bank_and_misses_only_when_the_text_changes(found: dict[str, Any]) -> None:
    assert found["capacity"] < found["num_experts"]
    assert found["zen"][1:] == [4, 0]
    assert found["rot13"][1:] == [4, 4, 4]
    assert min(found["zen"][0], found["rot13"][0]) > 300


def test_only_the_experts_of_the_two_pools_were_written(found: dict[str, Any]) -> None:
    assert found["written"] == list(range(8))
