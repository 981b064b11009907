"""Parses sizes in bytes as people write them: "1GiB", "512 MiB", "4096"."""

import re
from decimal import Decimal

_UNITS = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgt", start=1):
    _UNITS[f"{_letter}ib"] = 1024**_power
    _UNITS[f"{_letter}b"] = 1000**_power


def parse_size(text: str) -> int:
    """Converts a size such as "1GiB" to a number of bytes. The unit is B, KiB, MiB, GiB, TiB, kB, MB, GB, TB (in any case) or nothing.

    Raises:
        ValueError: the text is no size; the message quotes it.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if match is None or match[2].lower() not in _UNITS:
        raise ValueError(f"{text!r} is not a size; write for example 512MiB, 8GiB or 4096")
    return int(Decimal(match[1]) * _UNITS[match[2].lower()])
