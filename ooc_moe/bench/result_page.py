"""What the benchmarks' result pages have in common: the targets that a figure meets, and the notes that people add to a page."""

from __future__ import annotations

from pathlib import Path


def met_target(value: float, *, must: float | None, aim: float | None, at_most: bool = False) -> str:
    """Names the stricter of two targets that `value` meets.

    Args:
        value: the figure.
        must: the value that it has to reach; None if there is none.
        aim: the value that we would like it to reach; None if there is none.
        at_most: whether smaller values are better, as for times and latencies.

    Returns:
        "aim", "must", or "no" if it meets neither; "" if there is no target.
    """
    targets = [(name, target) for name, target in (("aim", aim), ("must", must)) if target is not None]
    met = [name for name, target in targets if (value <= target if at_most else value >= target)]
    return met[0] if met else "no" if targets else ""


def kept_notes(page: Path, heading: str, *, missing: str) -> str:
    """Returns the notes of an existing page: `heading` and everything below it. A page without notes gets the remark `missing`."""
    if page.exists():
        _, found, below = page.read_text().partition(heading)
        if found:
            return found + below
    return f"{heading}\n\n({missing})"
