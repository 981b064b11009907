"""Runs a notebook of examples/ from its first cell to its last, and reads what it left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

EXAMPLES = Path(__file__).parents[2] / "examples"
CELL_WITHIN_S = 150


def read(name: str) -> nbformat.NotebookNode:
    """The notebook as it is committed."""
    return nbformat.read(EXAMPLES / name, as_version=4)


def execute(name: str, directory: Path, *, then: str) -> nbformat.NotebookNode:
    """Runs every cell in `directory`, and after them `then`, whose only output is one line of JSON (see `result`)."""
    notebook = read(name)
    notebook.cells.append(nbformat.v4.new_code_cell(then))
    resources = {"metadata": {"path": str(directory)}}
    return NotebookClient(notebook, timeout=CELL_WITHIN_S, kernel_name="python3", resources=resources).execute()


def result(executed: nbformat.NotebookNode) -> dict[str, Any]:
    """What the cell `then` printed."""
    return dict(json.loads(executed.cells[-1].outputs[0].text))


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]
