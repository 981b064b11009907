"""Prints lists of records, such as banks or games: as a table on a terminal, as plain rows in a pipe, or as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from ooc_moe.display import table


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a printed list: the key of its value in each record, its heading, and how the value is written as text."""

    key: str
    heading: str
    text: Callable[[Any], str] = str
    right: bool = False


def print_records(columns: Sequence[Column], records: Sequence[Mapping[str, Any]], *, as_json: bool = False, empty: str = "") -> None:
    """Prints records, one a row, as a table; or all of them as one JSON document.

    Args:
        columns: the columns of the table. Keys of the records without a column are not in the table.
        records: the records. Their values are what JSON can hold, with numbers as numbers.
        as_json: print the JSON document, with all keys of the records, instead of the table.
        empty: the text to print, instead of an empty table, if there are no records.
    """
    if as_json:
        print(json.dumps(list(records), indent=2))
    elif not records and empty:
        print(empty)
    else:
        headings = [column.heading for column in columns]
        rows = [[column.text(record[column.key]) for column in columns] for record in records]
        alignment = "".join("r" if column.right else "l" for column in columns)
        table.print_table(table.Table("", headings, rows, alignment=alignment), Console())


def say(message: str) -> None:
    """Prints a message on one line, exactly as it is: a long line is not wrapped, and brackets are not taken for Rich markup."""
    Console().print(message, soft_wrap=True, markup=False, highlight=False)
