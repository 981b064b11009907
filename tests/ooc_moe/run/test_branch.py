"""A run of three games, taken back to the end of one, and branched from there, with the commands that a user types."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from ooc_moe.cli.main import main
from ooc_moe.config.run import RunConfig
from ooc_moe_client.remote.store import RemoteStore
from tests.conftest import DaemonProcess
from tests.ooc_moe.runs import assert_same_end, bodies, end_of, updates, without_clock

FLAGS = (
    "--preset",
    "tiny",
    "--num-envs",
    "4",
    "--rollout-steps",
    "8",
    "--epochs",
    "2",
    "--steps-per-game",
    "64",
    "--eval-steps",
    "8",
    "--quiet",
)
CHECKPOINTS = {"0-pixel-catch", "1-pixel-avoid", "2-pixel-toward", "latest"}
Run = Callable[..., str]


def _run(*arguments: object) -> None:
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    assert end.value.code == 0


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory, shared_daemon: DaemonProcess) -> Iterator[Path]:
    """Where runs/first is, of three games; the working directory of this module's tests."""
    directory = tmp_path_factory.mktemp("user")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        patch.setenv("OOC_MOE_STORE", shared_daemon.target)
        patch.setattr("ooc_moe.run.train.write_report", lambda run_dir: run_dir)
        patch.setattr("ooc_moe.run.train.print_summary", lambda run_dir, console: None)
        games = "pixel/catch,pixel/avoid,pixel/toward"
        _run("train", "--name", "first", "--games", games, "--store", shared_daemon.target, *FLAGS)
        yield directory


@pytest.fixture
def run(directory: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `ooc-moe`, which must succeed; gives what it printed."""

    def call(*arguments: object) -> str:
        capsys.readouterr()
        _run(*arguments)
        return capsys.readouterr().out

    return call


@pytest.fixture
def store(shared_daemon: DaemonProcess) -> Iterator[RemoteStore]:
    store = RemoteStore(shared_daemon.target)
    yield store
    store.close()


def test_a_branch_goes_on_as_its_run_did_and_leaves_it_alone(run, directory, store):
    before = bodies(store, "first/experts")
    run("branch", "runs/first", "runs/second", "--checkpoint", "0-pixel-catch")
    run("train", "--resume", "--name", "second", "--quiet")
    run("branch", "runs/first", "runs/third", "--checkpoint", "0-pixel-catch", "--games", "pixel/cross")
    run("train", "--resume", "--name", "third", "--quiet")
    first, second, third = (directory / "runs" / name for name in ("first", "second", "third"))
    assert without_clock(second) == without_clock(first)
    assert_same_end(second, first)
    assert bodies(store, "second/experts") == bodies(store, "first/experts") == before
    assert [event["game"] for event in updates(third)] == ["pixel/catch"] * 2 + ["pixel/cross"] * 2
    assert end_of(third, "0-pixel-catch.pt").progress == end_of(first, "0-pixel-catch.pt").progress


def test_snapshot_restore_and_bank_fork_bring_the_experts_of_the_end_of_a_game(run, directory, store, shared_daemon):
    catch, last = (end_of(directory / "runs" / "first", name).snapshot_id for name in ("0-pixel-catch.pt", "latest.pt"))
    at_the_end = bodies(store, "first/experts")
    run("bank", "fork", "first/experts", "catch/experts", "--snapshot", catch)
    of_catch = bodies(store, "catch/experts")
    assert of_catch != at_the_end
    run("snapshot", "restore", catch, "--yes")
    restored = bodies(store, "first/experts")
    assert {expert: restored[expert] for expert in of_catch} == of_catch  # It has grown since; a bank never shrinks.
    run("snapshot", "restore", last, "--yes")
    assert bodies(store, "first/experts") == at_the_end
    run("train", "--name", "begun", "--games", "pixel/cross", "--from-bank", "catch/experts", "--store", shared_daemon.target, *FLAGS)
    arrays = store.get_bank("begun/experts").spec.layout.arrays
    begun = bodies(store, "begun/experts")
    trained = [expert for expert, body in begun.items() if body != of_catch[expert]]
    assert 0 < len(trained) < len(begun)
    for expert in trained:  # From where the first game left it, with an optimizer of its own.
        before, after = arrays(of_catch[expert]), arrays(begun[expert])
        assert 0 < np.abs(after["w1"] - before["w1"]).max() < 0.05 * np.abs(before["w1"]).max()
        assert 0 < after["step"][0] <= before["step"][0], "as many updates again"


def test_a_run_goes_back_to_the_end_of_its_first_game_and_comes_to_the_same_end(run, directory, store, monkeypatch):
    first, before = directory / "runs" / "first", directory / "before"
    shutil.copytree(first, before)
    experts = bodies(store, "first/experts")
    with monkeypatch.context() as patch:
        patch.setattr("ooc_moe.run.trainer.Trainer.run", lambda trainer: None)
        run("train", "--resume", "--name", "first", "--checkpoint", "0-pixel-catch", "--quiet")
    assert {path.stem for path in (first / "checkpoints").glob("*.pt")} == {"0-pixel-catch", "latest"}
    assert [event["update"] for event in updates(first)] == [1, 2]
    assert [snapshot.id for snapshot in store.list_snapshots("first/experts")] == [end_of(first, "latest.pt").snapshot_id]
    assert bodies(store, "first/experts") != experts
    run("train", "--resume", "--name", "first", "--quiet")
    assert without_clock(first) == without_clock(before)
    assert {path.stem for path in (first / "checkpoints").glob("*.pt")} == CHECKPOINTS
    for name in CHECKPOINTS:
        assert_same_end(first, before, f"{name}.pt")
    assert bodies(store, "first/experts") == experts


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "--resume", "--name", "first", "--checkpoint", "9-chess"], ["checkpoint", "'9-chess'", "0-pixel-catch", "latest"]),
        (["train", "--name", "x", "--games", "pixel/catch", "--checkpoint", "0-krull"], ["checkpoint", "'0-krull'", "--resume"]),
        (["branch", "runs/first", "runs/first"], ["run_dir", "already holds a run"]),
        (["branch", "runs/none", "runs/x"], ["run_dir", "runs/none"]),
        (["branch", "runs/first", "runs/x", "--checkpoint", "9-chess"], ["checkpoint", "'9-chess'"]),
        (["branch", "runs/first", "runs/x", "--games", "chess"], ["chess"]),
        (["branch", "runs/first", "runs/catch"], ["'catch/experts'", "exists"]),
        (["branch", "runs/alone", "runs/x"], ["store", "runs/alone", "ooc-moe-server"]),
    ],
)
def test_a_mistake_is_one_line_and_makes_nothing(directory, capsys, arguments, words):
    if "runs/alone" in arguments:  # A run with a daemon of its own.
        shutil.copytree(directory / "runs" / "first", directory / "runs" / "alone")
        config = dataclasses.replace(RunConfig.read(Path("runs/alone")), store=None)
        Path("runs/alone/config.json").write_text(config.to_json())
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert [word for word in words if word not in error] == []
    assert not (directory / "runs" / "x").exists()
