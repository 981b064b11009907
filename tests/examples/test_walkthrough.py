"""The walkthrough runs from its first cell to its last, and shows what its texts say."""

import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest

from tests.examples.notebooks import code_cells, execute, result

pytestmark = pytest.mark.timeout(300)  # Half a minute of CPU time; a minute and more where other work shares the cores.

# Runs after the last cell: what the notebook's own variables hold by then.
RESULT = """
import json, sys
print(json.dumps({
    "interpreter": sys.executable,
    "served_from": [first.served_from.name, second.served_from.name],
    "came_back": again == body,
    "refused": type(refused).__name__,
    "cache": [stats.accesses, stats.hits, stats.misses, stats.evictions, stats.write_backs, stats.dirty],
    "evaluated": evaluated,
    "before": before,
    "after": after,
    "cold_are_equal": cold_are_equal,
    "directory": str(directory),
}))
"""


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> nbformat.NotebookNode:
    return execute("walkthrough.ipynb", tmp_path_factory.mktemp("notebook"), then=RESULT)


@pytest.fixture(scope="module")
def found(executed: nbformat.NotebookNode) -> dict[str, Any]:
    return result(executed)


def test_the_interpreter_is_the_one_that_runs_the_tests(found: dict[str, Any]) -> None:
    assert found["interpreter"] == sys.executable


def test_no_cell_fails_and_each_has_an_output(executed: nbformat.NotebookNode) -> None:
    code = code_cells(executed)
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    kinds = [
        [output.output_type for output in cell.outputs] for cell in code[:-2]
    ]  # The last two close the store, and print the result for this test.
    assert all(kind in (["execute_result"], ["stream"]) for kind in kinds)
    assert sum("image/png" in output.get("data", {}) for cell in code for output in cell.outputs) == 2


def test_an_expert_comes_from_the_seed_and_what_was_pushed_comes_back(found: dict[str, Any]) -> None:
    assert found["served_from"] == ["SEED", "DRAM"]
    assert found["came_back"]
    assert found["refused"] == "StaleVersion"


def test_the_cache_counts_what_its_comments_say(found: dict[str, Any]) -> None:
    assert found["cache"] == [7, 2, 5, 1, 1, 0]


def test_both_games_are_learned_and_told_apart(found: dict[str, Any]) -> None:
    assert [fields["evaluated"] for fields in found["evaluated"]] == ["pixel/toward", "pixel/away"]
    for fields in found["evaluated"]:
        assert fields["return_mean"] > fields["random_mean"] + 2
        assert fields["detector_accuracy"] > 0.9


def test_the_second_game_left_the_first_ones_experts_alone(found: dict[str, Any]) -> None:
    before, after = found["before"], found["after"]
    assert found["cold_are_equal"]
    assert len(before) == 4
    assert before.items() < after.items()


def test_nothing_is_left_on_the_disk(found: dict[str, Any]) -> None:
    assert not Path(found["directory"]).exists()
