"""Readers see the notebooks on a page without running them: each is kept with the outputs of one whole run."""

import json
import re

import pytest

from tests.examples.notebooks import EXAMPLES, code_cells, read

NOTEBOOKS = sorted(path.name for path in EXAMPLES.glob("*.ipynb"))


def test_there_are_two() -> None:
    assert NOTEBOOKS == ["walkthrough.ipynb", "your_own_model.ipynb"]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_every_cell_was_run_in_order_and_none_failed(name: str) -> None:
    code = code_cells(read(name))
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert len(outputs) > len(code) / 2
    assert all(output.output_type in ("execute_result", "stream", "display_data") for output in outputs)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_outputs_name_no_path_of_the_machine_that_made_them(name: str) -> None:
    texts = json.dumps(
        [[output.get("text"), output.get("data", {}).get("text/plain")] for c in code_cells(read(name)) for output in c.outputs]
    )
    assert re.findall(r"/(?:tmp|home|root|work|Users)/\S*", texts) == []
