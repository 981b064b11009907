"""The result pages that commands wrote, in tests/bench/results, hold exactly what `markdown_table` writes."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from ooc_moe.display.table import Table, markdown_table

RESULTS = Path(__file__).parents[2] / "bench" / "results"
COMMANDS = ("cache", "layer", "learning", "policies", "simulate_57_games", "store", "store_8MiB")
PAGES = [*(RESULTS / f"{name}.md" for name in COMMANDS), *sorted((RESULTS / "studies").glob("*.md"))]


def tables_in(page: str) -> Iterator[str]:
    """The tables above the notes, which are written by hand."""
    yield from re.findall(r"(?:^\|.*\n)+", page.partition("\n## What bounds")[0], re.MULTILINE)


def cells_of(line: str) -> list[str]:
    return [cell.replace("<br>", "\n") for cell in line.removeprefix("| ").removesuffix(" |").split(" | ")]


def test_there_are_published_pages_with_tables() -> None:
    assert sum(len(list(tables_in(page.read_text()))) for page in PAGES) > 20


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(RESULTS)))
def test_every_table_of_a_published_page_is_written_the_same_again(page: Path) -> None:
    for text in tables_in(page.read_text()):
        headings, rule, *rows = text.splitlines()
        alignment = "".join("r" if side.endswith(":") else "l" for side in rule.strip("|").split("|"))
        table = Table("", cells_of(headings), [cells_of(row) for row in rows], alignment=alignment)
        assert markdown_table(table) == text.rstrip("\n")
