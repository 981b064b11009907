"""A check of command-line options that several benchmarks share."""

from __future__ import annotations

from collections.abc import Sequence

from ooc_moe.config.agent import PRESETS
from ooc_moe_wire.errors import InvalidRequest


def check_sizes(sizes: Sequence[str]) -> None:
    """Raises InvalidRequest if a size in `--sizes` is not the name of a preset."""
    for size in sizes:
        if size not in PRESETS:
            raise InvalidRequest(f"sizes: {size!r} is not one of {', '.join(PRESETS)}")
