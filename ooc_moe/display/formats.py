"""Numbers as text: bytes, durations, shares, counts and scores. A number that is NaN becomes a dash."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import humanize

DASH = "–"
"""Stands for a number that was not logged or is not defined."""


def format_score(score: float, *, sign: bool = False) -> str:
    """A raw return: whole from 100 on, one decimal from 10 on, else two. `sign` writes the plus of a gain, too."""
    if math.isnan(score):
        return DASH
    digits = 0 if abs(score) >= 100 or score == 0 else 1 if abs(score) >= 10 else 2
    return f"{score:{'+' if sign else ''},.{digits}f}"


def format_share(share: float, *, digits: int = 1) -> str:
    """A share in percent: 0.25 is "25.0 %". Use two digits where 99.9 % and 99.99 % must look different."""
    return DASH if math.isnan(share) else f"{100 * share:.{digits}f} %"


def format_share_short(share: float, *, digits: int = 1) -> str:
    """A share in percent without the space, for narrow columns: 0.25 is "25.0%"."""
    return format_share(share, digits=digits).replace(" ", "")


def format_ratio(part: float, whole: float) -> str:
    """`part` in percent of `whole`; a dash if `whole` is not above 0."""
    return format_share(part / whole if whole > 0 else math.nan)


def format_part(part: int, whole: int) -> str:
    """A count and the count it belongs to: "3 of 5"; a dash if `whole` is 0."""
    return f"{part:,} of {whole:,}" if whole else DASH


def format_count(count: float) -> str:
    """A whole number with commas between thousands."""
    return DASH if math.isnan(count) else f"{count:,.0f}"


def format_count_short(count: int) -> str:
    """A count in at most seven characters: "999,999", then "1.00M"."""
    return f"{count:,}" if count < 1_000_000 else humanize.metric(count).replace(" ", "")


def format_bytes(count: float) -> str:
    """Bytes in binary units, with one decimal: "8.0 MiB"."""
    return DASH if math.isnan(count) else humanize.naturalsize(count, binary=True)


def format_bytes_short(count: float) -> str:
    """Bytes in as few characters as possible, as `ls -h` writes them: "8.0M"."""
    return DASH if math.isnan(count) else humanize.naturalsize(count, gnu=True)


def format_size(num_bytes: float) -> str:
    """A size that a person chose, without needless decimals: "8 MiB", "256 KiB"."""
    return humanize.naturalsize(num_bytes, binary=True, format="%.3g")


def format_seconds(seconds: float) -> str:
    """Seconds with one decimal."""
    return DASH if math.isnan(seconds) else f"{seconds:,.1f} s"


def format_seconds_short(seconds: float) -> str:
    """Three digits in the unit that needs no leading zeros: "297 µs", "10.1 ms", "3.21 s", "1,234 s"."""
    if math.isnan(seconds):
        return DASH
    rounded = float(f"{seconds:.3g}")
    if rounded >= 1000:
        return f"{seconds:,.0f} s"
    scale, unit = (1.0, "s") if rounded >= 1 or not rounded else (1e3, "ms") if rounded >= 1e-3 else (1e6, "µs")
    return f"{scale * rounded:.3g} {unit}"


def format_duration(seconds: float) -> str:
    """Minutes and seconds below an hour ("3 min 07 s"), then hours and minutes ("2 h 05 min")."""
    minutes = round(seconds) // 60
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min {round(seconds) % 60:02d} s"


def format_uptime(seconds: float) -> str:
    """How long something has run, in its largest unit: "3 hours"."""
    return humanize.naturaldelta(seconds)


def format_ago(unix_ms: int) -> str:
    """How long ago a time was: "3 hours ago"."""
    return humanize.naturaltime(time.time() - unix_ms / 1000)


def listed(names: Sequence[str]) -> str:
    """Names as an enumeration: "a, b and c". Of more than eight, the first six and the number of the others."""
    if len(names) > 8:
        return f"{', '.join(names[:6])} and {len(names) - 6} more"
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
