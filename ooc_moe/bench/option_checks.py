"""Checks the values of command-line options that several benchmarks share."""

from __future__ import annotations

from collections.abc import Sequence

from ooc_moe.config.agent import PRESETS
from ooc_moe_wire.errors import InvalidRequest


def check_sizes(sizes: Sequence[str]) -> None:
    """Raises InvalidRequest if a size in `--sizes` is not the name of a preset."""
    for size in sizes:
        if size not in PRESETS:
            raise InvalidRequest(f"sizes: {size!r} is not one of {', '.join(PRESETS)}")


def check_at_least_one(**values: int) -> None:
    """Raises InvalidRequest if one of the values is below 1. Each argument is named as its option, and the message gives this name."""
    for name, value in values.items():
        if value < 1:
            raise InvalidRequest(f"{name}: {value} is not at least 1")
