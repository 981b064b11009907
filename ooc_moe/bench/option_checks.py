"""Checks of options that several benchmarks have."""

from __future__ import annotations

from collections.abc import Sequence

from ooc_moe.config.agent import PRESETS
from ooc_moe_wire.errors import InvalidRequest


def check_sizes(sizes: Sequence[str]) -> None:
    """Raises InvalidRequest for a size that is not the name of a preset."""
    for size in sizes:
        if size not in PRESETS:
            raise InvalidRequest(f"sizes: {size!r} is not one of {', '.join(PRESETS)}")


def check_at_least_one(**values: int) -> None:
    """Raises InvalidRequest, naming the option, for the first value below 1."""
    for name, value in values.items():
        if value < 1:
            raise InvalidRequest(f"{name}: {value} is not at least 1")
