"""A table of text (`Table`), and functions that draw it for a terminal, a pipe, a web page or a Markdown page.

    table = Table("Banks", ["bank", "experts"], [["first/experts", "1,024"]])
    print_table(table, Console())      # a terminal: Rich; a pipe: one row a line, nothing cut
    markdown_table(table)              # "| bank | experts |", "|---|---:|", ...
    html_table(table)                  # "<table>...</table>", escaped

All cells are plain text. Each function escapes the characters that would be markup in its format.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from html import escape
from textwrap import wrap

from rich import table as rich_tables
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.text import Text

HEADING_WIDTH = 12
"""On a terminal, a longer heading is broken between words, unless the cells below it are as wide."""


@dataclass(frozen=True, slots=True)
class Table:
    """A table of text. Its title and caption are always shown with it; its note only on web pages, because a terminal has no room for it.

    Raises:
        ValueError: `alignment` has another length than `columns`, or another letter than l and r.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    """A line break in a cell starts a second line of the same cell."""
    note: str = ""
    """How to read the table, in full sentences."""
    caption: str = ""
    """What a reader must know before relying on the table; "" if nothing."""
    alignment: str = ""
    """A letter for each column, l (left) or r (right). By default the first column is left, because it names the row, and the others are
    right, because they are numbers."""
    sections: Collection[int] = ()
    """The indices of rows that begin a new section; a terminal draws a line above each."""

    def __post_init__(self) -> None:
        if not self.alignment:
            object.__setattr__(self, "alignment", "l" + "r" * (len(self.columns) - 1))
        if len(self.alignment) != len(self.columns) or not set(self.alignment) <= set("lr"):
            raise ValueError(f"alignment: {self.alignment!r} does not fit {len(self.columns)} columns")


def print_table(table: Table, console: Console) -> None:
    """Prints a table: on a terminal as `rich_table` draws it; to a file or pipe as `plain_table` does, so that no line is wrapped."""
    if console.is_terminal:
        console.print(rich_table(table))
    else:
        console.print(plain_table(table), soft_wrap=True, markup=False, highlight=False, emoji=False)


def rich_table(table: Table) -> rich_tables.Table:
    """Turns a table into a table of the package Rich, for a terminal. On a narrow terminal, the widest columns are wrapped first."""
    drawn = rich_tables.Table(
        title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0)
    )
    drawn.title = Text(table.title) if table.title else None
    drawn.caption, drawn.caption_justify = Text(table.caption) if table.caption else None, "left"
    for index, (column, side) in enumerate(zip(table.columns, table.alignment, strict=True)):
        width = max((len(line) for row in table.rows for line in row[index].split("\n")), default=0)
        heading = "\n".join(wrap(column, max(width, HEADING_WIDTH), break_long_words=False))
        drawn.add_column(Text(heading), justify="right" if side == "r" else "left", overflow="fold")
    for index, row in enumerate(table.rows):
        if index in table.sections:
            drawn.add_section()
        drawn.add_row(*map(Text, row))
    return drawn


def plain_table(table: Table) -> str:
    """Turns a table into plain text for a file or pipe: title, headings, each row on one line, caption. Spaces align the columns."""
    lines = [[cell.replace("\n", "; ") for cell in row] for row in (table.columns, *table.rows)]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    padded = (
        "  ".join(
            cell.rjust(width) if side == "r" else cell.ljust(width) for cell, width, side in zip(row, widths, table.alignment, strict=True)
        )
        for row in lines
    )
    return "\n".join(
        [*([table.title] if table.title else []), *(line.rstrip() for line in padded), *([table.caption] if table.caption else [])]
    )


def markdown_table(table: Table) -> str:
    """Turns a table's headings and rows into Markdown. Title, note and caption are left out: the caller adds them to its page."""
    lines = [[cell.replace("|", "\\|").replace("\n", "<br>") for cell in row] for row in (table.columns, *table.rows)]
    rule = "".join({"l": "---|", "r": "---:|"}[side] for side in table.alignment)
    headings, *rows = (f"| {' | '.join(row)} |" for row in lines)
    return "\n".join([headings, f"|{rule}", *rows])


def html_table(table: Table) -> str:
    """Turns a table's headings and rows into an HTML `<table>`. Cells of left-aligned columns have the class "left" for the style sheet."""

    def row(tag: str, cells: Sequence[str]) -> str:
        sides = (' class="left"' if side == "l" else "" for side in table.alignment)
        texts = (escape(cell).replace("\n", "<br>") for cell in cells)
        return f"<tr>{''.join(f'<{tag}{side}>{text}</{tag}>' for side, text in zip(sides, texts, strict=True))}</tr>"

    body = "\n".join(row("td", cells) for cells in table.rows)
    return f"<table>\n<thead>{row('th', table.columns)}</thead>\n<tbody>\n{body}\n</tbody>\n</table>"
