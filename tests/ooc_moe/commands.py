"""Runs the console script `ooc-moe` in the test's own process."""

from __future__ import annotations

import pytest

from ooc_moe.cli.main import main


def exit_code(*words: str) -> int:
    """Runs `ooc-moe WORDS` and returns its exit code."""
    with pytest.raises(SystemExit) as ended:
        main(words)
    return int(ended.value.code or 0)
