"""Tables of text, and how their cells write numbers. Plain cells: whoever prints them chooses how they look."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import humanize
import numpy as np

DASH = "–"
"""For what was not logged or cannot be said."""


@dataclass(frozen=True, slots=True)
class TextTable:
    """A table of text: the first column names its row, the others are numbers."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    note: str
    """How to read it; too long for a terminal."""
    caption: str = ""
    """What must not be missed, there neither; "" if nothing."""


def format_score(score: float, *, sign: bool = False) -> str:
    """A raw return, as precise as it matters."""
    if np.isnan(score):
        return DASH
    digits = 0 if abs(score) >= 100 or score == 0 else 1 if abs(score) >= 10 else 2
    return f"{score:{'+' if sign else ''},.{digits}f}"


def format_share(share: float, *, digits: int = 1) -> str:
    """A share in percent; two digits tell 99.9 from 99.99 %."""
    return DASH if np.isnan(share) else f"{100 * share:.{digits}f} %"


def format_ratio(part: float, whole: float) -> str:
    """A part in percent of the whole."""
    return format_share(part / whole if whole > 0 else float("nan"))


def format_part(part: int, whole: int) -> str:
    """A number of things among so many."""
    return f"{part:,} of {whole:,}" if whole else DASH


def format_count(count: float) -> str:
    """A whole number."""
    return DASH if np.isnan(count) else f"{count:,.0f}"


def format_bytes(count: float) -> str:
    """Bytes in binary units."""
    return DASH if np.isnan(count) else humanize.naturalsize(count, binary=True)


def format_seconds(seconds: float) -> str:
    """Seconds."""
    return DASH if np.isnan(seconds) else f"{seconds:,.1f} s"


def format_duration(seconds: float) -> str:
    """Minutes, and hours from one on."""
    minutes = round(seconds) // 60
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min {round(seconds) % 60:02d} s"


def listed(names: Sequence[str]) -> str:
    """Names as an enumeration; of many, the first ones and how many more."""
    if len(names) > 8:
        return f"{', '.join(names[:6])} and {len(names) - 6} more"
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
