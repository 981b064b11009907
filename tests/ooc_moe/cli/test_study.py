"""The command `ooc-moe study`."""

from pathlib import Path

import pytest

from ooc_moe.cli.main import main
from ooc_moe.session.interrupts import INTERRUPTED_EXIT
from ooc_moe.study import runner
from ooc_moe.study.runner import Outcome


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


def test_results_lie_beside_the_runs_unless_told_otherwise(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["ooc-moe", "study", "caching", "--tables-only", "--seeds", "1"])
    for arguments, where in (([], tmp_path / "studies"), (["--results", str(tmp_path / "home")], tmp_path / "home")):
        with pytest.raises(SystemExit) as end:
            main(["study", "caching", "--tables-only", "--runs", str(tmp_path), *arguments])
        assert end.value.code == 0
        assert f"wrote {where / 'caching.md'}" in capsys.readouterr().out
        page = (where / "caching.md").read_text()
        assert "0 of 16 are done" in page
        assert "- command: `ooc-moe study caching --seeds 1`\n" in page  # Not the one that makes no run.


def test_an_interrupted_study_stops_at_once_and_says_how_to_continue(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = {tmp_path / "a run": "InvalidRequest: no"}
    monkeypatch.setattr(runner, "run_all", lambda configs, **options: Outcome(failed=failed, interrupted=True))
    monkeypatch.setattr("ooc_moe.cli.study._write_results", lambda *arguments: pytest.fail("it goes on working"))
    monkeypatch.setattr("sys.argv", ["ooc-moe", "study", "synthetic"])
    with pytest.raises(SystemExit) as end:
        main(["study", "synthetic", "--runs", str(tmp_path)])
    assert end.value.code == INTERRUPTED_EXIT
    said = " ".join(capsys.readouterr().out.split())
    assert "a run: InvalidRequest: no" in said
    assert "Continue with: ooc-moe study synthetic" in said
