"""The notebook runs from its first cell to its last, with the interpreter that runs the tests, and shows what it says it shows."""

import json
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

pytestmark = pytest.mark.timeout(300)  # Half a minute of CPU time; a minute and more where other work shares the cores.

NOTEBOOK = Path(__file__).parents[2] / "ooc_moe" / "walkthrough.ipynb"
CELL_WITHIN_S = 150
# Runs after the last cell: what the notebook's own names hold by then.
SAID = """
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
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(SAID))
    elsewhere = {"metadata": {"path": str(tmp_path_factory.mktemp("notebook"))}}
    return NotebookClient(notebook, timeout=CELL_WITHIN_S, kernel_name="python3", resources=elsewhere).execute()


@pytest.fixture(scope="module")
def said(executed: nbformat.NotebookNode) -> dict[str, Any]:
    return dict(json.loads(executed.cells[-1].outputs[0].text))


def test_the_interpreter_is_the_one_that_runs_the_tests(said: dict[str, Any]) -> None:
    assert said["interpreter"] == sys.executable


def test_no_cell_fails_and_none_says_nothing_by_mistake(executed: nbformat.NotebookNode) -> None:
    code = [cell for cell in executed.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    kinds = [[output.output_type for output in cell.outputs] for cell in code[:-2]]  # The last two close, and tell the test.
    assert all(kind in (["execute_result"], ["stream"]) for kind in kinds)
    assert sum("image/png" in output.get("data", {}) for cell in code for output in cell.outputs) == 2


def test_an_expert_comes_from_the_seed_and_what_was_pushed_comes_back(said: dict[str, Any]) -> None:
    assert said["served_from"] == ["SEED", "DRAM"]
    assert said["came_back"]
    assert said["refused"] == "StaleVersion"


def test_the_cache_counts_what_its_comments_say(said: dict[str, Any]) -> None:
    assert said["cache"] == [7, 2, 5, 1, 1, 0]


def test_both_games_are_learned_and_told_apart(said: dict[str, Any]) -> None:
    assert [fields["evaluated"] for fields in said["evaluated"]] == ["pixel/toward", "pixel/away"]
    for fields in said["evaluated"]:
        assert fields["return_mean"] > fields["random_mean"] + 2
        assert fields["detector_accuracy"] > 0.9


def test_the_second_game_left_the_first_ones_experts_alone(said: dict[str, Any]) -> None:
    before, after = said["before"], said["after"]
    assert said["cold_are_equal"]
    assert len(before) == 4
    assert before.items() < after.items()


def test_nothing_is_left_on_the_disk(said: dict[str, Any]) -> None:
    assert not Path(said["directory"]).exists()


def test_it_is_kept_without_outputs() -> None:
    code = [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
    assert code
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)
