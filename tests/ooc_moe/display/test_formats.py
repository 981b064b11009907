"""How numbers are written, everywhere."""

import time

import pytest

from ooc_moe.display import formats

NAN = float("nan")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (formats.format_score(1234.5), "1,234"),
        (formats.format_score(12.34), "12.3"),
        (formats.format_score(-1.234), "-1.23"),
        (formats.format_score(5, sign=True), "+5.00"),
        (formats.format_share(0.9999, digits=2), "99.99 %"),
        (formats.format_share_short(0.25), "25.0%"),
        (formats.format_share_short(NAN), "–"),
        (formats.format_ratio(1, 4), "25.0 %"),
        (formats.format_ratio(1, 0), "–"),
        (formats.format_part(3, 5000), "3 of 5,000"),
        (formats.format_part(0, 0), "–"),
        (formats.format_count(1234567), "1,234,567"),
        (formats.format_count_short(999_999), "999,999"),
        (formats.format_count_short(1_234_567), "1.23M"),
        (formats.format_bytes(8 << 20), "8.0 MiB"),
        (formats.format_bytes_short(8 << 20), "8.0M"),
        (formats.format_size(8 << 20), "8 MiB"),
        (formats.format_seconds(1234.56), "1,234.6 s"),
        (formats.format_seconds_short(0.000297), "297 µs"),
        (formats.format_seconds_short(0.0101), "10.1 ms"),
        (formats.format_seconds_short(0.9996), "1 s"),
        (formats.format_seconds_short(3.214), "3.21 s"),
        (formats.format_seconds_short(999.7), "1,000 s"),
        (formats.format_seconds_short(1234.5), "1,234 s"),
        (formats.format_seconds_short(0), "0 s"),
        (formats.format_duration(187), "3 min 07 s"),
        (formats.format_duration(7500), "2 h 05 min"),
        (formats.format_uptime(3 * 3600), "3 hours"),
        (formats.listed(["a"]), "a"),
        (formats.listed(["a", "b", "c"]), "a, b and c"),
        (formats.listed(list("abcdefghi")), "a, b, c, d, e, f and 3 more"),
    ],
)
def test_a_number_is_written_as_people_read_it(text: str, expected: str) -> None:
    assert text == expected


def test_a_time_is_told_from_now() -> None:
    assert formats.format_ago(int(1000 * (time.time() - 2 * 3600 - 60))) == "2 hours ago"


@pytest.mark.parametrize(
    "format_",
    [
        formats.format_score,
        formats.format_share,
        formats.format_count,
        formats.format_bytes,
        formats.format_bytes_short,
        formats.format_seconds,
        formats.format_seconds_short,
    ],
)
def test_nan_is_a_dash(format_) -> None:
    assert format_(NAN) == formats.DASH
