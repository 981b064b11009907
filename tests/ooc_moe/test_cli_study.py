"""The command `ooc-moe study`."""

from pathlib import Path

import pytest

from ooc_moe.cli import main


def test_the_command_lists_what_there_is_and_names_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*arguments: str) -> str:
        with pytest.raises(SystemExit):
            main(["study", *arguments])
        captured = capsys.readouterr()
        return " ".join((captured.out + captured.err).split())

    assert all(name in said() for name in ("synthetic", "atari-cpu", "caching"))
    assert "study: 'nothing' is not one of synthetic, " in said("nothing")
    assert "seeds: 0 is not at least 1" in said("synthetic", "--seeds", "0")
    assert "jobs: 0 is not at least 1" in said("synthetic", "--jobs", "0", "--runs", str(tmp_path))
    assert "new" in said("synthetic-twins", "--dry-run", "--runs", str(tmp_path))
