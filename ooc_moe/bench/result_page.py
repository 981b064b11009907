"""Helpers for the benchmarks' result pages: say which target a figure meets, and keep people's notes when a page is rewritten."""

from __future__ import annotations

from pathlib import Path


def met_target(value: float, *, must: float | None, aim: float | None, at_most: bool = False) -> str:
    """Names the stricter of two targets that `value` meets.

    Args:
        value: the measured figure.
        must: the value that it has to reach; None if there is none.
        aim: the stricter value that we would like it to reach; None if there is none.
        at_most: whether smaller values are better, as for times and latencies.

    Returns:
        "aim", "must", or "no" if `value` meets neither target; "" if there is no target.
    """
    targets = [(name, target) for name, target in (("aim", aim), ("must", must)) if target is not None]
    met = [name for name, target in targets if (value <= target if at_most else value >= target)]
    return met[0] if met else "no" if targets else ""


def kept_notes(page: Path, heading: str, *, missing: str) -> str:
    """Returns the notes that people have written on a result page: `heading` and everything below it.

    Without a page, or without this heading on it, the notes are `heading` and the remark `missing`.
    """
    if page.exists():
        _, found, below = page.read_text().partition(heading)
        if found:
            return found + below
    return f"{heading}\n\n({missing})"
