"""Prints lists and tables: in a frame on a terminal, as plain rows in a pipe, or as JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import humanize
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

DASH = "–"
# Wide enough for the tables of the benchmarks where the output is not a terminal.
TABLE_WIDTH = 140


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a listing: the key of its value in each record, its heading, and how the value is written for people."""

    key: str
    heading: str
    text: Callable[[Any], str] = str
    right: bool = False


def print_records(columns: Sequence[Column], records: Sequence[Mapping[str, Any]], *, as_json: bool = False, empty: str = "") -> None:
    """Prints a listing.

    Args:
        columns: what people see of each record.
        records: what programs see. The values are what JSON can hold, with numbers as numbers.
        as_json: print one JSON document, with all keys of the records.
        empty: what people see if there are no records.
    """
    if as_json:
        print(json.dumps(list(records), indent=2))
    elif not records and empty:
        print(empty)
    else:
        print_table(columns, [[column.text(record[column.key]) for column in columns] for record in records])


def print_table(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> None:
    """Prints rows of text: in a frame on a terminal; otherwise one line for each row, never folded, so that grep and awk can read it."""
    if sys.stdout.isatty():
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        for column in columns:
            table.add_column(column.heading, justify="right" if column.right else "left", overflow="fold")
        for row in rows:
            table.add_row(*map(Text, row))
        Console().print(table)
        return
    lines = [[column.heading for column in columns], *rows]
    widths = [max(len(line[index]) for line in lines) for index in range(len(columns))]
    for line in lines:
        cells = zip(columns, line, widths, strict=True)
        print("  ".join(cell.rjust(width) if column.right else cell.ljust(width) for column, cell, width in cells).rstrip())


def wide_console() -> Console:
    """Returns a console on standard output for large tables: as wide as the terminal, or TABLE_WIDTH columns if there is none."""
    return Console() if sys.stdout.isatty() else Console(width=TABLE_WIDTH)


def say(message: str) -> None:
    """Prints one line as it is: it is not folded, and nothing in it is Rich markup."""
    Console().print(message, soft_wrap=True, markup=False, highlight=False)


def count(number: int) -> str:
    """Writes a number with commas: 12,345."""
    return f"{number:,}"


def size(num_bytes: int) -> str:
    """Writes bytes as a size: 24.0 KiB."""
    return humanize.naturalsize(num_bytes, binary=True)


def ago(unix_ms: int) -> str:
    """Writes a time as its distance from now: 3 minutes ago."""
    return humanize.naturaltime(datetime.now(UTC) - datetime.fromtimestamp(unix_ms / 1000, UTC))
