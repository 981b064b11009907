"""What the pages of all benchmarks have in common: judged figures, and notes that are kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from ooc_moe.bench.result_page import kept_notes, met_target


@pytest.mark.parametrize(
    ("value", "targets", "met"),
    [
        (2.0, {"must": 1.0, "aim": 2.0}, "aim"),
        (1.9, {"must": 1.0, "aim": 2.0}, "must"),
        (0.9, {"must": 1.0, "aim": 2.0}, "no"),
        (1.0, {"must": 1.0, "aim": None}, "must"),
        (0.9, {"must": None, "aim": 1.0}, "no"),
        (0.9, {"must": None, "aim": None}, ""),
        (1.0, {"must": 2.0, "aim": 1.0, "at_most": True}, "aim"),
        (2.1, {"must": 2.0, "aim": 1.0, "at_most": True}, "no"),
    ],
)
def test_the_stricter_target_that_a_figure_meets_is_named(value: float, targets: dict[str, float | None], met: str) -> None:
    assert met_target(value, **targets) == met  # type: ignore[arg-type]


def test_notes_of_a_page_are_kept_and_a_page_without_any_says_so(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    assert kept_notes(page, "## Notes", missing="to be written") == "## Notes\n\n(to be written)"
    page.write_text("# Title\n")
    assert kept_notes(page, "## Notes", missing="to be written") == "## Notes\n\n(to be written)"
    page.write_text("# Title\n\n## Notes\n\nThe disk does.\n")
    assert kept_notes(page, "## Notes", missing="to be written") == "## Notes\n\nThe disk does.\n"
