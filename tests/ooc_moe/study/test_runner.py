"""The runner continues where it was stopped, and the failure of one run does not stop the others."""

import importlib.metadata
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from ooc_moe.metrics.log import read_metrics
from ooc_moe.metrics.run import RunRecord
from ooc_moe.study import runner
from ooc_moe.study.runner import LOG_FILE, State, Status, run_all, state_of, steps_done, steps_of
from ooc_moe_wire.errors import InvalidRequest
from tests.ooc_moe.runs import assert_same_run, wait_for
from tests.ooc_moe.study.made_up_studies import (
    TINY,
    write_run,
)


def test_how_far_a_run_came_is_read_from_its_directory(tmp_path: Path) -> None:
    configs = {name: replace(TINY, run_dir=tmp_path / name) for name in ("new", "broken", "begun", "done")}
    write_run(configs["broken"], with_checkpoint=False)
    write_run(configs["begun"], with_checkpoint=True)
    write_run(configs["done"], with_checkpoint=True, done=True)
    assert {name: state_of(config) for name, config in configs.items()} == {state.value: state for state in State}
    assert steps_of(configs["new"]) == 128
    assert [steps_done(configs[name].run_dir) for name in ("new", "begun", "done")] == [0, 32, 128]


def test_a_run_of_another_configuration_is_not_taken_for_this_one(tmp_path: Path) -> None:
    write_run(replace(TINY, run_dir=tmp_path / "run"), with_checkpoint=True, done=True)
    for changed, words in (
        (replace(TINY, steps_per_game=96), "steps_per_game 64, not 96"),
        (replace(TINY, agent=replace(TINY.agent, top_k=1)), "agent.top_k 2, not 1"),
    ):
        with pytest.raises(InvalidRequest, match=words):
            state_of(replace(changed, run_dir=tmp_path / "run"))


def test_a_run_may_be_read_from_elsewhere_than_where_it_was_made(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    write_run(replace(TINY, run_dir=run_dir, trace=str(run_dir / "accesses.trace")), with_checkpoint=True, done=True)
    elsewhere = run_dir.rename(tmp_path / "elsewhere")
    config = replace(TINY, run_dir=elsewhere, trace=str(elsewhere / "accesses.trace"))
    assert state_of(config) is State.DONE
    with pytest.raises(InvalidRequest, match=r"trace accesses\.trace, not None"):
        state_of(replace(config, trace=None))


# A stand-in for the process of a run: it finishes the run at once, or fails because the game is unknown.
_CHILD = """
import json, pathlib, sys
run_dir, config = pathlib.Path(sys.argv[1]), sys.stdin.read()
if "pixel/nothing" in config:
    print("InvalidRequest: game: 'pixel/nothing'")
    raise SystemExit(2)
(run_dir / "config.json").write_text(config)
(run_dir / "metrics.jsonl").write_text('{"event":"done","step":64}\\n')
"""


@pytest.mark.parametrize("real", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_all_runs_are_made_broken_ones_anew_and_a_failure_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, real: bool
) -> None:
    if not real:
        monkeypatch.setattr(runner, "RUN_PROCESS", ("-c", _CHILD))
    good, bad, done = (replace(TINY, run_dir=tmp_path / name, games=("pixel/catch",)) for name in ("good", "bad", "done"))
    bad = replace(bad, games=("pixel/nothing",))
    write_run(good, with_checkpoint=False)
    write_run(done, with_checkpoint=True, done=True)
    seen: list[Status] = []
    outcome = run_all([done, bad, good], jobs=2, watch=seen.append)
    assert not outcome.interrupted
    assert list(outcome.failed) == [bad.run_dir]
    assert "ended with 2: InvalidRequest: game: 'pixel/nothing'" in outcome.failed[bad.run_dir]
    assert state_of(good) is State.DONE
    if real:
        record = RunRecord.read(good.run_dir)
        assert record.scores.mean_PG.shape == (1, 1)
        assert record.made_by.startswith(importlib.metadata.version("ooc-moe"))
    (aside,) = tmp_path.glob("good.broken-*")
    assert [event["event"] for event in read_metrics(aside)] == ["update"]
    assert not (done.run_dir / LOG_FILE).exists()
    assert (seen[-1].done, seen[-1].total, seen[-1].failed) == (2, 3, 1)
    assert {run_dir for status in seen for run_dir in status.running} <= {good.run_dir, bad.run_dir}


_RUNNER = """
import sys
from pathlib import Path
from ooc_moe.config.run import RunConfig
from ooc_moe.study.runner import run_all
run_dir = Path(sys.argv[1])
outcome = run_all([RunConfig.from_json(sys.stdin.read(), run_dir)], jobs=1)
print(outcome.interrupted, len(outcome.failed))
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_runner_saves_and_goes_on_to_the_same_end(tmp_path: Path, number: int) -> None:
    # checkpoint_every is one update: where a checkpoint falls resets the environments, and a run stopped elsewhere would differ.
    config = replace(TINY, steps_per_game=32 * 40, checkpoint_every=1, run_dir=tmp_path / "stopped" / "run")
    undisturbed = replace(config, run_dir=tmp_path / "undisturbed" / "run")
    command = [sys.executable, "-c", _RUNNER, str(config.run_dir)]
    runner = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=os.getcwd())
    assert runner.stdin is not None
    runner.stdin.write(config.to_json())
    runner.stdin.close()
    wait_for(lambda: steps_done(config.run_dir) > 0)
    runner.send_signal(number)
    assert runner.stdout is not None
    assert runner.stdout.read().split() == ["True", "0"]
    runner.wait()
    assert state_of(config) is State.BEGUN
    assert run_all([config, undisturbed], jobs=2).failed == {}
    assert "resumed" in [event["event"] for event in read_metrics(config.run_dir)]
    assert_same_run(config.run_dir, undisturbed.run_dir)
