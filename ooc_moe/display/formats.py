"""Formats numbers as text: bytes, durations, shares, counts and scores. A number that is NaN becomes a dash."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import humanize

DASH = "–"
"""Stands for a number that was not logged or is not defined."""


def format_score(score: float, *, sign: bool = False) -> str:
    """Formats a score: without decimals from 100 on ("1,234"), with one from 10 on ("12.3"), else with two ("1.23").

    With `sign`, a positive score has a plus before it.
    """
    if math.isnan(score):
        return DASH
    digits = 0 if abs(score) >= 100 or score == 0 else 1 if abs(score) >= 10 else 2
    return f"{score:{'+' if sign else ''},.{digits}f}"


def format_share(share: float, *, digits: int = 1) -> str:
    """Formats a share in percent: 0.25 becomes "25.0 %". Use two `digits` where 99.9 % and 99.99 % must look different."""
    return DASH if math.isnan(share) else f"{100 * share:.{digits}f} %"


def format_share_short(share: float, *, digits: int = 1) -> str:
    """Formats a share in percent without the space, for narrow columns: 0.25 becomes "25.0%"."""
    return format_share(share, digits=digits).replace(" ", "")


def format_ratio(part: float, whole: float) -> str:
    """Formats the ratio of `part` to `whole` in percent: 1 and 4 become "25.0 %". A dash if `whole` is not above 0."""
    return format_share(part / whole if whole > 0 else math.nan)


def format_part(part: int, whole: int) -> str:
    """Formats a count that is part of another count: "3 of 5". A dash if `whole` is 0."""
    return f"{part:,} of {whole:,}" if whole else DASH


def format_count(count: float) -> str:
    """Formats a count as a whole number with commas between thousands: "1,234,567"."""
    return DASH if math.isnan(count) else f"{count:,.0f}"


def format_count_short(count: int) -> str:
    """Formats a count in at most seven characters: "999,999", or from a million on "1.00M"."""
    return f"{count:,}" if count < 1_000_000 else humanize.metric(count).replace(" ", "")


def format_bytes(count: float) -> str:
    """Formats a number of bytes in binary units, with one decimal: "8.0 MiB"."""
    return DASH if math.isnan(count) else humanize.naturalsize(count, binary=True)


def format_bytes_short(count: float) -> str:
    """Formats a number of bytes in binary units, in as few characters as possible: "8.0M", as `ls -h` writes it."""
    return DASH if math.isnan(count) else humanize.naturalsize(count, gnu=True)


def format_size(num_bytes: float) -> str:
    """Formats a number of bytes that a person chose, such as a capacity, without needless decimals: "8 MiB", "256 KiB"."""
    return humanize.naturalsize(num_bytes, binary=True, format="%.3g")


def format_seconds(seconds: float) -> str:
    """Formats seconds with one decimal: "1,234.5 s"."""
    return DASH if math.isnan(seconds) else f"{seconds:,.1f} s"


def format_seconds_short(seconds: float) -> str:
    """Formats seconds with three digits, in the unit that needs no leading zeros: "297 µs", "10.1 ms", "3.21 s", "1,234 s"."""
    if math.isnan(seconds):
        return DASH
    rounded = float(f"{seconds:.3g}")
    if rounded >= 1000:
        return f"{seconds:,.0f} s"
    scale, unit = (1.0, "s") if rounded >= 1 or not rounded else (1e3, "ms") if rounded >= 1e-3 else (1e6, "µs")
    return f"{scale * rounded:.3g} {unit}"


def format_duration(seconds: float) -> str:
    """Formats a duration in minutes and seconds ("3 min 07 s"), or from an hour on in hours and minutes ("2 h 05 min")."""
    minutes = round(seconds) // 60
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min {round(seconds) % 60:02d} s"


def format_uptime(seconds: float) -> str:
    """Formats how long something has been running, roughly, in the largest unit that fits: "3 hours"."""
    return humanize.naturaldelta(seconds)


def format_ago(unix_ms: int) -> str:
    """Formats how long ago a moment was. The moment is given in milliseconds since 1970: "3 hours ago"."""
    return humanize.naturaltime(time.time() - unix_ms / 1000)


def listed(names: Sequence[str]) -> str:
    """Lists names in one phrase: "a, b and c". Of more than eight names, only the first six: "a, b, c, d, e, f and 3 more"."""
    if len(names) > 8:
        return f"{', '.join(names[:6])} and {len(names) - 6} more"
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
