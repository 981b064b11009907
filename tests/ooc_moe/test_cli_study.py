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

    assert all(name in said() for name in ("synthetic", "atari-cpu", "caching", "22.6 M", "dense-clone dense with output cloning"))
    assert "study: 'nothing' is not one of synthetic, " in said("nothing")
    assert "seeds: 0 is not at least 1" in said("synthetic", "--seeds", "0")
    assert "jobs: 0 is not at least 1" in said("synthetic", "--jobs", "0", "--runs", str(tmp_path))
    assert "single pixel-blind-toward 0 0 51,200 new" in said("synthetic-twins", "--dry-run", "--runs", str(tmp_path))


def test_results_lie_beside_the_runs_unless_told_otherwise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, where in (([], tmp_path / "studies"), (["--results", str(tmp_path / "home")], tmp_path / "home")):
        with pytest.raises(SystemExit) as end:
            main(["study", "caching", "--tables-only", "--runs", str(tmp_path), *arguments])
        assert end.value.code == 0
        assert f"wrote {where / 'caching.md'}" in capsys.readouterr().out
        assert "0 of 12 are done" in (where / "caching.md").read_text()
